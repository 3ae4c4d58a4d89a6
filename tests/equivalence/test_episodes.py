"""Episodes of several turns: what is given is never trained, and a tree of them says what its paths say."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from deepgrpo.config import (
    AttnRLExplore,
    BeliefExplore,
    DeepExplore,
    ExploreConfig,
    FR3EExplore,
    RandomExplore,
    ScratchModel,
    TreeRLExplore,
    parse_config,
)
from deepgrpo.engines.base import SamplingParams
from deepgrpo.engines.embedded.engine import EmbeddedEngine
from deepgrpo.envs.base import Environment
from deepgrpo.errors import ConfigError
from deepgrpo.explore import build_strategy
from deepgrpo.explore.base import Context, Limits
from deepgrpo.explore.episodes import Episodes
from deepgrpo.explore.grow import Growth, grow
from deepgrpo.explore.segments import node_ends
from deepgrpo.feedback import Reply, Score
from deepgrpo.model.loading import scratch_policy
from deepgrpo.pack.layout import lay_out
from deepgrpo.pack.packs import pack_layout
from deepgrpo.prompts import synthetic
from deepgrpo.prompts.between import Between
from deepgrpo.records import ROOT, Credit, CreditSpan, Node, Prompt, Tree
from deepgrpo.rewards.base import judge
from deepgrpo.rewards.env import EnvironmentReward
from deepgrpo.runs.layout import RunDir
from deepgrpo.runs.trees import check_structure, tree_from_json, tree_to_json
from deepgrpo.train.learner import Learner
from deepgrpo.train.loop import train
from deepgrpo.train.objective import pack_logprobs
from deepgrpo.train.optim import build_optimizer
from deepgrpo.train.signals import build_signals
from digits_env import Digits, Server
from tiny import byte_tokenizer

MODEL = {"type": "scratch", "hidden_size": 32, "num_layers": 2, "num_heads": 2, "intermediate_size": 64, "max_position": 160}
PROMPTS = ("3+4*2:", "1+1:", "2-1:")
MOST_TURNS = 4
TURNS = {"type": "turn"}
DEEP = DeepExplore(num_rollouts=4, branches_per_pivot=3, segments=TURNS, success_threshold=9.0)


def world(tokenizer: Any, environment: Environment, chat: bool = False, seed: int = 3) -> Any:
    """A random policy with its engine, and the episodes of an environment."""
    policy = scratch_policy(ScratchModel.model_validate(MODEL), tokenizer, seed=seed)
    policy.try_tree_packing()
    between = Between(tokenizer, environment.role, chat, policy.eos_ids, {})
    episodes = Episodes(
        environment, lambda text, ended: between.encode(text, ended=ended), tokenizer.decode, frozenset(policy.eos_ids),
        MOST_TURNS,
    )
    prompts = [
        Prompt(f"p{i}", text, tuple(tokenizer(text, add_special_tokens=False).input_ids), text, "1")
        for i, text in enumerate(PROMPTS)
    ]
    return SimpleNamespace(
        policy=policy, tokenizer=tokenizer, engine=EmbeddedEngine(policy, keep_bytes=2**28), episodes=episodes,
        prompts=prompts,
    )  # fmt: skip


def play(where: Any, explore: ExploreConfig = DEEP, params: SamplingParams | None = None, **changes: Any) -> Growth:
    strategy = build_strategy(explore, Context("none", where.tokenizer, None))
    return grow(
        changes.get("prompts", where.prompts), strategy, strategy.initial_state(), changes.get("engine", where.engine),
        functools.partial(judge, EnvironmentReward(), None),
        decode=lambda tokens: where.tokenizer.decode(tokens, skip_special_tokens=True), params=params or SamplingParams(),
        limits=Limits(40, 160), seed=1, step=1, episodes=changes.get("episodes", where.episodes),
        signals=changes.get("signals"),
    )  # fmt: skip


@pytest.fixture(scope="module")
def characters() -> Any:
    """Turns of digits and signs, without a chat template."""
    return world(synthetic.tokenizer(), Digits())


@pytest.fixture(scope="module")
def grown(characters: Any) -> Growth:
    return play(characters)


@pytest.fixture(scope="module")
def trapped() -> tuple[Any, Growth]:
    """Turns of random bytes with a chat template: most of what the model writes is no UTF-8, and is encoded otherwise."""
    where = world(byte_tokenizer(), Digits(), chat=True, seed=5)
    return where, play(where)


def credit_of(tree: Tree) -> Credit:
    """All own tokens of all nodes, replies included, with an advantage."""
    return Credit(
        tuple(CreditSpan(i, 0, len(n.tokens), 1.0 + i, "branch" if i % 2 else "main") for i, n in enumerate(tree.nodes)), ()
    )


def logprobs(where: Any, trees: Sequence[Tree], credits: Sequence[Credit], *, packed: bool) -> tuple[np.ndarray, np.ndarray]:
    """Log-probs of all terms by the learner's own path, and those that the sampler reported."""
    layout = lay_out(trees, credits)
    found = np.zeros(len(layout.terms))
    for pack in pack_layout(trees, layout, 512, tree_packs=packed):
        with torch.no_grad():
            logprob_n, _ = pack_logprobs(where.policy, layout.terms, pack, where.policy.device, temperature=1.0)
        found[pack.terms_n] = logprob_n.numpy()
    return found, layout.terms.sampler_logprob_N


