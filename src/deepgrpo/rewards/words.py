r"""Words in answers: a word is a word, and a product of variables is none.

Letters in \text{...} are words. Bare letters are words if they look like one: "cat" and "act" differ. They are a product
if there are at most two of them ("xy" = "yx"), if they are neighbours in the alphabet ("abc"), or if they have no vowel
("mgh").
"""

from __future__ import annotations

import re
from itertools import pairwise

_TEXT = re.compile(r"\\text\s*\{([^{}]*)\}")
_LETTERS = re.compile(r"[A-Za-z][A-Za-z\s'.,!-]*")
_RUN = re.compile(r"(?<!\\)(?<![A-Za-z\\])[A-Za-z]+")
_SHORT_WORDS = re.compile(r"no|on|up|to|of|it|so|or|we|he|me|my|do|go|if|us|ok")
_COMMANDS = re.compile(
    # functions
    r"(?:arc)?(?:sin|cos|tan)h?|cot|sec|csc|log|ln|exp|sqrt|max|min|gcd|lcm|det|lim|arg|deg|dim|mod"
    # symbols
    r"|alpha|beta|gamma|delta|epsilon|theta|lambda|mu|nu|xi|pi|rho|sigma|tau|phi|chi|psi|omega|infty"
    r"|Gamma|Delta|Theta|Lambda|Sigma|Phi|Psi|Omega"
)
_MONTH = re.compile(r"(?:jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec)[a-z]*", re.IGNORECASE)
_CHOICE = re.compile(
    r"(?:(?:option|choice|answer)\s+)?(?:\(\s*([A-J])\s*\)|([A-J])\s*[).:])(?:\s+\S.*)?|(?:option|choice)\s+([A-J])",
    re.IGNORECASE,
)
_TIME = re.compile(r"(\d{1,2})\s?:\s?(\d{2})(?::(\d{2}))?\s*(?:([ap])\.?\s?m\.?)?", re.IGNORECASE)
_DATE = re.compile(r"\d{1,4}([-/.])\d{1,2}\1\d{1,4}")
_NAME = re.compile(
    r"(?:\\(?:text|mathcal|mathbf|vec|hat|bar|overline|angle)\s*\{?\s*)?(?:\\?[A-Za-z]+|\\[A-Za-z]+)\}?'*(?:\s*_\s*(?:\{[^{}]*\}|\w))?"
    r"(?:\s*\(\s*[A-Za-z](?:\s*,\s*[A-Za-z])*\s*\))?"
)
_TRAILING_TEXT = re.compile(
    r"\s*(?:\\text\s*\{(?P<inner>[^{}]*)\}(?:\s*\^\s*(?:\{[^{}]*\}|\d))?\s*)+$|\s*\^\s*(?:\{\s*\\circ\s*\}|\\circ)\s*$"
    r"|\s+(?:square |cubic )?(?:units?|degrees?|radians?|dollars?|cents?|inche?s?|feet|met(?:er|re)s?|cm|mm|km|kg|mph)"
    r"(?:\s*\^\s*\{?\d\}?)?$"
)


def words_of(text: str) -> str | None:
    r"""The words of a text that has nothing else, in lower case, or None.

    >>> words_of("\\text{ Evelyn }"), words_of("an ellipse."), words_of("xy"), words_of("x + y")
    ('evelyn', 'ellipse', None, None)
    """
    marked = "\\text" in text
    bare = _TEXT.sub(r" \1 ", text) if marked else text
    bare = " ".join(bare.replace('"', " ").split()).strip(" .,!'")
    if not _LETTERS.fullmatch(bare):
        return None
    tokens = re.findall(r"[A-Za-z]+", bare)
    if not marked and not any(is_word(token) for token in tokens):
        return None
    if marked and len(bare) == 1:
        return None
    if tokens[0].lower() in ("a", "an", "the") and len(tokens) > 1:
        bare = bare[len(tokens[0]) :].strip()
    return re.sub(r"\s*,\s*", " ", bare).lower()


def is_word(token: str) -> bool:
    """True if letters are a word and no product of variables.

    >>> [is_word(token) for token in ("cat", "no", "xy", "abc", "mgh", "sin")]
    [True, True, False, False, False, False]
    """
    lower = token.lower()
    if len(token) < 3:
        return _SHORT_WORDS.fullmatch(lower) is not None
    if _COMMANDS.fullmatch(token):
        return False
    letters = sorted(lower)
    neighbours = all(ord(after) - ord(before) == 1 for before, after in pairwise(letters))
    return not neighbours and (len(token) > 4 or re.search("[aeiouy]", lower) is not None)


