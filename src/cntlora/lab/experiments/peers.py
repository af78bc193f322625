"""PEFT's own initialisations (the arms peft:…), called as its documentation says; pinned to the behaviour of PEFT 0.21.

Each function takes the pretrained model and returns it with initialised LoRA layers. What PEFT's code cannot do with
ordinary batches (classifiers, images, latents) is worked around here and nowhere else; every work-around says why.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from peft import AdaLoraConfig, EvaConfig, LoraConfig, get_peft_model
from peft import initialize_lora_eva_weights as eva_weights
from peft.tuners.lora.config import CordaConfig
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

Batches = Sequence[Mapping[str, Tensor]]
Peer = Callable[[nn.Module, Mapping[str, Any], Batches, int], nn.Module]

EVA_PASSES = 100
"""Forward passes after which EVA counts as not converging, per batch that it was given."""


def peft_model(name: str, model: nn.Module, options: Mapping[str, Any], batches: Batches, steps: int) -> nn.Module:
    """The model adapted and initialised by PEFT.

    Args:
        name: a key of `PEERS`, or a value of `LoraConfig.init_lora_weights` that needs no data: pissa, olora, …
        model: the pretrained one; several of PEFT's initialisations change its weights.
        options: of `LoraConfig`, without init_lora_weights.
        batches: mappings whose tensors share the first dimension, as many as the initialisation may see; where there
            is an attention_mask (batch, tokens), padding does not count.
        steps: updates of the training that follows (AdaLoRA plans with it).

    Raises:
        RuntimeError: if EVA does not converge.
        ValueError: if a batch holds too few tokens for EVA, a batch cannot be split into samples for CorDA, or PEFT
            refuses the options.
    """
    if name in PEERS:
        return PEERS[name](model, options, batches, steps)
    return _wrap(model, LoraConfig(init_lora_weights=name, **options))  # type: ignore[arg-type]


def _wrap(model: nn.Module, config: Any, **options: bool) -> nn.Module:
    return get_peft_model(model, config, **options)  # type: ignore[arg-type,return-value]


def _eva(model: nn.Module, options: Mapping[str, Any], batches: Batches, steps: int) -> nn.Module:
    config = LoraConfig(init_lora_weights="eva", eva_config=EvaConfig(), **options)
    masks = [mask for batch in batches if (mask := _mask(batch)) is not None]
    needed, fewest = round(config.r * config.eva_config.rho), min((int(mask.sum()) for mask in masks), default=None)
    # EVA skips such a batch; if all are like that, it goes round and round without an end
    if fewest is not None and fewest < needed:
        raise ValueError(f"peft:eva needs {needed} tokens a batch (r·rho), one has {fewest}; use larger batches")
    adapted = _wrap(model, config, low_cpu_mem_usage=True)  # as its documentation has it: A is written later
    passes = 0

    def bounded(model: nn.Module, batch: Mapping[str, Tensor]) -> Any:
        nonlocal passes
        passes += 1
        if passes > EVA_PASSES * len(batches):  # its loop ends by convergence alone
            raise RuntimeError(f"peft:eva has not converged after {passes - 1} forward passes")
        return model(**batch)

    # its own functions want input_ids and labels of shape (batch, tokens), and one mask for all layers
    eva_weights(
        adapted, list(batches), forward_fn=bounded, prepare_model_inputs_fn=lambda batch, _: _mask(batch),
        prepare_layer_inputs_fn=_counted, show_progress_bar=False,
    )  # type: ignore[arg-type]  # fmt: skip
    return adapted


def _mask(batch: Mapping[str, Any]) -> Tensor | None:
    """The (batch, tokens) mask of what is no padding."""
    mask = batch.get("attention_mask")
    return mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None


def _counted(layer_input: Any, mask: Tensor | None, name: str) -> Tensor:
    """(vectors, features) of a layer's input that count: all, or those under a mask of its shape."""
    x: Tensor = layer_input if isinstance(layer_input, Tensor) else layer_input[0]
    if mask is not None and x.shape[:-1] == mask.shape:
        return x[mask]
    return x.reshape(-1, x.shape[-1])  # of images or of a vision tower, where no token is padding