def learner(where: Any, packed: bool = True) -> Learner:
    config = parse_config(
        {
            "model": MODEL, "data": {"type": "synthetic"}, "reward": {"type": "task"}, "loss": {"beta": 0.0},
            "optim": {"lr": 1e-2}, "learner": {"tree_packing": "on" if packed else "off", "tokens_per_pack": 512},
        }
    )  # fmt: skip
    return Learner(where.policy, None, build_optimizer(where.policy, config.optim), config)


# ---------------------------------------------------------------- growth


def test_an_episode_is_turns_and_replies(characters: Any, grown: Growth) -> None:
    """Every reply is that of the environment to the text before it, and its tokens are the observation's."""
    env, decode = Digits(), characters.tokenizer.decode
    turns = calls = given = 0
    for tree in grown.trees:
        assert tree.start == env.start(tree.prompt)
        for index, node in enumerate(tree.nodes):
            response, replies = tree.response(index), tree.replies(index)
            state, begins = tree.start, 0
            for number, reply in enumerate(replies):
                text = decode([t for t in response[begins : reply.start] if t not in characters.policy.eos_ids])
                turn = env.step(state, text)
                last = number == len(replies) - 1
                assert (reply.observation, reply.state, reply.reward) == (turn.observation, turn.state, turn.reward)
                shown = decode(response[reply.start : reply.end])
                assert shown == turn.observation or (shown == "" and last and node.complete)
                assert not turn.done or (last and node.finish == "stop")
                state, begins = turn.state, reply.end
            assert node.reward == sum(reply.reward or 0.0 for reply in replies)
            assert len(replies) <= MOST_TURNS and len(response) <= 40
            own = node.replies
            turns, calls = turns + len(own), calls + sum(reply.calls for reply in own)
            given += sum(reply.end - reply.start for reply in own)
            assert node.num_sampled == len(node.tokens) - sum(reply.end - reply.start for reply in own)
            assert all(node.logprobs[place] == 0.0 for reply in own for place in range(reply.start, reply.end))
    cost = grown.episodes
    assert (cost.turns, cost.calls, cost.given_tokens) == (turns, calls, given)
    assert grown.stats.sampled_tokens == sum(node.num_sampled for tree in grown.trees for node in tree.nodes)
    ends = {(node.finish, len(node.replies) > 1) for tree in grown.trees for node in tree.nodes}
    assert ends == {("stop", False), ("stop", True), ("length", False), ("length", True)}  # the world is not too small


