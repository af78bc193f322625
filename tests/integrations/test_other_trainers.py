"""The scripts and plugin files of the guide, as it shows them, in the trainers that they are for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.integrations.trainers import SCRIPTS, TARGETS, Workplace, assert_ours_and_trained
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
