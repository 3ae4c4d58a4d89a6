r"""Size of a formula's values, estimated before anything is computed: 10^{10^{10}} has too many digits to write down."""

from __future__ import annotations

import math
from typing import Any

from deepgrpo.rewards.workers import NotComparableError

LARGEST = 100_000
"""Decimal digits of an intermediate value."""

_SYMBOL = 0.7  # log10 of the largest value that a variable is given
_MOST_TERMS = 10_000  # of a sum or product
_LARGEST_FACTORIAL = 5_000


def refuse_huge(expression: Any) -> None:
    """Raises NotComparableError if a part of a sympy expression has more than `LARGEST` digits before or after the point."""
    _size(expression)


def _size(expression: Any) -> float:
    """Estimate of log10 of the absolute value; at least 0 in absolute terms for what is near 1."""
    from sympy import Add, Integral, Mul, Number, Pow, Product, Sum, exp, factorial

    if isinstance(expression, Number):
        return _log10(expression)
    sizes = [_size(part) for part in getattr(expression, "args", ()) if hasattr(part, "args")]
    if isinstance(expression, Pow | exp):
        base, power = (math.log10(math.e), sizes[0]) if isinstance(expression, exp) else (abs(sizes[0]) + 0.3, sizes[1])
        return _checked(base * 10 ** min(power, 12))
    if isinstance(expression, factorial):
        if sizes[0] > math.log10(_LARGEST_FACTORIAL):
            raise NotComparableError
        return max(0.0, sizes[0]) * 10 ** max(0.0, sizes[0])
    if isinstance(expression, Sum | Product) and any(size > math.log10(_MOST_TERMS) for size in sizes):
        raise NotComparableError
    if isinstance(expression, Integral | Sum | Product):
        return max(sizes, default=0.0)
    if isinstance(expression, Mul):
        return _checked(sum(sizes))
    if isinstance(expression, Add):
        return max(sizes, default=0.0) + 1
    return max([_SYMBOL, *sizes])


def _log10(number: Any) -> float:
    if not number.is_finite or number == 0:
        return 0.0
    numerator, denominator = number.as_numer_denom() if number.is_Rational else (number, 1)
    return math.log10(abs(numerator)) - math.log10(denominator) if number.is_Rational else _float_log10(number)


def _float_log10(number: Any) -> float:
    # a sympy Float may lie beyond Python's floats: sign, mantissa, exponent, bits
    _, mantissa, exponent, _ = number._mpf_
    return math.log10(int(mantissa)) + int(exponent) * math.log10(2) if mantissa else 0.0


def _checked(size: float) -> float:
    if abs(size) > LARGEST:
        raise NotComparableError
    return size
