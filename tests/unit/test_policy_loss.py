"""The loss seam: losses by name, importance weights and masks, and a user's own function. Numbers by hand."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from deepgrpo.config import LossConfig
from deepgrpo.config.learning import POLICY_LOSSES
from deepgrpo.errors import ConfigError, TrainingError
from deepgrpo.loss.inputs import LossInputs, LossOutput
from deepgrpo.loss.policy import LOSSES, policy_loss
from deepgrpo.loss.ratio import importance_weight
from deepgrpo.train.user_loss import build_loss


def tensor(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def inputs(ratio: list[float], advantage: list[float], weight: list[float] | None = None, **labels: list[int]) -> LossInputs:
    """Terms with log-prob log(ratio), old log-prob 0, and a sampler by which the importance weights are as given."""
    old = torch.zeros(len(ratio), dtype=torch.float64)
    return LossInputs(
        tensor(*map(math.log, ratio)).requires_grad_(), old, old - tensor(*map(math.log, weight or [1.0] * len(ratio))),
        tensor(*advantage), torch.tensor(labels.get("sequence", list(range(len(ratio))))),
        torch.tensor(labels.get("stream", [0] * len(ratio))),
    )  # fmt: skip


def gradient(output: LossOutput, terms: LossInputs) -> list[float]:
    (found,) = torch.autograd.grad(output.loss_N.sum(), terms.logprob_N)
    values: list[float] = found.tolist()
    return values


# ---------------------------------------------------------------- the registry


def test_the_names_of_the_recipe_are_those_of_the_registry() -> None:
    """The recipe knows them without torch."""
    assert tuple(LOSSES) == POLICY_LOSSES


def test_the_default_is_the_clipped_surrogate() -> None:
    """Ratios 1.5 and 0.5 with bounds 0.8 and 1.3; 5 with a dual clip of 3: -1.3 · 2, -0.8 · -2, -3 · -2."""
    terms = inputs([1.5, 0.5, 5.0], [2.0, -2.0, -2.0])
    output = policy_loss(terms, LossConfig(clip_low=0.2, clip_high=0.3))
    assert output.loss_N.tolist() == pytest.approx([-2.6, 1.6, 6.0])
    assert output.clipped_N is not None and output.clipped_N.tolist() == [True, True, True]
    assert output.figures == {} and gradient(output, terms) == [0, 0, 0]


def test_tensors_of_different_length_are_our_bug() -> None:
    terms = inputs([1.0, 2.0], [1.0, 1.0])
    with pytest.raises(AssertionError, match=r"advantage_N: \(1,\)"):
        policy_loss(replace(terms, advantage_N=terms.advantage_N[:1]), LossConfig())


# ---------------------------------------------------------------- CISPO


def test_cispo_by_hand() -> None:
    """`ℓ = -min(max(ρ, .5), 4) · A · log π`, with log π = log ρ as the old log-prob is 0; the gradient is -weight · A.

    ρ = 2: weight 2, A = 3: ℓ = -6 log 2, gradient -6. ρ = 8: weight 4, A = 1 and -1: ∓4 log 8, gradient ∓4, so a clipped
    token keeps its gradient. ρ = 1/4: weight 1/2, A = -2: ℓ = log(1/4), gradient 1. No advantage: nothing, and not clipped.
    """
    terms = inputs([2.0, 8.0, 8.0, 0.25, 8.0], [3.0, 1.0, -1.0, -2.0, 0.0])
    output = policy_loss(terms, LossConfig(policy="cispo", cispo_low=0.5, cispo_high=4.0))
    assert output.loss_N.tolist() == pytest.approx([-4.158883, -8.317766, 8.317766, -1.386294, 0.0])
    assert gradient(output, terms) == pytest.approx([-6, -4, 4, 1, 0])
    assert output.clipped_N is not None and output.clipped_N.tolist() == [False, True, True, True, False]


def test_cispo_has_no_lower_bound_by_default() -> None:
    """MiniMax-M1 bounds the weight from above only; 5 is ScaleRL's bound."""
    terms = inputs([1e-6, 6.0], [1.0, 1.0])
    output = policy_loss(terms, LossConfig(policy="cispo"))
    assert gradient(output, terms) == pytest.approx([-1e-6, -5.0])
    assert output.clipped_N is not None and output.clipped_N.tolist() == [False, True]


