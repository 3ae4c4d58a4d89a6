"""The tuning stage: the trials of a grid, the figure of a trial, the choice, and its record."""

from __future__ import annotations

import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from deepgrpo import cli
from deepgrpo.config import EvalConfig, to_toml
from deepgrpo.errors import ConfigError
from deepgrpo.lab.compare import command, forecast
from deepgrpo.lab.compare import jobs as jobs_module
from deepgrpo.lab.compare.grid import Trial, fixed_values, label, trials_of
from deepgrpo.lab.compare.jobs import Job, Jobs
from deepgrpo.lab.compare.plan import Plan, PlannedRun, expand
from deepgrpo.lab.compare.refusals import refuse_unreachable
from deepgrpo.lab.compare.tune import choose, edges, read_choices, trial_figure, tuning, write_tuning
from deepgrpo.lab.compare.tune_tables import choice_lines, tuning_table
from deepgrpo.lab.compare.work import make_jobs
from deepgrpo.lab.options import CompareOptions
from deepgrpo.runs.layout import RunDir
from experiments import EXPERIMENT, line, planned, write_lines, write_run

TUNE = """
[tune]
grid = { optim.lr = [1e-4, 3e-4] }
seeds = [11, 12]
budget = 1_000
"""
GRID = {"optim.lr": (1e-4, 3e-4), "optim.warmup_steps": (0, 20)}


def test_the_trials_of_an_arm_are_all_combinations_of_what_it_does_not_set() -> None:
    assert [trial.name for trial in trials_of(GRID, {})] == [
        "lr=0.0001,warmup_steps=0", "lr=0.0001,warmup_steps=20", "lr=0.0003,warmup_steps=0", "lr=0.0003,warmup_steps=20",
    ]  # fmt: skip
    own = {"optim": {"lr": 6e-4}, "explore": {"gamma": 1.0}}
    assert fixed_values(GRID, own) == {"optim.lr": 6e-4}
    assert trials_of(GRID, own) == (
        Trial("warmup_steps=0", {"optim.warmup_steps": 0}), Trial("warmup_steps=20", {"optim.warmup_steps": 20}),
    )  # fmt: skip
    assert trials_of(GRID, {"optim": {"lr": 6e-4, "warmup_steps": 5}}) == ()
    # keys that end alike keep their whole name
    assert trials_of({"a.size": (1,), "b.size": (2,)}, {})[0].name == "a.size=1,b.size=2"
    assert [label(value) for value in (5e-5, 1e-4, 0.123456789, 20, True, "sum")] == [
        "5e-05", "0.0001", "0.123456789", "20", "true", "sum",
    ]  # fmt: skip


