"""The trainer; start at `loop.py`. The package can be called: `deepgrpo.train(...)` is `library.training.train`.

    run = deepgrpo.train("demo", overrides={"run.steps": 20})
    run = deepgrpo.train(config, model=..., tokenizer=..., dataset=..., rewards=[...])        docs/library.md

`help(deepgrpo.library.training.train)` has the arguments. A function of that name in `deepgrpo` would be replaced by this
package as soon as a module of it is imported.
"""

from __future__ import annotations

import inspect
import pkgutil
import sys
from types import ModuleType
from typing import Any

_FUNCTION = "deepgrpo.library.training:train"


class _CallablePackage(ModuleType):
    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        """Train to the end of a recipe and return the run; see `library.training.train`."""
        return pkgutil.resolve_name(_FUNCTION)(*arguments, **keywords)

    def __getattr__(self, name: str) -> Any:
        if name in ("__signature__", "__wrapped__"):  # for `help` and `inspect.signature`
            function = pkgutil.resolve_name(_FUNCTION)
            return function if name == "__wrapped__" else inspect.signature(function)
        raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")


sys.modules[__name__].__class__ = _CallablePackage
