"""The scripts and plugin files of the guide, as it shows them, in the trainers that they are for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
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
