"""PEFT's own initialisations, called on any workload as its documentation says; pinned to the behaviour of PEFT 0.21.

`cntlora.lab.experiments.peers` does the same for classifiers of text; here batches may also be images or hidden states.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

from benchmarks.workloads import Batch, Workload
from peft import EvaConfig, LoraConfig, LoraGAConfig, get_peft_model, initialize_lora_eva_weights
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.loraga import preprocess_loraga
from torch import nn

PEERS = ("eva", "corda", "lora_ga", "pissa", "pissa_niter_4", "olora")
EVA_PASSES = 25
"""Forward passes per batch after which EVA counts as not converging."""


def peer_model(name: str, workload: Workload, model: nn.Module, batches: list[Batch]) -> nn.Module:
    """The base model adapted and initialised by PEFT, which changes it.

    Args:
        name: one of `PEERS`.

    Raises:
        RuntimeError: if EVA does not converge.
        ValueError: if PEFT refuses the options.
    """
    data = {"eva": _eva, "corda": _corda, "lora_ga": _lora_ga}
    if name in data:
        return data[name](workload, model, batches)
    return get_peft_model(model, LoraConfig(init_lora_weights=name, **workload.lora))  # type: ignore[arg-type]


def _eva(workload: Workload, model: nn.Module, batches: list[Batch]) -> nn.Module:
    config = LoraConfig(init_lora_weights="eva", eva_config=EvaConfig(), **workload.lora)
    adapted = get_peft_model(model, config, low_cpu_mem_usage=True)  # type: ignore[arg-type]
    passes = 0

    def bounded(model: nn.Module, batch: Batch) -> Any:
        nonlocal passes
        passes += 1
        if passes > EVA_PASSES * len(batches):  # its loop ends by convergence alone
            raise RuntimeError(f"not converged after {passes - 1} forward passes")
        return model(**batch)

    # its mask of labels fails for labels of shape (batch,), and its functions for language need an attention mask
    unlabelled = [{key: value for key, value in batch.items() if key != "labels"} for batch in batches]
    masked = "attention_mask" in batches[0]
    plain: dict[str, Any] = {} if masked else {"prepare_model_inputs_fn": None, "prepare_layer_inputs_fn": None}
    initialize_lora_eva_weights(adapted, unlabelled, forward_fn=bounded, show_progress_bar=False, **plain)  # type: ignore[arg-type]
    return adapted


def _corda(workload: Workload, model: nn.Module, batches: list[Batch]) -> nn.Module:
    from peft.tuners.lora.corda import preprocess_corda  # imports attrs, which PEFT does not declare

    corda = CordaConfig(corda_method="ipm")
    config = LoraConfig(init_lora_weights="corda", corda_config=corda, **workload.lora)

    def run_model() -> None:
        for row in (row for batch in batches for row in rows_alone(batch)):
            model(**row)

    preprocess_corda(model, config, run_model=run_model)
    return get_peft_model(model, config)  # type: ignore[arg-type]


def rows_alone(batch: Batch) -> Iterator[Batch]:
    """Each row by itself, without padding and labels: CorDA's hook takes one sequence, and would count padding."""
    masks = batch.get("attention_mask")
    for i in range(len(next(iter(batch.values())))):
        row = {key: value[i] for key, value in batch.items() if key != "labels"}
        if masks is not None:
            row = {key: value[masks[i].bool()] for key, value in row.items()}
        yield {key: value[None] for key, value in row.items()}


def _lora_ga(workload: Workload, model: nn.Module, batches: list[Batch]) -> nn.Module:
    config = LoraConfig(init_lora_weights="lora_ga", lora_ga_config=LoraGAConfig(), **workload.lora)

    def train_step() -> None:
        for batch in batches:
            workload.loss(model, batch).backward()

    with warnings.catch_warnings():
        # of its own hooks, on layers whose inputs need no gradient; it only counts with them
        warnings.filterwarnings("ignore", message="Full backward hook")
        preprocess_loraga(model, config, train_step)
    return get_peft_model(model, config)  # type: ignore[arg-type]
