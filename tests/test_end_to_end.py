"""The main job on a real pretrained model and real data: MiniLM-L6 and labelled tweets."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import cntlora
from cntlora.lab.demo import run_demo
from cntlora.lab.recipes.scoring import evaluate_classifier
from cntlora.lab.recipes.text.classification import SequenceTask
from cntlora.lab.recipes.text.sentiment import TARGET_MODULES, TweetsSettings, make_task
from cntlora.lab.recipes.train_settings import TrainSettings
from cntlora.lab.recipes.training import train

pytestmark = pytest.mark.packages


@pytest.fixture(scope="module")
def task() -> SequenceTask:
    return make_task(TweetsSettings(eval_size=64))


def adapted(task: SequenceTask) -> nn.Module:
    torch.manual_seed(0)
    lora = LoraConfig(r=8, lora_alpha=16, task_type="SEQ_CLS", target_modules=list(TARGET_MODULES))
    return get_peft_model(task.build_model(0), lora)


@pytest.mark.parametrize("base", ["offset", "paired", "subtract"])
def test_starts_as_the_pretrained_model(task: SequenceTask, base: str) -> None:
    model, held_out = adapted(task).eval(), list(task.eval_batches())[:1]
    with torch.no_grad():
        before = model(**held_out[0]).logits
        report = cntlora.initialize(
            model, task.train_batches(0), cntlora.InitConfig(method="self", base=base, num_batches=2), progress=False
        )
        after = model(**held_out[0]).logits
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)
    assert len(report.sites) == 24 and all(site["delta_norm"] > 0 for site in report.sites.values())
    loss = model(**held_out[0]).loss
    loss.backward()
    gradients = [p.grad.norm() for n, p in model.named_parameters() if "lora_" in n and p.requires_grad]
    assert len(gradients) == 48 and all(float(g) > 0 for g in gradients)


def test_keep_is_the_control(task: SequenceTask) -> None:
    """With the paper's letter the function moves, by far more than the tolerance of the test above."""
    model, held_out = adapted(task).eval(), list(task.eval_batches())[:1]
    with torch.no_grad():
        before = model(**held_out[0]).logits
        cntlora.initialize(
            model, task.train_batches(0), cntlora.InitConfig(method="self", base="keep", num_batches=2), progress=False
        )
        assert (model(**held_out[0]).logits - before).abs().max() > 1e-2


def test_shared_inputs_and_exact_tokens(task: SequenceTask) -> None:
    """Every site of a BERT sees every token that is not padding, no more."""
    batches = [batch for batch, _ in zip(task.train_batches(0), range(3), strict=False)]
    plan = cntlora.compute_plan(adapted(task), batches, progress=False, config=cntlora.InitConfig(method="self"))
    tokens = sum(int(batch["attention_mask"].sum()) for batch in batches)
    assert {site.tokens for site in plan.sites.values()} == {tokens}
    assert tokens < sum(batch["attention_mask"].numel() for batch in batches)


def test_learns(task: SequenceTask) -> None:
    """30 steps from our start beat predicting the commonest class; the untrained model does not."""
    model = adapted(task)
    cntlora.initialize(model, task.train_batches(0), progress=False, config=cntlora.InitConfig(method="self"))
    held_out = task.eval_batches()
    start, _, _ = evaluate_classifier(model, held_out)
    torch.manual_seed(0)
    curve = train(model, task.train_batches(0), TrainSettings(steps=30), learning_rate=3e-3)
    end, _, _ = evaluate_classifier(model, held_out)
    assert not curve.diverged
    assert end < start - 0.05


@pytest.mark.slow
def test_demo_leaves_curves_adapter_and_record(tmp_path: Path) -> None:
    lines: list[str] = []
    record = run_demo(tmp_path / "out", steps=8, say=lines.append)
    assert record["reload"]["equal_predictions"]
    saved = json.loads((tmp_path / "out" / "record.json").read_text())
    assert saved["runs"]["cntlora"]["losses"] == record["runs"]["cntlora"]["losses"]
    assert (tmp_path / "out" / "curves.png").stat().st_size > 10_000
    assert {p.name for p in (tmp_path / "out" / "adapter").iterdir()} == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "id2label.json",
    }
    assert any("predictions equal" in line for line in lines)
