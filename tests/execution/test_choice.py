"""The method where the configuration leaves it open: whitened where a loss can be read, else self."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.cases import mlp, squares, token_batches, wrapped
from tests.tiny import KINDS, adapted, causal_batches, changed, state, text_batches
from torch import nn
from torch.utils.data import DataLoader

from cntlora import InitConfig, InitPlan, InitReport, compute_plan, initialize, initialize_from_trainer
from cntlora.data.batches import KeptBatches

OPEN = InitConfig(method=None)


def method_of(model: nn.Module, batches: Any, **more: Any) -> tuple[str, str]:
    """The name of the method that is chosen, and why."""
    plan = compute_plan(model, batches, OPEN, progress=False, **more)
    assert plan.config.method is not None and plan.choice
    return plan.config.method.name, plan.choice


def without_labels() -> list[dict[str, torch.Tensor]]:
    return [{key: value for key, value in batch.items() if key != "labels"} for batch in text_batches()]


def test_a_loss_in_the_output_gives_whitened_and_none_gives_self() -> None:
    assert method_of(adapted(), text_batches()) == ("whitened", "the model gives a loss for the batches")
    assert method_of(adapted(), without_labels()) == ("self", "the model gives no loss for the batches")


def test_a_loss_that_is_given_counts() -> None:
    batches = token_batches([(4, 6), (3, 5)])
    assert method_of(wrapped(mlp()), batches, loss=squares) == ("whitened", "a loss was given")
    assert method_of(wrapped(mlp()), batches)[0] == "self"


def test_a_first_row_without_a_label_does_not_hide_the_loss() -> None:
    """All labels of a row may be −100: a prompt that was cut before its answer."""
    batches = causal_batches()
    batches[0]["labels"][0] = -100
    assert method_of(adapted("llama"), batches) == ("whitened", "the model gives a loss for the batches")


def test_a_loss_that_is_not_finite_is_named_where_it_is_read() -> None:
    batches = causal_batches()
    batches[0]["labels"][:] = -100
    with pytest.raises(ValueError, match="batch 0: the loss is nan.*labels may be −100"):
        initialize(adapted("llama"), batches, OPEN, progress=False)


def test_weights_whose_gradient_cannot_be_read_give_self() -> None:
    model = adapted()
    attention = model.base_model.model.bert.encoder.layer[0].attention.self
    attention.value.base_layer.weight = attention.query.base_layer.weight  # tied: its gradient is that of both
    name, why = method_of(model, text_batches())
    assert name == "self" and why.startswith("gradients cannot be read: site") and "tied" in why
    assert method_of(adapted(), text_batches())[0] == "whitened"  # the control


def test_without_batches_it_says_what_to_give() -> None:
    with pytest.raises(ValueError, match=r"batches: expected some.*InitConfig\(method='pissa'\)"):
        initialize(adapted(), None, OPEN, progress=False)
    initialize(adapted(), None, InitConfig(method="pissa"), progress=False)  # the control


def test_a_named_method_is_taken_and_no_reason_is_given() -> None:
    plan = compute_plan(adapted(), text_batches(), InitConfig(method="self"), progress=False)
    assert plan.choice == "" and "method self:" not in str(InitReport.of(plan))


@pytest.mark.parametrize("batches", [text_batches, without_labels])
def test_the_plan_is_that_of_the_method_named(batches: Any) -> None:
    plan = compute_plan(adapted(), batches(), OPEN, progress=False)
    same = compute_plan(adapted(), batches(), InitConfig(method=plan.config.method), progress=False)
    assert all(torch.equal(plan.sites[name].B, same.sites[name].B) for name in plan.sites)
    assert plan.batches == same.batches == 3


def test_plan_and_report_say_what_was_chosen_and_why(tmp_path: Path) -> None:
    plan = compute_plan(adapted(), text_batches(), OPEN, progress=False)
    plan.save(tmp_path / "plan.safetensors")
    back = InitPlan.load(tmp_path / "plan.safetensors")
    report = InitReport.of(back)
    assert back.choice == plan.choice and back.config == plan.config
    assert f"method whitened: {plan.choice}" in str(report)
    assert report.to_dict()["choice"] == plan.choice and report.to_dict()["config"]["method"] == "whitened"


def test_a_rate_is_used_where_the_chosen_method_is_made_for_one() -> None:
    plan = compute_plan(adapted(), text_batches(), InitConfig(learning_rate=1e-4), progress=False)
    plain = compute_plan(adapted(), text_batches(), OPEN, progress=False)
    name = next(iter(plan.sites))
    assert plan.sites[name].scaling == pytest.approx(100 * plain.sites[name].scaling)
    other = compute_plan(adapted(), without_labels(), InitConfig(learning_rate=1e-4), progress=False)
    assert other.choice.endswith("made for no learning rate, so that 0.0001 is not used")
    assert other.config.learning_rate is None and "learning rate" in str(InitReport.of(other))


# --- as found -------------------------------------------------------------------------------------------------


def test_a_one_shot_iterator_loses_no_batch() -> None:
    given = text_batches(5)
    iterator = iter(given)
    plan = compute_plan(adapted(), iterator, InitConfig(method=None, num_batches=3), progress=False)
    assert plan.batches == 3 and list(iterator) == given[3:]
    whole = compute_plan(adapted(), given, InitConfig(method="whitened", num_batches=3), progress=False)
    assert all(torch.equal(plan.sites[name].B, whole.sites[name].B) for name in plan.sites)


class Counting:
    """A dataset that counts what is read of it."""

    def __init__(self) -> None:
        self.rows = text_batches(4, rows=1)
        self.read: list[int] = []

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        self.read.append(index)
        return {key: value[0] for key, value in self.rows[index].items()}


def test_each_row_is_read_once_and_random_states_are_as_found() -> None:
    data = Counting()
    generator = torch.Generator().manual_seed(3)
    loader: Any = DataLoader(data, batch_size=1, shuffle=True, generator=generator)  # type: ignore[arg-type]
    before = torch.get_rng_state(), random.getstate(), generator.get_state()
    model = adapted()
    found = copy.deepcopy(state(model))
    compute_plan(model, loader, OPEN, progress=False)
    assert sorted(data.read) == [0, 1, 2, 3]
    assert torch.equal(before[0], torch.get_rng_state()) and before[1] == random.getstate()
    assert torch.equal(before[2], generator.get_state())
    assert not changed(found, model)


@pytest.mark.parametrize(("batches", "method"), [(text_batches, "whitened"), (without_labels, "self")])
def test_hooks_are_called_as_often_as_for_the_method_named(batches: Any, method: str) -> None:
    calls = []
    for config in (OPEN, InitConfig(method=method)):
        model, found = adapted(), []
        layer = model.base_model.model.bert.encoder.layer[0]
        layer.register_forward_hook(lambda *_, found=found: found.append(1))
        plan = compute_plan(model, batches(), config, progress=False)
        assert plan.config.method == InitConfig(method=method).method
        calls.append(len(found))
    assert calls[0] == calls[1] >= 3


def test_a_function_of_the_caller_is_not_called_just_to_look() -> None:
    calls = []

    def forward(model: nn.Module, batch: Any) -> Any:
        calls.append(1)
        return model(**batch)

    name, why = method_of(adapted(), without_labels(), forward=forward)
    assert (name, len(calls)) == ("self", 3) and "no labels" in why
    assert method_of(adapted(), text_batches(), forward=forward) == ("whitened", "the batches have labels")


def test_a_source_is_begun_once() -> None:
    begun = []

    class Source:
        size = 3

        def __iter__(self) -> Iterator[int]:
            begun.append(1)
            return iter((1, 2, 3))

    source = KeptBatches(Source(), 9)
    assert source.first() == 1 and list(source) == [1, 2, 3] and len(begun) == 1
    assert list(source) == [1, 2, 3] and len(begun) == 1 and source.size == 3
    assert KeptBatches([], 9).first() is None
    rest = iter(range(5))
    assert list(KeptBatches(rest, 2)) == [0, 1] and next(rest) == 2  # not one more than is asked for


def test_a_trainer_gives_its_loss(tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    rows = [{key: value[i] for key, value in batch.items()} for batch in text_batches(4) for i in range(8)]
    arguments = TrainingArguments(output_dir=str(tmp_path), report_to=[], use_cpu=True, per_device_train_batch_size=4)
    report = initialize_from_trainer(Trainer(model=adapted(), args=arguments, train_dataset=rows), OPEN)  # type: ignore[arg-type]
    assert report.config.method is not None and report.config.method.name == "whitened"
    assert report.choice == "a loss was given"


def test_other_kinds_of_models() -> None:
    batches = KINDS["llama"].batches()
    assert method_of(adapted("llama"), batches)[0] == "whitened"
    plain = [{key: value for key, value in batch.items() if key != "labels"} for batch in batches]
    assert method_of(adapted("llama"), plain)[0] == "self"
