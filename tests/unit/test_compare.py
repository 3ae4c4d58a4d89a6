"""Experiments: what they stand for, what is refused, and what is made of finished runs (written here by hand)."""

from __future__ import annotations

import io
import json
import shutil
import textwrap
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from deepgrpo import cli
from deepgrpo.config import DeepExplore, LookupData, RootExplore, SyntheticData, WarmstartConfig, merge
from deepgrpo.config.shipped import recipe_dir
from deepgrpo.errors import CheckpointError, ConfigError
from deepgrpo.lab.compare import plot as figure
from deepgrpo.lab.compare.cells import print_comparison, short
from deepgrpo.lab.compare.experiment import find_experiment, load_experiment
from deepgrpo.lab.compare.figures import compare, difference_at_own_steps, differences, figure_rows
from deepgrpo.lab.compare.final_eval import final_prompts, refuse_too_few
from deepgrpo.lab.compare.forecast import _pace
from deepgrpo.lab.compare.jobs import Job, Jobs
from deepgrpo.lab.compare.plan import Plan, PlannedRun, expand
from deepgrpo.lab.compare.progress import Progress, is_finished, progress
from deepgrpo.lab.compare.run_figures import read_lines, spent_figures, training_figures
from deepgrpo.lab.compare.tables import as_markdown, comparison_tables
from deepgrpo.lab.compare.work import make_jobs
from deepgrpo.prompts import synthetic
from deepgrpo.runs.checkpoints import newest_checkpoint
from deepgrpo.runs.state_file import read_sealed, sealed
from experiments import BASE, EXPERIMENT, line, planned, write_lines, write_run

FINAL = '[final.data]\ntype = "synthetic"\n'


def test_an_experiment_is_a_run_per_seed_and_arm(tmp_path: Path) -> None:
    plan = planned(tmp_path)
    assert [run.name for run in plan.runs] == ["grpo-seed-1", "deep-seed-1", "grpo-seed-2", "deep-seed-2"]
    assert [str(run.directory) for run in plan.warmstarts] == ["out/trial/warmstart/seed-1", "out/trial/warmstart/seed-2"]
    warm, grpo, deep = plan.warmstarts[0].config, plan.of("grpo")[0].config, plan.of("deep")[0].config
    # the warm start is the recipe's, takes no step, and its weights are where every arm of the seed begins
    assert (warm.run.steps, warm.run.seed, warm.warmstart) == (0, 1, WarmstartConfig(steps=40))
    for config in (grpo, deep):
        assert config.warmstart == WarmstartConfig.model_validate({"from": "out/trial/warmstart/seed-1/start"})
        assert (config.run.max_sampled_tokens, config.run.steps, config.run.seed) == (10_000, 50, 1)
    # another type replaces the table, nothing of the former one (4 rollouts) is left; no change leaves it
    assert grpo.explore == RootExplore() and isinstance(deep.explore, DeepExplore) and deep.explore.gamma == 3.0
    # questions of their own for each seed, the same ones for each arm
    seeds = {run.name: run.config.data.seed for run in plan.runs if isinstance(run.config.data, SyntheticData)}
    assert seeds == {"grpo-seed-1": 1, "deep-seed-1": 1, "grpo-seed-2": 2, "deep-seed-2": 2}
    assert {run.config.eval.data.seed for run in plan.runs if isinstance(run.config.eval.data, SyntheticData)} == {0}
    # the untouched questions: as those that are watched, with another seed
    assert plan.final.data == SyntheticData(chain_length=2, split="test", seed=1)


def test_a_shared_start_is_trained_once_and_begins_every_run(tmp_path: Path) -> None:
    plan = planned(tmp_path, "shared_start = true\n" + EXPERIMENT)
    assert [str(run.directory) for run in plan.warmstarts] == ["out/trial/warmstart/seed-1"]
    start = WarmstartConfig.model_validate({"from": "out/trial/warmstart/seed-1/start"})
    assert [run.config.warmstart for run in plan.runs] == [start] * 4
    jobs = {job.name: job.after for job in make_jobs(plan, plan.runs)}
    assert [name for name in jobs if name.startswith("_")] == ["_warmstart-seed-1"]
    assert {jobs[run.name] for run in plan.runs} == {("_warmstart-seed-1",)}


