"""The folder of an adapter: the names of its files and of the weights in them, and how it is written."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from ..atomic import not_written, temporary
from .class_names import NAMES, write_names
from .model_card import updated_card

WEIGHTS, CONFIG, CARD = "adapter_model.safetensors", "adapter_config.json", "README.md"
"""As PEFT writes them."""
DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
"""The weights and the configuration, as diffusers writes them."""
PREFIX = "base_model.model."
"""What PEFT puts in front of the name of a layer."""


@dataclass(frozen=True)
class AdapterFiles:
    """Contents of the folder.

    Attributes:
        section: of the model card; None for a folder without one.
        base_model: what the base model was loaded from, maybe a path of this machine: it gets into no file as it is.
        names: of the classes of a head that is saved with the adapter, if it has them.
    """

    state: dict[str, Tensor]
    config: dict[str, Any]
    section: str | None
    base_model: str | None
    names: tuple[str, ...] = ()


def file_key(key: str) -> str:
    """Keys of an adapter file start with PEFT's prefix, also where the model in memory has none, or is compiled."""
    key = key.replace("_orig_mod.", "")
    return key if key.startswith(PREFIX) else PREFIX + key


def factor_keys(state: dict[str, Tensor], site: str) -> tuple[str, str]:
    """The keys of A and B of a site."""
    plain = f"{site}lora_A.weight" in state
    down, up = (f"{site}lora_{half}.weight" if plain else f"{site}lora_embedding_{half}" for half in "AB")
    return down, up


def write_folder(path: Path, files: AdapterFiles) -> None:
    """All files into a temporary folder beside `path`, which is then renamed; or its files, if `path` is there."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary(path, folder=True) as unfinished:
            _write_files(unfinished, files, path / CARD)
            if path.is_dir():
                for name in (WEIGHTS, CONFIG, CARD, NAMES):
                    if (unfinished / name).exists():
                        (unfinished / name).replace(path / name)
                if not files.names:  # those of an adapter that was there before
                    (path / NAMES).unlink(missing_ok=True)
            else:
                unfinished.chmod(0o755)
                unfinished.replace(path)
    except OSError as error:
        raise not_written(path, error) from error
    except SafetensorError as error:  # how a full disk looks from there
        raise not_written(path, OSError(str(error))) from error


def _write_files(folder: Path, files: AdapterFiles, card: Path) -> None:
    save_file(files.state, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(files.config, indent=2, sort_keys=True, default=str), encoding="utf-8")
    write_names(folder, files.names)
    if files.section is not None:
        old = card.read_bytes().decode("utf-8", "surrogateescape") if card.is_file() else None
        text = updated_card(old, files.section, files.base_model)
        (folder / CARD).write_bytes(text.encode("utf-8", "surrogateescape"))
    for file in folder.iterdir():
        with file.open("rb") as written:
            os.fsync(written.fileno())
        file.chmod(0o644)
