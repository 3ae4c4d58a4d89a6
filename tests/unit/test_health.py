"""Warnings from hand-made metrics: each cause, its figure, its remedy, and once only."""

from __future__ import annotations

import json
import math

import pytest

from deepgrpo.config import parse_config
from deepgrpo.train.health import HealthMonitor
from deepgrpo.train.health_state import HealthState

FINE = {
    "main/truncated": 0.1,
    "main/unparsed": 0.1,
    "main/mixed": 0.5,
    "main/reward": 0.4,
    "main/entropy": 0.5,
    "reward/problems": 0.0,
    "branch/sequences": 16.0,
    "branch/rollouts": 16.0,
    "branch/groups": 4.0,
    "pivots/count": 4.0,
    "mismatch/kl": 1e-6,
}


def monitor(**changes: object) -> HealthMonitor:
    return HealthMonitor(**{"max_new_tokens": 256, "dead_steps": 3, "rollouts_per_step": 64, **changes})  # type: ignore[arg-type]


def run(watch: HealthMonitor, *steps: dict[str, float | None]) -> list[tuple[str, ...]]:
    """Warnings of each step; every step is FINE but for what it says."""
    state, heard = HealthState(), []
    for step in steps:
        state, warnings = watch.check(state, {**FINE, **step})
        heard.append(warnings)
    return heard


def test_a_healthy_run_hears_nothing() -> None:
    assert run(monitor(), *[{}] * 20) == [()] * 20


def test_episodes_are_cut_off_by_limits_of_their_own() -> None:
    (said,) = run(monitor(max_turns=4), {"main/truncated": 1.0})[0]
    assert said.startswith("100% of the episodes were cut off at env.max_turns = 4, env.max_turn_tokens or sampling.max_new_")


@pytest.mark.parametrize(
    ("step", "words"),
    [
        ({"main/truncated": 0.9}, ["90%", "sampling.max_new_tokens = 256", "raise it"]),
        ({"main/unparsed": 0.95}, ["95%", 'reward.answer_format = "boxed"', 'data.template.preset = "gsm8k"']),
        ({"main/entropy": 0.009}, ["0.0090 nats", "sampling.temperature"]),
        # 64 rollouts + 16 branches are scored: 8 failed checks are 10%
        ({"reward/problems": 8.0, "reward/problem_timeout": 8.0}, ["8 checks", "10%; timeout: 8", "raise reward.timeout_s"]),
        (
            {"reward/problems": 8.0, "reward/problem_not_finite": 7.0, "reward/problem_timeout": 1.0},
            ["not finite: 7, timeout: 1", "NaN or infinite: return a finite number"],
        ),
        ({"reward/problems": 8.0, "reward/problem_raised": 8.0}, ["the check raised an error"]),
        ({"reward/problems": 8.0, "reward/problem_crash": 8.0}, ["the process that checks died"]),
        ({"mismatch/kl": 0.2}, ["0.200 nats", "deepgrpo doctor"]),
    ],
)
def test_each_cause_is_named_at_once_with_figure_and_remedy(step: dict[str, float], words: list[str]) -> None:
    watch = monitor(answer_place='reward.answer_format = "boxed"', template='data.template.preset = "gsm8k"')
    ((warning,),) = run(watch, step)
    for word in words:
        assert word in warning


def test_limits_are_not_reached_just_below() -> None:
    # 4 of 80 checks are exactly 5%, which is still allowed
    steps = {"main/truncated": 0.89, "main/unparsed": 0.89, "main/entropy": 0.011, "reward/problems": 4.0}
    assert run(monitor(), steps) == [()]


@pytest.mark.parametrize(
    ("reward", "words"),
    [(0.0, "all fail"), (1.0, "all succeed"), (0.5, "all agree")],
)
def test_dead_groups_after_n_steps_say_which_way(reward: float, words: str) -> None:
    dead = {"main/mixed": 0.0, "main/reward": reward}
    first, second, third, fourth = run(monitor(), dead, dead, dead, dead)
    assert (first, second, fourth) == ((), (), ())
    assert len(third) == 1
    assert "last 3 steps" in third[0]
    assert words in third[0]


def test_mixed_branches_keep_a_run_alive() -> None:
    assert run(monitor(), *[{"main/mixed": 0.0, "branch/mixed": 0.3}] * 5) == [()] * 5


def test_one_mixed_step_ends_the_streak() -> None:
    dead = {"main/mixed": 0.0}
    assert run(monitor(), dead, dead, {}, dead, dead) == [()] * 5


def test_a_cause_is_named_once_until_it_comes_back() -> None:
    bad = {"main/truncated": 1.0}
    heard = run(monitor(), bad, bad, {}, bad)
    assert [len(warnings) for warnings in heard] == [1, 0, 0, 1]


