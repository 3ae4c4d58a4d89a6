"""Records passed between the stages of a step. All are frozen: a stage reads one and creates the next.

    Prompt ─► SampleRequest ─► Completion ─► Node/Tree ─► Credit ─► (pack, loss) ─► StepReport

The worked example of the docstrings below. The prompt has 3 tokens. Main rollout 0 has 6 tokens and failed; its pivot
is after token 4, where K = 2 branches of 2 and 3 tokens were sampled:

    prompt ──┬── node 0  [t0 t1 t2 t3 | t4 t5]     main, reward 0
             │                        ├── node 2  [b0 b1]       branch, parent 0, offset 4, reward 1
             │                        └── node 3  [b0 b1 b2]    branch, parent 0, offset 4, reward 0
             └── node 1  [t0 t1 t2 t3 t4]          main, reward 1

A node owns only its own tokens: a shared prefix is stored once, counted once, and never trained by a branch. `path(2)`
is prompt + t0..t3 + b0 b1: 3 + 4 + 2 = 9 tokens.

Tokens of an earlier rollout that a tree continues are a node of the stream "given": context that was not sampled in this
step, that no credit may train, and that costs prefix tokens only.

With an environment, a node holds turns of the model and the environment's replies between them. The tokens of a reply are
given, too: they stand between the node's own tokens, and are never trained.

    node 0  [f 3 ? | 7 ; | f 7 ? | 2 ; | # 2]      replies (3, 5) and (8, 10), and one at (12, 12), which ends the episode
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from deepgrpo.feedback import Reply, Score

ROOT = -1
"""Parent of a main rollout: the prompt."""

NO_PIVOT = -1
"""`Node.pivot` of a given node, which was sampled at no pivot of its tree."""

FinishReason = Literal["stop", "length", "segment"]
"""`stop`: the model ended the text (EOS or a stop string). `length`: truncated at the limit. `segment`: cut on purpose,
to be continued (`Pivot.max_tokens`). A segment is not a response: rewards and metrics skip it."""

Stream = Literal["main", "branch"]
"""Streams of sampled text; the loss has one mean per stream."""

NodeStream = Literal["main", "branch", "given"]
"""`given`: tokens of an earlier rollout, as context for continuations; never trained."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """One task instance, rendered and tokenized.

    Example: Prompt(id="gsm8k-7", text="<|im_start|>user ...", tokens=(1, 22, ...), question="Natalia ...",
    answer="72", columns={"solution": "..."}).
    """

    id: str
    text: str
    """The model's input: the question inside its template."""
    tokens: tuple[int, ...]
    question: str
    answer: str | None = None
    columns: Mapping[str, Any] = field(default_factory=dict)
    """All columns of the row, passed to the reward."""
    accepted: tuple[str, ...] = ()
    """All accepted answers of a row with several, `answer` first; empty if `answer` is the only one."""
    messages: tuple[Mapping[str, Any], ...] = ()
    """The prompt as messages, as in the row; empty for a question. `question` is then the text of the last user turn."""
    source: str = ""
    """Name of its source in a mix; empty outside one."""


@dataclass(frozen=True, slots=True)
class SampleRequest:
    """Request to continue one prefix several times; the engine encodes the prefix once.

    Example: the G = 8 rollouts of a prompt are one request with 8 keys. K = 4 branches at a pivot are one request whose
    `prefix` is the prompt and the rollout up to the pivot.
    """

    prefix: tuple[int, ...]
    keys: tuple[int, ...]
    """One random key (`rng.key`) per continuation."""
    max_new_tokens: int
    response_start: int | None = None
    """Start of the response in `prefix`, in an episode of its newest turn; a stop string may begin from there on. None: the
    prefix is all prompt."""
    known: int | None = None
    """In an episode: tokens at the start of the prefix that an earlier call has encoded or sampled, 0 in the first turn. An
    engine that keeps keys and values encodes only the rest. None: no episode."""

    @property
    def response(self) -> tuple[int, ...]:
        """Response tokens at the end of the prefix."""
        return self.prefix[self.response_start :] if self.response_start is not None else ()


@dataclass(frozen=True, slots=True)
class Completion:
    """One continuation. `tokens` includes the stop token, if any."""

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    """log μ(token) under the sampling distribution, temperature and top-p included; 0 for the tokens of a reply."""
    finish: FinishReason
    replies: tuple[Reply, ...] = ()
    """Replies of an environment."""


@dataclass(frozen=True, slots=True)
class Node:
    """One contiguous piece of text: sampled in this step, or given.

    Example (node 2 above): Node(parent=0, offset=4, tokens=(b0, b1), stream="branch", pivot=0, ...).
    """

    parent: int
    """Index of the parent node in `Tree.nodes`, or ROOT."""
    offset: int
    """Number of the parent's own tokens before this node (0 if the parent is the prompt)."""
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish: FinishReason
    text: str
    """The whole response: the path from the end of the prompt to the end of this node."""
    score: Score
    stream: NodeStream
    pivot: int
    """Index in `Tree.pivots` of the pivot where this node was sampled; NO_PIVOT for a given node."""
    version: int = 0
    """Policy version that sampled it, in optimizer steps."""
    signals: Mapping[str, tuple[float, ...]] = field(default_factory=dict, hash=False)
    """Signals requested by the strategy: name → one number per token."""
    replies: tuple[Reply, ...] = field(default=(), hash=False)
    """Replies of an environment to the turns that end in this node, in order."""

    @property
    def reward(self) -> float:
        return self.score.value

    @property
    def outcome(self) -> float:
        """The number that is compared with `explore.success_threshold`: the reward, or that of the part `reward.success`."""
        return self.score.judged

    @property
    def complete(self) -> bool:
        """True if a response ends or was truncated here; False for a segment, which is to be continued."""
        return self.finish != "segment"

    @property
    def sampled(self) -> bool:
        """False for a given node."""
        return self.stream != "given"

    @property
    def num_sampled(self) -> int:
        """Own tokens that the policy sampled in this step."""
        return len(self.sampled_places()) if self.sampled else 0

    def sampled_places(self, start: int = 0, end: int | None = None) -> list[int]:
        """Own tokens from `start` to `end` that belong to no reply, by index."""
        places = range(start, len(self.tokens) if end is None else end)
        if not self.replies:
            return list(places)
        given = {place for reply in self.replies for place in range(reply.start, reply.end)}
        return [place for place in places if place not in given]


