"""Common base of all recipe sections: frozen, unknown keys refused, docstrings kept as descriptions."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from typing import Annotated, Any, Self, get_args, get_origin

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PrivateAttr, field_validator, model_validator
from pydantic_core import PydanticCustomError

PathText = Annotated[str, AfterValidator(os.path.expanduser)]
"""A path, a hub name, or "path/to/file.py:name"; a leading ~ is the home directory."""

NonNegative = Annotated[float, Field(ge=0)]
Probability = Annotated[float, Field(ge=0, le=1)]
DecayRate = Annotated[float, Field(ge=0, lt=1)]

GIVEN = "given:"
"""Begins the name of an object of the Python program that trains, such as "given:accuracy": a section holds the object."""


@dataclass(frozen=True, eq=False)
class Held:
    """An object of this process, for a section that can only name it. Two sections are equal if they hold the same one."""

    value: Any


class Section(BaseModel):
    """Base of all sections: frozen, unknown keys refused, field docstrings kept as descriptions.

    A section may hold the object that its keys describe, such as a model or a function (library/given.py puts it there). The
    object is no key: a dump and a file do not have it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    _held: Held | None = PrivateAttr(default=None)

    @property
    def held(self) -> Any:
        """The object that this section holds; None: it describes what is loaded or built."""
        return None if self._held is None else self._held.value

    def holding(self, value: Any) -> Self:
        """A copy that holds an object; None: that holds none."""
        copy = self.model_copy()
        copy._held = None if value is None else Held(value)
        return copy

    def check(self, recipe: Any) -> None:
        """Check this section against the others.

        Args:
            recipe: the whole `Config`. (Its type is not named here: it would import every section.)

        Raises ValueError with key, value and remedy.
        """

    @property
    def unset(self) -> frozenset[str]:
        """Fields that a written recipe leaves out, because their value follows from others only when a run starts."""
        return frozenset()

    @field_validator("*", mode="after")
    @classmethod
    def _is_unicode(cls, value: Any) -> Any:
        """A byte that is not UTF-8 reaches the command line as half a surrogate pair, which no file and no tokenizer takes."""
        if isinstance(value, str | list | tuple | dict):
            try:
                json.dumps(value, ensure_ascii=False, default=str).encode()
            except UnicodeEncodeError:
                raise PydanticCustomError("not_unicode", "text in UTF-8; the bytes given are not") from None
        return value

    @model_validator(mode="before")
    @classmethod
    def _none_is_a_word(cls, raw: Any) -> Any:
        """TOML has no null: the word "none" takes its place where a field may be absent."""
        if not isinstance(raw, dict):
            return raw
        optional = {
            name
            for field, info in cls.model_fields.items()
            if type(None) in get_args(info.annotation)
            for name in (field, info.alias)
        }
        return {key: None if value == "none" and key in optional else value for key, value in raw.items()}


def entries_of(annotation: Any) -> Any:
    """The annotation of the tables inside a table with free names or a list, such as dict[str, A | B] or tuple[A, ...]; None
    for any other.
    """
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return entries_of(arguments[0])
    if origin is dict and tables_of(arguments[1]):
        return arguments[1]
    return arguments[0] if origin is tuple and tables_of(arguments[0]) else None


def tables_of(annotation: Any) -> list[type[BaseModel]]:
    """The section classes inside an annotation such as Annotated[A | B, ...] or A | None."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in get_args(annotation) for model in tables_of(part)]
