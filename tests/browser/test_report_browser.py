"""The page in a real browser, clicked through. Skipped where there is no Chromium or no Playwright."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from deepgrpo import cli
from deepgrpo.records import ROOT, Pivot, Tree
from saved_runs import node, random_run, random_tree, small_tree, write_run

playwright = pytest.importorskip("playwright.sync_api", reason="the browser tests need the package playwright")
CHROMIUM = os.environ.get("DEEPGRPO_CHROMIUM") or next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="the browser tests need Chromium (Debian: apt-get install chromium)")

playwright.expect.set_options(timeout=60_000)  # on a machine that has other things to do a page takes its time

Open = Callable[..., Any]
NASTY = "</script><img src=x onerror=document.title='broken'>\u202ea\x00b\n$title"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser: Any, tmp_path: Path) -> Iterator[Open]:
    """Write a report of run directories and open it. Any error in the console fails the test, and so does any request."""
    problems: list[str] = []
    pages: list[Any] = []

    def open_(*runs: Path, fragment: str = "", width: int = 1280, options: tuple[str, ...] = ()) -> Any:
        out = tmp_path / "page.html"
        assert cli.main(["report", *map(str, runs), "--out", str(out), *options]) == 0
        page = browser.new_page(viewport={"width": width, "height": 900})
        pages.append(page)
        page.on("console", lambda said: problems.append(said.text) if said.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("request", lambda asked: problems.append(asked.url) if not asked.url.startswith(("file:", "data:")) else None)
        page.goto(out.as_uri() + fragment)
        page.wait_for_selector("html[data-ready]")
        return page

    yield open_
    for page in pages:
        page.close()
    assert not problems


@pytest.fixture(scope="module")
def two_levels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Step 10 has a rescued, a truncated and an unrecoverable tree, step 20 three made-up ones."""
    rescued = small_tree("rescued-one", "3+4*2:")
    cut = Tree(replace(rescued.prompt, id="cut-one")).add(
        [Pivot(ROOT, 0, 2, "main")],
        [node(rescued, ROOT, 0, "3+4=7;", 0.0, 0, finish="length") for _ in range(2)],
    )
    lost = small_tree("lost-one")
    lost = replace(lost, nodes=(*lost.nodes[:2], *(replace(n, score=lost.nodes[0].score) for n in lost.nodes[2:])))
    trees = {10: [rescued, cut, lost], 20: [random_tree(f"made-up-{i}", i) for i in range(3)]}
    return write_run(tmp_path_factory.mktemp("runs") / "two", trees, warnings={10: ("entropy is low: 0.005 nats",)})


def found(page: Any, text: str) -> None:
    playwright.expect(page.locator("#found")).to_have_text(re.compile("^" + re.escape(text)))


def test_the_first_tree_is_open(two_levels: Path, open_page: Open) -> None:
    page = open_page(two_levels)
    found(page, "6 of 6 trees")
    assert "rescued-one at step 10" in page.inner_text("#tree h3")
    assert page.locator(".lane").count() == 2
    assert "after token 6, r = 0.5, Q = 0.5: 1 of 2 branches better — rescued" in page.inner_text(".lane summary")
    assert page.inner_text(".warning") == "step 10: entropy is low: 0.005 nats"
    # six trees: the list is as high as its rows, and no higher
    assert page.evaluate("document.getElementById('list').clientHeight") == 6 * 70


def test_a_step_is_chosen_and_trees_are_walked_through(two_levels: Path, open_page: Open) -> None:
    page = open_page(two_levels)
    page.select_option("#step", "20")
    found(page, "3 of 6 trees")
    playwright.expect(page.locator("#tree h3")).to_contain_text("made-up-0")
    page.click("text=next →")
    playwright.expect(page.locator("#tree h3")).to_contain_text("made-up-1")
    page.locator("#list").focus()
    page.keyboard.press("End")
    playwright.expect(page.locator("#tree h3")).to_contain_text("made-up-2")
    assert page.get_attribute("#list", "aria-activedescendant") == "row-2"
    assert page.url.endswith("#tree=0/20/2")


