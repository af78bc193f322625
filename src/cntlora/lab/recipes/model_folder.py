"""The folder of a pretrained model: what can be told of it without loading it, and without importing a library."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

_WEIGHTS = (".safetensors", ".bin", ".gguf", ".pt", ".msgpack", ".h5")
_TOKENIZERS = ("tokenizer", "vocab", "spiece", "sentencepiece", "merges", "bpe", "added_tokens", "special_tokens")
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


def find_folder(name: str) -> Path | None:
    """The local folder that a model's name means; None for a name on the hub or a sample.

    Raises:
        ValueError: for what can only be a path and is no folder.
    """
    path = Path(name).expanduser()
    if name.startswith("sample:"):
        return None
    if path.is_dir():
        return path
    if path.exists():
        raise ValueError(f"model {name}: this is a file; expected the folder of a model, or a name on the hub")
    if not _HUB_NAME.fullmatch(name) or name.startswith((".", "~")) or ("/" in name and path.parent.is_dir()):
        raise ValueError(
            f"model {name}: there is no such folder; expected the folder of a pretrained model, or a name on the hub "
            "such as owner/name"
        )
    return None


def check_folder(folder: Path, *, tokenizer: bool = False) -> dict[str, Any]:
    """Check that a folder holds a model of transformers: configuration, weights and, if wanted, a tokenizer.

    Returns:
        The configuration.

    Raises:
        ValueError: names the folder and what it lacks.
    """
    file = folder / "config.json"
    if not file.is_file():
        if (folder / "adapter_config.json").is_file():
            raise ValueError(f"model {folder}: this is an adapter; expected the model that it adapts")
        raise ValueError(f"model {folder}: no config.json is there; expected a folder written by save_pretrained")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"model {folder}: config.json is no JSON ({error})") from error
    names = [path.name for path in folder.iterdir() if path.is_file()]
    if not any(name.endswith(_WEIGHTS) for name in names):
        raise ValueError(
            f"model {folder}: no weights are there; expected model.safetensors or pytorch_model.bin beside config.json"
        )
    if tokenizer and not any(name.startswith(_TOKENIZERS) or name.endswith((".tiktoken", ".gguf")) for name in names):
        raise ValueError(
            f"model {folder}: no tokenizer is there; expected tokenizer.json and its neighbours beside config.json, as "
            "the tokenizer's save_pretrained writes them"
        )
    return dict(config)


def layer_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Name → shape of every weight in the safetensors files of a folder and its subfolders, read off their headers.

    The names of a pipeline's weights begin with the name of its part, which is a subfolder.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for file in sorted(folder.rglob("*.safetensors")):
        part = ".".join(file.relative_to(folder).parts[:-1])
        for name, entry in _header(file).items():
            if name != "__metadata__":
                shapes[f"{part}.{name}" if part else name] = tuple(entry["shape"])
    return shapes


def _header(file: Path) -> Mapping[str, Any]:
    """The header of a safetensors file; empty where it is none, which whoever loads it says better."""
    try:
        with file.open("rb") as opened:
            return dict(json.loads(opened.read(int.from_bytes(opened.read(8), "little"))))
    except (OSError, ValueError, MemoryError, OverflowError):
        return {}


def check_rank(folder: Path, rank: int, targets: Iterable[str], width: int = 1) -> None:
    """Check a rank against the sizes of the layers that get LoRA, by the headers of the weights' files.

    Args:
        folder: of the model.
        rank: that trains.
        targets: endings of the layers' names, "all-linear", or one regular expression that begins with "re:".
        width: singular triplets that the method uses, as a multiple of the rank.

    Raises:
        ValueError: names the smallest layer.
    """
    targets = tuple(targets)
    found = {
        name.removesuffix(".weight"): min(shape[0], math.prod(shape[1:]))
        for name, shape in layer_shapes(folder).items()
        if len(shape) >= 2 and name.endswith(".weight") and _is_target(name.removesuffix(".weight"), targets)
    }
    name = min(found, key=lambda name: found[name], default="")
    if name and rank > found[name] // width:
        limit = "min(in, out)" if width == 1 else f"min(in, out)/{width}"
        raise ValueError(f"rank: {rank} is above {limit} = {found[name] // width} of {name}; lower it")


def _is_target(name: str, targets: tuple[str, ...]) -> bool:
    if targets == ("all-linear",):
        return False  # which layers are linear, the headers do not say
    if len(targets) == 1 and targets[0].startswith("re:"):
        return re.fullmatch(targets[0].removeprefix("re:"), name) is not None
    return any(f".{name}".endswith(f".{target}") for target in targets)
