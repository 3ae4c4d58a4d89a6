"""Distributions that are cut or penalised: by hand, and as the processors of transformers make them."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from drawn import processors_of

from deepgrpo.config import SamplingConfig, parse_config
from deepgrpo.engines.base import SamplingParams
from deepgrpo.engines.embedded.sampler import draw, penalise
from deepgrpo.errors import ConfigError
from deepgrpo.train.loop import train

LOGITS = torch.tensor([[0.5, 0.25, 0.125, 0.125]]).log()


def distribution(
    logits: torch.Tensor, params: SamplingParams, seen: torch.Tensor | None = None, draws: int = 4001
) -> list[float]:
    """Probability of each token as reported, 0 for one that no uniform draws."""
    uniforms = torch.linspace(0, 1, draws + 1, dtype=torch.float64)[:-1]
    many = logits.expand(draws, -1)
    tokens, logprobs = draw(many, uniforms, params, None if seen is None else seen.expand(draws, -1))
    found = [0.0] * logits.shape[1]
    for token, logprob in zip(tokens.tolist(), logprobs.exp().tolist(), strict=True):
        found[token] = logprob
    shares = torch.bincount(tokens, minlength=logits.shape[1]) / draws
    assert shares.tolist() == pytest.approx(found, abs=2 / draws)
    return found


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        (SamplingParams(top_k=2), [2 / 3, 1 / 3, 0, 0]), (SamplingParams(top_k=1), [1, 0, 0, 0]),
        # the third and the fourth tie
        (SamplingParams(top_k=3), [0.5, 0.25, 0.125, 0.125]), (SamplingParams(top_k=9), [0.5, 0.25, 0.125, 0.125]),
        # at least 0.3 of 0.5
        (SamplingParams(min_p=0.3), [2 / 3, 1 / 3, 0, 0]), (SamplingParams(min_p=0.25), [0.5, 0.25, 0.125, 0.125]),
        # top-p is of what top-k leaves: 2/3 alone reaches 0.6, and 1/2 alone would not
        (SamplingParams(top_k=2, top_p=0.6), [1, 0, 0, 0]), (SamplingParams(top_p=0.6), [2 / 3, 1 / 3, 0, 0]),
        # temperature 1/2 squares: 16, 4, 1, 1 of 22; then at least 0.2 of the first
        (SamplingParams(temperature=0.5, min_p=0.2), [0.8, 0.2, 0, 0]),
    ],
)  # fmt: skip
def test_cuts_by_hand(params: SamplingParams, expected: list[float]) -> None:
    assert distribution(LOGITS, params) == pytest.approx(expected, abs=1e-6)


def test_the_penalty_by_hand() -> None:
    """Seen tokens: a logit of 1 is halved, one of -1 doubled. A token that the model masks stays masked."""
    logits = torch.tensor([[1.0, -1.0, 0.0, 1.0, -torch.inf]])
    seen = torch.tensor([[True, True, True, False, True]])
    assert penalise(logits, seen, 2.0).tolist() == [[0.5, -2.0, 0.0, 1.0, -torch.inf]]
    found = distribution(logits, SamplingParams(repetition_penalty=2.0), seen)
    assert found == pytest.approx(torch.softmax(torch.tensor([0.5, -2.0, 0.0, 1.0, -torch.inf]), 0).tolist(), abs=1e-6)
    # greedy takes the most likely token of the policy, whatever the penalty
    tokens, logprobs = draw(logits, torch.zeros(1), SamplingParams(greedy=True, repetition_penalty=2.0))
    assert tokens.tolist() == [0] and logprobs.exp().tolist() == pytest.approx([float(torch.softmax(logits, -1)[0, 0])])


@pytest.mark.parametrize("seed", range(6))
def test_distributions_of_transformers(seed: int) -> None:
    torch.manual_seed(seed)
    logits, ids = torch.randn(1, 12) * 2, torch.randint(0, 12, (1, 5))
    seen = torch.zeros(1, 12, dtype=torch.bool).scatter_(1, ids, True)
    for params in (
        SamplingParams(top_k=5), SamplingParams(min_p=0.15), SamplingParams(repetition_penalty=1.4),
        SamplingParams(temperature=0.7, top_k=6, top_p=0.8, repetition_penalty=1.2),
        SamplingParams(temperature=1.5, top_k=7, min_p=0.1, repetition_penalty=0.7),
    ):  # fmt: skip
        expected = torch.softmax(processors_of(params)(ids, logits.clone()), -1)[0]
        found = distribution(logits, params, seen)
        # a token that no uniform of a fine grid hits has hardly any probability
        assert found == pytest.approx(torch.where(expected < 1e-3, torch.tensor(found), expected).tolist(), abs=1e-5)
        assert all(value == 0 for value, wanted in zip(found, expected.tolist(), strict=True) if wanted == 0)


def test_the_recipe_reaches_the_engine() -> None:
    config = SamplingConfig(temperature=0.5, top_p=0.9, top_k=3, repetition_penalty=1.1, stop=("x",))
    assert SamplingParams.of(config) == SamplingParams(0.5, 0.9, stop=("x",), top_k=3, repetition_penalty=1.1)
    assert SamplingConfig(temperature=0.5).of_the_policy
    for key, value in {"top_p": 0.9, "top_k": 3, "min_p": 0.1, "repetition_penalty": 1.1}.items():
        assert not SamplingConfig.model_validate({key: value}).of_the_policy, key


@pytest.mark.parametrize(
    ("sections", "problem"),
    [
        ({"sampling": {"min_p": 0.1, "top_p": 0.9}}, "sampling.min_p is 0.1 and sampling.top_p is 0.9"),
        ({"sampling": {"repetition_penalty": 1.2}, "loss": {"importance": "off"}}, "sampling.repetition_penalty is 1.2"),
        ({"sampling": {"top_k": 0}}, "sampling.top_k is 0"),
        ({"sampling": {"repetition_penalty": 2.5}}, "sampling.repetition_penalty is 2.5"),
    ],
)  # fmt: skip
def test_what_is_refused(sections: dict[str, Any], problem: str) -> None:
    rest = {"model": {"type": "scratch"}, "data": {"type": "synthetic"}, "reward": {"type": "task"}}
    with pytest.raises(ConfigError) as refused:
        parse_config({**rest, **sections})
    assert problem in str(refused.value)


@pytest.mark.parametrize("sampling", [{"top_k": 3}, {"repetition_penalty": 2.0}])
def test_training_weighs_for_it(recipe: Any, sampling: dict[str, Any]) -> None:
    """Of a cut distribution, each weight learner / sampler is the mass that was left, below 1."""
    made = recipe(
        run={"steps": 1, "name": "cut"}, explore={"type": "root", "num_rollouts": 4},
        sampling={"max_new_tokens": 8, "temperature": 0.1, **sampling}, loss={"beta": 0.0, "drop_zero_advantage": False},
    )  # fmt: skip
    line = json.loads((train(made) / "metrics.jsonl").read_text().splitlines()[-1])
    assert line["mismatch/kl"] > 1e-3 and abs(line["mismatch/weight"] - 1) > 1e-3
    if "repetition_penalty" not in sampling:
        assert line["mismatch/weight"] < 1
