"""Profiles of hypothesis: the same examples in every run, so that no run fails where another passed.

    make test ARGS="--hypothesis-profile=search tests/property"      draws others each time, and ten times as many
"""

from __future__ import annotations

from hypothesis import HealthCheck, settings

USUAL, SEARCH = "usual", "search"
COMMON = {"deadline": None, "suppress_health_check": [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]}


def register_profiles() -> None:
    settings.register_profile(USUAL, derandomize=True, database=None, **COMMON)
    settings.register_profile(SEARCH, **COMMON)
    settings.load_profile(USUAL)


def examples(count: int) -> settings:
    return settings(max_examples=count if settings.get_current_profile_name() == USUAL else 10 * count)
