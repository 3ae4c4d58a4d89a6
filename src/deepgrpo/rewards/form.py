r"""Form of an answer: a number, words, a list, a tuple, an interval, a matrix or a formula.

    text ─► tidy ─► number? words? list? bracket? equation? ─► Form ─► compared (`rewards.math_check`), voted (`canonical`)
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from deepgrpo.answers.characters import tidy
from deepgrpo.answers.numbers import Number, canonical, read_number
from deepgrpo.rewards.words import choice_of, moment_of, name_of, prose_of, strip_unit, with_commands, words_of

_DEEPEST = 6
_LONGEST = 20_000  # characters
_RELATION = re.compile(r"\\le(?![A-Za-z])|\\ge(?![A-Za-z])|<|>")
_MATRIX = re.compile(
    r"\\begin\{(?P<kind>[pbB]?matrix|smallmatrix|array)\}(?:\{[^{}]*\})?(?P<body>.*)\\end\{(?P=kind)\}", re.DOTALL
)
_JOINED = re.compile(
    r"\s*(?:\\text\s*\{\s*,?\s*(?:and|or)\s*,?\s*\}|(?<![A-Za-z\\])(?:and|or)(?![A-Za-z])"
    r"|\\(?:lor|vee|land|wedge)(?![A-Za-z]))\s*"
)
_THOUSANDS = re.compile(r"(?<![\d,.])[1-9]\d{0,2}(?:,\d{3})+(?![\d,])")
_WRAPPING = re.compile(r"(?:\\(?:boxed|fbox|mathbf|boldsymbol|bm|ensuremath)\s*)?\{")
_ENUMERATION = re.compile(r"\\text\s*\{([^{}]*(?:,| and | or )[^{}]*)\}")
_BASED = re.compile(r"(\d[\dA-F]*)\s*_\s*\{?\s*(\d{1,2})\s*\}?")
_INFINITY = "\\infty"


@dataclass(frozen=True, slots=True)
class Form:
    """An answer that was read. `items` are the parts of a sequence; a matrix has its rows there."""

    kind: str
    """number, words, choice, list, set, union, dots, matrix, row, based (52_8), relation, equation, formula, or a pair of
    brackets such as "(]"."""
    text: str
    number: Number | None = None
    items: tuple[Form, ...] = ()
    name: str = ""
    """Left side of "x = 5"."""

    @property
    def bracketed(self) -> bool:
        return len(self.kind) == 2


def read_form(text: str) -> Form:
    """The form of an answer; "formula" if it is nothing else."""
    # no answer is this long, and reading takes more than linear time on some texts
    return _read(tidy(text), 0) if len(text) <= _LONGEST else Form("formula", text)


def canonical_form(form: Form) -> str:
    """Short text, equal for answers that are equal without algebra."""
    if form.number is not None:
        return canonical(form.number)
    if form.kind in ("words", "choice"):
        return form.text
    if form.items:
        parts = [canonical_form(item) for item in form.items]
        if form.kind in ("list", "set", "union"):
            return ",".join(sorted(parts)) if form.kind != "union" else "\\cup".join(sorted(parts))
        return form.kind[0] + ",".join(parts) + form.kind[1] if form.bracketed else f"{form.kind}({','.join(parts)})"
    return compact(form.text)


def compact(text: str) -> str:
    """A formula without white space."""
    return re.sub(r"\s+", "", text)


def _read(text: str, depth: int) -> Form:
    text = _outer(text)
    number = read_number(text)
    if number is not None:
        return Form("number", text, number)
    if depth > _DEEPEST:
        return Form("formula", text)
    if (letter := choice_of(text)) is not None:
        return Form("choice", letter)
    several = len(_split(text, ",;")) > 1
    if not several and (word := words_of(text)) is not None:
        return Form("words", word)
    if (moment := moment_of(text)) is not None:
        return Form("words", moment)
    if (based := _BASED.fullmatch(text)) is not None:
        return Form("based", f"{based[1]}_{based[2]}")
    if "\\ldots" in text:
        return Form("dots", text)
    matrix = _MATRIX.fullmatch(text)
    if matrix is not None:
        rows = [row for row in matrix["body"].split("\\\\") if row.strip()]
        return Form("matrix", text, items=tuple(_row(row, depth) for row in rows))
    return _compound(text, depth)


def _row(text: str, depth: int) -> Form:
    return Form("row", text, items=tuple(_read(cell.strip(), depth + 1) for cell in text.split("&")))


def _compound(text: str, depth: int) -> Form:
    brackets = _brackets(text)
    if brackets is not None:
        kind, inner = brackets
        if kind != "set" and "\\pm" in inner and len(_split(inner, ",;")) > 1:
            return _plus_and_minus(text, depth)
        items = _items(_split(inner, ",;"), depth)
        if kind == "set":
            return Form("set", text, items=items) if inner.strip() else Form("formula", "\\emptyset")
        if len(items) > 1:
            return Form(kind, text, items=items)
        if kind in ("()", "[]") and inner.strip():
            return _read(inner, depth + 1)
    parts = _split(text, ",;")
    if len(parts) > 1:
        return Form("list", text, items=_items(parts, depth))
    unions = _split(text, "\\cup")
    if len(unions) > 1:
        return Form("union", text, items=_items(unions, depth))
    prose = prose_of(text)
    sides = _split(text, "=")
    if len(sides) > 1 and not re.search(r"[<>]|\\(?:le|ge|ne|approx|equiv)(?![A-Za-z])", text):
        return _equation(text, sides, depth)
    if (found := re.match(r"(.+?)\s*\\in(?![A-Za-z])\s*(.+)", text)) is not None and name_of(found[1]):
        return replace(_read(found[2], depth + 1), name=name_of(found[1]))
    if _RELATION.search(text):
        return _relation(text, depth)
    if (found := re.match(r"(.+?)\s*\\equiv(?![A-Za-z])\s*(.+)", text)) is not None and name_of(found[1]):
        return replace(_read(found[2], depth + 1), name=name_of(found[1]))
    if "\\approx" in text:
        return _read(text.rpartition("\\approx")[2].strip(), depth + 1)
    if "\\pm" in text:
        return _plus_and_minus(text, depth)
    if text == "\\mathbb{R}":
        return Form("()", text, items=(Form("formula", f"-{_INFINITY}"), Form("formula", _INFINITY)))
    if prose is not None:
        return Form("words", prose)
    stripped = strip_unit(text)
    if stripped != text:
        return _read(stripped, depth + 1)
    return Form("formula", with_commands(text))


def _items(parts: list[str], depth: int) -> tuple[Form, ...]:
    """Forms of the parts of a sequence; "1 ± 2" gives two."""
    found: list[Form] = []
    for part in parts:
        form = _read(part.strip(), depth + 1)
        found += form.items if form.kind == "list" else [form]
    return tuple(found)


def _outer(text: str) -> str:
    r"""The text without a \boxed{...}, \text{...} or \mathbf around all of it, and without braces around all of it."""
    while (match := _WRAPPING.match(text)) and _closing(text, match.end() - 1) == len(text) - 1:
        text = text[match.end() : -1].strip()
    enumeration = _ENUMERATION.fullmatch(text)
    return enumeration[1].strip() if enumeration is not None else text


def _equation(text: str, sides: list[str], depth: int) -> Form:
    first, last = sides[0].strip(), sides[-1].strip()
    if not first or not last:
        return Form("formula", text)
    named = name_of(first)
    if named:
        return replace(_read(last, depth + 1), name=named)
    if len(sides) == 2 and name_of(last) and not _mentions(first, last):
        return replace(_read(first, depth + 1), name=name_of(last))
    value = _read(last, depth + 1)
    # "5 + 3 = 8" is a calculation with its result
    if not re.search(r"[A-Za-z]", re.sub(r"\\[A-Za-z]+", "", first)):
        if value.number is not None:
            return value
        if re.search(r"[A-Za-z]", re.sub(r"\\[A-Za-z]+", "", last)) is None and read_number(first) is not None:
            return _read(first, depth + 1)
    return Form("equation", text)


def _relation(text: str, depth: int) -> Form:
    r"""An inequality of one name as an interval: "2 \le x < 5" is [2, 5)."""
    operators = [match.group() for match in _RELATION.finditer(text)]
    sides = [side.strip() for side in _RELATION.split(text)]
    unread = Form("relation", with_commands(text))
    if not all(sides):
        return unread
    if len(sides) == 2 and not name_of(sides[0]) and name_of(sides[1]):
        sides, operators = sides[::-1], [_flip(operators[0])]
    if len(sides) == 2 and name_of(sides[0]) and not _mentions(sides[1], sides[0]):
        bound = _read(sides[1], depth + 1)
        if _is_upward(operators[0]):
            kind, items = "[)" if operators[0] == "\\ge" else "()", (bound, Form("formula", _INFINITY))
        else:
            kind, items = "(]" if operators[0] == "\\le" else "()", (Form("formula", f"-{_INFINITY}"), bound)
        return Form(kind, text, items=items, name=name_of(sides[0]))
    if len(sides) == 3 and name_of(sides[1]) and _is_upward(operators[0]) == _is_upward(operators[1]):
        if _is_upward(operators[0]):
            sides, operators = sides[::-1], [_flip(each) for each in operators[::-1]]
        kind = ("[" if "l" in operators[0] else "(") + ("]" if "l" in operators[1] else ")")
        items = (_read(sides[0], depth + 1), _read(sides[2], depth + 1))
        return Form(kind, text, items=items, name=name_of(sides[1]))
    return unread


def _is_upward(operator: str) -> bool:
    return operator in (">", "\\ge")


def _flip(operator: str) -> str:
    return {"<": ">", ">": "<", "\\le": "\\ge", "\\ge": "\\le"}[operator]


def _mentions(text: str, name: str) -> bool:
    return re.search(rf"(?<![A-Za-z]){re.escape(name)}(?![A-Za-z])", text) is not None


def _plus_and_minus(text: str, depth: int) -> Form:
    r"""Both values of a text with \pm; \mp takes the other sign."""
    signs = (("+", "-"), ("-", "+"))
    both = (re.sub(r"\\mp(?![A-Za-z])\s*", minus, re.sub(r"\\pm(?![A-Za-z])\s*", plus, text)) for plus, minus in signs)
    return Form("list", text, items=tuple(_read(each.lstrip("+"), depth + 1) for each in both))


def _brackets(text: str) -> tuple[str, str] | None:
    r"""Kind and content of the brackets around a whole text: "()", "[)", ..., or "set" for \{...\}."""
    if text.startswith("\\{") and text.endswith("\\}"):
        return ("set", text[2:-2]) if _closing(text, 1) == len(text) - 1 else None
    text = text.replace("\\langle", "(").replace("\\rangle", ")") if text.startswith("\\langle") else text
    if text[:1] in ("(", "[") and text[-1:] in (")", "]") and _closing(text, 0) == len(text) - 1:
        return text[0] + text[-1], text[1:-1]
    return None


def _closing(text: str, start: int) -> int:
    """Position of the bracket that closes the one at `start`, or -1. Round and square brackets may close each other."""
    depth = 0
    for index in range(start, len(text)):
        if text[index] in "([{":
            depth += 1
        elif text[index] in ")]}":
            depth -= 1
            if depth == 0:
                return index
    return -1


def _split(text: str, separators: str) -> list[str]:
    """Parts of a text between separators outside all brackets; "and" and "or" separate like commas."""
    if separators == ",;":
        text = _JOINED.sub(lambda match: "," if match.group().strip() else " ", text)
        if re.search(r",\s|;", text):
            text = join_groups(text)
    parts, depth, last = [], 0, 0
    index = 0
    while index < len(text):
        char = text[index]
        if char in "([{":
            depth += 1
        elif char in ")]}":
            depth -= 1
        elif depth == 0 and (char in separators if separators[0] != "\\" else text.startswith(separators, index)):
            parts.append(text[last:index])
            index += 1 if separators[0] != "\\" else len(separators)
            last = index
            continue
        index += 1
    parts.append(text[last:])
    filled = [part for part in parts if part.strip()]
    return filled if separators == ",;" else parts


def join_groups(text: str) -> str:
    """Remove the thousands separators of the numbers in a text: "1,200 + x" → "1200 + x"."""
    return _THOUSANDS.sub(lambda match: match.group().replace(",", ""), text)
