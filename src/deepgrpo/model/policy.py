"""The policy: a Hugging Face causal LM with its tokenizer, as the engine and the learner use it."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from deepgrpo.errors import ModelError, first_line
from deepgrpo.model import tree_attention
from deepgrpo.model.adapters import has_adapters, load_adapters
from deepgrpo.model.directory import require_config
from deepgrpo.model.head import Head, find_head
from deepgrpo.model.logprobs import chunked_logprobs, entropy
from deepgrpo.model.narrow import is_narrow
from deepgrpo.model.shape import shape_of, text_part
from deepgrpo.model.tree_attention import TreePlan
from deepgrpo.model.tree_gate import PackingVerdict, judge_model


@dataclass
class Policy:
    """A causal LM with its tokenizer. Weights are float32, frozen ones may be narrower (`narrow.py`); arithmetic is in `dtype`.

    The model's weights are the only mutable state; `version` counts the optimizer steps that produced them.
    """

    model: nn.Module
    """Trainable model, wrapped by peft if adapters are trained."""
    tokenizer: Any
    context: int
    """Longest prompt plus response, in tokens."""
    dtype: torch.dtype = torch.float32
    logprob_chunk: int = 256
    """Rows of logits held in memory at a time."""
    logprob_keep: int = 2**28
    """Bytes of probabilities saved in the forward pass for the backward pass."""
    version: int = 0
    verdict: PackingVerdict = field(default_factory=lambda: PackingVerdict(False, "learner.tree_packing is off"))
    """Result of `try_tree_packing`: whether the learner may pack trees."""
    narrow: bool = field(init=False)
    """True if frozen matrices are stored in 16 bits."""
    head: Head | None = field(init=False)
    """Map from the last hidden state to logits; None if it is not known, and full logits are computed."""
    head_reason: str = field(init=False)
    """Reason for a missing `head`; empty if it is known."""

    def __post_init__(self) -> None:
        self.narrow = is_narrow(self.model)
        self.head, self.head_reason = find_head(self.causal)

    @property
    def plain_head(self) -> bool:
        """True if `run` returns hidden states, from which log-probs are computed in chunks; False if full logits."""
        return self.head is not None

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def causal(self) -> Any:
        """The Hugging Face model itself, adapters in place but without peft's wrapper."""
        return self.model.get_base_model() if has_adapters(self.model) else self.model  # type: ignore[operator]

    @property
    def token_rows(self) -> int:
        """Rows of the embeddings: every id below is a token that the model can read."""
        try:
            return int(self.causal.get_input_embeddings().weight.shape[0])
        except (NotImplementedError, AttributeError):  # a model's own code may have embeddings of its own kind
            return shape_of(self.causal.config).vocabulary

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Every token that ends a text: the tokenizer's EOS and those of the generation config, if the model has them."""
        configured = getattr(getattr(self.causal, "generation_config", None), "eos_token_id", None)
        ids = configured if isinstance(configured, list | tuple) else [configured]
        rows = self.token_rows
        return tuple(sorted({i for i in (*ids, self.tokenizer.eos_token_id) if isinstance(i, int) and 0 <= i < rows}))

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        stored = torch.float32 if self.narrow else next(self.model.parameters()).dtype
        if stored == self.dtype:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)

    def run(self, rows: Tensor, **inputs: Any) -> Tensor:
        """Run the model and return its output at `rows` `[N]`, which index the flattened `[B * T]` positions.

        The output is the last hidden state `[N, H]`, or the logits `[N, V]` without a `head`; `logits` takes both.
        """
        output = self.causal.base_model(**inputs).last_hidden_state if self.plain_head else self.causal(**inputs).logits
        selected: Tensor = output.flatten(0, 1)[rows]
        return selected

    def logits(self, output: Tensor) -> Tensor:
        """Logits `[N, V]` from the output of `run`."""
        if self.head is None:
            return output
        return self.head.finish(self.causal.get_output_embeddings()(output))

    def logprobs(
        self, input_ids_BT: Tensor, rows_N: Tensor, target_N: Tensor, *, temperature: float, with_entropy: bool = False,
        positions_BT: Tensor | None = None, segments: Sequence[tuple[int, int, int, int]] = (),
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Log-probs of `target_N`, each predicted at position `rows_N` of the flattened `[B * T]` input.

        Without `segments` the rows are right-padded paths. Causal attention hides the padding from every real token, so
        they need no mask. With `segments` the input is one pack of trees, `[1, S]`; its segments (start, end, until,
        parent) define which tokens are visible to which.

        Returns `[N]` log-probs (differentiable) and `[N]` entropies in nats (zeros unless `with_entropy`).
        """
        inputs: dict[str, Any] = {"input_ids": input_ids_BT, "use_cache": False}
        maskless: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
        if segments:
            inputs |= {"position_ids": positions_BT, "tree_plan": TreePlan(tuple(segments), self.verdict.kernel)}
            maskless = tree_attention.without_mask()
        with self.autocast(), maskless:
            if self.head is None:
                logits_NV = self.run(rows_N, **inputs).float() / temperature
                log_p_NV = torch.log_softmax(logits_NV, -1)
                logprob_N = log_p_NV.gather(1, target_N[:, None]).squeeze(1)
                with torch.no_grad():
                    entropy_N = entropy(log_p_NV) if with_entropy else torch.zeros_like(logprob_N)
                return logprob_N, entropy_N
            hidden_NH = self.run(rows_N, **inputs)
        layer = self.causal.get_output_embeddings()
        return chunked_logprobs(
            hidden_NH, layer.weight, layer.bias, target_N, scale=self.head.scale, softcap=self.head.softcap,
            temperature=temperature, chunk=self.logprob_chunk, with_entropy=with_entropy, keep_bytes=self.logprob_keep,
        )  # fmt: skip

    def trainable(self) -> dict[str, nn.Parameter]:
        """Trainable parameters by name."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def try_tree_packing(self) -> PackingVerdict:
        """Test whether this model can be trained on packs of trees; if so, switch it to tree attention."""
        self.verdict = judge_model(self.causal, self.dtype)
        return self.verdict

    def adopt_verdict(self, verdict: PackingVerdict) -> None:
        """Adopt the verdict of another process about the same model, and its attention if the verdict is yes."""
        self.verdict = verdict
        if verdict.packs:
            tree_attention.register()
            self.causal.set_attn_implementation(tree_attention.NAME)

    @property
    def layers(self) -> nn.ModuleList | None:
        """Decoder layers: the language model's first ModuleList of the length in the config; None if there is none."""
        wanted = shape_of(self.causal.config).layers
        lists = (module for module in text_part(self.causal).modules() if isinstance(module, nn.ModuleList))
        return next((module for module in lists if len(module) == wanted), None)

    def checkpoint_activations(self) -> None:
        """Recompute activations in every backward pass from now on."""
        model: Any = self.causal
        # the method was renamed within transformers 5
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})

    def save(self, directory: Path) -> None:
        """Write model (safetensors) and tokenizer in the Hugging Face layout; adapters in peft's."""
        self.model.save_pretrained(directory)  # type: ignore[operator]
        self.tokenizer.save_pretrained(directory)

    def load_weights(self, directory: Path) -> None:
        """Load the weights that `save` wrote. Raises ModelError if they do not fit the model."""
        try:
            if has_adapters(self.model):
                load_adapters(self.model, directory)
                return
            require_config(directory, str(directory))
            # transformers' own reader: some families store weights in another layout than they hold in memory
            causal = self.causal
            fresh, info = type(causal).from_pretrained(directory, dtype=torch.float32, output_loading_info=True)
            wrong = [*info["missing_keys"], *info["unexpected_keys"], *info["mismatched_keys"]]
            if wrong:
                raise _does_not_fit(directory, f"missing or left over: {sorted(map(str, wrong))[:3]}")
            causal.load_state_dict(fresh.state_dict())
        except RuntimeError as error:  # names or shapes differ
            raise _does_not_fit(directory, first_line(error)) from error


def _does_not_fit(directory: Path, why: str) -> ModelError:
    return ModelError(f"the weights in {directory} do not fit the model: {why}; was the recipe's [model] changed?")


@dataclass
class Reference:
    """The frozen start model of the KL term."""

    policy: Policy
    """A frozen copy, or the trained policy itself if disabling its adapters restores the start model."""
    adapters: bool

    @contextlib.contextmanager
    def active(self) -> Iterator[Policy]:
        """Yield a policy that computes with the start model inside the block."""
        if self.adapters:
            with self.policy.model.disable_adapter():  # type: ignore[operator]
                yield self.policy
        else:
            yield self.policy

    @classmethod
    def of(cls, policy: Policy) -> Reference:
        """Freeze the present weights. Without adapters this copies the model."""
        if has_adapters(policy.model):
            return cls(policy, True)
        frozen = copy.deepcopy(policy.model).requires_grad_(False).eval()
        copied = copy.copy(policy)
        copied.model = frozen
        return cls(copied, False)
