"""The folder of a pretrained model: what can be told of it without loading it, and without importing a library."""

from __future__ import annotations

import ast
import importlib.util
import json
import math
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

_WEIGHTS = (".safetensors", ".bin", ".gguf", ".pt", ".msgpack", ".h5")
_TOKENIZERS = ("tokenizer", "vocab", "spiece", "sentencepiece", "merges", "bpe", "added_tokens", "special_tokens")
_DEFAULTS = "TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING"
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


def check_names(folder: Path, targets: Iterable[str], setting: str) -> None:
    """Check that a model has a layer of one of the names.

    The headers of its weights tell at once. Where they have none of the names the model is built without weights, since
    some architectures have other names than their files.

    Args:
        folder: of the model.
        targets: endings of the layers' names; "all-linear" and regular expressions are not checked.
        setting: that has them, for the message.

    Raises:
        ValueError: names the endings that the model has.
    """
    targets = tuple(targets)
    if not targets or targets == ("all-linear",) or targets[0].startswith("re:"):
        return
    if not (folder / "config.json").is_file() or any(_is_target(n, targets) for n in _modules_in(folder)):
        return
    names, linear = _built(folder)
    if names and not any(_is_target(name, targets) for name in names):
        raise ValueError(
            f"{setting}: the model has no module named {', '.join(targets)}. The model's linear layers end in: "
            f"{', '.join(sorted({name.rpartition('.')[2] for name in linear}))}"
        )


def _modules_in(folder: Path) -> list[str]:
    return [name.removesuffix(".weight") for name in layer_shapes(folder)]


def _built(folder: Path) -> tuple[list[str], list[str]]:
    """The names of all modules and of the linear layers, of a model and of its classifier; none without a class."""
    import torch
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder)
    own = [getattr(transformers, str(name), None) for name in config.architectures or ()]
    kinds = [getattr(kind, "_from_config", None) for kind in own]
    kinds += [kind.from_config for kind in (transformers.AutoModel, transformers.AutoModelForSequenceClassification)]
    found: dict[str, Any] = {}
    for make in filter(None, kinds):
        with suppress(ValueError, TypeError, RuntimeError, ImportError, AttributeError), torch.device("meta"):
            found |= dict(make(config).named_modules())
    linear = [name for name, module in found.items() if type(module).__name__.endswith(("Linear", "Conv1D"))]
    return list(found), linear


def model_type(folder: Path) -> str:
    """Return what the configuration of a folder calls its architecture; "" where there is none."""
    try:
        return str(json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type", ""))
    except (OSError, ValueError):
        return ""


def default_targets(kind: str) -> tuple[str, ...]:
    """Return the layers that PEFT adapts in a model of this type where none are named; () where it has no choice.

    They are read off PEFT's source, since its import takes as long as that of transformers.
    """
    peft = importlib.util.find_spec("peft")
    if peft is None or peft.origin is None:
        return ()
    source = (Path(peft.origin).parent / "utils" / "constants.py").read_text(encoding="utf-8")
    for statement in ast.parse(source).body:
        if isinstance(statement, ast.Assign) and any(getattr(t, "id", "") == _DEFAULTS for t in statement.targets):
            return tuple(ast.literal_eval(statement.value).get(kind, ()))
    return ()


def _is_target(name: str, targets: tuple[str, ...]) -> bool:
    if targets == ("all-linear",):
        return False  # which layers are linear, the headers do not say
    if len(targets) == 1 and targets[0].startswith("re:"):
        return re.fullmatch(targets[0].removeprefix("re:"), name) is not None
    return any(f".{name}".endswith(f".{target}") for target in targets)
