"""The tables of docs/algorithms/switches.md are recipes that load, and give what the page says."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
from surroundings import ROOT

from deepgrpo.config import Config, load_recipe, parse_config, to_toml
from deepgrpo.errors import ConfigError

PAGE = ROOT / "docs" / "algorithms" / "switches.md"
SNIPPETS = dict(re.findall(r"```toml\n# (\S+)\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL))
REST: dict[str, Any] = {"model": {"type": "pretrained", "path": "some/model"}, "data": {"type": "jsonl", "path": "train.jsonl"}}


def config(name: str, explore: str = "root") -> Config:
    return parse_config({**REST, "reward": {"type": "math"}, "explore": {"type": explore}, **tomllib.loads(SNIPPETS[name])})


def test_every_table_is_read() -> None:
    assert list(SNIPPETS) == ["dr-grpo", "dapo", "gspo"]
    assert PAGE.read_text().count("```toml") == 3


@pytest.mark.parametrize("explore", ["root", "deep"])
@pytest.mark.parametrize("name", SNIPPETS)
def test_it_goes_with_any_strategy_and_back_to_toml(name: str, explore: str, tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text(to_toml(config(name, explore)))
    assert load_recipe(tmp_path / "recipe.toml") == config(name, explore)


def test_dr_grpo() -> None:
    found = config("dr-grpo")
    assert (found.credit.scale, found.loss.reduction, found.loss.reduction_length) == ("none", "constant", 3000)
    assert (found.loss.beta, found.loss.dual_clip, found.loss.drop_zero_advantage) == (0.0, None, False)
    assert found.loss.clip_range == (0.2, 0.2) and not found.sampling.dynamic


def test_dapo() -> None:
    found = config("dapo")
    assert found.loss.clip_range == (0.2, 0.28) and found.loss.reduction == "token" and found.credit.scale == "std"
    assert found.reward.overlong is not None
    assert (found.reward.overlong.cache, found.reward.overlong.penalty) == (4096, 1.0)
    assert (found.sampling.max_new_tokens, found.sampling.dynamic, found.sampling.max_rounds) == (20480, True, 10)
    assert found.optim.minibatches == 16


def test_gspo() -> None:
    found = config("gspo")
    assert (found.loss.ratio, found.loss.clip_range, found.loss.reduction) == ("sequence", (3e-4, 4e-4), "sequence")
    assert found.optim.minibatches == 4


# ---------------------------------------------------------------- combinations that cannot be meant


@pytest.mark.parametrize(
    ("sections", "says"),
    [
        (
            {"loss": {"ratio": "sequence", "clip_high": 0.28}},
            'loss.clip_high is 0.28, but loss.ratio is "sequence", which is clipped by loss.sequence_clip_low and '
            "loss.sequence_clip_high; set loss.sequence_clip_high",
        ),
        ({"loss": {"sequence_clip_low": 1e-3}}, 'loss.sequence_clip_low is 0.001, but loss.ratio is "token"'),
        ({"loss": {"ratio": "sequences"}}, "loss.ratio is 'sequences'; it should be 'token' or 'sequence'"),
        (
            {"reward": {"type": "math", "overlong": {"cache": 300}}},
            "reward.overlong.cache is 300, but a response has at most sampling.max_new_tokens = 256",
        ),
        ({"reward": {"type": "math", "overlong": {}}}, "key 'reward.overlong.cache' is missing"),
        (
            {"eval": {"reward": {"type": "math", "overlong": {"cache": 4}}}},
            "eval.reward.overlong is set (cache 4), but an evaluation measures the answer alone",
        ),
        ({"sampling": {"dynamic": True, "max_rounds": 0}}, "sampling.max_rounds is 0"),
    ],
)
def test_what_is_refused(sections: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config({**REST, "reward": {"type": "math"}, **sections})
    assert says in str(caught.value)
