"""The start model of a run: the weights after the warm start, saved and loaded; and the fingerprint of any start model.

A model that a Python program gives (`config.GivenModel`) is trained in place, so its start weights are saved if the KL term
needs them.

A resumed run builds its start model again, from `start/` or from the recipe, and compares the fingerprint: another
seed, another model under the same path, or a missing `start/` would change the reference of the KL term, or the base model of
adapters, without any other sign.
"""

from __future__ import annotations

import zlib

from safetensors import SafetensorError

from deepgrpo.config import Config, GivenModel
from deepgrpo.errors import CheckpointError
from deepgrpo.model.adapters import has_adapters
from deepgrpo.model.policy import Policy
from deepgrpo.runs.files import WRITING, delete_tree, flush_to_disk
from deepgrpo.runs.layout import RunDir, shown
from deepgrpo.runs.resume import resume_command
from deepgrpo.runs.weights import damage_of_start, write_checksums

_SAMPLES = 4096
"""Elements of each parameter in the fingerprint, evenly spaced: enough to tell two models apart, at no cost."""


def save_start(policy: Policy, run: RunDir) -> None:
    """Save the weights after a warm start, with their checksums: whole or not at all. Raises OSError, SafetensorError."""
    aside = run.start.with_name(f"{WRITING}{run.start.name}")
    delete_tree(aside)
    aside.mkdir()
    policy.save(aside)
    write_checksums(aside)
    for file in [*aside.rglob("*"), aside]:
        flush_to_disk(file)
    delete_tree(run.start)  # a rename does not replace a directory
    aside.rename(run.start)
    flush_to_disk(run.path)


def load_start(policy: Policy, run: RunDir) -> None:
    """Load the weights that `save_start` saved. Raises CheckpointError if they are missing or damaged."""
    problem = damage_of_start(run)
    if problem is None:
        try:
            policy.load_weights(run.start)
            return
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            problem = str(error)
    raise CheckpointError(
        f"the start model {shown(run.start)} cannot be read: {problem}; the KL term (loss.beta > 0) has no other "
        f"reference: put it back, begin again with: {resume_command(run, 0)}, or go on without the term: add "
        "--loss.beta 0"
    )


def rebuild_start(policy: Policy, saved: str, config: Config, run: RunDir) -> None:
    """Give the policy the weights from which the run started, if the run needs them.

    Args:
        saved: their fingerprint.

    Raises CheckpointError if they cannot be had.
    """
    adapters = has_adapters(policy.model)
    if not adapters and config.loss.beta == 0:
        return
    if not adapters and (config.warmstart is not None or isinstance(config.model, GivenModel)):
        load_start(policy, run)
    if fingerprint(policy) == saved:
        return
    needed = "the base model of the adapters" if adapters else "the reference of the KL term (loss.beta > 0)"
    without = "" if adapters else ", or add --loss.beta 0"
    raise CheckpointError(
        f"{shown(run.path)} cannot be resumed: the model that the recipe builds is not the one from which the run started, "
        f"which is {needed}; set [model], [warmstart] and run.seed as they were, put the model's files back{without}"
    )


def fingerprint(policy: Policy) -> str:
    """A short text that two start models share only if their weights agree; of the base model if adapters are trained."""
    crc = 0
    adapters = has_adapters(policy.model)
    for name, parameter in policy.model.named_parameters():
        if adapters and parameter.requires_grad:
            continue
        flat = parameter.detach().flatten()
        taken = flat[:: max(1, flat.numel() // _SAMPLES)].float().cpu().contiguous().numpy()
        crc = zlib.crc32(f"{name} {tuple(parameter.shape)}".encode(), crc)
        crc = zlib.crc32(taken.tobytes(), crc)
    return f"{crc:08x}"
