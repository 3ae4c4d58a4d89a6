r"""One reader of a signed number, for rewards, tasks and votes.

    text ─► sign, currency, digits, exponent, unit ─► Number (exact) ─► same_number, canonical

Values are exact: a fraction of two decimals. "1e5" and "1 \times 10^5" are 100000, never 1·e^5.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from decimal import MAX_EMAX, MAX_PREC, MIN_EMIN, Context, Decimal, DecimalException
from fractions import Fraction

from deepgrpo.answers.characters import tidy
from deepgrpo.answers.units import is_unit, multiplier

RELATIVE = Decimal("1e-6")
"""Largest relative difference of a rounded decimal from the number that it stands for."""

_EXACT = Context(prec=MAX_PREC, Emax=MAX_EMAX, Emin=MIN_EMIN)
_EXACT_DIVISION = Context(prec=2000, Emax=MAX_EMAX, Emin=MIN_EMIN)
_LOOSE = Context(prec=40, Emax=MAX_EMAX, Emin=MIN_EMIN)
_MOST_ZEROS = 400  # a number with a larger exponent keeps it when written

_SIGN = r"(?P<sign>[-+]|minus |negative |plus )?\s*"
_MONEY = r"(?:(?:US|USD|EUR|GBP|Rs\.?)?\s*[$€£¥₹]\s*|(?:USD|EUR|GBP|Rs\.?)\s*)?"
# parts of patterns, here and in `running_text`
PLAIN = r"(?:[1-9]\d{0,2}(?:,\d{3})+(?!\d)(?:\.\d+)?|\d+(?:\.\d*)?|\.\d+)"
_RAISED = r"(?:\{\s*(?P<braced>[-+]?\s*\d+)\s*\}|\(\s*(?P<round>[-+]?\s*\d+)\s*\)|(?P<raised>[-+]?\d+))"
POWER = (
    r"(?:[eE]\s?(?P<exponent>[-+]?\d+)(?![\d.])"
    rf"|\s*(?:\\times|\\cdot|[xX]|\*)\s*10\s*(?:\^|\*\*)\s*{_RAISED})"
)
_INNER = r"\s*-?\s*\d+(?:\.\d+)?\s*"
FRACTION = rf"\\frac\s*(?:\{{(?P<over>{_INNER})\}}|(?P<over1>\d))\s*(?:\{{(?P<under>{_INNER})\}}|(?P<under1>\d))"
_NUMBER = re.compile(
    rf"{_SIGN}{_MONEY}(?P<inner>[-+])?\s*(?:"
    rf"(?:(?P<whole>\d+)\s*)?{FRACTION}"
    rf"|(?P<mixed>\d+) (?P<up>\d+)\s*/\s*(?P<down>\d+)"
    rf"|(?P<top>{PLAIN})\s*/\s*(?P<minus>-?)(?P<bottom>{PLAIN})"
    rf"|10\s*\^\s*(?:\{{\s*(?P<ten>[-+]?\s*\d+)\s*\}}|(?P<ten1>-?\d)(?!\d))"
    rf"|(?P<repeat>\d*\.\d*)(?:\\(?:overline|bar|dot)\s*\{{(?P<bar>\d+)\}}|\((?P<round_bar>\d+)\)|\\ldots)"
    rf"|(?P<groups>[1-9]\d{{0,2}}(?: \d{{3}})+(?!\d)(?:\.\d+)?)"
    rf"|(?P<digits>{PLAIN}){POWER}?"
    r")"
)  # fmt: skip
_NUMERALS = {
    "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5", "six": "6", "seven": "7", "eight": "8",
    "nine": "9", "ten": "10", "eleven": "11", "twelve": "12", "thirteen": "13", "fourteen": "14", "fifteen": "15",
    "sixteen": "16", "seventeen": "17", "eighteen": "18", "nineteen": "19", "twenty": "20",
}  # fmt: skip
_PERCENT = re.compile(r"\s*(?:\\?%|per\s?cent(?:age)?(?: points?)?\b|pct\b|\\text\s*\{\s*(?:\\?%|per\s?cent|pct)\s*\})\s*")
_GROUPED = re.compile(r"-?\d{1,3}(?:,\d{3})+(?:\.\d+)?")


@dataclass(frozen=True, slots=True)
class Number:
    """A number as it was written.

    Example: "-2.50" is Number(Decimal("-2.50"), places=-2, text="-2.50"); "3/4" has the denominator 4 and no places.
    """

    numerator: Decimal
    denominator: Decimal = Decimal(1)
    """Above 0; other than 1 for a fraction only."""
    places: int | None = None
    """Power of ten of the last digit written, for a decimal that is no whole number; None: the value is exact."""
    percent: bool = False
    text: str = ""
    """Sign and digits without separators, for readers of plain numbers."""

    @property
    def whole(self) -> bool:
        return self.denominator == 1 and _is_whole(self.numerator)


def read_number(text: str) -> Number | None:
    r"""The number that a whole text is, or None. A unit or an explanation in parentheses after it does not matter.

    >>> read_number("- $1,200 dollars").text, read_number("1.5e3").numerator == 1500, read_number("3x")
    ('-1200', True, None)
    """
    text = tidy(text)
    if len(text) > 2 and text[0] == "(" and text[-1] == ")" and "(" not in text[1:] and "," not in text:
        text = text[1:-1].strip()
    if text.startswith("\\text") and text.endswith("}"):
        text = text[text.find("{") + 1 : -1].strip() if text.count("{") == 1 else text
    text = _NUMERALS.get(text.lower(), text)
    match = _NUMBER.match(text)
    if match is None:
        return None
    try:
        number = _value(match)
    except (DecimalException, ArithmeticError, ValueError):
        return None
    rest = text[match.end() :]
    percent = _PERCENT.match(rest)
    if percent is not None:
        number, rest = replace(number, percent=True), rest[percent.end() :]
    factor, rest = multiplier(rest)
    if factor != 1:
        number = _times(number, factor)
    touching = rest[:1].isalpha()
    return number if is_unit(rest.strip(), touching=touching) else None


def same_number(first: Number, second: Number) -> bool:
    """True if two numbers are equal, as a reader of rounded decimals would say.

    Whole numbers and fractions are compared exactly. A decimal equals a number that it rounds: they differ by at most
    1e-6 of their size, and by at most 1e-6 or less than one in the last digit written. Only zero equals zero. A
    percentage equals the number before its sign, and its hundredth.
    """
    if first.percent != second.percent:
        return _equal(first, second) or any(
            _equal(_times(one, Decimal("0.01")), other) for one, other in ((first, second), (second, first)) if one.percent
        )
    return _equal(first, second)


def close(first: Decimal, second: Decimal, places: int | None) -> bool:
    """The tolerance of `same_number`, for numbers of which at least one is a decimal with its last digit at `places`."""
    if first == second:
        return True
    if not first or not second or abs(first.adjusted() - second.adjusted()) > 1:
        return False
    gap = abs(_LOOSE.subtract(first, second))
    if places is not None and gap > RELATIVE and gap >= _LOOSE.scaleb(Decimal(1), places):
        return False
    return gap <= _LOOSE.multiply(max(abs(first), abs(second)), RELATIVE)


def canonical(number: Number) -> str:
    r"""Short form, equal for equal numbers: a decimal that ends as such, else a reduced fraction. Percent signs go.

    >>> canonical(read_number("\\frac{2}{4}")), canonical(read_number("1,200.0")), canonical(read_number("-2/6"))
    ('0.5', '1200', '-1/3')
    """
    value = number.numerator
    if number.denominator != 1:
        if max(abs(value.adjusted()), number.denominator.adjusted(), len(number.text)) > _MOST_ZEROS:
            return number.text
        ratio = Fraction(value) / Fraction(number.denominator)
        rest = ratio.denominator
        for prime in (2, 5):
            while rest % prime == 0:
                rest //= prime
        if rest != 1:
            return f"{ratio.numerator}/{ratio.denominator}"
        value = _EXACT_DIVISION.divide(Decimal(ratio.numerator), Decimal(ratio.denominator))
    return decimal_form(value)


def decimal_form(value: Decimal | float) -> str:
    """Digits of a number without an exponent and without zeros at the end.

    >>> decimal_form(1e-05), decimal_form(142.0), decimal_form(1e22)
    ('0.00001', '142', '10000000000000000000000')
    """
    exact = value if isinstance(value, Decimal) else Decimal(repr(float(value)))
    if not exact.is_finite():
        return str(value)
    if exact == 0:
        return "0"
    exact = _EXACT.create_decimal(exact)
    sign, digits, exponent = exact.as_tuple()
    kept = "".join(map(str, digits)).rstrip("0")
    power = int(exponent) + len(digits) - len(kept)
    minus = "-" if sign else ""
    if abs(exact.adjusted()) > _MOST_ZEROS and power != 0:
        return f"{minus}{kept}e{power}"
    return f"{minus}{Decimal(f'{kept}e{power}'):f}"


def drop_separators(text: str) -> str:
    """The text without thousands separators if the whole of it is one number, else unchanged.

    >>> drop_separators("-1,200"), drop_separators("(1,200)"), drop_separators("5,1234")
    ('-1200', '(1,200)', '5,1234')
    """
    bare = text.strip()
    return bare.replace(",", "") if _GROUPED.fullmatch(bare) else text




def _value(match: re.Match[str]) -> Number:
    """The number of a match, without its unit. Raises DecimalException or ValueError if it has none."""
    found = {name: value.replace(" ", "") for name, value in match.groupdict().items() if value is not None}
    negative = (found.get("sign", "") in ("-", "minus", "negative")) != (found.get("inner", "") == "-")
    minus = "-" if negative else ""
    over, under = found.get("over", found.get("over1")), found.get("under", found.get("under1"))
    if over is not None and under is not None:
        return _fraction(minus, found.get("whole", "0"), over, under)
    if "mixed" in found:
        return _fraction(minus, found["mixed"], found["up"], found["down"])
    if "top" in found:
        return _fraction(minus, "0", found["top"].replace(",", ""), found["minus"] + found["bottom"].replace(",", ""))
    if (ten := found.get("ten", found.get("ten1"))) is not None:
        return _decimal(minus, "1", ten)
    if "repeat" in found:
        return _repeating(minus, found)
    digits = found.get("groups", found.get("digits", "")).replace(",", "")
    exponent = next((found[name] for name in ("exponent", "braced", "round", "raised") if name in found), None)
    return _decimal(minus, digits, exponent)


def _decimal(minus: str, digits: str, exponent: str | None) -> Number:
    digits = f"0{digits}" if digits.startswith(".") else digits.rstrip(".") if digits.endswith(".") else digits
    value = _EXACT.create_decimal(f"{minus}{digits}" + (f"e{exponent}" if exponent else ""))
    if not value.is_finite() or abs(value.adjusted()) > 10**12:
        raise ValueError
    text = f"{minus}{digits}" if not exponent else decimal_form(value)
    return Number(value, places=None if _is_whole(value) else int(value.as_tuple().exponent), text=text)


def _fraction(minus: str, whole: str, over: str, under: str) -> Number:
    top, bottom = _EXACT.create_decimal(over), _EXACT.create_decimal(under)
    if bottom == 0:
        raise ValueError
    if bottom < 0:
        top, bottom = -top, -bottom
    top = _EXACT.add(_EXACT.multiply(_EXACT.create_decimal(whole), bottom), top)
    if minus:
        top = _EXACT.minus(top)
    # 6/3 is a whole number
    if _is_whole(top) and _is_whole(bottom) and max(top.adjusted(), bottom.adjusted()) < 1000 and top % bottom == 0:
        value = _EXACT.divide_int(top, bottom)
        return Number(value, text=decimal_form(value))
    return Number(top, bottom, text=f"{minus}{over}/{under}" if whole == "0" else f"{minus}{whole} {over}/{under}")


def _repeating(minus: str, found: dict[str, str]) -> Number:
    r"""0.1\overline{6}, 0.(3) and 0.333...: the repeated digits over nines. Dots repeat a digit that stood there twice."""
    start = found["repeat"]
    bar = next((found[name] for name in ("bar", "round_bar") if name in found), "")
    if not bar:
        decimals = start.partition(".")[2]
        if len(decimals) < 2 or decimals[-1] != decimals[-2]:
            return _decimal(minus, start, None)
        bar = decimals[-1]
    integer, _, decimals = start.partition(".")
    nines, zeros = "9" * len(bar), "0" * len(decimals)
    top = int(f"{integer}{decimals}{bar}" or 0) - int(f"{integer}{decimals}" or 0)
    return _fraction(minus, "0", str(top), nines + zeros)


def _times(number: Number, factor: Decimal) -> Number:
    value = _EXACT.multiply(number.numerator, factor)
    places = None if number.places is None or _is_whole(value) else number.places + factor.adjusted()
    text = decimal_form(value) if number.denominator == 1 else number.text
    return replace(number, numerator=value, places=places, text=text)


def _equal(first: Number, second: Number) -> bool:
    one = _EXACT.multiply(first.numerator, second.denominator)
    two = _EXACT.multiply(second.numerator, first.denominator)
    if one == two:
        return True
    if first.whole and second.whole:
        return False
    places = [number.places for number in (first, second) if number.places is not None]
    if not places or (one < 0) != (two < 0):
        return False
    ratio = _EXACT.multiply(first.denominator, second.denominator)
    return close(_LOOSE.divide(one, ratio), _LOOSE.divide(two, ratio), max(places))


def _is_whole(value: Decimal) -> bool:
    return value == 0 or int(value.as_tuple().exponent) >= 0 or _trailing_zeros(value) >= -int(value.as_tuple().exponent)


def _trailing_zeros(value: Decimal) -> int:
    digits = "".join(map(str, value.as_tuple().digits))
    return len(digits) - len(digits.rstrip("0"))
