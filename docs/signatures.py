"""Shows functions that are `called_with` a dataclass as Python does: with its arguments and their documentation."""

from __future__ import annotations

import importlib
import inspect
from typing import Any

import griffe


class CalledWith(griffe.Extension):
    """Takes signature and docstring of such functions from the imported package."""

    def on_function(self, *, func: griffe.Function, **_: Any) -> None:
        if not any("called_with" in str(decorator.value) for decorator in func.decorators):
            return
        found = getattr(importlib.import_module(func.module.path), func.name)
        func.parameters = griffe.Parameters(*(_parameter(p) for p in inspect.signature(found).parameters.values()))
        if func.docstring is not None:
            func.docstring.value = inspect.getdoc(found) or ""


def _parameter(found: inspect.Parameter) -> griffe.Parameter:
    return griffe.Parameter(
        found.name,
        annotation=str(found.annotation),
        kind=griffe.ParameterKind(found.kind.description),
        default=None if found.default is found.empty else repr(found.default),
    )
