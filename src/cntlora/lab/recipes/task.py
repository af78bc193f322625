"""Interface of a recipe: a task (model, data, scores) and how it is made from its settings.

A task is what `cntlora.lab.experiments` trains with every arm. Everything random in it comes from the seed it is given,
so that all arms of a seed start from the same model and see the same batches in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

from torch import Tensor, nn

from ..record import Sample


class Output(Protocol):
    """Output of a model: its training loss, a scalar, and whatever else the task's `evaluate` needs."""

    loss: Tensor


class Task(Protocol):
    """Model and data of a task; the same seed gives the same."""

    @property
    def metrics(self) -> Mapping[str, str]:
        """Held-out metric → "min" or "max", whichever is better; known without loading model or data."""

    @property
    def main_metric(self) -> str:
        """The one that tables show first; a key of `metrics`."""

    @property
    def peft_type(self) -> str | None:
        """`task_type` of PEFT's configuration, such as "SEQ_CLS" or "CAUSAL_LM"; None for a plain module."""

    @property
    def targets(self) -> tuple[str, ...]:
        """Layers that LoRA adapts unless `[lora] targets` names others; () for PEFT's own choice.

        A single entry that starts with "re:" is a regular expression for full module names.
        """

    @property
    def targets_from_model(self) -> bool:
        """Tell whether `targets` reads the model's configuration, which takes the seconds of its library's import."""

    @property
    def modules_to_save(self) -> tuple[str, ...]:
        """Modules trained whole and saved with the adapter, as a new head; () where `peft_type` takes care of it."""

    def check_data(self) -> None:
        """Read the data as far as that is cheap and needs no library of models, whose imports take seconds.

        Raises:
            ValueError: for data that cannot be used, naming file and row, what was expected and what came.
        """

    def check_model(self) -> None:
        """Read what the data need of the model's folder, such as a tokenizer.

        Raises:
            ValueError: for a model, or data with this model, that cannot be used.
        """

    def check(self) -> None:
        """Check the data, then the model."""

    def describe(self) -> str | None:
        """One line about the data that the user should see, such as which class has which index; None for nothing."""

    def build_model(self, seed: int) -> nn.Module:
        """The pretrained model; `model(**batch).loss` is the training loss; what is new in it is drawn under `seed`."""

    def train_batches(self, seed: int) -> Iterable[Mapping[str, Any]]:
        """Training batches with a length, that can be read again.

        Order, and noise, time steps or augmentation if there are any, depend on the seed and on the pass alone.
        """

    def init_batches(self, seed: int) -> Iterable[Mapping[str, Any]]:
        """Batches that initialisations read."""

    def eval_batches(self) -> Iterable[Mapping[str, Any]]:
        """Held-out batches, always the same."""

    def evaluate(self, model: nn.Module, batches: Iterable[Mapping[str, Any]]) -> dict[str, float]:
        """The metrics of a model on held-out batches; leaves modes and random states as found."""

    def sample(self, model: nn.Module, step: int, folder: Path) -> list[Sample]:
        """Images or captions of a model after `step` updates.

        Returns:
            For each {"kind": "image" or "text", "name": prompt or subject, "file": name of the file written in
            `folder` or None, "text": text or None}; none if the task has no samples.
        """

    def save(self, model: nn.Module, folder: Path) -> None:
        """Write the trained adapter as the field's ordinary file."""


@dataclass(frozen=True)
class Recipe:
    """One row of the table of recipes.

    Attributes:
        settings: frozen dataclass of the `[task]` section: `name` first, plain values with defaults, checked in
            `__post_init__`, which raises ValueError.
        make: the task of such settings.
        tiny: settings for `--smoke` from the settings of the file and an empty folder: a tiny random model of the
            same architecture class and a few synthetic rows, written in the folder, offline; then the same code runs.
    """

    settings: type
    make: Callable[[Any], Task]
    tiny: Callable[[Any, Path], Any]


class Defaults:
    """The ordinary part of a task, to be inherited: no extra modules, no samples, an adapter as PEFT saves it."""

    modules_to_save: tuple[str, ...] = ()
    targets_from_model: ClassVar[bool] = False

    def check_data(self) -> None:
        """Nothing to check."""

    def check_model(self) -> None:
        """Nothing to check."""

    def check(self) -> None:
        """Check the data, then the model."""
        self.check_data()
        self.check_model()

    def describe(self) -> str | None:
        """Nothing to say."""
        return None

    def train_batches(self, seed: int) -> Iterable[Mapping[str, Any]]:
        """Batches of the training, which each task gives."""
        raise NotImplementedError(f"{type(self).__name__}.train_batches")

    def init_batches(self, seed: int) -> Iterable[Mapping[str, Any]]:
        """The training batches of the seed."""
        return self.train_batches(seed)

    def sample(self, model: nn.Module, step: int, folder: Path) -> list[Sample]:
        """Make no samples."""
        return []

    def save(self, model: nn.Module, folder: Path) -> None:
        """An ordinary LoRA for the pristine base, see `cntlora.save_adapter`."""
        from ...files.saving import save_adapter

        save_adapter(model, folder)
