r"""Place of the answer in a response: behind `####`, in the last box, behind "the answer is", or in free text.

    boxed   the content of the last box
    gsm8k   the rest of the line after the last `####`
    any     behind the last of all these marks; without any of them the last formula or number
"""

from __future__ import annotations

import re
from typing import Literal

from deepgrpo.answers.boxed import find_box
from deepgrpo.answers.numbers import read_number
from deepgrpo.answers.running_text import first_number, last_number

AnswerFormat = Literal["boxed", "gsm8k", "any"]

MARKER = "####"

_PHRASE = re.compile(
    r"\b(?:answer|(?:correct|right|final) (?:option|choice|result|solution|value))\b(?:\s+(?:to|for|of)\s[^.\n:=]{0,60}?)?"
    r"(?:\*\*|__|\}|\s)*(?::|=|\bis\b|\bare\b|\bwould be\b|\bwill be\b|\bmust be\b)"
    r"(?:\*\*|__|\}|:|=|\s|\b(?:therefore|thus|hence|then|simply|just|indeed|equal to|approximately|about|now|given by"
    r"|as follows|option|choice)\b)*",
    re.IGNORECASE,
)
_LONGEST_SENTENCE = 1000  # characters
# "I hope my answer is right" names no answer
_REMARK = re.compile(
    r"(?:not |also |in)?(?:right|correct|wrong|valid|clear|reasonable|consistent|here|below|above|that|what|found"
    r"|obtained)\b",
    re.IGNORECASE,
)
_SENTENCE_END = re.compile(r"[.;](?=\s|$|\*)|(?<!\\)[!?](?=\s|$)|\n")
_FORMULA = re.compile(
    r"\$\$(?P<a>[^$]+)\$\$|(?<![\\\w])\$(?P<b>[^$\n]+)(?<!\\)\$(?!\d)"
    r"|\\\((?P<c>(?:[^\\]|\\(?![()]))+)\\\)|\\\[(?P<d>(?:[^\\]|\\(?![\[\]]))+)\\\]"
)
_COMMAND = re.compile(r"\\(?:text\s*\{[^{}]*\}|[A-Za-z]+)")
_PROSE = re.compile(r"[A-Za-z]{3,}|\b(?:or|to|is|of|in|at|by|so|we|it|as|if|he)\b", re.IGNORECASE)
_BECAUSE = re.compile(r",?\s+(?:because|since)\b")
_BETWEEN = re.compile(r"\s*(?:,|;|,?\s*and|,?\s*or)\s*")
_TUPLE = re.compile(r"[(\[][^()\[\]\n]*,[^()\[\]\n]*[)\]]")
_TAG = re.compile(r"<[/|][^<>]*>")
_OPERATION = re.compile(r"\d[^,;=()]{0,40}?(?:[+*/×]|\\times|\\cdot|\bx\b|\s[-–−]\s)")
_REASON = re.compile(
    r"\b(?:because|since|as|so|for|if|then|where|when|but|from|thus|hence|therefore|with|which)\b", re.IGNORECASE
)
_SEVERAL = re.compile(r"[,;]|\d\s+\d")
_NAME = re.compile(r"[A-Za-z][A-Za-z_ ]*(?:\([A-Za-z]\))?|\\text\s*\{[^{}]*\}")


def find_answer(completion: str, answer_format: AnswerFormat, *, numeric: bool = True) -> str | None:
    r"""The bare answer of a response, or None without one.

    Args:
        completion: the response, without its reasoning.
        answer_format: where to look.
        numeric: the reference is a number. The first number behind a mark is then the answer, unless what follows
            is an equation or a formula as a whole: `#### 540 (3 times a week)` is 540, `#### 1, 2, 72` is 1.

    >>> find_answer("#### 3 apples, 5 pears", "gsm8k"), find_answer("\\boxed{4}, so the answer is 5.", "any")
    ('3', '5')
    """
    if answer_format == "boxed":
        found = find_box(completion)
        return None if found is None else found[1].strip() or None
    if answer_format == "gsm8k":
        line = _behind_marker(completion)
        return None if line is None else answer_of_line(line[1], numeric)
    return _anywhere(completion, numeric)


