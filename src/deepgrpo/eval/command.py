"""`deepgrpo eval`: load a model, evaluate it on every data set asked for, print a table, write the figures.

    options ─► sets resolved (files exist, names known) ─► model loaded ─► evaluate, set by set ─► table, JSON, rows

Whatever can be wrong with the options is found before the model is loaded.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from deepgrpo.config import (
    Config,
    PretrainedModel,
    ReasoningGymData,
    SamplingConfig,
    SyntheticData,
    TaskReward,
    TemplateConfig,
    load_recipe,
)
from deepgrpo.errors import ConfigError, DataError, ModelError
from deepgrpo.eval.options import EvalOptions
from deepgrpo.eval.suites import EvalSet, resolve

if TYPE_CHECKING:
    from deepgrpo.model.policy import Policy

DEFAULT_MAX_NEW_TOKENS = 512
DEFAULT_LIMIT = 256
"""Questions of a set that never ends (the synthetic task without a size)."""


@dataclass(frozen=True, slots=True)
class ModelSource:
    """Where the model is, and the recipe of its run if it has one.

    Example: ModelSource(path="runs/a/checkpoints/step-000050/model", run=Config(...)).
    """

    path: str
    run: Config | None = None


def evaluate_model(options: EvalOptions, console: Console | None = None) -> int:
    """Run the command. Returns the exit code 0.

    Raises:
        ConfigError: impossible or unknown options.
        DataError: a file is missing or cannot be used.
        ModelError: the model cannot be loaded.
    """
    console = console or Console(highlight=False)
    _check(options)
    source = find_model(options.model)
    sets = _resolve_sets(options, source)

    import torch

    from deepgrpo.engines.embedded.engine import EmbeddedEngine
    from deepgrpo.model.device import resolve_device

    if options.threads:
        torch.set_num_threads(options.threads)
    device = resolve_device(options.device, "--device")
    policy = load_model(source, device, options.dtype)
    engine = EmbeddedEngine(policy, max_rows=options.max_rows)
    console.print(f"{source.path} on {device}", markup=False, soft_wrap=True)

    results: dict[str, dict[str, Any]] = {}
    rows: list[dict[str, Any]] = []
    for one in sets:
        sampling = _sampling(options, source.run, one, policy.context)
        results[one.name], new_rows = _evaluate_set(options, one, sampling, engine, policy, console, source.run)
        rows += [{"set": one.name, **row} for row in new_rows]
    _show_table(_table(results), console)
    _write_files(options, source, results, rows, console)
    return 0


def find_model(model: str) -> ModelSource:
    """The model directory behind a run directory, a checkpoint directory, or any other model name as it stands.

    A run directory has a config.toml and checkpoints/step-*/model; the newest checkpoint counts. In a run, or in one of
    its checkpoints, the run's recipe comes along.

    Raises ModelError if a run has no checkpoint.
    """
    path = Path(model).expanduser()
    if (path / "config.toml").is_file():
        found = [p for p in (path / "checkpoints").glob("step-*/model") if re.fullmatch(r"step-\d+", p.parent.name)]
        if not found:
            raise ModelError(
                f"the run {model!r} has no checkpoint yet (checkpoints/step-*/model); wait for its first one, "
                "or name a model directory"
            )
        newest = max(found, key=lambda p: int(p.parent.name.removeprefix("step-")))
        return ModelSource(str(newest), load_recipe(path / "config.toml"))
    directory = path / "model" if (path / "model").is_dir() else path
    for above in (path.parent.parent, path.parent.parent.parent):
        if path.is_dir() and "checkpoints" in path.parts and (above / "config.toml").is_file():
            return ModelSource(str(directory), load_recipe(above / "config.toml"))
    if path.is_dir():
        return ModelSource(str(directory))
    if model.startswith(("/", "./", "../", "~")):
        raise ModelError(f"the model directory {model!r} does not exist; check the path")
    return ModelSource(model)


# ---------------------------------------------------------------- options


def _check(options: EvalOptions) -> None:
    for name in ("limit", "max_new_tokens", "max_rows", "threads"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ConfigError(f"--{name.replace('_', '-')} is {value}; it should be 1 or more")
    if options.samples < 0:
        raise ConfigError(f"--samples is {options.samples}; it should be 0 (greedy only) or more")
    for k in options.k:
        if not 1 <= k <= options.samples:
            raise ConfigError(
                f"--k {k} needs at least {max(k, 1)} samples, but --samples is {options.samples}; raise --samples "
                "or drop that k (k starts at 1)"
            )
    if options.temperature is not None and options.temperature <= 0:
        raise ConfigError(
            f"--temperature is {options.temperature}; it should be above 0 (the greedy response is always measured too)"
        )
    if options.top_p is not None and not 0 < options.top_p <= 1:
        raise ConfigError(f"--top-p is {options.top_p}; it should be above 0 and at most 1")
    for name in ("json", "rows"):
        value = getattr(options, name)
        if value is not None and not Path(value).expanduser().parent.is_dir():
            raise ConfigError(f"--{name} {value!r}: its directory does not exist; make it first")


def _resolve_sets(options: EvalOptions, source: ModelSource) -> list[EvalSet]:
    run = source.run
    # a task's own questions have their own wording: it says nothing about how a suite should be asked
    own_words = run is not None and not isinstance(run.data, SyntheticData | ReasoningGymData)
    if not options.data:
        if run is None:
            raise ConfigError("--data is missing; name a suite or a file, e.g. --data gsm8k=path/to/gsm8k_test.jsonl")
        data = run.eval.data or run.data
        if options.limit or (isinstance(data, SyntheticData) and data.limit is None and data.size is None):
            limit = options.limit or run.eval.limit
            # a task of reasoning-gym is as long as its size says
            data = data.model_copy(update={"size" if isinstance(data, ReasoningGymData) else "limit": limit})
        return [EvalSet(data.type, data, run.eval.reward or run.reward)]
    template = None if options.template == "auto" else TemplateConfig(preset=options.template)
    sets = [
        resolve(
            spec,
            data_dir=options.data_dir,
            template=template or (run.data.template if run is not None and own_words else None),
            answer_format=None if options.answer_format == "auto" else options.answer_format,
            limit=options.limit,
        )
        for spec in options.data
    ]
    names = [one.name for one in sets]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(f"--data names {twice[0]!r} twice; give one of them another name with NAME=PATH")
    if run is not None and own_words and options.template == options.answer_format == "auto":
        sets = [replace(one, reward=run.eval.reward or run.reward) for one in sets]
    return sets


def _sampling(options: EvalOptions, run: Config | None, one: EvalSet, context: int) -> SamplingConfig:
    base = run.sampling if run else SamplingConfig(max_new_tokens=one.max_new_tokens or DEFAULT_MAX_NEW_TOKENS)
    changes = {
        "temperature": options.temperature,
        "top_p": options.top_p,
        "max_new_tokens": options.max_new_tokens,
        "max_total_tokens": min(base.max_total_tokens or context, context),
    }
    return base.model_copy(update={key: value for key, value in changes.items() if value is not None})


# ---------------------------------------------------------------- work


def model_section(source: ModelSource) -> PretrainedModel:
    """How to load the model: a run's own settings (code it may run, attention, ...) with a checkpoint's weights.

    Adapters keep the run's section whole, as their base model is loaded first.

    Raises ModelError if there are adapters without the run that names their base model.
    """
    path = Path(source.path)
    own = source.run.model if source.run is not None and isinstance(source.run.model, PretrainedModel) else None
    if _holds_adapters(path):
        if own is None:
            raise ModelError(
                f"{source.path!r} holds adapters (LoRA) without the run that they come from, whose config.toml names their "
                "base model; name the run's directory or a checkpoint in it (runs/NAME or runs/NAME/checkpoints/step-...)"
            )
        return own
    # a checkpoint holds plain weights and its own tokenizer
    plain = {"path": source.path, "gguf_file": None, "tokenizer": None, "lora": None}
    return PretrainedModel(path=source.path) if own is None else own.model_copy(update=plain)


def load_model(source: ModelSource, device: str, dtype: str) -> Policy:
    """Load what `find_model` found; dtype "auto" is that of the run, else float32."""
    from deepgrpo.model.loading import load_policy

    if dtype == "auto":
        dtype = source.run.learner.dtype if source.run is not None else "float32"
    policy = load_policy(model_section(source), device=device, dtype=dtype)
    if _holds_adapters(Path(source.path)):
        policy.load_weights(Path(source.path))
    return policy


def _holds_adapters(path: Path) -> bool:
    return (path / "adapter_config.json").is_file() and not (path / "config.json").is_file()


def _evaluate_set(
    options: EvalOptions,
    one: EvalSet,
    sampling: SamplingConfig,
    engine: Any,
    policy: Policy,
    console: Console,
    run: Config | None,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    from deepgrpo.eval.evaluate import evaluate
    from deepgrpo.prompts.source import build_source
    from deepgrpo.prompts.tasks import build_task
    from deepgrpo.rewards.base import build_reward

    data = one.data
    if options.chat == "off" or (options.chat == "auto" and not getattr(policy.tokenizer, "chat_template", None)):
        data = data.model_copy(update={"template": data.template.model_copy(update={"chat": False})})
    elif options.chat == "on":
        data = data.model_copy(update={"template": data.template.model_copy(update={"chat": True})})
    # as in training, a prompt that fills the run's own limit is left out
    context = sampling.max_total_tokens or policy.context
    source = build_source(data, policy.tokenizer, seed=options.seed, context=context, shuffle=False)
    prompts = source.head(source.size or options.limit or DEFAULT_LIMIT)
    for reason, count in source.skipped.items():
        console.print(f"{one.name}: {count} rows left out ({reason})", markup=False, soft_wrap=True)
    reward = build_reward(one.reward, build_task(data) if isinstance(one.reward, TaskReward) else None)
    try:
        with _progress(one.name, len(prompts) * (1 + options.samples)) as advance:
            result = evaluate(
                engine,
                reward,
                prompts,
                policy.tokenizer,
                sampling=sampling,
                samples=options.samples,
                k=options.k,
                truncated_value=one.reward.truncated_value,
                seed=options.seed,
                success_threshold=run.explore.success_threshold if run is not None else 0.0,
                # large enough that the rows that end early rarely leave the engine idle
                chunk=4 * options.max_rows,
                progress=advance,
            )
    finally:
        reward.close()
    stats = result.stats
    summary = {
        "metrics": dict(result.metrics),
        "skipped": dict(source.skipped),
        "tokens_per_s": stats.sampled_tokens / stats.seconds if stats.seconds else None,
        "stats": asdict(stats),
        "data": data.model_dump(mode="json"),
        "reward": one.reward.model_dump(mode="json"),
        "sampling": sampling.model_dump(mode="json"),
    }
    return summary, [row.as_dict() for row in result.rows]


@contextmanager
def _progress(name: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal's standard error; elsewhere a plain line at every tenth of the work."""
    console = Console(stderr=True, highlight=False)
    if console.is_terminal:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console, transient=True, speed_estimate_period=3600.0) as bar:
            task = bar.add_task(name, total=total)
            yield lambda count: bar.advance(task, count)
        return
    done = shown = 0

    def advance(count: int) -> None:
        nonlocal done, shown
        done += count
        if done * 10 // total > shown:
            shown = done * 10 // total
            console.print(f"{name}: {done}/{total} responses", markup=False, soft_wrap=True)

    yield advance


