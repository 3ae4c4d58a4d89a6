"""What a report says of a run: figures worked by hand, trees in blocks, and a page that no text can break out of."""

from __future__ import annotations

import base64
import gzip
import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepgrpo.credit.siblings import sibling_credit
from deepgrpo.errors import DataError
from deepgrpo.explore.pivots import candidates
from deepgrpo.records import ROOT, CreditSpan, Pivot, Tree
from deepgrpo.report.blocks import TreeIndex, choose_steps, pack, tree_blocks, tree_json
from deepgrpo.report.command import label_runs, unique
from deepgrpo.report.curves import metric_columns, run_warnings
from deepgrpo.report.page import page_parts, safe_json
from deepgrpo.report.pivots import (
    PivotOutcome,
    candidate_ratios,
    columns,
    pivot_outcomes,
    q_mass,
    q_over_time,
    reliability,
)
from deepgrpo.report.run_page import build_page
from deepgrpo.report.tokens import TokenTexts, own_text, read_tokens, segment_ends
from deepgrpo.runs.facts import FLAGS, tree_facts
from deepgrpo.runs.saved import SavedRun, nearest
from deepgrpo.runs.trees import SavedTree, load_trees
from deepgrpo.train import metrics as train_metrics
from saved_runs import encode, node, random_run, random_tree, small_tree, tokenizer, write_run

HOSTILE = [
    "</script><script>document.title='broken'</script>",
    "<!--<script>", "]]>", "&lt;b&gt;", "\u2028\u2029", "\u202egnp.exe", "a\x00b\x1b[31mc\x7f", "\ud800",
    "𝔸👩\u200d👩\u200d👧é", "$title ${style} %s {0}",
    "'\"`\\",
]  # fmt: skip

LONE_SURROGATE = "\ud800"
"""JSON can spell it, UTF-8 cannot: a warning may hold it, a saved tree may not."""


def saved(tree: Tree, step: int = 1, number: int = 0) -> SavedTree:
    return SavedTree(step, number, tree, sibling_credit(tree).spans)


def unpack(text: str) -> Any:
    """As the page does it."""
    return json.loads(gzip.decompress(base64.b64decode(text)))


def texts() -> TokenTexts:
    return TokenTexts(tokenizer().backend_tokenizer)


# ---------------------------------------------------------------- trees and their names


def test_the_verdict_of_a_tree_worked_by_hand() -> None:
    verdict = tree_facts(small_tree())
    # rewards 0 and 1 are unequal; of the one pivot's branches (1, 0) the first beats the rollout's 0
    assert verdict.flags == {"rescued", "mixed"}
    assert (verdict.rollouts, verdict.successes, verdict.reward) == (2, 1, 0.5)
    assert (verdict.branches, verdict.pivots, verdict.chances, verdict.rescued) == (2, 1, 1, 1)
    assert verdict.tokens == 15 + 15 + 9 + 9


def test_a_truncated_rollout_and_a_pivot_without_rescue() -> None:
    tree = small_tree()
    tree = tree.add([Pivot(0, 0, 1, ratio=0.25, candidates=(0, 6, 12), q=(0.2, 0.5, 0.3))], [])
    tree = tree.add([], [node(tree, 0, 0, "3+4=", 0.0, 2, finish="length")])
    assert tree_facts(tree).flags == {"rescued", "unrecoverable", "truncated", "mixed"}
    # with a threshold that no reward is above, every rollout failed
    assert "failed" in tree_facts(tree, threshold=1.0).flags


def test_a_pivot_in_a_success_is_no_chance_lost() -> None:
    tree = small_tree()
    tree = tree.add([Pivot(1, 6, 1, ratio=0.5)], [])
    tree = tree.add([], [node(tree, 1, 6, "7*2=3;#3", 0.0, 2)])
    verdict = tree_facts(tree)
    # the second rollout has reward 1: its pivot, whose branch fails, had nothing to rescue
    assert (verdict.pivots, verdict.chances, verdict.rescued) == (2, 1, 1)
    assert "unrecoverable" not in verdict.flags


@given(st.integers(0, 10_000))
def test_rescues_are_counted_as_the_metrics_of_the_run_count_them(seed: int) -> None:
    tree = random_tree("q", seed)
    verdict, metrics = tree_facts(tree), train_metrics.pivot_metrics([tree])
    assert verdict.pivots == metrics["pivots/count"]
    if verdict.pivots:
        assert verdict.rescued == pytest.approx(metrics["pivots/rescue_rate"] * verdict.pivots)


# ---------------------------------------------------------------- pivots


