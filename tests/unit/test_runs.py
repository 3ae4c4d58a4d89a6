"""The run directory: names, damaged files, the newest checkpoint, and trees that come back as they were saved."""

from __future__ import annotations

import ast
import gzip
import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypotheses import examples
from hypothesis import given
from hypothesis import strategies as st
from trees import make_tree

import deepgrpo
from deepgrpo.config import RunConfig, parse_config, to_toml
from deepgrpo.errors import CheckpointError, DataError
from deepgrpo.feedback import Score
from deepgrpo.ledger import Ledger, StepReport
from deepgrpo.records import ROOT, Credit, CreditSpan, Node, Pivot, Prompt, Tree
from deepgrpo.runs.checkpoints import Checkpoint, TrainState, newest_checkpoint, saved_checkpoints, unreadable
from deepgrpo.runs.facts import depth_bin, is_mixed, is_rescued, succeeds, tree_facts
from deepgrpo.runs.layout import RunDir, run_around, step_of
from deepgrpo.runs.metrics import newest_metrics, read_metrics, step_json, truncate_metrics, write_step
from deepgrpo.runs.resume import resume_command
from deepgrpo.runs.trees import count_trees, load_saved, load_trees, save_trees, tree_from_json, tree_to_json

SRC = Path(deepgrpo.__file__).parent

# ---------------------------------------------------------------- layout


def test_every_name_in_a_run_directory() -> None:
    run = RunDir(Path("runs/demo"))
    found = [
        run.config, run.metrics, run.log, run.start, run.checkpoint(10), run.trees(10), run.eval(1_234_567), run.report,
        run.final, run.tensorboard, run.wandb_id, run.lock, run.place,
    ]  # fmt: skip
    assert [path.relative_to(run.path).as_posix() for path in found] == [
        "config.toml", "metrics.jsonl", "log.txt", "start", "checkpoints/step-000010", "trees/step-000010.jsonl.gz",
        "eval/step-1234567.jsonl", "report.html", "final.json", "tensorboard", "wandb-id.txt", ".lock", "place.json",
    ]  # fmt: skip
    assert RunDir.of(RunConfig(dir="runs", name="demo", steps=1)) == run


def test_how_to_continue_a_run(tmp_path: Path) -> None:
    """A run whose recipe names objects of a program is continued by the program."""
    run = RunDir(tmp_path / "a")
    assert resume_command(run) == "deepgrpo train --resume a" and resume_command(run, 20).endswith("a --step 20")
    run.path.mkdir()
    sections = {"reward": {"type": "user", "function": "given:mine"}, "data": {"type": "given"}, "explore": {"type": "root"}}
    run.config.write_text(to_toml(parse_config({"model": {"type": "pretrained", "path": "m"}, **sections})))
    call = 'deepgrpo.train(resume="a", dataset=..., rewards=..., step=0), with the same objects'
    assert resume_command(run, 0) == call
    run.checkpoint(3).mkdir(parents=True)
    refusal = unreadable(Checkpoint(3, run.checkpoint(3)), ValueError("torn"))
    assert str(refusal).endswith(f"there is no earlier one: begin again with: {call}")


def test_names_of_steps() -> None:
    assert step_of("step-000010") == 10 and step_of("step-1234567") == 1_234_567
    assert [step_of(name) for name in (".tmp-step-000010", "step-10", "step-000010.jsonl", "start")] == [None] * 4


