"""The setting of a probe: model, data, reward, sampling and segments, from a recipe, a run, or the options alone.

Invalid options are reported before a model is loaded. Models, data and templates are named as in `deepgrpo eval`
(eval/command.py, eval/suites.py).
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deepgrpo.config import (
    Config,
    DataConfig,
    DeepExplore,
    EmbeddedEngineConfig,
    EngineConfig,
    ReasoningGymData,
    RewardConfig,
    SamplingConfig,
    SegmentConfig,
    SyntheticData,
    TemplateConfig,
    load_recipe,
    shipped,
    template_of,
    with_template,
)
from deepgrpo.errors import ConfigError, MissingExtraError, ModelError
from deepgrpo.eval.command import DEFAULT_MAX_NEW_TOKENS, check_ranges
from deepgrpo.eval.model import ModelSource, find_model, load_model
from deepgrpo.eval.suites import EvalSet, resolve
from deepgrpo.lab.options import ProbeOptions
from deepgrpo.lab.probe.sampling import MIN_FAILED
from deepgrpo.runs.checkpoints import newest_checkpoint
from deepgrpo.runs.layout import START, RunDir
from deepgrpo.runs.weights import check_weights

if TYPE_CHECKING:
    from deepgrpo.model.policy import Policy
    from deepgrpo.threads import Threads

DEFAULT_SEGMENTS = 10
"""Default of --segment-size with `--segments count`."""


@dataclass(frozen=True, slots=True)
class ProbeSetting:
    """The resolved setting.

    Example: ProbeSetting(name="gsm8k", data=JsonlData(...), reward=MathReward(...), explore=DeepExplore(...), ...).
    """

    name: str
    """Name of the data."""
    data: DataConfig
    reward: RewardConfig
    sampling: SamplingConfig
    engine: EngineConfig
    explore: DeepExplore
    """Segments, K, threshold and fit of DEEP-GRPO; from the recipe of another strategy, the keys they share."""
    gammas: tuple[float, ...]
    """Ascending."""
    source: ModelSource | None
    """Location of the weights; None: the model that the recipe starts from."""
    config: Config | None
    """The recipe, or the recipe of the run."""

    @property
    def model(self) -> str:
        """Short name of the model for the headline."""
        if self.source is not None:
            return self.source.path
        assert self.config is not None
        return str(getattr(self.config.model, "path", "a model from scratch"))


def resolve_setting(options: ProbeOptions, overrides: Sequence[tuple[str, str]]) -> ProbeSetting:
    """Resolve the options.

    Raises ConfigError (impossible or unknown options), DataError (a file is missing), ModelError (a run without weights),
    MissingExtraError (a plot without matplotlib).
    """
    _check(options)
    config, source = _find(options.model, overrides)
    one = _data(options, config)
    sampling = config.sampling if config else SamplingConfig(max_new_tokens=one.max_new_tokens or DEFAULT_MAX_NEW_TOKENS)
    wanted: dict[str, Any] = {
        "temperature": options.temperature, "top_p": options.top_p, "max_new_tokens": options.max_new_tokens
    }  # fmt: skip
    sampling = sampling.model_copy(update={key: value for key, value in wanted.items() if value is not None})
    explore = _explore(options, config)
    gammas = {*options.gammas, *({explore.gamma} if config and isinstance(config.explore, DeepExplore) else ())}
    engine = config.engine if config else EmbeddedEngineConfig()
    if options.max_rows:
        engine = engine.model_copy(update={"max_rows": options.max_rows})
    return ProbeSetting(one.name, one.data, one.reward, sampling, engine, explore, tuple(sorted(gammas)), source, config)


def open_policy(setting: ProbeSetting, options: ProbeOptions) -> tuple[Policy, Threads]:
    """The model on its device, and the number of threads.

    Raises ConfigError (an unknown device), ModelError, MissingExtraError.
    """
    import torch

    from deepgrpo.model.device import resolve_device, use_threads
    from deepgrpo.train.build import build_policy
    from deepgrpo.train.warmstart import load_from

    config = setting.config
    wanted, key = options.threads or (config.run.threads if config else None), "--threads" if options.threads else "run.threads"
    use_threads(None, wanted)
    if setting.source is not None:
        policy = load_model(setting.source, resolve_device(options.device, "--device"), options.dtype)
        return policy, use_threads(policy.model, wanted, key)
    assert config is not None
    # nothing is trained, so the packing check is skipped
    learner: dict[str, Any] = {"tree_packing": "off"}
    if options.dtype != "auto":
        learner["dtype"] = options.dtype
    run = {} if options.device == "auto" else {"device": resolve_device(options.device, "--device")}
    torch.manual_seed(config.run.seed)  # new adapters draw from the global stream
    policy = build_policy(
        config.model_copy(
            update={"learner": config.learner.model_copy(update=learner), "run": config.run.model_copy(update=run)}
        )
    )
    if config.warmstart is not None and config.warmstart.from_ is not None:
        load_from(policy, Path(config.warmstart.from_))
    return policy, use_threads(policy.model, wanted, key)


# ---------------------------------------------------------------- checks


def _check(options: ProbeOptions) -> None:
    counts = ("limit", "max_new_tokens", "max_rows", "threads", "depths", "segment_size", "max_sampled_tokens")
    check_ranges(options, counts, ("json", "plot"))
    if options.rollouts < MIN_FAILED:
        raise ConfigError(f"--rollouts is {options.rollouts}, but fewer than {MIN_FAILED} prove nothing; 64 is the default")
    if options.branches is not None and options.branches < 2:
        raise ConfigError(f"--branches is {options.branches}, but a group of one is never mixed; set it to 2 or more")
    if options.temperature is not None and not options.temperature > 0:
        raise ConfigError(f"--temperature is {options.temperature}; rollouts are sampled, so it should be above 0")
    if not options.gammas or not all(math.isfinite(gamma) for gamma in options.gammas):
        raise ConfigError(f"--gammas is {options.gammas}; name at least one finite number, e.g. --gammas 0 1 2")
    if options.segment_size is not None and options.segments not in ("tokens", "count"):
        raise ConfigError(
            f"--segment-size is {options.segment_size}, but --segments is {options.segments!r}, which has no size; add "
            "--segments tokens or --segments count"
        )
    if options.plot is not None and importlib.util.find_spec("matplotlib") is None:
        raise MissingExtraError("matplotlib", "plots", f"--plot {options.plot}")


# ---------------------------------------------------------------- model


def _find(model: str, overrides: Sequence[tuple[str, str]]) -> tuple[Config | None, ModelSource | None]:
    """The recipe, if any, and the weights; None for the weights: those that the recipe names."""
    path = Path(model).expanduser()
    run = RunDir(path.parent if path.name == START and RunDir(path.parent).has_recipe() else path)
    if run.has_recipe():
        config = load_recipe(run.config, overrides)
        if run.path == path and newest_checkpoint(run) is not None:
            return config, replace(find_model(model), run=config)
        if not run.start.is_dir():
            raise ModelError(
                f"the run {model!r} has neither a checkpoint (checkpoints/step-*/model) nor a start model; wait for its first "
                "one, or probe its recipe"
            )
        check_weights(run.start)
        return config, ModelSource(str(run.start), config)
    if not path.is_dir() and (path.suffix == ".toml" or model in [name for name, _ in shipped.list_recipes()]):
        config = load_recipe(shipped.find_recipe(model), overrides)
        if config.warmstart is not None and config.warmstart.from_ is None:
            raise ConfigError(
                f"the recipe {model!r} begins with a warm start, which a probe does not train; run the warm start alone with "
                f"`deepgrpo train {model} --run.steps 0`, then probe its result: "
                f"deepgrpo probe {RunDir.of(config.run).start}"
            )
        return config, None
    source = find_model(model)
    if overrides:
        key = overrides[0][0]
        raise ConfigError(
            f"--{key} is a key of a recipe, but MODEL {model!r} is neither a recipe nor a run directory; use the "
            "options of `deepgrpo probe --help`"
        )
    return source.run, source


# ---------------------------------------------------------------- data, reward, segments


def _data(options: ProbeOptions, config: Config | None) -> EvalSet:
    """Data and reward; without `--data` those of training, where pivots are chosen."""
    if options.data is None:
        if config is None:
            raise ConfigError("--data is missing; name a suite or a file, e.g. --data gsm8k=path/to/gsm8k_train.jsonl")
        data = config.data
        changes: dict[str, Any] = {}
        if options.limit:
            # the length of a reasoning-gym task is its size
            changes["size" if isinstance(data, ReasoningGymData) else "limit"] = options.limit
        if options.chat != "auto":
            data = with_template(data, chat=options.chat == "on")
        return EvalSet(data.type, data.model_copy(update=changes), config.reward)
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


def with_chat(options: ProbeOptions, data: DataConfig, tokenizer: Any) -> DataConfig:
    """The data section with the chat template switched on or off, for data given by `--data`."""
    if options.data is None:
        return data
    has_one = bool(getattr(tokenizer, "chat_template", None))
    on = options.chat == "on" or (options.chat == "auto" and template_of(data).chat is not False and has_one)
    return with_template(data, chat=on)


def _explore(options: ProbeOptions, config: Config | None) -> DeepExplore:
    explore = DeepExplore()
    if config is not None:
        # keys that another strategy's section shares with this one
        shared = ("segments", "success_threshold", "branches_per_pivot", "root_pivot", "recoverability", "gamma")
        known = {name: getattr(config.explore, name) for name in shared if hasattr(config.explore, name)}
        explore = explore.model_copy(update=known)
    changes: dict[str, Any] = {}
    if options.branches is not None:
        changes["branches_per_pivot"] = options.branches
    elif explore.branches_per_pivot < 2:
        raise ConfigError(
            f"explore.branches_per_pivot is {explore.branches_per_pivot}, but a group of one is never mixed; give a larger "
            "one with --branches"
        )
    if options.segments != "auto":
        size = options.segment_size
        if size is None and options.segments == "count":
            size = DEFAULT_SEGMENTS
        changes["segments"] = SegmentConfig(type=options.segments, **({} if size is None else {"size": size}))
    return explore.model_copy(update=changes)
