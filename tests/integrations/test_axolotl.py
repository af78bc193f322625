"""The plugin in axolotl itself: its plugin manager, its check of configurations, its training."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml
from tests.integrations.trainers import SCRIPTS, Workplace, installed, rows

pytestmark = [pytest.mark.packages, pytest.mark.slow]
AXOLOTL = (
    "axolotl==0.19.0", "axolotl-contribs-lgpl==0.0.7", "axolotl-contribs-mit==0.0.6", "addict==2.4.0", "fire==0.7.1",
    "art==6.5", "posthog==7.91.1", "colorama==0.4.6", "python-dotenv==1.2.4", "termcolor==3.3.0", "backoff==2.2.1",
    "distro==1.9.0", "six==1.17.0", "httpcore==1.0.9", "fastcore==2.2.41", "llvmlite==0.50.0", "numba==0.68.1",
)  # fmt: skip
BASE = {
    "base_model": "model", "adapter": "lora", "lora_r": 4, "lora_alpha": 8, "lora_target_modules": ["q_proj", "v_proj"],
    "datasets": [{"path": "rows.json", "ds_type": "json", "type": "alpaca"}], "sequence_len": 64, "micro_batch_size": 4,
    "gradient_accumulation_steps": 1, "max_steps": 3, "optimizer": "adamw_torch", "lr_scheduler": "constant",
    "save_strategy": "no", "val_set_size": 0, "bf16": False, "fp16": False, "dataset_prepared_path": "prepared",
    "special_tokens": {"pad_token": "<pad>"}, "warmup_steps": 0, "logging_steps": 1,
}  # fmt: skip
OURS = yaml.safe_load(SCRIPTS["axolotl"])
CHECK = """
import sys
from axolotl.cli.config import load_cfg
cfg = load_cfg(sys.argv.pop(1))
print("checked", cfg.cntlora.to_dict(), cfg.lora_mlp_kernel)
"""


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    made = Workplace(tmp_path_factory.mktemp("axolotl"), installed("axolotl", *AXOLOTL))
    (made.folder / "rows.json").write_text(json.dumps(rows()))
    return made


def config(workplace: Workplace, name: str, **more: object) -> Path:
    file = workplace.folder / f"{name}.yml"
    file.write_text(yaml.safe_dump({**BASE, "output_dir": name, **more}))
    return file


HOOKS = """
import sys
import torch
from axolotl.cli.config import load_cfg, plugin_set_cfg
from axolotl.integrations.base import PluginManager
from tests.tiny import adapted
from tests.trainer_cases import assert_trained, copies, factors, logged, trainer_for
cfg = load_cfg(sys.argv.pop(1))
plugin_set_cfg(cfg)
trainer = trainer_for(adapted("llama"), "out", "llama")
before = copies(trainer.model)
assert not any(value.any() for name, value in before.items() if name.endswith("B"))  # control
PluginManager.get_instance().post_trainer_create(cfg, trainer)
start = copies(trainer.model)
assert all(value.any() for value in start.values())
trainer.train()
assert_trained(trainer.model, start, logged(trainer).held)
print("trained", len(start))
"""


def test_axolotls_manager_calls_it_and_every_factor_trains(workplace: Workplace) -> None:
    """The hook that `axolotl.train` calls after it made the trainer, on a Trainer of transformers."""
    told = workplace.run("-c", HOOKS, config(workplace, "hooks", learning_rate=1e-2, **OURS))
    trained = re.search(r"trained (\d+)", told)
    assert trained and int(trained[1]) >= 8
    assert "cntlora: lora_mlp_kernel" in told and "self_attn.q_proj" in told  # its lines are in axolotl's log


@pytest.mark.parametrize(
    ("more", "wanted"),
    [
        ({"cntlora": {"method": "descend"}}, "descent"),
        ({"cntlora": {"num_batchs": 2}}, "num_batches"),
        ({"cntlora": {"plan": "nowhere.safetensors"}}, "nowhere.safetensors"),
        ({"cntlora": {"plan": "rows.json", "method": "self"}}, "expected it alone"),
        ({"lora_qkv_kernel": True}, "lora_qkv_kernel: true computes around"),
    ],
)
def test_a_wrong_option_stops_before_the_model_is_loaded(
    workplace: Workplace, more: dict[str, object], wanted: str
) -> None:
    file = config(workplace, "wrong", learning_rate=1e-3, **{**OURS, **more})
    told = workplace.run("-c", CHECK, file, check=False)
    assert wanted in told and "checked" not in told


def test_the_plugin_is_known_to_axolotls_own_manager(workplace: Workplace) -> None:
    told = workplace.run("-c", CHECK, config(workplace, "right", learning_rate=1e-3, **OURS))
    assert f"checked {OURS['cntlora']} False" in told