def test_no_prefix_is_encoded_twice(characters: Any, grown: Growth) -> None:
    """The prompts, the observations, and before each of these the turn's last token, which no step has fed; branches nothing.

    A reply is counted where the model went on behind it, once for equal paths.
    """
    followed = {
        (tree.path(index, reply.end), reply.end - reply.start)
        for tree in grown.trees for index, node in enumerate(tree.nodes) for reply in node.replies
        if reply.end < len(node.tokens)
    }  # fmt: skip
    wanted = sum(len(p.tokens) for p in characters.prompts) + sum(1 + shown for _, shown in followed)
    assert grown.stats.prefix_tokens_encoded == wanted
    forgetful = play(characters, engine=EmbeddedEngine(characters.policy))
    assert forgetful.stats.prefix_tokens_encoded > 2 * wanted
    assert [[n.tokens for n in tree.nodes] for tree in forgetful.trees] == [
        [n.tokens for n in tree.nodes] for tree in grown.trees
    ]


def test_pivots_lie_before_turns(grown: Growth) -> None:
    pivots = [(tree, pivot) for tree in grown.trees for pivot in tree.pivots if pivot.parent != ROOT]
    assert sum(pivot.offset > 0 for _, pivot in pivots) > 3
    for tree, pivot in pivots:
        node = tree.nodes[pivot.parent]
        states = [0, *(reply.end for reply in node.replies if reply.end < len(node.tokens))]
        assert list(pivot.candidates) == sorted(set(states))
        before = tree.replies(pivot.parent, pivot.offset)
        assert [reply.end for reply in before] == [end for end in states[1:] if end <= pivot.offset]


def test_segments_end_behind_replies() -> None:
    """Turns of 3 and 3 tokens, replies of 2 tokens each, and a last turn of one; every turn is cut in twos."""
    replies = (Reply(3, 5), Reply(8, 10), Reply(11, 11))
    node = Node(ROOT, 0, tuple(range(11)), (0.0,) * 11, "stop", "", Score(0.0), "main", 0, replies=replies)

    def twos(tokens: Sequence[int]) -> list[int]:
        return [*range(2, len(tokens), 2), len(tokens)] if tokens else []

    assert node_ends(twos, node) == [2, 5, 7, 10, 11]
    assert node_ends(lambda tokens: [len(tokens)] if tokens else [], node) == [5, 10, 11]
    assert node.sampled_places() == [0, 1, 2, 5, 6, 7, 10]
    assert node.sampled_places(2, 6) == [2, 5]


def test_other_strategies_play(characters: Any) -> None:
    explore = RandomExplore(num_rollouts=2, branches_per_pivot=2, segments=TURNS, success_threshold=9.0)
    trees = play(characters, explore).trees
    assert any(pivot.offset for tree in trees for pivot in tree.pivots)


def test_a_belief_is_measured_before_each_turn(characters: Any) -> None:
    from deepgrpo.explore.base import Measured

    def signals(signal: Any, nodes: Sequence[tuple[Tree, int]], keys: Sequence[int]) -> Measured:
        values = []
        for tree, index in nodes:
            ends = node_ends(signal.segment, tree.nodes[index])
            values.append(np.repeat(np.arange(len(ends), dtype=float), np.diff([0, *ends])))
        return Measured(values, 0)

    explore = BeliefExplore(num_rollouts=3, branches_per_pivot=2, segments=TURNS, success_threshold=9.0, temperature=1e-3)
    trees = play(characters, explore, signals=signals).trees
    # B rises by 1 from turn to turn and falls to 0 behind the last, so every pivot is the state before the last turn
    pivots = [pivot for tree in trees for pivot in tree.pivots if pivot.parent != ROOT]
    assert pivots and all(pivot.offset == pivot.candidates[-1] for pivot in pivots)


