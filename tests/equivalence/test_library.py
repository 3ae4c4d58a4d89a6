"""Runs from Python: equal to those of the command line, to uninterrupted ones, and to themselves step by step."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from deepgrpo import (
    Callback,
    CallbackError,
    CheckpointError,
    ConfigError,
    DataError,
    Run,
    Stateless,
    StepReport,
    Tree,
    cli,
    evaluate,
    load_run,
    load_trees,
    main_pivot,
    sibling_credit,
    steps,
    train,
)
from tiny import byte_tokenizer

TIMED = ("time/", "tokens_per_s", "ledger/seconds")
ROWS = [{"question": f"{i} + {i + 1} = ", "answer": str(2 * i + 1)} for i in range(6)]
REWARD = """
def digits(completions, **columns):
    return [sum(each.isdigit() for each in text) / 8 for text in completions]
"""
namespace: dict[str, Any] = {}
exec(REWARD, namespace)
digits = namespace["digits"]

RECIPE: dict[str, Any] = {
    "run": {"steps": 3, "prompts_per_step": 2, "threads": 1},
    "data": {"template": {"chat": False}},
    "reward": {"truncated_value": "none"},
    "sampling": {"max_new_tokens": 8},
    "explore": {
        "type": "deep", "num_rollouts": 3, "branches_per_pivot": 2, "success_threshold": 0.3,
        "segments": {"type": "tokens", "size": 2},
    },
    "optim": {"lr": 1e-2},
    "loss": {"beta": 0.01},
    "checkpoint": {"every": 1, "keep_last": 9},
    "log": {"trees_every": 1},
}  # fmt: skip


def new_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=258, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=64, bos_token_id=None, eos_token_id=1, pad_token_id=0,
    ))  # fmt: skip


def objects(**changes: Any) -> dict[str, Any]:
    return {"tokenizer": byte_tokenizer(), "dataset": ROWS, "eval_dataset": ROWS[:2], "rewards": digits, **changes}


def named(name: str, **more: Any) -> dict[str, Any]:
    return {"overrides": {"run.name": name, **more}, "show": False}


def trace(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if not key.startswith(TIMED)} for line in lines]


def weights(model: LlamaForCausalLM) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


def same(a: Sequence[torch.Tensor], b: Sequence[torch.Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(a, b, strict=True))


class Seen(Callback):
    """Notes all calls, and draws from torch as a careless callback would."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def on_step(self, report: StepReport, trees: Sequence[Tree]) -> None:
        torch.rand(3)
        self.calls.append(("step", report.step, len(trees)))

    def on_eval(self, report: StepReport) -> None:
        self.calls.append(("eval", report.step))

    def on_checkpoint(self, step: int, path: Path) -> None:
        self.calls.append(("checkpoint", step, path.name))

    def on_end(self, run: Run) -> None:
        self.calls.append(("end", run.step))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, list[torch.Tensor], Seen]:
    """An uninterrupted run of three steps, its final weights, and what its callback saw."""
    directory, model, seen = tmp_path_factory.mktemp("whole"), new_model(), Seen()
    with contextlib.chdir(directory):
        run = train(RECIPE, model=model, **objects(), callbacks=[seen], **named("whole", **{"run.dir": str(directory)}))
    return run, weights(model), seen


# ---------------------------------------------------------------- equal to the command line


