"""The optional dependencies: which modules each extra of the package brings, and the error where one is missing."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.util import find_spec

_CLI = ("typer", "numpy", "rich")
_TEXT = ("peft", "numpy", "accelerate", "pandas", "sklearn", "scipy", "transformers")
_VISION = (*_TEXT, "datasets", "PIL")
_TOML = () if sys.version_info >= (3, 11) else ("tomli",)

EXTRAS: dict[str, tuple[str, ...]] = {
    "cli": _CLI,
    "peft": ("peft",),
    "text": _TEXT,
    "vision": _VISION,
    "diffusion": (*_VISION, "diffusers"),
    "vlm": _VISION,
    "samples": ("gguf", "onnx", "PIL"),
    "lab": (*_CLI, *_TEXT, "attrs", "jinja2", "matplotlib", "plotly", "pyarrow", *_TOML),
    "demo": (*_CLI, *_TEXT, "matplotlib"),
    "ray": ("ray",),
    "trackers": ("tensorboard", "wandb", "mlflow", "trackio"),
}
"""Extra → the modules that it brings, those of the extras that it includes among them (pyproject.toml)."""


class MissingExtraError(ModuleNotFoundError):
    """A module of an extra is not installed; the message names the extra."""

    def __init__(self, module: str, extra: str, purpose: str) -> None:
        super().__init__(f"{purpose} needs {module}: pip install 'cntlora[{extra}]'", name=module)


def require(extra: str, purpose: str, modules: Sequence[str] = ()) -> None:
    """Check, without importing anything, that the modules of an extra are installed.

    Args:
        extra: a key of `EXTRAS`.
        purpose: what needs them, the subject of the message: "cntlora report".
        modules: those that are needed; all of the extra if none are given.

    Raises:
        MissingExtraError: names the first module that is missing and the extra that brings it.
    """
    for module in modules or EXTRAS[extra]:
        if find_spec(module) is None:
            raise MissingExtraError(module, extra, purpose)