def test_ratios_of_candidates_come_from_the_pivots_own() -> None:
    # the example of the docstring: a chain of 5 with the root, the pivot at its third place
    assert candidate_ratios(Pivot(0, 20, 8, ratio=0.6, candidates=(0, 10, 20, 30), q=(0.25,) * 4)) == [0.2, 0.4, 0.6, 0.8]
    assert candidate_ratios(Pivot(0, 20, 8, ratio=0.6, candidates=(10, 20, 30), q=(0.5, 0.25, 0.25))) == [0.4, 0.6, 0.8]
    assert candidate_ratios(Pivot(0, 20, 8, ratio=0.6)) == []


@given(st.lists(st.integers(1, 9), min_size=1, max_size=30), st.booleans(), st.integers(1, 300), st.data())
def test_ratios_of_candidates_are_those_of_the_draw(lengths: list[int], root: bool, room: int, data: st.DataObject) -> None:
    ends = [int(end) for end in np.cumsum(lengths)]
    offsets, ratios = candidates(ends, room=room, root=root)
    if offsets:
        i = data.draw(st.integers(0, len(offsets) - 1))
        pivot = Pivot(0, offsets[i], 4, ratio=ratios[i], candidates=tuple(offsets), q=(1 / len(offsets),) * len(offsets))
        assert candidate_ratios(pivot) == pytest.approx(ratios)


def test_mass_of_q_by_depth() -> None:
    # r = .25, .5, .75 lie in bins 2, 4, 7; two pivots of one rollout share a Q and count once
    tree = small_tree()
    mass, rollouts = q_mass([tree.add([tree.pivots[1]], [])])
    assert rollouts == 1
    assert mass == [0, 0, 0.2, 0, 0.5, 0, 0, 0.3, 0, 0]


def test_a_depth_without_states_is_blank_and_one_that_is_never_drawn_is_not() -> None:
    table = q_over_time({1: ([0.0, 0.5, 0.5, *[0.0] * 7], 4), 2: ([0.0, 0.0, 1.0, *[0.0] * 7], 4), 3: ([0.0] * 10, 0)})
    assert table is not None
    assert table["steps"] == [[1, 1], [2, 2]]
    assert [cells[:4] for cells in table["cells"]] == [[None, 0.5, 0.5, None], [None, 0.0, 1.0, None]]


def test_neighbouring_steps_are_put_together_by_weight() -> None:
    table = columns([1, 2, 3], [[0.5, None], [1.0, None], [0.25, 0.75]], [[3, 0], [1, 0], [2, 2]], limit=2)
    # (3 · .5 + 1 · 1) / 4 = .625
    assert table == {
        "steps": [[1, 2], [3, 3]], "cells": [[0.625, None], [0.25, 0.75]], "counts": [[4, 0], [2, 2]],
    }  # fmt: skip


def test_reliability_worked_by_hand() -> None:
    # the fit behind step 4 predicts step 5: w = 0, b = ln(1/3) says 1/4 at every depth; 1 of 4 pivots succeeded
    metrics = [
        {"step": 3, "recoverability/fitted": 0.0, "recoverability/w": 0.0, "recoverability/b": 0.0},
        {"step": 4, "recoverability/fitted": 1.0, "recoverability/w": 0.0, "recoverability/b": math.log(1 / 3)},
        {"step": 5, "recoverability/fitted": 1.0, "recoverability/w": 9.0, "recoverability/b": 9.0},
    ]
    pivots = [PivotOutcome(5, f"q{i}", 0.5, i == 0) for i in range(4)]
    unknown = [PivotOutcome(4, "before the fit", 0.5, True), PivotOutcome(9, "no metrics", 0.5, True)]
    found = reliability([*pivots, *unknown], metrics)
    assert found is not None
    (only,) = found["bins"]
    assert (only["predicted"], only["observed"], only["pivots"]) == (pytest.approx(0.25), 0.25, 4)
    # Wilson's interval of 1 in 4
    assert (only["low"], only["high"]) == (pytest.approx(0.0456, abs=1e-4), pytest.approx(0.6994, abs=1e-4))
    # ((3/4)² + 3 · (1/4)²) / 4 = .1875, which is what the constant 1/4 has
    assert found["brier"] == pytest.approx(0.1875)
    assert found["brier_constant"] == pytest.approx(0.1875)
    assert found["error"] == pytest.approx(0.0)
    assert reliability(pivots, metrics[:1]) is None


def test_a_pivot_succeeds_by_the_threshold_of_the_recipe() -> None:
    tree = small_tree()
    assert pivot_outcomes(tree, 7, 0.0) == [PivotOutcome(7, "q1", 0.5, True)]
    assert pivot_outcomes(tree, 7, 1.0) == [PivotOutcome(7, "q1", 0.5, False)]


