"""The synthetic task: its arithmetic, its splits, its tokenizer."""

from __future__ import annotations

import numpy as np
import pytest

from chains import first_error, solution, verify
from deepgrpo.config import SyntheticData
from deepgrpo.errors import ConfigError, DataError
from deepgrpo.prompts import synthetic
from deepgrpo.prompts.chain_task import ChainTask
from deepgrpo.records import Prompt

QUESTION = "3+4*2-5:"
# left to right modulo 10: 3+4 = 7; 7*2 = 14 -> 4; 4-5 = -1 -> 9
SOLUTION = "3+4=7;7*2=4;4-5=9;#9"


def test_solution_is_worked_left_to_right_modulo_ten():
    assert solution(QUESTION, 10) == SOLUTION
    # modulo 7: 3+4 = 7 -> 0; 0*2 = 0; 0-5 = -5 -> 2
    assert solution(QUESTION, 7) == "3+4=0;0*2=0;0-5=2;#2"


@pytest.mark.parametrize(
    ("completion", "value", "parsed"),
    [
        (SOLUTION, 1.0, True),
        ("#9", 1.0, True),
        ("First 7, then 4, then 9. #### 9\n", 1.0, True),
        ("#3#9", 1.0, True),
        ("#9#3", 0.0, True),
        ("#", 0.0, True),
        ("#99", 0.0, True),
        ("# 9 .", 0.0, True),
        ("3+4=7;7*2=4;4-5=9;9", 0.0, False),
        ("", 0.0, False),
    ],
)
def test_verify(completion: str, value: float, parsed: bool):
    score = verify(QUESTION, completion, 10)
    assert (score.value, score.parsed, score.problem) == (value, parsed, None)


@pytest.mark.parametrize(
    ("completion", "offset"),
    [
        (SOLUTION, None),
        (SOLUTION + " \n", None),
        ("3+4=7;7*2=4;4-5=9;# 9", None),  # verify forgives the blank too
        ("", None),  # cut off while right
        ("3+4=7;7*", None),
        ("3+4=7;7*2=4;4-5=9;", None),
        ("3+4=7;7*2=4;4-5=9;#", None),
        ("3+4=7;7*2=5;5-5=0;#0", 6),  # the second step starts at 6
        ("3+4=7;7*3", 6),
        ("4", 0),
        ("3+4=8;8*2=6;6-5=1;#1", 0),
        ("3+4=7;7*2=4;#4", 12),  # a step left out: the third segment is wrong
        ("3+4=7;7*2=4;4-5=9;#8", 18),
        ("3+4=7;7*2=4;4-5=9;#99", 18),
        ("3+4=7;7*2=4;4-5=9;9+1=0;#0", 18),  # goes on where the answer should stand
        ("3+4=7 7*2=4;4-5=9;#9", 0),  # no ';'
        ("#9", 0),  # verifies, but its steps are missing
    ],
)
def test_first_error_is_the_start_of_the_first_wrong_segment(completion: str, offset: int | None):
    assert first_error(QUESTION, completion, 10) == offset


def test_make_is_a_pure_function_of_seed_split_and_index():
    config = SyntheticData(chain_length=6)
    row = synthetic.make(5, config)
    assert row == synthetic.make(5, config)
    assert row.question != synthetic.make(6, config).question
    assert row.question != synthetic.make(5, SyntheticData(chain_length=6, seed=1)).question
    assert len(row.question) == 14  # 1 digit + 6 * (sign, digit) + ':'
    assert set(row.question + solution(row.question, 10)) <= set(synthetic.ALPHABET)
    assert row.answer == solution(row.question, 10)[-1]


def test_all_starts_operations_and_operands_occur():
    rows = [synthetic.make(i, SyntheticData(chain_length=3, modulus=5)) for i in range(300)]
    starts = {row.question[0] for row in rows}
    operands = {digit for row in rows for digit in row.question[2:-1:2]}
    assert starts == set("01234")
    assert operands == set("1234")
    # 900 draws of 3 signs: 300 each, standard deviation sqrt(900 * 1/3 * 2/3) = 14.1
    signs = np.array([[row.question[1::2].count(sign) for sign in "+-*"] for row in rows]).sum(axis=0)
    assert abs(signs - 300).max() < 5 * 14.2


