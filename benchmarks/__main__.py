"""Benchmarks of the parts of a training step: `python -m benchmarks SUITE --workload S`, from the root of a checkout."""

from __future__ import annotations

import sys

import tyro

from benchmarks.options import BenchOptions
from deepgrpo.errors import DeepGRPOError


def main() -> int:
    """Run one benchmark and return the exit code: 0 done, 1 it could not go on, 2 it was called wrongly."""
    options = tyro.cli(
        BenchOptions, prog="python -m benchmarks",
        config=(tyro.conf.FlagCreatePairsOff, tyro.conf.PositionalMetavarFromFieldName),
    )  # fmt: skip
    try:
        if options.part == "busy":
            from benchmarks.busy import run_busy

            return run_busy(options)
        from benchmarks.harness import run_bench

        return run_bench(options)
    except DeepGRPOError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
