"""The scripts and plugin files of the guide, as it shows them, in the trainers that they are for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from tests.integrations.trainers import SCRIPTS, TARGETS, Workplace, assert_ours_and_trained, environment, rows
from tests.trainer_cases import text

RATES = {"plain": 0.0, "start": 0.0, "end": 1e-2}


@pytest.mark.slow
def test_trl_sft(tmp_path: Path) -> None:
    place = Workplace(tmp_path)
    (tmp_path / "initialised.py").write_text(SCRIPTS["trl"])
    (tmp_path / "plain.py").write_text(
        "from trl.scripts import sft\nsft.main(*sft.make_parser().parse_args_and_config())"
    )
    (tmp_path / "data").mkdir()
    lines = [json.dumps({"prompt": text(i, 4), "completion": text(50 + i, 4)}) for i in range(24)]
    (tmp_path / "data" / "train.jsonl").write_text("\n".join(lines))
    for name, rate in RATES.items():
        place.run(
            "plain.py" if name == "plain" else "initialised.py", "--model_name_or_path", "model",
            "--dataset_name", "data", "--use_peft", "--lora_r", 4, "--lora_alpha", 8,
            "--lora_target_modules", *TARGETS, "--learning_rate", rate,
            "--max_steps", 3, "--bf16", "false", "--use_cpu", "true", "--report_to", "none", "--output_dir", name,
        )  # fmt: skip
    assert_ours_and_trained(*(place.factors(name) for name in RATES))


@pytest.mark.packages
@pytest.mark.slow
def test_llama_factory(tmp_path: Path) -> None:
    """The script of the guide in place of the command, in an environment with LLaMA-Factory's own versions."""
    place = Workplace(tmp_path, python=environment("llamafactory", "llamafactory==0.9.5"))
    (tmp_path / "initialised.py").write_text(SCRIPTS["llamafactory"])
    (tmp_path / "rows.json").write_text(json.dumps(rows()))
    (tmp_path / "dataset_info.json").write_text(json.dumps({"rows": {"file_name": "rows.json"}}))
    for name, rate in RATES.items():
        command = ["-m", "llamafactory.cli", "train"] if name == "plain" else ["initialised.py"]
        place.run(
            *command, "--stage", "sft", "--do_train", "--model_name_or_path", "model", "--dataset", "rows",
            "--dataset_dir", ".", "--template", "empty", "--finetuning_type", "lora", "--lora_rank", 4,
            "--lora_alpha", 8, "--lora_target", ",".join(TARGETS), "--learning_rate", rate, "--max_steps", 3,
            "--per_device_train_batch_size", 4, "--cutoff_len", 64, "--logging_steps", 1, "--save_strategy", "no",
            "--report_to", "none", "--use_cpu", "true", "--output_dir", name,
        )  # fmt: skip
    assert_ours_and_trained(*(place.factors(name) for name in RATES))


@pytest.mark.packages
@pytest.mark.slow
def test_ms_swift(tmp_path: Path) -> None:
    """The plugin file of the guide under `swift sft`, in an environment with ms-swift's own versions."""
    place = Workplace(tmp_path, python=environment("swift", "ms-swift==4.6.0"))
    (tmp_path / "cntlora_swift.py").write_text(SCRIPTS["swift"])
    (tmp_path / "rows.json").write_text(json.dumps(rows()))
    for name, rate in RATES.items():
        ours = [] if name == "plain" else ["--external_plugins", "cntlora_swift.py", "--optimizer", "cntlora"]
        place.run(
            "-m", "swift.cli.main", "sft", "--model", "model", "--model_type", "llama", "--template", "dummy",
            "--dataset", "rows.json", "--tuner_type", "lora", "--lora_rank", 4, "--lora_alpha", 8,
            "--target_modules", *TARGETS, "--torch_dtype", "float32", "--learning_rate", rate, "--max_steps", 3,
            "--per_device_train_batch_size", 4, "--max_length", 64, "--logging_steps", 1, "--save_steps", 3,
            "--split_dataset_ratio", 0, "--report_to", "none", "--use_cpu", "true", "--output_dir", name, *ours,
        )  # fmt: skip
    assert_ours_and_trained(*(place.factors(name) for name in RATES))


@pytest.mark.packages
@pytest.mark.slow
def test_axolotl(tmp_path: Path) -> None:
    """The plugin under axolotl's own command and trainer, in an environment with its own versions."""
    place = Workplace(tmp_path, python=environment("axolotl", "axolotl==0.19.0"))
    (tmp_path / "rows.json").write_text(json.dumps(rows()))
    common = {
        "base_model": "model", "adapter": "lora", "lora_r": 4, "lora_alpha": 8, "lora_target_modules": list(TARGETS),
        "datasets": [{"path": "rows.json", "ds_type": "json", "type": "alpaca"}], "dataset_prepared_path": "prepared",
        "sequence_len": 64, "micro_batch_size": 4, "gradient_accumulation_steps": 1, "max_steps": 3,
        "optimizer": "adamw_torch", "lr_scheduler": "constant", "warmup_steps": 0, "logging_steps": 1,
        "save_strategy": "no", "val_set_size": 0, "bf16": False, "fp16": False,
        "special_tokens": {"pad_token": "<pad>"},
    }  # fmt: skip
    for name, rate in RATES.items():
        ours = {} if name == "plain" else yaml.safe_load(SCRIPTS["axolotl"])
        options = {**common, **ours, "learning_rate": rate, "output_dir": name}
        (tmp_path / f"{name}.yml").write_text(yaml.safe_dump(options))
        place.run("-m", "axolotl.cli.train", f"{name}.yml")
    assert_ours_and_trained(*(place.factors(name) for name in RATES))
