"""The parts of a trainer that are read: its batches, the call of its model, and its loss. No trainer is imported.

Trainers are told apart by what they have: sentence-transformers' has `collect_features`, TRL's preference trainers
`ref_model`, and the rest is a `transformers.Trainer`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from .config import WITH_LOSS, WITHOUT_LOSS, InitConfig
from .data.batches import REPEATABLE, Forward, default_forward
from .model.checks import gradient_refusal
from .model.sites import find_sites

NOT_FOR_THE_MODEL = ("completion_mask", "ref_chosen_logps", "ref_rejected_logps")
"""Keys of a batch that TRL's preference trainers read themselves and keep from the model."""

LOGS = ("_metrics", "accum_loss_components", "_total_train_tokens")
"""What the losses of TRL's and sentence-transformers' trainers write into besides."""


def check_trainer(trainer: Any, config: InitConfig) -> None:
    """Raise TypeError for what is no trainer, ValueError if it is too late or the base of `config` would be wrong."""
    if not callable(getattr(trainer, "get_train_dataloader", None)) or not isinstance(
        getattr(trainer, "model", None), nn.Module
    ):
        raise TypeError(
            f"trainer: expected a transformers.Trainer or one made from it (TRL, sentence-transformers), got "
            f"{type(trainer).__name__}; with another one, call initialize(model, batches) where its model has LoRA "
            "layers and no optimizer"
        )
    if getattr(trainer, "optimizer", None) is not None:
        raise ValueError(
            "the trainer already has an optimizer, which holds the old parameters; call initialize_from_trainer before "
            ".train(), and leave `optimizers` to the trainer"
        )
    if config.base == "subtract" and config.effective_base == "subtract" and _refers_to_base(trainer):
        raise ValueError(
            f"base 'subtract' changes the base weights, and the reference model of this {type(trainer).__name__} is "
            "the base model, with the adapter switched off; use base='offset' or 'paired', which leave it as it is, "
            "or give the trainer a ref_model of its own"
        )


def _refers_to_base(trainer: Any) -> bool:
    """Return whether a trainer takes its own model without the adapter as the reference (TRL's DPO, KTO, …)."""
    compares = bool(getattr(trainer, "beta", None)) and getattr(trainer, "ref_model", trainer) is None
    return compares and not getattr(trainer, "precompute_ref_logps", False)


def training_arguments(
    trainer: Any, config: InitConfig, forward: Forward | None, loss: Forward | None, adapter: str = "default"
) -> dict[str, Any]:
    """The arguments `batches`, `forward` and `loss` of `initialize`; what the caller gave takes precedence.

    Raises:
        ValueError: if the trainer makes its data while it trains, and the method reads data.
    """
    reads: str = "inputs" if config.method is None else config.method.reads
    if config.method is None:
        found = find_sites(trainer.model, adapter)
        refusal = gradient_refusal(trainer.model, found, adapter, InitConfig(WITH_LOSS), InitConfig(WITHOUT_LOSS))
        reads = "inputs" if refusal else "gradients"
    if reads == "weights" and not config.fit_head:
        return {"batches": None, "forward": forward, "loss": loss}
    if _generates(trainer) and forward is None and loss is None:
        raise ValueError(
            f"this {type(trainer).__name__} generates what it trains on, so that there is nothing to read before; give "
            "batches of your own, of prompts with answers such as it will see: initialize(trainer.model, "
            "[tokenizer(texts, return_tensors='pt', padding=True), …]). Or take a method that reads the weights alone "
            "(pissa, olora)"
        )
    loader = trainer.get_train_dataloader()
    if forward is None and (reads == "gradients" or config.fit_head):
        loss = loss or _OwnLoss(trainer)
    if reads == "gradients" and forward is None:
        return {"batches": loader, "forward": None, "loss": loss}
    if callable(getattr(trainer, "collect_features", None)) and forward is None:
        return {"batches": Columns(loader, trainer.collect_features), "forward": _one_argument, "loss": loss}
    return {"batches": loader, "forward": forward or _for_the_model, "loss": loss}


def _generates(trainer: Any) -> bool:
    """Return whether its batches are prompts alone, to which the model writes the answers (TRL's GRPO, RLOO, …)."""
    return callable(getattr(trainer, "_generate", None))


class _OwnLoss:
    """A trainer's loss; `by_labels`: whether it is that of the model, which leaves out tokens labelled −100."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        library = type(trainer).compute_loss.__module__.split(".")[0]
        changed = any(getattr(trainer, name, None) is not None for name in ("label_smoother", "compute_loss_func"))
        self.by_labels = library in ("transformers", "trl") and not changed

    def __call__(self, model: nn.Module, batch: Any) -> Any:
        return self.trainer.compute_loss(model, dict(batch) if isinstance(batch, Mapping) else batch)


def _for_the_model(model: nn.Module, batch: Any) -> Any:
    if isinstance(batch, Mapping):
        batch = {key: value for key, value in batch.items() if key not in NOT_FOR_THE_MODEL}
    return default_forward(model, batch)


REPEATABLE.add(_for_the_model)


def _one_argument(model: nn.Module, batch: Any) -> Any:
    return model(batch)


class Columns:
    """The columns of text of sentence-transformers' batches, each a batch with a mask of its own."""

    def __init__(self, loader: Iterable[Any], collect: Callable[[dict[str, Any]], tuple[list[Any], Any]]) -> None:
        self.loader, self.collect = loader, collect

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)  # a DataLoader's generators, which are left as found

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for batch in self.loader:
            for column in self.collect(dict(batch))[0]:
                if not (isinstance(column, Mapping) and any(isinstance(v, Tensor) for v in column.values())):
                    raise TypeError(
                        "this trainer hands on texts that its loss tokenises (a CrossEncoder's does), so there is no "
                        "tensor to read; give batches yourself: initialize(trainer.model, [tokenizer(pairs, …), …], "
                        "forward=lambda model, batch: model(batch))"
                    )
                yield dict(column)


@contextmanager
def left_as_found(trainer: Any) -> Iterator[None]:
    """Leave the trainer's sums for its logs, and its accelerator's list of loaders, as they were."""
    logs = {name: copy.deepcopy(getattr(trainer, name)) for name in LOGS if hasattr(trainer, name)}
    prepared = getattr(getattr(trainer, "accelerator", None), "_dataloaders", None)
    known = len(prepared) if prepared is not None else 0
    try:
        yield
    finally:
        for name, value in logs.items():
            setattr(trainer, name, value)
        if prepared is not None:
            del prepared[known:]  # the loader made for this call is none of the trainer's


@contextmanager
def closed(batches: Any) -> Iterator[None]:
    """Let accelerate not take a prepared loader, of which only the first batches were read, for in use afterwards."""
    state = getattr(batches, "gradient_state", None)
    before = _in_use(state, batches)
    try:
        yield
    finally:
        if not before and _in_use(state, batches):
            batches.end()


def _in_use(state: Any, loader: Any) -> bool:
    return any(loader is known for known in getattr(state, "dataloader_references", ()))