@pytest.mark.parametrize(
    "explore",
    [
        TreeRLExplore(num_rollouts=2, num_pivots=3, num_rounds=2, mask_after=("7",), token_mean="remove"),
        FR3EExplore(num_bases=2, num_anchors=4, rollouts_per_state=2, success_threshold=-0.5),
        AttnRLExplore(num_rollouts=3, num_pivots=2, lag=1, segments={"type": "tokens", "size": 2}),
    ],
    ids=lambda explore: explore.type,
)  # fmt: skip
def test_strategies_that_branch_at_tokens_branch_at_those_of_the_model(characters: Any, explore: Any) -> None:
    """A branch inside a turn goes on with it: the environment hears the whole turn. Replies are not resampled or credited."""
    strategy = build_strategy(explore, Context("none", characters.tokenizer, None))
    signals = build_signals(characters.policy, strategy, 512)
    trees = play(characters, explore, signals=signals).trees
    env, decode, eos, inside = Digits(), characters.tokenizer.decode, characters.policy.eos_ids, 0
    for tree in trees:
        for pivot in tree.pivots:
            replies = tree.nodes[pivot.parent].replies if pivot.parent != ROOT else ()
            assert not any(reply.start <= pivot.offset < reply.end for reply in replies)
            before = max((reply.end for reply in replies if reply.end <= pivot.offset), default=0)
            inside += bool(replies) and before < pivot.offset
        for index in range(len(tree.nodes)):
            response, state, begins = tree.response(index), tree.start, 0
            for reply in tree.replies(index):
                turn = env.step(state, decode([t for t in response[begins : reply.start] if t not in eos]))
                assert (reply.observation, reply.state) == (turn.observation, turn.state)
                state, begins = turn.state, reply.end
        credit = strategy.credit(tree)
        terms = lay_out([tree], [credit]).terms
        covered = {(span.node, place) for span in credit.spans for place in range(span.start, span.end)}
        own = {(i, place) for i, node in enumerate(tree.nodes) for place in node.sampled_places()}
        assert len(terms) == len(covered & own)
    assert inside > 3


# ---------------------------------------------------------------- replay


def strip(trees: Sequence[Tree]) -> Any:
    return [[(n.parent, n.offset, n.tokens, n.logprobs, n.score, n.pivot) for n in tree.nodes] for tree in trees]


def test_a_pivots_state_is_its_replay(characters: Any, grown: Growth) -> None:
    """Live instances, replayed at every pivot, grow the tree that stored states grow; and none is left over."""
    server = Server()
    replayed = play(characters, episodes=replace(characters.episodes, environment=server))
    assert strip(replayed.trees) == strip(grown.trees)
    assert all(tree.start is None and all(r.state is None for n in tree.nodes for r in n.replies) for tree in replayed.trees)
    before = [
        len(tree.replies(pivot.parent, pivot.offset)) * pivot.num_branches for tree in grown.trees for pivot in tree.pivots
    ]
    assert replayed.episodes.replayed == sum(before) > 5
    assert replayed.episodes.differing == 0
    assert not server.live


def test_a_pivot_is_dropped_where_the_replay_differs(characters: Any, grown: Growth) -> None:
    server = Server(flaky=True)
    found = play(characters, episodes=replace(characters.episodes, environment=server))
    branched = [pivot for tree in found.trees for pivot in tree.pivots if pivot.parent != ROOT]
    assert found.episodes.differing > 0
    assert all(pivot.offset == 0 for pivot in branched)  # what need not be replayed is kept
    assert len(branched) + found.episodes.differing == sum(len(tree.nodes) >= 4 and 4 for tree in found.trees)
    assert not server.live


# ---------------------------------------------------------------- training


@pytest.mark.parametrize("kind", ["characters", "bytes"])
def test_a_tree_of_episodes_is_its_paths(kind: str, characters: Any, grown: Growth, trapped: tuple[Any, Growth]) -> None:
    """Log-probs of packs, of single paths, and of the sampler agree, also where the text's own encoding is another."""
    where, growth = (characters, grown) if kind == "characters" else trapped
    credits = [credit_of(tree) for tree in growth.trees]
    packed, sampled = logprobs(where, growth.trees, credits, packed=True)
    rows, _ = logprobs(where, growth.trees, credits, packed=False)
    assert np.abs(packed - rows).max() < 1e-5
    assert np.abs(packed - sampled).max() < 1e-4
    assert len(packed) == growth.stats.sampled_tokens  # every sampled token is a term, and no given one
    if kind == "bytes":
        nodes = [node for tree in growth.trees for node in tree.nodes]
        again = [where.tokenizer(where.tokenizer.decode(node.tokens), add_special_tokens=False).input_ids for node in nodes]
        assert sum(tuple(ids) != node.tokens for ids, node in zip(again, nodes, strict=True)) > len(nodes) / 2
        shown = [reply for node in nodes for reply in node.replies if reply.end > reply.start]
        assert shown and any(reply.end - reply.start > len(reply.observation) for reply in shown)  # the template's own text


