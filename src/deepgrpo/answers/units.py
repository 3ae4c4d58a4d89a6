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

_ABBREVIATIONS = re.compile(
    r"cm|mm|km|dm|nm|um|kg|mg|ml|cl|dl|kl|gm|lbs?|oz|ft|in|yd|mi|hrs?|mins?|secs?|ms|ns|yrs?|wk|mph|kph|kmh|kmph|sq|cu|cc"
    r"|[kmg]?hz|[kmg]?ev|kj|kw|mw|kwh|kcal|cal|k?pa|mpa|atm|bar|mol|rad|deg|rs|cts?|usd|eur|gbp|am|pm|au|ly|pc|[kmgt]b|rpm"
    r"|fps|psi|hp|st|nd|rd|th|pts"
)
_LETTERS = re.compile(r"[mgshlLKCFNJWVATdZ]")  # with a space before: "5 m" is five metres, "5m" is 5·m
_SMALL = re.compile(r"a|an|the|of|in|per|each|for|is|on|at|as|by|it|so")
# words that make an expression, not a unit
_NOT_UNITS = re.compile(
    r"and|or|to|plus|minus|times|over|divided|multiplied|than|point|half|factorial|squared|cubed|pi|sqrt|sin|cos|tan|log|ln|exp"
    r"|january|february|march|april|june|july|august|september|october|november|december"
    r"|not|hundred|thousand|million|billion|trillion|mod|modulo"
)
_DEGREES = re.compile(
    r"\s*\^\s*(?:\{\s*\\circ\s*\}|\\circ)\s*(?:\{?\\?(?:text|rm)?\s*\{?\s*[CFK]\s*\}*)?"
    r"|\s*\^\s*\{\s*(?:\\prime\s*)+\}|'{1,2}|\""
)
_GROUP = re.compile(r"\\text\s*\{([^{}]*)\}")
_QUOTIENT = re.compile(r"\\frac\s*\{\s*(\\text\s*\{[^{}]*\})\s*\}\s*\{\s*(\\text\s*\{[^{}]*\}(?:\s*\^\s*\d)?)\s*\}")
_SYMBOL = re.compile(r"\\(?:Omega|AA|ohm)(?![A-Za-z])|\\mu(?=\s*(?:\\text|[a-zA-Z]))")
_RAISED = re.compile(r"\s*\^\s*(?:\{\s*-?\d+\s*\}|-?\d+)")
_JOINS = re.compile(r"\\cdot|[/.·~]")
_ASIDE = re.compile(r"\((?=[^()]*[A-Za-z]{3}|[^()]*\\pmod)[^()]*\)$|\\pmod\s*(?:\{[^{}]*\}|\d+)$|\\pmod.*$")
_WORD = re.compile(r"[A-Za-z][A-Za-z'-]*")
_MULTIPLIER = re.compile(rf"\s*(?:\\text\s*\{{\s*)?({'|'.join(MULTIPLIERS)})s?\b\s*\}}?")


def multiplier(text: str) -> tuple[Decimal, str]:
    """Factor of the multiplying words at the start of a text, and the text behind them.

    >>> multiplier(" million dollars")
    (Decimal('1000000'), 'dollars')
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
    if any(_NOT_UNITS.fullmatch(word.lower()) for part in prose for word in _WORD.findall(part)):
        return False
    bare = _RAISED.sub(" ", _GROUP.sub(" ", _SYMBOL.sub(" ", text)))
    if re.search(r"[^A-Za-z'\s/.·~\\-]", bare.replace(",", " ") if prose else bare):
        return False
    bare = _JOINS.sub(" ", bare)
    return "\\" not in bare and all(
        _is_part(word, touching=touching and position == 0) for position, word in enumerate(bare.split())
    )


def _is_part(word: str, *, touching: bool) -> bool:
    """True if a word may be part of a unit."""
    lower = word.lower()
    if _NOT_UNITS.fullmatch(lower):
        return False
    if _SMALL.fullmatch(lower) or (_ABBREVIATIONS.fullmatch(lower) and len(word) > 1):
        return True
    if len(word) == 1:
        return _LETTERS.fullmatch(word) is not None and not touching
    return len(word) > 2 and _WORD.fullmatch(word) is not None and re.search("[aeiouy]", lower) is not None
