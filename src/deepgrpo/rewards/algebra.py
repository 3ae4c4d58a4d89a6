r"""Equality of two formulas: parsed by math-verify's LaTeX parser, compared by values.

    numbers without variables   to 50 digits; a decimal within the tolerance of `answers.numbers`
    formulas with variables     by values at fixed points; integer names (n, k, m, ...) at positive points only
    equations, inequalities     by math-verify's `verify`

math-verify compares after rounding to six decimal places, which makes all small numbers equal.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from decimal import Context, Decimal
from functools import lru_cache
from typing import Any

from deepgrpo.answers.characters import tidy
from deepgrpo.answers.numbers import Number, close, decimal_form
from deepgrpo.rewards.form import Form, join_groups
from deepgrpo.rewards.magnitude import LARGEST, refuse_huge
from deepgrpo.rewards.workers import NotComparableError

_DIGITS = 50
_WORKING = 80  # digits of the points, for those that a difference cancels
_INTEGER_NAMES = frozenset("nkmNMKpq")
_POINTS = ("1.3171", "2.7193", "0.6139", "3.8147", "1.9073", "0.2917")
_ROUNDED = Decimal("1e-6")
_CLOSE = Decimal("1e-40")
_CONTEXT = Context(prec=_DIGITS)
_SCIENTIFIC = re.compile(r"(?<![A-Za-z\d.])(\d+(?:\.\d*)?|\.\d+)[eE]([-+]?\d+)(?![\d.])")
_MIXED = re.compile(r"(?<![\d.}^_])(\d+)\s*\\frac\s*(?:\{\s*(\d+)\s*\}|(\d))\s*(?:\{\s*(\d+)\s*\}|(\d))")
_BIG_BINOMIAL = re.compile(r"\\[dt]?binom\s*\{[^{}]*\d{5}")
_TRIGONOMETRY = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc)(?![A-Za-z])")
_DEGREES = re.compile(r"(\d+(?:\.\d+)?)\s*\^\s*(?:\{\s*\\circ\s*\}|\\circ(?![A-Za-z]))")


def same_formula(reference: Form, answer: Form) -> bool:
    """True if two formulas are equal. Raises NotComparableError if their values are too large to compute."""
    sources = _source(reference), _source(answer)
    # models are careless of case; but R and r in one formula are two variables, E and I are no e and i
    lower = not any(_case_matters(source) for source in sources)
    first, second = (_parsed(source, lower) for source in sources)
    if first is None or second is None:
        return False
    from sympy import Expr

    for each in (first, second):
        refuse_huge(each)
    if isinstance(first, Expr) and isinstance(second, Expr):
        verdict = _same_expression(first, second, reference.number, answer.number)
        if verdict is not None:
            return verdict
    if (ratio := _same_equation(first, second)) is not None:
        return ratio
    from math_verify import verify

    return bool(verify([first], [second], timeout_seconds=None))


def _source(form: Form) -> str:
    """LaTeX of a form; a number in plain digits where its own text is no LaTeX."""
    number = form.number
    if number is None:
        return form.text
    if number.denominator != 1:
        return f"\\frac{{{decimal_form(number.numerator)}}}{{{decimal_form(number.denominator)}}}"
    if abs(number.numerator.adjusted()) > LARGEST:
        raise NotComparableError
    return f"{number.numerator:f}" + ("\\%" if number.percent else "")


def _case_matters(source: str) -> bool:
    letters = set(re.sub(r"\\[A-Za-z]+", "", source))
    return bool(letters & {"E", "I"}) or any(letter.lower() in letters for letter in letters if letter.isupper())


@lru_cache(maxsize=4096)
def _parsed(source: str, lower: bool) -> Any:
    """A sympy object, or None if a text is not LaTeX of a formula; with `lower`, all variables in lower case."""
    from latex2sympy2_extended.latex2sympy2 import ConversionConfig, NormalizationConfig, latex2sympy, normalize_latex
    from math_verify.grader import should_treat_as_complex

    if len(source) > 5000:
        raise NotComparableError
    text = _SCIENTIFIC.sub(r"\1 \\times 10^{\2}", source)
    text = _MIXED.sub(lambda m: f"({m[1]}+\\frac{{{m[2] or m[3]}}}{{{m[4] or m[5]}}})", text)
    text = join_groups(text)
    if _TRIGONOMETRY.search(text):
        text = _DEGREES.sub(r"(\1 \\pi / 180)", text)
    if _BIG_BINOMIAL.search(text):
        raise NotComparableError  # the parser would compute it
    rules = NormalizationConfig(basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="none")
    try:
        text = normalize_latex(text, config=rules)
        return latex2sympy(
            text, is_real=not should_treat_as_complex(text), normalization_config=None,
            conversion_config=ConversionConfig(lowercase_symbols=lower),
        )  # fmt: skip
    except Exception:  # whatever a parser of free text may raise
        return None


def _same_expression(first: Any, second: Any, one: Number | None, two: Number | None) -> bool | None:
    """Verdict on two expressions by their values; None if they have none."""
    from sympy import Float, I, Symbol

    symbols = sorted(first.free_symbols | second.free_symbols, key=str)
    units = {symbol: I for symbol in symbols if str(symbol) in ("i", "\\imath")}
    names = [symbol for symbol in symbols if symbol not in units]
    if any(type(symbol) is not Symbol and not isinstance(symbol, Symbol) for symbol in names):
        return None
    rounded = bool(first.has(Float) or second.has(Float)) or any(n is not None and n.places is not None for n in (one, two))
    places = next((n.places for n in (one, two) if n is not None and n.places is not None), None)
    compared = 0
    for point in _points(names):
        values = [_value(each, {**units, **point}) for each in (first, second)]
        a, b = values
        if a is None or b is None:
            continue
        if names and not units and (a[1] or b[1]):
            continue  # a root of a negative number: the variables are not meant to be so
        compared += 1
        if not _near(a, b, rounded, places if not names else None):
            return False
        if not names:
            return rounded or not _differ_exactly(first, second, a[0])
    return True if compared >= 2 else None


def _same_equation(first: Any, second: Any) -> bool | None:
    """True if one of two equations is a multiple of the other; None if that cannot be seen."""
    from sympy import Eq, Expr

    if not (isinstance(first, Eq) and isinstance(second, Eq)):
        return None
    gaps = [each.lhs - each.rhs for each in (first, second)]
    names = sorted(gaps[0].free_symbols | gaps[1].free_symbols, key=str)
    if not names or not all(isinstance(gap, Expr) for gap in gaps):
        return None
    ratios = []
    for point in _points(names):
        a, b = (_value(gap, point) for gap in gaps)
        if a is not None and b is not None and b[0] and not a[1] and not b[1]:
            ratios.append(_CONTEXT.divide(a[0], b[0]))
    if len(ratios) < 2:
        return None
    zero = Decimal(0)
    return True if all(ratio and _near((ratio, zero), (ratios[0], zero), False, None) for ratio in ratios) else None


def _differ_exactly(first: Any, second: Any, size: Decimal) -> bool:
    """True for rational numbers that differ beyond the digits computed; 10^100 and 10^100 + 1 do."""
    if size == 0 or abs(size.adjusted()) > LARGEST:
        return False
    one, two = first.doit(), second.doit()
    return bool(one.is_Rational and two.is_Rational and one != two)


def _points(names: list[Any]) -> Iterator[Mapping[Any, Any]]:
    from sympy import Float

    if not names:
        yield {}
        return
    for shift in range(6):
        signs = [1 if shift < 3 or str(name)[:1] in _INTEGER_NAMES or (shift + i) % 2 else -1 for i, name in enumerate(names)]
        yield {
            name: sign * (Float(_POINTS[(shift + i) % len(_POINTS)], _WORKING) + Float(i // len(_POINTS), _WORKING) / 7)
            for i, (name, sign) in enumerate(zip(names, signs, strict=True))
        }


def _value(expression: Any, point: Mapping[Any, Any]) -> tuple[Decimal, Decimal] | None:
    """Real and imaginary part to 50 digits, or None without a finite value."""
    from sympy import nan, oo, zoo

    try:
        value = expression.subs(point) if point else expression
        if value.has(oo, -oo, zoo, nan):
            return None
        value = value.evalf(_DIGITS)
        real, imaginary = value.as_real_imag()
        parts = [Decimal(str(part)) for part in (real, imaginary)]
    except NotComparableError:
        raise
    except Exception:  # functions without values, derivatives, ...
        return None
    if not all(part.is_finite() for part in parts):
        return None
    size = max(abs(part) for part in parts)
    # what evalf leaves of a part that is zero
    return (
        parts[0] if abs(parts[0]) > size * _CLOSE else Decimal(0),
        parts[1] if abs(parts[1]) > size * _CLOSE else Decimal(0),
    )


def _near(a: tuple[Decimal, Decimal], b: tuple[Decimal, Decimal], rounded: bool, places: int | None) -> bool:
    if rounded and places is not None and not a[1] and not b[1]:
        return close(a[0], b[0], places)
    size = max(abs(part) for part in (*a, *b))
    gap = max(abs(_CONTEXT.subtract(x, y)) for x, y in zip(a, b, strict=True))
    return gap <= _CONTEXT.multiply(size, _ROUNDED if rounded else _CLOSE)


def warm() -> None:
    """Load sympy and the parser."""
    same_formula(Form("formula", tidy("\\sqrt{\\frac{1}{4}}")), Form("formula", "x"))