def test_cispo_on_policy_is_the_gradient_of_ppo() -> None:
    terms = inputs([1.0, 1.0], [0.75, -0.25])
    assert gradient(policy_loss(terms, LossConfig(policy="cispo")), terms) == [-0.75, 0.25]
    assert gradient(policy_loss(terms, LossConfig()), terms) == [-0.75, 0.25]


def test_cispo_of_a_sequence() -> None:
    """Ratios 2 and 8 of one sequence: the geometric mean 4, clipped at 3, is the weight of both."""
    terms = inputs([2.0, 8.0, 2.0], [1.0, 1.0, 1.0], sequence=[0, 0, 1])
    output = policy_loss(terms, LossConfig(policy="cispo", ratio="sequence", cispo_high=3.0))
    assert gradient(output, terms) == pytest.approx([-3, -3, -2])


# ---------------------------------------------------------------- importance weights


def test_truncated_and_masked_weights() -> None:
    sampler = -torch.log(tensor(0.25, 0.5, 3, 8))
    learner = tensor(0, 0, 0, 0)
    assert importance_weight(learner, sampler, 0.5, 5, mode="truncate").tolist() == pytest.approx([0.5, 0.5, 3, 5])
    assert importance_weight(learner, sampler, 0.5, 5, mode="mask").tolist() == pytest.approx([0, 0.5, 3, 0])


@pytest.mark.parametrize(
    ("keys", "weights"),
    [
        ({}, [0.25, 1.5, 2.0]),  # min(w, 2)
        ({"importance_cap": 4.0}, [0.25, 1.5, 4.0]),
        ({"importance_mode": "mask"}, [0.0, 1.5, 0.0]),  # within 0.5 and 5
        ({"importance_mode": "mask", "importance_low": 0.0, "importance_high": 1.0}, [0.25, 0.0, 0.0]),
    ],
)
@pytest.mark.parametrize("policy", POLICY_LOSSES)
def test_a_weight_multiplies_any_loss(policy: str, keys: dict[str, Any], weights: list[float]) -> None:
    """Weights 1/4, 3/2 and 8 of tokens with ratio 1 and advantage -2: the gradient is 2 times the bounded weight."""
    terms = inputs([1.0, 1.0, 1.0], [-2.0] * 3, weight=[0.25, 1.5, 8.0])
    config = LossConfig(policy=policy, **keys)
    output = policy_loss(terms, config, weigh=True)
    assert gradient(output, terms) == pytest.approx([2 * w for w in weights])
    assert output.figures["weight"].tolist() == pytest.approx(weights)
    assert gradient(policy_loss(terms, config), terms) == pytest.approx([2, 2, 2])  # off


def test_a_sequence_is_masked_as_a_whole() -> None:
    """Weights 1/10 and 10 of one sequence have the geometric mean 1; 8 and 8 of another are out of bounds."""
    terms = inputs([1.0] * 4, [-1.0] * 4, weight=[0.1, 10.0, 8.0, 8.0], sequence=[0, 0, 1, 1])
    config = LossConfig(importance_mode="mask", ratio="sequence")
    assert gradient(policy_loss(terms, config, weigh=True), terms) == pytest.approx([1, 1, 0, 0])
    tokens = LossConfig(importance_mode="mask")
    assert gradient(policy_loss(terms, tokens, weigh=True), terms) == pytest.approx([0, 0, 0, 0])


# ---------------------------------------------------------------- a user's own

HEAD = "import torch\nfrom deepgrpo.loss.inputs import LossOutput\n\ndef my_loss(inputs, config):\n"
GOOD = """loss_N = -inputs.advantage_N * torch.exp(inputs.log_ratio(config.ratio))
return LossOutput(loss_N, figures={"surprise": -inputs.logprob_N.detach()})
"""


@pytest.fixture
def built(tmp_path: Path) -> Callable[..., Any]:
    def build(body: str, head: str = HEAD, name: str = "my_loss") -> Any:
        (tmp_path / "mine.py").write_text(head + textwrap.indent(body, "    "))
        return build_loss(LossConfig(policy=f"{tmp_path}/mine.py:{name}"))

    return build


