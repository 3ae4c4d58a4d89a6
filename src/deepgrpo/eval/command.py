"""`deepgrpo eval`: load a model, evaluate it on each data set, print a table, write the figures.

    options ─► data sets resolved (files exist, names known) ─► model ─► all data read ─► evaluate each set ─► table, JSON, rows

Every error in the options is reported before the model is loaded, every error in the data before any sampling.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from deepgrpo.config import (
    ColumnMap,
    Config,
    DataConfig,
    GeneratedData,
    ReasoningGymData,
    RewardConfig,
    SamplingConfig,
    TemplateConfig,
    given_keywords,
    parse_section,
    template_of,
    with_template,
)
from deepgrpo.config.values import read_value
from deepgrpo.errors import ConfigError
from deepgrpo.eval.model import ModelSource, find_model, load_model
from deepgrpo.eval.options import EvalOptions
from deepgrpo.eval.output import print_table, write_json, write_rows
from deepgrpo.eval.suites import EvalSet, resolve
from deepgrpo.progress import Display, phase, showing
from deepgrpo.records import Prompt
from deepgrpo.terminal import Terminal

if TYPE_CHECKING:
    from deepgrpo.explore.episodes import Episodes
    from deepgrpo.model.policy import Policy

DEFAULT_MAX_NEW_TOKENS = 512
DEFAULT_LIMIT = 256
"""Number of questions from an endless data set (the synthetic task without a size)."""


def evaluate_model(options: EvalOptions, console: Console | None = None) -> int:
    """Run the command and return its exit code, 0.

    Raises:
        ConfigError: invalid options.
        DataError: a file is missing or unusable.
        ModelError: the model cannot be loaded.
    """
    console = console or Terminal()
    _check(options)
    source = find_model(options.model)
    sets = [_with_own_keys(options, one) for one in _resolve_sets(options, source)]
    with Display(Terminal(stderr=True)) as display, showing(display):
        results, rows = _evaluate_sets(options, source, sets, console)
    print_table(results, console)
    if options.json is not None:
        write_json(options.json, {"model": source.path, "options": asdict(options), "sets": results})
        console.print(f"figures: {options.json}", markup=False, soft_wrap=True)
    if options.rows is not None:
        write_rows(options.rows, rows)
        console.print(f"rows: {options.rows}", markup=False, soft_wrap=True)
    return 0


def _evaluate_sets(
    options: EvalOptions, source: ModelSource, sets: Sequence[EvalSet], console: Console
) -> tuple[dict[str, dict[str, Any]], list[dict[str, Any]]]:
    """Load the model and evaluate it; returns the figures of each set, and the rows of all."""
    from deepgrpo.engines.embedded.engine import EmbeddedEngine
    from deepgrpo.model.device import resolve_device, use_threads

    use_threads(None, options.threads)
    device = resolve_device(options.device, "--device")
    policy = load_model(source, device, options.dtype)
    threads = use_threads(policy.model, options.threads, "--threads")
    engine = EmbeddedEngine.for_evaluation(policy, options.max_rows)
    console.print(f"{source.path} on {device} · {threads}", markup=False, soft_wrap=True)

    # all data first: an error in the last set must not cost the figures of the others
    prepared = [_prepare(options, one, policy, console, source.run) for one in sets]
    results: dict[str, dict[str, Any]] = {}
    rows: list[dict[str, Any]] = []
    for one in prepared:
        try:
            results[one.name], new_rows = _evaluate_set(options, one, engine, policy, source.run)
        finally:
            if one.episodes is not None:
                one.episodes.close()
        rows += [{"set": one.name, **row} for row in new_rows]
    return results, rows


# ---------------------------------------------------------------- options


def check_ranges(options: Any, counts: Sequence[str], files: Sequence[str]) -> None:
    """Raise ConfigError for a count below 1, a top_p that is no probability, or a file in a directory that does not exist."""
    for name in counts:
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ConfigError(f"--{name.replace('_', '-')} is {value}; it should be 1 or more")
    if options.top_p is not None and not 0 < options.top_p <= 1:
        raise ConfigError(f"--top-p is {options.top_p}; it should be above 0 and at most 1")
    for name in files:
        value = getattr(options, name)
        if value is not None and not Path(value).expanduser().parent.is_dir():
            raise ConfigError(f"--{name} {value!r}: its directory does not exist; create it first")


def _check(options: EvalOptions) -> None:
    check_ranges(options, ("limit", "max_new_tokens", "max_rows", "threads"), ("json", "rows"))
    if options.samples < 0:
        raise ConfigError(f"--samples is {options.samples}; it should be 0 (greedy only) or more")
    for k in options.k:
        if not 1 <= k <= options.samples:
            raise ConfigError(
                f"--k {k} needs at least {max(k, 1)} samples, but --samples is {options.samples}; raise --samples "
                "or drop that k (k starts at 1)"
            )
    if options.temperature is not None and not 0 < options.temperature < math.inf:
        raise ConfigError(
            f"--temperature is {options.temperature}; it should be a number above 0 (the greedy response is always measured "
            "too)"
        )


def _resolve_sets(options: EvalOptions, source: ModelSource) -> list[EvalSet]:
    """The data sets of `--data`; without it, the evaluation data of the run."""
    run = source.run
    # the wording of a generated task does not carry over to a suite
    own_words = run is not None and not isinstance(run.data, GeneratedData | ReasoningGymData)
    if not options.data:
        if run is None:
            raise ConfigError("--data is missing; name a suite or a file, e.g. --data gsm8k=path/to/gsm8k_test.jsonl")
        data = run.eval.data or run.data
        if options.limit or (isinstance(data, GeneratedData) and data.limit is None and data.size is None):
            limit = options.limit or run.eval.limit
            # reasoning-gym generates `size` questions
            data = data.model_copy(update={"size" if isinstance(data, ReasoningGymData) else "limit": limit})
        return [EvalSet(data.type, data, run.eval.reward or run.reward)]
    template = None if options.template == "auto" else TemplateConfig(preset=options.template)
    sets = [
        resolve(
            spec,
            data_dir=options.data_dir,
            template=template or (template_of(run.data) if run is not None and own_words else None),
            answer_format=None if options.answer_format == "auto" else options.answer_format,
            limit=options.limit,
        )
        for spec in options.data
    ]
    names = [one.name for one in sets]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(f"--data names {twice[0]!r} twice; give one of them another name with NAME=PATH")
    own_reward = run is not None and own_words and "rewards" not in given_keywords(run)
    if run is not None and own_reward and options.template == options.answer_format == "auto":
        sets = [replace(one, reward=run.eval.reward or run.reward) for one in sets]
    return sets


def _with_own_keys(options: EvalOptions, one: EvalSet) -> EvalSet:
    """A data set with the columns and the variables of the chat template that the options name."""
    changes: dict[str, Any] = {}
    given = {f"columns.{key}": value for key, value in asdict(options.columns).items() if value != "auto"}
    if given:
        columns = getattr(one.data, "columns", None)
        if columns is None:
            raise ConfigError(f"--{next(iter(given))} is set, but data of type {one.data.type!r} have no columns; remove it")
        named = {key.removeprefix("columns."): value for key, value in given.items()}
        changes["columns"] = parse_section(ColumnMap, {**columns.model_dump(), **named}, "--columns")
    if options.chat_template_kwargs != "auto":
        raw = {
            **template_of(one.data).model_dump(),
            "chat_template_kwargs": read_value(options.chat_template_kwargs, [dict]),
        }
        given_template = parse_section(TemplateConfig, raw, "--chat-template-kwargs")
        one = replace(one, data=with_template(one.data, chat_template_kwargs=given_template.chat_template_kwargs))
    return replace(one, data=one.data.model_copy(update=changes))


def sampling_for(options: EvalOptions, run: Config | None, one: EvalSet, context: int) -> SamplingConfig:
    """Sampling section of a data set: options, else the run's section, else the suite's default; within `context`."""
    base = run.sampling if run else SamplingConfig(max_new_tokens=one.max_new_tokens or DEFAULT_MAX_NEW_TOKENS)
    changes = {
        "temperature": options.temperature,
        "top_p": options.top_p,
        "max_new_tokens": options.max_new_tokens,
        "max_total_tokens": min(base.max_total_tokens or context, context),
    }
    raw = base.model_dump() | {key: value for key, value in changes.items() if value is not None}
    return parse_section(SamplingConfig, raw, "the options")


# ---------------------------------------------------------------- work


@dataclass(frozen=True, slots=True)
class _Prepared:
    """A data set with its prompts, ready to be sampled."""

    name: str
    data: DataConfig
    reward: RewardConfig
    sampling: SamplingConfig
    prompts: Sequence[Prompt]
    skipped: Mapping[str, int]
    episodes: Episodes | None
    """With the environment of the run, if it has one."""


def _prepare(options: EvalOptions, one: EvalSet, policy: Policy, console: Console, run: Config | None) -> _Prepared:
    """Read a data set and say which rows are left out."""
    from deepgrpo.explore.environments import build_episodes, tools_of
    from deepgrpo.model.soundness import require_rows
    from deepgrpo.prompts.source import build_source

    sampling = sampling_for(options, run, one, policy.context)
    data = one.data
    if options.chat == "off" or (options.chat == "auto" and not getattr(policy.tokenizer, "chat_template", None)):
        data = with_template(data, chat=False)
    elif options.chat == "on":
        data = with_template(data, chat=True)
    # as in training, prompts longer than the run's limit are left out
    context = sampling.max_total_tokens or policy.context
    episodes = build_episodes(run.env if run is not None else None, data, policy)
    source = build_source(
        data, policy.tokenizer, seed=options.seed, context=context, shuffle=False, name=one.name, tools=tools_of(episodes)
    )
    prompts = source.head(source.size or options.limit or DEFAULT_LIMIT)
    require_rows(policy, lambda: prompts, f"the data set {one.name!r}")
    for reason, count in source.skipped.items():
        console.print(f"{one.name}: {count} rows left out ({reason})", markup=False, soft_wrap=True)
    return _Prepared(one.name, data, one.reward, sampling, prompts, source.skipped, episodes)


def _evaluate_set(
    options: EvalOptions, one: _Prepared, engine: Any, policy: Policy, run: Config | None
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    from deepgrpo.eval.evaluate import evaluate
    from deepgrpo.prompts.tasks import build_task
    from deepgrpo.rewards import build_reward

    reward = build_reward(one.reward, build_task(one.data) if one.reward.uses_task else None)
    try:
        with phase(one.name, len(one.prompts) * (1 + options.samples)) as advance:
            result = evaluate(
                engine,
                reward,
                one.prompts,
                policy.tokenizer,
                sampling=one.sampling,
                samples=options.samples,
                k=options.k,
                truncated_value=one.reward.truncated_value,
                seed=options.seed,
                success_threshold=run.explore.success_threshold if run is not None else 0.0,
                # several times max_rows, so that rows that end early rarely leave the engine idle
                chunk=4 * options.max_rows,
                progress=advance,
                episodes=one.episodes,
            )
    finally:
        reward.close()
    stats = result.stats
    summary = {
        "metrics": dict(result.metrics),
        "skipped": dict(one.skipped),
        "tokens_per_s": stats.sampled_tokens / stats.seconds if stats.seconds else None,
        "stats": asdict(stats),
        "data": one.data.model_dump(mode="json"),
        "reward": one.reward.model_dump(mode="json"),
        "sampling": one.sampling.model_dump(mode="json"),
    }
    return summary, [row.as_dict() for row in result.rows]
