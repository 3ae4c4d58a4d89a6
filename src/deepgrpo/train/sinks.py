"""Optional outputs for metrics: TensorBoard, wandb, trackio. Each package is imported only if enabled."""

from __future__ import annotations

import importlib.util
import json
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from deepgrpo.config import LogConfig
from deepgrpo.errors import ConfigError, MissingExtraError
from deepgrpo.runs.layout import RunDir
from deepgrpo.train.shown import COLUMNS, Row, Shown

Values = Mapping[str, float | list[float]]


class Sink(Protocol):
    """Receives the finite metrics of each step, and what else is shown of its trees."""

    def write(self, step: int, values: Values, shown: Shown) -> None: ...

    def close(self) -> None: ...


def open_sinks(
    config: LogConfig, run: RunDir, *, name: str, recipe: Mapping[str, Any] | None, first_step: int
) -> list[Sink]:
    """Open the sinks that `[log]` enables. Call it before anything expensive, so that a missing package is noticed at once.

    Args:
        config: the recipe's `[log]`.
        run: the run directory, which holds the files of TensorBoard and wandb. trackio keeps all runs in its own database,
            shown by `trackio show`; the environment variable TRACKIO_DIR moves it.
        name: name of the run in wandb and trackio.
        recipe: the resolved config, shown with the run.
        first_step: the next step; later steps of an interrupted run are discarded where possible.

    Raises:
        MissingExtraError: a package is not installed.
        ConfigError: the service refuses (not logged in, ...).
    """
    for package, wanted in (("tensorboard", config.tensorboard), ("wandb", config.wandb), ("trackio", config.trackio)):
        if wanted and importlib.util.find_spec(package) is None:
            raise MissingExtraError(package, package, f"log.{package} = true")
    sinks: list[Sink] = []
    if config.tensorboard:
        sinks.append(TensorBoardSink(run.tensorboard, first_step, recipe))
    if config.wandb:
        sinks.append(WandbSink(run, config.project, name, recipe))
    if config.trackio:
        sinks.append(TrackioSink(config.project, name, recipe))
    return sinks


class TensorBoardSink:
    """Event files under `tensorboard/`. After a resume TensorBoard hides the discarded steps.

    The recipe and the responses are under "Text". A list of the metrics that is named `..._histogram` holds counts over equal
    bins of [0, 1] and is shown as a histogram; other lists appear only in metrics.jsonl.
    """

    def __init__(self, directory: Path, first_step: int, recipe: Mapping[str, Any] | None = None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # SummaryWriter writes a purge mark for any step except None, including 0
        purge = first_step if first_step > 1 else None
        self.writer: Any = SummaryWriter(str(directory), purge_step=purge)
        if recipe is not None:
            lines = json.dumps(recipe, indent=2, ensure_ascii=False, default=str).splitlines()
            self.writer.add_text("recipe", "\n".join(f"    {line}" for line in lines), first_step - 1)  # indented: code

    def write(self, step: int, values: Values, shown: Shown) -> None:
        for key, value in values.items():
            if not isinstance(value, list):
                self.writer.add_scalar(key, value, step)
            elif key.endswith("_histogram") and sum(value) > 0:
                self._add_counts(key, value, step)
        for key, each in shown.values.items():
            self.writer.add_histogram(key, np.asarray(each), step)
        if shown.rows:
            self.writer.add_text("responses", _markdown(shown.rows), step)
        self.writer.flush()

    def _add_counts(self, key: str, counts: list[float], step: int) -> None:
        # the individual values are not stored: moments are those of the bin centres
        middles = [(i + 0.5) / len(counts) for i in range(len(counts))]
        self.writer.add_histogram_raw(
            key,
            min=0.0,
            max=1.0,
            num=sum(counts),
            sum=sum(c * x for c, x in zip(counts, middles, strict=True)),
            sum_squares=sum(c * x * x for c, x in zip(counts, middles, strict=True)),
            bucket_limits=[(i + 1) / len(counts) for i in range(len(counts))],
            bucket_counts=counts,
            global_step=step,
        )

    def close(self) -> None:
        self.writer.close()


def _markdown(rows: Sequence[Row]) -> str:
    lines = [COLUMNS, ("---",) * len(COLUMNS), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


class _RunSink:
    """A run of a service with wandb's interface."""

    run: Any
    service: Any
    """Its module."""

    def write(self, step: int, values: Values, shown: Shown) -> None:
        found: dict[str, Any] = {key: value for key, value in values.items() if not isinstance(value, list)}
        found |= {key: self.service.Histogram(list(each)) for key, each in shown.values.items()}
        if shown.rows:
            found["responses"] = self.service.Table(columns=list(COLUMNS), data=[list(row) for row in shown.rows])
        self.run.log(found, step=step)

    def close(self) -> None:
        self.run.finish()


class WandbSink(_RunSink):
    """A run in Weights & Biases. `WANDB_MODE=offline` keeps it in the run directory for `wandb sync`."""

    def __init__(self, run: RunDir, project: str, name: str, recipe: Mapping[str, Any] | None) -> None:
        import wandb

        self.service = wandb
        # stored with the run, so that a resumed run continues the same curve
        id_file = run.wandb_id
        if not id_file.exists():
            id_file.write_text(uuid.uuid4().hex[:12] + "\n", encoding="utf-8")
        run_id = id_file.read_text(encoding="utf-8").strip()
        try:
            self.run = wandb.init(
                project=project, name=name, id=run_id, resume="allow", dir=str(run.path), config=dict(recipe or {})
            )
        except wandb.Error as error:
            raise ConfigError(
                f"log.wandb is true, but wandb did not start: {error}; run `wandb login`, set WANDB_MODE=offline, "
                "or set log.wandb = false"
            ) from None


class TrackioSink(_RunSink):
    """A run in trackio's local database, outside the run directory."""

    def __init__(self, project: str, name: str, recipe: Mapping[str, Any] | None) -> None:
        import trackio

        self.service = trackio
        self.run = trackio.init(project=project, name=name, config=dict(recipe or {}), resume="allow")
