"""`deepgrpo inspect`: what is drawn, which tree is chosen, and what is said when there is none."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from deepgrpo.errors import ConfigError, DataError
from deepgrpo.feedback import Reply
from deepgrpo.records import Pivot, Tree
from deepgrpo.report.blocks import tree_json
from deepgrpo.report.inspect import run_inspect
from deepgrpo.report.options import InspectOptions
from deepgrpo.report.tree_text import plain
from deepgrpo.runs.trees import SavedTree
from saved_runs import node, random_tree, small_tree, write_run

Show = Callable[..., str]


@pytest.fixture
def show(capsys: pytest.CaptureFixture[str]) -> Show:
    def run(directory: Path, **options: Any) -> str:
        assert run_inspect(InspectOptions(directory, **{"width": 120, **options})) == 0
        return capsys.readouterr().out

    return run


@pytest.fixture
def run(tmp_path: Path) -> Path:
    solved = Tree(small_tree("easy").prompt).add(
        [small_tree().pivots[0]], [node(Tree(small_tree().prompt), -1, 0, "#4", 1.0, 0) for _ in range(2)]
    )
    return write_run(tmp_path / "run", {10: [small_tree("q1"), solved], 20: [small_tree("q1"), small_tree("q2")]})


def test_the_steps_of_a_run(run: Path, show: Show) -> None:
    lines = show(run).splitlines()
    assert lines[0].split() == ["step", "trees", "successes", "mixed", "pivots", "rescued", "truncated"]
    # step 10: 1 of 2 and 2 of 2 rollouts succeed
    assert lines[1].split() == ["10", "2", "75%", "1", "1", "100%", "0"]
    assert lines[2].split() == ["20", "2", "50%", "2", "2", "100%", "0"]
    assert "--step 20" in lines[-1]
    assert show(run, only="mixed").splitlines()[1].split()[-1] == "1"


def test_the_trees_of_a_step(run: Path, show: Show) -> None:
    text = show(run, step=10)
    assert "q1" in text and "easy" in text
    rows = {line.split()[1]: line.split()[2:] for line in text.splitlines()[1:3]}
    # right, pivots, rescued of those that could be, what else there is to say
    assert rows["q1"][:4] == ["1/2", "1", "1/1", "mixed"]
    assert rows["easy"][:3] == ["2/2", "0", "–"]
    assert "easy" not in show(run, step=10, only="rescued")
    assert "none of the 2 trees of step 10 is truncated" in show(run, step=10, only="truncated")


def test_one_tree(run: Path, show: Show) -> None:
    text = show(run, step=10, prompt="q1")
    assert "step 10 · prompt q1 · mixed, rescued" in text
    assert "rollout 1  ✗ 0  advantage -0.500  15 tokens" in text
    # segments end at 6 and 12, the pivot lies at 6
    assert "3+4=7;◆7*2=5;│#5<eos>" in text
    assert "◆ after token 6, r = .50, Q = .50: 1 of 2 branches better, rescued" in text
    # the three states of the chain: q = .2, .5, .3 of at most .5
    assert "Q along the chain  .25▄ .50█ .75▅" in text
    assert "✓ 1  advantage +0.500" in text
    assert "7*2=4;#4<eos>" in text


def test_a_lane_shows_where_a_branch_begins(run: Path, show: Show) -> None:
    lines = show(run, step=10, prompt="q1").splitlines()
    rollout = next(line for line in lines if "┿" in line)
    branch = next(line for line in lines if line.strip().startswith("━") and "✓ 1" in line)
    # a column per token: the branch starts where the pivot is
    assert rollout.index("◆") == branch.index("━") == 2 + 6


def test_branches_that_are_alike_are_drawn_once(tmp_path: Path, show: Show) -> None:
    tree = small_tree()
    more = [node(tree, 0, 6, "7*2=4;#4", 1.0, 1), node(tree, 0, 6, "7*2=4;#4", 1.0, 1)]
    run = write_run(tmp_path / "run", {1: [tree.add([], more)]})
    text = show(run, prompt="q1")
    # 3 of 4 siblings are right: advantages 1/4 and -3/4
    assert "✓ 1  advantage +0.250  3×  7*2=4;#4<eos>" in text
    assert "✗ 0  advantage -0.750  1×  7*2=3;#3<eos>" in text
    # too narrow for one line: the text stands below, where its bar begins
    lines = show(run, prompt="q1", width=50).splitlines()
    place = next(i for i, line in enumerate(lines) if "3×" in line)
    assert lines[place].index("━") == lines[place + 1].index("7*2=4") == 2 + 6


def test_a_rollout_that_succeeds_has_nothing_to_rescue(tmp_path: Path, show: Show) -> None:
    tree = small_tree()
    tree = tree.add([Pivot(1, 6, 2, ratio=0.5)], [])
    tree = tree.add([], [node(tree, 1, 6, "7*2=4;#4", 1.0, 2), node(tree, 1, 6, "7*2=3;#3", 0.0, 2)])
    text = show(write_run(tmp_path / "run", {1: [tree]}), prompt="q1")
    assert "after token 6, r = .50: 0 of 2 branches better, nothing to rescue" in text
    assert "1 of 1 pivot rescued" in text and "not recovered" not in text
    lost = small_tree()
    lost = replace(lost, nodes=(*lost.nodes[:2], *(replace(each, score=lost.nodes[0].score) for each in lost.nodes[2:])))
    text = show(write_run(tmp_path / "lost", {1: [lost]}), prompt="q1")
    assert "r = .50, Q = .50: not recovered in 2 tries" in text


def test_advantages_of_parts_stand_in_a_line_of_their_own(tmp_path: Path, show: Show) -> None:
    run = write_run(tmp_path / "run", {1: [small_tree()]})
    path = run / "trees" / "step-000001.jsonl.gz"
    raw = json.loads(gzip.decompress(path.read_bytes()))
    raw["credit"] = [
        {"node": 0, "start": 0, "end": 6, "advantage": 0.25, "stream": "main"},
        {"node": 0, "start": 6, "end": 15, "advantage": -0.5, "stream": "main"},
    ]
    path.write_bytes(gzip.compress(json.dumps(raw).encode() + b"\n"))
    text = show(run, prompt="q1")
    assert "rollout 1  ✗ 0  advantages by part  15 tokens\n  tokens 1–6 +0.250, tokens 7–15 -0.500\n" in text


def test_a_tree_without_a_tokenizer(tmp_path: Path, show: Show) -> None:
    run = write_run(tmp_path / "mute", {1: [small_tree()]}, with_tokenizer=False)
    text = show(run, prompt="q1")
    assert "3+4=7;7*2=5;#5" in text
    assert "4;#4" in text


def test_a_prompt_by_its_number_and_in_the_newest_step(run: Path, show: Show) -> None:
    assert "step 10 · prompt easy" in show(run, step=10, prompt="1")
    assert "step 20 · prompt q1" in show(run, prompt="q1")
    assert "step 10 · prompt easy" in show(run, prompt="easy")


def test_only_leaves_out_rollouts(run: Path, show: Show) -> None:
    text = show(run, step=10, prompt="q1", only="rescued")
    assert "rollout 1" in text and "rollout 2" not in text
    assert "1 rollout left out by --only rescued" in text


def test_trees_of_several_levels_are_drawn(tmp_path: Path, show: Show) -> None:
    tree = small_tree()
    tree = tree.add([Pivot(2, 3, 2, ratio=0.8)], [])
    tree = tree.add([], [node(tree, 2, 3, "=9;#9", 0.0, 2), node(tree, 2, 3, "=4;#4", 1.0, 2)])
    text = show(write_run(tmp_path / "run", {1: [tree]}), prompt="q1")
    assert "7*2◆=4;#4<eos>" in text
    assert "=9;#9<eos>" in text


def test_turns_of_an_episode_and_states_at_pivots(tmp_path: Path, show: Show) -> None:
    """What an environment wrote is marked and shown, never obeyed: markup, control characters, and states as JSON."""
    tree = small_tree()
    evil = "[bold]7\x1b[2J\u202e"
    size = len(tree.nodes[0].tokens)
    replies = (Reply(2, 4, evil, {"seen": [evil]}, -0.5, 2, 1), Reply(size, size, "over", {"seen": []}))
    tree = replace(tree, nodes=(replace(tree.nodes[0], replies=replies), *tree.nodes[1:]), start={"seen": "nothing"})
    place = write_run(tmp_path / "run", {10: [tree]})
    text = show(place, step=10, prompt="0", width=200)
    assert ", 2 of them given" in text
    assert "turn 1  2 calls, 1 failed  reward -0.5  → [bold]7\\x1b[2J\\u202e" in text
    assert "turn 2  → (not shown) over" in text
    assert "seen" not in text and "\x1b" not in text
    shown = show(place, step=10, prompt="0", width=200, states=True)
    pivot = next(pivot for pivot in tree.pivots if pivot.parent == 0)
    state = r'{"seen":' if pivot.offset >= 4 else r'{"seen": "nothing"}'
    assert f"state {state}" in shown and "\x1b" not in shown
    page = tree_json(SavedTree(10, 0, tree, ()), None)
    assert page["nodes"][0]["g"][0] == [2, 4, evil, -0.5, 2, 1]
    assert json.loads(page["pivots"][0]["z"]) == {"seen": "nothing"}


def test_nothing_steers_the_terminal(tmp_path: Path, show: Show) -> None:
    tree = small_tree()
    evil = "\x1b]0;title\x07\x1b[2J\u202e[bold]x[/bold]\r"
    nodes = (node(Tree(tree.prompt), -1, 0, evil, 0.0, 0), *tree.nodes[1:2])
    tree = Tree(replace(tree.prompt, id=evil, question=evil, answer=evil), nodes, tree.pivots[:1])
    run = write_run(tmp_path / "run", {1: [tree]})
    for text in (show(run, step=1), show(run, step=1, prompt="0")):
        assert not {"\x1b", "\x07", "\r", "\u202e"} & set(text)
        assert "[bold]x[/bold]" in text
    assert plain("a\nb\x1b[2J") == "a⏎b\\x1b[2J"


def test_errors_name_what_there_is(run: Path, tmp_path: Path) -> None:
    for options, sentence in [
        ({"step": 12}, r"--step 12: .* no trees of that step; .* with trees are 10, 20 \(log.trees_every is 1\)"),
        ({"step": 10, "prompt": "q3"}, r"--prompt 'q3' is not in step 10; step 10 has 2 prompts, such as 'q1', 'easy'"),
        ({"prompt": "q3"}, "is not in any of the 2 saved steps"),
        ({"step": 10, "prompt": "q1", "only": "truncated"}, "is in step 10, but not truncated: it is mixed, rescued"),
    ]:
        with pytest.raises(DataError, match=sentence):
            run_inspect(InspectOptions(run, **options))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="--width is 10"):
        run_inspect(InspectOptions(run, width=10))
    never = write_run(tmp_path / "never", {}, last_step=3, recipe={"log": {"trees_every": None}})
    with pytest.raises(DataError, match=r"log.trees_every is not set.*--log.trees_every 10"):
        run_inspect(InspectOptions(never))
    lost = write_run(tmp_path / "lost", {}, last_step=30, recipe={"log": {"trees_every": 10}})
    with pytest.raises(DataError, match=r"although log.trees_every is 10 .* at step 30: .*trees is missing or empty"):
        run_inspect(InspectOptions(lost))
    early = write_run(tmp_path / "early", {}, last_step=3, recipe={"log": {"trees_every": 10}})
    with pytest.raises(DataError, match=r"no saved trees yet: log.trees_every is 10 and the run is at step 3"):
        run_inspect(InspectOptions(early))
    for limits in ({"steps": 3}, {"steps": 99, "max_sampled_tokens": 300}, {"steps": 99, "epochs": 2}):
        recipe = {"log": {"trees_every": 10}, "run": limits, "data": {"type": "synthetic", "chain_length": 3, "size": 64}}
        over = write_run(tmp_path / f"over-{[*limits][-1]}", {}, last_step=3, recipe=recipe)
        if "epochs" in limits:
            lines = (over / "metrics.jsonl").read_text().splitlines(keepends=True)
            with pytest.raises(DataError, match="no saved trees yet"):
                run_inspect(InspectOptions(over))
            (over / "metrics.jsonl").write_text("".join([*lines[:-1], lines[-1].replace("{", '{"data/epochs": 2.0, ', 1)]))
        with pytest.raises(DataError, match=r"the run ended with step 3; run it again under another name"):
            run_inspect(InspectOptions(over))


def test_a_long_response_keeps_its_indent_and_its_chain_fits(tmp_path: Path, show: Show) -> None:
    run = write_run(tmp_path / "run", {1: [random_tree("q1", 3, sums=60, rollouts=3, branches=2, skill=0.0)]})
    lines = show(run, prompt="q1", width=80).splitlines()
    assert max(len(line) for line in lines) <= 80
    start = next(i for i, line in enumerate(lines) if line.startswith("rollout 1"))
    # 60 ends of segments in 48 columns would be a fence
    assert "┿" not in lines[start + 1] and lines[start + 1].count("◆") == 1
    end = next(i for i, line in enumerate(lines) if line.startswith("  ◆ after"))
    assert end - start > 5 and all(line.startswith("  ") and line[2] != " " for line in lines[start + 2 : end])
    # 61 states, two to a column: the first and the last by their ratio, r = 1/62 and 61/62
    assert re.fullmatch(r"    Q along the chain  \.02 [▁▂▃▄▅▆▇█]{31} \.98", lines[end + 1])
    assert not any(line.endswith("✗ 0") for line in lines)
    assert lines[1].startswith("question  ") and lines[2].startswith(" " * 10)


def test_a_damaged_step_does_not_hide_the_others(run: Path, show: Show) -> None:
    path = run / "trees" / "step-000020.jsonl.gz"
    path.write_bytes(path.read_bytes()[:-20])
    text = show(run)
    assert [line.split()[:2] for line in text.splitlines()[1:3]] == [["10", "2"], ["20", "?"]]
    assert "step-000020.jsonl.gz cannot be read to its end" in " ".join(text.split())
    assert "step 10 · prompt q1" in show(run, prompt="q1")
    with pytest.raises(DataError, match="delete it"):
        run_inspect(InspectOptions(run, step=20, prompt="q1"))


def test_a_long_list_is_cut(tmp_path: Path, show: Show) -> None:
    run = write_run(tmp_path / "run", {1: [random_tree(f"q{i}", i) for i in range(70)]})
    assert "... and 10 more" in show(run, step=1)
