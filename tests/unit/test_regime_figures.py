"""Static measurement of the regimes: its figures by hand, its sampling on a tiny policy, and the shipped recipes."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import regimes
from benchmarks.regime_figures import Amounts, _one_per_band, _rollouts, _states, chunks, measure, summary
from benchmarks.regime_sampling import from_prompts, sample
from deepgrpo.config import GeneratedData, load_recipe
from deepgrpo.config.data import SearchData
from deepgrpo.config.shipped import recipe_dir
from deepgrpo.engines.base import SampleStats
from deepgrpo.lab.compare.experiment import load_experiment
from deepgrpo.prompts.tasks import build_task
from deepgrpo.records import Completion, Prompt
from deepgrpo.train.setup import Run, open_run

AMOUNTS = Amounts(prompts=3, samples=16, failed=4, branches=2, bands=4)


def counts(**changes: Any) -> dict[str, Any]:
    """Sixteen responses of one prompt, of ten tokens each: four right, one of them by luck."""
    return {
        "samples": 16, "successes": 4, "answered": 5, "lucky": 1, "corrected": 8, "corrected_successes": 3, "truncated": 2,
        "tokens": 160, "given": 0, "surprise": 32.0, "mixed": 1, "errors": [0.5] * 6, **changes,
    }  # fmt: skip


def state(prompt: str, band: int, behind: bool, successes: int, corrected: int = 0) -> dict[str, Any]:
    return {
        "prompt": prompt, "band": band, "ratio": band / 4, "behind": behind, "marked": 0, "successes": successes,
        "branches": 4, "tokens": 40, "corrected": corrected,
    }  # fmt: skip


def test_the_figures_by_hand() -> None:
    """Two policies with a prompt each. Groups of 8: one mixed of two, and two of two, in 320 tokens."""
    none = counts(successes=0, answered=0, lucky=0, corrected=0, corrected_successes=0, errors=[0.1] * 16, mixed=2)
    one = {"greedy": 1.0, "rollouts": [counts()], "states": [state("a", 0, False, 4), state("a", 2, True, 1, 1)]}
    two = {"greedy": 0.0, "rollouts": [none], "states": [state("a", 2, False, 2), state("b", 2, True, 0)]}
    found = summary([one, two])
    assert (found["greedy"], found["sampled"], found["sampled_of_each"]) == (0.5, 0.125, [0.25, 0.0])
    # 1 - C(12, 4) / C(16, 4) = 1 - 495 / 1820 for one prompt, 0 for the other
    assert found["pass"]["4"] == pytest.approx((1 - 495 / 1820) / 2) and set(found["pass"]) == {"1", "4", "16"}
    assert (found["luck"], found["length"], found["entropy"], found["truncated"]) == (0.2, 10, 0.2, 0.125)
    assert (found["corrected"], found["success_if_corrected"], found["success_if_not"]) == (0.25, 0.375, 1 / 24)
    assert (found["mixed"], found["mixed_per_1k"]) == (0.75, 1000 * 3 / 320)
    # 22 errors in 12 + 16 failures: six at .5, sixteen at .1
    assert found["failed_with_error"] == pytest.approx(22 / 28) and found["error_position"] == pytest.approx(
        [0.1, 0.1, 0.5]
    )
    root, second = found["bands"]
    assert (root["band"], root["rescued"], root["mixed"], root["behind"]) == (0, 1.0, 0.0, None)
    assert (second["states"], second["rescued"], second["succeed"]) == (3, pytest.approx(2 / 3), 3 / 12)
    assert (second["before"]["states"], second["behind"]["states"]) == (1, 2)
    assert second["mixed_per_1k"] == pytest.approx(1000 * 2 / 120)
    # the prompt is no state before an error
    assert (found["before"]["states"], found["before"]["succeed"], found["before"]["by_correction"]) == (1, 0.5, 0.0)
    assert (found["behind"]["states"], found["behind"]["rescued"], found["behind"]["by_correction"]) == (2, 0.5, 1.0)
    assert found["behind"]["interval"][0] < 0.5 < found["behind"]["interval"][1]


def test_one_state_of_each_band() -> None:
    """A chain of 5: r = .2, .4, .6, .8. Four bands of a quarter: the prompt, then .4 in band 2, .6 in 3, .8 in 4."""
    ratios = [0.2, 0.4, 0.6, 0.8]
    assert list(_one_per_band(ratios, 4, np.random.default_rng(0))) == [(0, 0), (2, 1), (3, 2), (4, 3)]
    drawn = {tuple(_one_per_band(ratios, 1, np.random.default_rng(seed))) for seed in range(40)}
    assert drawn == {((0, 0), (1, 1)), ((0, 0), (1, 2)), ((0, 0), (1, 3))}
    assert list(_one_per_band([0.25, 0.5], 4, np.random.default_rng(0))) == [(0, 0), (2, 1)]  # a bound belongs below
    assert list(_one_per_band([], 4, np.random.default_rng(0))) == []
    assert chunks([1, 2, 3, 4], 2) == [[1, 2], [3, 4]]


TOKENS = {"type": "deep", "segments": {"type": "tokens", "size": 4}}


@pytest.mark.parametrize(
    ("data", "explore"), [({"recovery": "at_once", "luck": False}, {"type": "root"}), ({"type": "search"}, TOKENS)]
)
def test_a_policy_is_measured(recipe: Any, data: dict[str, Any], explore: dict[str, Any]) -> None:
    section = {"type": "synthetic", "chain_length": 2, "most_fitting": 9, **data}
    if section["type"] == "synthetic":
        del section["most_fitting"]
    config = recipe(
        data=section, eval={"every": 1, "data": {**section, "split": "test"}},
        explore=explore,
    )  # fmt: skip
    found = measure(open_run(config, None), AMOUNTS, seed=5)
    assert [each["samples"] for each in found["rollouts"]] == [16] * 3
    assert all(each["successes"] == 0 for each in found["rollouts"])  # random weights
    prompts = {each["prompt"] for each in found["states"]}
    assert 0 < len(prompts) <= 3 and all(each["branches"] == 2 for each in found["states"])
    assert [each["band"] for each in found["states"]].count(0) == 4
    assert all(each["behind"] is False for each in found["states"] if each["band"] == 0)
    assert found == measure(open_run(config, None), AMOUNTS, seed=5)
    assert "| `x` |" in regimes.tables({"x": summary([found])})


#                f           g           h
TABLE = {"f": "4907381265", "g": "1111222245", "h": "0050000030"}


class Scripted:
    """An engine that says the given turns, one list of them per episode, in the order of the requests' keys."""

    def __init__(self, run: Run, episodes: list[list[str]]) -> None:
        self.run, self.asked = run, 0
        self.left = [[self.encoded(turn) for turn in turns] for turns in episodes]
        self.playing: list[list[tuple[int, ...]]] = []

    def encoded(self, text: str) -> tuple[int, ...]:
        tokenizer = self.run.policy.tokenizer
        return (*tokenizer(text, add_special_tokens=False).input_ids, *([] if text.endswith("?") else [tokenizer.eos_token_id]))

    def sample(self, requests: Any, params: Any, keep: bool = False) -> Any:
        if not self.playing:
            self.playing = [self.left.pop(0) for request in requests for _ in request.keys]
        said = iter([turns.pop(0) for turns in self.playing])
        self.playing = [turns for turns in self.playing if turns]
        self.asked += 1
        return [
            [Completion(tokens, (-0.5,) * len(tokens), "stop") for tokens in itertools.islice(said, len(request.keys))]
            for request in requests
        ], SampleStats()

    def forget(self) -> None:
        assert not self.playing