@pytest.mark.parametrize("missing", [None, math.nan, math.inf])
def test_a_missing_metric_neither_raises_nor_clears(missing: float | None) -> None:
    bad = {"main/truncated": 1.0}
    heard = run(monitor(), {"main/truncated": missing}, bad, {"main/truncated": missing}, bad)
    assert [len(warnings) for warnings in heard] == [0, 1, 0, 0]


def test_entropy_explosion_is_relative_to_the_first_step() -> None:
    # three times 0.5 is 1.5, and one nat above 0.5 is 1.5 as well
    heard = run(monitor(), {"main/entropy": 0.5}, {"main/entropy": 1.49}, {"main/entropy": 1.5})
    assert [len(warnings) for warnings in heard] == [0, 0, 1]
    assert "1.50 nats per token from 0.50" in heard[2][0]
    # from 2.0 on, three times is what counts: 5.9 is far more than a nat above it
    heard = run(monitor(), {"main/entropy": 2.0}, {"main/entropy": 5.9}, {"main/entropy": 6.0})
    assert [len(warnings) for warnings in heard] == [0, 0, 1]


def test_empty_branch_stream_tells_why() -> None:
    none = {"branch/sequences": 0.0, "pivots/count": 0.0}
    assert "no pivot could be chosen" in run(monitor(), none, none, none)[2][0]
    assert "no rollout failed" in run(monitor(), *[{**none, "main/reward": 1.0}] * 3)[2][0]
    agree = {"branch/sequences": 0.0, "pivots/count": 5.0}
    assert "the branches of each pivot agree; raise explore.branches_per_pivot" in run(monitor(), agree, agree, agree)[2][0]
    few = {**agree, "loss/dropped_few_branches": 3.0}
    assert "fewer branches with an advantage than loss.min_branch_sequences" in run(monitor(), few, few, few)[2][0]
    assert run(monitor(branching=False), *[none] * 5) == [()] * 5


def test_few_branches_with_full_lambda() -> None:
    """3 branch rows beside 500: each has the weight of 500 / 3 = 167 rollouts. The bound is 10 rows."""
    few = {"branch/sequences": 3.0, "main/sequences": 500.0}
    heard = run(monitor(), few, few, few, few)
    assert [len(each) for each in heard] == [0, 0, 1, 0]
    for words in ("3 rows in the last one, beside 500", "as much as 167 rollouts", "loss.full_branch_sequences = 10)",
                  "loss.min_branch_sequences", "log.few_branches = 0.02"):  # fmt: skip
        assert words in heard[2][0]
    assert run(monitor(), *[{**few, "branch/sequences": 10.0}] * 4) == [()] * 4
    assert run(monitor(), few, few, {**few, "branch/sequences": 30.0}, few) == [()] * 4
    for silent in (monitor(lambda_=0.0), monitor(few_share=0.0), monitor(branching=False)):
        assert run(silent, *[few] * 4) == [()] * 4


@pytest.mark.parametrize(
    ("changes", "share"),
    [({"loss": {}}, 0.02), ({"loss": {"streams": "merged"}}, 0.0), ({"loss": {"full_branch_sequences": 8}}, 0.0),
     ({"log": {"few_branches": 0.1}}, 0.1)],
)  # fmt: skip
def test_few_branches_are_watched_where_each_would_weigh_much(changes: dict[str, object], share: float) -> None:
    config = parse_config({"model": {"type": "scratch"}, "data": {"type": "synthetic"}, "reward": {"type": "task"}, **changes})
    assert HealthMonitor.from_config(config).few_share == share


def test_branches_that_are_trained_in_the_main_stream_leave_no_empty_stream() -> None:
    elsewhere = {"branch/sequences": 0.0, "pivots/count": 5.0, "branch/groups": None}
    assert run(monitor(), *[elsewhere] * 9) == [()] * 9
    # groups of branches may have their name all the same: they are mixed, and no row was dropped
    named = {**elsewhere, "branch/groups": 5.0, "branch/mixed": 0.4, "loss/dropped_few_branches": 0.0}
    assert run(monitor(), *[named] * 9) == [()] * 9
    assert "loss.min_branch_sequences" in run(monitor(), *[{**named, "loss/dropped_few_branches": 7.0}] * 3)[-1][0]
    # but without pivots nothing is explored, whatever the stream
    heard = run(monitor(), *[{**elsewhere, "pivots/count": 0.0}] * 3)
    assert "no pivot could be chosen" in heard[-1][0]


def test_the_state_survives_json() -> None:
    watch, state = monitor(), HealthState()
    for step in [{"main/truncated": 1.0, "main/mixed": 0.0}] * 2:
        state, _ = watch.check(state, {**FINE, **step})
    assert state == HealthState(active=("truncated",), dead=2, empty=0, first_entropy=0.5)
    assert HealthState.from_dict(json.loads(json.dumps(state.as_dict()))) == state