def prose_of(text: str) -> str | None:
    """A text of words with other things between them, for comparison as text; None if it is a formula."""
    outside = _TEXT.sub(" ", text)
    if not any(is_word(run) for run in _RUN.findall(re.sub(r"\\[A-Za-z]+", " ", outside))):
        return None
    if re.search(r"[_^\\=+*/]", outside):
        return None
    tokens = re.findall(r"[a-z]+|\d+(?:\.\d+)?", re.sub(r"(?<=\d)(?:st|nd|rd|th)\b", "", _TEXT.sub(r" \1 ", text).lower()))
    tokens = [token for token in tokens if token not in ("a", "an", "the", "of")]
    # "July 4, 2021" is "4 July 2021"
    month = [token for token in tokens if _MONTH.fullmatch(token)]
    return " ".join(sorted(token[:3] if token in month else token for token in tokens) if month else tokens)


def choice_of(text: str) -> str | None:
    r"""Letter of a multiple choice, or None: (B), B., B) 42, \text{(B)}, option b."""
    alone = _TEXT.fullmatch(text)
    if alone is not None and re.fullmatch(r"\s*[A-J]\s*", alone[1]):
        return alone[1].strip()
    bare = _TEXT.sub(r"\1", text).strip(" *")
    match = _CHOICE.fullmatch(bare)
    if match is None:
        return None
    return next(letter for letter in match.groups() if letter is not None).upper()


def moment_of(text: str) -> str | None:
    """A time or a date as text. The hour has two digits, from 00 to 23, where "a.m." or "p.m." follows."""
    bare = _TEXT.sub(r" \1 ", text).strip()
    if re.search(r"\d", bare) and any(_MONTH.fullmatch(word) for word in re.findall(r"[A-Za-z]{3,}", bare)):
        return prose_of(text)
    if _DATE.fullmatch(bare):
        return bare
    match = _TIME.fullmatch(bare)
    if match is None:
        return None
    hour, half = str(int(match[1])), (match[4] or "").lower()
    if half:
        hour = f"{int(hour) % 12 + (12 if half == 'p' else 0):02}"
    return f"{hour}:{match[2]}" + (f":{match[3]}" if match[3] else "")


def same_moment(first: str, second: str) -> bool:
    """True for two times by `moment_of` of which one may leave out "a.m." or "p.m."."""
    one, two = first.partition(":"), second.partition(":")
    if not (one[0].isdecimal() and two[0].isdecimal()) or one[1:] != two[1:]:
        return False
    open_end = any(len(hour) == 1 or hour == "12" for hour in (one[0], two[0]))
    return int(one[0]) == int(two[0]) or (open_end and int(one[0]) % 12 == int(two[0]) % 12)


def name_of(text: str) -> str:
    """A name that may stand left of "=": x, x_1, f(x), Area; else ""."""
    text = text.strip()
    if re.fullmatch(r"(?:the |The )?[A-Za-z]{2,}(?: [A-Za-z]+)*", _TEXT.sub(r"\1", text).strip()):
        return _TEXT.sub(r"\1", text).strip().lower()
    return re.sub(r"[\s{}]", "", text) if _NAME.fullmatch(text) and text not in ("\\pi", "e") else ""


def strip_unit(text: str) -> str:
    r"""A formula without the unit behind it: "12\pi \text{ cm}^2" is 12π."""
    return _TRAILING_TEXT.sub("", text).strip() or text


def with_commands(text: str) -> str:
    r"""A formula whose functions and Greek letters are LaTeX commands: "sqrt(2) pi" is \sqrt{2} \pi."""
    text = re.sub(r"(?<![A-Za-z\\])sqrt\s*\(([^()]*)\)", r"\\sqrt{\1}", text)
    text = re.sub(r"(?<![A-Za-z\\])(?:infinity|inf|oo)(?![A-Za-z])", r"\\infty", text)
    return _RUN.sub(lambda match: f"\\{match.group()} " if _COMMANDS.fullmatch(match.group()) else match.group(), text)
