"""Names of the classes of an adapter's head: taken from the model's configuration, kept beside the adapter.

PEFT's files have no place for them, so that a loaded adapter gives indices without names. `id2label.json` holds the two
tables of a transformers configuration, `id2label` and `label2id`, as its config.json would.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

NAMES = "id2label.json"


def class_names(model: nn.Module, state: Mapping[str, Tensor]) -> tuple[str, ...]:
    """The names in the order of the logits; () if the configuration has none, or the adapter no head of that size.

    Args:
        model: whose configuration has `id2label`.
        state: the tensors of the adapter's file. A configuration may name the classes that a backbone was pretrained
            on; they count only where a layer that is saved whole has as many outputs.
    """
    given: Any = getattr(getattr(model, "config", None), "id2label", None)
    if not isinstance(given, Mapping) or sorted(map(int, given)) != list(range(len(given))):
        return ()
    names = tuple(str(given[key]) for key in sorted(given, key=int))
    if len(names) < 2 or all(name == f"LABEL_{i}" for i, name in enumerate(names)):
        return ()
    heads = [key for key, value in state.items() if ".lora_" not in key and value.ndim > 1 and len(value) == len(names)]
    return names if heads else ()


def names_file(names: Sequence[str]) -> str:
    """The text of `id2label.json`."""
    index = {name: i for i, name in enumerate(names)}
    return json.dumps({"id2label": dict(enumerate(names)), "label2id": index}, indent=2, ensure_ascii=False) + "\n"


def write_names(folder: Path, names: Sequence[str]) -> None:
    """Write the file where there are names."""
    if names:
        (folder / NAMES).write_text(names_file(names), encoding="utf-8")


def read_names(folder: Path) -> tuple[str, ...]:
    """The names that lie beside an adapter; () without any.

    Raises:
        ValueError: if the file is not as `names_file` writes it.
    """
    path = folder / NAMES
    if not path.is_file():
        return ()
    try:
        given = json.loads(path.read_text(encoding="utf-8"))["id2label"]
        return tuple(str(given[str(i)]) for i in range(len(given)))
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f'{path}: expected {{"id2label": {{"0": name, …}}}} ({type(error).__name__}: {error})'
        ) from error