def test_given_tokens_have_no_gradient(characters: Any, grown: Growth) -> None:
    """Credit that covers replies alone trains nothing, exactly; the same spans do train where the tokens were sampled."""
    trees = grown.trees
    spans = [
        Credit(
            tuple(
                CreditSpan(i, reply.start, reply.end, 1.0, "main")
                for i, node in enumerate(tree.nodes) for reply in node.replies if reply.end > reply.start
            ), (),
        )
        for tree in trees
    ]  # fmt: skip
    assert sum(len(credit.spans) for credit in spans) > 5
    assert len(lay_out(trees, spans).terms) == 0
    before = {name: value.clone() for name, value in characters.policy.model.state_dict().items()}
    update = learner(characters).update(trees, spans)
    assert (update.optimizer_steps, update.ledger.trained_tokens) == (0, 0)
    assert all(torch.equal(value, before[name]) for name, value in characters.policy.model.state_dict().items())
    sampled = [replace(tree, nodes=tuple(replace(node, replies=()) for node in tree.nodes)) for tree in trees]
    copy = SimpleNamespace(policy=scratch_policy(ScratchModel.model_validate(MODEL), characters.tokenizer, seed=3))
    assert learner(copy, packed=False).update(sampled, spans).metrics["grad_norm"] > 0.01


def gradient(where: Any, trees: Sequence[Tree], credits: Sequence[Credit]) -> list[torch.Tensor]:
    found = learner(where)
    layout = lay_out(trees, credits)
    where.policy.model.zero_grad()
    observed, weights = found.objective.observed(layout.terms), found.objective.weights(layout.terms)
    for pack in pack_layout(trees, layout, 512, tree_packs=True):
        found.objective.of_pack(where.policy, None, layout.terms, weights, pack, None, observed).backward()
    return [p.grad.clone() for p in where.policy.model.parameters() if p.grad is not None]


def test_the_gradient_is_that_of_the_turns(characters: Any, grown: Growth) -> None:
    """Whole spans of credit have the gradient of spans without the replies, bit by bit; log-probs of replies are not read."""
    whole = [credit_of(tree) for tree in grown.trees]
    cut = []
    noisy = []
    for tree, credit in zip(grown.trees, whole, strict=True):
        spans = []
        for span in credit.spans:
            starts = [0, *(reply.end for reply in tree.nodes[span.node].replies)]
            ends = [*(reply.start for reply in tree.nodes[span.node].replies), len(tree.nodes[span.node].tokens)]
            spans += [replace(span, start=a, end=b) for a, b in zip(starts, ends, strict=True) if b > a]
        cut.append(Credit(tuple(spans), ()))
        nodes = []
        for node in tree.nodes:
            values = list(node.logprobs)
            for reply in node.replies:
                values[reply.start : reply.end] = [-9.0] * (reply.end - reply.start)
            nodes.append(replace(node, logprobs=tuple(values)))
        noisy.append(replace(tree, nodes=tuple(nodes)))
    ours = gradient(characters, grown.trees, whole)
    for other in (gradient(characters, grown.trees, cut), gradient(characters, noisy, whole)):
        assert all(torch.equal(a, b) for a, b in zip(ours, other, strict=True))
    assert max(float(g.abs().max()) for g in ours) > 1e-3


# ---------------------------------------------------------------- engines


