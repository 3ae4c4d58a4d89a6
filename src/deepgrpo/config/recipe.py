"""A whole recipe, and what its sections require of one another."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import field_validator, model_validator

from deepgrpo.config.base import Section
from deepgrpo.config.data import DataConfig, ReasoningGymData, SyntheticData
from deepgrpo.config.explore import (
    AttnRLExplore,
    DeepExplore,
    ExploreConfig,
    OracleExplore,
    SPOTreeExplore,
    TreeRLExplore,
)
from deepgrpo.config.learning import CreditConfig, LearnerConfig, LossConfig, OptimConfig
from deepgrpo.config.model import ModelConfig, PretrainedModel, ScratchModel, WarmstartConfig
from deepgrpo.config.reward import RewardConfig, TaskReward
from deepgrpo.config.run import CheckpointConfig, ClusterConfig, EvalConfig, LogConfig, RunConfig
from deepgrpo.config.sampling import EmbeddedEngine, EngineConfig, SamplingConfig, VLLMEngine


class Config(Section):
    """A whole recipe."""

    run: RunConfig = RunConfig()
    model: ModelConfig
    warmstart: WarmstartConfig | None = None
    data: DataConfig
    reward: RewardConfig
    sampling: SamplingConfig = SamplingConfig()
    engine: EngineConfig = EmbeddedEngine()
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
        """The dtype of sampling, resolved."""
        return self.learner.dtype if self.engine.dtype == "learner" else self.engine.dtype

    @field_validator("engine", mode="before")
    @classmethod
    def _embedded_unless_said(cls, raw: Any) -> Any:
        """The engine that comes along needs no name."""
        return {"type": "embedded", **raw} if isinstance(raw, dict) else raw

    @model_validator(mode="after")
    def _fits_together(self) -> Config:
        adapters = isinstance(self.model, PretrainedModel) and self.model.lora is not None
        if adapters and self.warmstart and self.loss.beta > 0:
            raise ValueError(
                f"loss.beta is {self.loss.beta} with model.lora and a warm start: the KL would be measured from the model "
                "without adapters, not from the warm-started one; set loss.beta = 0, or leave out one of the other two"
            )
        if isinstance(self.model, ScratchModel) and not isinstance(self.data, SyntheticData):
            raise ValueError(
                f'model.type is "scratch", but data.type is "{self.data.type}": a model from scratch knows only the '
                'characters of the synthetic task; set data.type = "synthetic" or model.type = "pretrained"'
            )
        if self.warmstart and self.warmstart.from_ is None and not isinstance(self.data, SyntheticData):
            raise ValueError(
                f'warmstart is set, but data.type is "{self.data.type}" and has no written solutions to learn from; '
                'remove [warmstart] or set data.type = "synthetic"'
            )
        if self.warmstart and self.warmstart.target_accuracy is not None and self.eval.every is None:
            raise ValueError(
                f"warmstart.target_accuracy is {self.warmstart.target_accuracy}, but eval.every is missing, so there are no "
                "questions to measure it on; set eval.every and add a table [eval.data], or remove "
                "warmstart.target_accuracy"
            )
        if isinstance(self.reward, TaskReward) and not isinstance(self.data, SyntheticData | ReasoningGymData):
            raise ValueError(
                f'reward.type is "task", but data.type is "{self.data.type}" brings no verifier; '
                'choose reward.type = "math", "exact" or "user"'
            )
        overlong, longest = self.reward.overlong, self.sampling.max_new_tokens
        if overlong is not None and overlong.cache > longest:
            raise ValueError(
                f"reward.overlong.cache is {overlong.cache}, but a response has at most sampling.max_new_tokens = {longest} "
                "tokens, so every one of them would be penalised; lower the one or raise the other"
            )
        below = self.reward.truncated_value or 0.0
        if self.credit.scale == "mean" and (overlong is not None or below < 0):
            raise ValueError(
                'credit.scale is "mean", but '
                + (f"reward.truncated_value is {below}" if below < 0 else "[reward.overlong] is set")
                + ", so a reward may be below 0, and the mean it divides by with it; remove that, or set credit.scale = "
                '"none" or "std"'
            )
        if self.eval.reward is not None and self.eval.reward.overlong is not None:
            raise ValueError(
                f"eval.reward.overlong is set (cache {self.eval.reward.overlong.cache}), but an evaluation measures the "
                "answer alone; remove it there"
            )
        if isinstance(self.engine, VLLMEngine) and self.sampling.temperature > 2:
            raise ValueError(
                f"sampling.temperature is {self.sampling.temperature}, but vLLM takes at most 2; lower it, or set "
                'engine.type = "embedded"'
            )
        explore = self.explore
        if isinstance(explore, OracleExplore) and not isinstance(self.data, SyntheticData):
            raise ValueError(
                f'explore.type is "oracle", but data.type is "{self.data.type}": only the synthetic task can tell where the '
                'first error of a rollout is; set data.type = "synthetic" or choose explore.type = "deep"'
            )
        if isinstance(explore, SPOTreeExplore):
            before_last = (len(explore.branching) - 1) * explore.segment_tokens
            if before_last >= self.sampling.max_new_tokens:
                raise ValueError(
                    f"explore.branching has {len(explore.branching)} levels with explore.segment_tokens = "
                    f"{explore.segment_tokens}, but a response has at most sampling.max_new_tokens = "
                    f"{self.sampling.max_new_tokens} tokens, so the last level would begin at or behind its end; take "
                    "shorter segments or fewer levels, or raise sampling.max_new_tokens"
                )
        valued = isinstance(explore, AttnRLExplore | TreeRLExplore)
        valued = valued or (isinstance(explore, SPOTreeExplore) and explore.advantage == "parent")
        if valued and self.credit.scale != "none":
            raise ValueError(
                f'credit.scale is "{self.credit.scale}", but explore.type = "{explore.type}" takes differences of values along '
                'a tree and has no group to scale by; set credit.scale = "none"'
            )
        if self.cluster and self.cluster.overlap and isinstance(explore, AttnRLExplore):
            raise ValueError(
                f'cluster.overlap is on, but explore.type = "{explore.type}" asks the policy about its rollouts while they '
                "grow, and the policy changes meanwhile; set cluster.overlap = false"
            )
        if self.cluster and self.cluster.overlap and self.loss.importance == "off":
            raise ValueError(
                'cluster.overlap is on and loss.importance is "off": nothing would make up for rollouts that are one update '
                'old; set loss.importance = "auto"'
            )
        if self.optim.minibatches > self.run.prompts_per_step:
            raise ValueError(
                f"optim.minibatches is {self.optim.minibatches}, but a step has only run.prompts_per_step = "
                f"{self.run.prompts_per_step} prompts to split; lower it"
            )
        return self
