"""The grammar of arms: names, labels, options, and messages for wrong names."""

from __future__ import annotations

from pathlib import Path

import pytest

import cntlora
from cntlora.lab.experiments.arms import MODIFIERS, PEFT_LABELS, bases, parse_arm
from cntlora.lab.experiments.settings import load_experiment

EXPERIMENTS = sorted((Path(__file__).parents[2] / "studies").glob("*.toml"))


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("full", "Full fine-tuning"),
        ("lora", "LoRA"),
        ("dora", "DoRA"),
        ("rslora", "rsLoRA"),
        ("lora+dora+rslora", "DoRA + rsLoRA"),
        ("cross", "CNTLoRA-X"),
        ("self+vas", "CNTLoRA-S + VAS"),
        ("cross+dora", "CNTDoRA-X"),
        ("self+rslora", "CNTRS-LoRA-S"),
        ("cross+qr", "CNTLoRA-X-QR"),
        ("cross+p0.75", "CNTLoRA-X-0.75"),
        ("shift+C10", "CNTLoRA-Sh-10"),
        ("shift+Cgaussian", "CNTLoRA-Sh-Norm"),
        ("pissa", "PiSSA"),
        ("peft:pissa", "PiSSA (PEFT)"),
        ("eva+dora", "EVA + DoRA"),
        ("lora_ga", "LoRA-GA"),
        ("peft:adalora", "AdaLoRA"),
        ("self+paired", "CNTLoRA-S (paired)"),
        ("self+n2+split4", "CNTLoRA-S (2 batches) (batches in 4)"),
        ("lora+r16", "LoRA (rank 16)"),
        ("eva+shuffled", "EVA (shuffled data)"),
    ],
)
def test_labels_are_the_papers(name: str, label: str) -> None:
    assert parse_arm(name).label == label


def test_every_base_and_every_modifier_is_a_name() -> None:
    assert {arm.label for arm in map(parse_arm, bases())} and len(bases()) == len(set(bases()))
    for modifier in MODIFIERS:
        root = modifier.only or "cross"
        arm = parse_arm(f"{root}+{modifier.example}")
        options = {"init": arm.init, "lora": arm.lora, "data": arm.data, "arm": vars(arm)}[modifier.of]
        assert options is not None and modifier.option in options


def test_every_method_of_cntlora_is_an_arm() -> None:
    assert set(cntlora.methods()) <= set(bases())
    assert all(f"peft:{name}" in bases() for name in PEFT_LABELS)


def test_options_reach_the_configuration() -> None:
    arm = parse_arm("cross+p0.25+vas+paired+strength1+rtol1e-3+mean+dora")
    assert arm.init == {
        "method": "cross", "p": 0.25, "adaptive_ranks": True, "base": "paired", "strength": 1.0, "rtol": 1e-3,
        "gram": "mean",
    }  # fmt: skip
    assert arm.lora == {"use_dora": True} and arm.peft is None and not arm.full
    assert parse_arm("lora").init is None  # PEFT's own LoRA, though cntlora has a method of that name
    assert parse_arm("shift+C-0.1").init == {"method": "shift", "shift_constant": -0.1}
    assert parse_arm("peft:eva+rslora").peft == "eva"
    assert parse_arm("self+r4").lora == {"r": 4} and parse_arm("self+n2").init == {"method": "self", "num_batches": 2}
    assert parse_arm("self+fitted").fitted and parse_arm("lora+fitted").fitted and not parse_arm("lora").fitted
    assert parse_arm("peft:eva+fitted").meaning != parse_arm("peft:eva").meaning
    assert parse_arm("lora+head").fit_head and parse_arm("lora+head+unseen").data == {"unseen": True}
    assert parse_arm("pissa+head+unseen").data == {"unseen": True} and not parse_arm("whitened").fit_head
    assert parse_arm("lora+head").meaning != parse_arm("lora").meaning
    assert parse_arm("self+foreign+split2").data == {"content": "foreign", "parts": 2}


def test_order_of_modifiers_means_nothing() -> None:
    assert parse_arm("cross+vas+dora").meaning == parse_arm("cross+dora+vas").meaning
    assert parse_arm("dora").meaning == parse_arm("lora+dora").meaning == parse_arm("peft:dora").meaning
    assert parse_arm("cross+vas").meaning != parse_arm("cross").meaning


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("slef", "did you mean 'self'"),
        ("peft:pisa", "did you mean 'peft:pissa'"),
        ("", "''"),
        ("self+vsa", "did you mean 'vas'"),
        ("self+", "modifier"),
        ("self+pfoo", "modifier"),
        ("self+p1.5", "p: expected"),
        ("self+vas+vas", "comes twice"),
        ("self+p0.1+p0.2", "comes twice"),
        ("self+keep+offset", "both set base"),
        ("cross+p0.1+qr", "keep one of them"),
        ("cross+C10", "'shift' only"),
        ("cross+symmetric", "'self' only"),
        ("lora+vas", "no effect on 'lora'"),
        ("peft:eva+vas", "no effect on 'peft:eva'"),
        ("full+dora", "no effect on 'full'"),
        ("peft:adalora+rslora", "no effect on 'peft:adalora'"),
        ("eva+qr", "no effect"),
        ("dora+dora", "comes twice"),
        ("self+shuffled+foreign", "both set content"),
        ("pissa+shuffled", "reads no data"),
        ("lora+unseen", "no effect on 'lora'"),
        ("peft:eva+shuffled", "no effect on 'peft:eva'"),
        ("self+n0", "num_batches"),
        ("lora+r0", "at least 1"),
        ("self vas", "did you mean"),
    ],
)
def test_wrong_names_say_what_is_right(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_arm(name)


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_experiment_files_are_right(path: Path) -> None:
    experiment = load_experiment(path)
    labels = [parse_arm(name).label for name in experiment.sweep.methods]
    own_data = path.stem.startswith("my_")  # one run, to be begun with
    assert len(set(labels)) == len(labels) >= (1 if own_data else 3)
    assert experiment.name == path.stem and experiment.title
    assert f"cntlora {'run' if own_data else 'compare'} studies/{path.name}" in path.read_text()


def test_there_are_experiment_files() -> None:
    assert {"tweets", "tweets_100", "tweets_variations"} <= {path.stem for path in EXPERIMENTS}
