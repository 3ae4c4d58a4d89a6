"""`deepgrpo doctor --strategy`: the contract (explore/contract.py), tried on a user's strategy without a model."""

from __future__ import annotations

import tomllib

from rich.console import Console

from deepgrpo.config import UserExplore, parse_section
from deepgrpo.errors import ConfigError
from deepgrpo.explore import build_strategy
from deepgrpo.explore.contract import CONTEXT, WORLDS, run_contract

SMALL = {"num_rollouts": 4, "segments": {"type": "tokens", "size": 3}}
"""Keys for toy responses of at most 16 letters, where the user gives none."""


def check_strategy(reference: str, explore: str, out: Console) -> int:
    """Print a line per rule. Returns 1 if a required rule fails, else 0.

    Args:
        reference: "path/to/file.py:Name" or "package.module:Name".
        explore: further keys of the section as a TOML table.

    Raises ConfigError or StrategyError if the strategy cannot be loaded or built.
    """
    strategy = build_strategy(_section(reference, explore), CONTEXT)
    out.print(f"strategy {reference}: {len(WORLDS)} toy worlds per rule", markup=False)
    failed, told = False, ""
    # one instance for all rules: a memory outside its state shows
    for verdict in run_contract(lambda: strategy):
        rule = verdict.rule
        if verdict.reason is None:
            out.print(f"  passed   {rule.name}", markup=False, soft_wrap=True)
            continue
        failed = failed or rule.required
        out.print(f"  {'failed' if rule.required else 'differs':<9}{rule.name}", markup=False, soft_wrap=True)
        reason = verdict.reason.removeprefix(f"the strategy {reference!r}: ")
        out.print(f"           {'as above' if reason == told else reason} ({verdict.world})", markup=False, soft_wrap=True)
        told = reason
    out.print("at least one rule is broken" if failed else "all required rules are kept")
    return int(failed)


def _section(reference: str, explore: str) -> UserExplore:
    try:
        given = tomllib.loads(f"explore = {explore}")["explore"]
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(
            f"--explore is {explore!r}, which is not TOML ({error}); write a table, e.g. '{{ most_branches = 4 }}'"
        ) from None
    if not isinstance(given, dict):
        raise ConfigError(f"--explore is {explore!r}; write a table, e.g. '{{ most_branches = 4 }}'")
    return parse_section(UserExplore, {**SMALL, **given, "strategy": reference}, "--explore")
