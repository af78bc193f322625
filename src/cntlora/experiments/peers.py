"""PEFT's own initialisations (the arms peft:…), called as its documentation says; pinned to the behaviour of PEFT 0.21.

Each function takes the pretrained model and returns it with initialised LoRA layers. What PEFT's code cannot do with
ordinary batches of a classifier is worked around here and nowhere else; every work-around says why.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from peft import AdaLoraConfig, EvaConfig, LoraConfig, LoraGAConfig, get_peft_model
from peft import initialize_lora_eva_weights as eva_weights
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.loraga import preprocess_loraga
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
        batches: mappings with input_ids, attention_mask and labels, as many as the initialisation may see.
        steps: updates of the training that follows (AdaLoRA plans with it).

    Raises:
        RuntimeError: if EVA does not converge.
        ValueError: if a batch holds too few tokens for EVA, or PEFT refuses the options.
    """
    if name in PEERS:
        return PEERS[name](model, options, batches, steps)
    return _wrap(model, LoraConfig(init_lora_weights=name, **options))  # type: ignore[arg-type]


def _wrap(model: nn.Module, config: Any, **options: bool) -> nn.Module:
    return get_peft_model(model, config, **options)  # type: ignore[arg-type,return-value]


def _eva(model: nn.Module, options: Mapping[str, Any], batches: Batches, steps: int) -> nn.Module:
    config = LoraConfig(init_lora_weights="eva", eva_config=EvaConfig(), **options)
    needed, fewest = round(config.r * config.eva_config.rho), min(int(b["attention_mask"].sum()) for b in batches)
    if fewest < needed:  # EVA skips such a batch; if all are like that, it goes round and round without an end
        raise ValueError(f"peft:eva needs {needed} tokens a batch (r·rho), one has {fewest}; use larger batches")
    adapted = _wrap(model, config, low_cpu_mem_usage=True)  # as its documentation has it: A is written later
    passes = 0

    def bounded(model: nn.Module, batch: Mapping[str, Tensor]) -> Any:
        nonlocal passes
        passes += 1
        if passes > EVA_PASSES * len(batches):  # its loop ends by convergence alone
            raise RuntimeError(f"peft:eva has not converged after {passes - 1} forward passes")
        return model(**batch)

    # with use_label_mask, its default, labels of shape (batch,) are compared with the mask (batch, tokens) and crash
    unlabelled = [{key: value for key, value in batch.items() if key != "labels"} for batch in batches]
    eva_weights(adapted, unlabelled, forward_fn=bounded, show_progress_bar=False)  # type: ignore[arg-type]
    return adapted


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


def _sequences(batch: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """Each row by itself, without padding and labels."""
    masks = batch["attention_mask"].bool()
    for i, mask in enumerate(masks):
        yield {key: value[i][mask][None] for key, value in batch.items() if value.shape == masks.shape}


def _lora_ga(model: nn.Module, options: Mapping[str, Any], batches: Batches, steps: int) -> nn.Module:
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
    kept = {key: options[key] for key in ("lora_alpha", "lora_dropout", "target_modules", "task_type")}
    # half as many directions more at the start as at the end: PEFT's defaults are 12 and 8
    return _wrap(model, AdaLoraConfig(target_r=rank, init_r=rank + (rank + 1) // 2, total_step=steps, **kept))


PEERS: dict[str, Peer] = {"eva": _eva, "corda": _corda, "lora_ga": _lora_ga, "adalora": _adalora}


class AdaLoraTraining:
    """What AdaLoRA needs in a training loop that does not know it.

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
        """Shares ranks out after every optimizer step, while the gradients are still there, as PEFT's example does."""
        forward = self.inner.forward
        step = 0

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
