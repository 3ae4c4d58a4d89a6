"""reasoning-gym as a source of questions and of scores."""

from __future__ import annotations

import importlib.util
import sys
import time

import pytest

from deepgrpo.config import ReasoningGymData, TaskReward, TemplateConfig
from deepgrpo.errors import ConfigError, MissingExtraError
from deepgrpo.feedback import Score
from deepgrpo.prompts.gym import build_gym, extract_answer
from deepgrpo.prompts.source import build_source
from deepgrpo.prompts.tasks import build_task
from deepgrpo.rewards import build_reward


@pytest.mark.parametrize(
    ("completion", "reference", "answer"),
    [
        ("3", "3", "3"),
        ("4 - 1 = 3.", "3", "3"),
        ("The sum is 1,234, as you see", "1234", "1234"),
        ("it falls to -5.", "-5", "-5"),
        ("so 8-5", "5", "5"),  # a minus between numbers subtracts
        ("x = -2.50 m", "-2.50", "-2.50"),
        ("<answer>7</answer> no, <answer> 8 </answer>, not 9", "8", "8"),
        ("1 and 2\n#### 3", "3", "3"),
        ("1 and 2\n#### The answer is 3 apples", "3", "3"),
        ("thus \\boxed{3} (4 would be wrong)", "3", "3"),
        ("<answer>2</answer>\n#### 3 \\boxed{4}", "2", "2"),
        ("#### 3 \\boxed{4}", "knight", "3 \\boxed{4}"),
        ("\\boxed{\\frac{1}{2}} and \\boxed{", "x", "\\frac{1}{2}"),
        ("  Victoria is a knight.\n", "Victoria is a knight", "Victoria is a knight."),
        ("1 2\n3 4", None, "1 2\n3 4"),
    ],
)
def test_extract_answer(completion: str, reference: str | None, answer: str):
    assert extract_answer(completion, reference) == (answer, True)


@pytest.mark.parametrize(("completion", "reference"), [("", "3"), ("  \n", "cat"), ("no idea", "3"), ("#### ", "3")])
def test_nothing_to_extract(completion: str, reference: str):
    assert not extract_answer(completion, reference)[1]


def test_a_package_that_reasoning_gym_lacks_is_named(monkeypatch: pytest.MonkeyPatch):
    """Before, the message sent the user to install what was installed."""
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(MissingExtraError, match=r"package 'reasoning.gym', which is not installed; run: .*deepgrpo\[gym\]"):
        build_gym(ReasoningGymData(task="chain_sum"))
    lacking = ImportError("No module named 'drawsvg.widgets'", name="drawsvg.widgets")
    said = str(MissingExtraError("reasoning-gym", "gym", 'data.type = "reasoning_gym"', lacking))
    assert "needs the package 'drawsvg', which is not installed" in said and "deepgrpo[gym]" in said