def _corda(model: nn.Module, options: Mapping[str, Any], batches: Batches, steps: int) -> nn.Module:
    from peft.tuners.lora.corda import preprocess_corda  # imports attrs, which PEFT does not declare

    corda = CordaConfig(corda_method="ipm")
    config = LoraConfig(init_lora_weights="corda", corda_config=corda, **options)

    def run_model() -> None:
        # its hook transposes the input as a matrix, which crashes for more than one sequence; and it counts padding
        for sequence in (row for batch in batches for row in _sequences(batch)):
            model(**sequence)

    preprocess_corda(model, config, run_model=run_model)
    return _wrap(model, config)


def _sequences(batch: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Each sample by itself, its sequences without padding."""
    mask, tensors = _mask(batch), {key: value for key, value in batch.items() if isinstance(value, Tensor)}
    rows = {len(value) for value in tensors.values() if value.dim()}
    if len(rows) != 1 or any(value.dim() == 0 for value in tensors.values()):
        shapes = {key: tuple(value.shape) for key, value in tensors.items()}
        raise ValueError(
            f"peft:corda wants one sample at a time, and these do not share a first dimension: {shapes}; use batches "
            "whose tensors do, or leave peft:corda out"
        )
    for i in range(rows.pop()):
        sample = {key: value[i : i + 1] if key in tensors else value for key, value in batch.items()}
        if mask is not None:
            cut = {key: sample[key][:, mask[i]] for key, value in tensors.items() if value.shape == mask.shape}
            sample |= cut
        yield sample


def _lora_ga(model: nn.Module, options: Mapping[str, Any], batches: Batches, steps: int) -> nn.Module:
    from peft.tuners.lora.config import LoraGAConfig  # not in older releases
    from peft.tuners.lora.loraga import preprocess_loraga

    config = LoraConfig(init_lora_weights="lora_ga", lora_ga_config=LoraGAConfig(), **options)

    def train_step() -> None:
        for batch in batches:
            model(**batch).loss.backward()

    with warnings.catch_warnings():
        # of its own hooks, on layers whose inputs need no gradient; it only counts with them
        warnings.filterwarnings("ignore", message="Full backward hook")
        preprocess_loraga(model, config, train_step)
    return _wrap(model, config)


def _adalora(model: nn.Module, options: Mapping[str, Any], batches: Batches, steps: int) -> nn.Module:
    rank = int(options["r"])
    names = ("lora_alpha", "lora_dropout", "target_modules", "task_type", "bias", "modules_to_save")
    kept = {key: options[key] for key in names}
    # half as many directions more at the start as at the end: PEFT's defaults are 12 and 8
    return _wrap(model, AdaLoraConfig(target_r=rank, init_r=rank + (rank + 1) // 2, total_step=steps, **kept))


PEERS: dict[str, Peer] = {"eva": _eva, "corda": _corda, "lora_ga": _lora_ga, "adalora": _adalora}


class AdaLoraTraining:
    """Steps that AdaLoRA needs in a training loop that does not know it.

    Attributes:
        losses: training losses without the orthogonality penalty that AdaLoRA adds to the model's loss, so that they
            compare with those of other methods; one a forward pass in training mode.
        inner: the model below AdaLoRA, whose loss has no penalty; score this one.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.inner = model.base_model.model
        self.losses: list[float] = []

    @contextmanager
    def running(self) -> Iterator[None]:
        """Share ranks out after every optimizer step, while the gradients are still there, as PEFT's example does."""
        forward = self.inner.forward
        step = 0

        @functools.wraps(forward)  # generation looks at the signature
        def recorded(*args: Any, **kwargs: Any) -> Any:
            output = forward(*args, **kwargs)
            if self.inner.training:
                self.losses.append(float(output.loss.detach()))
            return output

        def allocate(*_: Any) -> None:
            nonlocal step
            step += 1
            self.model.base_model.update_and_allocate(step)

        self.inner.forward = recorded
        handle = register_optimizer_step_post_hook(allocate)
        try:
            yield
        finally:
            handle.remove()
            self.inner.forward = forward
