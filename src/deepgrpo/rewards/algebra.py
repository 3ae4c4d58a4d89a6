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
from deepgrpo.rewards.form import Form
from deepgrpo.rewards.workers import NotComparable

_DIGITS = 50
_LARGEST = 1e5  # decimal digits of an intermediate value; 10^{10^{10}} has more
_INTEGER_NAMES = frozenset("nkmNMKpq")
_POINTS = ("1.3171", "2.7193", "0.6139", "3.8147", "1.9073", "0.2917")
_ROUNDED = Decimal("1e-6")
_CLOSE = Decimal("1e-40")
_CONTEXT = Context(prec=_DIGITS)
_SCIENTIFIC = re.compile(r"(?<![A-Za-z\d.])(\d+(?:\.\d*)?|\.\d+)[eE]([-+]?\d+)(?![\d.A-Za-z])")
_MIXED = re.compile(r"(?<![\d.}^_])(\d+)\s*\\frac\s*(?:\{\s*(\d+)\s*\}|(\d))\s*(?:\{\s*(\d+)\s*\}|(\d))")
_GROUPED = re.compile(r"(?<![\d.,])[1-9]\d{0,2}(?:,\d{3})+(?![\d,])")


def same_formula(reference: Form, answer: Form) -> bool:
    """True if two formulas are equal. Raises NotComparable if their values are too large to compute."""
    first, second = _parsed(_source(reference)), _parsed(_source(answer))
    if first is None or second is None:
        return False
    from sympy import Expr

    if isinstance(first, Expr) and isinstance(second, Expr):
        verdict = _same_expression(first, second, reference.number, answer.number)
        if verdict is not None:
            return verdict
    from math_verify import verify

    return bool(verify([first], [second], timeout_seconds=None))


def _source(form: Form) -> str:
    """LaTeX of a form; a number in plain digits where its own text is no LaTeX."""
    number = form.number
    if number is None:
        return form.text
    if number.denominator != 1:
        return f"\\frac{{{decimal_form(number.numerator)}}}{{{decimal_form(number.denominator)}}}"
    if abs(number.numerator.adjusted()) > _LARGEST:
        raise NotComparable
    return f"{number.numerator:f}" + ("\\%" if number.percent else "")


@lru_cache(maxsize=4096)
def _parsed(source: str) -> Any:
    """A sympy object, or None if a text is not LaTeX of a formula."""
    from latex2sympy2_extended.latex2sympy2 import NormalizationConfig, latex2sympy, normalize_latex
    from math_verify.grader import should_treat_as_complex

    if len(source) > 5000:
        raise NotComparable
    text = _SCIENTIFIC.sub(r"\1 \\times 10^{\2}", source)
    text = _MIXED.sub(lambda m: f"({m[1]}+\\frac{{{m[2] or m[3]}}}{{{m[4] or m[5]}}})", text)
    text = _GROUPED.sub(lambda m: m.group().replace(",", ""), text)
    _refuse_towers(text)
    rules = NormalizationConfig(basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="none")
    try:
        text = normalize_latex(text, config=rules)
        return latex2sympy(
            text, is_real=not should_treat_as_complex(text), convert_degrees=False, normalization_config=None
        )
    except Exception:  # whatever a parser of free text may raise
        return None


def _refuse_towers(text: str) -> None:
    """Raises NotComparable for powers of powers with large exponents, before the parser evaluates them."""
    for match in re.finditer(r"\^\s*\{?\s*\(?\s*(\d+)", text):
        if int(match[1][:8]) > 10_000 or len(match[1]) > 8:
            raise NotComparable
    if len(re.findall(r"!", text)) > 2 or any(len(m) > 4 for m in re.findall(r"(\d+)\s*\)?\s*!", text)):
        raise NotComparable
    if re.search(r"\^\s*\{?\s*\(?\s*\d+\s*\^\s*\{?\s*\(?\s*\d{2,}|\^[^^]*\d[^^]*\^[^^]*\d[^^]*\^[^^]*\d", text):
        raise NotComparable


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
            return True
    return True if compared >= 2 else None


def _points(names: list[Any]) -> Iterator[Mapping[Any, Any]]:
    from sympy import Rational

    if not names:
        yield {}
        return
    for shift in range(6):
        signs = [1 if shift < 3 or str(name)[:1] in _INTEGER_NAMES or (shift + i) % 2 else -1 for i, name in enumerate(names)]
        yield {
            name: sign * (Rational(_POINTS[(shift + i) % len(_POINTS)]) + Rational(i // len(_POINTS), 7))
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
    except NotComparable:
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