def lookup_run(recipe: Any) -> Run:
    section = {"type": "lookup", "hops": 3, "functions": 3}
    config = recipe(
        data=section, eval={"every": 1, "data": {**section, "split": "test"}}, env={"type": "lookup", "max_turns": 8},
        explore={"type": "deep", "segments": {"type": "turn"}, "success_threshold": 0.2}, reward={"type": "env"},
        sampling={"max_new_tokens": 50},
    )  # fmt: skip
    return open_run(config, None)


RIGHT, LOST, SAVED = ["f3?", "g7?", "h2?", "#5"], ["f3?", "g8?", "h4?", "#0"], ["f3?", "g8?", "h4?", "g7?", "h2?", "#5"]


def test_episodes_by_hand(recipe: Any) -> None:
    """f3 is 7, g7 is 2, h2 is 5. Of eight episodes one is right at once, one saves itself, one guesses, five are lost at g8.

    A lost one is continued from the states before its four turns, twice each: both succeed from the prompt, one behind f3,
    one behind g8 by going back to g7, none behind h4.
    """
    run = lookup_run(recipe)
    tokens = run.policy.tokenizer("3fgh:", add_special_tokens=False).input_ids
    prompt = Prompt("p", "3fgh:", tuple(tokens), "3fgh:", "5", columns={"table": TABLE})
    guess = ["f3?", "g8?", "#5"]
    states = [RIGHT, RIGHT, RIGHT[1:], LOST[1:], ["g7?", "h2?", "#5"], LOST[2:], LOST[3:], LOST[3:]]
    scripted = Scripted(run, [[*turns] for turns in [RIGHT, SAVED, guess, *[LOST] * 5]] + [[*turns] for turns in states])
    run.parts = dataclasses.replace(run.parts, engine=scripted)
    task = build_task(run.config.data)
    (group,) = sample(run, from_prompts(run, [prompt], 8), 0, "sampled", run.sampling_params)
    assert [each.text for each in group][:2] == ["f3?7;g7?2;h2?5;#5", "f3?7;g8?4;h4?0;g7?2;h2?5;#5"]
    assert [each.reward for each in group] == [1.0, 1.0, *[0.0] * 6]
    # three tokens per lookup, "#5" and its end; two given tokens per observation
    assert [(each.sampled, each.given) for each in group[:3]] == [(12, 6), (18, 10), (9, 4)]
    (found,) = _rollouts(run, [group], task, 0.2)
    counts = {"successes": 2, "answered": 3, "lucky": 1, "corrected": 1, "corrected_successes": 1, "mixed": 1, "tokens": 99}
    assert {key: found[key] for key in counts} == counts and found["surprise"] == 0.5 * 99
    assert found["given"] == 6 + 10 + 4 + 5 * 6 and found["error_turns"] == [2] * 6
    # "f3?7;" are five characters of 12 in the guess, of 17 in the others
    assert found["errors"] == [round(5 / 12, 3), *[round(5 / 17, 3)] * 5]

    amounts = Amounts(branches=2, failed=1)
    facts = _states(run, [[group[3]]], task.first_error, amounts, seed=0)
    assert [each["band"] for each in facts] == [0, 1, 2, 3] and [each["ratio"] for each in facts] == [0.2, 0.4, 0.6, 0.8]
    assert [each["behind"] for each in facts] == [False, False, True, True]
    assert [each["successes"] for each in facts] == [2, 1, 1, 0] and [each["corrected"] for each in facts] == [0, 0, 1, 0]
    assert [each["tokens"] for each in facts] == [24, 18, 15, 6]  # what the branches wrote themselves
    figures = summary([{"greedy": 0.0, "rollouts": [found], "states": facts}])
    assert (figures["luck"], figures["given"], figures["error_turns"]) == (1 / 3, 50 / 8, {"2": 1.0})
    assert figures["behind"]["rescued"] == 0.5 and figures["behind"]["by_correction"] == 1.0
    text = regimes.tables({"lookup": figures})
    assert "| given tokens |" in text and "| before turn |" in text
    assert "| 2 | 1 | 100 [21, 100] | 50.0 | 100 | 55.56 | 0 | 100 [21, 100] | – | 100 |" in text


