"""`deepgrpo export`: weights as other tools load them, the card's figures, the upload."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from deepgrpo.config import Config, parse_config, to_toml
from deepgrpo.errors import CheckpointError, ConfigError, HubError, ModelError
from deepgrpo.export.card import CardFacts, model_card
from deepgrpo.export.command import choose_checkpoint, run_export
from deepgrpo.export.measured import evaluation_table, paired_difference
from deepgrpo.export.options import ExportOptions
from deepgrpo.export.weights import WrittenModel
from deepgrpo.ledger import Ledger
from deepgrpo.model.loading import load_policy
from deepgrpo.model.policy import Policy
from deepgrpo.runs.checkpoints import Checkpoints, TrainState
from deepgrpo.runs.layout import RunDir
from deepgrpo.runs.saved import SavedRun
from hub_server import HubServer, hub_server
from tiny import save_model

LEDGER = Ledger(sampled_tokens=1_234_567, verifier_calls=72, optimizer_steps=3, seconds_sample=7200.0, seconds_learn=1800.0)


class NoMoments:
    def save(self, directory: Path) -> None:
        """A checkpoint to export needs no moments."""

    def load(self, directory: Path, updates: int, optimizer_steps: int) -> None: ...


@pytest.fixture(scope="module")
def base(tmp_path_factory: Any) -> str:
    """A model that came in bfloat16."""
    return save_model(tmp_path_factory.mktemp("base"), dtype="bfloat16")


def save_run(directory: Path, base: str, *, steps: Sequence[int] = (1,), best: int | None = None, **model: Any) -> Policy:
    """A run with checkpoints, whose weights differ from those of the base model, and two evaluations."""
    config = parse_config(
        {
            "run": {"steps": 5, "seed": 9}, "model": {"type": "pretrained", "path": base, **model},
            "data": {"type": "hf", "path": "openai/gsm8k", "name": "main"}, "reward": {"type": "math"},
            "explore": {"type": "deep", "gamma": -2.5}, "eval": {"k": [1, 2], "samples": 2},
        }
    )  # fmt: skip
    run = RunDir(directory)
    run.checkpoints.mkdir(parents=True)
    run.eval_folder.mkdir()
    run.config.write_text(to_toml(config))
    policy = load_policy(config.model)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in policy.trainable().values():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    for step in steps:
        state = TrainState(step=step, ledger=LEDGER, best_step=best, best_value=None if best is None else 1.0)
        Checkpoints(run, keep_last=9).save(policy, NoMoments(), state)
    lines = []
    for step, rewards in ((0, (0, 0, 1, 0)), (1, (1, 0, 1, 1))):
        lines.append({
            "step": step, "eval/greedy": sum(rewards) / 4, "eval/prompts": 4.0, "eval/pass@2": 0.75, "eval/sampled": 0.5,
            "eval/sampled_se": 0.1, "eval/length": 12.0,
        })  # fmt: skip
        rows = [
            {"id": f"q{i}", "greedy_reward": reward, "sampled_rewards": [1, 0] if i else [0, 0]}
            for i, reward in enumerate(rewards)
        ]
        run.eval(step).write_text("".join(json.dumps(row) + "\n" for row in rows))
    run.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return policy


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=torch.arange(5, 25)[None]).logits.float()
    return found


def loaded(path: Path, dtype: Any = "auto") -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype)


# ---------------------------------------------------------------- weights


def test_all_weights_come_out_as_they_came_in(tmp_path: Path, base: str, capsys: Any) -> None:
    """bfloat16 in, bfloat16 out, at half the bytes of the checkpoint; transformers loads it, with its tokenizer."""
    policy = save_run(tmp_path / "run", base)
    run = RunDir(tmp_path / "run")
    assert run_export(ExportOptions(tmp_path / "run")) == 0
    stored = load_file(run.export / "model.safetensors")
    assert {t.dtype for t in stored.values()} == {torch.bfloat16}
    own = policy.model.state_dict()
    assert all(torch.equal(stored[name], own[name].bfloat16()) for name in stored) and len(stored) > 10
    sizes = [(place / "model.safetensors").stat().st_size for place in (run.export, run.checkpoint(1) / "model")]
    assert 0.49 < sizes[0] / sizes[1] < 0.55 and abs(sizes[0] / Path(base, "model.safetensors").stat().st_size - 1) < 0.02
    model = loaded(run.export)
    assert model.dtype == torch.bfloat16 and model.config.tie_word_embeddings
    from transformers import AutoTokenizer

    assert AutoTokenizer.from_pretrained(run.export)("ab").input_ids == policy.tokenizer("ab").input_ids
    assert "all weights in bfloat16" in capsys.readouterr().out
    # and in float32, exactly
    with pytest.raises(ConfigError, match=r"exists; choose another with --to DIR, or replace it with --overwrite"):
        run_export(ExportOptions(tmp_path / "run", dtype="float32"))
    assert run_export(ExportOptions(tmp_path / "run", dtype="float32", overwrite=True)) == 0
    assert torch.equal(logits(loaded(run.export)), logits(policy.model))
    assert sorted(p.name for p in (tmp_path / "run").iterdir() if p.name.startswith(".")) == []


def test_adapters_come_out_alone_or_merged(tmp_path: Path, base: str) -> None:
    import peft

    policy = save_run(tmp_path / "run", base, lora={"rank": 4})
    truth = logits(policy.model)
    assert float((truth - logits(loaded(Path(base), torch.float32))).abs().max()) > 0.01
    alone, merged = tmp_path / "alone", tmp_path / "merged"
    run_export(ExportOptions(tmp_path / "run", to=alone))
    assert not (alone / "model.safetensors").exists() and not (alone / "config.json").exists()
    assert json.loads((alone / "adapter_config.json").read_text())["base_model_name_or_path"] == base
    assert torch.allclose(logits(peft.PeftModel.from_pretrained(loaded(Path(base), torch.float32), alone)), truth, atol=1e-6)
    text = (alone / "README.md").read_text()
    assert "library_name: peft" in text and "AutoPeftModelForCausalLM" in text and "(rank 4, alpha 32)" in text
    run_export(ExportOptions(tmp_path / "run", to=merged, merge=True, dtype="float32"))
    assert torch.allclose(logits(loaded(merged)), truth, atol=1e-5)
    run_export(ExportOptions(tmp_path / "run", to=merged, merge=True, overwrite=True))
    # the dtype and the tensors of the base
    stored, came = (load_file(place / "model.safetensors") for place in (merged, Path(base)))
    assert {n: (t.dtype, t.shape) for n, t in stored.items()} == {n: (t.dtype, t.shape) for n, t in came.items()}
    assert json.loads((merged / "config.json").read_text())["dtype"] == "bfloat16"
    exact = load_file(tmp_path / "run" / "checkpoints" / "step-000001" / "model" / "adapter_model.safetensors")
    a, b = (exact[f"base_model.model.model.layers.0.mlp.up_proj.lora_{x}.weight"] for x in "AB")
    wanted = came["model.layers.0.mlp.up_proj.weight"].float() + 32 / 4 * b @ a
    assert torch.equal(stored["model.layers.0.mlp.up_proj.weight"], wanted.bfloat16())


def test_what_does_not_fit(tmp_path: Path, base: str) -> None:
    save_run(tmp_path / "run", base, steps=(1, 3), best=1)
    run = RunDir(tmp_path / "run")
    assert [choose_checkpoint(run, each).step for each in ("newest", "best", "3", "1")] == [3, 1, 3, 1]
    with pytest.raises(CheckpointError, match=r"--checkpoint 2: .* no checkpoint of that step; name newest, best or 1, 3"):
        choose_checkpoint(run, "2")
    with pytest.raises(ConfigError, match="--merge: the run trains all weights"):
        run_export(ExportOptions(run.path, merge=True))
    assert not run.export.exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    with pytest.raises(ConfigError, match="is no export, which is all that --overwrite replaces"):
        run_export(ExportOptions(run.path, to=tmp_path / "mine", overwrite=True))
    # the base is where it was trained: a dtype must be named
    run.config.write_text(run.config.read_text().replace(base, str(tmp_path / "gone")))
    with pytest.raises(ModelError, match=r"the dtype in which the base model came cannot be read .*; name one with --dtype"):
        run_export(ExportOptions(run.path))
    assert run_export(ExportOptions(run.path, dtype="float16")) == 0
    (run.checkpoint(3) / "model" / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"model/config\.json has .* bytes"):
        run_export(ExportOptions(run.path, overwrite=True))
    save_run(tmp_path / "other", base)
    with pytest.raises(CheckpointError, match="no evaluation after its first step, so none is best"):
        choose_checkpoint(RunDir(tmp_path / "other"), "best")


# ---------------------------------------------------------------- card


def card_of(tmp_path: Path, base: str, written: WrittenModel, **model: Any) -> str:
    save_run(tmp_path / "run", base, **model)
    saved = SavedRun(tmp_path / "run")
    config: Config = parse_config(tomllib.loads(saved.recipe))
    return model_card(saved, config, CardFacts(1, LEDGER, written, "me/mine"))


def test_the_card_says_what_was_done(tmp_path: Path, base: str) -> None:
    text = card_of(tmp_path, base, WrittenModel("all weights", "bfloat16", 5))
    front = text.split("---")[1]
    assert "base_model" not in front  # a directory of this machine is nothing on the hub
    assert "library_name: transformers" in front and "datasets:\n- openai/gsm8k" in front and "- deep\n" in front
    for part in (
        f"`{base}`", "all weights in bfloat16", "1 of 5", "`deep`, gamma = -2.5",
        'path = "openai/gsm8k", name = "main"', "| seed | 9 |",
        "| sampled tokens | 1,234,567 |", "| hours | 2.50 (sample 2.00, learn 0.50) |", 'from_pretrained("me/mine")',
        "deepgrpo train recipe.toml",
    ):  # fmt: skip
        assert part in text, part
    (recipe,) = [block for block in text.split("```") if block.startswith("toml\n")]
    assert parse_config(tomllib.loads(recipe[5:])).run.seed == 9


def test_a_recipe_with_fences_stays_one_block(tmp_path: Path, base: str) -> None:
    save_run(tmp_path / "run", base)
    path = tmp_path / "run" / "config.toml"
    path.write_text('# ```\n' + path.read_text())
    saved = SavedRun(tmp_path / "run")
    facts = CardFacts(1, LEDGER, WrittenModel("all weights", "x", 1))
    text = model_card(saved, parse_config(tomllib.loads(saved.recipe)), facts)
    assert "````toml\n# ```\n" in text


def test_evaluations_have_intervals(tmp_path: Path, base: str) -> None:
    save_run(tmp_path / "run", base)
    saved = SavedRun(tmp_path / "run")
    config = parse_config(tomllib.loads(saved.recipe))
    text = evaluation_table(saved, config, 1)
    # Wilson at 1 and 3 of 4: centre (p + 0.4802) / 1.9604, half 1.96 sqrt(p (1 - p) / 4 + 0.06002) / 1.9604
    assert "| greedy accuracy | 25.0% [4.6%, 69.9%] | 75.0% [30.1%, 95.4%] |" in text
    # the mean and 1.96 of its given standard error, within 0 and 1
    assert "| sampled accuracy | 50.0% [30.4%, 69.6%] | 50.0% [30.4%, 69.6%] |" in text
    # per question 0, 1, 1, 1: mean .75, standard error .25
    assert "| pass@2 | 75.0% [26.0%, 100.0%] |" in text
    # differences 1, 0, 0, 1: mean .5, standard deviation .577, standard error .289
    assert "over the same 4 questions: +50.00 points [-6.58, +106.58]" in text
    assert "No evaluation was made at step 3" in evaluation_table(saved, config, 3)
    assert evaluation_table(saved, config, -1) == "The run made no evaluation up to this step."
    saved.paths.final.write_text(json.dumps({"metrics": {"eval/greedy": 0.5}, "questions": 4, "step": 1}))
    assert "On 4 further questions that the training never watched: greedy accuracy 50.0% [15.0%, 85.0%]." in evaluation_table(
        saved, config, 1
    )
    assert "further" not in evaluation_table(saved, config, 0)


def test_a_difference_needs_the_same_questions() -> None:
    rows = [{"id": name, "greedy_reward": reward} for name, reward in (("a", 0), ("b", 1))]
    later = [{"id": name, "greedy_reward": 1} for name in ("a", "b", "c")]
    mean, low, high, count = paired_difference(rows, later) or (0, 0, 0, 0)
    assert (mean, count, low, high) == (0.5, 2, pytest.approx(-0.48, abs=1e-4), pytest.approx(1.48, abs=1e-4))
    assert paired_difference(rows[:1], later) is None


# ---------------------------------------------------------------- upload


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The stand-in, as huggingface_hub sees it: without xet, which only the real one speaks."""
    import huggingface_hub
    from huggingface_hub import constants, hf_api

    with hub_server() as found:
        for module in (constants, hf_api.constants):
            monkeypatch.setattr(module, "ENDPOINT", found.address)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", "hf_of_the_test")
        huggingface_hub.close_session()
        yield found
        huggingface_hub.close_session()