def words():
    """A word-level tokenizer that knows every text, by an unknown token."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="[UNK]")


@pytest.mark.skipif(importlib.util.find_spec("reasoning_gym") is None, reason="the extra gym is not installed")
class TestChainSum:
    DATA = ReasoningGymData(
        task="chain_sum",
        params={"min_terms": 2, "max_terms": 3},
        size=20,
        seed=1,
        template=TemplateConfig(preset="custom", user="{question} Think, then answer.", chat=False),
    )

    @pytest.fixture
    def prompts(self):
        return build_source(self.DATA, words(), seed=0, context=256).head(20)

    def test_prompts(self, prompts):
        assert len(prompts) == 20
        assert prompts[0].question == "State the final answer to the following arithmetic problem: 4 - 1 ="
        assert prompts[0].text.endswith("4 - 1 = Think, then answer.")
        assert (prompts[0].id, prompts[0].answer) == ("chain_sum-1-0", "3")
        assert prompts[0].columns["metadata"]["expression"] == "4 - 1"

    def test_its_verifier_scores_free_text(self, prompts):
        task = build_task(self.DATA)
        for prompt in prompts:
            assert task.verify(prompt, f"Let me see ... that is {prompt.answer}.").value == 1.0
            assert task.verify(prompt, f"so {int(prompt.answer) + 1}").value == 0.0
        score = task.verify(prompts[0], "I do not know")
        assert (score.value, score.parsed) == (0.0, False)

    def test_the_vote_is_over_the_answer_that_is_scored(self, prompts):
        task = build_task(self.DATA)
        assert task.vote(prompts[0], "4 - 1 = 3, not 5\n#### 3") == "3"
        assert task.vote(prompts[0], "I do not know") is None

    def test_the_reward_checks_in_another_process(self, prompts):
        reward = build_reward(TaskReward(timeout_s=20), build_task(self.DATA))
        try:
            right = f"#### {prompts[1].answer}"
            assert reward.score([prompts[0], prompts[1], prompts[0]], ["#### 3", right, "no idea"], [()] * 3) == [
                Score(1.0), Score(1.0), Score(0.0, parsed=False)
            ]  # fmt: skip
            assert reward.score(prompts[:1], ["#### 4"], [()]) == [Score(0.0)]  # 0.01 for a number, below the threshold
        finally:
            reward.close()

    def test_limit(self):
        data = self.DATA.model_copy(update={"limit": 3})
        assert len(build_source(data, words(), seed=0, context=256)) == 3

    def test_the_splits_share_no_question_whatever_their_seeds(self):
        def questions(split: str, seed: int, **changes: int) -> list[str]:
            data = self.DATA.model_copy(update={"split": split, "seed": seed, "size": 400, **changes})
            return [prompt.question for prompt in build_source(data, words(), seed=0, context=256).head(400)]

        train, test = questions("train", 1), questions("test", 2)
        assert not set(train) & set(test)
        assert set(questions("all", 1)) & set(questions("all", 2))  # the seed alone does not separate them
        # an eighth of 400, within four standard errors of 6.6
        assert len(train) + len(questions("test", 1)) == 400 and 24 <= len(test) <= 76
        assert questions("test", 2, limit=3) == test[:3]
        with pytest.raises(ConfigError, match=r"data\.split is 'test', but none of .* questions .*raise data\.size"):
            questions("test", 1, size=1)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"task": "chain_sums"}, "'chain_sums', which reasoning-gym does not have; did you mean 'chain_sum'"),
        ({"task": "qqqq"}, "choose one of .*chain_sum"),
        ({"task": "chain_sum", "params": {"terms": 3}}, r"data.params = {'terms': 3} .* unexpected keyword .*'terms'"),
        ({"task": "chain_sum", "params": {"min_terms": 9, "max_terms": 2}}, "max_terms must be >= min_terms"),
        ({"task": "chain_sum", "params": {"seed": 3}}, "'seed' = 3; set data.seed instead"),
        ({"task": "composite", "params": {"datasets": [{"weight": 2}]}}, "does not suit .*'composite': .*'name'"),
        ({"task": "composite", "params": {"datasets": [{"name": "chain_sums"}]}}, "'chain_sums' not registered"),
    ],
)
def test_bad_recipes(fields: dict, message: str):
    pytest.importorskip("reasoning_gym")
    with pytest.raises(ConfigError, match=message):
        build_task(ReasoningGymData(**fields))


def test_a_composite_of_tasks():
    pytest.importorskip("reasoning_gym")
    datasets = [{"name": "chain_sum", "weight": 2, "config": {"min_terms": 2}}, {"name": "leg_counting"}]
    data = ReasoningGymData(task="composite", params={"datasets": datasets}, size=12, template=TemplateConfig(chat=False))
    prompts = build_source(data, words(), seed=0, context=256).head(12)
    assert {p.columns["metadata"]["source_dataset"] for p in prompts} == {"chain_sum", "leg_counting"}
    reward = build_reward(TaskReward(timeout_s=20), build_task(data))
    try:
        assert {s.value for s in reward.score(prompts, [f"#### {p.answer}" for p in prompts], [()] * 12)} == {1.0}
    finally:
        reward.close()


def test_extraction_takes_linear_time():
    started = time.process_time()  # another process may have the cores
    assert extract_answer("<answer>" * 100_000, "3") == ("<answer>" * 100_000, False)
    assert extract_answer("\\boxed{" * 50_000 + "3", "3") == ("3", True)
    assert extract_answer("1," * 100_000, "3") == ("1", True)
    assert time.process_time() - started < 2
