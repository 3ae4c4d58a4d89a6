"""Whole runs of a tiny policy: what must give the same numbers, and what a run leaves behind."""

from __future__ import annotations

import hashlib
import io
import json
import re
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from conftest import TINY
from deepgrpo.config import Config, ScratchModel, SyntheticData, WarmstartConfig, load_recipe
from deepgrpo.engines.embedded.engine import EmbeddedEngine
from deepgrpo.errors import ModelError
from deepgrpo.explore import build_strategy
from deepgrpo.explore.base import Context
from deepgrpo.model.loading import scratch_policy
from deepgrpo.prompts import synthetic
from deepgrpo.prompts.chain_task import ChainTask
from deepgrpo.prompts.source import Cursor, build_source
from deepgrpo.runs.trees import load_trees
from deepgrpo.train import evaluation, loop, warmstart
from deepgrpo.train.dry_run import dry_run
from deepgrpo.train.loop import train
from deepgrpo.train.memory import estimate_memory
from deepgrpo.train.warmstart import Example, imitate

IMITATE = {"steps": 40, "batch_size": 16, "lr": 1e-2}
"""Enough that a third of the rollouts succeed: groups are mixed from the first step on."""
SHORT = {"chain_length": 1}
BRANCHING = {"segments": {"type": "tokens", "size": 3}, "recoverability": {"window": 20, "min_items": 4}}
HELD_OUT = {"type": "synthetic", "chain_length": 1, "split": "test"}


