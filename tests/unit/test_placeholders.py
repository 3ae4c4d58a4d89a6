r"""Placeholders of templates: filled, kept as text, or named in an error; never trained on by mistake."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from deepgrpo.config import JsonlData, TemplateConfig
from deepgrpo.config.placeholders import pieces, placeholders
from deepgrpo.errors import ConfigError, DataError
from deepgrpo.prompts.chat import user_turn
from deepgrpo.prompts.source import PromptSource, build_source
from tiny import byte_tokenizer, write_jsonl

TOKENIZER = byte_tokenizer()
ROWS = [
    {"question": "1 + 1?", "answer": "2", "level": "easy", "n": 3, "metadata": {"kind": "sum"}},
    {"question": "2 + 2?", "answer": "4", "level": "hard", "n": 4, "metadata": {"kind": "sum"}},
]


def source_of(place: Path, rows: list[dict[str, Any]], user: str | None, system: str | None = None) -> PromptSource:
    template = TemplateConfig(
        preset="custom" if user else "plain", user=user, system=system, chat=None if system else False
    )
    path = write_jsonl(place / "d.jsonl", rows)
    return build_source(JsonlData(path=path, template=template), TOKENIZER, seed=0, context=512, shuffle=False)


def texts(source: PromptSource) -> list[str]:
    return [prompt.text for prompt in source.head(9)]


@pytest.mark.parametrize(
    ("user", "text"),
    [
        ("{question} ({level})", "1 + 1? (easy)"),
        ("{ question }{level}", "1 + 1?easy"),
        ("{metadata.kind}: {question}", "sum: 1 + 1?"),
        ("{n}. {question}", "3. 1 + 1?"),
        ("{question} {{level}} {{ n }}", "1 + 1? {level} { n }"),
        (r"\n{question}", r"\n1 + 1?"),
        ('{"q": "{question}", "answer": ...}', '{"q": "1 + 1?", "answer": ...}'),
    ],
)
def test_columns_are_filled_in(tmp_path: Path, user: str, text: str) -> None:
    assert texts(source_of(tmp_path, ROWS, user))[0] == text


@pytest.mark.parametrize(
    "latex",
    [
        r"\boxed{}", r"\boxed{answer}", r"\boxed{n}", r"\frac{a}{b}", r"\frac{\sqrt{ab}}{level}", r"\sqrt[3]{level}", r"x_{ij}",
        r"x^{10}", r"10^{-3}", r"{2}^{3}", r"$\{x : x > 0\}$", r"\left\{ x \right\}", r"\text{the answer}", r"1{,}000",
        r"\begin{cases} 1 \end{cases}", r"{n-1 \choose k}", r"{x}", r"\mathbb{R}^{nn}", "{}", "{", "}", "{ }",
        r"f: {1, ..., m}", r"\operatorname*{argmax}", r"\textbf{level}", r'{"answer": "..."}', "{a b}",
    ],
)  # fmt: skip
def test_braces_of_latex_are_text(tmp_path: Path, latex: str) -> None:
    """`answer`, `level` and `n` are columns here: as the argument of a command they are words all the same."""
    user = f"{{question}} {latex} {{level}}"
    assert texts(source_of(tmp_path, ROWS, user))[0] == f"1 + 1? {latex} easy"


def test_a_placeholder_inside_an_argument_is_filled(tmp_path: Path) -> None:
    user = r"\textbf{Level {level}: {question}} \boxed{{n}} \text{question} x_{n}"
    assert texts(source_of(tmp_path, ROWS, user))[0] == r"\textbf{Level easy: 1 + 1?} \boxed{3} \text1 + 1? x_3"


@pytest.mark.parametrize(
    ("user", "says"),
    [
        ("{problem}", "{problem}, which no row has; The columns are question, answer, level, n, metadata, metadata.kind;"),
        ("Q: {qestion}", "{qestion}, which no row has; did you mean {question}?"),
        ("{Question}", "{Question}, which no row has; did you mean {question}?"),
        ("{question} {levle}", "{levle}, which no row has; did you mean {level}?"),
        ("{question} {metadata.kin}", "{metadata.kin}, which no row has; did you mean {metadata.kind}?"),
        ("{question} {metadata.kind.x}", "{metadata.kind.x}, which no row has"),
        ("{question:s}", "{question:s}, which no row has; did you mean {question}?"),
        ("{question} {level!r}", "{level!r}, which no row has; did you mean {level}?"),
        ("{q}", "{q}, which no row has"),
        ("{0}", "{0}, which no row has"),
    ],
)  # fmt: skip
def test_a_placeholder_that_no_row_has_is_named(tmp_path: Path, user: str, says: str) -> None:
    with pytest.raises(ConfigError) as error:
        source_of(tmp_path, ROWS, user)
    assert f"template.user has the placeholder {says}" in str(error.value)


def test_a_system_turn_names_columns_too(tmp_path: Path) -> None:
    source = source_of(tmp_path, ROWS, None, system=r"Level {level}. Use \boxed{answer}.")
    assert texts(source)[0] == "<|system|>Level easy. Use \\boxed{answer}.\n<|user|>1 + 1?\n<|assistant|>"
    with pytest.raises(ConfigError, match=r"template.system has the placeholder \{levle\}.*did you mean \{level\}\?"):
        source_of(tmp_path, ROWS, "{question}", system="Level {levle}.")


@pytest.mark.parametrize("absent", [{"level": None}, {"level": float("nan")}, {}], ids=["null", "NaN", "no column"])
@pytest.mark.parametrize("turn", ["user", "system"])
def test_a_row_without_a_value_is_skipped_and_counted(tmp_path: Path, absent: dict[str, Any], turn: str) -> None:
    rows = [ROWS[0], {"question": "3 + 3?", "answer": "6", **absent}]
    texts_of = {"user": ("{question} {level}", None), "system": ("{question}", "Level {level}.")}
    source = source_of(tmp_path, rows, *texts_of[turn])
    assert ([p.question for p in source.head(9)], source.skipped) == (["1 + 1?"], {"no value for the template": 1})


def test_a_column_that_is_null_everywhere(tmp_path: Path) -> None:
    rows = [{"question": "1", "answer": "1", "level": None}] * 2
    with pytest.raises(ConfigError, match=r"the placeholder \{level\}, which is null in every row"):
        source_of(tmp_path, rows, "{question} {level}")
    # two columns, each row lacks one of them
    rows = [{"question": "1", "answer": "1", "aa": 1, "bb": None}, {"question": "2", "answer": "1", "aa": None, "bb": 1}]
    with pytest.raises(DataError, match=r"no usable row .* \(no value for the template: 2\); every row lacks a value"):
        source_of(tmp_path, rows, "{question} {aa} {bb}")


def test_a_template_without_a_placeholder_is_refused() -> None:
    for user in ("Why?", r"\boxed{answer}", "{{question}}", "{}"):
        with pytest.raises(ValueError, match=r"write \{question\} where the question goes"):
            TemplateConfig(preset="custom", user=user)


def test_columns_with_odd_names(tmp_path: Path) -> None:
    rows = [{"question": "q", "answer": "1", "my-col": "a", "my col": "b", "a.b": "c", "é": "d"}]
    assert texts(source_of(tmp_path, rows, "{question}{my-col}{my col}{a.b}{é}"))[0] == "qabcd"


@given(st.text(alphabet=r"{}\_^ab.1 ", max_size=30))
@example(r"\frac{a}{b}{ab}}{")
def test_a_template_is_its_pieces(template: str) -> None:
    """Nothing is lost but the outer braces of {{...}}; what has no value stays."""
    joined = "".join(piece if isinstance(piece, str) else piece.text for piece in pieces(template))
    assert (len(template) - len(joined)) % 2 == 0
    assert joined.replace("{", "").replace("}", "") == template.replace("{", "").replace("}", "")
    if "{{" not in template:
        assert joined == template
    if placeholders(template):
        assert user_turn("q", TemplateConfig(preset="custom", user=template)) == joined
