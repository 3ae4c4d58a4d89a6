"""F1 of the words that two answers share, as in SQuAD and HotpotQA."""

from __future__ import annotations

import re
import string
from collections import Counter

_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def words(text: str) -> list[str]:
    """Words in lower case, without punctuation and articles.

    >>> words("The Glass-Orchard, by A. Velden")
    ['glassorchard', 'by', 'velden']
    """
    return _ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split()


def f1(answer: str, reference: str) -> float:
    """Harmonic mean of precision and recall of the words, each counted as often as it stands in both; 0 without words.

    Example: "Ada Velden, chemist" and "Ada Velden" share 2 words: precision 2/3, recall 1, F1 = 0.8.

    >>> f1("Ada Velden, chemist", "Ada Velden")
    0.8
    """
    left, right = words(answer), words(reference)
    shared = sum((Counter(left) & Counter(right)).values())
    return 2 * shared / (len(left) + len(right)) if shared else 0.0