def test_a_users_loss(built: Any) -> None:
    chosen = built(GOOD)
    assert chosen.figures == ("surprise",)
    terms = inputs([2.0, 0.5], [1.0, -1.0])
    output = policy_loss(terms, LossConfig(), function=chosen.function)
    assert output.loss_N.tolist() == pytest.approx([-2.0, 0.5])
    assert output.figures["surprise"].tolist() == pytest.approx([-math.log(2), math.log(2)])
    weighed = policy_loss(inputs([2.0], [1.0], weight=[1.5]), LossConfig(), function=chosen.function, weigh=True)
    assert weighed.loss_N.tolist() == pytest.approx([-3.0]) and list(weighed.figures) == ["surprise", "weight"]



@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("return LossOutput(inputs.logprob_N.sum())", "returned loss_N of the shape [], but there are 6 terms; return"),
        ("return LossOutput(inputs.logprob_N[:-1])", "returned loss_N of the shape [5], but there are 6 terms"),
        ("return inputs.logprob_N", "returned tensor([-0.5000"),
        ("return inputs.logprob_N", "; return deepgrpo.loss.inputs.LossOutput(loss_N)"),
        ("return LossOutput(0.5)", "returned loss_N = 0.5 (a float); give a torch tensor with one number per term"),
        ("return LossOutput(inputs.logprob_N.detach())", "returned a loss_N without gradient; compute it from"),
        (
            "return LossOutput(torch.zeros(len(inputs), requires_grad=True) + 1)",
            "returned a loss_N that does not depend on inputs.logprob_N, so nothing is trained",
        ),
        ("return LossOutput(inputs.logprob_N / 0)", "gives the losses [-inf, -inf, -inf, -inf, -inf, -inf] of 6 terms"),
        (
            "return LossOutput((inputs.logprob_N - inputs.old_logprob_N).abs().sqrt())",
            "guard its divisions and logarithms",
        ),
        (
            "a = inputs.advantage_N\nreturn LossOutput(-(a - a.mean()) / a.var(correction=0) * inputs.logprob_N)",
            "gives the losses [nan] of a single term, as a pack may hold one, although the inputs are finite",
        ),
        ("return 1 / 0", "raised ZeroDivisionError: division by zero ("),
        ("return LossOutput(inputs.logprobs)", "mine.py, line 5); correct it"),
        (
            "return LossOutput(inputs.logprob_N, figures={'x': 3})",
            "returned figures['x'] = 3 (a int); give a torch tensor with one number per term",
        ),
        ("return LossOutput(inputs.logprob_N, torch.ones(2))", "returned clipped_N of the shape [2], but there are 6 terms"),
        (
            "return LossOutput(inputs.logprob_N, figures={'weight': inputs.advantage_N})",
            'returned a figure named "weight", a name that is taken; rename it',
        ),
        (
            "return LossOutput(inputs.logprob_N, figures={f'of_{len(inputs)}': inputs.advantage_N})",
            "names its figures ['of_6'] and then ['of_1']; name the same always",
        ),
    ],
)
def test_what_is_refused_before_the_run(built: Any, body: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        built(body)
    assert "loss.policy is '" in str(caught.value) and ", but the function " in str(caught.value)
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("head", "name", "says"),
    [
        (HEAD, "other", "does not have it; it has LossOutput, my_loss"),
        ("import nothing_of_this_name\n" + HEAD, "my_loss", "running the file failed: ModuleNotFoundError: No module named"),
        ("my_loss = 3\ndef f():\n", "my_loss", "has it as 3 (a int), which cannot be called"),
        ("def my_loss(inputs):\n", "my_loss", "takes (inputs); it is called with two arguments"),
    ],
)
def test_what_cannot_be_loaded_or_called(built: Any, head: str, name: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        built("return None", head=head, name=name)
    assert "loss.policy is '" in str(caught.value) and says in str(caught.value)


def test_a_file_that_is_not_there() -> None:
    with pytest.raises(ConfigError, match=r"loss.policy is '/no/mine.py:f', but the file '/no/mine.py' does not exist"):
        build_loss(LossConfig(policy="/no/mine.py:f"))


def test_what_goes_wrong_later_names_the_function_too(built: Any) -> None:
    """Beyond six terms this one returns a sum."""
    chosen = built("n = len(inputs)\nreturn LossOutput(inputs.logprob_N if n < 7 else inputs.logprob_N.sum())")
    with pytest.raises(TrainingError, match=r"loss.policy is '.*mine.py:my_loss', and the function returned loss_N of the"):
        chosen.function(inputs([1.0] * 7, [1.0] * 7), LossConfig())