def test_from_config_names_the_recipes_own_values() -> None:
    config = parse_config(
        {
            "model": {"type": "pretrained", "path": "somewhere"},
            "data": {"type": "jsonl", "path": "train.jsonl", "template": {"preset": "math"}},
            "reward": {"type": "math", "answer_format": "boxed"},
            "sampling": {"max_new_tokens": 99},
            "run": {"prompts_per_step": 4},
            "explore": {"type": "root", "num_rollouts": 8},
            "log": {"dead_steps": 7},
        }
    )
    watch = HealthMonitor.from_config(config)
    assert watch.mismatch_kl == 0.01  # the engine has the learner's own weights
    vllm = parse_config({**config.model_dump(exclude_unset=True, by_alias=True), "engine": {"type": "vllm"}})
    assert HealthMonitor.from_config(vllm).mismatch_kl == 0.05
    assert (watch.max_new_tokens, watch.dead_steps, watch.rollouts_per_step, watch.branching) == (99, 7, 32, False)
    assert watch.answer_place == 'reward.answer_format = "boxed"'
    assert watch.template == 'data.template.preset = "math"'


DEAD = {"main/mixed": 0.0, "main/reward": 0.0}


@pytest.mark.parametrize(
    ("step", "reason"),
    [
        ({"reward/problems": 60.0}, "most checks of the reward fail: repair the reward first"),
        ({"main/truncated": 0.95}, "nearly all rollouts are cut off"),
        ({"main/unparsed": 0.95}, "in nearly all of them no answer is found"),
    ],
)
def test_rollouts_that_fail_for_another_reason_need_no_easier_questions(step: dict[str, float], reason: str) -> None:
    empty = {"branch/sequences": 0.0}
    heard = run(monitor(), *[{**DEAD, **step, **empty}] * 3)[2]
    assert [reason in text for text in heard] == [True, True]  # no advantage, and no branches
    assert not any("easier" in text for text in heard)


def test_the_scale_of_a_users_reward_is_not_known() -> None:
    """A constant reward of 5, or of -1, says neither that all succeed nor that all fail."""
    for reward in (5.0, -1.0):
        (text,) = run(monitor(user_reward=True), *[{"main/mixed": 0.0, "main/reward": reward}] * 3)[2]
        assert "gives all rollouts of a prompt the same" in text
    (text,) = run(monitor(user_reward=True), {"main/unparsed": 1.0})[0]
    assert "your reward returned None for 100%" in text


def test_a_policy_that_never_was_random_did_not_collapse() -> None:
    (text,) = run(monitor(), {"main/entropy": 0.004})[0]
    assert "the entropy fell" not in text
    assert "raise sampling.temperature" in text
    (text,) = run(monitor(), {}, {"main/entropy": 0.004})[1]
    assert "the entropy fell" in text


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"sampling": {"top_p": 0.8}, "learner": {"dtype": "bfloat16"}}, "set sampling.top_p = 1"),
        ({"engine": {"type": "embedded", "dtype": "bfloat16"}}, 'set engine.dtype = "learner"'),
        ({"learner": {"dtype": "bfloat16"}}, 'set learner.dtype = "float32"'),
        ({"engine": {"type": "vllm"}}, 'set engine.type = "embedded"'),
        ({"cluster": {"overlap": True}}, "set cluster.overlap = false"),
        ({}, "deepgrpo doctor"),
    ],
)
def test_the_cause_of_a_mismatch_is_the_recipes_own(changes: dict[str, object], words: str) -> None:
    raw = {"model": {"type": "scratch"}, "data": {"type": "synthetic"}, "reward": {"type": "task"}}
    watch = HealthMonitor.from_config(parse_config({**raw, **changes}))
    _, (text,) = watch.check(HealthState(), {**FINE, "mismatch/kl": 1.0})
    assert words in text
    assert "minibatches" not in text  # the old log-probs are those before the first of several steps


@pytest.mark.parametrize(
    ("loss", "key"),
    [
        ({}, "raise loss.clip_high, "), ({"ratio": "sequence"}, "raise loss.sequence_clip_high, "),
        ({"policy": "cispo"}, "raise loss.cispo_high, "), ({"policy": "mine.py:loss"}, "lower optim.lr, raise loss.beta"),
    ],
)  # fmt: skip
def test_the_remedy_of_a_collapse_is_a_key_that_the_loss_reads(loss: dict[str, str], key: str) -> None:
    raw = {"model": {"type": "scratch"}, "data": {"type": "synthetic"}, "reward": {"type": "task"}, "loss": loss}
    watch = HealthMonitor.from_config(parse_config(raw))
    _, (text,) = watch.check(HealthState(first_entropy=0.5), {**FINE, "main/entropy": 0.001})
    assert key in text