def test_splits_share_no_question():
    # chain_length 1, modulus 10: 10 * 3 * 9 = 270 questions in both splits together
    found = {
        split: {synthetic.make(i, SyntheticData(chain_length=1, split=split, seed=seed)).question
                for i in range(2000) for seed in (0, 1)}
        for split in ("train", "test")
    }  # fmt: skip
    assert not found["train"] & found["test"]
    assert len(found["train"] | found["test"]) == 270
    # about one in 8: 33.75, standard deviation 5.4
    assert 14 <= len(found["test"]) <= 54


def test_questions_by_their_index():
    # every stored result rests on these: a change of the stream changes all runs
    questions = {
        split: [synthetic.make(i, SyntheticData(split=split)).question for i in (0, 1)] for split in ("train", "test")
    }
    assert questions["train"] == ["0+4*6*2-9*3*8:", "8-9+1+3*6+8+9:"]
    assert questions["test"] == ["7+8-8*7*7+1+2:", "0-6+4*4*1+9*8:"]
    assert synthetic.make(0, SyntheticData(seed=1)).question != questions["train"][0]


def test_size_gives_distinct_questions():
    rows = synthetic.make_distinct(200, SyntheticData(chain_length=1))
    assert len({row.question for row in rows}) == len({row.id for row in rows}) == 200


def test_too_small_a_space_is_an_error():
    """Both splits together have 270 questions, and the test split 38 of them, drawn often enough."""
    for split, there in (("train", 232), ("test", 38)):
        data = SyntheticData(chain_length=1, split=split)
        assert len(synthetic.make_distinct(there, data)) == there
        said = rf"data.size .* is {there + 1}, .* allow 270 questions in both splits, {there} of them in '{split}'"
        with pytest.raises(ConfigError, match=said):
            synthetic.make_distinct(there + 1, data)


def test_a_split_without_questions_is_an_error():
    # modulus 2, chain_length 1: 2 * 3 * 1 = 6 questions; whichever split they all miss must say so, not hang
    for split in ("train", "test"):
        config = SyntheticData(chain_length=1, modulus=2, split=split)
        questions = [f"{start}{sign}1:" for start in "01" for sign in "+-*"]
        if any(synthetic.is_test(q) == (split == "test") for q in questions):
            assert synthetic.make(0, config).question in questions
        else:
            with pytest.raises(ConfigError, match="allow 6 questions"):
                synthetic.make(0, config)


@pytest.mark.parametrize("question", ["", "3+", "What is 1+1?", "3/4:", "3+4*:"])
def test_other_questions_are_refused(question: str):
    with pytest.raises(DataError, match="not a question of the synthetic task"):
        solution(question, 10)


def test_task_reads_prompts():
    task = ChainTask(SyntheticData())
    prompt = Prompt("p", QUESTION, (2,), QUESTION)
    assert task.written_solution(prompt.question) == SOLUTION
    assert task.verify(prompt, SOLUTION).value == 1.0
    assert task.first_error(prompt, "3+4=8;") == 0


class TestTokenizer:
    def test_one_token_per_character_and_exact_round_trip(self):
        tokenizer = synthetic.tokenizer()
        text = QUESTION + SOLUTION
        ids = tokenizer(text)["input_ids"]
        assert len(ids) == len(text)
        assert tokenizer.decode(ids) == text
        assert [tokenizer.decode([i]) for i in ids] == list(text)
        assert tokenizer.decode([*ids, tokenizer.eos_token_id], skip_special_tokens=True) == text
        assert tokenizer.decode([*ids, tokenizer.eos_token_id]) == text + "<eos>"
        assert len(tokenizer) == len(synthetic.ALPHABET) + 2
        assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (0, 1)

    def test_save_and_load_gives_the_same_tokenizer(self, tmp_path):
        from transformers import AutoTokenizer, PreTrainedTokenizerFast

        tokenizer = synthetic.tokenizer()
        tokenizer.save_pretrained(tmp_path)
        for loaded in (PreTrainedTokenizerFast.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)):
            assert loaded.get_vocab() == tokenizer.get_vocab()
            assert loaded.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()
            ids = loaded(QUESTION + SOLUTION)["input_ids"]
            assert ids == tokenizer(QUESTION + SOLUTION)["input_ids"]
            assert loaded.decode(ids) == QUESTION + SOLUTION
            assert (loaded.pad_token, loaded.eos_token, loaded.clean_up_tokenization_spaces) == (
                "<pad>",
                "<eos>",
                False,
            )
