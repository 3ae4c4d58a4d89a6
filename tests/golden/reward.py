"""The reward of the golden traces: a random model succeeds about half of the time, and can learn to do better."""

from __future__ import annotations


def reward(completions: list[str], answer: list[str], **_: object) -> list[float]:
    """0 for an odd number of digits and signs together; else half a point, and as much again for the share of answer digits.

    Example: "12+#" with the answer "2" scores 0; "1+2#" with the same answer 0; "12" scores 0.5 + 0.5 / 2.
    """
    return [_score(text, digit) for text, digit in zip(completions, answer, strict=True)]


def _score(text: str, digit: str) -> float:
    if sum(character in "0123456789+-*" for character in text) % 2:
        return 0.0
    return 0.5 + 0.5 * text.count(digit) / max(1, len(text))
