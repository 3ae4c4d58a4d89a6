"""The oracle: pivots just before the first error, and rollouts in which there is none."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepgrpo.config import OracleExplore, SyntheticData
from deepgrpo.errors import ConfigError
from deepgrpo.explore import build_strategy
from deepgrpo.explore.base import Context, Limits
from deepgrpo.explore.oracle import tokens_before
from deepgrpo.feedback import Score
from deepgrpo.prompts import synthetic
from deepgrpo.prompts.chain_task import ChainTask
from deepgrpo.records import ROOT, Node, Pivot, Prompt, Tree
from deepgrpo.runs.trees import load_trees
from deepgrpo.train.loop import train

LIMITS = Limits(max_new_tokens=30, max_total_tokens=60)
QUESTION = "3+4*2-5:"
RIGHT = "3+4=7;7*2=4;4-5=9;#9"
TOKENIZER = synthetic.tokenizer()
TASK = ChainTask(SyntheticData())


def _tree(*responses: str) -> Tree:
    """Main rollouts by their text; a `$` at the end is EOS, without it they were cut off."""
    prompt = Prompt("p", QUESTION, tuple(TOKENIZER(QUESTION).input_ids), QUESTION)
    nodes = []
    for text in responses:
        tokens = tuple(TOKENIZER(text.rstrip("$")).input_ids) + (TOKENIZER.eos_token_id,) * text.endswith("$")
        ended = text.endswith("$")
        score = TASK.verify(prompt, text.rstrip("$")) if ended else Score(0.0, checked=False)
        nodes.append(
            Node(ROOT, 0, tokens, (-1.0,) * len(tokens), "stop" if ended else "length", text.rstrip("$"), score, "main", 0)
        )
    return Tree(prompt).add([Pivot(ROOT, 0, len(nodes), "main")], nodes)


def _plan(tree: Tree, limits: Limits = LIMITS, **changes: Any) -> list[Pivot]:
    strategy = build_strategy(OracleExplore.model_validate(changes), Context("none", TOKENIZER, TASK))
    return strategy.plan(tree, strategy.initial_state(), limits, np.random.default_rng(0))


@pytest.mark.parametrize(
    ("response", "offset"),
    [
        ("3+4=8;8*2=6;6-5=1;#1$", 0),  # the first step: from the prompt
        ("3+4=7;7*2=5;5-5=0;#0$", 6),
        ("3+4=7;7*2=4;4-5=8;#8$", 12),
        ("3+4=7;7*2=4;4-5=9;#8$", 18),
        ("3+4=7;7*2=4;4-5=9;#99$", 18),
        ("3+4=7;7*2=5;5-", 6),  # cut off behind an error
        ("3+4=7;$", 6),  # ended too early: before EOS
        ("3+4=7;7*$", 8),
        ("3+4=7;7*2=4;4-5=9;$", 18),
        ("$", 0),
    ],
)
def test_the_pivot_is_before_the_first_error(response: str, offset: int) -> None:
    (pivot,) = _plan(_tree(response, RIGHT + "$"))
    assert (pivot.parent, pivot.offset, pivot.num_branches, pivot.stream) == (0, offset, 8, "branch")
    assert (pivot.candidates, pivot.q) == ((offset,), (1.0,))
    length = len(response)  # one token per character, `$` is EOS
    assert pivot.ratio == pytest.approx((offset + 1) / (length + 1))
    assert 0 < pivot.ratio <= 1


def test_no_pivot_without_an_error() -> None:
    assert _plan(_tree(RIGHT + "$", RIGHT + "$")) == []
    assert _plan(_tree("3+4=7;7*2", RIGHT + "$")) == []  # cut off while still right
    assert _plan(_tree("3+4=7;", "3")) == []
    # a success whose errors cancel is no failure
    assert _plan(_tree("3+4=0;7*2=4;4-5=9;#9$", RIGHT + "$")) == []


def test_a_stop_string_has_no_token_behind_the_text() -> None:
    """`sampling.stop = [";"]`: the response ends with the token that completes it, and no EOS follows."""
    tree = _tree("3+4=7;", RIGHT + "$")
    tree = replace(tree, nodes=(replace(tree.nodes[0], finish="stop"), tree.nodes[1]))
    assert [p.offset for p in _plan(tree)] == [5]


def test_no_pivot_at_the_limit() -> None:
    tree = _tree("3+4=7;$", "3+4=8;$")
    assert [p.offset for p in _plan(tree, Limits(7, 60))] == [6, 0]
    assert [p.offset for p in _plan(tree, Limits(6, 60))] == [0]  # no room for a token behind the sixth


def test_failed_rollouts_only_and_one_round() -> None:
    tree = _tree("3+4=8;$", RIGHT + "$", "3+4=7;7*2=5;#5$")
    pivots = _plan(tree, branches_per_pivot=2)
    assert [(p.parent, p.offset) for p in pivots] == [(0, 0), (2, 6)]
    assert _plan(tree.add(pivots, [])) == []
    assert _plan(Tree(tree.prompt), num_rollouts=5) == [Pivot(ROOT, 0, 5, "main")]


def test_it_reports_what_it_could_not_find() -> None:
    strategy = build_strategy(OracleExplore(), Context("none", TOKENIZER, TASK))
    trees = [_tree("3+4=8;$", RIGHT + "$", "3+4=7;7"), _tree("3+4=7;$", "3")]
    state = strategy.observe(strategy.initial_state(), trees)
    assert strategy.report(json.loads(json.dumps(state))) == {"oracle/failed": 4, "oracle/without_error": 2}
    assert strategy.report(strategy.observe(state, [])) == {"oracle/failed": 0, "oracle/without_error": 0}


# ---------------------------------------------------------------- characters and tokens


class Pieces:
    """Tokens are given as their texts; "" is a token without text, such as EOS."""

    def __init__(self, *texts: str) -> None:
        self.texts = texts

    def __call__(self, tokens: Any) -> str:
        return "".join(self.texts[t] for t in tokens)


def test_offsets_by_hand() -> None:
    decode = Pieces("3+", "4=", "7;7", "*", "")
    assert [tokens_before(range(5), n, decode) for n in range(9)] == [0, 0, 1, 1, 2, 2, 2, 3, 4]


@given(st.lists(st.sampled_from(["", "a", "bc", "def"]), max_size=12), st.integers(0, 40))
def test_as_many_tokens_as_fit(texts: list[str], characters: int) -> None:
    decode = Pieces(*texts)
    found = tokens_before(range(len(texts)), characters, decode)
    assert len(decode(range(found))) <= characters
    assert not found or texts[found - 1]  # no empty token at the end
    longer = [n for n in range(found + 1, len(texts) + 1) if len(decode(range(n))) <= characters]
    assert all(len(decode(range(n))) == len(decode(range(found))) for n in longer)


@given(st.text(alphabet=synthetic.ALPHABET, max_size=30), st.integers(0, 30))
def test_the_tokenizer_of_the_task_has_one_token_per_character(text: str, characters: int) -> None:
    tokens = [*TOKENIZER(text).input_ids, TOKENIZER.eos_token_id]
    decode = lambda t: TOKENIZER.decode(t, skip_special_tokens=True)  # noqa: E731
    assert tokens_before(tokens, characters, decode) == min(characters, len(text))


# ---------------------------------------------------------------- in a run


def test_a_run_branches_before_first_errors(recipe: Any) -> None:
    directory = train(
        recipe(explore={"type": "oracle", "num_rollouts": 4, "branches_per_pivot": 2}, log={"trees_every": 1})
    )
    row = json.loads((directory / "metrics.jsonl").read_text().splitlines()[-1])
    assert row["pivots/count"] == row["oracle/failed"] - row["oracle/without_error"] > 0
    for tree in load_trees(directory / "trees" / "step-000003.jsonl.gz"):
        for pivot in tree.pivots[1:]:
            text = tree.nodes[pivot.parent].text
            wrong = TASK.first_error(tree.prompt, text)
            assert pivot.offset == (len(text) if wrong is None else wrong)


def test_other_data_is_refused_in_words(recipe: Any) -> None:
    with pytest.raises(ConfigError, match=r'explore.type is "oracle", but data.type is "jsonl": .* choose explore.type'):
        recipe(
            explore={"type": "oracle"}, data={"type": "jsonl", "path": "x.jsonl"},
            model={"type": "pretrained", "path": "x"}, reward={"type": "exact"},
        )  # fmt: skip
