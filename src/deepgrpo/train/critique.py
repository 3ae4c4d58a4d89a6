"""The policy's critique of its own rollouts: the step that it names as the first wrong one.

    rollout ─► numbered steps ─► question in the chat template ─► one sampled answer ─► the number in it

The question is a prompt of its own: the policy reads its rollout as a text to judge. Every answer has an addressed draw, so
it does not depend on the batch, the engine or the number of workers.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from deepgrpo.answers.boxed import last_boxed
from deepgrpo.config import Config, TemplateConfig, template_of
from deepgrpo.engines.base import Engine, SampleStats, SamplingParams
from deepgrpo.errors import ConfigError, ModelError
from deepgrpo.explore.base import UNASKED, UNREAD, Critique, Limits, Measured
from deepgrpo.explore.segments import node_ends
from deepgrpo.model.policy import Policy
from deepgrpo.prompts.chat import Renderer, build_renderer
from deepgrpo.prompts.filling import fill
from deepgrpo.records import Node, Prompt, SampleRequest, Tree

_STEP = re.compile(r"\bsteps?\s*(?:number|no\.|is|was|#)?\s*[:*_=\[(#]*\s*(\d+)", re.IGNORECASE)
_NONE = re.compile(
    r"\b(?:no (?:wrong|incorrect|mistaken) step|no (?:step|error|mistake)s?\b|none\b|all (?:the )?steps are (?:right|correct))",
    re.IGNORECASE,
)
_NUMBER = re.compile(r"(?<![\d.,])\d+(?![\d]|[.,]\d)")


def build_critic(config: Config, policy: Policy, limits: Limits) -> Critic:
    """The critic of a recipe, without an engine. The question is plain text where the data's prompts are."""
    is_plain = not getattr(policy.tokenizer, "chat_template", None)
    template = TemplateConfig(chat=False if is_plain else template_of(config.data).chat)
    return Critic(build_renderer(template, policy.tokenizer), policy.tokenizer, limits.max_total_tokens)


@dataclass(frozen=True, slots=True)
class Critic:
    """Asks a policy about its rollouts.

    Example: Critic(renderer, policy.tokenizer, context=512, engine=engine).measure(critique, [(tree, 0)], [key]).
    """

    renderer: Renderer
    """Puts the question into the chat template of the data."""
    tokenizer: Any
    context: int
    """Longest question plus answer, in tokens."""
    engine: Engine | None = None
    """None: for `check` alone."""

    def check(self, critique: Critique) -> None:
        """Raise ConfigError if the tokenizer cannot encode the wording; one over few characters refuses all others."""
        for key, text in {"explore.question": critique.question, "explore.step": critique.step}.items():
            wording = fill(text, dict.fromkeys(("question", "steps", "count", "answer", "text"), "") | {"number": "1"})
            try:
                self.renderer.tokenize([wording or "1"])
            except ModelError as error:
                raise ConfigError(
                    f"{key} is {text!r}, which the tokenizer cannot encode ({error}). A model that knows only the characters "
                    'of a synthetic task cannot be asked in words: choose explore.type = "belief" or "oracle" for it, or a '
                    'wording in its characters, e.g. question = "{question}{steps}#", step = "{text}", for a test of a recipe'
                ) from error

    def measure(self, critique: Critique, nodes: Sequence[tuple[Tree, int]], keys: Sequence[int]) -> Measured:
        """Ask about main rollouts, given as (tree, node). See `explore.base.LOCATED` for the values."""
        assert self.engine is not None
        bounds = [(0, *node_ends(critique.segment, tree.nodes[node])) for tree, node in nodes]
        texts = [
            self._question(critique, tree.prompt, tree.nodes[node], bound)
            for (tree, node), bound in zip(nodes, bounds, strict=True)
        ]
        prefixes = self.renderer.tokenize(texts)
        asked = [i for i, prefix in enumerate(prefixes) if len(prefix) + critique.answer_tokens <= self.context]
        requests = [SampleRequest(prefixes[i], (keys[i],), critique.answer_tokens) for i in asked]
        answers, stats = self._sample(critique, requests)
        named = {i: read_step(answer, len(bounds[i]) - 1) for i, answer in zip(asked, answers, strict=True)}
        values: list[np.ndarray] = []
        for i, bound in enumerate(bounds):
            step = named.get(i)
            if step is None:
                values.append(np.full(bound[-1], UNREAD if i in named else UNASKED))
            else:
                values.append(np.repeat(np.arange(1, len(bound)) == step, np.diff(bound)).astype(float))
        return Measured(values, sum(len(request.prefix) for request in requests), stats, len(requests))

    def _sample(self, critique: Critique, requests: Sequence[SampleRequest]) -> tuple[list[str], SampleStats]:
        if not requests:
            return [], SampleStats()
        assert self.engine is not None
        greedy = critique.temperature == 0
        params = SamplingParams(1.0 if greedy else critique.temperature, greedy=greedy)
        completions, stats = self.engine.sample(requests, params)
        return [str(self.tokenizer.decode(c.tokens, skip_special_tokens=True)) for (c,) in completions], stats

    def _question(self, critique: Critique, prompt: Prompt, node: Node, bounds: Sequence[int]) -> str:
        parts = [node.tokens[a:b] for a, b in itertools.pairwise(bounds)]
        pieces = [str(self.tokenizer.decode(part, skip_special_tokens=True)).strip() for part in parts]
        steps = "".join(fill(critique.step, {"number": i, "text": text}) for i, text in enumerate(pieces, 1))
        turn = {"question": prompt.question, "steps": steps, "count": len(pieces), "answer": prompt.answer or ""}
        return self.renderer.text(fill(critique.question, turn))


def read_step(answer: str, count: int) -> int | None:
    r"""Number of the step that an answer names, 1 to `count`; 0 if it finds no wrong step; None if it cannot be read.

    In this order: the last \boxed{}; the last "step N"; words for "none"; the last whole number. A number outside of the
    steps is no answer, and no other place is tried then.

    >>> [read_step(text, 5) for text in ("3", "Step 1 is right, but step **4** is not.", "\\boxed{2}", "none", "It is 12.")]
    [3, 4, 2, 0, None]
    """
    boxed = last_boxed(answer)
    if boxed is not None and (found := _NUMBER.findall(boxed)):
        return _within(int(found[-1]), count)
    if found := _STEP.findall(answer):
        return _within(int(found[-1]), count)
    if _NONE.search(answer):
        return 0
    found = _NUMBER.findall(answer)
    return _within(int(found[-1]), count) if found else None


def _within(number: int, count: int) -> int | None:
    return number if 0 <= number <= count else None