def test_filters_and_search(two_levels: Path, open_page: Open) -> None:
    page = open_page(two_levels)
    page.select_option("#step", "10")
    for flag, name in (("truncated", "cut-one"), ("unrecoverable", "lost-one"), ("rescued", "rescued-one")):
        page.click(f"[data-flag={flag}]")
        found(page, "1 of 6 trees")
        playwright.expect(page.locator("#tree h3")).to_contain_text(name)
        page.click(f"[data-flag={flag}]")
    # each button says how many trees it would leave, and the open tree stays open if it is among them
    assert page.inner_text("[data-flag=truncated]") == "truncated 1"
    page.click("#list .row >> nth=2")
    playwright.expect(page.locator("#tree h3")).to_contain_text("lost-one")
    assert "r = 0.5, Q = 0.5: not recovered in 2 tries" in page.inner_text(".lane summary")
    page.click("[data-flag=mixed]")
    found(page, "2 of 6 trees")
    playwright.expect(page.locator("#tree h3")).to_contain_text("lost-one")
    assert page.get_attribute("#list", "aria-activedescendant") == "row-1"
    page.click("[data-flag=mixed]")
    page.fill("#search", "LOST")
    playwright.expect(page.locator("#tree h3")).to_contain_text("lost-one")
    # this text stands in a branch only
    page.fill("#search", "7*2=4;#4")
    found(page, "0 of 6 trees")
    assert "No tree matches" in page.inner_text("#tree")
    page.check("#deep-search")
    found(page, "2 of 6 trees")
    assert page.locator("#tree mark").count() >= 8


def test_a_token_tells_its_advantage(two_levels: Path, open_page: Open) -> None:
    page = open_page(two_levels)
    page.locator("[data-text='0'] [data-t='2']").hover()
    tip = page.locator("#tip")
    playwright.expect(tip).to_contain_text("token 3")
    playwright.expect(tip).to_contain_text("advantage −0.5 in the main stream")
    playwright.expect(tip).to_contain_text("probability 60.7%")
    # a branch's tokens are counted along its path
    page.locator("[data-text='2'] [data-t='0']").hover()
    playwright.expect(tip).to_contain_text("token 7")
    playwright.expect(tip).to_contain_text("advantage +0.5 in the branch stream")
    page.locator("[data-text='2']").focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    playwright.expect(page.locator("#spoken")).to_contain_text("token 8")
    page.keyboard.press("Escape")
    playwright.expect(tip).to_be_hidden()


def test_the_picture_of_a_lane(two_levels: Path, open_page: Open) -> None:
    page = open_page(two_levels)
    lane = page.locator(".lane").first
    playwright.expect(lane.locator("[data-q]")).to_have_count(3)  # waits for the tree
    # the branch begins where the pivot is: 6 of 15 tokens to the right
    bars = [lane.locator(f"[data-node='{i}'] rect").bounding_box() for i in (0, 2)]
    assert bars[1]["x"] - bars[0]["x"] == pytest.approx(bars[0]["width"] * 6 / 15, abs=2)
    lane.locator("[data-q='1']").hover()
    playwright.expect(page.locator("#tip")).to_have_text(re.compile(r"state 2 of 3: after token 6\s*r = 0.5, Q = 0.5, drawn"))
    lane.locator("[data-node='3'] rect").click()
    playwright.expect(page.locator("[data-branch='3']")).to_have_class("flash")


def test_curves_over_another_axis(two_levels: Path, open_page: Open) -> None:
    page = open_page(two_levels)
    chart = page.locator("[data-chart=Reward]")
    assert "sampled tokens" in chart.inner_text()
    page.check("input[value=seconds]")
    playwright.expect(chart).to_contain_text("seconds of training")
    box = chart.locator(".plot").bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + 60)
    playwright.expect(page.locator("#tip")).to_contain_text("seconds of training")
    chart.locator(".plot").focus()
    page.keyboard.press("End")
    playwright.expect(page.locator("#spoken")).to_contain_text("step 20")
    page.select_option("#metric", "grad_norm")
    playwright.expect(page.locator("#other figure")).to_contain_text("grad_norm")


def test_axes_have_names_and_ticks_that_differ(two_levels: Path, open_page: Open) -> None:
    page = open_page(two_levels)
    for chart, unit in (("Accuracy", "accuracy"), ("Entropy", "nats per token"), ("Response length", "tokens")):
        playwright.expect(page.locator(f"[data-chart='{chart}'] .name")).to_have_text(["sampled tokens", unit])
    for chart in page.locator("#charts figure").all():
        ticks = chart.locator("svg[height] text[text-anchor=end]").all_text_contents()
        assert 3 <= len(ticks) == len(set(ticks)) <= 8


def test_a_success_has_nothing_to_rescue(tmp_path: Path, open_page: Open) -> None:
    tree = small_tree()
    tree = tree.add([Pivot(1, 6, 2, ratio=0.5)], [])
    tree = tree.add([], [node(tree, 1, 6, "7*2=4;#4", 1.0, 2), node(tree, 1, 6, "7*2=3;#3", 0.0, 2)])
    page = open_page(write_run(tmp_path / "run", {1: [tree]}))
    assert "1 of 1 pivot in failed rollouts rescued" in page.inner_text(".facts")
    assert "0 of 2 branches better — nothing to rescue" in page.locator(".lane summary").nth(1).inner_text()
    assert page.inner_text("[data-flag=unrecoverable]") == "not recovered 0"
    empty = page.locator("[data-chart=reliability]").bounding_box()  # no fit yet: as tall as its words
    assert empty and empty["height"] < 220


