"""Probability of the reference answer at the start of each step of a rollout, measured by the policy itself.

    state ─► cue ─► answer ─► closing        e.g. "... 3 + 4 = 7." ─► "So it is {" ─► "9" ─► "}"

The cue, the answer and the closing hang off every step's start as a branch; a pack forwards the rollout once for all of them
(pack/tree.py). The belief is the probability of answer and closing, given the cue; where several answers are accepted, that
of the likeliest. Temperature and top-p play no part.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from deepgrpo.errors import ConfigError, first_line
from deepgrpo.explore.base import Signal
from deepgrpo.explore.segments import node_ends
from deepgrpo.feedback import Score
from deepgrpo.model.policy import Policy
from deepgrpo.pack.layout import lay_out
from deepgrpo.pack.packs import pack_layout
from deepgrpo.records import Credit, CreditSpan, Node, Tree
from deepgrpo.rewards.base import references
from deepgrpo.train.objective import pack_logprobs
from deepgrpo.train.ranks import Ranks, SingleRank

_SCORE = Score(0.0, checked=False)


@dataclass(frozen=True, slots=True)
class _Probed:
    """A rollout with probes: a node per step and accepted answer, where the model's context has room for it."""

    tree: Tree
    credit: Credit
    bounds: tuple[int, ...]
    """Start of the first step, then the end of each step, in own tokens of the rollout."""
    steps: tuple[int, ...]
    """Step of each probe."""


Likelihood = Callable[[Sequence[Tree], Sequence[Credit]], tuple[np.ndarray, int]]
"""(trees, credits) → `[rows]` log-probs of the nodes with credit, in the order of `lay_out`, each summed over its credited
tokens, at temperature 1; and the tokens forwarded."""


@torch.no_grad()
def sequence_logprobs(
    policy: Policy, trees: Sequence[Tree], credits: Sequence[Credit], tokens_per_pack: int, ranks: Ranks | None = None
) -> tuple[np.ndarray, int]:
    """Compute a `Likelihood` with a policy.

    Args:
        tokens_per_pack: most tokens of a forward pass.
        ranks: processes that share the packs; all of them make the same call and get all values.
    """
    ranks = ranks or SingleRank()
    layout = lay_out(trees, credits)
    terms = layout.terms
    packs = pack_layout(trees, layout, tokens_per_pack, tree_packs=policy.verdict.packs, window=policy.verdict.window)
    found = np.zeros(len(layout.rows))
    if not packs:
        return found, 0
    training = policy.model.training
    policy.model.eval()
    try:
        for pack, counts in ranks.share(packs):
            logprob_n, _ = pack_logprobs(policy, terms, pack, policy.device, temperature=1.0)
            if counts:
                np.add.at(found, terms.sequence_N[pack.terms_n], logprob_n.double().cpu().numpy())
    finally:
        policy.model.train(training)
    return ranks.add(torch.from_numpy(found)).numpy(), sum(pack.num_tokens for pack in packs)


def measure_belief(
    policy: Policy, signal: Signal, nodes: Sequence[tuple[Tree, int]], likelihood: Likelihood
) -> tuple[list[np.ndarray], int]:
    """Measure the belief at the start of each step of main rollouts.

    Args:
        policy: for its tokenizer and the length of its context.
        nodes: (tree, node) of each rollout.
        likelihood: forwards the probes, here or where the learners are.

    Returns:
        for each rollout `[n]` probabilities, one per own token: that of its step; 0 where the context has no room to ask.
        number of forwarded tokens.

    Raises RewardError if a prompt has no reference answer.
    """
    probed = [_hang_probes(policy, signal, tree, node) for tree, node in nodes]
    log_answer, forwarded = likelihood([each.tree for each in probed], [each.credit for each in probed])
    found: list[np.ndarray] = []
    begin = 0
    for each in probed:
        belief = np.zeros(len(each.bounds) - 1)
        np.maximum.at(belief, np.array(each.steps, dtype=int), np.exp(log_answer[begin : begin + len(each.steps)]))
        found.append(np.repeat(belief, np.diff(each.bounds)))
        begin += len(each.steps)
    return found, forwarded


def check_texts(policy: Policy, signal: Signal) -> None:
    """Raise ConfigError if the tokenizer cannot encode cue and closing; one over few characters refuses all others."""
    for key, text in {"explore.cue": signal.cue, "explore.closing": signal.closing}.items():
        try:
            policy.tokenizer(text, add_special_tokens=False)
        except Exception as error:  # the library raises bare Exception for an unknown character
            raise ConfigError(
                f"{key} is {text!r}, which the tokenizer cannot encode ({first_line(error)}); use characters of its "
                'vocabulary, for the synthetic tasks "#"'
            ) from error


def _hang_probes(policy: Policy, signal: Signal, tree: Tree, index: int) -> _Probed:
    """Make a tree of one rollout with probes at the start of each of its steps."""
    node = tree.nodes[index]
    bounds = (0, *node_ends(signal.segment, node))

    def encode(text: str) -> tuple[int, ...]:
        return tuple(policy.tokenizer(text, add_special_tokens=False).input_ids) if text else ()

    cue = encode(signal.cue)
    answers = [encode(answer + signal.closing) for answer in references(tree.prompt, 'explore.type = "belief"')]
    before = len(tree.prompt.tokens)
    asked = [
        (step, start, (*cue, *answer))
        for step, start in enumerate(bounds[:-1])
        for answer in answers
        if before + start + len(cue + answer) <= policy.context
    ]
    probes = [Node(0, start, text, (0.0,) * len(text), "stop", "", _SCORE, "branch", 1) for _, start, text in asked]
    spans = tuple(CreditSpan(1 + i, len(cue), len(probe.tokens), 0.0, "branch") for i, probe in enumerate(probes))
    alone = Tree(tree.prompt, (node, *probes))
    return _Probed(alone, Credit(spans, ()), bounds, tuple(step for step, _, _ in asked))
