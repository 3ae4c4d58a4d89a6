"""Recipes: frozen models, every default stated once, no torch.

A recipe is a TOML file with one table per section; each module here holds one domain. Where a section has several kinds
(`data`, `reward`, `explore`, ...), its key `type` chooses one. Unknown keys, wrong types and impossible combinations raise
`ConfigError` with the key, the value and the remedy.
"""

from __future__ import annotations

from deepgrpo.config.base import Section, tables_of
from deepgrpo.config.data import (
    ColumnMap,
    DataConfig,
    GeneratedData,
    GivenData,
    HubData,
    JsonlData,
    LookupData,
    MixData,
    MultihopData,
    ParquetData,
    ReasoningGymData,
    Recovery,
    SearchData,
    SourceConfig,
    SyntheticData,
    template_of,
    with_template,
)
from deepgrpo.config.env import EnvBase, EnvConfig, LookupEnv, MultihopEnv, OpenEnv, ToolsEnv, UserEnv
from deepgrpo.config.explore import (
    AdaptiveExplore,
    AllocateExplore,
    DeepExplore,
    ExploreConfig,
    OracleExplore,
    RandomExplore,
    RootExplore,
    UserExplore,
)
from deepgrpo.config.files import (
    load_recipe,
    merge,
    parse_config,
    read_recipe,
    set_values,
    to_tables,
    to_toml,
)
from deepgrpo.config.judge import JudgeKeys
from deepgrpo.config.learning import LearnerConfig, LossConfig, OptimConfig
from deepgrpo.config.looking import BeliefExplore, LocatedExplore, PrefixExplore
from deepgrpo.config.model import GivenModel, LoraConfig, ModelConfig, PretrainedModel, ScratchModel, WarmstartConfig
from deepgrpo.config.problems import parse_section
from deepgrpo.config.recipe import Config, given_keywords
from deepgrpo.config.reward import (
    OVERLONG,
    ExactReward,
    MathReward,
    OverlongConfig,
    PartConfig,
    RewardConfig,
    TaskReward,
    UserReward,
    WeightedReward,
)
from deepgrpo.config.rivals import AttnRLExplore, FR3EExplore, SPOTreeExplore, TreeRLExplore
from deepgrpo.config.run import CheckpointConfig, ClusterConfig, EvalConfig, LogConfig, RunConfig
from deepgrpo.config.sampling import EmbeddedEngineConfig, EngineConfig, SamplingConfig, VLLMEngineConfig
from deepgrpo.config.scorers import ExactKeys, MathKeys, TaskKeys, UserKeys
from deepgrpo.config.shipped import find_recipe, list_recipes
from deepgrpo.config.strategy import PivotExplore, RecoverabilityConfig, SegmentConfig
from deepgrpo.config.template import TemplateConfig

__all__ = [
    "OVERLONG", "AdaptiveExplore", "AllocateExplore", "AttnRLExplore", "BeliefExplore", "CheckpointConfig",
    "ClusterConfig", "ColumnMap", "Config", "DataConfig", "DeepExplore", "EmbeddedEngineConfig", "EngineConfig",
    "EnvBase", "EnvConfig", "EvalConfig", "ExactKeys", "ExactReward", "ExploreConfig", "FR3EExplore",
    "GeneratedData", "GivenData", "GivenModel", "HubData", "JsonlData", "JudgeKeys", "LearnerConfig",
    "LocatedExplore", "LogConfig", "LookupData", "LookupEnv", "LoraConfig", "LossConfig", "MathKeys", "MathReward",
    "MixData", "ModelConfig", "MultihopData", "MultihopEnv", "OpenEnv", "OptimConfig", "OracleExplore",
    "OverlongConfig", "ParquetData", "PartConfig", "PivotExplore", "PrefixExplore", "PretrainedModel",
    "RandomExplore", "ReasoningGymData", "RecoverabilityConfig", "Recovery", "RewardConfig", "RootExplore",
    "RunConfig", "SPOTreeExplore", "SamplingConfig", "ScratchModel", "SearchData", "Section", "SegmentConfig",
    "SourceConfig", "SyntheticData", "TaskKeys", "TaskReward", "TemplateConfig", "ToolsEnv", "TreeRLExplore",
    "UserEnv", "UserExplore", "UserKeys", "UserReward", "VLLMEngineConfig", "WarmstartConfig", "WeightedReward",
    "find_recipe", "given_keywords", "list_recipes", "load_recipe", "merge", "parse_config", "parse_section",
    "read_recipe", "set_values", "tables_of", "template_of", "to_tables", "to_toml", "with_template",
]  # fmt: skip