def test_a_run_from_objects_equals_that_of_the_command_line(whole: Any, tmp_path: Path) -> None:
    run, trained, _ = whole
    model, tokenizer = new_model(), byte_tokenizer()
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (tmp_path / "held_out.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS[:2]))
    (tmp_path / "reward.py").write_text(REWARD)
    tables = copy.deepcopy(RECIPE)
    tables["model"] = {"type": "pretrained", "path": "model"}
    tables["data"] |= {"type": "jsonl", "path": "rows.jsonl"}
    tables["eval"] = {"every": 3, "data": {**tables["data"], "path": "held_out.jsonl"}}
    tables["reward"] |= {"type": "user", "function": "reward.py:digits"}
    other = train(tables, **named("shell"))
    assert trace(other.directory) == trace(run.directory)
    loaded = LlamaForCausalLM.from_pretrained(other.model)
    assert same(weights(loaded), trained)


# ---------------------------------------------------------------- interrupted, resumed


def test_a_run_left_and_resumed_equals_the_whole_one(whole: Any) -> None:
    """The model object has moved on meanwhile, and the caller drew random numbers: the KL reference is that of the start."""
    run, trained, _ = whole
    model, given = new_model(), objects()
    before = signal.getsignal(signal.SIGINT)
    for report in steps(RECIPE, model=model, **given, **named("left")):
        assert signal.getsignal(signal.SIGINT) is before  # Ctrl-C is the caller's own now
        torch.rand(5)
        if report.step == 2:
            break
    left = Run("runs/left")
    assert left.step == 2 and [each.name for each in left.paths.checkpoints.iterdir() if each.name == "step-000002"]
    assert "stopped after step 2 and saved; continue with: deepgrpo.train(resume=" in left.paths.log.read_text()
    with torch.no_grad():
        model.lm_head.weight.add_(1.0)
    resumed = train(resume=left, model=model, **given, show=False)
    assert trace(resumed.directory) == trace(run.directory) and same(weights(model), trained)
    # at an earlier checkpoint, by a model object that was never trained
    again = new_model()
    train(resume="runs/left", step=1, model=again, **given, show=False)
    assert trace(Path("runs/left")) == trace(run.directory) and same(weights(again), trained)


def test_other_objects_are_refused(whole: Any) -> None:
    run, _, _ = whole
    more = {"overrides": {"run.steps": 4}, "show": False}

    def other(completions: list[str]) -> list[float]:
        return [0.0] * len(completions)

    before = trace(run.directory)
    for changes, message in (
        ({"rewards": other}, "rewards: the run .* was started with digits, and other is given"),
        ({"rewards": [digits, digits]}, r"was started with digits, and 1 · digits \+ 1 · digits is given"),
        ({"dataset": ROWS[:5]}, "data: the rows given are not those of the checkpoint .6 rows before, 5 rows now."),
        ({"eval_dataset": ROWS[2:4]}, "eval.data: the rows given are not those of the checkpoint"),
        ({"eval_dataset": None}, r"eval_dataset is missing: .* give the same again: train\(resume=.*, model=..., dataset="),
        ({"strategy": Stateless}, "strategy is given, but the run .* was started without it"),
        ({"tokenizer": _other_template()}, "model: the LlamaForCausalLM or its tokenizer is not the one"),
    ):
        with pytest.raises((ConfigError, CheckpointError), match=message):
            train(resume=run, model=new_model(), **objects(**changes), **more)
    assert trace(run.directory) == before
    with contextlib.redirect_stderr(io.StringIO()) as said:
        assert cli.main(["train", "--resume", str(run.directory), "--run.steps", "4"]) == 2
    assert "LlamaForCausalLM was an object of the Python program that started the run" in said.getvalue()


def _other_template() -> Any:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{{ messages }}"
    return tokenizer


def test_adapters_of_an_object_are_resumed() -> None:
    """A model wrapped by peft: the adapters are trained, and the base stays."""
    peft = pytest.importorskip("peft")

    def wrapped() -> Any:
        model = new_model()
        torch.manual_seed(1)
        return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))

    model, left, given = wrapped(), wrapped(), objects(eval_dataset=None)
    train(RECIPE, model=model, **given, **named("whole", **{"run.steps": 2}))
    for _ in steps(RECIPE, model=left, **given, **named("left", **{"run.steps": 2})):
        break
    train(resume="runs/left", model=left, **given, show=False)
    start = wrapped()
    moved = [name for (name, a), b in zip(model.named_parameters(), start.parameters(), strict=True) if not torch.equal(a, b)]
    assert moved and all("lora_" in name for name in moved) and same(weights(model), weights(left))


# ---------------------------------------------------------------- step by step, callbacks


def test_callbacks_see_every_event(whole: Any) -> None:
    _, _, seen = whole
    assert seen.calls == [
        ("eval", 0), ("step", 1, 2), ("checkpoint", 1, "step-000001"), ("step", 2, 2), ("checkpoint", 2, "step-000002"),
        ("step", 3, 2), ("eval", 3), ("checkpoint", 3, "step-000003"), ("end", 3),
    ]  # fmt: skip


def test_a_run_held_open_a_callback_that_stops_and_one_that_fails(whole: Any) -> None:
    run, trained, _ = whole
    model = new_model()
    with steps(RECIPE, model=model, **objects(), **named("open")) as going:
        assert next(going).step == 1 and going.trees[0].nodes and going.run.step == 1
        with pytest.raises(ConfigError, match=r"open is in use by this process: a run of `steps` is still open"):
            train(RECIPE, model=new_model(), **objects(), **named("open"))
        assert [report.step for report in going] == [2, 3]
        going.close()
    assert same(weights(model), trained)

    class Stop(Seen):
        def on_checkpoint(self, step: int, path: Path) -> str:  # type: ignore[override]
            super().on_checkpoint(step, path)
            return "stop"

    class Fails:
        def on_step(self, report: StepReport, trees: Sequence[Tree]) -> None:
            assert report.step < 2, "enough"

    stop, model = Stop(), new_model()
    assert train(RECIPE, model=model, **objects(), callbacks=[stop], **named("stop")).step == 1
    assert stop.calls[-1] == ("end", 1)
    with pytest.raises(CallbackError, match=r"(?s)Fails.on_step raised AssertionError: enough.*state after step 2 is saved"):
        train(resume="runs/stop", model=model, **objects(), callbacks=[Fails()], show=False)
    train(resume="runs/stop", model=model, **objects(), show=False)
    assert same(weights(model), trained) and trace(Path("runs/stop")) == trace(run.directory)


