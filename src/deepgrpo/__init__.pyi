"""The public names, for type checkers; `__init__.py` loads each when it is first used."""

from deepgrpo.config import (
    Config as Config,
    list_recipes as list_recipes,
    load_recipe as load_recipe,
    parse_config as parse_config,
    to_toml as to_toml,
)
from deepgrpo.credit.siblings import sibling_credit as sibling_credit
from deepgrpo.errors import (
    CallbackError as CallbackError,
    CheckpointError as CheckpointError,
    ConfigError as ConfigError,
    DataError as DataError,
    DeepGRPOError as DeepGRPOError,
    EngineError as EngineError,
    MissingExtraError as MissingExtraError,
    ModelError as ModelError,
    RewardError as RewardError,
    StrategyError as StrategyError,
    TrainingError as TrainingError,
)
from deepgrpo.eval.evaluate import EvalResult as EvalResult
from deepgrpo.eval.pass_at_k import maj_at_k as maj_at_k, pass_at_k as pass_at_k
from deepgrpo.explore.base import (
    Context as Context,
    Limits as Limits,
    Signal as Signal,
    Stateless as Stateless,
    Strategy as Strategy,
    main_pivot as main_pivot,
)
from deepgrpo.explore.recoverability import Recoverability as Recoverability
from deepgrpo.explore.segments import build_segmenter as build_segmenter
from deepgrpo.library.arrays import (
    PivotDraw as PivotDraw,
    dual_stream_loss as dual_stream_loss,
    fit_recoverability as fit_recoverability,
    group_advantages as group_advantages,
    select_pivots as select_pivots,
)
from deepgrpo.library.callbacks import Callback as Callback
from deepgrpo.library.evaluation import evaluate as evaluate
from deepgrpo.library.frames import load_run as load_run, load_trees as load_trees
from deepgrpo.library.packing import Packed as Packed, pack_trees as pack_trees, tree_mask as tree_mask
from deepgrpo.library.run import Run as Run
from deepgrpo.library.training import Steps as Steps, steps as steps, train as train
from deepgrpo.records import (
    Completion as Completion,
    Credit as Credit,
    CreditSpan as CreditSpan,
    Group as Group,
    Ledger as Ledger,
    Node as Node,
    Pivot as Pivot,
    Prompt as Prompt,
    SampleRequest as SampleRequest,
    Score as Score,
    StepReport as StepReport,
    Tree as Tree,
)

__version__: str
