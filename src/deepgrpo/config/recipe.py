"""A whole recipe: one section per table. Each section checks itself against the others (`Section.check`)."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import field_validator, model_validator

from deepgrpo.config.base import GIVEN, Section
from deepgrpo.config.data import DataConfig
from deepgrpo.config.env import EnvConfig, check_episodes
from deepgrpo.config.explore import DeepExplore, ExploreConfig
from deepgrpo.config.learning import CreditConfig, LearnerConfig, LossConfig, OptimConfig
from deepgrpo.config.model import ModelConfig, WarmstartConfig
from deepgrpo.config.reward import RewardConfig
from deepgrpo.config.run import CheckpointConfig, ClusterConfig, EvalConfig, LogConfig, RunConfig
from deepgrpo.config.sampling import EmbeddedEngineConfig, EngineConfig, SamplingConfig


def given_keywords(recipe: Config) -> list[str]:
    """Arguments of `deepgrpo.train` whose objects a recipe only names, as in "dataset"."""
    tables = recipe.model_dump(mode="json")
    found = {
        "model": tables["model"]["type"] == "given",
        "dataset": tables["data"]["type"] == "given",
        "eval_dataset": (tables["eval"]["data"] or {}).get("type") == "given",
        "rewards": _names_object(tables["reward"]),
        "strategy": _names_object(tables["explore"]),
    }
    return [keyword for keyword, names in found.items() if names]


def _names_object(table: Any) -> bool:
    if isinstance(table, dict):
        return any(_names_object(each) for each in table.values())
    return isinstance(table, str) and table.startswith(GIVEN)


class Config(Section):
    """A whole recipe."""

    run: RunConfig = RunConfig()
    model: ModelConfig
    warmstart: WarmstartConfig | None = None
    data: DataConfig
    env: EnvConfig | None = None
    reward: RewardConfig
    sampling: SamplingConfig = SamplingConfig()
    engine: EngineConfig = EmbeddedEngineConfig()
    explore: ExploreConfig = DeepExplore()
    credit: CreditConfig = CreditConfig()
    loss: LossConfig = LossConfig()
    optim: OptimConfig = OptimConfig()
    learner: LearnerConfig = LearnerConfig()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()
    cluster: ClusterConfig | None = None

    @property
    def engine_dtype(self) -> Literal["float32", "bfloat16"]:
        """Sampling dtype, resolved."""
        return self.learner.dtype if self.engine.dtype == "learner" else self.engine.dtype

    @field_validator("engine", mode="before")
    @classmethod
    def _embedded_by_default(cls, raw: Any) -> Any:
        """`engine.type` may be left out: the built-in engine needs no name."""
        return {"type": "embedded", **raw} if isinstance(raw, dict) else raw

    @model_validator(mode="after")
    def _sections_fit_together(self) -> Config:
        for name in type(self).model_fields:
            section = getattr(self, name)
            if section is not None:
                section.check(self)
        check_episodes(self)
        return self