# ---------------------------------------------------------------- read back


def test_frames_are_the_run_s_own_figures(whole: Any) -> None:
    run, _, _ = whole
    metrics, nodes = load_run(run), load_trees(str(run.directory))
    assert metrics.index.tolist() == [0, 1, 2, 3] and run.step == 3
    assert metrics["main/reward"].tolist()[1:] == [line["main/reward"] for line in run.metrics[1:]]
    assert run.evaluation == {
        "step": 3, **{key[5:]: value for key, value in run.metrics[-1].items() if key.startswith("eval/")}
    }  # fmt: skip
    for step in (1, 2, 3):
        rows = nodes[nodes.step == step]
        main = rows[rows.stream == "main"]
        assert len(main) == 2 * 3 and main.reward.mean() == pytest.approx(run.metrics[step]["main/reward"])
        assert rows.tokens.sum() == run.metrics[step]["ledger/sampled_tokens"] - run.metrics[step - 1]["ledger/sampled_tokens"]
        assert main.groupby("tree").advantage.sum().tolist() == pytest.approx([0.0, 0.0])
    first = next(run.trees(1))
    pivots = {tree.pivots[node.pivot].ratio for tree in [first.tree] for node in tree.nodes}
    assert set(load_trees(run, 1).query("tree == 0").ratio) == pivots
    assert set(load_trees(run, [1, 3]).step) == {1, 3}
    with pytest.raises(DataError, match="has no saved trees of step 9; it has those of 1, 2, 3"):
        load_trees(run, 9)


def test_evaluate_a_run_and_its_model_alike(whole: Any) -> None:
    run, _, _ = whole
    model = LlamaForCausalLM.from_pretrained(run.model)
    by_name = evaluate(run, ROWS, rewards=digits, samples=2, k=(1, 2))
    by_object = evaluate(
        model, ROWS, tokenizer=byte_tokenizer(), rewards=digits, samples=2, k=(1, 2), config=RECIPE, device="cpu"
    )
    assert by_name.metrics == by_object.metrics and by_name.rows == by_object.rows
    held_out = evaluate(model, ROWS[:2], tokenizer=byte_tokenizer(), rewards=digits, config=RECIPE)
    assert run.evaluation is not None and held_out.metrics["eval/greedy"] == run.evaluation["greedy"]


# ---------------------------------------------------------------- strategies


class Halves(Stateless):
    """Resamples every rollout from its middle."""

    def __init__(self, config: Any) -> None:
        self.config = config

    @classmethod
    def build(cls, config: Any, context: Any) -> Halves:
        return cls(config)

    def plan(self, tree: Any, state: Any, limits: Any, random: Any) -> Any:
        from deepgrpo import Pivot

        if tree.pivots:
            main = [] if len(tree.pivots) > 1 else list(tree.stream("main"))
            return [Pivot(index, len(node.tokens) // 2, 2, ratio=0.5) for index, node in main]
        return [main_pivot(self.config.num_rollouts)]

    def returns(self, level: int) -> bool:
        return level == 0

    def credit(self, tree: Tree) -> Any:
        return sibling_credit(tree)


def test_a_strategy_as_a_class_or_an_object() -> None:
    built = train(RECIPE, model=new_model(), **objects(), strategy=Halves, **named("class", **{"run.steps": 1}))
    made = Halves(type("Config", (), {"num_rollouts": 3}))
    other = train(RECIPE, model=new_model(), **objects(), strategy=made, **named("object", **{"run.steps": 1}))
    assert trace(built.directory) == trace(other.directory)
    assert set(load_trees(built).query("stream == 'branch'").ratio) == {0.5}
    wrong = type("Wrong", (), {"num_rollouts": 3})()
    with pytest.raises(ConfigError, match=r"explore.strategy is 'given:Wrong', which has no signals"):
        train(RECIPE, model=new_model(), **objects(), strategy=wrong, **named("wrong"))
