"""A plugin of axolotl: initialises the LoRA layers from the first training batches, before the optimizer is made.

    plugins:
      - cntlora.integrations.axolotl.CntLora
    cntlora:
      method: whitened
      num_batches: 8

Every option of `cntlora.InitConfig` can stand under `cntlora:`, and two more: `plan`, a saved plan to apply instead of
reading batches, and `freeze_offset`, to go on training an adapter of base "offset" (`lora_model_dir`).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from axolotl.integrations.base import BasePlugin
from axolotl.utils.logging import get_logger
from pydantic import BaseModel, field_validator

from ..api import apply_plan, initialize_from_trainer
from ..config import InitConfig
from ..model.writer import freeze_offset
from ..plan import InitPlan

LOG = get_logger("axolotl.integrations.cntlora")  # axolotl shows the loggers below its own only
KERNELS = ("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel")
"""axolotl's fused kernels, which compute around the LoRA layers, so that no input can be read there."""


class CntLoraArgs(BaseModel):  # type: ignore[misc, unused-ignore]
    """Keys that axolotl's configuration takes besides its own; `cntlora` is checked before the model is loaded."""

    cntlora: dict[str, Any] | None = None

    @field_validator("cntlora")
    @classmethod
    def _known_options(cls, values: dict[str, Any] | None) -> dict[str, Any] | None:
        try:
            split(values)
        except TypeError as error:  # of an unknown option; pydantic tells a ValueError with the key's name
            raise ValueError(str(error)) from error
        return values


def split(values: Mapping[str, Any] | None) -> tuple[InitConfig, str | None, bool]:
    """The configuration, the path of a plan or None, and whether an adapter of base "offset" goes on.

    Raises:
        ValueError, TypeError: for options that are unknown or do not fit together.
    """
    given = dict(values or {})
    plan, freeze = given.pop("plan", None), bool(given.pop("freeze_offset", False))
    if (plan or freeze) and given:
        what = "plan" if plan else "freeze_offset"
        raise ValueError(f"{what}: expected it alone, got {', '.join(sorted(given))} beside it, which it would not use")
    if plan is not None and not Path(plan).is_file():
        raise ValueError(f"plan {plan}: there is no such file; make it with cntlora.compute_plan(…).save")
    return InitConfig.from_dict(given), plan, freeze


class CntLora(BasePlugin):  # type: ignore[misc]
    """The plugin; axolotl makes one and calls its hooks."""

    def get_input_args(self) -> str:
        """The class of the keys that the plugin adds to axolotl's configuration."""
        return f"{__name__}.{CntLoraArgs.__name__}"

    def register(self, cfg: Any) -> None:
        """Turn the fused LoRA kernels off where nobody asked for them; axolotl would turn them on by itself.

        Raises:
            ValueError: if they are asked for and batches are to be read.
        """
        values = cfg.get("cntlora") or {}
        if values.get("plan") or values.get("freeze_offset"):
            return
        asked = [name for name in KERNELS if cfg.get(name)]
        if asked:
            raise ValueError(
                f"{asked[0]}: true computes around the LoRA layers, so that cntlora cannot read their inputs; set it "
                "to false, or give a plan made without axolotl: cntlora: {plan: plan.safetensors}"
            )
        for name in KERNELS:
            cfg[name] = False
        LOG.info(f"cntlora: {', '.join(KERNELS)} are off, since the inputs of the LoRA layers are read")

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        """Initialise; the trainer has its model and its data now, and no optimizer.

        Raises:
            ValueError: if the adapter comes from `lora_model_dir` and `freeze_offset` does not say what to do.
        """
        config, plan, freeze = split(cfg.get("cntlora"))
        if freeze:
            LOG.info(f"cntlora: the negative half of {freeze_offset(trainer.model)} layers stays frozen")
            return
        if cfg.get("lora_model_dir"):
            raise ValueError(
                f"lora_model_dir {cfg['lora_model_dir']}: its adapter is trained already and is not initialised again; "
                "take cntlora out of plugins, or, if its base was 'offset', set cntlora: {freeze_offset: true}"
            )
        if plan is not None:
            report = apply_plan(trainer.model, InitPlan.load(plan))
        else:
            report = initialize_from_trainer(trainer, config)
        LOG.info(f"cntlora\n{report}")