def test_trials_are_runs_on_seeds_of_their_own(tmp_path: Path) -> None:
    plan = planned(tmp_path, EXPERIMENT + TUNE)
    assert [run.name for run in plan.trials][:3] == [
        "grpo-lr=0.0001-seed-11", "grpo-lr=0.0003-seed-11", "deep-lr=0.0001-seed-11",
    ]  # fmt: skip
    assert len(plan.trials) == 8 and len(plan.runs) == 4 and plan.undecided == {"grpo", "deep"} and plan.decided == ()
    trial = plan.trials[1]
    assert (trial.config.optim.lr, trial.budget, trial.config.run.seed) == (3e-4, 1000, 11)
    assert str(trial.directory) == "out/trial/tune/grpo/lr=0.0003/seed-11"
    # one warm start per seed of either stage, shared by its runs
    assert [warm.seed for warm in plan.warmstarts] == [11, 12, 1, 2]
    start = "out/trial/warmstart/seed-11/start"
    assert {str(run.config.warmstart.from_) for run in plan.trials if run.seed == 11 and run.config.warmstart} == {start}
    # with a choice, the fresh runs have its values; without one they are not to be run
    some = expand(plan.experiment, plan.source, {"deep": {"optim.lr": 3e-4}})
    assert some.undecided == {"grpo"} and {(run.arm, run.config.optim.lr) for run in some.decided} == {("deep", 3e-4)}
    # an arm that sets the rate is ready from the start, and no twin of one that may end up with the same
    own = planned(tmp_path, EXPERIMENT + "optim.lr = 3e-4\n[arms.more]" + TUNE)
    assert {run.arm for run in own.decided} == {"deep"} and {run.arm for run in own.trials} == {"grpo", "more"}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (TUNE.replace("[11, 12]", "[2, 12]"), "tune.seeds and seeds both have 2"),
        (TUNE.replace("[11, 12]", "[11, 11]"), "tune.seeds has 11 twice"),
        (TUNE.replace("[11, 12]", "[]"), "tune.seeds is empty"),
        (TUNE.replace("{ optim.lr = [1e-4, 3e-4] }", "{}"), "tune.grid is empty"),
        (TUNE.replace("[1e-4, 3e-4]", "[1e-4, 1e-4]"), "tune.grid.optim.lr is [0.0001, 0.0001]; name at least one value"),
        (TUNE.replace("[1e-4, 3e-4]", "3e-4"), "tune.grid.optim.lr is 0.0003; it should be a list: write [0.0003]"),
        (TUNE.replace("[1e-4, 3e-4]", '["a/b"]'), "tune.grid.optim.lr has 'a/b'"),
        (TUNE.replace("optim.lr", "optim.rate"), "arm 'grpo' with rate=0.0001: unknown key 'optim.rate' (value 0.0001)"),
        (TUNE.replace("optim.lr = [1e-4, 3e-4]", "run.seed = [1, 2]"), "tune.grid.run.seed is (1, 2), but the experiment sets"),
        (TUNE.replace("optim.lr = [1e-4, 3e-4]", "eval.limit = [1, 2]"), "tune.grid.eval is {'limit': (1, 2)}, but all arms"),
        (TUNE + 'metric = "sampled"', 'tune.metric is "sampled", but eval.samples is 0'),
        (TUNE + "last_share = 0.0", "tune.last_share is 0.0; it should be greater than 0"),
    ],
)
def test_what_is_refused(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        planned(tmp_path, EXPERIMENT + text)
    assert says in str(caught.value)


# ---------------------------------------------------------------- figures and choices


def write_trial(run: PlannedRun, *evaluations: tuple[int, float]) -> None:
    write_lines(run, [line(i, tokens, i, greedy) for i, (tokens, greedy) in enumerate(evaluations)])


def of(plan: Plan, name: str) -> PlannedRun:
    return next(run for run in plan.trials if run.name == name)


def test_the_figure_of_a_trial_by_hand(tmp_path: Path) -> None:
    plan = planned(tmp_path, EXPERIMENT + TUNE)
    assert plan.experiment.tune is not None
    tune, run = plan.experiment.tune, of(plan, "grpo-lr=0.0001-seed-11")
    assert trial_figure(run, tune, diverged=False) is None and trial_figure(run, tune, diverged=True) is None
    # the last fifth of 1,000 tokens: at 800 the curve is at .4, at 1,000 half way from .4 to .8; what is beyond does not count
    write_trial(run, (0, 0.2), (800, 0.4), (1200, 0.8))
    assert trial_figure(run, tune, diverged=False) == pytest.approx((0.4 + 0.6) / 2)
    # a run that died half way counts with its last evaluation, one that still goes on does not count yet
    other = of(plan, "grpo-lr=0.0003-seed-11")
    write_trial(other, (0, 0.2), (500, 0.7), (600, 0.1))
    assert trial_figure(other, tune, diverged=True) == 0.1 and trial_figure(other, tune, diverged=False) is None


def test_the_highest_mean_is_chosen_and_a_tie_goes_to_the_lower_rate() -> None:
    def trial(lr: float, warmup: int, mean: float | None) -> dict[str, Any]:
        return {"values": {"optim.warmup_steps": warmup, "optim.lr": lr}, "mean": mean}

    best = choose([trial(1e-4, 0, 0.5), trial(2e-4, 0, 0.7), trial(3e-4, 0, 0.6)])
    assert best is not None and best["values"]["optim.lr"] == 2e-4
    best = choose([trial(3e-4, 0, 0.7), trial(2e-4, 20, 0.7 - 1e-12), trial(2e-4, 10, 0.7), trial(1e-4, 0, None)])
    assert best is not None and best["values"] == {"optim.lr": 2e-4, "optim.warmup_steps": 10}
    assert choose([trial(1e-4, 0, None)]) is None


def test_a_choice_at_the_edge_of_the_grid() -> None:
    grid = {"optim.lr": (1e-4, 2e-4, 3e-4), "optim.warmup_steps": (0, 20), "loss.reduction": ("a", "b"), "x.one": (5,)}
    assert edges(grid, {"optim.lr": 2e-4, "optim.warmup_steps": 0, "loss.reduction": "a", "x.one": 5}) == []
    assert edges(grid, {"optim.lr": 3e-4, "optim.warmup_steps": 20}) == ["optim.lr", "optim.warmup_steps"]
    assert edges(grid, {"optim.lr": 1e-4}) == ["optim.lr"]


@pytest.fixture
def tried(tmp_path: Path) -> Plan:
    """grpo is best at 1e-4 (.6 against .5). Of deep at 3e-4 one run dies at .9, which makes .75; at 1e-4 it has .7."""
    plan = planned(tmp_path, EXPERIMENT + TUNE + "[arms.fixed.optim]\nlr = 6e-4\n")
    ends = {"grpo-lr=0.0001": (0.5, 0.7), "grpo-lr=0.0003": (0.4, 0.6), "deep-lr=0.0001": (0.7, 0.7)}
    for name, greedy in ends.items():
        for seed, value in zip((11, 12), greedy, strict=True):
            write_trial(of(plan, f"{name}-seed-{seed}"), (0, value), (1000, value))
    write_trial(of(plan, "deep-lr=0.0003-seed-11"), (0, 0.6), (1000, 0.6))
    write_trial(of(plan, "deep-lr=0.0003-seed-12"), (0, 0.2), (300, 0.9))
    return plan


def test_choices_are_recorded_shown_and_stand(tried: Plan) -> None:
    found = tuning(tried, ["deep-lr=0.0003-seed-12"])
    chosen = {arm: each["chosen"] for arm, each in found["arms"].items()}
    assert chosen == {"grpo": {"optim.lr": 1e-4}, "deep": {"optim.lr": 3e-4}, "fixed": {}}
    assert found["arms"]["deep"]["trials"][1]["mean"] == pytest.approx(0.75)
    rows = tuning_table(found).rows
    assert ("grpo", "lr=0.0001", "60.0", "50.0", "70.0", "chosen") in rows
    assert ("deep", "lr=0.0003", "75.0", "60.0", "90.0", "chosen; diverged: 12") in rows
    said = choice_lines(found)
    assert "fixed: not tuned, as the arm sets it: optim.lr = 0.0006" in said
    assert any(each.startswith("deep: optim.lr = 0.0003 is the highest value tried") for each in said)
    write_tuning(tried, found)
    page = (tried.directory / "tune.md").read_text()
    assert "last 20% of 1,000 sampled tokens, averaged over seeds 11, 12. A tie goes to the lower" in page
    assert "| deep | lr=0.0003 | 75.0 | 60.0 | 90.0 | chosen; diverged: 12 |" in page
    choices = read_choices(tried)
    assert choices == {"grpo": {"optim.lr": 1e-4}, "deep": {"optim.lr": 3e-4}}
    decided = expand(tried.experiment, tried.source, choices)
    assert not decided.undecided and {run.config.optim.lr for run in decided.of("fixed")} == {6e-4}
    # a record is taken over as it is: that the dead run failed is known from nowhere else
    assert tuning(decided)["arms"] == found["arms"]


def test_a_choice_does_not_stand_for_another_grid_or_budget(tried: Plan, tmp_path: Path) -> None:
    write_tuning(tried, tuning(tried, ["deep-lr=0.0003-seed-12"]))
    text = tried.source.read_text()
    for before, after in (("[1e-4, 3e-4]", "[1e-4, 3e-4, 5e-4]"), ("[11, 12]", "[11, 13]"), ("1_000\n", "2_000\n")):
        assert read_choices(planned(tmp_path, text.replace(before, after))) == {}
    # another arm's keys do not matter
    assert set(read_choices(planned(tmp_path, text.replace("lr = 6e-4", "lr = 7e-4")))) == {"grpo", "deep"}
    (tried.directory / "tune.json").write_text("{")
    assert read_choices(tried) == {}


def test_an_arm_without_all_figures_has_no_choice_yet(tried: Plan) -> None:
    found = tuning(tried)  # no loss has diverged: one of deep's goes on
    assert found["arms"]["deep"]["chosen"] is None and found["arms"]["grpo"]["chosen"] is not None
    assert "deep: no choice, as its trials are not complete or have no figure" in choice_lines(found)
    write_tuning(tried, found)
    assert set(read_choices(tried)) == {"grpo"}


# ---------------------------------------------------------------- the command


def test_an_interrupted_trial_goes_on_and_has_no_final_evaluation(tmp_path: Path) -> None:
    plan = planned(tmp_path, EXPERIMENT + TUNE)
    begun = of(plan, "deep-lr=0.0003-seed-12")
    write_trial(begun, (0, 0.2), (300, 0.3))
    jobs = {job.name: job for job in make_jobs(plan, plan.trials)}
    assert set(jobs) == {run.name for run in plan.trials} | {"_warmstart-seed-11", "_warmstart-seed-12"}
    resumed = ("--resume", "out/trial/tune/deep/lr=0.0003/seed-12", "--run.steps", "50", "--run.max_sampled_tokens", "1000")
    assert jobs[begun.name].command[2:] == resumed and not jobs[begun.name].finished()
    other = jobs["deep-lr=0.0003-seed-11"]
    assert other.command[2:] == ("out/trial/jobs/deep-lr=0.0003-seed-11.toml",) and other.after == ("_warmstart-seed-11",)


def test_a_forecast_has_both_stages(tried: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    """7 of 8 trials are done; one of 1,000 tokens and six runs of 10,000 are left, at a millisecond per token."""
    monkeypatch.setattr(forecast, "_from_runs", lambda runs: forecast.Pace(0.001, 500.0, 0.0, "here"))
    out = Console(file=io.StringIO(), width=120)
    forecast.forecast(tried, 2, out)
    said = " ".join(out.file.getvalue().split())  # type: ignore[attr-defined]
    assert "trial: tuning arm" in said and "deep 1 1,000 2 0.0 here" in said and "fixed 2 10,000 20 0.2 here" in said
    # 61 s on two workers
    assert "7 runs, 61,000 sampled tokens, about 1 minutes with --jobs 2, and 2 warm starts before them" in said


def test_evaluations_in_a_forecast() -> None:
    """1,000 tokens in steps of 100: every 2 steps, every 250 tokens, or every 10, which is after each step; and two more."""
    pace = forecast.Pace(0.0, 100.0, 1.0, "here")
    for section, evaluations in (({"every": 2}, 5), ({"every_tokens": 250}, 4), ({"every_tokens": 10}, 10)):
        config = SimpleNamespace(eval=EvalConfig.model_construct(**section))
        assert pace.seconds(config, 1000, 0, 1) == 2 + evaluations  # type: ignore[arg-type]


def test_trials_of_a_running_experiment_are_shown(tried: Plan, capsys: Any) -> None:
    assert cli.main(["compare", "exp.toml", "--figures"]) == 0
    out = capsys.readouterr().out
    assert "trials: 7 of 8 have sampled their budget, 1 more have begun\nruns: 0 of 6" in out
    assert "Chosen is the trial with the highest greedy accuracy" in out
    assert "deep: no choice, as its trials are not complete" in out and not (tried.directory / "tune.json").exists()


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the jobs that were started. Instead of training, a job writes a run: at 1e-4 it stays at .5, at 3e-4 at .6."""
    names: list[str] = []

    def launch(self: Jobs, job: Job) -> Any:
        names.append(job.name)
        source = Path("exp.toml")
        plan = command._planned(CompareOptions(str(source)))
        run = next((each for each in (*plan.trials, *plan.runs) if each.name == job.name.removesuffix("-final")), None)
        job.log.parent.mkdir(parents=True, exist_ok=True)
        code = 0
        if run is None:
            RunDir(plan.paths.warmstarts / job.name.removeprefix("_warmstart-")).start.mkdir(parents=True)
        elif run.trial and run.arm == "deep" and run.config.optim.lr == 3e-4:  # it dies at .9
            write_lines(run, [line(0, 0, 0, 0.2), line(1, 300, 1, 0.9)])
            job.log.write_text("error: the loss is not finite")
            code = 3
        elif run.trial and run.arm == "unlucky" and names.count(job.name) == 1:
            write_lines(run, [line(0, 0, 0, 0.2), line(1, 300, 1, 0.9)])
            job.log.write_text("error: out of memory")
            code = 1
        else:
            greedy, end = (0.6 if run.config.optim.lr == 3e-4 else 0.5), (run.budget if run.config.run.steps > 1 else 900)
            lines = [line(0, 0, 0, 0.2), line(1, end, 1, greedy)]
            write_run(plan, run.name, lines, greedy, greedy) if job.name.endswith("-final") else write_lines(run, lines)
            run.paths.config.write_text(to_toml(run.config))
        return SimpleNamespace(poll=lambda: code, returncode=code)

    monkeypatch.setattr(Jobs, "_launch", launch)
    monkeypatch.setattr(jobs_module, "POLL_S", 0.0)
    monkeypatch.setattr(command, "can_draw", lambda: False)
    return names


def test_a_trial_that_diverges_counts_and_one_without_enough_steps_is_named(
    tmp_path: Path, ran: list[str], capsys: Any
) -> None:
    short = '[arms.short]\nrun.steps = 1\nrun.prompts_per_step = 64\nexplore = { type = "root" }\n'
    planned(tmp_path, EXPERIMENT.replace("10_000", "1_000") + short + TUNE.replace("11, 12", "11"))
    assert cli.main(["compare", "exp.toml"]) == 1
    out = " ".join(capsys.readouterr().out.split())
    assert "trial: tuning, 3 arms × 2 trials × 1 seeds, 1,000 sampled tokens each" in out
    assert "warning: deep-lr=0.0003-seed-11 failed: error: the loss is not finite" in out
    assert "warning: short-lr=0.0001-seed-11 ended at 900 of 1,000 sampled tokens, as its run.steps = 1 steps were over" in out
    record = json.loads(Path("out/trial/tune.json").read_text())["arms"]
    assert {arm: each["chosen"] for arm, each in record.items()} == {
        "grpo": {"optim.lr": 3e-4}, "deep": {"optim.lr": 3e-4}, "short": None,
    }  # fmt: skip
    # the other arms go on, with their choices; what is missing is said
    assert {"deep-seed-1", "grpo-seed-2"} <= set(ran) and "short-seed-1" not in ran
    assert "\nlr = 0.0003\n" in Path("out/trial/jobs/deep-seed-1.toml").read_text()
    assert "not in these figures, as they are not finished: short-seed-1, short-seed-2" in out
    # with enough steps the arm catches up; no choice that was made is made again
    del ran[:]
    planned(tmp_path, Path("exp.toml").read_text().replace("run.steps = 1\n", "run.steps = 9\n"))
    assert cli.main(["compare", "exp.toml"]) == 0
    assert [name for name in ran if "seed-11" in name and "_" not in name] == [
        "short-lr=0.0001-seed-11", "short-lr=0.0003-seed-11",
    ]  # fmt: skip
    assert json.loads(Path("out/trial/tune.json").read_text())["arms"]["deep"] == record["deep"]
    # another grid is another choice, and runs with the former one are not mixed in
    planned(tmp_path, Path("exp.toml").read_text().replace("[1e-4, 3e-4]", "[1e-4, 9e-5]"))
    assert cli.main(["compare", "exp.toml"]) == 2
    said = capsys.readouterr()
    assert "optim.lr = 9e-05 is the lowest value tried" in " ".join(said.out.split())
    assert "grpo/seed-1 was run with optim.lr = 0.0003, and the experiment now says 9e-05" in said.err


def test_a_trial_that_a_machine_fails_is_run_again(tmp_path: Path, ran: list[str], capsys: Any) -> None:
    """It died at .9 for lack of memory, which says nothing about its rate; other arms go on."""
    unlucky = '[arms.unlucky]\nexplore = { type = "root", num_rollouts = 4 }\n'
    planned(tmp_path, EXPERIMENT.replace("10_000", "1_000") + unlucky + TUNE.replace("11, 12", "11"))
    record = Path("out/trial/tune.json")
    assert cli.main(["compare", "exp.toml"]) == 1
    assert "warning: unlucky-lr=0.0001-seed-11 failed: error: out of memory" in " ".join(capsys.readouterr().out.split())
    assert json.loads(record.read_text())["arms"]["unlucky"]["chosen"] is None
    assert "grpo-seed-1" in ran and "unlucky-seed-1" not in ran
    assert cli.main(["compare", "exp.toml"]) == 0
    assert json.loads(record.read_text())["arms"]["unlucky"]["chosen"] == {"optim.lr": 3e-4} and "unlucky-seed-1" in ran


def test_a_tuning_budget_out_of_reach(tmp_path: Path) -> None:
    # 8 prompts x 8 rollouts x 256 tokens = 16,384 a step; 10,000,000 / 16,384 = 610.4
    with pytest.raises(ConfigError, match=r"arm 'grpo' cannot reach the budget of tune.budget = 10,000,000 .* at least 611"):
        refuse_unreachable(planned(tmp_path, EXPERIMENT + TUNE.replace("1_000\n", "10_000_000\n")))
