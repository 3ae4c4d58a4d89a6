"""The public names, for type checkers; `__init__.py` loads each when it is first used."""

from deepgrpo.config import Config, list_recipes, load_recipe, parse_config, to_toml
from deepgrpo.credit.siblings import sibling_credit
from deepgrpo.envs.base import Environment, Turn
from deepgrpo.errors import (
    CallbackError,
    CheckpointError,
    ConfigError,
    DataError,
    DeepGRPOError,
    DivergenceError,
    EngineError,
    EnvError,
    MissingExtraError,
    ModelError,
    RewardError,
    StrategyError,
    TrainingError,
)
from deepgrpo.eval.evaluate import EvalResult
from deepgrpo.eval.pass_at_k import maj_at_k, pass_at_k
from deepgrpo.explore.base import Context, Limits, Signal, Stateless, Strategy, main_pivot
from deepgrpo.explore.recoverability import Recoverability
from deepgrpo.explore.segments import build_segmenter
from deepgrpo.feedback import Score
from deepgrpo.ledger import Ledger, StepReport
from deepgrpo.library.arrays import PivotDraw, dual_stream_loss, fit_recoverability, group_advantages, select_pivots
from deepgrpo.library.callbacks import Callback
from deepgrpo.library.evaluation import evaluate
from deepgrpo.library.frames import load_run, load_trees
from deepgrpo.library.packing import Packed, pack_trees, tree_mask
from deepgrpo.library.run import Run
from deepgrpo.library.training import Steps, steps, train
from deepgrpo.records import (
    Completion,
    Credit,
    CreditSpan,
    Group,
    Node,
    Pivot,
    Prompt,
    SampleRequest,
    Tree,
)

__version__: str

__all__ = [
    "Callback", "CallbackError", "CheckpointError", "Completion", "Config", "ConfigError", "Context", "Credit",
    "CreditSpan", "DataError", "DeepGRPOError", "DivergenceError", "EngineError", "EnvError", "Environment", "EvalResult",
    "Group", "Ledger", "Limits", "MissingExtraError", "ModelError", "Node", "Packed", "Pivot", "PivotDraw", "Prompt",
    "Recoverability", "RewardError", "Run", "SampleRequest", "Score", "Signal", "Stateless", "StepReport", "Steps",
    "Strategy", "StrategyError", "TrainingError", "Tree", "Turn", "__version__", "build_segmenter",
    "dual_stream_loss", "evaluate", "fit_recoverability", "group_advantages", "list_recipes", "load_recipe",
    "load_run", "load_trees", "main_pivot", "maj_at_k", "pack_trees", "parse_config", "pass_at_k", "select_pivots",
    "sibling_credit", "steps", "to_toml", "train", "tree_mask",
]  # fmt: skip