@pytest.fixture(scope="module")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of no steps, of whose warm starts others begin."""
    return tmp_path_factory.mktemp("warm")


@pytest.fixture
def short(recipe: Any, warm: Path) -> Callable[..., Config]:
    """A run of a few steps that has signal in each, in well under a second a step.

    Runs whose warm starts are equal share one, unless they name it.
    """

    def make(name: str, **sections: dict[str, Any]) -> Config:
        base: dict[str, dict[str, Any]] = {
            "data": SHORT, "warmstart": IMITATE, "sampling": {"max_new_tokens": 12}, "explore": BRANCHING,
            "checkpoint": {"every": "none"},
        }  # fmt: skip
        run = {"name": name, **sections.pop("run", {})}
        merged = {key: {**base.get(key, {}), **sections.get(key, {})} for key in [*base, *sections]}
        if sections.get("model", {}).get("type") == "pretrained":
            merged["model"] = sections["model"]
        if sections.get("explore", {}).get("type") == "root":
            merged["explore"] = sections["explore"]
        if sections.get("warmstart") == {}:
            del merged["warmstart"]
        if "warmstart" not in sections:
            decides = {key: merged[key] for key in ("model", "data", "sampling", "learner", "eval") if key in merged}
            name = hashlib.sha1(json.dumps([decides, run.get("seed")]).encode()).hexdigest()
            if not (warm / name / "start").exists():
                train(recipe(run={**run, "dir": str(warm), "name": name, "steps": 0}, **merged))
            merged["warmstart"] = {"from": str(warm / name / "start")}
        return recipe(run=run, **merged)

    return make


@pytest.fixture
def stop_after(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Makes the next run receive SIGTERM in the middle of a step."""
    original = loop.train_step

    def arm(step: int) -> None:
        def train_step(run: Any, state: Any) -> Any:
            if state.step + 1 == step:
                signal.raise_signal(signal.SIGTERM)
            return original(run, state)

        monkeypatch.setattr(loop, "train_step", train_step)

    return arm


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A model directory in the Hugging Face layout; the model has seen a few solutions."""
    policy = scratch_policy(ScratchModel.model_validate(TINY), synthetic.tokenizer(), seed=3)
    data = SyntheticData.model_validate(SHORT)
    source = build_source(data, policy.tokenizer, seed=7, context=96)

    def examples(start: int, count: int) -> list[Example]:
        prompts, _ = source.take(Cursor(position=start), count)
        texts = [ChainTask(data).written_solution(prompt.question) for prompt in prompts]
        return [Example(p.tokens, (*policy.tokenizer(t).input_ids, 1)) for p, t in zip(prompts, texts, strict=True)]

    imitate(policy, WarmstartConfig(steps=60, batch_size=16, lr=1e-2), examples, tokens_per_pack=4096)
    path = tmp_path_factory.mktemp("pretrained")
    policy.save(path)
    return {"type": "pretrained", "path": str(path)}


def trace(run: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what a clock measured."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    timed = ("time/", "ledger/seconds_", "tokens_per_s")
    return [{key: value for key, value in line.items() if not key.startswith(timed)} for line in lines]


def checkpoint(run: Path) -> Path:
    """The newest one."""
    return max((run / "checkpoints").glob("step-*"))


def weights(run: Path) -> dict[str, torch.Tensor]:
    (file,) = (checkpoint(run) / "model").glob("*.safetensors")
    return load_file(file)


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Bit by bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def state_of(run: Path) -> dict[str, Any]:
    state: dict[str, Any] = json.loads((checkpoint(run) / "state.json").read_text())
    state.pop("crc32")
    state["ledger"] = {key: value for key, value in state["ledger"].items() if not key.startswith("seconds_")}
    return state


def assert_same_run(a: Path, b: Path) -> None:
    assert trace(a) == trace(b)
    assert same(weights(a), weights(b))
    assert same(*(load_file(checkpoint(run) / "optimizer.safetensors") for run in (a, b)))
    assert state_of(a) == state_of(b)


# ---------------------------------------------------------------- resume

FULL = {
    # 6 questions, 4 a step: an epoch ends in the middle of a step
    "data": {**SHORT, "size": 6}, "loss": {"beta": 0.01}, "credit": {"scale": "std", "whiten": True},
    "optim": {"lr": 1e-3, "minibatches": 2, "epochs": 2, "schedule": "cosine", "warmup_steps": 3},
    "eval": {"every": 2, "limit": 8, "samples": 1, "data": HELD_OUT},
}  # fmt: skip


def test_a_resumed_run_is_the_run_that_never_stopped(short: Any, stop_after: Any) -> None:
    """Stopped by SIGTERM after each of its steps: every metric, weight, moment and state is the same, bit by bit."""
    whole = train(short("whole", run={"steps": 5}, **FULL))
    lines = trace(whole)
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 4, 5]
    # the run asks something of all that a checkpoint holds
    assert lines[2]["recoverability/fitted"] == 1 and lines[1]["recoverability/w"] != lines[3]["recoverability/w"]
    assert lines[5]["recoverability/items"] == 20  # the window is full: the oldest were forgotten
    assert all(line["main/kl"] > 0 for line in lines[1:] if line["main/sequences"])
    assert state_of(whole)["cursor"]["epoch"] == 3 and len({line["lr"] for line in lines[1:]}) >= 4
    for k in range(1, 5):
        stop_after(k)
        config = short(f"stopped-{k}", run={"steps": 5}, **FULL)
        run = train(config)
        assert checkpoint(run).name == f"step-{k:06d}" and (run / "start").is_dir()
        stop_after(0)
        train(load_recipe(run / "config.toml"), resume=run)
        assert_same_run(whole, run)


@pytest.mark.parametrize(
    ("k", "sections"),
    [
        pytest.param(2, {"loss": {"beta": 0.01}, "warmstart": {}}, id="reference without a warm start"),
        pytest.param(1, {"explore": {"type": "root", "num_rollouts": 6}, "sampling": {"top_p": 0.8}}, id="root, top-p"),
        pytest.param(3, {"learner": {"dtype": "bfloat16"}, "data": {"size": 6}}, id="bfloat16"),
    ],
)
def test_a_longer_run_goes_on_where_a_shorter_one_ended(short: Any, k: int, sections: Any) -> None:
    """With a constant learning rate the length of the run changes nothing before its end."""
    whole = train(short("whole", run={"steps": 4}, **sections))
    run = train(short("shorter", run={"steps": k}, **sections))
    train(load_recipe(run / "config.toml", [("run.steps", "4")]), resume=run)
    assert_same_run(whole, run)


def test_adapters_are_resumed(short: Any, pretrained: Any, stop_after: Any) -> None:
    """LoRA on a pretrained model, with the KL to the model itself."""
    sections = {"model": {**pretrained, "lora": {"rank": 4}}, "loss": {"beta": 0.01}, "warmstart": {}}
    whole = train(short("whole", **sections))
    stop_after(2)
    run = train(short("stopped", **sections))
    stop_after(0)
    torch.manual_seed(99)  # nothing may come from torch's global stream
    train(load_recipe(run / "config.toml"), resume=run)
    assert_same_run(whole, run)
    assert (checkpoint(run) / "model" / "adapter_model.safetensors").exists()
    assert max(line.get("main/kl", 0) for line in trace(whole)) > 0


def test_steps_after_the_last_checkpoint_are_run_again(short: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A crash after step 3 of a run that saves every 2 steps: steps 3 and 4 stand in the metrics once."""
    whole = train(short("whole", run={"steps": 4}))
    config = short("crashed", run={"steps": 4}, checkpoint={"every": 2})
    with monkeypatch.context() as patch:
        original = loop.train_step

        def train_step(run: Any, state: Any) -> Any:
            if state.step == 3:
                raise SystemExit("the machine went down")
            return original(run, state)

        patch.setattr(loop, "train_step", train_step)
        with pytest.raises(SystemExit):
            train(config)
    run = Path(config.run.dir) / "crashed"
    assert [line["step"] for line in trace(run)] == [1, 2, 3]
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "main/rew')  # torn by the crash
    train(load_recipe(run / "config.toml"), resume=run)
    assert_same_run(whole, run)