def test_several_runs_are_drawn_over_each_other(two_levels: Path, tmp_path: Path, open_page: Open) -> None:
    other = random_run(tmp_path / "other", steps=12, per_step=4)
    page = open_page(two_levels, other)
    assert page.locator("#runs tbody tr").count() == 2
    chart = page.locator("[data-chart=Entropy]")
    assert re.findall("two|other", chart.locator(".legend").inner_text()) == ["two", "other"]
    # colours for the runs, dashes for what of them
    assert chart.locator(".legend > span").all_inner_texts() == ["two", "other"]
    reward = page.locator("[data-chart=Reward] .legend > span")
    assert reward.all_inner_texts() == ["two", "other", "rollouts", "branches"]
    page.locator("#shown-runs input").first.uncheck()
    playwright.expect(chart.locator(".legend")).not_to_contain_text("two")
    page.select_option("#tree-run", "1")
    found(page, "48 of 48 trees")
    assert page.input_value("#pivot-run") == "1"
    assert page.locator("[data-chart='Q(r): where pivots are drawn'] [data-cell]").count() > 12
    assert "pivots" in page.locator("[data-chart=reliability]").inner_text()


def test_what_a_model_wrote_stays_text(tmp_path: Path, open_page: Open) -> None:
    tree = small_tree(NASTY, NASTY)
    nodes = (node(Tree(tree.prompt), ROOT, 0, NASTY, 0.0, 0), *tree.nodes[1:2])
    tree = Tree(replace(tree.prompt, answer=NASTY), nodes, tree.pivots[:1])
    run = write_run(tmp_path / "nasty", {1: [tree]}, warnings={1: (NASTY,)})
    page = open_page(run, options=("--title", "title " + NASTY))
    assert page.locator("img").count() == 0
    assert page.title().startswith("title </script>")
    text = page.inner_text(".lane")
    assert "</script><img src=x onerror=" in text.replace("\n", "")
    # what hides or turns text is shown by its name
    assert "U+202E" in text and "U+0000" in text and "⏎" in text
    assert "\u202e" not in page.inner_text("body")


def test_a_link_opens_its_tree(two_levels: Path, open_page: Open) -> None:
    page = open_page(two_levels, fragment="#tree=0/20/1")
    playwright.expect(page.locator("#tree h3")).to_contain_text("made-up-1")


def test_a_run_without_trees(tmp_path: Path, open_page: Open) -> None:
    run = write_run(tmp_path / "bare", {}, last_step=6, recipe={"log": {"trees_every": None}})
    page = open_page(run)
    assert "log.trees_every" in page.inner_text("#tree")
    assert "log.trees_every" in page.inner_text("#notes")


def test_without_a_tokenizer_texts_are_whole(tmp_path: Path, open_page: Open) -> None:
    page = open_page(write_run(tmp_path / "mute", {1: [small_tree()]}, with_tokenizer=False))
    assert page.inner_text("[data-text='0']") == "3+4=7;7*2=5;#5"


def test_a_narrow_screen_does_not_scroll_sideways(two_levels: Path, open_page: Open) -> None:
    page = open_page(two_levels, width=390)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    # every figure of the overview is in sight, with its name
    cells = page.eval_on_selector_all("#runs td", "all => all.map((e) => [e.dataset.name, e.getBoundingClientRect().right])")
    assert [name for name, _ in cells][:3] == ["run", "strategy", "seed"] and all(200 < right <= 390 for _, right in cells)


@pytest.mark.slow
def test_ten_thousand_trees_open_at_once_and_one_by_one(tmp_path: Path, open_page: Open) -> None:
    kinds = [random_tree("", i, rollouts=2, branches=2, sums=1) for i in range(100)]
    trees = {
        step: [replace(tree, prompt=replace(tree.prompt, id=f"q{step}-{i}")) for i, tree in enumerate(kinds)]
        for step in range(1, 101)
    }
    run = write_run(tmp_path / "many", trees)
    page = open_page(run)
    found(page, "10,000 of 10,000 trees")
    # only the rows that can be seen exist
    assert page.locator(".row").count() < 40
    page.locator("#list").focus()
    page.keyboard.press("End")
    playwright.expect(page.locator("#tree h3")).to_contain_text("q100-99")
    assert page.locator(".row").count() < 40