def _anywhere(completion: str, numeric: bool) -> str | None:
    marked = [place for place in (_behind_marker(completion), _behind_phrase(completion, numeric)) if place is not None]
    last = max(marked, default=None)
    box = find_box(completion)
    # a box on the line of another mark starts behind it, and so is the later one
    if box is not None and box[1].strip() and (last is None or box[0] > last[0]):
        return box[1].strip()
    if last is not None:
        return answer_of_line(last[1], numeric)
    return _free(completion, numeric)


def _behind_marker(completion: str) -> tuple[int, str] | None:
    """Position of the last `####` that a text follows, and the rest of its line."""
    end = len(completion)
    while (at := completion.rfind(MARKER, 0, end)) >= 0:
        line = completion[at + len(MARKER) : end].strip().split("\n", 1)[0].strip("# ")
        if line:
            return at, line
        end = at
    return None


def _behind_phrase(completion: str, numeric: bool) -> tuple[int, str] | None:
    """Position of the last "answer is" that a fitting answer follows, and the rest of its sentence."""
    for match in reversed(list(_PHRASE.finditer(completion))):
        rest = completion[match.end() : match.end() + _LONGEST_SENTENCE]
        end = _SENTENCE_END.search(rest)
        sentence = (rest[: end.start()] if end else rest).strip().strip("*_ ")
        if sentence and (_has_number(sentence) if numeric else _REMARK.match(sentence) is None):
            return match.start(), sentence
    return None


def _has_number(sentence: str) -> bool:
    """True if a formula or a number stands at the start of a sentence, not somewhere in its prose."""
    if "\\" in sentence or "$" in sentence or read_number(sentence) is not None:
        return True
    first = first_number(sentence)
    before = "" if first is None else sentence[: first[0]]
    return first is not None and "," not in before and not before.endswith(" of ") and len(_PROSE.findall(before)) <= 3


def answer_of_line(line: str, numeric: bool) -> str:
    """The answer in the text behind a mark: see `find_answer` for numbers. Without one, the text itself."""
    line = _TAG.sub("", line).strip()
    box = find_box(line)
    if box is not None and box[1].strip():
        return box[1].strip()
    if not numeric:
        return _only_formula(_BECAUSE.split(line)[0])
    if read_number(line) is not None:
        return line
    left, equals, right = line.rpartition("=")
    if equals and "," not in left and read_number(right) is not None:
        bare = _COMMAND.sub(" ", left)
        counted = _OPERATION.search(left) and not _REASON.search(bare)
        if counted or _PROSE.search(bare) is None or _NAME.fullmatch(left.strip()):
            return right.strip()
    formula = _only_formula(line)
    if formula != line:
        return answer_of_line(formula, numeric)
    if not _SEVERAL.search(line) and _PROSE.search(_COMMAND.sub(" ", line)) is None:
        return line
    first = first_number(line)
    return line if first is None else line[first[0] : first[1]]


def _only_formula(line: str) -> str:
    """The only formula of a sentence with one; else the line."""
    formulas = list(_FORMULA.finditer(line))
    if len(formulas) != 1:
        return line
    outside = line[: formulas[0].start()] + line[formulas[0].end() :]
    return _content(formulas[0]) if _PROSE.search(outside) or not outside.strip(" .") else line


def _free(completion: str, numeric: bool) -> str | None:
    """The whole response if it is an answer, else its last formulas or number."""
    text = completion.strip()
    if not text:
        return None
    if read_number(text) is not None or ("\n" not in text and _PROSE.search(_COMMAND.sub(" ", text)) is None):
        return text
    formulas = list(_FORMULA.finditer(text))
    number = last_number(text)
    if formulas and (number is None or formulas[-1].end() >= number[1]):
        first = len(formulas) - 1
        while first and _BETWEEN.fullmatch(text, formulas[first - 1].end(), formulas[first].start()):
            first -= 1
        return _content(formulas[-1]) if first == len(formulas) - 1 else text[formulas[first].start() : formulas[-1].end()]
    if number is not None and numeric:
        return text[number[0] : number[1]]
    return text if numeric else next(iter(reversed(_TUPLE.findall(text))), text)


def _content(match: re.Match[str]) -> str:
    return next(value for value in match.groups() if value is not None).strip()
