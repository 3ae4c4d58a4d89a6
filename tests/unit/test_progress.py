"""Progress of long work: plain lines in a file, live lines on a terminal, nothing elsewhere."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator

import pytest
from rich.console import Console

from deepgrpo.progress import Display, clock_time, fitting, is_shown, phase, showing
from deepgrpo.terminal import Terminal


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def plain(said: list[str], clock: Clock) -> Display:
    return Display(Console(file=io.StringIO()), say=said.append, clock=clock)


def test_plain_lines_are_few() -> None:
    """Work of 90 s that is looked at every second: a line after 30 s, after 60 and after 90."""
    said: list[str] = []
    clock = Clock()
    display = plain(said, clock)
    with showing(display), phase("evaluation", 512) as outer, phase("sampling", 256) as advance:
        for second in range(1, 91):
            clock.now = second
            advance(2, f"{100 * second:,} tokens")
            display.tell()
        outer(256)
    assert said == [
        "evaluation 0/512 · sampling 60/256, 3,000 tokens, 0:30",
        "evaluation 0/512 · sampling 120/256, 6,000 tokens, 1:00",
        "evaluation 0/512 · sampling 180/256, 9,000 tokens, 1:30",
    ]


def test_short_work_has_no_plain_line() -> None:
    said: list[str] = []
    clock = Clock()
    display = plain(said, clock)
    with showing(display):
        for _ in range(10):  # ten steps of 20 s
            with phase("sampling", 4) as advance:
                clock.now += 20
                advance(4)
                display.tell()
    display.tell()  # between phases
    assert said == []


def test_a_single_long_call_gets_lines_from_a_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deepgrpo.progress._LOOK_EVERY_S", 0.001)
    import threading

    heard = threading.Event()
    clock = Clock()
    display = Display(Console(file=io.StringIO()), say=lambda line: heard.set(), clock=clock)
    with display, showing(display), phase("scoring 8 responses with judge"):
        clock.now = 31.0
        assert heard.wait(60)
    assert display._teller is not None and not display._teller.is_alive()


def frames(width: int, work: Iterator[None], display: Display, screen: io.StringIO) -> list[str]:
    """What a terminal shows after each turn of the work."""
    found = []
    for _ in work:
        screen.truncate(screen.seek(0))
        assert display.live is not None
        display.live.refresh()
        text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.getvalue())
        lines = [line.rstrip() for line in re.split(r"[\r\n]+", text) if line.strip()]
        assert all(len(line) <= width for line in lines)
        found.append("\n".join(lines))
    return found


@pytest.mark.parametrize("width", [60, 80])
def test_live_lines_fit_the_terminal(width: int) -> None:
    screen = io.StringIO()
    display = Display(Terminal(file=screen, force_terminal=True, width=width))

    def work() -> Iterator[None]:
        with phase("evaluation", 1024) as outer:
            with phase("sampling", 512) as advance:
                advance(128, "34,200 tokens")
                yield
            outer(512)
            yield

    with display, showing(display):
        first, second = frames(width, work(), display, screen)
        assert display.live is not None and not display.live.tasks
    assert re.search(r"sampling +[━╺╸]+ +128/512 0:00 +34,200 tokens", first)
    assert "evaluation" in first and "0/1024" in first
    assert "sampling" not in second and "512/1024" in second
    assert "…" not in first + second


def test_nothing_is_shown_elsewhere() -> None:
    said: list[str] = []
    display = plain(said, Clock())
    with phase("sampling", 3) as advance:
        advance(3)
    with showing(display):
        with showing(None), phase("the caller's own"):
            assert not is_shown() and not display.phases
        assert is_shown()
        with phase("ours"):
            assert [each.what for each in display.phases] == ["ours"]
    assert not is_shown() and not display.phases


def test_phases_close_after_an_error() -> None:
    display = plain([], Clock())
    with showing(display), pytest.raises(ZeroDivisionError), phase("outer"), phase("inner"):
        raise ZeroDivisionError
    assert not display.phases


def test_figures_are_shown_whole() -> None:
    assert fitting(("reward .41", "eval .58", "entropy .33"), 20) == "reward .41  eval .58"
    assert fitting(("reward .41",), 9) == ""
    assert [clock_time(s) for s in (5.9, 185, 7800)] == ["0:05", "3:05", "2:10:00"]