def test_the_hub_gets_every_file_as_it_is(tmp_path: Path, base: str, hub: HubServer, capsys: Any) -> None:
    save_run(tmp_path / "run", base, lora={"rank": 2})
    assert run_export(ExportOptions(tmp_path / "run", push="me/mine")) == 0
    here = {p.name: p.read_bytes() for p in (tmp_path / "run" / "export").iterdir()}
    assert hub.files == {"me/mine": here} and {"README.md", "recipe.toml", "adapter_model.safetensors"} <= set(here)
    assert hub.settings["me/mine"]["visibility"] == "private" and hub.tokens == {"Bearer hf_of_the_test"}
    assert hub.messages == ["Step 1 of run"] and f"uploaded to {hub.address}/me/mine" in capsys.readouterr().out
    assert b'from_pretrained("me/mine")' in here["README.md"]
    run_export(ExportOptions(tmp_path / "run", push="me/open", public=True, overwrite=True))
    assert hub.settings["me/open"]["visibility"] == "public"


def test_an_upload_that_fails_leaves_the_model_here(
    tmp_path: Path, base: str, hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_run(tmp_path / "run", base, lora={"rank": 2})
    for name in ("mine", "a/b/c", "me/ours!"):
        with pytest.raises(ConfigError, match="name a repository as OWNER/NAME"):
            run_export(ExportOptions(tmp_path / "run", push=name))
    hub.refuse = 403
    with pytest.raises(HubError, match=r"--push me/mine: the hub refused .*; use a token with write access .* whole in"):
        run_export(ExportOptions(tmp_path / "run", push="me/mine"))
    assert (tmp_path / "run" / "export" / "adapter_model.safetensors").is_file()
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(ConfigError, match=r"--push needs a token .*hf auth login, or set HF_TOKEN"):
        run_export(ExportOptions(tmp_path / "run", push="me/mine", overwrite=True))
