"""Setting of a probe: a recipe, a checkpoint of a run, or a model with data, as one recipe and the place of its weights.

Invalid options are reported before a model is loaded. Models, data and templates are named as in `deepgrpo eval`
(eval/command.py, eval/suites.py).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from deepgrpo.config import (
    Config,
    ReasoningGymData,
    SyntheticData,
    TemplateConfig,
    load_recipe,
    parse_config,
    shipped,
    template_of,
    with_template,
)
from deepgrpo.errors import CheckpointError, ConfigError, MissingExtraError, ModelError
from deepgrpo.eval.command import DEFAULT_MAX_NEW_TOKENS, check_ranges
from deepgrpo.eval.model import find_model, model_section
from deepgrpo.eval.suites import EvalSet, resolve
from deepgrpo.lab.options import ProbeOptions
from deepgrpo.runs.checkpoints import Checkpoint, saved_checkpoints
from deepgrpo.runs.layout import START, RunDir, run_around, shown, step_of
from deepgrpo.runs.moved import load_run_recipe

FEWEST = 8
"""Prompts below which no interval means anything."""


@dataclass(frozen=True)
class Setting:
    """Recipe and weights of a probe. Example: Setting("demo", Config(...)) for a recipe."""

    name: str
    """For the headline."""
    config: Config
    run: RunDir | None = None
    """The run that the weights come from."""
    step: int | None = None
    """A checkpoint of the run; None: the newest one."""
    from_start: bool = False
    """The weights are the start model of the run."""
    chat: Literal["auto", "on", "off"] | None = None
    """--chat for questions named by --data, which is settled when the tokenizer is known; None: as `config` says."""


def resolve_setting(options: ProbeOptions, overrides: Sequence[tuple[str, str]]) -> Setting:
    """Resolve the options.

    Raises ConfigError (impossible or unknown options), DataError (a file is missing), ModelError (a run without weights),
    CheckpointError (no such checkpoint), MissingExtraError (a plot without matplotlib).
    """
    _check(options)
    found = _find(options, overrides)
    config = found.config
    sampling: dict[str, Any] = {
        "temperature": options.temperature, "top_p": options.top_p, "max_new_tokens": options.max_new_tokens
    }  # fmt: skip
    changes = {"sampling": {key: value for key, value in sampling.items() if value is not None}}
    changes["learner"] = {} if options.dtype == "auto" else {"dtype": options.dtype}
    changes["engine"] = {"max_rows": options.max_rows} if options.max_rows else {}
    changes["run"] = {"device": options.device} if options.device != "auto" else {}
    changes["run"] |= {"threads": options.threads} if options.threads else {}
    config = config.model_copy(
        update={name: getattr(config, name).model_copy(update=values) for name, values in changes.items() if values}
    )
    # one process measures
    return replace(found, config=config.model_copy(update={"cluster": None}))


def checkpoint_of(setting: Setting) -> Checkpoint | None:
    """The checkpoint whose weights are probed; None: weights of the start.

    Raises CheckpointError if the run has no checkpoint of the step, ModelError if it has no weights at all.
    """
    if setting.run is None or setting.from_start:
        return None
    saved, at = saved_checkpoints(setting.run), shown(setting.run.path)
    if setting.step is not None:
        chosen = next((each for each in saved if each.step == setting.step), None)
        if chosen is None:
            has = ", ".join(str(each.step) for each in saved) or "none"
            raise CheckpointError(f"--step {setting.step}: {at} has no checkpoint of that step; it has {has}")
        return chosen
    if saved:
        return saved[-1]
    if setting.run.start.is_dir():
        return None
    raise ModelError(
        f"the run {str(at)!r} has neither a checkpoint (checkpoints/step-*/model) nor a start model; wait for its first one, "
        "or probe its recipe"
    )


# ---------------------------------------------------------------- checks


def _check(options: ProbeOptions) -> None:
    counts = ("limit", "max_new_tokens", "max_rows", "threads")
    check_ranges(options, counts, ("json", "plot"))
    if options.prompts < FEWEST:
        raise ConfigError(f"--prompts is {options.prompts}, but fewer than {FEWEST} prove nothing; 40 is the default")
    if options.reference is not None and options.reference < options.prompts:
        raise ConfigError(
            f"--reference is {options.reference}, but the prompts of the strategies, --prompts {options.prompts}, are part of "
            "it; set it to more than that, or leave it out"
        )
    if options.projection < 0:
        raise ConfigError(f"--projection is {options.projection}; it should be 1 or more, or 0 to keep whole gradients")
    if options.rollouts is not None and options.rollouts < 2:
        raise ConfigError(f"--rollouts is {options.rollouts}, but a group of one has no baseline; set it to 2 or more")
    if options.temperature is not None and not options.temperature > 0:
        raise ConfigError(f"--temperature is {options.temperature}; rollouts are sampled, so it should be above 0")
    if options.plot is not None and importlib.util.find_spec("matplotlib") is None:
        raise MissingExtraError("matplotlib", "plots", f"--plot {options.plot}")


# ---------------------------------------------------------------- model and recipe


def _find(options: ProbeOptions, overrides: Sequence[tuple[str, str]]) -> Setting:
    path = Path(options.model).expanduser()
    run, step, from_start = RunDir(path), options.step, False
    if path.name == START and RunDir(path.parent).has_recipe():
        run, from_start = RunDir(path.parent), True
    elif (around := run_around(path)) is not None:
        run, inside = around, path if step_of(path.name) is not None else path.parent
        step = step_of(inside.name)
    if run.has_recipe():
        setting = Setting(str(options.model), load_run_recipe(run, overrides), run, step, from_start)
        checkpoint_of(setting)  # refuses a run without weights
        return _on_data(options, setting)
    if step is not None:
        raise ConfigError(f"--step is {step}; it names a checkpoint of a run, but MODEL {options.model!r} is no run directory")
    if not path.is_dir() and (path.suffix == ".toml" or options.model in [name for name, _ in shipped.list_recipes()]):
        config = load_recipe(shipped.find_recipe(options.model), overrides)
        if config.warmstart is not None and config.warmstart.from_ is None:
            raise ConfigError(
                f"the recipe {options.model!r} begins with a warm start, which a probe does not train; run the warm start "
                f"alone with `deepgrpo train {options.model} --run.steps 0`, then probe its result: "
                f"deepgrpo probe {RunDir.of(config.run).start}"
            )
        return _on_data(options, Setting(options.model, config))
    section = model_section(find_model(options.model))
    if overrides:
        raise ConfigError(
            f"--{overrides[0][0]} is a key of a recipe, but MODEL {options.model!r} is neither a recipe nor a run directory; "
            "use the options of `deepgrpo probe --help`"
        )
    if options.data is None:
        raise ConfigError("--data is missing; name a suite or a file, e.g. --data gsm8k=path/to/gsm8k_train.jsonl")
    one = _eval_set(options, None)
    config = parse_config(
        {
            "model": section.model_dump(mode="json"), "data": one.data.model_dump(mode="json"),
            "reward": one.reward.model_dump(mode="json"), "loss": {"beta": 0.0},
            "sampling": {"max_new_tokens": one.max_new_tokens or DEFAULT_MAX_NEW_TOKENS},
        },
        source=options.model,
    )  # fmt: skip
    return Setting(options.model, config, chat=options.chat)


# ---------------------------------------------------------------- data and reward


def _on_data(options: ProbeOptions, setting: Setting) -> Setting:
    """The setting with the data of the options; without `--data` those of training."""
    config = setting.config
    if options.data is not None:
        one = _eval_set(options, config)
        return replace(
            setting, config=config.model_copy(update={"data": one.data, "reward": one.reward}), chat=options.chat
        )
    changes: dict[str, Any] = {}
    if options.limit:
        # the length of a reasoning-gym task is its size
        changes["size" if isinstance(config.data, ReasoningGymData) else "limit"] = options.limit
    data = config.data.model_copy(update=changes)
    if options.chat != "auto":
        data = with_template(data, chat=options.chat == "on")
    return replace(setting, config=config.model_copy(update={"data": data}))


def _eval_set(options: ProbeOptions, config: Config | None) -> EvalSet:
    """Data and reward named by `--data`."""
    assert options.data is not None
    # the template of a generated task does not apply to a suite
    own_words = config is not None and not isinstance(config.data, SyntheticData | ReasoningGymData)
    template = None if options.template == "auto" else TemplateConfig(preset=options.template)
    if template is None and config is not None and own_words:
        template = template_of(config.data)
    one = resolve(
        options.data, data_dir=options.data_dir, template=template,
        answer_format=None if options.answer_format == "auto" else options.answer_format, limit=options.limit,
    )  # fmt: skip
    if config is not None and own_words and options.template == options.answer_format == "auto":
        one = replace(one, reward=config.reward)
    return one