def test_a_policy_that_plays_episodes_is_measured(recipe: Any) -> None:
    run = lookup_run(recipe)
    found = measure(run, AMOUNTS, seed=5)
    assert [each["samples"] for each in found["rollouts"]] == [16] * 3 and found == measure(run, AMOUNTS, seed=5)
    assert all(each["branches"] == 2 for each in found["states"])
    assert [each["band"] for each in found["states"]].count(0) == 4


@pytest.mark.parametrize("name", regimes.ORDER)
def test_the_held_out_questions_of_a_regime_are_judged_like_those_of_training(name: str) -> None:
    config = load_recipe(regimes.recipe_path(name))
    assert config.run.name == f"regime-{name}" and isinstance(config.data, GeneratedData)
    assert config.eval.data is not None and config.eval.data.type == config.data.type
    # what only the warm start reads, and the split
    search = isinstance(config.data, SearchData)
    unseen = {"most_tries": 1} if search else {"corrections": 0.0, "wrong_facts": 0.0, "doubt": 0.0}
    assert config.eval.data.model_copy(update=unseen) == config.data.model_copy(update={"split": "test", **unseen})


@pytest.mark.parametrize("path", sorted((recipe_dir() / "lab").glob("*.toml")), ids=lambda path: path.stem)
def test_a_policy_whose_beliefs_are_asked_has_learned_to_answer_early(path: Path) -> None:
    experiment = load_experiment(path)
    arms = {changes.get("explore", {}).get("type") for changes in experiment.arms.values()}
    base = load_recipe(path.parent / experiment.base) if experiment.base.endswith(".toml") else None
    if "belief" in arms:
        assert base is not None and base.warmstart is not None and base.warmstart.early_answers > 0


def test_a_measurement_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is measured is not measured again, and the page gets the tables of all regimes."""
    page = tmp_path / "page.md"
    page.write_text(f"before\n{regimes.BEGIN}\nold\n<!-- end -->\nafter\n")
    (tmp_path / "runs").mkdir()
    for seed in (1, 2):
        one = {"greedy": 1.0, "rollouts": [counts()], "states": [state("a", 0, False, 4)], "seconds": 1.0}
        (tmp_path / "runs" / f"strict-{seed}.json").write_text(json.dumps(one))
    words = ["regimes", "strict", "--seeds", "1", "2", "--runs", "runs", "--target", "figures", "--page", "page.md"]
    monkeypatch.setattr("sys.argv", words)
    regimes.main()
    result = json.loads((tmp_path / "figures" / "strict.json").read_text())
    assert (result["policies"], result["sampled"], result["regime"]) == (2, 0.25, "strict")
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "| `strict` | 100.0 | 25.0 |" in text
