"""Models of other shapes than a plain causal LM: each trains as it should, or a sentence at the start says why not."""

from __future__ import annotations

import io
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from rich.console import Console
from safetensors.torch import load_file, save_file

from deepgrpo.cli import main
from deepgrpo.config import Config, PretrainedModel, parse_config
from deepgrpo.errors import ModelError
from deepgrpo.model.loading import context_length, load_policy
from deepgrpo.model.policy import Policy
from deepgrpo.model.shape import ModelShape, shape_of
from deepgrpo.train.dry_run import dry_run
from deepgrpo.train.loop import train
from tiny import byte_tokenizer, save_model, write_jsonl

REWARD = "def odd(prompts, completions, **columns):\n    return [float(sum(map(ord, c)) % 2) for c in completions]\n"


def recipe(model: str, **changes: Any) -> Config:
    """Two steps of `deep` on four questions."""
    Path("odd.py").write_text(REWARD, encoding="utf-8")
    write_jsonl(Path("data.jsonl"), [{"question": f"{i} plus {i}?", "answer": str(2 * i)} for i in range(4)])
    return parse_config({
        "run": {"name": "odd", "steps": 2, "prompts_per_step": 2},
        "model": {"type": "pretrained", "path": model}, "data": {"type": "jsonl", "path": "data.jsonl"},
        "reward": {"type": "user", "function": "odd.py:odd", "truncated_value": "none"},
        "sampling": {"max_new_tokens": 8}, "loss": {"beta": 0.001}, "optim": {"lr": 1e-3}, "log": {"trees_every": "none"},
        "explore": {
            "type": "deep", "num_rollouts": 4, "branches_per_pivot": 2, "expand": "all",
            "segments": {"type": "tokens", "size": 3},
        },
    } | changes)  # fmt: skip


def dry(config: Config) -> str:
    out = io.StringIO()
    dry_run(config, Console(file=out, width=150, highlight=False))
    return out.getvalue()


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def text_sizes() -> dict[str, Any]:
    return {
        "vocab_size": len(byte_tokenizer()), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256,
        "bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0,
    }  # fmt: skip


# ---------------------------------------------------------------- a config inside a config


