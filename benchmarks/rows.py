"""The rows of the cost table: the forward pass, our methods, and PEFT's own code, each as a job on a workload."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from benchmarks.peers import PEERS, peer_model
from benchmarks.workloads import Batch, Workload, backward_pass, forward_pass, with_lora
from torch import nn

import cntlora
from cntlora.methods.method import METHODS

FLOOR = "forward pass"
BACKWARD = "forward and backward pass"
OURS: dict[str, dict[str, Any]] = {
    "cross": {"method": "cross", "rtol": 0.0},
    "self": {"method": "self"},
    "self (Cholesky)": {"method": "self", "root": "cholesky"},
    "shift": {"method": "shift", "rtol": 0.0},
    "cross + VAS": {"method": "cross", "rtol": 0.0, "adaptive_ranks": True},
    "self + VAS": {"method": "self", "adaptive_ranks": True},
    "shift + VAS": {"method": "shift", "rtol": 0.0, "adaptive_ranks": True},
    "cross (rtol 1e-3)": {"method": "cross"},
    "shift (rtol 1e-3)": {"method": "shift"},
    "descent": {"method": "descent"},
    "whitened": {"method": "whitened"},
    "eva": {"method": "eva"},
    "corda": {"method": "corda"},
    "lora_ga": {"method": "lora_ga"},
    "lora_one": {"method": "lora_one"},
    "pissa": {"method": "pissa"},
    "olora": {"method": "olora"},
}
ROWS: tuple[str, ...] = (FLOOR, BACKWARD, *OURS, *(f"PEFT {name}" for name in PEERS))
"""In the order of the table. "PEFT …" is PEFT's own code, wrapping included; ours is `compute_plan`."""


@dataclass(frozen=True)
class Job:
    """One row on one workload: `run(prepare())`, of which only `run` is measured."""

    prepare: Callable[[], nn.Module]
    run: Callable[[nn.Module], object]


class Bench:
    """A workload with its models, made when they are first needed."""

    def __init__(self, workload: Workload, device: torch.device) -> None:
        self.workload, self.device = workload, device

    def build(self) -> nn.Module:
        """The base model, made on the device (random weights are drawn there)."""
        with self.device:
            return self.workload.build().to(self.device)

    @cached_property
    def base(self) -> nn.Module:
        """The pretrained model, of which PEFT's initialisations get a copy, since they change it."""
        return self.build()

    @cached_property
    def adapted(self) -> nn.Module:
        """Adapt with plain LoRA; a plan leaves the model as it was, so this one serves all our rows."""
        return with_lora(self.workload, self.build())

    @cached_property
    def batches(self) -> list[Batch]:
        """All batches of the workload."""
        return [{key: value.to(self.device) for key, value in batch.items()} for batch in self.workload.batches()]

    def job(self, row: str) -> Job:
        """The job of a row.

        Raises:
            KeyError: for a row that is not in `ROWS`.
        """
        if row == FLOOR:
            return Job(lambda: self.adapted, lambda model: forward_pass(model, self.batches))
        if row == BACKWARD:
            return Job(lambda: self.adapted, lambda model: backward_pass(self.workload, model, self.batches))
        if row in OURS:
            return Job(lambda: self.adapted, lambda model: self.plan(model, OURS[row]))
        name = dict(zip((f"PEFT {peer}" for peer in PEERS), PEERS, strict=True))[row]
        return Job(lambda: copy.deepcopy(self.base), lambda model: peer_model(name, self.workload, model, self.batches))

    def plan(self, model: nn.Module, options: dict[str, Any]) -> cntlora.InitPlan:
        """Our initialisation, worked out but not applied."""
        reads_gradients = METHODS[options["method"]].reads == "gradients"
        return cntlora.compute_plan(
            model,
            self.batches,
            cntlora.InitConfig.from_dict(options),
            loss=self.workload.loss if reads_gradients else None,
            progress=False,
        )