@dataclass(frozen=True, slots=True)
class Given:
    """Tokens of an earlier rollout of the prompt. Example: Given(tokens=(t0, t1, t2, t3), version=12)."""

    tokens: tuple[int, ...]
    version: int = 0
    """Policy version that sampled them."""


@dataclass(frozen=True, slots=True)
class Pivot:
    """State from which `num_branches` continuations are sampled.

    The first pivot of every tree is the prompt itself: Pivot(parent=ROOT, offset=0, num_branches=G).
    """

    parent: int
    offset: int
    num_branches: int
    stream: Stream = "branch"
    ratio: float = 0.0
    """Depth (index + 1) / len(chain), root included; 0 for the first pivot of a tree."""
    candidates: tuple[int, ...] = ()
    """Candidate offsets in the order of the chain (for inspection)."""
    q: tuple[float, ...] = ()
    """Probability of each candidate at the draw (for inspection)."""
    max_tokens: int | None = None
    """Longest continuation in tokens; one cut there is a segment. None: up to the response's limit."""
    given: Given | None = None
    """In a plan: tokens to put behind this state before sampling. Growth makes a given node of them and moves the pivot to
    its end, so a grown tree has none."""


@dataclass(frozen=True, slots=True)
class Tree:
    """A prompt with all nodes and pivots sampled from it. `add` returns a new tree."""

    prompt: Prompt
    nodes: tuple[Node, ...] = ()
    pivots: tuple[Pivot, ...] = ()
    start: Any = None
    """The environment's state before the first turn, plain JSON; None without one, or where it cannot be given."""

    def add(self, pivots: Sequence[Pivot], nodes: Sequence[Node]) -> Tree:
        return replace(self, pivots=self.pivots + tuple(pivots), nodes=self.nodes + tuple(nodes))

    def with_signal(self, index: int, name: str, values: tuple[float, ...]) -> Tree:
        """Copy of the tree with one more signal on a node."""
        node = self.nodes[index]
        assert len(values) == len(node.tokens), f"{len(values)} values of {name} for {len(node.tokens)} tokens"
        nodes = list(self.nodes)
        nodes[index] = replace(node, signals={**node.signals, name: values})
        return replace(self, nodes=tuple(nodes))

    def spans(self, index: int, upto: int | None = None) -> list[tuple[int, int, int]]:
        """Path to a node as (node, start, end) spans of own tokens, from the root on.

        `upto` cuts the last span (default: all tokens of the node). `spans(2)` of the worked example is
        [(0, 0, 4), (2, 0, 2)].
        """
        path: list[tuple[int, int, int]] = []
        end = len(self.nodes[index].tokens) if upto is None else upto
        while index != ROOT:
            path.append((index, 0, end))
            index, end = self.nodes[index].parent, self.nodes[index].offset
        return path[::-1]

    def response(self, index: int, upto: int | None = None) -> tuple[int, ...]:
        """Response tokens along the path to a node, without the prompt."""
        if index == ROOT:
            return ()
        return tuple(t for node, a, b in self.spans(index, upto) for t in self.nodes[node].tokens[a:b])

    def path(self, index: int, upto: int | None = None) -> tuple[int, ...]:
        """Prompt and response tokens along the path to a node."""
        return self.prompt.tokens + self.response(index, upto)

    def replies(self, index: int, upto: int | None = None) -> list[Reply]:
        """Replies along the path to a node, up to a state of it, with `start` and `end` in response tokens."""
        found: list[Reply] = []
        before = 0
        for node, _, end in self.spans(index, upto) if index != ROOT else ():
            for reply in self.nodes[node].replies:
                if reply.end <= end:
                    found.append(replace(reply, start=before + reply.start, end=before + reply.end))
            before += end
        return found

    def children(self, pivot: int) -> list[int]:
        """Indices of the nodes sampled at a pivot, in sampling order."""
        return [i for i, node in enumerate(self.nodes) if node.pivot == pivot]

    def stream(self, stream: NodeStream) -> Iterator[tuple[int, Node]]:
        return ((i, node) for i, node in enumerate(self.nodes) if node.stream == stream)


@dataclass(frozen=True, slots=True)
class CreditSpan:
    """Tokens [start, end) of a node, trained with one advantage in one stream."""

    node: int
    start: int
    end: int
    advantage: float
    stream: Stream


@dataclass(frozen=True, slots=True)
class Group:
    """Siblings compared with each other, for the metrics."""

    stream: Stream
    rewards: tuple[float, ...]

    @property
    def mixed(self) -> bool:
        """True if the rewards differ, so that the group carries a signal."""
        return max(self.rewards) - min(self.rewards) > 1e-8


@dataclass(frozen=True, slots=True)
class Credit:
    """Credit of one tree: the tokens to train, each span with its advantage and stream."""

    spans: tuple[CreditSpan, ...]
    groups: tuple[Group, ...]