def test_greedy_episodes_are_those_of_generate(characters: Any) -> None:
    """Turn by turn: transformers' own greedy decoding of the whole path so far, with the observation appended."""
    env, policy, tokenizer = Digits(), characters.policy, characters.tokenizer
    params, alone = SamplingParams(greedy=True), DeepExplore(num_rollouts=2, num_pivots=0, segments=TURNS)
    env.turn_ends = (":", ";")  # what this random model goes on repeating
    stops = tokenizer(":;", add_special_tokens=False).input_ids
    growth = play(characters, alone, params, episodes=replace(characters.episodes, environment=env))
    policy.model.eval()
    for tree in growth.trees:
        node, path, state = tree.nodes[0], list(tree.prompt.tokens), tree.start
        own: list[int] = []
        while True:
            ids = torch.tensor([[*path, *own]])
            out = policy.model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=40 - len(own),
                eos_token_id=[*policy.eos_ids, *stops], pad_token_id=0,
            )[0, ids.shape[1] :].tolist()  # fmt: skip
            own += out
            if out[-1] not in (*policy.eos_ids, *stops):
                break
            turn = env.step(state, tokenizer.decode([t for t in out if t not in policy.eos_ids]))
            state, shown = turn.state, tokenizer(turn.observation, add_special_tokens=False).input_ids
            if turn.done or state["turns"] == MOST_TURNS or len(own) + len(shown) >= 40:
                break
            own += shown
        assert tuple(own) == node.tokens
        assert len(node.replies) == MOST_TURNS


# ---------------------------------------------------------------- runs


def test_trees_are_saved_whole(grown: Growth) -> None:
    for tree in grown.trees:
        again, spans = tree_from_json(tree_to_json(tree, credit_of(tree).spans))
        check_structure(again, spans)
        assert again == tree
        assert again.start == tree.start
        assert [node.replies for node in again.nodes] == [node.replies for node in tree.nodes]


def trace(path: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    timed = ("time/", "ledger/seconds_", "tokens_per_s", "env/tool_seconds")
    return [{key: value for key, value in line.items() if not key.startswith(timed)} for line in lines]


def test_a_run_with_an_environment(recipe: Callable[..., Any]) -> None:
    """Three steps with evaluations, and the same from the first one's checkpoint on: all figures and trees are equal."""
    here = Path(__file__).parent.parent / "digits_env.py"
    sections: dict[str, Any] = {
        "env": {"type": "user", "env": f"{here}:Digits", "max_turns": 3, "max_turn_tokens": 9},
        "reward": {"type": "env"},
        "explore": {"type": "deep", "segments": TURNS, "num_rollouts": 4, "branches_per_pivot": 3, "success_threshold": 1.5},
        "eval": {"data": {"type": "synthetic", "chain_length": 2, "split": "test"}, "limit": 3, "every": 2, "samples": 2},
        "log": {"trees_every": 1}, "checkpoint": {"every": 1, "keep_last": 9},
    }  # fmt: skip
    whole = train(recipe(**sections))
    cut = shutil.copytree(whole, whole.parent / "cut")
    train(recipe(**sections), resume=cut, step=1)
    assert trace(whole) == trace(cut)
    last = trace(whole)[-1]
    assert last["ledger/given_tokens"] > 0 and last["ledger/tool_calls"] > 0 and last["env/turns"] > 0.5
    assert last["pivots/count"] > 0 and last["eval/turns"] <= 3
    for step in (1, 2, 3):
        assert RunDir(whole).trees(step).read_bytes()[10:] == RunDir(cut).trees(step).read_bytes()[10:]  # behind gzip's time


REMEDY = "cannot explore the episodes of an environment; choose .*, or remove \\[env\\]"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"explore": {"type": "prefix"}, "data": {"type": "synthetic", "size": 8}}, f'type is "prefix", which {REMEDY}'),
        ({"explore": {"type": "spo_tree"}}, f'type is "spo_tree", which {REMEDY}'),
        ({"env": None}, 'segments.type is "turn", but the recipe has no environment'),
        ({"env": None, "explore": {"type": "root"}}, 'reward.type is "env", but the recipe has no environment'),
        ({"reward": {"type": "env", "overlong": {"cache": 4}}}, "reward.overlong is a penalty for one long response"),
    ],
)
def test_recipes_that_do_not_fit(changes: dict[str, Any], message: str) -> None:
    raw = {
        "model": MODEL, "data": {"type": "synthetic"}, "reward": {"type": "env"},
        "env": {"type": "user", "env": "mine.py:Mine"}, "explore": {"type": "deep", "segments": TURNS}, **changes,
    }  # fmt: skip
    with pytest.raises(ConfigError, match=message):
        parse_config({key: value for key, value in raw.items() if value is not None})
