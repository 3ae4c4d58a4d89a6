"""Judged responses from prompts and from states of earlier responses, by the policy of an opened run; of episodes as well.

    prompt, or a state of a response ─► tree and pivot, as in training ─► `num_branches` continuations ─► judged responses
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from deepgrpo import rng
from deepgrpo.engines.base import SamplingParams
from deepgrpo.explore.base import main_pivot
from deepgrpo.feedback import Reply, Score
from deepgrpo.prompts.chain import RETRACT
from deepgrpo.records import ROOT, Completion, Node, Pivot, Prompt, SampleRequest, Tree
from deepgrpo.rewards.base import for_reward
from deepgrpo.train.setup import Run

FirstError = Callable[[Prompt, str], int | None]
"""(prompt, response) → character offset of the first wrong piece that stands."""
Start = tuple[Tree, Pivot]
"""A state that is continued: of the tree of a prompt, where the pivot lies."""


@dataclass(frozen=True, slots=True)
class Response:
    """A judged response. Example: Response(tree, (4, 7), replies=(), begins=0, done=Completion(...), text="#1", reward=0)."""

    tree: Tree
    """Of the state from which it was sampled."""
    tokens: tuple[int, ...]
    """The whole response, with what stood before that state."""
    replies: tuple[Reply, ...]
    """Replies of an environment, in `tokens`."""
    begins: int
    """Tokens before that state."""
    done: Completion
    """The continuation alone."""
    text: str
    reward: float

    @property
    def prompt(self) -> Prompt:
        return self.tree.prompt

    @property
    def given(self) -> int:
        """Tokens of replies in the continuation."""
        return sum(reply.end - reply.start for reply in self.done.replies)

    @property
    def sampled(self) -> int:
        """Tokens of the continuation that the policy wrote."""
        return len(self.done.tokens) - self.given

    def node(self) -> Node:
        """A response from the prompt as the first node of its tree."""
        done = self.done
        return Node(
            ROOT, 0, done.tokens, done.logprobs, done.finish, self.text, Score(self.reward), "main", 0, replies=done.replies
        )

    def state(self, offset: int, count: int) -> Start:
        """A state of a response from the prompt, to be continued `count` times."""
        return self.tree.add([main_pivot(1)], [self.node()]), Pivot(parent=0, offset=offset, num_branches=count)


def from_prompts(run: Run, prompts: Sequence[Prompt], count: int) -> list[Start]:
    """Prompts, to be answered `count` times each."""
    states = run.episodes.start(prompts) if run.episodes else [None] * len(prompts)
    return [(Tree(p, start=state), main_pivot(count)) for p, state in zip(prompts, states, strict=True)]


def sample(run: Run, starts: Sequence[Start], seed: int, stage: str, params: SamplingParams) -> list[list[Response]]:
    """Judged continuations of each state; none of a state whose replay by the environment differs."""
    requests = []
    for number, (tree, pivot) in enumerate(starts):
        prefix = tree.response(pivot.parent, pivot.offset)
        keys = tuple(rng.key(seed, "regime", stage, tree.prompt.id, number, i) for i in range(pivot.num_branches))
        room = run.limits.response(tree) - len(prefix)
        requests.append(SampleRequest(tree.path(pivot.parent, pivot.offset), keys, room, len(tree.prompt.tokens)))
    groups: list[list[Completion]] = [[] for _ in starts]
    if run.episodes is None:
        groups, _ = run.engine.sample(requests, params)
    else:
        places = [run.episodes.places(tree, [pivot])[0][0] for tree, pivot in starts]
        played = [number for number, place in enumerate(places) if place is not None]
        try:
            found, _, _ = run.episodes.sample(
                run.engine, [requests[i] for i in played], [place for place in places if place is not None], params
            )
        finally:
            run.engine.forget()
        for number, group in zip(played, found, strict=True):
            groups[number] = group
    return _judged(run, starts, groups)


def _judged(run: Run, starts: Sequence[Start], groups: Sequence[Sequence[Completion]]) -> list[list[Response]]:
    drafts = [_response(run, tree, pivot, done) for (tree, pivot), group in zip(starts, groups, strict=True) for done in group]
    seen = [(each.prompt, each.tokens) for each in drafts]
    if run.episodes is not None:
        seen = [for_reward(each.prompt, each.replies, each.tokens) for each in drafts]
    scores = run.judge(
        [prompt for prompt, _ in seen], [run.decode(tokens) for _, tokens in seen], [each.tokens for each in drafts],
        [each.done.finish for each in drafts],
    )  # fmt: skip
    judged = iter([replace(each, reward=score.value) for each, score in zip(drafts, scores, strict=True)])
    return [list(itertools.islice(judged, len(group))) for group in groups]


def _response(run: Run, tree: Tree, pivot: Pivot, done: Completion) -> Response:
    before = tree.response(pivot.parent, pivot.offset)
    own = (replace(r, start=len(before) + r.start, end=len(before) + r.end) for r in done.replies)
    whole = before + done.tokens
    replies = (*tree.replies(pivot.parent, pivot.offset), *own)
    return Response(tree, whole, replies, len(before), done, run.decode(whole), 0.0)


# ---------------------------------------------------------------- errors


def turn_of(run: Run, response: Response, error: int) -> int:
    """Number of the turn, from 1, that an error at a character of the response is in."""
    return 1 + sum(len(run.decode(response.tokens[: reply.end])) <= error for reply in response.replies)


def corrections(run: Run, first_error: FirstError | None, response: Response, upto: int | None = None) -> int:
    """Errors that the response has put right, up to a token: '!' in a chain, turns of an episode behind which none stands."""
    end = len(response.tokens) if upto is None else upto
    if run.episodes is None or first_error is None:
        return run.decode(response.tokens[:end]).count(RETRACT)
    ends = [*(reply.end for reply in response.replies if reply.end <= end), end]
    stands = [first_error(response.prompt, run.decode(response.tokens[:each])) is not None for each in ends]
    return sum(before and not after for before, after in itertools.pairwise(stands))