# ---------------------------------------------------------------- metrics


def test_seconds_are_those_of_training_alone() -> None:
    lines = [
        {
            "step": 1, "main/reward": 0.123456789, "odd": None, "list": [1.0], "warnings": ["slow"],
            "ledger/sampled_tokens": 640, "ledger/optimizer_steps": 1, "ledger/seconds_sample": 1.0,
            "ledger/seconds_signals": 0.5, "ledger/seconds_reward": 0.25, "ledger/seconds_learn": 2.0,
            "ledger/seconds_eval": 100.0, "ledger/seconds_save": 50.0,
        },
    ]  # fmt: skip
    found = metric_columns(lines)
    assert found["axes"] == {"step": [1], "tokens": [640], "updates": [1], "seconds": [3.75]}
    assert found["curves"] == {"main/reward": [0.123457]}
    assert run_warnings(lines) == [{"step": 1, "text": "slow"}]


# ---------------------------------------------------------------- tokens


@given(st.text(max_size=40))
def test_pieces_are_the_text_again(text: str) -> None:
    text = text.encode("utf-8", "ignore").decode()
    tokens = encode(text)
    pieces = texts().pieces(tokens)
    assert len(pieces) == len(tokens)
    assert "".join(pieces) == text + "<eos>"


def test_a_character_of_several_tokens_belongs_to_the_first() -> None:
    # é has two bytes, 👩 four; a lone first byte stays what the decoder makes of it
    assert texts().pieces(encode("aé👩b", end=False)) == ["a", "é", "", "👩", "", "", "", "b"]
    assert texts().pieces(encode("é", end=False)[:1]) == ["\ufffd"]
    assert texts().specials == {"<pad>", "<eos>"}


def test_a_decoder_that_drops_the_first_blank() -> None:
    class Metaspace:
        """Decodes like a SentencePiece model: the blank at the beginning of a sequence is not there."""

        words = ("▁one", "▁two", "s")

        def decode(self, tokens: list[int], skip_special_tokens: bool = True) -> str:
            return "".join(self.words[t] for t in tokens).replace("▁", " ").lstrip(" ")

    assert TokenTexts(Metaspace()).pieces([0, 1, 2]) == ["one", " two", "s"]


def test_without_a_tokenizer_a_branch_is_what_its_siblings_do_not_share() -> None:
    tree = small_tree()
    assert [own_text(tree, i) for i in range(4)] == ["3+4=7;7*2=5;#5", "3+4=7;7*2=4;#4", "4;#4", "3;#3"]


def test_segments_are_those_of_the_pivot_and_of_the_recipe(tmp_path: Path) -> None:
    run = SavedRun(write_run(tmp_path / "run", {1: [small_tree()]}))
    (found,) = run.trees(1)
    known = read_tokens(run)
    assert known is not None
    # the second rollout has no pivot: its segments are cut again by the recipe's rule
    assert [segment_ends(found.tree, i, known) for i in range(4)] == [[6, 12], [6, 12], [], []]
    assert [segment_ends(found.tree, i, None) for i in range(4)] == [[6, 12], [], [], []]


# ---------------------------------------------------------------- what is on disk


def test_saved_trees_are_read_as_they_were_written(tmp_path: Path) -> None:
    trees = [small_tree(), random_tree("q2", 5)]
    run = SavedRun(write_run(tmp_path / "run", {3: trees}))
    found = list(run.trees(3))
    assert [each.tree for each in found] == list(load_trees(run.tree_files[3])) == trees
    assert [each.spans for each in found] == [sibling_credit(tree).spans for tree in trees]
    assert (run.count_trees(3), run.success_threshold, run.name) == (2, 0.0, "run")


def test_keys_of_a_later_version_are_passed_over(tmp_path: Path) -> None:
    run = SavedRun(write_run(tmp_path / "run", {1: [small_tree()]}))
    path = run.tree_files[1]
    raw = json.loads(gzip.decompress(path.read_bytes()))
    raw["novelty"] = raw["nodes"][0]["novelty"] = raw["credit"][0]["novelty"] = 1
    path.write_bytes(gzip.compress(json.dumps(raw).encode() + b"\n"))
    assert [each.tree for each in run.trees(1)] == [small_tree()]


