"""Objects in place of sections: the recipe that names them, and what is refused. Nothing is trained here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas
import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from deepgrpo import (
    Callback,
    CallbackError,
    ConfigError,
    DataError,
    ModelError,
    Run,
    StepReport,
    evaluate,
    load_recipe,
    train,
)
from deepgrpo.config import (
    Config,
    GivenData,
    GivenModel,
    UserExplore,
    UserReward,
    WeightedReward,
    given_keywords,
    parse_config,
    to_toml,
)
from deepgrpo.explore.base import Context, Stateless
from deepgrpo.explore.user import UserStrategy
from deepgrpo.ledger import Ledger
from deepgrpo.library.callbacks import Callbacks
from deepgrpo.library.given import build_config
from deepgrpo.library.objects import Given
from deepgrpo.loading import load_object
from deepgrpo.model import tree_attention
from deepgrpo.model.given import digest_of, given_policy, handed_back
from deepgrpo.prompts.source import build_source
from deepgrpo.prompts.tasks import read_rows
from deepgrpo.rewards import build_reward
from tiny import byte_tokenizer, save_model

PLAIN = {"data": {"template": {"chat": False}}}
ROWS = [{"prompt": "1 + 1 = ", "answer": "2"}, {"prompt": "2 + 3 = ", "answer": "5"}]


def small_model(**changes: Any) -> LlamaForCausalLM:
    shape = {
        "vocab_size": 258, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
        "max_position_embeddings": 64, "bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0,
    }  # fmt: skip
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**shape, **changes}))


def ends_in_answer(completions: list[str], answer: list[str], **columns: Any) -> list[float]:
    return [float(text.endswith(right)) for text, right in zip(completions, answer, strict=True)]


def length(completion_ids: list[list[int]]) -> list[float]:
    return [float(len(ids)) for ids in completion_ids]


def all_given(**changes: Any) -> Given:
    given = {"model": small_model(), "tokenizer": byte_tokenizer(), "dataset": ROWS, "rewards": ends_in_answer}
    return Given(**{**given, **changes})


# ---------------------------------------------------------------- the recipe


def test_sections_hold_the_objects_and_files_name_them(tmp_path: Path) -> None:
    given = all_given(eval_dataset=ROWS[:1])
    config = build_config({**PLAIN, "run": {"steps": 7}}, {"optim.lr": 1e-3}, given)
    assert isinstance(config.model, GivenModel) and config.model.held == (given.model, given.tokenizer)
    assert isinstance(config.data, GivenData) and config.data.held is ROWS
    assert isinstance(config.reward, UserReward) and config.reward.held is ends_in_answer
    assert config.reward.function == "given:ends_in_answer" and config.model.name == "LlamaForCausalLM"
    assert config.eval.data is not None and config.eval.data.held is given.eval_dataset and config.eval.every == 7
    assert config.data.columns.question == "prompt" and config.data.columns.answer == "answer"  # as in the rows
    assert config.optim.lr == 1e-3
    assert given_keywords(config) == ["model", "dataset", "eval_dataset", "rewards"]
    (tmp_path / "config.toml").write_text(to_toml(config))
    read = load_recipe(tmp_path / "config.toml")
    assert read.model.held is None and given_keywords(read) == given_keywords(config)
    assert to_toml(read) == to_toml(config)


def test_keys_of_the_former_sections_are_kept() -> None:
    recipe = {
        "model": {"type": "pretrained", "path": "x", "lora": {"rank": 2}},
        "data": {"type": "jsonl", "path": "x", "limit": 1, "columns": {"question": "q", "answer": "a"}, **PLAIN["data"]},
        "reward": {"type": "math", "truncated_value": "none", "answer_format": "boxed"},
        "explore": {"type": "deep", "gamma": 1.0, "num_rollouts": 3, "segments": {"type": "tokens"}},
    }
    config = build_config(recipe, None, all_given(dataset=[{"q": "?", "a": "1"}], strategy=Stateless))
    assert isinstance(config.model, GivenModel) and config.model.lora is not None and config.model.lora.rank == 2
    assert (config.data.limit, config.data.columns.question, config.data.template.chat) == (1, "q", False)  # type: ignore[union-attr]
    assert config.reward.truncated_value is None
    assert isinstance(config.explore, UserExplore) and config.explore.strategy == "given:Stateless"
    assert config.explore.num_rollouts == 3 and config.explore.segments.type == "tokens"
    named = build_config(recipe, None, all_given(strategy="root"))
    assert named.explore.type == "root"


@pytest.mark.parametrize("form", ["name", "path", "dict", "base", "config"])
def test_a_recipe_in_any_form(form: str, tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text('base = "demo"\n[run]\nsteps = 3\n')
    recipes: dict[str, Any] = {
        "name": "demo", "path": tmp_path / "mine.toml", "base": {"base": "demo", "run": {"steps": 3}},
        "dict": {"model": {"type": "scratch"}, "data": {"type": "synthetic"}, "reward": {"type": "task"}},
        "config": load_recipe(tmp_path / "mine.toml"),
    }  # fmt: skip
    config = build_config(recipes[form], {"run.steps": 2, "explore.type": "root"}, Given())
    assert config.run.steps == 2 and config.explore.type == "root" and config.data.type == "synthetic"
    if form == "config":
        assert build_config(recipes[form], None, Given()) is recipes[form]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rewards": []}, "rewards is empty; pass at least one function"),
        ({"rewards": [3]}, "rewards has a int; pass functions"),
        ({"rewards": ["maths", length]}, "reward.parts.maths.type is 'maths'"),
        ({"rewards": [length], "reward_weights": [1, 2]}, "reward_weights has 2 numbers for 1 rewards"),
        ({"rewards": None, "reward_weights": [1]}, "reward_weights is given without rewards"),
        ({"model": None}, "tokenizer is given without a model"),
        ({"tokenizer": None}, "model is given without its tokenizer; pass tokenizer"),
        ({"dataset": datasets.DatasetDict(train=datasets.Dataset.from_list(ROWS))}, r'one split, e.g. dataset\["train"\]'),
        ({"dataset": datasets.Dataset.from_list(ROWS).to_iterable_dataset()}, "IterableDataset, which is read once"),
        ({"dataset": iter(ROWS)}, "pass a list of dicts, a datasets.Dataset or a data frame"),
        ({"dataset": ["1 + 1"]}, "dataset, row 1 is '1 \\+ 1' \\(a str\\); a row is a dict"),
        ({"model": 3}, "model is a int and tokenizer a .*; pass a causal language model"),
    ],
    ids=lambda value: "" if isinstance(value, str) else next(iter(value)),
)
def test_objects_that_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises((ConfigError, DataError, ModelError), match=message):
        build_config(PLAIN, None, all_given(**changes))


def test_what_cannot_travel_is_refused() -> None:
    with pytest.raises(ConfigError, match=r'save it with model.save_pretrained\(DIR\)'):
        build_config({**PLAIN, "cluster": {}}, None, all_given())


def test_objects_of_another_process_are_missed() -> None:
    """A recipe from a file only names them: each says so where it is needed."""
    wanted = "was an object of the Python program that started the run, and no file has it; name another, or continue the run"
    config = build_config(PLAIN, None, all_given(strategy=Stateless))
    read = parse_config(__import__("tomllib").loads(to_toml(config)))
    assert isinstance(read.model, GivenModel) and isinstance(read.explore, UserExplore)
    with pytest.raises(ConfigError, match=f"model.type: LlamaForCausalLM {wanted}"):
        given_policy(read.model)
    with pytest.raises(ConfigError, match=f"data.type: the dataset {wanted}"):
        read_rows(read.data, __import__("collections").Counter())
    with pytest.raises(ConfigError, match=f"reward.function: ends_in_answer {wanted}"):
        build_reward(read.reward)
    with pytest.raises(ConfigError, match=f"explore.strategy: Stateless {wanted}"):
        UserStrategy.build(read.explore, Context())
    with pytest.raises(ConfigError, match=f"loss.policy: mine {wanted}"):
        load_object("given:mine", "loss.policy")


def test_config_and_resume_exclude_each_other(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="config and resume are both given"):
        train("demo", resume=tmp_path)
    with pytest.raises(ConfigError, match=r"which has no config.toml"):
        train(resume=tmp_path)
    with pytest.raises(ConfigError, match="config is a int; pass a Config"):
        train(3)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="is not a run directory"):
        Run(tmp_path)


# ---------------------------------------------------------------- rows


@pytest.mark.parametrize("kind", [list, tuple, datasets.Dataset.from_list, pandas.DataFrame, np.array])
def test_rows_of_any_kind_are_the_same_prompts(kind: Any) -> None:
    config = build_config(PLAIN, None, all_given(dataset=kind(ROWS)))
    source = build_source(config.data, byte_tokenizer(), seed=0, context=64)
    plain = build_source(build_config(PLAIN, None, all_given()).data, byte_tokenizer(), seed=0, context=64)
    assert source.digest == plain.digest and [p.answer for p in source.head(9)] == ["2", "5"]
    assert source.head(9)[1].columns == ROWS[1]


def test_rows_without_answers_and_a_limit() -> None:
    config = build_config({"data": {**PLAIN["data"], "limit": 1}}, None, all_given(dataset=[{"prompt": "a"}, {"prompt": "b"}]))
    (prompt,) = build_source(config.data, byte_tokenizer(), seed=0, context=64).head(9)
    assert (prompt.question, prompt.answer, prompt.id) == ("a", None, "1")


def test_rows_of_messages_as_trl_has_them() -> None:
    def as_trl_writes_it(prompts: list[Any], completions: list[Any], ground_truth: list[str], **columns: Any) -> list[float]:
        assert prompts[0][-1] == {"role": "user", "content": "1 + 1"}
        return [float(each[0]["content"] == right) for each, right in zip(completions, ground_truth, strict=True)]

    row = {"prompt": [{"role": "system", "content": "Add."}, {"role": "user", "content": "1 + 1"}], "ground_truth": "2"}
    config = build_config(None, None, all_given(dataset=[row], rewards=as_trl_writes_it))
    (prompt,) = build_source(config.data, byte_tokenizer(), seed=0, context=256).head(9)
    assert (prompt.question, prompt.text) == ("1 + 1", "<|system|>Add.\n<|user|>1 + 1\n<|assistant|>")
    reward = build_reward(config.reward)
    assert [score.value for score in reward.score([prompt, prompt], ["2", "3"], [(1,), (2,)])] == [1.0, 0.0]
    reward.close()


# ---------------------------------------------------------------- rewards


def test_several_rewards_are_weighted_parts() -> None:
    async def later(completions: list[str]) -> list[float | None]:
        return [None if text == "none" else 10.0 for text in completions]

    config = build_config(PLAIN, None, all_given(rewards=[ends_in_answer, length, later], reward_weights=[1, 0.5, -1]))
    assert isinstance(config.reward, WeightedReward) and config.reward.success == "sum"
    weights = {name: part.weight for name, part in config.reward.parts.items()}
    assert weights == {"ends_in_answer": 1, "length": 0.5, "later": -1}
    prompts = build_source(config.data, byte_tokenizer(), seed=0, context=64).head(2)
    reward = build_reward(config.reward)
    scores = reward.score([*prompts, prompts[0]], ["2", "none", "x"], [(1, 2), (3,), ()])
    # 1 + .5 · 2 - 10; 0 + .5 and nothing; 0 + 0 - 10
    assert [score.value for score in scores] == [-8.0, 0.5, -10.0]
    reward.close()
    assert given_keywords(config) == ["model", "dataset", "rewards"]


def test_shipped_rewards_by_type_beside_functions() -> None:
    mixed = build_config(PLAIN, None, all_given(rewards=["exact", length, length, lambda completions: completions])).reward
    assert isinstance(mixed, WeightedReward) and list(mixed.parts) == ["exact", "length", "length_2", "lambda"]
    assert mixed.success_part == "exact" and mixed.parts["exact"].held is None and mixed.parts["length_2"].held is length
    named = build_config({**PLAIN, "reward": {"success": "length"}}, None, all_given(rewards=[ends_in_answer, length])).reward
    assert isinstance(named, WeightedReward) and named.success_part == "length"
    one = build_config(PLAIN, None, all_given(rewards="math"))
    assert one.reward.type == "math" and given_keywords(one) == ["model", "dataset"]


# ---------------------------------------------------------------- models


def test_the_digest_knows_shapes_and_tokens_not_weights() -> None:
    tokenizer, model = byte_tokenizer(), small_model()
    digest = digest_of(model, tokenizer)
    with torch.no_grad():
        model.lm_head.weight.add_(1.0)
    assert digest_of(model, tokenizer) == digest != digest_of(small_model(hidden_size=8), tokenizer)
    tokenizer.chat_template = None
    assert digest_of(model, tokenizer) != digest


def test_a_model_is_converted_and_handed_back() -> None:
    model = small_model(attention_dropout=0.5).to(torch.bfloat16).eval()
    model.get_input_embeddings().weight.requires_grad_(False)
    config = build_config(PLAIN, None, all_given(model=model)).model
    assert isinstance(config, GivenModel)
    with handed_back(model):
        policy = given_policy(config)
        assert policy.model is model and model.dtype == torch.float32 and model.config.attention_dropout == 0.0
        assert policy.try_tree_packing().packs and model.config._attn_implementation == tree_attention.NAME
        policy.model.train()
        model.lm_head.weight.requires_grad_(False)
    assert model.config._attn_implementation == "sdpa" and not model.training and model.lm_head.weight.requires_grad
    assert not model.get_input_embeddings().weight.requires_grad


def test_models_that_are_refused() -> None:
    tokenizer = byte_tokenizer()
    frozen = small_model().requires_grad_(False)
    quantized = small_model()
    quantized.is_quantized = True
    no_end = byte_tokenizer()
    no_end.eos_token = None
    blind = small_model()
    with torch.no_grad():
        blind.lm_head.weight[0, 0] = torch.nan
    for held, message in (
        ((frozen, tokenizer), "no parameter of the LlamaForCausalLM requires a gradient"),
        ((quantized, tokenizer), "is quantized, and training needs float32"),
        ((small_model(), no_end), "tokenizer has no EOS token"),
        ((nn.Linear(2, 2), tokenizer), "model is a Linear; pass a causal language model"),
        ((blind, tokenizer), "model gives logits that are not finite"),
    ):
        with pytest.raises(ModelError, match=message):
            given_policy(GivenModel(name="x", digest="y").holding(held))


def test_a_tokenizer_comes_from_where_the_model_was_loaded(tmp_path: Path) -> None:
    path = save_model(tmp_path / "m")
    model = LlamaForCausalLM.from_pretrained(path)
    config = build_config(PLAIN, None, all_given(model=model, tokenizer=None))
    assert config.model.held[1].eos_token_id == 1
    named = build_config(PLAIN, None, Given(model=path, dataset=ROWS, rewards=length))
    assert named.model.type == "pretrained" and given_keywords(named) == ["dataset", "rewards"]


# ---------------------------------------------------------------- callbacks


def test_callbacks_are_checked_before_and_named_after() -> None:
    class Misspelt:
        def on_stp(self, report: Any, trees: Any) -> None: ...

    class Short(Callback):
        def on_step(self, report: Any) -> None:  # type: ignore[override]
            ...

    class Broken:
        def on_step(self, report: Any, trees: Any) -> None:
            torch.rand(7)
            raise KeyError("loss")

    for bad, message in (
        (Misspelt(), "the callback Misspelt has a method on_stp, which is never called; did you mean on_step?"),
        (Short(), r"Short.on_step takes \(report.*; it is called with 2 arguments: def on_step\(self, report"),
        (Broken, r"callbacks has the class Broken; pass an instance: Broken\(...\)"),
        (3, "callbacks has a int without any of the methods on_step, on_eval, on_checkpoint, on_end"),
    ):
        with pytest.raises(ConfigError, match=message):
            Callbacks([bad])
    state = torch.get_rng_state()
    with pytest.raises(CallbackError, match=r"the callback Broken.on_step raised KeyError: 'loss' \(.*test_library_given.py"):
        Callbacks([Broken()]).stepped(StepReport(1, {}, Ledger()), ())
    assert torch.equal(torch.get_rng_state(), state)


# ---------------------------------------------------------------- evaluation


def test_evaluate_needs_data_and_a_reward() -> None:
    model, tokenizer = small_model(), byte_tokenizer()
    with pytest.raises(ConfigError, match="dataset is missing, and no recipe names data"):
        evaluate(model, tokenizer=tokenizer, rewards=length)
    with pytest.raises(ConfigError, match="rewards is missing, and no recipe has a reward"):
        evaluate(model, ROWS, tokenizer=tokenizer)
    recipe = {**PLAIN, "sampling": {"max_new_tokens": 5}, "reward": {"truncated_value": "none"}}
    found = evaluate(model, ROWS, tokenizer=tokenizer, rewards=length, config=recipe, samples=2, k=(2,))
    assert found.metrics["eval/prompts"] == 2 and 0 < found.metrics["eval/greedy"] <= 5
    assert found.metrics["eval/pass@2"] == 1.0 and len(found.rows[1].sampled_rewards) == 2
    again = evaluate(model, ROWS, tokenizer=tokenizer, rewards=length, config=recipe, samples=2, k=(2,), max_rows=1)
    assert again.metrics == found.metrics


def test_a_config_is_equal_to_itself_whatever_it_holds() -> None:
    """Data frames and arrays have no truth value of their own comparison."""
    config = build_config(PLAIN, None, all_given(dataset=pandas.DataFrame(ROWS)))
    assert config == Config.model_validate(config) == config.model_copy()
    assert config.data != config.data.holding(pandas.DataFrame(ROWS))
