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
    assert list(SNIPPETS) == ["dr-grpo", "dapo", "gspo", "cispo", "maxrl", "icepop", "own-loss"]
    assert PAGE.read_text().count("```toml") == len(SNIPPETS)


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


def test_cispo() -> None:
    found = config("cispo")
    assert (found.loss.policy, found.loss.cispo_low, found.loss.cispo_high) == ("cispo", 0.0, 5.0)
    assert (found.credit.scale, found.loss.reduction, found.optim.minibatches) == ("std", "token", 16)


def test_maxrl() -> None:
    assert config("maxrl").credit.scale == "mean"


def test_icepop() -> None:
    found = config("icepop").loss
    assert (found.importance, found.importance_mode, found.importance_range) == ("auto", "mask", (0.5, 5.0))


def test_a_loss_of_your_own() -> None:
    found = config("own-loss").loss
    assert found.policy == "mine.py:my_loss" and found.user_function


# ---------------------------------------------------------------- combinations that cannot be meant


@pytest.mark.parametrize(
    ("sections", "says"),
    [
        (
            {"loss": {"ratio": "sequence", "clip_high": 0.28}},
            'loss.clip_high is 0.28, but loss.ratio is "sequence", which is bounded by loss.sequence_clip_low and '
            "loss.sequence_clip_high; set loss.sequence_clip_low and loss.sequence_clip_high and remove loss.clip_high",
        ),
        ({"loss": {"sequence_clip_low": 1e-3}}, 'loss.sequence_clip_low is 0.001, but loss.ratio is "token"'),
        ({"loss": {"policy": "cispo", "clip_high": 0.28}}, 'loss.clip_high is 0.28, but loss.policy is "cispo"'),
        ({"loss": {"policy": "cispo", "dual_clip": 2.0}}, 'loss.dual_clip is 2.0, but loss.policy is "cispo"'),
        ({"loss": {"policy": "cispo", "ratio": "sequence", "sequence_clip_low": 0.1}}, "remove loss.sequence_clip_low"),
        ({"loss": {"cispo_high": 4.0}}, 'loss.cispo_high is 4.0, but loss.policy is "ppo", which is bounded by'),
        ({"loss": {"policy": "cispo", "cispo_low": 5.0}}, "loss.cispo_low is 5.0, but loss.cispo_high is 5.0: nothing"),
        (
            {"loss": {"policy": "cipso"}},
            "loss.policy is 'cipso'; choose one of 'ppo', 'cispo' (did you mean 'cispo'?), or name a function of yours: "
            '"path/to/file.py:name"',
        ),
        ({"loss": {"importance_high": 4.0}}, 'loss.importance_high is 4.0, but loss.importance_mode is "truncate"'),
        ({"loss": {"importance_mode": "mask", "importance_cap": 4.0}}, "remove loss.importance_cap"),
        ({"loss": {"importance_mode": "mask", "importance": "off"}}, "so no token would be masked; set loss.importance ="),
        ({"loss": {"importance_mode": "mask", "importance_low": 6.0}}, "but loss.importance_high is 5.0: nothing"),
        ({"credit": {"scale": "max"}}, "credit.scale is 'max'; it should be 'none', 'std', 'mean' or 'part_std'"),
        (
            {"credit": {"scale": "mean"}, "reward": {"type": "math", "overlong": {"cache": 9}}},
            'credit.scale is "mean", but [reward.overlong] is set, so rewards, and the mean they are divided by',
        ),
        (
            {"credit": {"scale": "mean"}, "reward": {"type": "math", "truncated_value": -0.5}},
            'credit.scale is "mean", but reward.truncated_value is -0.5',
        ),
        (
            {"credit": {"scale": "mean"}, "explore": {"type": "treerl"}},
            'credit.scale is "mean", but explore.type = "treerl" takes differences of values along a tree',
        ),
        ({"credit": {"scale": "mean"}, "explore": {"type": "spo_tree"}}, "takes differences of values"),
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
