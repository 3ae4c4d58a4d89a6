"""Whatever parameters a task is given, the recipe that is saved beside the run reads back to them."""

from __future__ import annotations

import tomllib
from typing import Any

import pytest
from hypotheses import examples
from hypothesis import example, given
from hypothesis import strategies as st

from deepgrpo.config import ReasoningGymData, parse_config, to_toml
from deepgrpo.errors import ConfigError

# TOML's integers have 64 bits; half of a surrogate pair is no character
TEXT = st.text(st.characters(exclude_categories=("Cs",)), max_size=8)
SCALARS = st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False) | TEXT
VALUES = st.recursive(
    SCALARS | st.dates() | st.datetimes(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)


def with_params(params: dict[str, Any]) -> Any:
    return parse_config(
        {
            "model": {"type": "pretrained", "path": "m"},
            "data": {"type": "reasoning_gym", "task": "t", "params": params},
            "reward": {"type": "task"},
        }
    )


@given(st.dictionaries(TEXT, VALUES, max_size=4))
@example({"datasets": [{"name": "chain_sum", "config": {"min terms": 2}}, {"name": "x", "config": {}}]})
@example({"two words": {"a.b": [], "": float("inf")}, "del": "\x7f\x00\n\"'"})
@examples(200)
def test_parameters_survive_the_way_to_toml_and_back(params: dict[str, Any]) -> None:
    config = with_params(params)
    again = parse_config(tomllib.loads(to_toml(config)))
    assert again == config
    assert isinstance(again.data, ReasoningGymData) and again.data.params == params


def test_a_parameter_that_toml_cannot_hold_is_named() -> None:
    with pytest.raises(ConfigError, match=r"data\.params\.terms is none, which TOML cannot write"):
        to_toml(with_params({"terms": None}))
