"""Values of a row in the placeholders of a template, and the refusal of a placeholder that no row fills.

The syntax of templates is that of `config.placeholders`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from deepgrpo.config import TemplateConfig
from deepgrpo.config.placeholders import Placeholder, pieces, placeholders
from deepgrpo.errors import ConfigError
from deepgrpo.prompts.paths import MISSING, listed, nearest, paths_of, value_at
from deepgrpo.prompts.values import is_missing


def value_of(columns: Mapping[str, Any], name: str) -> Any:
    """Value of a column, a nested one by its path (`prompts.paths`); None if the row does not have it, or no value there."""
    value = value_at(columns, name)
    return None if value is MISSING or is_missing(value) else value


def fill(template: str, columns: Mapping[str, Any]) -> str:
    """The template with the row's values. Filled-in text is not read again; a placeholder without a value stays.

    >>> fill("Level {level}: {question}", {"level": 3, "question": "{level}?"})
    'Level 3: {level}?'
    """
    return "".join(piece if isinstance(piece, str) else _shown(piece, columns) for piece in pieces(template))


def _shown(placeholder: Placeholder, columns: Mapping[str, Any]) -> str:
    value = value_of(columns, placeholder.name)
    return placeholder.text if value is None else str(value)


def refuse_unfilled(template: TemplateConfig, lacking: Counter[Placeholder], rows: Sequence[Mapping[str, Any]]) -> None:
    """Raise ConfigError if no row fills a required placeholder, or if the user turn has none that is filled.

    Args:
        template: the section `data.template`.
        lacking: number of rows without a value, by placeholder.
        rows: the columns of all rows, at least one.
    """
    for key, text in (("user", template.user), ("system", template.system)):
        found = placeholders(text)
        never = [each for each in found if lacking[each] == len(rows)]
        wrong = next((each for each in never if each.required or (key == "user" and len(never) == len(found))), None)
        if wrong is None:
            continue
        columns = dict.fromkeys(name for row in rows for name in row)
        if any(value_at(row, wrong.name) is not MISSING for row in rows):
            why = "which is null in every row; repair the column or take the placeholder out"
        else:
            known = list(dict.fromkeys([*columns, *paths_of(rows[0])]))
            close = nearest(wrong.name, known)
            hint = f"did you mean {{{close}}}? " if close else ""
            why = (
                f"which no row has; {hint}The columns are {listed(known)}; write {{{wrong.text}}} if the braces are "
                "meant as text"
            )
        raise ConfigError(f"template.{key} has the placeholder {wrong.text}, {why}")
