"""`weights=`: W of single layers out of the safetensors files of the unquantised model, read when it is asked for."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import safetensors
from torch import Tensor

from .layouts import as_matrix, layout_of
from .quantised import FLOATS

if TYPE_CHECKING:
    from .sites import Site

NAMES = ("model.safetensors", "diffusion_pytorch_model.safetensors")


class WeightFiles:
    """Finds tensors by name in one safetensors file, or in those of a folder (sharded or not).

    Raises:
        FileNotFoundError: if there is no such file, or none in the folder.
        ValueError: if one is cut short or is no safetensors file.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.files = {name: file for file in _files(self.path) for name in _names(file)}

    def key(self, wanted: str) -> str:
        """The name in the files: itself, or with or without prefixes that a wrapper put in front.

        Raises:
            ValueError: if there is none, or several that end alike.
        """
        if wanted in self.files:
            return wanted
        ends = [key for key in self.files if key.endswith(f".{wanted}") or wanted.endswith(f".{key}")]
        if len(ends) != 1:
            found = f"several ({', '.join(sorted(ends)[:3])})" if ends else f"{len(self.files)} others"
            raise ValueError(
                f"weights: {self.path} has no tensor {wanted!r}, but {found}; expected the files of the same model, "
                "with the names that it has in memory"
            )
        return ends[0]

    def read(self, key: str) -> Tensor:
        """One tensor, on the CPU."""
        with safetensors.safe_open(self.files[key], framework="pt") as file:
            tensor: Tensor = file.get_tensor(key)
        return tensor

    def serve(self, site: Site) -> Site:
        """The site with its W from the files.

        Raises:
            ValueError: if the files have no such weight, of another shape, or a quantised one.
        """
        wanted = f"{site.name}.{layout_of(site.base).parameter}"
        try:
            key = self.key(wanted)
        except ValueError as error:
            raise ValueError(f"site {site.name}: {error}") from None
        return replace(site, source=partial(self._checked, site, key))

    def _checked(self, site: Site, key: str) -> Tensor:
        stored = self.read(key)
        if stored.dtype not in FLOATS:
            raise ValueError(
                f"site {site.name}: weights: {key} in {self.files[key].name} is {stored.dtype}, expected the weight "
                "before it was quantised (float32, bfloat16 or float16)"
            )
        shape = tuple(as_matrix(site.base, stored).shape) if stored.dim() > 1 else tuple(stored.shape)
        if shape != (site.out_features, site.in_features):
            raise ValueError(
                f"site {site.name}: weights: {key} in {self.files[key].name} is (out, in) = {shape}, the layer is "
                f"{(site.out_features, site.in_features)}; expected the files of the same model"
            )
        return stored


def _files(path: Path) -> Iterator[Path]:
    if path.is_file():
        yield path
        return
    indices = sorted(path.glob("*.safetensors.index.json"))
    if indices:
        shards = json.loads(indices[0].read_text())["weight_map"].values()
        yield from sorted({path / Path(name).name for name in shards})
        return
    found = next((path / name for name in NAMES if (path / name).is_file()), None)
    if found is None:
        raise FileNotFoundError(
            f"weights: {path} is no safetensors file and has none of {', '.join(NAMES)}, nor an index of shards; "
            "expected the folder of the unquantised model"
        )
    yield found


def _names(file: Path) -> list[str]:
    try:
        with safetensors.safe_open(file, framework="pt") as opened:
            return list(opened.keys())
    except safetensors.SafetensorError as error:
        raise ValueError(f"weights: {file} is no whole safetensors file ({error}); was it cut short?") from error
    except FileNotFoundError:
        raise FileNotFoundError(f"weights: {file} is named in the index, but is not there; copy all shards") from None