# ---------------------------------------------------------------- results


def _table(results: Mapping[str, Mapping[str, Any]]) -> Table:
    """A column per set, a row per figure: accuracies in percent, `±` one standard error over the questions."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("", no_wrap=True)
    for name in results:
        table.add_column(name, justify="right", no_wrap=True)
    all_metrics = [result["metrics"] for result in results.values()]
    for label, name, form in _FIGURES:
        if name in all_metrics[0]:
            table.add_row(label, *(form(metrics[name]) for metrics in all_metrics))
        if name == "eval/sampled_unparsed":
            for each in sorted(
                (n for n in all_metrics[0] if "@" in n), key=lambda n: ("maj" in n, int(n.split("@")[1]))
            ):
                table.add_row(each.removeprefix("eval/"), *(_percent(metrics[each]) for metrics in all_metrics))
    table.add_row("tokens/s", *(f"{result['tokens_per_s'] or 0:.0f}" for result in results.values()))
    return table


def _percent(x: float) -> str:
    return f"{100 * x:.1f}"


def _whole(x: float) -> str:
    return f"{x:.0f}"


_FIGURES: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("questions", "eval/prompts", _whole),
    ("greedy %", "eval/greedy", _percent),
    ("  ±", "eval/greedy_se", _percent),
    ("  tokens", "eval/length", _whole),
    ("  truncated %", "eval/truncated", _percent),
    ("  unparsed %", "eval/unparsed", _percent),
    ("sampled %", "eval/sampled", _percent),
    ("  ±", "eval/sampled_se", _percent),
    ("  tokens", "eval/sampled_length", _whole),
    ("  truncated %", "eval/sampled_truncated", _percent),
    ("  unparsed %", "eval/sampled_unparsed", _percent),
    ("failed checks", "eval/problems", _whole),
)


def _show_table(table: Table, console: Console) -> None:
    if not console.is_terminal:
        # a file has no right edge: rich would otherwise cut the figures off at 80 columns
        console.width = max(console.width, console.measure(table, options=console.options.update(width=10_000)).maximum)
    console.print(table)


def _write_files(
    options: EvalOptions,
    source: ModelSource,
    results: Mapping[str, Any],
    rows: list[dict[str, Any]],
    console: Console,
) -> None:
    try:
        if options.json is not None:
            whole = {"model": source.path, "options": asdict(options), "sets": results}
            text = json.dumps(whole, indent=2, ensure_ascii=False, allow_nan=False)
            Path(options.json).expanduser().write_text(text + "\n", encoding="utf-8")
            console.print(f"figures: {options.json}", markup=False, soft_wrap=True)
        if options.rows is not None:
            lines = [json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows]
            Path(options.rows).expanduser().write_text("".join(lines), encoding="utf-8")
            console.print(f"rows: {options.rows}", markup=False, soft_wrap=True)
    except OSError as error:
        raise DataError(f"the results cannot be written: {error}; name another place with --json and --rows") from error
