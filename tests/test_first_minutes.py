"""Messages of the first minutes: a batch that the model cannot take, a plan in a notebook, a report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from tests.tiny import adapted, base_model, text_batches, train
from torch import Tensor

from cntlora import InitConfig, compute_plan, freeze_offset, initialize
from cntlora.messages import counted
from cntlora.report import far_cure

SELF = InitConfig(method="self")


def labelled(*labels: int) -> list[dict[str, Tensor]]:
    batches = text_batches(2)
    for batch in batches:
        batch["labels"][: len(labels)] = torch.tensor(labels)
    return batches


def test_labels_out_of_range_are_named_with_their_batch_and_range() -> None:
    with pytest.raises(IndexError) as error:
        initialize(adapted(), labelled(0, 7), InitConfig(method="descent"))
    told = str(error.value)
    assert told.startswith("batch 0, a mapping with keys ['attention_mask', ") and "out of bounds" in told
    assert "its labels run from 0 to 7, and the model has" in told and "(num_labels), from 0 to" in told
    initialize(adapted(), labelled(0, 1), InitConfig(method="descent"))  # the control


@pytest.mark.parametrize(
    ("batch", "kind"),
    [(torch.randn(4), "Tensor"), (["some raw text"], "list"), ({"input_ids": ["raw text"]}, "keys ['input_ids']")],
    ids=["tensor", "texts", "mapping"],
)
def test_a_batch_that_fails_is_named(batch: Any, kind: str) -> None:
    """Also where it is the second, which tells that the loader is the same all along."""
    for index in (0, 1):
        good = text_batches(1)
        with pytest.raises((AttributeError, IndexError, RuntimeError, TypeError, ValueError)) as error:
            initialize(adapted(), [*good[:index], batch], SELF)
        assert f"batch {index}, " in str(error.value) and kind in str(error.value)
        assert "\n" not in str(error.value)


def test_an_error_of_the_user_stays_as_it_is() -> None:
    class OwnError(RuntimeError):
        pass

    def loss(model: Any, batch: Any) -> Any:
        raise OwnError("mine")

    with pytest.raises(OwnError, match="^mine$"):
        initialize(adapted(), text_batches(1), InitConfig(method="descent"), loss=loss)


def test_a_mask_of_another_shape_is_refused_where_the_loss_tells_the_tokens() -> None:
    """It was dropped for what the loss reaches, which is known where some labels are −100."""
    batches = labelled(-100, 1)
    shape = batches[0]["input_ids"].shape
    config = InitConfig(method="descent")
    initialize(adapted(), batches, config, token_mask=lambda batch: torch.ones(shape))  # the control
    with pytest.raises(ValueError, match=r"token_mask: expected a mask of shape \(8, \d+\).*got \(8, 3\)"):
        initialize(adapted(), batches, config, token_mask=lambda batch: torch.ones(8, 3))


def test_a_plan_is_shown_in_a_line() -> None:
    plan = compute_plan(adapted(), text_batches(1), SELF)
    assert repr(plan) == f"InitPlan(method='self', 4 sites, total rank {4 * 4}, batches=1)"


def test_a_report_counts_one_batch_as_one() -> None:
    for count, word in ((1, "1 batch ·"), (2, "2 batches ·")):
        assert word in str(initialize(adapted(), text_batches(count), SELF))


def test_one_thing_is_counted_as_one() -> None:
    assert [counted(number, "batch") for number in (0, 1, 1200)] == ["0 batches", "1 batch", "1,200 batches"]
    assert (counted(1, "row"), counted(2, "row")) == ("1 row", "2 rows")


def test_the_advice_of_a_far_start_is_not_the_tolerance_it_has() -> None:
    assert "1e-3" not in far_cure(InitConfig(method="shift")) and "lower strength" in far_cure(InitConfig("shift"))
    assert "raise rtol (1e-3" in far_cure(InitConfig.from_dict({"method": "shift", "rtol": 1e-5}))  # the control


@pytest.mark.parametrize("base", ["keep", "offset"])
def test_a_reloaded_adapter_that_was_kept_has_no_half_to_freeze(tmp_path: Path, base: Any) -> None:
    model = adapted()
    initialize(model, text_batches(2), InitConfig(method="self", base=base))
    train(model, text_batches(2), steps=5)
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(base_model("bert"), tmp_path / "adapter", is_trainable=True)
    if base == "offset":
        assert freeze_offset(loaded) == 4
    else:
        with pytest.raises(ValueError, match="of base 'keep', all of which trains"):
            freeze_offset(loaded)