@pytest.mark.parametrize("damage", ["cut", "no gzip", "no json", "no tree"])
def test_a_damaged_file_of_trees_is_named_and_the_rest_is_shown(tmp_path: Path, damage: str) -> None:
    run = SavedRun(write_run(tmp_path / "run", {1: [small_tree()], 2: [small_tree("q2")]}))
    path = run.tree_files[1]
    path.write_bytes(
        {
            "cut": path.read_bytes()[:-20], "no gzip": b"trees", "no json": gzip.compress(b'{"half": \n'),
            "no tree": gzip.compress(b'{"prompt": {}}\n'),
        }[damage]
    )  # fmt: skip
    with pytest.raises(DataError, match=r"step-000001.*delete it"):
        list(run.trees(1))
    page = build_page(run, 100)
    assert any("step-000001" in note for note in page.notes)
    assert unpack(page.data["trees"]["index"])["step"] == [2]


def test_a_torn_last_line_of_the_metrics_is_left_out(tmp_path: Path) -> None:
    run = SavedRun(write_run(tmp_path / "run", {}, last_step=4))
    with (run.directory / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "main/rew')
    assert [each["step"] for each in run.metrics] == [0, 1, 2, 3, 4]


def test_what_is_no_run_directory(tmp_path: Path) -> None:
    write_run(tmp_path / "runs" / "demo", {1: [small_tree()]})
    (tmp_path / "empty").mkdir()
    young = tmp_path / "young"
    young.mkdir()
    (young / "config.toml").touch()
    for path, sentence in {
        "nowhere": "does not exist", "empty": "no config.toml", "young": "no step has been taken",
        "runs": "holds the runs demo", "runs/demo/trees": "it is inside one; name .*demo",
        "runs/demo/config.toml": "it is a file",
    }.items():  # fmt: skip
        with pytest.raises(DataError, match=sentence):
            SavedRun(tmp_path / path)


def test_the_nearest_steps() -> None:
    assert nearest(12, [1, 10, 20, 30], 2) == [10, 20]
    assert nearest(99, [1, 10], 4) == [1, 10]


# ---------------------------------------------------------------- blocks


def test_a_tree_in_the_page_worked_by_hand() -> None:
    found = tree_json(saved(small_tree()), texts())
    first, _, branch, _ = found["nodes"]
    assert first["k"] == [*"3+4=7;7*2=5;#5", "<eos>"]
    assert (first["e"], first["a"], first["l"][0]) == ([6, 12], [[0, 15, -0.5, "main"]], -50)
    assert (branch["p"], branch["o"], branch["a"]) == (0, 6, [[0, 9, 0.5, "branch"]])
    assert found["pivots"][1] == {"p": 0, "o": 6, "r": 0.5, "s": "branch", "c": [0, 6, 12], "q": [0.2, 0.5, 0.3]}
    assert "k" not in tree_json(saved(small_tree()), None)["nodes"][0]


def test_blocks_hold_one_step_each_and_few_trees() -> None:
    many = [saved(small_tree(f"q{i}"), 1 + i // 70, i % 70) for i in range(140)]
    index = TreeIndex()
    blocks = [unpack(block) for block in tree_blocks(iter(many), index, None, 0.0)]
    assert [len(block) for block in blocks] == [64, 6, 64, 6]
    assert [tree["id"] for block in blocks for tree in block] == index.id == [f"q{i}" for i in range(140)]
    assert index.block[63:71] == [0, *[1] * 6, 2]
    assert index.flags[0] == sum(1 << FLAGS.index(flag) for flag in ("rescued", "mixed"))
    assert unpack(index.packed()) == vars(index)


@given(st.dictionaries(st.integers(1, 500), st.integers(1, 40), min_size=1, max_size=40), st.integers(0, 600))
def test_steps_that_fit_under_a_limit(counts: dict[int, int], limit: int) -> None:
    counts = dict(sorted(counts.items()))
    chosen = choose_steps(counts, limit)
    assert sum(counts[step] for step in chosen) <= limit
    assert chosen == sorted(set(chosen))
    if sum(counts.values()) <= limit:
        assert chosen == list(counts)
    if len(chosen) > 1:
        assert {chosen[0], chosen[-1]} == {min(counts), max(counts)}


@given(st.recursive(st.text() | st.integers() | st.none(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)))
def test_what_is_packed_comes_back(value: Any) -> None:
    assert unpack(pack(value)) == value
    assert re.fullmatch(r"[A-Za-z0-9+/=]*", pack(value))


# ---------------------------------------------------------------- the page


@given(st.text())
def test_no_text_can_end_its_script_element(text: str) -> None:
    written = safe_json({"text": text})
    assert not set("<>&") & set(written)
    assert written.isascii()
    assert json.loads(written) == {"text": text}


def hostile_tree(i: int, text: str) -> Tree:
    tree = random_tree(text, 1, i)
    prompt = replace(tree.prompt, id=text, question=text, text=text, answer=text)
    nodes = [
        node(Tree(prompt), ROOT, 0, text, 0.0, 0),
        node(Tree(prompt), ROOT, 0, "x", 1.0, 0),
    ]
    return Tree(prompt).add([tree.pivots[0]], nodes)


def hostile_run(directory: Path) -> Path:
    trees = [hostile_tree(i, text) for i, text in enumerate(HOSTILE) if text != LONE_SURROGATE]
    run = write_run(directory, {1: trees}, warnings={1: tuple(t for t in HOSTILE)})
    with (run / "config.toml").open("a") as file:
        file.write("# </script><script>alert(1)</script><!-- $title\n")
    return run


def test_hostile_texts_stay_data(tmp_path: Path) -> None:
    page = build_page(SavedRun(hostile_run(tmp_path / "run")), 100)
    page.data["name"] = HOSTILE[0]
    html = "".join(page_parts(" ".join(HOSTILE), {"runs": [page.data]}, [("block-0-0", page.blocks[0])]))
    # only our own markup: data, a block, and one script
    assert len(re.findall(r"<script", html)) == 3
    assert len(re.findall(r"</script", html)) == 3
    assert "broken'</script>" not in html
    assert html.encode("utf-8")
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.DOTALL)
    assert found is not None
    data = json.loads(found[1])["runs"][0]
    assert [each["text"] for each in data["warnings"]] == HOSTILE
    assert {each["id"] for each in unpack(page.blocks[0])} == set(HOSTILE) - {LONE_SURROGATE}


def test_the_page_reaches_for_nothing(tmp_path: Path) -> None:
    page = build_page(SavedRun(random_run(tmp_path / "run", 2, 3)), 100)
    html = "".join(page_parts("t", {"runs": [page.data]}, []))
    assert "default-src 'none'" in html
    assert not re.findall(r"""(?:src|href|action)=["'](?!#|data:,)""", html)
    # the namespace of SVG is a name, no address
    assert set(re.findall(r"https?://[^\"'\s<]+", html)) <= {"http://www.w3.org/2000/svg"}


def test_the_same_run_gives_the_same_page(tmp_path: Path) -> None:
    run = random_run(tmp_path / "run", 2, 3)
    one, two = build_page(SavedRun(run), 100), build_page(SavedRun(run), 100)
    assert (one.data, one.blocks) == (two.data, two.blocks)


def test_more_trees_than_the_page_takes(tmp_path: Path) -> None:
    page = build_page(SavedRun(random_run(tmp_path / "run", 10, 4)), 12)
    assert (page.data["trees"]["saved"], page.data["trees"]["shown"]) == (40, 12)
    assert set(unpack(page.data["trees"]["index"])["step"]) == {1, 5, 10}
    assert any("12 of 40 saved trees" in note and "--max-trees 40" in note for note in page.notes)
    # the figures about pivots are of all trees all the same
    assert page.data["pivots"]["steps"] == 10


def test_a_run_without_trees_or_tokenizer_says_so(tmp_path: Path) -> None:
    bare = build_page(SavedRun(write_run(tmp_path / "bare", {}, last_step=3, recipe={"log": {"trees_every": None}})), 100)
    assert bare.data["trees"]["index"] is None
    assert any("log.trees_every" in note for note in bare.notes)
    mute = build_page(SavedRun(write_run(tmp_path / "mute", {1: [small_tree()]}, with_tokenizer=False)), 100)
    assert any("tokenizer.json" in note for note in mute.notes)
    assert unpack(mute.blocks[0])[0]["nodes"][2]["x"] == "4;#4"


def test_runs_are_told_apart_by_as_much_of_their_path_as_it_takes(tmp_path: Path) -> None:
    paths = [tmp_path / "a" / "s0", tmp_path / "b" / "s0", tmp_path / "b" / "s1"]
    runs = [SavedRun(write_run(path, {}, last_step=1)) for path in paths]
    assert label_runs(runs) == ["a/s0", "b/s0", "s1"]
    assert unique([paths[0], paths[1], paths[0] / ".." / "s0"]) == paths[:2]


def test_credit_of_parts_of_a_node_is_kept_in_parts() -> None:
    tree = small_tree()
    found = tree_json(SavedTree(1, 0, tree, (CreditSpan(0, 2, 5, 0.25, "main"), CreditSpan(0, 5, 9, -1.0, "main"))), None)
    assert [each["a"] for each in found["nodes"]] == [[[2, 5, 0.25, "main"], [5, 9, -1.0, "main"]], [], [], []]
