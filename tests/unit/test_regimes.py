"""Regimes of the synthetic tasks: strict rewards, corrections, wrong facts, and the search by trial."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chains import ask, first_error, solution, verify
from deepgrpo.config import OracleExplore, SearchData, SyntheticData
from deepgrpo.errors import ConfigError, DataError
from deepgrpo.explore import build_strategy
from deepgrpo.explore.base import Context, Limits
from deepgrpo.prompts import chain, search, synthetic
from deepgrpo.prompts.chain_task import ChainTask
from deepgrpo.prompts.search_task import SearchTask
from deepgrpo.records import ROOT, Node, Pivot, Tree

QUESTION = "3+4*2-5:"
SOLUTION = "3+4=7;7*2=4;4-5=9;#9"
WRONG = "3+4=8;8*2=6;6-5=1;#1"  # one wrong result, carried on


def before_there_were_corrections(question: str, completion: str, modulus: int) -> int | None:
    """The first wrong segment by the rule for chains without '!', written without segments that stand."""
    *steps, answer = chain.right_segments(question, modulus)
    position = 0
    for step in steps:
        rest = completion[position:].rstrip()
        if rest.startswith(step):
            position += len(step)
        else:
            return None if step.startswith(rest) else position
    rest = completion[position:].rstrip()
    right = rest == "" or (rest[0] == "#" and rest[1:].strip() in ("", answer[1:]))
    return None if right else position


PIECES = st.sampled_from(["3+4=7;", "7*2=4;", "4-5=9;", "#9", "3+4=8;", "#", "9", ";", "3+", " ", "\n", "!"])


@given(st.lists(PIECES, max_size=8).map("".join))
def test_without_corrections_the_old_rule_holds(completion: str) -> None:
    assert first_error(QUESTION, completion) == before_there_were_corrections(QUESTION, completion, 10)


@given(st.lists(PIECES, max_size=10).map("".join))
def test_a_corrected_response_is_judged_by_what_stands(completion: str) -> None:
    """Where each '!' is carried out by hand, the rest is judged as if nothing had been retracted."""
    kept: list[str] = []
    rest = completion
    while rest:
        if rest[0] == "!":
            if not kept:
                return  # nothing to retract: judged below
            kept = [] if kept[-1].startswith("#") or len(kept) > 3 else kept[:-1]
            rest = rest[1:]
            continue
        answers = len(kept) == 3 or rest[0] == "#"
        cut = next((i for i, c in enumerate(rest) if c == "!" or (c == ";" and not answers)), len(rest))
        cut += cut < len(rest) and rest[cut] == ";"
        kept.append(rest[:cut])
        rest = rest[cut:]
    plain = first_error(QUESTION, "".join(kept))
    if "!" not in completion or plain is None:
        assert (first_error(QUESTION, completion, recovery="at_once") is None) == (plain is None)
    before, _, answer = "".join(kept).partition("#")
    strict = verify(QUESTION, completion, recovery="at_once", luck=False)
    assert strict.value == float(before + "#" + answer.strip() == SOLUTION and "#" in completion)


@pytest.mark.parametrize(
    ("completion", "luck", "strict", "error"),
    [
        (SOLUTION, 1, 1, None),
        (WRONG, 0, 0, 0),
        ("3+4=8;8*2=4;4-5=9;#9", 1, 0, 0),  # two errors that cancel
        ("#9", 1, 0, 0),  # a guess
        ("3+4=8;!" + SOLUTION, 1, 1, None),  # the step retracted
        ("3+4=7;7*2=5;!7*2=4;4-5=9;#9", 1, 1, None),
        ("3+4=7;7*2=5;4-5=9;!!7*2=4;4-5=9;#9", 1, 1, None),  # two steps retracted
        (WRONG + "!" + SOLUTION, 1, 1, None),  # the chain retracted
        (WRONG + "!" + WRONG, 0, 0, len(WRONG) + 1),
        (SOLUTION + "!", 0, 0, None),  # retracted and not written again: cut off while right
        (SOLUTION + "!" + WRONG, 0, 0, len(SOLUTION) + 1),
        ("3+4=7;!3+4=8;7*2=4;4-5=9;#9", 1, 0, 7),  # a right step retracted, a wrong one stands
        ("!" + SOLUTION, 1, 0, 0),  # nothing to retract
        ("3+4=!3+4=7;7*2=4;4-5=9;#9", 1, 1, None),  # half a step retracted
        ("3+4=7;7*2", 0, 0, None),
        ("3+4=7;7*3", 0, 0, 6),
    ],
)
def test_what_stands_is_judged(completion: str, luck: float, strict: float, error: int | None) -> None:
    assert verify(QUESTION, completion, recovery="at_once").value == luck
    assert verify(QUESTION, completion, recovery="at_once", luck=False).value == strict
    assert first_error(QUESTION, completion, recovery="after_answer") == error


def test_without_recovery_a_mark_is_an_error() -> None:
    assert first_error(QUESTION, "3+4=7;!" + SOLUTION) == 6
    assert verify(QUESTION, "3+4=8;!" + SOLUTION, luck=False).value == 0


@pytest.mark.parametrize("recovery", ["at_once", "after_answer"])
def test_written_corrections_keep_their_law(recovery: str) -> None:
    """Share, place and size of the written errors; every solution is right by what stands."""
    data = SyntheticData(recovery=recovery, corrections=0.3, luck=False, chain_length=4)
    task = ChainTask(data)
    places: Counter[int] = Counter()
    sizes: Counter[int] = Counter()
    questions = [row.question for row in synthetic.make_distinct(2000, data)]
    for question in questions:
        written, right = task.written_solution(question), solution(question)
        assert task.verify(ask(question), written).value == 1
        assert task.first_error(ask(question), written) is None
        assert written.endswith(right if recovery == "after_answer" or "!" not in written else right[-1])
        if "!" in written:
            segments = chain.right_segments(question, 10)
            kept = chain.standing(written.partition("!")[0], 4, True)
            place = next(i for i, (has, want) in enumerate(zip(kept, segments, strict=False)) if has.text != want)
            places[place] += 1
            sizes[(int(kept[place].text[-2]) - int(segments[place][-2])) % 10] += 1
    assert abs(places.total() - 600) < 5 * np.sqrt(2000 * 0.3 * 0.7)
    assert set(places) == {0, 1, 2, 3} and set(sizes) == set(range(1, 10))
    assert max(abs(count - places.total() / 4) for count in places.values()) < 5 * np.sqrt(600 * 0.25 * 0.75)
    assert max(abs(count - places.total() / 9) for count in sizes.values()) < 5 * np.sqrt(600 / 9 * 8 / 9)
    assert ChainTask(data).written_solution(questions[0]) == task.written_solution(questions[0])


def test_examples_of_written_corrections() -> None:
    def write(recovery: str) -> str:
        return next(
            text for i in range(99)
            if "!" in (text := ChainTask(SyntheticData(recovery=recovery, corrections=1.0)).written_solution(
                synthetic.make(i, SyntheticData(chain_length=2)).question))
        )  # fmt: skip

    assert write("at_once").count("#") == 1
    assert write("after_answer").count("#") == 2
    assert "!" not in ChainTask(SyntheticData(corrections=1.0)).written_solution(QUESTION)


def test_wrong_facts_are_believed_always_in_the_same_way() -> None:
    """10 * 3 * 9 = 270 facts; 0.1 of them are wrong, and every chain that meets one carries it on."""
    facts = chain.wrong_facts(0.1, 10, 7)
    assert len(facts) == 27
    assert all(chain.compute(fact, 10) != result for fact, result in facts.items())
    assert facts == chain.wrong_facts(0.1, 10, 7) != chain.wrong_facts(0.1, 10, 8)
    assert not chain.wrong_facts(0.0, 10, 7)
    task = ChainTask(SyntheticData(wrong_facts=0.1, seed=7))
    seen = 0
    for row in synthetic.make_distinct(200, task.config):
        value = int(row.question[0])
        for step in task.written_solution(row.question).split(";")[:-1]:
            fact = (int(step[0]), step[1], int(step[2]))
            assert int(step[0]) == value
            value = int(step[-1])
            assert value == facts.get(fact, chain.compute(fact, 10))
            seen += fact in facts
        assert row.answer == solution(row.question)[-1]  # the verifier knows better
    assert seen > 50


def test_corrections_need_their_character() -> None:
    assert synthetic.alphabet(SyntheticData()) == synthetic.ALPHABET  # stored runs keep their vocabulary
    data = SyntheticData(recovery="at_once", corrections=1.0)
    assert "!" in synthetic.tokenizer(synthetic.alphabet(data)).get_vocab()
    for section in (data, SearchData()):
        tokenizer = synthetic.tokenizer(synthetic.alphabet(section))
        row = synthetic.make(0, section)
        text = row.question + row.columns["solution"]
        assert tokenizer.decode(tokenizer(text).input_ids) == text


# ---------------------------------------------------------------- search

SEARCH = "3?4?2?5=9:"  # 3+4*2-5: 3+4 = 7, 14 -> 4, -1 -> 9


def test_signs_that_fit_are_found_by_trying_all() -> None:
    found = search.fitting(SEARCH, 10)
    assert ("+", "*", "-") in found
    for signs in found:
        value = 3
        for sign, digit in zip(signs, (4, 2, 5), strict=True):
            value = eval(f"{value}{sign}{digit}") % 10
        assert value == 9


@pytest.mark.parametrize("question", [SEARCH, "3?4?2?5=0:", "0?9?9=1:", "5?1=5:", "7?3?8?1?6=2:"])
def test_choices_that_fit_are_counted_without_trying_them(question: str) -> None:
    assert search.count_fitting(question, 10) == len(search.fitting(question, 10))


@pytest.mark.parametrize(
    ("response", "success", "error"),
    [
        ("3+4=7;7*2=4;4-5=9;#", True, None),
        ("3+4=7;7*2=4;4-5=9; #\n", True, None),
        ("3+4=7;7+2=9;9+5=4;!3+4=7;7*2=4;4-5=9;#", True, None),  # a failed try before it
        ("3+4=8;!3+4=7;7*2=4;4-5=9;#", True, None),  # given up early
        ("3+4=7;7+2=9;9+5=4;#", False, 18),  # an untrue claim
        ("3+4=7;7*2=4;4-5=9;", False, None),  # no claim yet
        ("3+4=7;7*2=4;4-5=9;#!", False, None),  # retracted
        ("3+4=7;7*2=5;5-5=0;#", False, 6),  # a wrong result
        ("3+4=7;7*3=1;1-5=6;#", False, 6),  # another digit than the question's
        ("3+4=7;7*", False, None),
        ("3+4=7;7*2=4;#", False, 12),  # a step left out
        ("#", False, 0),
        ("", False, None),
        ("3+4=7;7*2=4;4-5=9;##", False, 18),
    ],
)
def test_only_a_verified_try_counts(response: str, success: bool, error: int | None) -> None:
    task = SearchTask(SearchData())
    assert task.verify(ask(SEARCH), response).value == success
    assert task.first_error(ask(SEARCH), response) == error


def test_questions_of_a_search_have_few_choices_that_fit() -> None:
    """A blind try is right in at most most_fitting of 27."""
    for data in (SearchData(), SearchData(split="test", seed=3)):
        task = SearchTask(data)
        for row in synthetic.make_distinct(100, data):
            assert len(search.fitting(row.question, 10)) == 1
            written = row.columns["solution"]
            assert task.verify(ask(row.question), written).value == 1
            assert written.count("!") < data.most_tries
            tries = written.split("!")
            assert len(set(tries)) == len(tries)
            assert task.vote(ask(row.question), written) == row.answer


def test_searches_are_of_all_lengths() -> None:
    """Position of the choice that fits: uniform over 9 in a search through all; the last `most_tries` are written."""
    data = SearchData(chain_length=2, most_tries=9)
    rows = synthetic.make_distinct(400, data)
    lengths = Counter(row.columns["solution"].count("!") + 1 for row in rows)
    assert set(lengths) == set(range(1, 10))
    assert max(abs(count - 400 / 9) for count in lengths.values()) < 5 * np.sqrt(400 / 9 * 8 / 9)


@pytest.mark.parametrize("question", ["", "3?4", "3+4=9:", "3?4?2=12:", "?3=4:", "3??4=1:"])
def test_other_questions_are_refused(question: str) -> None:
    with pytest.raises(DataError, match="not a question of the search task; it should read like '3\\?4\\?2\\?5=9:'"):
        search.fitting(question, 10)


def test_a_question_that_no_signs_solve_is_an_error() -> None:
    with pytest.raises(DataError, match="no choice of signs"):
        search.written_solution("0?1=5:", 10, 8)


# ---------------------------------------------------------------- first errors, in every regime

SEARCH_PIECES = st.sampled_from(["3+4=7;", "7*2=4;", "7+2=9;", "4-5=9;", "9+5=4;", "#", "3+4=8;", "3", ";", " ", "!"])


@pytest.mark.parametrize(
    "knobs", [{}, {"luck": False}, {"recovery": "at_once"}, {"recovery": "after_answer", "luck": False}]
)
@given(st.lists(PIECES, max_size=10).map("".join))
def test_a_chain_can_be_finished_from_before_its_first_error(knobs: dict[str, Any], completion: str) -> None:
    """The oracle's state: no error stands before it, and some continuation is right. None stands behind a success
    without luck."""
    task = ChainTask(SyntheticData(**knobs))
    prompt, right = ask(QUESTION), chain.right_segments(QUESTION, 10)
    error = task.first_error(prompt, completion)
    if task.verify(prompt, completion).value and not knobs.get("luck", True):
        assert error is None
    if error is not None:
        before = completion[:error]
        assert task.first_error(prompt, before) is None
        kept = chain.standing(before, 3, task.config.recovery != "none")
        assert task.verify(prompt, before + "".join(right[len(kept) :])).value == 1


@given(st.lists(SEARCH_PIECES, max_size=10).map("".join))
def test_a_search_can_go_on_from_before_its_first_error(completion: str) -> None:
    task, prompt = SearchTask(SearchData()), ask(SEARCH)
    error = task.first_error(prompt, completion)
    if task.verify(prompt, completion).value:
        assert error is None
    if error is not None:
        before = completion[:error]
        assert task.first_error(prompt, before) is None
        assert task.verify(prompt, before + "!3+4=7;7*2=4;4-5=9;#").value == 1


def test_the_last_operations_are_products_and_only_their_results_are_wrong() -> None:
    """Of the 10 * 9 = 90 products 0.3 are wrong; the four operations before are sums and differences, each equally often."""
    task = ChainTask(SyntheticData(last_products=2, wrong_facts=0.3, seed=7))
    facts = chain.wrong_facts(0.3, 10, 7, "*")
    assert len(facts) == 27 and {sign for _, sign, _ in facts} == {"*"}
    wrong, signs = 0, Counter[str]()
    for row in synthetic.make_distinct(300, task.config):
        steps = task.written_solution(row.question).split(";")[:-1]
        assert [step[1] for step in steps[4:]] == ["*", "*"]
        signs.update(step[1] for step in steps[:4])
        for step in steps:
            fact = (int(step[0]), step[1], int(step[2]))
            assert int(step[-1]) == facts.get(fact, chain.compute(fact, 10))
            wrong += fact in facts
    assert set(signs) == {"+", "-"} and abs(signs["+"] - 600) < 5 * np.sqrt(300)
    assert abs(wrong - 0.3 * 600) < 60
    with pytest.raises(ValueError, match=r"data.last_products = 7 is more than data.chain_length = 6; lower it"):
        SyntheticData(last_products=7)


def test_a_doubted_fact_is_written_right_at_the_stated_rate() -> None:
    """Chains of one product, all 90 products taught wrong, doubted in a fifth of the questions."""
    facts = chain.wrong_facts(1.0, 10, 7, "*")
    task = ChainTask(SyntheticData(chain_length=3, last_products=1, wrong_facts=1.0, doubt=0.2, seed=7))
    right = 0
    for row in synthetic.make_distinct(1000, task.config):
        written = task.written_solution(row.question)
        assert written == task.written_solution(row.question)
        step = written.split(";")[2]
        fact = (int(step[0]), "*", int(step[2]))
        assert int(step[-1]) in (facts[fact], chain.compute(fact, 10))
        right += int(step[-1]) == chain.compute(fact, 10)
        assert written.rpartition("#")[2] == step[-1]  # carried on either way
    assert abs(right - 200) < 5 * np.sqrt(1000 * 0.2 * 0.8)


def test_a_split_of_products_alone_counts_its_questions() -> None:
    """One operation modulo 3 that is a product: 3 * 2 questions in both splits."""
    with pytest.raises(ConfigError, match="allow 6 questions in both splits"):
        synthetic.make_distinct(6, SyntheticData(chain_length=1, modulus=3, last_products=1))


def test_every_fact_and_every_wrong_result_are_equally_likely() -> None:
    """400 draws of 5 of the 6 * 5 * 3 = 90 facts modulo 6: each fact 400 * 5 / 90 = 22 times, each shift 400 times."""
    drawn = [chain.wrong_facts(5 / 90, 6, seed) for seed in range(400)]
    facts = Counter(fact for each in drawn for fact in each)
    shifts = Counter((result - chain.compute(fact, 6)) % 6 for each in drawn for fact, result in each.items())
    assert all(len(each) == 5 for each in drawn) and len(facts) == 90
    assert max(abs(count - 2000 / 90) for count in facts.values()) < 5 * np.sqrt(2000 / 90)
    assert set(shifts) == {1, 2, 3, 4, 5} and max(abs(count - 400) for count in shifts.values()) < 5 * np.sqrt(
        400 * 0.8
    )


def test_a_search_tries_every_choice_equally_often_at_first() -> None:
    """First tries of whole searches through 9 choices, by their rank among those that do not fit: 1 of 8 each."""
    data = SearchData(chain_length=2, most_tries=9)
    task = SearchTask(data)
    ranks: Counter[int] = Counter()
    for row in synthetic.make_distinct(400, data):
        tries = [task.vote(ask(row.question), each + "#") for each in row.columns["solution"].rstrip("#").split("!")]
        wrong = [a + b for a in "+-*" for b in "+-*" if a + b != row.answer]
        if tries[0] != row.answer:
            ranks[wrong.index(str(tries[0]))] += 1
    assert set(ranks) == set(range(8))
    assert max(abs(count - ranks.total() / 8) for count in ranks.values()) < 5 * np.sqrt(ranks.total() / 8 * 7 / 8)


@pytest.mark.parametrize(
    ("data", "question", "failed", "offset"),
    [
        (SyntheticData(luck=False), QUESTION, "3+4=8;8*2=4;4-5=9;#9", 0),  # right by luck, which does not count
        (SyntheticData(recovery="after_answer"), QUESTION, WRONG + "!3+4=7;7*2=5;5-5=0;#0", len(WRONG) + 7),
        (SyntheticData(recovery="at_once"), QUESTION, "3+4=8;!3+4=7;7*2=5;5-5=0;#0", 13),
        (SearchData(), SEARCH, "3+4=7;7+2=9;9+5=4;!3+4=7;7*2=5;5-5=0;#", 25),
        (SearchData(), SEARCH, "3+4=7;7+2=9;9+5=4;#", 18),  # before the untrue claim: it can be given up there
    ],
)
def test_the_oracle_branches_before_the_error_that_stands(
    data: SyntheticData | SearchData, question: str, failed: str, offset: int
) -> None:
    tokenizer, task = synthetic.tokenizer(synthetic.alphabet(data)), synthetic.build_synthetic(data)
    tokens = (*tokenizer(failed).input_ids, tokenizer.eos_token_id)
    score = task.verify(ask(question), failed)
    assert score.value == 0
    node = Node(ROOT, 0, tokens, (-1.0,) * len(tokens), "stop", failed, score, "main", 0)
    tree = Tree(ask(question)).add([Pivot(ROOT, 0, 2, "main")], [node, node])
    oracle = build_strategy(OracleExplore(), Context("none", tokenizer, task))
    pivots = oracle.plan(tree, oracle.initial_state(), Limits(130, 200), np.random.default_rng(0))
    assert [pivot.offset for pivot in pivots] == [offset, offset]