def test_the_run_around_a_checkpoint(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    (run.checkpoint(3) / "model").mkdir(parents=True)
    assert run_around(run.checkpoint(3)) is None  # no recipe yet
    run.config.touch()
    assert run_around(run.checkpoint(3)) == run_around(run.checkpoint(3) / "model") == run
    assert run_around(run.checkpoint(4)) is None and run_around(run.path) is None


def test_no_other_module_spells_a_path_of_the_run_directory() -> None:
    """`x / "name"`, `x / f"step-..."` and `x.glob("...name...")` with a name of the layout belong to runs/."""
    run = RunDir(Path("r"))
    names = {run.config, run.metrics, run.log, run.start, run.checkpoints, run.tree_folder, run.report, run.final, run.place}
    # an experiment has a final.json of its own, among its jobs
    spelled = {path.name for path in names} - {run.final.name} | {"eval", "state.json"}

    def text(node: ast.expr) -> str:
        parts = node.values if isinstance(node, ast.JoinedStr) else [node]
        return "".join(str(each.value) for each in parts if isinstance(each, ast.Constant) and isinstance(each.value, str))

    found = []
    for path in SRC.rglob("*.py"):
        if path.is_relative_to(SRC / "runs"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div):
                said = [text(node.right)]
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in ("glob", "rglob"):
                said = text(node.args[0]).split("/")
            else:
                continue
            found += [f"{path.name}:{node.lineno}" for each in said if each in spelled or each.startswith("step-")]
    assert not found


def test_runs_and_stats_load_no_torch() -> None:
    names = ["stats", *(f"runs.{path.stem}" for path in (SRC / "runs").glob("*.py") if path.stem != "__init__")]
    imports = ", ".join(f"deepgrpo.{name}" for name in names)
    code = f"import sys, {imports}; print({{'torch', 'transformers'}} & set(sys.modules))"
    environment = {"PYTHONPATH": str(SRC.parent)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout == "set()\n"


# ---------------------------------------------------------------- metrics


def line(step: int, **values: float | None) -> str:
    return json.dumps({"step": step, **values}) + "\n"


def test_a_step_is_read_as_it_was_written(tmp_path: Path) -> None:
    report = StepReport(2, {"loss": math.nan, "hist": [1.0, math.inf]}, Ledger(sampled_tokens=7), ("careful",))
    with (tmp_path / "m").open("w") as file:
        assert write_step(file, report) == step_json(report)
        (found,) = read_metrics(tmp_path / "m")  # flushed at once
    assert (found["loss"], found["hist"], found["ledger/sampled_tokens"]) == (None, [1.0, None], 7)


@pytest.mark.parametrize("damage", ['{"step": 3, "rew', "3\n", "[]\n", '{"loss": 1}\n', '{"step": null}\n', "\ufffd\n"])
def test_a_damaged_line_of_the_metrics_is_skipped_by_all_readers(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "m"
    path.write_text(line(1) + line(2, **{"eval/greedy": 0.5}) + line(3) + damage)
    assert [each["step"] for each in read_metrics(path)] == [1, 2, 3]
    assert newest_metrics(path) == {"step": 3, "eval/greedy": 0.5}
    assert truncate_metrics(path, 2) == 2  # step 3 and the damage
    assert path.read_text() == line(1) + line(2, **{"eval/greedy": 0.5})
    assert truncate_metrics(path, 2) == 0


def test_metrics_come_by_step_and_the_later_of_two_lines_counts(tmp_path: Path) -> None:
    path = tmp_path / "m"
    path.write_text(line(2, loss=1.0) + line(1) + line(2, loss=3.0))
    assert read_metrics(path) == [{"step": 1}, {"step": 2, "loss": 3.0}]


def test_metrics_that_are_not_there(tmp_path: Path) -> None:
    assert newest_metrics(tmp_path / "m") == {} and truncate_metrics(tmp_path / "m", 3) == 0
    (tmp_path / "m").touch()
    assert newest_metrics(tmp_path / "m") == {} and read_metrics(tmp_path / "m") == []


# ---------------------------------------------------------------- checkpoints


def test_the_newest_checkpoint_by_number_and_none_that_is_being_written(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    assert saved_checkpoints(run) == [] and newest_checkpoint(run) is None
    for name in ("step-000009", "step-1000000", "step-999999", ".tmp-step-2000000", "notes"):
        (run.checkpoints / name).mkdir(parents=True)
    assert [each.step for each in saved_checkpoints(run)] == [9, 999_999, 1_000_000]
    assert newest_checkpoint(run) == Checkpoint(1_000_000, run.checkpoints / "step-1000000")


def test_a_state_comes_back_and_a_damaged_one_is_named(tmp_path: Path) -> None:
    checkpoint = Checkpoint(3, tmp_path)
    state = TrainState(3, 6, {"position": 4}, {"w": 0.5}, Ledger(sampled_tokens=9), best_step=2, best_value=0.25)
    checkpoint.state_file.write_text(state.to_json())
    assert checkpoint.read_state() == state
    for damage in ("", "{}", "[]", '{"step": 3, "ledger": {"coffee": 1}}'):
        checkpoint.state_file.write_text(damage)
        with pytest.raises(CheckpointError, match=r"cannot be read: state.json .*; there is no earlier one"):
            checkpoint.read_state()


# ---------------------------------------------------------------- trees

# UTF-8 cannot write a lone surrogate, so no tree that was saved holds one
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
tokens = st.lists(st.integers(0, 2**31), max_size=4).map(tuple)
numbers = st.floats(allow_nan=False)
scores = st.builds(Score, numbers, st.booleans(), st.booleans(), st.none() | texts)
streams = st.sampled_from(["main", "branch"])
columns = st.dictionaries(texts, st.none() | st.booleans() | st.integers() | texts | st.lists(texts, max_size=2), max_size=3)


@st.composite
def nodes(draw: st.DrawFn) -> Node:
    own = draw(tokens)
    values = st.lists(numbers, min_size=len(own), max_size=len(own)).map(tuple)
    finish = st.sampled_from(["stop", "length", "segment"])
    return Node(
        draw(st.integers(ROOT, 5)), draw(st.integers(0, 9)), own, draw(values), draw(finish), draw(texts),
        draw(scores), draw(streams), draw(st.integers(0, 5)), draw(st.integers(0, 9)),
        draw(st.dictionaries(texts, values, max_size=2)),
    )  # fmt: skip


offsets = st.lists(st.integers(0, 99), max_size=3).map(tuple)
pivots = st.builds(
    Pivot, st.integers(ROOT, 5), st.integers(0, 9), st.integers(1, 9), streams, numbers, offsets,
    st.lists(numbers, max_size=3).map(tuple), st.none() | st.integers(1, 99),
)  # fmt: skip
prompts = st.builds(Prompt, texts, texts, tokens, texts, st.none() | texts, columns)
trees = st.builds(Tree, prompts, st.lists(nodes(), max_size=3).map(tuple), st.lists(pivots, max_size=2).map(tuple))
spans = st.builds(CreditSpan, st.integers(0, 9), st.integers(0, 9), st.integers(0, 9), numbers, streams)


@given(st.lists(st.tuples(trees, st.lists(spans, max_size=3).map(tuple)), max_size=3))
@examples(50)
def test_trees_come_back_as_they_were_saved(tmp_path_factory: pytest.TempPathFactory, saved: list) -> None:
    for tree, credit in saved:
        assert tree_from_json(tree_to_json(tree, credit)) == (tree, credit)
    path = RunDir(tmp_path_factory.mktemp("run")).trees(7)
    save_trees(path, [tree for tree, _ in saved], [Credit(credit, ()) for _, credit in saved])
    found = list(load_saved(path, 7))
    assert [(each.tree, each.spans) for each in found] == saved
    assert [(each.step, each.number) for each in found] == [(7, i) for i in range(len(saved))]
    assert list(load_trees(path)) == [tree for tree, _ in saved] and count_trees(path) == len(saved)


def worked_tree() -> Tree:
    """The tree of records.py; see there."""
    root = [Node(ROOT, 0, (1,) * n, (-0.5,) * n, "stop", "", Score(r), "main", 0) for n, r in ((6, 0.0), (5, 1.0))]
    deep = [Node(0, 4, (1,) * n, (-0.5,) * n, "stop", "", Score(r), "branch", 1) for n, r in ((2, 1.0), (3, 0.0))]
    tree = Tree(Prompt("p", "2+2=", (7, 8, 9), "2+2=", "4"))
    return tree.add([Pivot(ROOT, 0, 2, "main")], root).add([Pivot(0, 4, 2, ratio=0.75)], deep)


def test_a_line_holds_the_keys_of_the_records_in_their_order() -> None:
    """The format that notebooks and other programs read."""
    text = tree_to_json(replace(worked_tree(), nodes=worked_tree().nodes[:1], pivots=()), [CreditSpan(0, 0, 6, -0.5, "main")])
    assert text == (
        '{"prompt": {"id": "p", "text": "2+2=", "tokens": [7, 8, 9], "question": "2+2=", "answer": "4", "columns": {}, '
        '"accepted": [], "messages": [], "source": ""}, '
        '"nodes": [{"parent": -1, "offset": 0, "tokens": [1, 1, 1, 1, 1, 1], "logprobs": [-0.5, -0.5, -0.5, -0.5, -0.5, -0.5], '
        '"finish": "stop", "text": "", "score": {"value": 0.0, "parsed": true, "checked": true, "problem": null}, '
        '"stream": "main", "pivot": 0, "version": 0, "signals": {}}], "pivots": [], '
        '"credit": [{"node": 0, "start": 0, "end": 6, "advantage": -0.5, "stream": "main"}]}'
    )


def test_numbers_that_json_lacks_and_values_that_it_does_not_know(tmp_path: Path) -> None:
    tree = worked_tree()
    odd = replace(tree.nodes[0], logprobs=(-math.inf, math.inf, math.nan, 0.0, 0.0, 0.0))
    prompt = replace(tree.prompt, columns={"file": Path("a/b")})
    found, _ = tree_from_json(tree_to_json(Tree(prompt, (odd,)), ()))
    assert found.nodes[0].logprobs[:2] == (-math.inf, math.inf) and math.isnan(found.nodes[0].logprobs[2])
    assert found.prompt.columns == {"file": "a/b"}


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        ('{"prompt": {"id"', "EOF while parsing"),
        ('{"prompt": {}}', "prompt.id: Field required"),
        (tree_to_json(worked_tree(), ()).replace('"stop"', '"tired"'), "nodes.0.finish: Input should be 'stop'"),
        (tree_to_json(worked_tree(), ()).replace('"offset": 0', '"offset": "far"'), "nodes.0.offset: Input should be a valid"),
        (tree_to_json(worked_tree(), ()).replace('"2+2="', '"\\ud800"'), "hex escape"),
    ],
)  # fmt: skip
def test_a_damaged_tree_is_named_with_its_place_and_those_before_it_are_read(tmp_path: Path, damage: str, says: str) -> None:
    path = tmp_path / "step-000001.jsonl.gz"
    path.write_bytes(gzip.compress(f"{tree_to_json(worked_tree(), ())}\n{damage}\n".encode()))
    found = load_saved(path, 1)
    assert next(found).tree == worked_tree()
    with pytest.raises(DataError, match=r"step-000001.*cannot be read to its end \(tree 1: .*delete it") as caught:
        next(found)
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_files_of_trees_are_found_by_step(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    assert run.tree_files() == {}
    run.tree_folder.mkdir()
    for name in ("step-000010.jsonl.gz", "step-000002.jsonl.gz", "notes.jsonl.gz", "step-000003.jsonl"):
        (run.tree_folder / name).touch()
    assert list(run.tree_files().items()) == [(2, run.trees(2)), (10, run.trees(10))]


# ---------------------------------------------------------------- facts


def test_depth_bins_are_closed_above() -> None:
    # 3 · 0.1 is 0.30000000000000004: still bin 2
    assert [depth_bin(r) for r in (0.05, 0.1, 0.11, 0.3, 3 * 0.1, 1.0)] == [0, 0, 1, 2, 2, 9]
    assert [depth_bin(r, 4) for r in (0.1, 0.25, 0.26, 1.0)] == [0, 0, 1, 3]


def test_a_rescue_is_a_success_that_beats_the_rollout() -> None:
    tree = worked_tree()
    assert is_rescued(tree, 1) and succeeds(tree, 1)
    half = replace(tree, nodes=(replace(tree.nodes[0], score=Score(0.5)), *tree.nodes[1:]))
    assert is_rescued(half, 1, 0.5) and is_rescued(half, 1, 0.4) and not is_rescued(half, 1, 1.0)
    assert succeeds(half, 1, 0.5) and not succeeds(half, 1, 1.0)
    equal = replace(tree, nodes=(replace(tree.nodes[0], score=Score(1.0)), *tree.nodes[1:]))
    assert not is_rescued(equal, 1) and succeeds(equal, 1)


def test_a_cheaper_failure_is_no_rescue() -> None:
    """A price of .05 per call: the rollout fails after three calls, its branches after one and two; one with four is right."""
    tree = make_tree([(6, -0.15), (5, 1.0)], [(0, 4, [(2, -0.05), (3, -0.1)])])
    facts = tree_facts(tree)
    assert not is_rescued(tree, 1) and (facts.chances, facts.rescued) == (1, 0) and "unrecoverable" in facts.flags
    tree = make_tree([(6, -0.15), (5, 1.0)], [(0, 4, [(2, -0.05), (3, 0.8)])])
    facts = tree_facts(tree)
    assert is_rescued(tree, 1) and (facts.chances, facts.rescued) == (1, 1) and "rescued" in facts.flags
    assert not is_rescued(tree, 1, 0.8)


def test_a_mixed_group() -> None:
    assert [is_mixed(rewards) for rewards in ([], [1.0], [1.0, 1.0 + 1e-9], [0.0, 1.0])] == [False, False, False, True]
