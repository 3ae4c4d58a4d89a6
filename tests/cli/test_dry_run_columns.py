"""The dry run checks that the data have the columns that the reward needs."""

from __future__ import annotations

from pathlib import Path

import pytest

from conftest import TINY
from deepgrpo.cli import main

USER = "{type = 'user', function = 'mine.py:graded'}"
JUDGE = "{type = 'judge', base_url = 'http://127.0.0.1:9/v1', model = 'm', cache = 'judged', prompt = '{rubric} {response}'}"


@pytest.mark.parametrize(
    ("reward", "says"),
    [
        (USER, "the reward function 'mine.py:graded' asks for 'grade', which the data does not have"),
        (JUDGE, "reward.prompt has the placeholder {rubric}, for which a row has no value"),
        (f"{{parts = {{task = {{type = 'task'}}, own = {USER}}}}}", "asks for 'grade'"),
    ],
)
def test_a_column_that_is_missing(reward: str, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("mine.py").write_text("def graded(completions, grade, **columns):\n    return [0.0 for _ in completions]\n")
    Path("tiny.toml").write_text(
        f"[model]\n{chr(10).join(f'{key} = {value!r}' for key, value in TINY.items())}\n"
        "[data]\ntype = 'synthetic'\nchain_length = 2\n[reward]\ntype = 'task'\n[sampling]\nmax_new_tokens = 8\n"
    )
    assert main(["train", "tiny.toml", "--dry-run", "--reward", reward]) != 0
    assert says in capsys.readouterr().err