def test_a_run_that_is_stopped_before_its_first_step_can_be_resumed(
    short: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGTERM behind the warm start, in the first evaluation: the warm start is not done again."""
    sections = {"loss": {"beta": 0.01}, "eval": {"every": 2, "limit": 8, "data": HELD_OUT}, "warmstart": IMITATE}
    whole = train(short("whole", **sections))
    with monkeypatch.context() as patch:
        original = loop.evaluate_run

        def evaluate(run: Any, state: Any) -> Any:
            signal.raise_signal(signal.SIGTERM)
            return original(run, state)

        patch.setattr(loop, "evaluate_run", evaluate)
        run = train(short("stopped", **sections))
    assert checkpoint(run).name == "step-000000" and [line["step"] for line in trace(run)] == [0]
    monkeypatch.setattr(loop, "warm_start", None)
    train(load_recipe(run / "config.toml"), resume=run)
    assert_same_run(whole, run)


@pytest.mark.parametrize("last", [False, True])
def test_a_warm_start_that_is_stopped_leaves_nothing_to_resume(
    short: Any, monkeypatch: pytest.MonkeyPatch, last: bool
) -> None:
    """SIGTERM in its 3rd of 40 steps ends it behind that step, and the same recipe starts anew; in the 40th it is done."""
    whole = train(short("whole", run={"steps": 1}, warmstart=IMITATE))
    config = short("stopped", run={"steps": 1}, warmstart=IMITATE)
    run = Path(config.run.dir) / "stopped"
    taken: list[int] = []
    with monkeypatch.context() as patch:
        original = warmstart.imitation_gradient

        def step(*arguments: Any) -> float:
            taken.append(1)
            if len(taken) == (40 if last else 3):
                signal.raise_signal(signal.SIGTERM)
            return original(*arguments)

        patch.setattr(warmstart, "imitation_gradient", step)
        if last:
            train(config)
            assert checkpoint(run).name == "step-000000"
            return
        with pytest.raises(KeyboardInterrupt):
            train(config)
    assert len(taken) == 3
    text = (run / "log.txt").read_text()
    assert "stopped after step 3 of the warm start, which was not finished: nothing was saved; start the run anew" in text
    assert "continue with" not in text
    assert not (run / "start").exists() and not (run / "checkpoints").exists()
    train(config)
    assert_same_run(whole, run)


def test_a_warm_start_measures_what_it_aims_at(short: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A check decodes one sampled answer per question and no greedy one; it is the evaluation's own figure."""
    greedy: list[bool] = []
    original = EmbeddedEngine.sample

    def sample(self: Any, requests: Any, params: Any, **kwargs: Any) -> Any:
        greedy.append(params.greedy)
        return original(self, requests, params, **kwargs)

    monkeypatch.setattr(EmbeddedEngine, "sample", sample)
    run = train(
        short(
            "run", run={"steps": 1}, warmstart={"check_every": 20, "target_accuracy": 1.0},
            eval={"every": 1, "limit": 16, "samples": 1, "data": HELD_OUT},
        )
    )  # fmt: skip
    assert greedy[:4] == [False, False, True, False]  # two checks, then the evaluation before the first step
    (told,) = re.findall(r"warm start 40/40 .* sampled accuracy (.*)%", (run / "log.txt").read_text())
    assert 0 < float(told) == 100 * trace(run)[0]["eval/sampled"]


# ---------------------------------------------------------------- the same numbers, or others


def main_metrics(run: Path) -> list[dict[str, Any]]:
    names = ("step", "grad_norm", "lr", "sampled_tokens")
    return [{k: v for k, v in line.items() if k.startswith("main/") or k in names} for line in trace(run)]


def test_deep_without_pivots_is_grpo(short: Any) -> None:
    deep = train(short("deep", explore={"num_pivots": 0, "num_rollouts": 6}))
    root = train(short("root", explore={"type": "root", "num_rollouts": 6}))
    assert main_metrics(deep) == main_metrics(root)
    assert same(weights(deep), weights(root))
    assert sum(line["main/sequences"] for line in trace(root)) > 10


def test_packed_or_not_the_trace_is_the_same(short: Any) -> None:
    """Up to rounding: fewer tokens are forwarded, and nothing else changes."""
    packed = trace(train(short("packed", learner={"tree_packing": "on"})))
    rows = trace(train(short("rows", learner={"tree_packing": "off"})))
    compared = 0
    for a, b in zip(packed, rows, strict=True):
        assert a["ledger/sampled_tokens"] == b["ledger/sampled_tokens"]
        for key in ("main/loss", "branch/loss", "main/entropy", "grad_norm"):
            if a.get(key) is not None:
                assert a[key] == pytest.approx(b[key], rel=1e-3, abs=1e-5)
                compared += 1
    assert compared > 5
    assert packed[-1]["ledger/learner_tokens"] < 0.8 * rows[-1]["ledger/learner_tokens"]
    assert packed[-1]["ledger/learner_tokens_unique"] == rows[-1]["ledger/learner_tokens_unique"]


def test_lambda_zero_is_the_update_of_grpo(short: Any) -> None:
    """The same main rollouts and, up to the rounding of other packs, the same weights; a lambda of 1 moves them apart.

    eps is large enough that AdamW does not turn the rounding of a gradient near zero into a whole step.
    """
    one = {"run": {"steps": 1}, "log": {"trees_every": 1}, "optim": {"lr": 1e-3, "eps": 1e-4}}
    root = train(short("root", explore={"type": "root", "num_rollouts": 4}, **one))
    zero = train(short("zero", loss={"lambda": 0.0}, **one))
    full = train(short("full", loss={"lambda": 1.0}, **one))

    def rollouts(run: Path) -> list[list[tuple[int, ...]]]:
        trees = load_trees(run / "trees" / "step-000001.jsonl.gz")
        return [[node.tokens for _, node in tree.stream("main")] for tree in trees]

    assert rollouts(root) == rollouts(zero)
    assert trace(zero)[0]["branch/terms"] > 10  # the branches are there, with a weight of zero
    assert trace(zero)[0]["grad_norm"] == pytest.approx(trace(root)[0]["grad_norm"], rel=1e-4)
    start, moved = load_file(root / "start" / "model.safetensors"), weights(root)
    length = sum(float((moved[n] - start[n]).norm()) for n in moved)

    def apart(run: Path) -> float:
        return sum(float((moved[n] - w).norm()) for n, w in weights(run).items()) / length

    assert apart(zero) < 1e-3 and apart(full) > 0.1


@pytest.mark.parametrize("lora", [False, True])
def test_the_seed_decides_everything(short: Any, pretrained: Any, lora: bool) -> None:
    model = {"model": {**pretrained, "lora": {"rank": 4}}, "warmstart": {}} if lora else {}
    first = train(short("first", **model))
    torch.manual_seed(99)
    again = train(short("again", **model))
    other = train(short("other", run={"seed": 1}, **model))
    assert_same_run(first, again)
    assert trace(first)[0] != trace(other)[0] and not same(weights(first), weights(other))


def test_the_size_of_the_engine_does_not_show_in_the_trees(short: Any) -> None:
    one = {"run": {"steps": 1}, "log": {"trees_every": 1}}
    small = train(short("small", engine={"max_rows": 3}, **one))
    large = train(short("large", engine={"max_rows": 64}, **one))
    few, many = (list(load_trees(run / "trees" / "step-000001.jsonl.gz")) for run in (small, large))
    assert [tree.pivots for tree in few] == [tree.pivots for tree in many]
    assert [[n.tokens for n in tree.nodes] for tree in few] == [[n.tokens for n in tree.nodes] for tree in many]
    assert sum(len(tree.pivots) for tree in few) > len(few)


# ---------------------------------------------------------------- what a run leaves behind


def test_a_checkpoint_is_a_model_that_transformers_loads(short: Any) -> None:
    """Greedy decoding by transformers gives the answers that the run itself wrote at its last evaluation."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run = train(short("run", eval={"every": 3, "limit": 6, "data": HELD_OUT}))
    model = AutoModelForCausalLM.from_pretrained(checkpoint(run) / "model")
    tokenizer = AutoTokenizer.from_pretrained(checkpoint(run) / "model")
    rows = [json.loads(line) for line in (run / "eval" / "step-000003.jsonl").read_text().splitlines()]
    prompts = build_source(SyntheticData.model_validate(HELD_OUT), tokenizer, seed=0, context=96).head(6)
    assert len({row["greedy_text"] for row in rows}) > 2
    for row, prompt in zip(rows, prompts, strict=True):
        ids = torch.tensor([prompt.tokens])
        output = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=12, pad_token_id=0
        )
        assert tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True) == row["greedy_text"]


def test_which_checkpoints_are_kept(short: Any) -> None:
    evaluated = {"every": 1, "limit": 32, "data": HELD_OUT}
    spoiling = {"lr": 0.03}  # so high that the policy gets worse
    config = short(
        "run", run={"steps": 6}, checkpoint={"every": 1, "keep_last": 2}, eval=evaluated, optim=spoiling
    )
    run = train(config)
    accuracy = {line["step"]: line["eval/greedy"] for line in trace(run) if line["step"]}
    best = max(accuracy, key=lambda step: (accuracy[step], -step))
    assert best < 5 and state_of(run)["best_step"] == best
    names = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert names == [f"step-{step:06d}" for step in (best, 5, 6)]
    assert not list(run.rglob(".tmp*")) and not list(run.rglob("*.tmp"))


def test_the_best_is_kept_also_between_the_regular_checkpoints(short: Any) -> None:
    evaluated = {"every": 1, "limit": 32, "data": HELD_OUT}
    sections = {"run": {"steps": 6}, "eval": evaluated, "optim": {"lr": 0.03}}
    run = train(short("best", checkpoint={"every": 5, "keep_last": 1}, **sections))
    best = state_of(run)["best_step"]
    assert best not in (None, 5, 6)
    assert [path.name for path in sorted((run / "checkpoints").iterdir())] == [f"step-{best:06d}", "step-000006"]
    run = train(short("last", checkpoint={"every": 5, "keep_last": 1, "keep_best": False}, **sections))
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-000006"]


def test_nothing_in_a_run_directory_is_pickled(short: Any) -> None:
    run = train(short("run", log={"trees_every": 1, "tensorboard": True}, loss={"beta": 0.01}))
    files = [path for path in run.rglob("*") if path.is_file()]
    assert len(files) > 10
    for path in files:
        head = path.read_bytes()[:4]
        # a pickle of protocol 2 or later, and the zip of torch.save
        assert not (head[:1] == b"\x80" and head[1:2] in b"\x02\x03\x04\x05"), path
        assert head != b"PK\x03\x04" and path.suffix not in (".pt", ".pth", ".bin", ".pkl"), path
    assert isinstance(state_of(run)["strategy"]["ratios"], list)
    assert list((run / "tensorboard").glob("events.out.tfevents.*"))


@pytest.mark.parametrize(("explore", "threshold"), [({"success_threshold": 0.5}, 0.5), ({"type": "root"}, 0.0)])
def test_pass_at_k_counts_what_the_strategy_calls_a_success(
    short: Any, monkeypatch: pytest.MonkeyPatch, explore: Any, threshold: float
) -> None:
    asked: list[float] = []
    original = evaluation.evaluate

    def evaluate(*arguments: Any, **kwargs: Any) -> Any:
        asked.append(kwargs["success_threshold"])
        return original(*arguments, **kwargs)

    monkeypatch.setattr(evaluation, "evaluate", evaluate)
    train(short("run", run={"steps": 1}, warmstart={}, explore=explore, eval={"every": 1, "limit": 2, "data": HELD_OUT}))
    assert asked == [threshold, threshold]


def test_the_memory_of_kept_rollouts_is_estimated(recipe: Any, policy: Any) -> None:
    """A token has 2 layers x (keys + values) x 2 heads x 16 = 128 numbers and 32 of the hidden state, 640 bytes.

    4 prompts x 4 rollouts x 20 tokens x 640 bytes = 204,800, if engine.keep_mb allows it.
    """

    def kept(**sections: Any) -> int:
        config = recipe(**sections)
        strategy = build_strategy(config.explore, Context(tokenizer=policy.tokenizer))
        estimate = estimate_memory(config, policy, strategy, slot_length=20)
        without = replace(estimate, prefixes=0)
        assert estimate.total - without.total == max(0, estimate.cache + estimate.prefixes - estimate.activations) - max(
            0, estimate.cache - estimate.activations
        )
        return estimate.prefixes

    small = {"tokens_per_pack": 1, "logprob_chunk": 1}
    assert kept(learner=small) == 204_800
    assert kept(learner=small, run={"prompts_per_step": 400}, engine={"keep_mb": 3}) == 3 * 2**20
    assert kept(learner=small, engine={"keep_mb": 0}) == 0
    assert kept(learner=small, explore={"type": "root"}) == 0
    assert kept(learner=small, explore={"num_pivots": 0}) == 0
    # segments are gone on from, although none of it is a branch: 4 prompts x 3 x 2 responses x 20 x 640
    segments = {"type": "spo_tree", "branching": [3, 2], "segment_tokens": 5}
    assert kept(learner=small, explore=segments) == 307_200
    assert kept(learner=small, explore={**segments, "branching": [6]}) == 0


def test_a_dry_run_asks_for_what_the_strategy_wants_to_know(recipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing_to_see(policy: Any, strategy: Any, critic: Any) -> None:
        raise ModelError(f"no {', '.join(signal.name for signal in strategy.signals)} here")

    monkeypatch.setattr("deepgrpo.train.inputs.check_signals", nothing_to_see)
    with pytest.raises(ModelError, match="no attention here"):
        dry_run(recipe(explore={"type": "attnrl"}), Console(file=io.StringIO()))


# ---------------------------------------------------------------- switches that a run must survive


def test_bfloat16_and_activation_checkpointing(short: Any) -> None:
    run = train(short("bf16", run={"steps": 2}, learner={"dtype": "bfloat16", "gradient_checkpointing": True}))
    lines = trace(run)
    assert len(lines) == 2 and all(line["grad_norm"] > 0 for line in lines)
    # the weights themselves stay float32, and the engine's log-probs are no longer the learner's own
    assert {tensor.dtype for tensor in weights(run).values()} == {torch.float32}
    assert 1e-6 < lines[0]["mismatch/max"] < 0.3 and lines[0]["mismatch/weight"] != 1.0


def test_activation_checkpointing_changes_nothing(short: Any) -> None:
    plain = train(short("plain", run={"steps": 2}))
    recomputed = train(short("recomputed", run={"steps": 2}, learner={"gradient_checkpointing": True}))
    for a, b in zip(trace(plain), trace(recomputed), strict=True):
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-5)
        assert a["main/reward"] == b["main/reward"] and a["main/entropy"] == pytest.approx(b["main/entropy"], rel=1e-5)


def test_a_nucleus_is_answered_with_importance_weights(short: Any) -> None:
    """With top_p < 1 the sampler's distribution is not the learner's."""
    run = train(short("nucleus", run={"steps": 1}, sampling={"top_p": 0.7}))
    (line,) = trace(run)
    assert line["mismatch/weight"] < 0.999 and line["mismatch/kl"] > 1e-3
    (line,) = trace(train(short("all", run={"steps": 1})))
    assert line["mismatch/weight"] == 1.0 and 0 <= line["mismatch/kl"] < 1e-6


def test_sampling_in_bfloat16_is_answered_with_importance_weights(short: Any) -> None:
    """The engine has its own weights, which follow the learner's; the mismatch stays what rounding explains."""
    run = train(short("rough", run={"steps": 3}, engine={"dtype": "bfloat16"}))
    for line in trace(run):
        assert 1e-4 < line["mismatch/max"] < 0.3 and line["mismatch/weight"] != 1.0
    assert {tensor.dtype for tensor in weights(run).values()} == {torch.float32}


def test_a_budget_of_tokens_ends_the_run_with_an_evaluation(short: Any) -> None:
    config = short(
        "budget", run={"steps": 50, "max_sampled_tokens": 600}, eval={"every": 40, "limit": 4, "data": HELD_OUT}
    )
    run = train(config)
    lines = trace(run)
    last = lines[-1]
    assert lines[-2]["ledger/sampled_tokens"] < 600 <= last["ledger/sampled_tokens"]
    assert last["step"] < 50 and "eval/greedy" in last and "eval/greedy" not in lines[-2]
    assert checkpoint(run).name == f"step-{last['step']:06d}"
    assert "continue with" not in (run / "log.txt").read_text()


# ---------------------------------------------------------------- dynamic sampling, penalty on length

DYNAMIC = {"data": {**SHORT, "size": 6}, "sampling": {"dynamic": True, "max_rounds": 3}, "log": {"trees_every": 1}}
"""6 questions, 4 a step and up to three rounds of them: some come twice in a step."""


def trees_of(run: Path, step: int) -> list[Any]:
    return list(load_trees(run / "trees" / f"step-{step:06d}.jsonl.gz"))


def test_dynamic_sampling_is_resumed(short: Any, stop_after: Any) -> None:
    """As if it had never stopped, bit by bit; and the prompts, the tokens and the reasons add up."""
    sections = {**DYNAMIC, "loss": {"beta": 0.01}, "optim": {"lr": 1e-3, "minibatches": 2}}
    whole = train(short("whole", run={"steps": 4}, **sections))
    lines = trace(whole)
    assert max(line["dynamic/rounds"] for line in lines) >= 2
    assert sum(line["dynamic/dropped_solved"] + line["dynamic/dropped_failed"] for line in lines) > 0
    taken, tokens, pivots = 0, 0, 0.0
    for line in lines:
        trees = trees_of(whole, line["step"])
        assert len(trees) == line["dynamic/prompts"] and line["dynamic/kept"] + line["dynamic/missing"] == 4
        dropped = sum(line[f"dynamic/dropped_{reason}"] for reason in ("solved", "failed", "other"))
        assert line["dynamic/kept"] + dropped == len(trees)
        taken += len(trees)
        tokens += sum(len(node.tokens) for tree in trees for node in tree.nodes)
        assert line["ledger/sampled_tokens"] == tokens
        pivots += line["pivots/count"]
        assert line["recoverability/items"] == min(20, pivots)  # those of dropped trees too
        # a question that came twice in a step has other rollouts
        rollouts = [(tree.prompt.id, tuple(node.tokens for node in tree.nodes)) for tree in trees]
        assert len(set(rollouts)) == len(rollouts)
    assert len({tree.prompt.id for line in lines for tree in trees_of(whole, line["step"])}) < taken
    cursor = state_of(whole)["cursor"]
    assert 6 * cursor["epoch"] + cursor["position"] == taken
    for k in (1, 3):
        stop_after(k)
        run = train(short(f"stopped-{k}", run={"steps": 4}, **sections))
        stop_after(0)
        train(load_recipe(run / "config.toml"), resume=run)
        assert_same_run(whole, run)


def test_one_round_of_dynamic_sampling_only_counts(short: Any) -> None:
    """Rows without an advantage leave the update anyway."""
    plain = train(short("plain"))
    one = train(short("one", sampling={"dynamic": True, "max_rounds": 1}))
    counted = [{key: value for key, value in line.items() if not key.startswith("dynamic/")} for line in trace(one)]
    kept = ("loss/dropped_zero_advantage",)  # the rows of a tree without any advantage are not counted again

    def without(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [{key: value for key, value in line.items() if key not in kept} for line in lines]

    assert without(counted) == without(trace(plain))
    assert same(weights(plain), weights(one))
    assert sum(line["dynamic/missing"] for line in trace(one)) > 0


def test_data_without_any_signal_ends_the_rounds(short: Any) -> None:
    """A model that has learned nothing: three rounds of four prompts, nothing to train on, and the run goes on."""
    sampling = {"dynamic": True, "max_rounds": 3}
    run = train(short("run", run={"steps": 2}, warmstart={}, sampling=sampling, explore={"type": "root"}))
    for line in trace(run):
        assert (line["dynamic/rounds"], line["dynamic/prompts"], line["dynamic/kept"]) == (3, 12, 0)
        assert line["dynamic/dropped_failed"] == 12 and line["grad_norm"] is None
    assert state_of(run)["cursor"]["position"] == 24


def test_long_responses_lose_reward_in_training_only(short: Any) -> None:
    """Limit 12, cache 6: what a node has lost is the distance of its reward from the answer's 0 or 1."""
    evaluated = {"every": 1, "limit": 8, "data": HELD_OUT}
    overlong = {"cache": 6, "penalty": 0.5}
    run = train(short("run", run={"steps": 2}, reward={"overlong": overlong}, log={"trees_every": 1}, eval=evaluated))
    lost: list[float] = []
    for tree in trees_of(run, 1):
        for index, node in enumerate(tree.nodes):
            length = len(tree.response(index))
            lost.append(0.5 * max(0, length - 6) / 6)
            assert node.reward + lost[-1] == pytest.approx(0.0, abs=1e-9) or node.reward + lost[-1] == pytest.approx(1.0)
    assert len(set(lost)) > 2 and max(lost) == 0.5
    start, first, _ = trace(run)
    assert -0.5 <= first["main/overlong"] < 0 and 0 <= first["main/reward"] - first["main/overlong"] <= 1
    rows = [json.loads(line) for line in (run / "eval" / "step-000001.jsonl").read_text().splitlines()]
    assert start["eval/greedy"] >= 0 and {row["greedy_reward"] for row in rows} <= {0.0, 1.0}
