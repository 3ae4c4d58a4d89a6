"""Checks of a loaded model: nothing in it is random or NaN, it never looks ahead, it can read its own tokens and prompts."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from deepgrpo.errors import ModelError
from deepgrpo.model.policy import Policy
from deepgrpo.model.shape import text_part
from deepgrpo.records import Prompt


def require_all_weights(causal: Any, said: str, info: Mapping[str, Any]) -> None:
    """Raise ModelError if transformers made weights up or left layers out: it reports both, and goes on.

    Args:
        said: the key and its value, for the message.
        info: transformers' `loading_info`.
    """
    names = dict(causal.named_parameters())
    for key in info["mismatched_keys"]:
        name, stored, wanted = key if isinstance(key, tuple) else (key, "another shape", "its own")
        raise ModelError(
            f"the weights of {said} do not fit its config.json: {name} has the shape {_shape(stored)} and should have "
            f"{_shape(wanted)}; copy the config.json that belongs to the weights"
        )
    missing = sorted(str(name) for name in info["missing_keys"] if name in names)
    if missing:
        kinds = ", ".join(getattr(causal.config, "architectures", None) or [])
        raise ModelError(
            f"the weights of {said} lack {len(missing)} of the {len(names)} parameters of a {type(causal).__name__} "
            f"({', '.join(missing[:3])}), which would be random"
            + (f"; they are those of {kinds}" if kinds and kinds != type(causal).__name__ else "")
            + "; name a model with the weights of a causal language model, all of them"
        )
    known = {re.sub(r"\d+", "#", name) for name in names}
    further = sorted(str(key) for key in info["unexpected_keys"] if re.sub(r"\d+", "#", str(key)) in known)
    if further:
        raise ModelError(
            f"the weights of {said} hold more layers than its config.json names ({', '.join(further[:3])}), and the rest would "
            "be left out; copy the config.json that belongs to the weights"
        )


def _shape(size: Any) -> str:
    return str(list(size)) if isinstance(size, Iterable) and not isinstance(size, str) else str(size)


def freeze_other_parts(causal: Any) -> None:
    """Freeze what text does not pass through, such as a vision tower: it gets no gradient, and needs no moments."""
    used = {id(p) for part in (text_part(causal), causal.get_output_embeddings()) if part for p in part.parameters()}
    for parameter in causal.parameters():
        if id(parameter) not in used:
            parameter.requires_grad_(False)


@torch.no_grad()
def require_causal(causal: Any, said: str) -> None:
    """Raise ModelError if a later token changes the logits of earlier ones, as in BERT, or if they are not finite."""
    training = causal.training
    ids = torch.arange(8, device=next(causal.parameters()).device)[None] % causal.get_input_embeddings().weight.shape[0]
    other = ids.clone()
    other[0, -1] = 0
    try:
        causal.eval()
        one, two = (causal(input_ids=each, use_cache=False).logits[0, :-1].float() for each in (ids, other))
    except Exception:  # a model's own code may raise anything; sampling reports it
        return
    finally:
        causal.train(training)
    finite = one.isfinite() & two.isfinite()  # a masked vocabulary has logits of -inf
    if one.isnan().any() or not finite.any(-1).all():
        bad = [name for name, p in causal.named_parameters() if p.isnan().any()]
        raise ModelError(
            f"{said} gives logits that are not finite, so nothing can be sampled: "
            + (f"{len(bad)} of its parameters have NaN ({', '.join(bad[:3])})" if bad else "NaN, or -inf for every token")
            + "; copy or download its weights again"
        )
    if float((one - two)[finite].abs().max()) > 1e-4 * float(one[finite].abs().max()):
        raise looks_ahead(causal, said)


def require_decoder(causal: Any, said: str) -> None:
    """Raise ModelError if the config says that the model looks ahead. Needs no weights; `require_causal` tries it."""
    config = causal.config
    if getattr(config, "is_decoder", None) is False and not getattr(config, "is_encoder_decoder", False):
        raise looks_ahead(causal, said)


def looks_ahead(causal: Any, said: str) -> ModelError:
    """The error for a model that looks ahead."""
    return ModelError(
        f"{said} is a {type(causal).__name__}, which looks ahead: a later token changes what it says about earlier ones. "
        "Name a causal language model; a family that can be both needs is_decoder = true in its config.json"
    )


def require_own_tokens(policy: Policy, said: str) -> None:
    """Raise ModelError if the model can draw tokens that it cannot read, or never ends a text."""
    rows, output = policy.token_rows, policy.causal.get_output_embeddings()
    logits = getattr(getattr(output, "weight", None), "shape", (rows,))[0]
    if logits > rows:
        raise ModelError(
            f"{said} has logits for {logits:,} tokens and embeddings for {rows:,}, so it could draw a token that it cannot "
            "read; resize both alike (model.resize_token_embeddings)"
        )
    if not policy.eos_ids:
        token = policy.tokenizer.eos_token
        raise ModelError(
            f"the EOS token {token!r} (id {policy.tokenizer.eos_token_id}) has no row in the {rows:,} embeddings of {said}, so "
            f"no response could ever end; {_REMEDY}"
        )


def require_rows(policy: Policy, prompts: Callable[[], Iterable[Prompt]], key: str = "data") -> None:
    """Raise ModelError if a prompt has a token beyond the rows of the model's embeddings.

    Args:
        prompts: called only if some token of the tokenizer has no row.
        key: the section that they come from, for the message.
    """
    rows = policy.token_rows
    if max(policy.tokenizer.get_vocab().values(), default=0) < rows:
        return
    for prompt in prompts():
        beyond = next((token for token in prompt.tokens if token >= rows), None)
        if beyond is not None:
            text = policy.tokenizer.convert_ids_to_tokens(beyond)
            raise ModelError(
                f"prompt {prompt.id!r} of {key} has the token {text!r} (id {beyond}), but the model has embeddings for the "
                f"ids below {rows:,} only; {_REMEDY}"
            )


_REMEDY = (
    "the tokenizer belongs to another model, or got tokens without model.resize_token_embeddings: name the right one with "
    "model.tokenizer, or resize and save the model"
)