def test_merging() -> None:
    base = {"explore": {"type": "deep", "gamma": 2.0, "segments": {"type": "tokens", "size": 3}}, "optim": {"lr": 1.0}}
    assert merge(base, {"explore": {"segments": {"size": 5}}})["explore"] == {
        "type": "deep", "gamma": 2.0, "segments": {"type": "tokens", "size": 5},
    }  # fmt: skip
    assert merge(base, {"explore": {"type": "deep", "gamma": 1.0}})["explore"]["segments"]["size"] == 3
    assert merge(base, {"explore": {"segments": {"type": "sentence"}}})["explore"]["segments"] == {"type": "sentence"}
    assert merge(base, {"optim": "none", "loss": {"beta": 0.0}}) == {**base, "optim": "none", "loss": {"beta": 0.0}}
    assert base["optim"] == {"lr": 1.0}  # untouched


def without(text: str, *lines: str) -> str:
    for each in lines:
        assert each in text
        text = text.replace(each, "")
    return text


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (EXPERIMENT.replace("[1, 2]", "[7]"), "seeds is [7], but paired intervals need at least two seeds"),
        (EXPERIMENT.replace("[1, 2]", "[1, 2, 1]"), "seeds has 1 twice"),
        (EXPERIMENT.replace('baseline = "grpo"', 'baseline = "grop"'), "'grop', which is not an arm; did you mean 'grpo'?"),
        (EXPERIMENT.replace('baseline = "grpo"', 'baseline = "xyz"'), "the arms are: grpo, deep"),
        (without(EXPERIMENT, '[arms.grpo.explore]\ntype = "root"', "[arms.deep]") + "[arms]", "arms is empty"),
        (without(EXPERIMENT, "[arms.deep]"), "arms has ['grpo'] alone"),
        (without(EXPERIMENT, '[arms.grpo.explore]\ntype = "root"', "[arms.deep]"), "key 'arms' is missing"),
        (EXPERIMENT + "[arms.DEEP]\noptim.lr = 1e-3", "arms has 'deep' and 'DEEP', which clash"),
        (EXPERIMENT + "[arms.deep]", "are there two arms of the same name?"),
        (EXPERIMENT + '[arms."a/b"]', "arms has 'a/b'; an arm's name is also a directory"),
        (EXPERIMENT + "[arms.again]", "the arms 'deep' and 'again' are the same recipe"),
        (EXPERIMENT + "explore.gama = 1", "arm 'deep': unknown key 'explore.gama' (value 1); did you mean 'explore.gamma'?"),
        (EXPERIMENT + 'explore.gamma = "high"', "arm 'deep': explore.gamma is 'high'"),
        (EXPERIMENT + "explore.branches_per_pivot = 1", "arm 'deep': explore.branches_per_pivot is 1"),
        (EXPERIMENT + "run.seed = 3", "arms.deep.run.seed is 3, but the experiment sets that key"),
        (EXPERIMENT + "model.hidden_size = 8", "arms.deep.model is {'hidden_size': 8}, but all arms must"),
        (EXPERIMENT + "[common]\nrun.max_sampled_tokens = 3", "common.run.max_sampled_tokens is 3"),
        (EXPERIMENT + "[common]\nrun.stesp = 3", "common: unknown key 'run.stesp' (value 3); did you mean 'run.steps'?"),
        (EXPERIMENT + "[common]\neval.every = 'none'", "has no evaluation while training"),
        (EXPERIMENT.replace("budget", "bugdet"), "unknown key 'bugdet' (value 10000); did you mean 'budget'?"),
        (EXPERIMENT.replace("budget = 10_000", "budget = 0"), "budget is 0; it should be greater than 0"),
        (EXPERIMENT.replace("k = [1, 4]", "k = [1, 5]"), "final.k has 5, but final.samples is 4"),
        (EXPERIMENT + "[curve]\nlast_share = 0.0", "curve.last_share is 0.0; it should be greater than 0"),
        (EXPERIMENT.replace('"base.toml"', '"dmeo"'), "recipe 'dmeo' does not exist; did you mean 'demo'?"),
        (EXPERIMENT.replace('"trial"', '"../trial"'), "name is '../trial'"),
        (EXPERIMENT + FINAL + 'chain_length = 2\nsplit = "test"', "final.data is the same as eval.data"),
        (EXPERIMENT + FINAL + "chain_length = 2", "final.data.split is 'train', and so is data.split"),
        (EXPERIMENT + FINAL + "chain_lenght = 2", "did you mean 'final.data.chain_length'?"),
        (BASE, "looks like a recipe, not like an experiment"),
    ],
)  # fmt: skip
def test_what_is_refused_before_anything_runs(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        planned(tmp_path, text)
    assert says in str(caught.value)


FILES = """
[common]
warmstart = "none"
[common.model]
type = "pretrained"
path = "model"
[common.data]
type = "jsonl"
path = "train.jsonl"
[common.reward]
type = "exact"
[common.eval.data]
type = "jsonl"
path = "watched.jsonl"
"""


def test_questions_from_files(tmp_path: Path) -> None:
    """A pretrained model needs no shared warm start, and no other questions than those of a file are known."""
    with pytest.raises(ConfigError, match=r"final\.data is missing"):
        planned(tmp_path, EXPERIMENT + FILES)
    with pytest.raises(ConfigError, match=r"final\.data is the training data"):
        planned(tmp_path, EXPERIMENT + FILES + '[final.data]\ntype = "jsonl"\npath = "train.jsonl"\nlimit = 3')
    plan = planned(tmp_path, EXPERIMENT + FILES + '[final.data]\ntype = "jsonl"\npath = "fresh.jsonl"')
    assert plan.warmstarts == () and {run.config.warmstart for run in plan.runs} == {None}


def test_untouched_questions_are_not_watched_ones(tmp_path: Path) -> None:
    plan = planned(tmp_path)
    config = plan.runs[0].config
    prompts, left_out, skipped = final_prompts(config, plan.final, synthetic.tokenizer(), context=64)
    texts = {prompt.text for prompt in prompts}
    assert len(prompts) == len(texts) == 32
    assert isinstance(config.eval.data, SyntheticData)
    watched = {synthetic.make(i, config.eval.data).question for i in range(16)}
    assert not texts & watched
    # the same task with the watched seed: all that was watched is left out, and the next ones are taken
    same = plan.final.model_copy(update={"data": config.eval.data})
    assert not skipped
    again, left_out, _ = final_prompts(config, same, synthetic.tokenizer(), context=64)
    assert left_out == len(watched) and len(again) == 32 and not {p.text for p in again} & watched
    refuse_too_few(config, plan.final)
    # two operations modulo 10 have 7,290 questions, about an eighth of them in the test split
    with pytest.raises(ConfigError, match=r"final.limit is 1000, and 16 questions are used during training"):
        refuse_too_few(config, plan.final.model_copy(update={"limit": 1000}))


def test_experiments_that_come_along() -> None:
    """Each expands, and can reach its budget; `deepgrpo compare NAME` finds it."""
    from deepgrpo.lab.compare.refusals import refuse_unreachable

    names = sorted(path.stem for path in (recipe_dir() / "lab").glob("*.toml"))
    assert {"ablations", "methods", "naive_scaling", "short_chains"} <= set(names)
    for name in names:
        path = find_experiment(name)
        plan = expand(load_experiment(path), path)
        refuse_unreachable(plan)
        refuse_too_few(plan.runs[0].config, plan.final)
        assert len(plan.experiment.seeds) >= 5 and plan.experiment.name == name
    with pytest.raises(ConfigError, match="did you mean 'methods'"):
        find_experiment("method")
    with pytest.raises(ConfigError, match=r"experiment 'x.toml' does not exist"):
        find_experiment("x.toml")


def test_an_arm_that_cannot_reach_its_budget(tmp_path: Path) -> None:
    from deepgrpo.lab.compare.refusals import refuse_unreachable

    text = EXPERIMENT.replace("budget = 10_000", "budget = 10_000_000")
    # 8 prompts x 8 rollouts x 256 tokens = 16,384 a step; 10,000,000 / 16,384 = 610.4
    with pytest.raises(ConfigError, match=r"arm 'grpo' cannot reach the budget .* run.steps = 50 steps sample at most 16,384 "
                                          r"each; set common.run.steps to at least 611"):  # fmt: skip
        refuse_unreachable(planned(tmp_path, text))


# ---------------------------------------------------------------- figures from finished runs


@pytest.fixture
def done(tmp_path: Path) -> Plan:
    """grpo takes 4 steps of 2,500 tokens, deep 2 of 5,000; deep is better in both seeds, by 10 and by 20 points."""
    plan = planned(tmp_path, EXPERIMENT + "[curve]\ntarget = 0.5")
    for seed, gain in ((1, 0.1), (2, 0.2)):
        grpo = [line(0, 0, 0, 0.2), *(line(i, 2500 * i, i, 0.2 + 0.05 * i) for i in (1, 2, 3, 4))]
        deep = [line(0, 0, 0, 0.2), line(1, 5000, 1, 0.3), line(2, 10_000, 2, 0.4 + gain)]
        write_run(plan, f"grpo-seed-{seed}", grpo, 0.4, 0.3)
        write_run(plan, f"deep-seed-{seed}", deep, 0.4 + gain, 0.3)
    return plan


def test_runs_of_another_version_are_counted(done: Plan) -> None:
    """A state with an unknown field and without one that resuming needs; a final evaluation that lacks a key."""
    run = done.runs[0]
    path = run.directory / "checkpoints" / "step-000004" / "state.json"
    raw, files = read_sealed(path)
    del raw["cursor"]
    path.write_text(sealed({**raw, "novelty": 1}, files))
    newest = newest_checkpoint(run.paths)
    assert newest is not None and newest.sampled_tokens() == 10_000
    with pytest.raises(CheckpointError, match="the field cursor is missing"):
        newest.read_state()
    final = json.loads(run.paths.final.read_text())
    del final["spec"]["k"]
    run.paths.final.write_text(json.dumps(final))
    assert not is_finished(done, run)  # k was [1, 4], and the default is another
    del final["spec"]["data"]["max_prompt_tokens"]
    final["spec"]["k"] = [1, 4]
    run.paths.final.write_text(json.dumps(final))
    assert is_finished(done, run)
    # damage is still found
    path.write_text(path.read_text().replace("10000", "10001"))
    with pytest.raises(CheckpointError, match="has changed since it was written"):
        progress(run)


def test_a_finished_run_needs_no_checkpoint(done: Plan) -> None:
    """Checkpoints are large, so that the results alone may be kept or copied."""
    run = done.runs[0]
    shutil.rmtree(run.directory / "checkpoints")
    assert progress(run) == Progress(4, 10_000, True, False) and is_finished(done, run)
    lines = run.paths.metrics.read_text().splitlines(keepends=True)
    run.paths.metrics.write_text("".join(lines[:-2]))  # a torn line, and 7,500 of 10,000 tokens
    assert progress(run) == Progress(0, 0, False, False)
    run.paths.metrics.write_text("".join(lines))
    run.paths.final.unlink()  # without weights nothing can be evaluated
    assert progress(run) == Progress(0, 0, False, False)


def test_a_comparison_by_hand(done: Plan) -> None:
    assert all(is_finished(done, run) for run in done.runs) and progress(done.runs[0]).tokens == 10_000
    result = compare(done, done.runs)
    assert result["optimizer_steps_compared"] == 2
    grpo, deep = result["arms"]["grpo"], result["arms"]["deep"]
    one = grpo["runs"]["1"]
    # over tokens the curve is a line from .2 to .4; its last fifth goes from .36 to .40
    assert (one["watched/greedy"], one["watched/area"]) == pytest.approx((0.4, 0.3))
    assert one["watched/late"] == pytest.approx(0.38)
    # at 2 optimizer steps it is at .30, and has sampled 5,000 tokens; the line from .2 to .3 has mean .25
    assert (one["steps/greedy"], one["steps/sampled"], one["steps/area"]) == pytest.approx((0.3, 0.15, 0.25))
    assert one["steps/sampled_tokens"] == 5000 and one["spent/optimizer_steps"] == 4
    two = deep["runs"]["2"]
    # .2, .3, .6 at 0, 5,000, 10,000 tokens: (.25 + .45) / 2
    assert two["watched/area"] == pytest.approx(0.35) and two["steps/area"] == pytest.approx(0.35)
    assert two["steps/sampled_tokens"] == 10_000 and two["final/pass"] == 0.9
    assert deep["mean"]["final/greedy"] == pytest.approx(0.55)
    # deep is at .5 and .6 in its last evaluation, which nothing confirms; grpo never is
    assert two["watched/tokens_to_target"] is None
    assert deep["tokens_to_target"] == grpo["tokens_to_target"] == {"reached": 0, "runs": 2, "median": None}
    found = deep["differences"]["final/greedy"]
    # two seeds: the interval is the range
    assert (found["mean"], found["low"], found["high"]) == pytest.approx((0.15, 0.1, 0.2))
    assert (found["above"], found["below"], found["sign_p"]) == (2, 0, 0.5)
    assert "differences" not in grpo
    json.dumps(result, allow_nan=False)


def with_changes(plan: Plan, **curve: float) -> Plan:
    changed = plan.experiment.model_copy(update={"curve": plan.experiment.curve.model_copy(update=curve)})
    return replace(plan, experiment=changed)


def test_tokens_to_a_target_are_judged_at_the_same_marks(done: Plan) -> None:
    """grpo's five evaluations and deep's three have two windows in common: 0, 5,000 and the end count for both."""
    arms = compare(with_changes(done, target=0.28), done.runs)["arms"]
    # .28 is four fifths of the way from .2 to .3 at 5,000; what follows is higher
    assert {arm: each["tokens_to_target"] for arm, each in arms.items()} == {
        arm: {"reached": 2, "runs": 2, "median": pytest.approx(4000)} for arm in ("grpo", "deep")
    }


def test_a_surplus_over_the_budget_is_not_counted(done: Plan) -> None:
    """With 12,000 tokens at deep's last step, the curve is at .3 + .3 · 5/7 at 10,000 of them."""
    path = done.of("deep")[1].paths.metrics
    path.write_text(path.read_text().replace('"ledger/sampled_tokens": 10000', '"ledger/sampled_tokens": 12000'))
    result = compare(done, done.runs)
    two = result["arms"]["deep"]["runs"]["2"]
    assert two["watched/greedy"] == pytest.approx(0.3 + 0.3 * 5 / 7) and two["steps/greedy"] == pytest.approx(0.6)
    assert any("deep: up to 20% more sampled tokens than the budget" in note for note in result["notes"])


def test_a_warm_start_that_missed_its_target_is_named(done: Plan) -> None:
    aimed = parse_changed(done.warmstarts[0], target_accuracy=0.47)
    plan = replace(done, warmstarts=(aimed,))
    aimed.paths.path.mkdir(parents=True)
    aimed.paths.metrics.write_text('{"step": 0, "eval/greedy": 0.01, "eval/sampled": 0.004}\n')
    (note,) = [each for each in compare(plan, plan.runs)["notes"] if "target_accuracy" in each]
    assert note.startswith("_warmstart-seed-1 reached 0.4% and aimed at warmstart.target_accuracy = 0.47")
    aimed.paths.metrics.write_text('{"step": 0, "eval/greedy": 0.5, "eval/sampled": 0.43}\n')
    assert not [each for each in compare(plan, plan.runs)["notes"] if "target_accuracy" in each]


def parse_changed(run: PlannedRun, **changes: float) -> PlannedRun:
    warmstart = run.config.warmstart
    assert warmstart is not None
    return replace(run, config=run.config.model_copy(update={"warmstart": warmstart.model_copy(update=changes)}))


def test_equal_steps_of_two_arms_do_not_depend_on_a_third(done: Plan) -> None:
    """From 3 and 4 steps: at 3, a is at .6 and .5, b between .2 at 2 and .6 at 4 at .4, and at .1."""
    a = {"1": [(0, 0.0), (3, 0.6)], "2": [(0, 0.0), (3, 0.5)], "9": [(0, 0.0), (1, 0.5)]}
    b = {"1": [(0, 0.0), (2, 0.2), (4, 0.6)], "2": [(0, 0.1), (4, 0.1)]}
    found = difference_at_own_steps(a, b)["pair/greedy"]
    assert found["steps"] == 3 and found["seeds"] == {"1": pytest.approx(0.2), "2": pytest.approx(0.4)}
    assert (found["mean"], found["level"]) == pytest.approx((0.3, 0.55))
    assert difference_at_own_steps(a, {"1": b["1"]}) == {}
    rows = {(row["arm"], row["metric"]): row for row in figure_rows(compare(done, done.runs))["rows"]}
    # deep takes 2 steps: .5 and .6 against .3
    assert rows["deep", "pair/greedy"]["difference"] == pytest.approx(0.25) and rows["deep", "pair/greedy"]["steps"] == 2


def test_figures_in_rows(done: Plan) -> None:
    found = figure_rows(compare(done, done.runs))
    rows = {(row["arm"], row["metric"]): row for row in found["rows"]}
    row = rows["deep", "final/greedy"]
    assert (row["mean"], row["difference"], row["low"], row["high"]) == pytest.approx((0.55, 0.15, 0.1, 0.2))
    assert (row["seeds"], row["pairs"], row["above"], row["below"], row["sign_p"]) == (2, 2, 2, 0, 0.5)
    assert "difference" not in rows["grpo", "final/greedy"] and rows["grpo", "spent/optimizer_steps"]["mean"] == 4
    assert (found["name"], found["baseline"], found["budget"], found["optimizer_steps"]) == ("trial", "grpo", 10_000, 2)
    json.dumps(found, allow_nan=False)


def test_tables_and_figure(done: Plan, tmp_path: Path) -> None:
    result = compare(done, done.runs)
    out = Console(file=io.StringIO(), width=250)
    for table in comparison_tables(result):
        assert all(len(row) == len(table.columns) for row in table.rows)
        print_comparison(out, table)
    text = out.file.getvalue()  # type: ignore[attr-defined]
    page = as_markdown(result)
    for shown in (text, page):
        assert "+15.0 [+10.0, +20.0] (2/0, 0.5)" in shown
        assert "> 10k" in shown and "0 of 2" in shown and "55.0 ±7.1" in shown
    assert "the full range with fewer" in page and "which 2 seeds cannot bring below 0.5" in page
    assert "The learning rate, 1e-06, is shared by all arms and tuned for none" in page
    assert "Evaluations per run differ (grpo 5, deep 3)" in page
    pytest.importorskip("matplotlib")
    figure.draw(result, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_notes_name_what_a_reader_must_know(done: Plan) -> None:
    result = compare(done, done.runs[:3])
    (missing, *_) = result["notes"]
    assert missing == "not in these figures, as they are not finished: deep-seed-2"
    assert result["arms"]["deep"]["differences"] == {}  # one pair has no interval
    assert "| deep | – |" in as_markdown(result)


def test_figures_of_a_running_experiment(done: Plan, capsys: Any) -> None:
    """Another process holds the lock; one run is not finished. Nothing is written."""
    fcntl = pytest.importorskip("fcntl")
    (done.directory / "arms" / "deep" / "seed-2" / "final.json").unlink()
    before = set(Path("out").rglob("*"))
    with done.paths.lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert cli.main(["compare", "exp.toml"]) == 2
        assert "--figures shows what is finished so far" in capsys.readouterr().err
        assert cli.main(["compare", "exp.toml", "--figures"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("runs: 4 of 4 have sampled their budget, 0 more have begun\nUntouched questions after 10k")
    assert "not in these figures, as they are not finished: deep-seed-2" in out
    assert set(Path("out").rglob("*")) == before | {done.paths.lock}


def test_training_figures_by_hand() -> None:
    lines = [{"step": 0, "ledger/sampled_tokens": 0}] + [
        {"step": i, "grad_norm": g, "main/entropy": e, "main/length": 10.0 * i, "ledger/sampled_tokens": 1000 * i,
         "main/groups": 8.0, "main/mixed": 0.5, **more}
        for i, g, e, more in ((1, 1.0, 0.5, {}), (2, None, 0.3, {"branch/groups": 4.0, "branch/mixed": 0.25}))
    ]  # fmt: skip
    found = training_figures(lines)
    assert found["train/grad_norm"] == 1.0  # a step without signal has none
    assert (found["train/entropy"], found["train/length"]) == (0.3, 20.0)  # of two steps the last tenth is the last
    # 4 + 4 + 1 of 8 + 8 + 4 groups, in 2,000 tokens
    assert (found["train/mixed"], found["train/mixed_per_1k"]) == (0.45, 4.5)


def test_epochs_are_those_of_the_last_step() -> None:
    lines = [{"step": 0}, {"step": 1, "data/epochs": 1.5}, {"step": 2, "data/epochs": 3.0}]
    assert spent_figures(lines)["spent/epochs"] == 3.0
    assert spent_figures([{"step": 0}, {"step": 1}])["spent/epochs"] is None  # endless data


def test_an_environment_has_its_columns(done: Plan) -> None:
    """Observations, calls and time in tools, beside the sampled tokens; without an environment there are no such columns."""
    titles = [table.columns for table in comparison_tables(compare(done, done.runs)) if table.title == "What a run spent"]
    assert "given tokens" not in titles[0]
    cost = {"ledger/given_tokens": 7000, "ledger/tool_calls": 1500, "ledger/seconds_tools": 12.0, "ledger/seconds_sample": 48.0}
    for run in done.runs:
        write_lines(run, [{**each, **cost} for each in read_lines(run)])
    (table,) = [each for each in comparison_tables(compare(done, done.runs)) if each.title == "What a run spent"]
    shown = dict(zip(table.columns, table.rows[0], strict=True))
    assert [shown[name] for name in ("given tokens", "tool calls", "tool seconds")] == ["7k", "2k", "12.0"]
    assert shown["minutes"] == "1.0"  # a step waits for its tools


def test_lookups_differ_by_seed(tmp_path: Path) -> None:
    """Each seed has questions and tables of its own; those that are watched stay."""
    plan = planned(tmp_path, EXPERIMENT.replace('base = "base.toml"', 'base = "lookup"'))
    assert {run.name: run.config.data.seed for run in plan.runs if isinstance(run.config.data, LookupData)} == {
        "grpo-seed-1": 1, "deep-seed-1": 1, "grpo-seed-2": 2, "deep-seed-2": 2
    }  # fmt: skip
    assert all(run.config.eval.data == LookupData(hops=5, functions=4, split="test") for run in plan.runs)
    assert plan.final.data == LookupData(hops=5, functions=4, split="test", seed=1)


def test_differences_need_both_arms_of_a_seed() -> None:
    found = differences(
        {"1": {"final/greedy": 0.5}, "2": {"final/greedy": 0.6}, "3": {"final/greedy": 0.9}},
        {"1": {"final/greedy": 0.4}, "2": {"final/greedy": 0.4}, "4": {"final/greedy": 0.0}},
    )
    assert found["final/greedy"]["seeds"] == {"1": pytest.approx(0.1), "2": pytest.approx(0.2)}


def test_short_numbers() -> None:
    assert [short(x) for x in (7, 950, 12_345, 999_499, 999_600, 1_250_000)] == ["7", "950", "12k", "999k", "1.00M", "1.25M"]


def test_the_pace_of_a_run_by_hand() -> None:
    lines = [{"step": 0, "time/eval": 3.0, "time/step": 3.0}] + [
        {"step": i, "sampled_tokens": 1000.0, "time/step": 2.0 + e, "time/eval": e or None} for i, e in ((1, 0.0), (2, 1.0))
    ]
    pace = _pace(lines, "x", scale=4.0)
    # 4 s for 2,000 tokens, evaluations of 3 and 1 s, steps of 1,000 tokens with a quarter of the prompts
    assert (pace.per_token, pace.evaluation, pace.tokens_per_step) == (0.002, 2.0, 4000.0)


# ---------------------------------------------------------------- jobs

WORK = """
import sys, time, pathlib, signal
what, path = sys.argv[1], pathlib.Path(sys.argv[2])
print("begun", what, flush=True)
if what == "wait":
    def stop(*_):
        print("told to stop", flush=True); sys.exit(0)
    signal.signal(signal.SIGTERM, stop)
    path.with_suffix(".begun").touch()
    time.sleep(60)
if what == "crash":
    sys.exit("error: no luck")
if what != "idle":
    path.write_text(str(time.time_ns()))
"""


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    (tmp_path / "work_of_a_job.py").write_text(textwrap.dedent(WORK))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def job(name: str, what: str = "do", after: tuple[str, ...] = ()) -> Job:
        result = tmp_path / f"{name}.done"
        return Job(name, ("work_of_a_job", what, str(result)), tmp_path / f"{name}.log", result.exists, after)

    return job


def test_jobs_run_in_their_order_and_one_crash_takes_no_other_down(work: Any, tmp_path: Path) -> None:
    (tmp_path / "there.done").write_text("long ago")
    jobs = Jobs(
        [
            work("there"), work("late", after=("early",)), work("early"), work("bad", "crash"), work("idle", "idle"),
            work("orphan", after=("bad",)), work("grandchild", after=("orphan",)),
        ],
        workers=2,
    )  # fmt: skip
    seen: list[tuple[str, str]] = []
    jobs.run(lambda job, state: seen.append((job.name, state)))
    assert jobs.state == {
        "there": "done", "late": "done", "early": "done", "bad": "failed",
        "idle": "failed",  # exit code 0, but its result is not there
        "orphan": "skipped", "grandchild": "skipped",
    }  # fmt: skip
    assert int((tmp_path / "early.done").read_text()) < int((tmp_path / "late.done").read_text())
    assert (tmp_path / "there.done").read_text() == "long ago" and not (tmp_path / "there.log").exists()
    assert ("late", "running") in seen and seen.index(("early", "done")) < seen.index(("late", "running"))
    assert (tmp_path / "bad.log").read_text() == "begun crash\nerror: no luck\n"


def test_ctrl_c_asks_the_jobs_to_stop_and_waits_for_them(work: Any, tmp_path: Path) -> None:
    import os
    import signal

    jobs = Jobs([work("slow", "wait"), work("next")], workers=1)

    def tick() -> None:
        if (tmp_path / "slow.begun").exists() and not jobs.stopping:
            os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        jobs.run(tick=tick)
    assert signal.getsignal(signal.SIGINT) is before
    assert (tmp_path / "slow.log").read_text() == "begun wait\ntold to stop\n"
    assert jobs.state == {"slow": "waiting", "next": "waiting"}  # neither failed: they go on another time
