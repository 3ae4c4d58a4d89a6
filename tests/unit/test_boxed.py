"""The last box of a response, as the maths reward, the gym and the vote of maj@k read it."""

from __future__ import annotations

import time

import pytest

from deepgrpo.answers.boxed import last_boxed


@pytest.mark.parametrize(
    ("text", "content"),
    [
        ("\\boxed{1}", "1"),
        ("\\boxed{1} \\boxed{\\frac{1}{2}}.", "\\frac{1}{2}"),
        ("\\boxed{1} \\boxed{2", "1"),
        ("\\boxed{\\boxed{3}}", "3"),
        ("\\boxed{\\{1, 2\\}}", "\\{1, 2\\}"),
        ("\\boxed{\\left\\{1\\right.}", "\\left\\{1\\right."),
        ("} \\boxed{}", ""),
        ("\\boxed{5} so \\boxed{\\frac{1", "5"),  # cut off: the last box that closes counts
        ("{ \\boxed{6}", "6"),
        ("x \\\\boxed{4}", "4"),  # a doubled backslash
        ("boxed{1}", None),
        ("\\boxed {5}", "5"),
        ("\\boxed 5.", "5"),
        ("\\boxed -1,200", "-1,200"),
        ("\\fbox{5}", "5"),
        ("\\boxed{5} \\boxed{ }", "5"),  # an empty box hides nothing
        ("\\boxed{5} in \\boxed form", "5"),
        ("\\boxed{1\\\\{2}}", "1\\\\{2}"),  # a line break escapes no brace
        ("\\boxed{1\\\\\\}", None),
        ("", None),
    ],
)
def test_last_boxed(text, content):
    assert last_boxed(text) == content


def test_last_boxed_takes_linear_time():
    started = time.process_time()
    assert last_boxed("\\boxed{" * 50_000) is None
    assert last_boxed("\\boxed{1" + "{}" * 50_000 + "}") is not None
    assert last_boxed("\\boxed " * 50_000) is None
    assert time.process_time() - started < 2