@pytest.fixture(scope="module")
def gemma3(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model of images and text, whose sizes are in `text_config`."""
    directory = tmp_path_factory.mktemp("gemma3")
    kinds = ["sliding_attention", "full_attention"]
    text = {**text_sizes(), "sliding_window": 64, "query_pre_attn_scalar": 8, "layer_types": kinds}
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.Gemma3Config(
        text_config=text, vision_config={**vision, "image_size": 28, "patch_size": 14}, mm_tokens_per_image=4,
        image_token_index=3, image_token_id=3, boi_token_index=4, eoi_token_index=5,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.Gemma3ForConditionalGeneration(config).save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    return str(directory)


def test_a_model_of_images_and_text_is_trained_on_text(gemma3: str, capsys: pytest.CaptureFixture[str]) -> None:
    config = recipe(gemma3)
    assert "reference" in dry(config)
    policy = load_policy(config.model)  # type: ignore[arg-type]
    assert policy.context == 256
    before = {name: p.clone() for name, p in policy.model.named_parameters()}
    assert not any("vision" in name for name in policy.trainable())
    assert policy.layers is policy.causal.model.language_model.layers  # the vision tower comes first, and has as many
    assert policy.try_tree_packing().packs, policy.verdict.reason

    run = train(config)
    lines = metrics(run)
    assert all(line["mismatch/max"] < 1e-4 and line["grad_norm"] > 0 for line in lines)
    after = load_policy(PretrainedModel(path=str(run / "checkpoints" / "step-000002" / "model")))
    moved = {name for name, p in after.model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == set(policy.trainable())
    train(config.model_copy(update={"run": config.run.model_copy(update={"steps": 3})}), resume=run)
    assert [line["step"] for line in metrics(run)] == [1, 2, 3]

    assert main(["eval", str(run), "--data", "data.jsonl", "--max-new-tokens", "4"]) == 0
    assert main(["doctor", gemma3]) == 0
    assert "context 256" in capsys.readouterr().out


@pytest.mark.parametrize(
    "config",
    [
        transformers.Qwen2VLConfig(architectures=["Qwen2VLForConditionalGeneration"]),
        transformers.LlavaConfig(architectures=["LlavaForConditionalGeneration"]),
        transformers.Mistral3Config(architectures=["Mistral3ForConditionalGeneration"]),
        transformers.T5Config(architectures=["T5ForConditionalGeneration"]),
    ],
    ids=lambda config: config.model_type,
)
def test_a_model_that_transformers_does_not_take_as_a_causal_lm(config: Any, tmp_path: Path) -> None:
    directory = tmp_path / "other"
    config.save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    save_file({"a": torch.zeros(1)}, directory / "model.safetensors")
    says = f"is a {config.architectures[0]} .model_type '{config.model_type}'., which transformers does not load"
    with pytest.raises(ModelError, match=says):
        load_policy(PretrainedModel(path=str(directory)))
    with pytest.raises(ModelError, match=says):
        dry(recipe(str(directory)))


def test_sizes_are_those_of_the_language_model() -> None:
    outer = SimpleNamespace(hidden_size=7, get_text_config=lambda: SimpleNamespace(
        hidden_size=64, num_hidden_layers=3, vocab_size=100, num_attention_heads=4, max_position_embeddings=128,
    ))  # fmt: skip
    assert shape_of(outer) == ModelShape(3, 64, 100, 4, 4, 16, 256, 128)
    # without attention, with a list per layer, without a limit
    other = SimpleNamespace(
        hidden_size=64, num_hidden_layers=2, vocab_size=9, intermediate_size=[8, 24], max_position_embeddings=-1,
    )  # fmt: skip
    assert shape_of(other) == ModelShape(2, 64, 9, 0, 0, 0, 24, None)
    assert context_length(other, SimpleNamespace(model_max_length=10**30)) == 2**20


def test_a_model_without_attention_has_a_dry_run(tmp_path: Path) -> None:
    config = transformers.MambaConfig(vocab_size=258, hidden_size=32, state_size=8, num_hidden_layers=2)
    config.save_pretrained(tmp_path / "mamba")
    byte_tokenizer().save_pretrained(tmp_path / "mamba")
    said = dry(recipe(str(tmp_path / "mamba")))
    assert "memory, total" in said
    assert "memory, cache" not in said


# ---------------------------------------------------------------- weights


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(save_model(tmp_path_factory.mktemp("llama")))


@pytest.fixture
def copy(llama: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(llama, tmp_path / "model"))


def edit(directory: Path, name: str = "config.json", **changes: Any) -> None:
    path = directory / name
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes), encoding="utf-8")


def drop(directory: Path, word: str) -> None:
    weights = {name: w for name, w in load_file(directory / "model.safetensors").items() if word not in name}
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})


def into_shards(directory: Path) -> None:
    (directory / "model.safetensors").rename(directory / "model-00001-of-00002.safetensors")
    named = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": named}), encoding="utf-8")


def one_level_deeper(directory: Path) -> None:
    (directory / "model").mkdir()
    for path in directory.iterdir():
        if path.is_file():
            path.rename(directory / "model" / path.name)


def into_a_run(directory: Path) -> None:
    one_level_deeper(directory)
    for step in ("step-000010", "step-000020"):
        shutil.copytree(directory / "model", directory / "checkpoints" / step / "model")
    (directory / "model").rename(directory / "start")


DAMAGES: list[tuple[str, Callable[[Path], Any], str]] = [
    ("no config", lambda d: (d / "config.json").unlink(), "has no config.json: name a directory .*, or copy"),
    ("a checkpoint", one_level_deeper, r"has no config.json: did you mean '.*/model/model'\?"),
    ("a run", into_a_run, r"has no config.json: it is a run; did you mean '.*/checkpoints/step-000020/model'\?"),
    ("an empty config", lambda d: (d / "config.json").write_text("{}"), "no causal language model.*`model_type` key"),
    ("a damaged config", lambda d: (d / "config.json").write_text("{"), "no causal language model.*not a valid JSON"),
    ("a config that is no table", lambda d: (d / "config.json").write_text("[]"), "no causal language model"),
    ("a word for a number", lambda d: edit(d, hidden_size="x"), "expected int, got str"),
    ("sizes that do not fit", lambda d: edit(d, num_attention_heads=3), "not a multiple of the number of attention heads"),
    ("no weights", lambda d: (d / "model.safetensors").unlink(), "has a config.json and no weights"),
    ("a missing shard", into_shards, r"lacks 1 of its 2 files of weights \(model-00002-of-00002"),
    ("a damaged index", lambda d: (d / "model.safetensors.index.json").write_text("{"), "an index of weights that cannot"),
    ("empty weights", lambda d: (d / "model.safetensors").write_bytes(b""), "no causal language model could be loaded"),
    ("a renamed GGUF", lambda d: (d / "model.safetensors").write_bytes(b"GGUF" + bytes(99)), "no causal language model"),
    ("a layer without weights", lambda d: drop(d, "layers.1."), r"lack 9 of the 20 parameters .*layers\.1\..* would be random"),
    ("more layers than weights", lambda d: edit(d, num_hidden_layers=3), r"lack 9 of the 29 parameters .*layers\.2\."),
    ("fewer layers than weights", lambda d: edit(d, num_hidden_layers=1), r"hold more layers than its config\.json names"),
    ("another width", lambda d: edit(d, vocab_size=300), r"has the shape \[258, 32\] and should have \[300, 32\]"),
    ("a head that is not there", lambda d: edit(d, tie_word_embeddings=False), r"lack 1 of the 21 parameters .*lm_head"),
    ("no tokenizer", lambda d: [p.unlink() for p in d.glob("tokenizer*")], "no tokenizer could be loaded"),
    ("settings of generate", lambda d: (d / "generation_config.json").write_text('{"max_new_tokens": 0}'), "max_new_tokens"),
]


@pytest.mark.parametrize(("damage", "says"), [case[1:] for case in DAMAGES], ids=[case[0] for case in DAMAGES])
def test_a_damaged_model_directory_is_explained(copy: Path, damage: Callable[[Path], Any], says: str) -> None:
    damage(copy)
    with pytest.raises(ModelError, match=says):
        load_policy(PretrainedModel(path=str(copy)))


def test_directories_that_are_none(tmp_path: Path, llama: Path) -> None:
    (tmp_path / "empty").mkdir()
    for path, says in (
        (tmp_path / "empty", "it is empty"), (llama / "config.json", "is a file; name its directory"),
        ("x" * 300, "300 characters"),
    ):  # fmt: skip
        with pytest.raises(ModelError, match=says):
            load_policy(PretrainedModel(path=str(path)))
    with pytest.raises(ModelError, match=r"has no file 'a\.gguf'"):
        load_policy(PretrainedModel(path=str(llama), gguf_file="a.gguf"))


def test_weights_of_a_directory_without_config_are_not_guessed(llama: Path, copy: Path) -> None:
    """transformers would build its default of 6.7 billion parameters."""
    policy = load_policy(PretrainedModel(path=str(llama)))
    (copy / "config.json").unlink()
    before = {name: p.clone() for name, p in policy.trainable().items()}
    with pytest.raises(ModelError, match=r"has no config\.json"):
        policy.load_weights(copy)
    shutil.copy(llama / "config.json", copy)
    drop(copy, "layers.1.")
    with pytest.raises(ModelError, match="do not fit the model: missing or left over"):
        policy.load_weights(copy)
    assert all(torch.equal(p, before[name]) for name, p in policy.trainable().items())


def test_a_model_that_looks_ahead_is_refused(tmp_path: Path) -> None:
    config = transformers.BertConfig(
        vocab_size=258, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.BertForMaskedLM(config).save_pretrained(tmp_path / "bert")
    byte_tokenizer().save_pretrained(tmp_path / "bert")
    path = str(tmp_path / "bert")
    for start in (lambda: load_policy(PretrainedModel(path=path)), lambda: dry(recipe(path))):
        with pytest.raises(ModelError, match="BertLMHeadModel, which looks ahead"):
            start()


# ---------------------------------------------------------------- tokens without a row


def add_token(directory: Path, **changes: Any) -> None:
    """Add a token to the tokenizer, as many fine-tunes do, and no row to the model."""
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|new|>"]})
    for name, value in changes.items():
        setattr(tokenizer, name, value)
    tokenizer.save_pretrained(directory)


def test_a_template_with_a_token_that_the_model_lacks(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    add_token(copy)
    config = recipe(str(copy))
    assert "dry run" in dry(config)  # no prompt has it
    add_token(copy, chat_template="{% for m in messages %}<|new|>{{ m['content'] }}{% endfor %}")
    says = r"prompt '\d' of data has the token '<\|new\|>' \(id 258\), but the model has embeddings for the ids below 258 only"
    with pytest.raises(ModelError, match=says):
        dry(config)
    with pytest.raises(ModelError, match=says):
        train(config)
    assert main(["eval", str(copy), "--data", "data.jsonl"]) == 1
    assert "of the data set 'data' has the token '<|new|>'" in capsys.readouterr().err
    held_out = {"eval": {"every": 1, "data": {"type": "jsonl", "path": "data.jsonl"}}}
    plain = {"data": {"type": "jsonl", "path": "data.jsonl", "template": {"chat": False}}}
    with pytest.raises(ModelError, match=r"of eval\.data has the token"):
        dry(recipe(str(copy), **held_out, **plain))


def test_an_end_that_the_model_lacks(copy: Path) -> None:
    add_token(copy, eos_token="<|new|>")
    (copy / "generation_config.json").unlink(missing_ok=True)
    edit(copy, eos_token_id=None)
    with pytest.raises(ModelError, match=r"the EOS token '<\|new\|>' \(id 258\) has no row in the 258 embeddings"):
        load_policy(PretrainedModel(path=str(copy)))
    # an end in the generation config suffices; others that the model lacks do not matter
    (copy / "generation_config.json").write_text(json.dumps({"eos_token_id": [-1, 1, 9999]}), encoding="utf-8")
    assert load_policy(PretrainedModel(path=str(copy))).eos_ids == (1,)


def test_logits_of_tokens_that_cannot_be_read(llama: Path) -> None:
    from deepgrpo.model.soundness import require_own_tokens

    policy: Policy = load_policy(PretrainedModel(path=str(llama)))
    policy.causal.set_output_embeddings(torch.nn.Linear(32, 300, bias=False))
    with pytest.raises(ModelError, match="logits for 300 tokens and embeddings for 258"):
        require_own_tokens(policy, "model.path = 'x'")


def test_odd_settings_of_generate_do_not_matter(copy: Path) -> None:
    """Sampling does not read them, and a checkpoint can be written."""
    odd = {"temperature": 0.6, "top_p": 0.9, "do_sample": False, "num_beams": 4, "eos_token_id": 1, "pad_token_id": -1}
    (copy / "generation_config.json").write_text(json.dumps(odd), encoding="utf-8")
    run = train(recipe(str(copy)))
    assert all(math.isfinite(line["main/entropy"]) for line in metrics(run))
    assert (run / "checkpoints" / "step-000002" / "model" / "model.safetensors").is_file()
