r"""Units behind a number: words, abbreviations, \text{...}, degrees, and explanations in parentheses."""

from __future__ import annotations

import re
from decimal import Decimal

MULTIPLIERS = {
    "hundred": Decimal(100),
    "thousand": Decimal(1000),
    "million": Decimal(10**6),
    "billion": Decimal(10**9),
    "trillion": Decimal(10**12),
}
"""Words that multiply the number before them."""

_ABBREVIATIONS = frozenset(
    "cm mm km dm nm um kg mg ml cl dl kl gm lb lbs oz ft in yd mi hr hrs min mins sec secs ms ns yr yrs wk mph kph kmh kmph "
    "sq cu cc hz khz mhz ghz ev kev mev gev kj kw mw kwh kcal cal pa kpa mpa atm bar mol rad deg rs cts ct usd eur gbp am pm "
    "au ly pc kb mb gb tb rpm fps psi hp st nd rd th pts".split()
)
_LETTERS = frozenset("m g s h l L K C F N J W V A T d Z".split())  # with a space before: "5 m" is five metres, "5m" is 5·m
_SMALL = frozenset("a an the of in per each for is on at as by it so".split())
# words that make an expression, not a unit
_NOT_UNITS = frozenset(
    "and or to plus minus times over divided multiplied than point half factorial squared cubed pi sqrt sin cos tan log ln exp "
    "not hundred thousand million billion trillion mod modulo".split()
)  # fmt: skip
_DEGREES = re.compile(r"\s*\^\s*(?:\{\s*\\circ\s*\}|\\circ)\s*(?:\{?\\?(?:text|rm)?\s*\{?\s*[CFK]\s*\}*)?|\s*\^\s*\{\s*(?:\\prime\s*)+\}|'{1,2}|\"")
_GROUP = re.compile(r"\\text\s*\{([^{}]*)\}")
_QUOTIENT = re.compile(r"\\frac\s*\{\s*(\\text\s*\{[^{}]*\})\s*\}\s*\{\s*(\\text\s*\{[^{}]*\}(?:\s*\^\s*\d)?)\s*\}")
_RAISED = re.compile(r"\s*\^\s*(?:\{\s*-?\d+\s*\}|-?\d+)")
_JOINS = re.compile(r"\\cdot|[/.·~]")
_ASIDE = re.compile(r"\((?=[^()]*[A-Za-z]{3}|[^()]*\\pmod)[^()]*\)$|\\pmod\s*(?:\{[^{}]*\}|\d+)$|\\pmod.*$")
_WORD = re.compile(r"[A-Za-z][A-Za-z'-]*")
_MULTIPLIER = re.compile(rf"\s*(?:\\text\s*\{{\s*)?({'|'.join(MULTIPLIERS)})s?\b\s*\}}?")


def multiplier(text: str) -> tuple[Decimal, str]:
    """Factor of the multiplying words at the start of a text, and the text behind them.

    >>> multiplier(" million dollars")
    (Decimal('1000000'), ' dollars')
    """
    factor = Decimal(1)
    while (match := _MULTIPLIER.match(text)) is not None:
        factor, text = factor * MULTIPLIERS[match.group(1)], text[match.end() :]
    return factor, text


def is_unit(text: str, *, touching: bool = False) -> bool:
    r"""True if a text behind a number leaves its value as it is; so does an empty one.

    Args:
        text: the text behind the number, in the spelling of `characters.tidy`.
        touching: the text follows the number without a space, where a single letter is a variable.

    >>> is_unit("square cm"), is_unit("\\text{ m}^2"), is_unit("or 4"), is_unit("k", touching=True)
    (True, True, False, False)
    """
    text = _ASIDE.sub("", text).strip()
    if (degrees := _DEGREES.match(text)) is not None:
        text = text[degrees.end() :].strip()
    elif text.startswith("^"):
        return False
    text = text.strip("$€£ ")
    text = _QUOTIENT.sub(r" \1 \2 ", text)
    # \text{...} is prose or a unit unless it joins numbers
    prose = _GROUP.findall(text)
    if any(word.lower() in _NOT_UNITS for part in prose for word in _WORD.findall(part)):
        return False
    bare = _RAISED.sub(" ", _GROUP.sub(" ", text))
    if re.search(r"[^A-Za-z'\s/.·~\\-]", bare.replace(",", " ") if prose else bare):
        return False
    bare = _JOINS.sub(" ", bare)
    if "\\" in bare:
        return False
    words = bare.split()
    for position, word in enumerate(words):
        lower = word.lower()
        if lower in _NOT_UNITS:
            return False
        if len(word) == 1 and not (word in _LETTERS and not (touching and position == 0)) and lower not in _SMALL:
            return False
        if len(word) == 2 and lower not in _ABBREVIATIONS and lower not in _SMALL:
            return False
        if len(word) >= 3 and not (_WORD.fullmatch(word) and (lower in _ABBREVIATIONS or re.search("[aeiouy]", lower))):
            return False
    return True
