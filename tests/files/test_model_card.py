"""The README of an adapter folder: what is known of the start, without a path, a name or a secret of this machine."""

from __future__ import annotations

import copy
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel
from tests.tiny import adapted, base_model, logits, text_batches, train

from cntlora import InitConfig, InitPlan, apply_plan, compute_plan, save_adapter
from cntlora.files.model_card import BEGIN, END, updated_card
from cntlora.files.public_names import public_name, public_values
from cntlora.model.provenance import Start, data_fingerprint, start_of


def planned(seed: int = 0, **init: Any) -> tuple[Any, InitPlan]:
    model = adapted(target_modules=["query", "value", "dense"])
    needs = init.get("method") not in ("pissa", "olora", "lora")
    plan = compute_plan(
        model,
        text_batches(seed=seed) if needs else None,
        InitConfig.from_dict({"method": "self", **init}),
        progress=False,
    )
    apply_plan(model, plan)
    return model, plan


def card(model: Any, folder: Path, plan: InitPlan | None = None) -> str:
    save_adapter(model, folder, plan=plan)
    return (folder / "README.md").read_text(encoding="utf-8")


def rows(text: str) -> dict[str, str]:
    return dict(re.findall(r"^\| (.+?) \| (.*) \|$", text, re.MULTILINE))


def test_the_card_tells_the_start(tmp_path: Path) -> None:
    model, plan = planned(adaptive_ranks=True, rank_budget=30, num_batches=2, strength=1.5)
    told = rows(card(model, tmp_path / "out", plan))
    assert told["Method"].startswith("self, by cntlora ")
    assert told["Base"].startswith("offset")
    options = "`num_batches=2`, `strength=1.5`, `adaptive_ranks=True`, `rank_budget=30`"
    assert sorted(told["Options that differ from the defaults"].split(", ")) == sorted(options.split(", "))
    assert data_fingerprint(plan)[:16] in told["Data"] and "2 batches" in told["Data"]
    ratios = sorted(s.delta_norm / s.weight_norm for s in plan.sites.values() if s.delta_norm is not None)
    assert told["‖ΔW‖/‖W‖ of the estimate"].startswith(f"{ratios[0]:.2e} to {ratios[-1]:.2e}")
    ranks = [s.file_rank for s in plan.sites.values() if s.rank]
    total = f"{len(ranks)}, ranks {min(ranks)} to {max(ranks)}, {sum(ranks)} in all, scaling 1"
    assert told["Sites in the file"] == total
    assert told["query"].startswith("2 |") and torch.__version__ in told["Written with"]


@pytest.mark.parametrize(
    ("init", "words"),
    [
        ({"method": "pissa"}, ("pissa", "reads the weights alone")),
        ({"method": "eva"}, ("eva", "with B = 0")),
        ({"method": "lora_ga", "base": "keep"}, ("lora_ga", "gradients of 3 batches", "keep:")),
        ({"base": "subtract"}, ("self", "subtract:", "scaling 1")),
    ],
    ids=str,
)
def test_every_kind_of_method_is_told(tmp_path: Path, init: dict[str, Any], words: tuple[str, ...]) -> None:
    model, plan = planned(**init)
    text = card(model, tmp_path / "out", plan)
    assert all(word in text for word in words), text


def test_an_unknown_start_says_so(tmp_path: Path) -> None:
    model, plan = planned()
    save_adapter(model, tmp_path / "one", plan=plan)
    loaded = PeftModel.from_pretrained(base_model(), tmp_path / "one")
    told = rows(card(loaded, tmp_path / "two"))
    assert told["Method"].startswith("not known") and "Data" not in told
    assert told["Sites in the file"] == rows((tmp_path / "one" / "README.md").read_text())["Sites in the file"]


def test_a_start_is_remembered_as_long_as_the_layers_live(tmp_path: Path) -> None:
    model, plan = planned()
    assert start_of(model) == Start.of(plan)
    train(model, text_batches())
    assert card(model, tmp_path / "out") == card(model, tmp_path / "told", plan)
    assert start_of(adapted()) is None


def test_the_fingerprint_is_of_the_data() -> None:
    (_, one), (_, again), (_, other) = planned(), planned(), planned(seed=1)
    assert data_fingerprint(one) == data_fingerprint(again) != data_fingerprint(other)
    assert data_fingerprint(InitPlan.from_bytes(one.to_bytes())) == data_fingerprint(one)


# --- texts that are there already ---------------------------------------------------------------------------


def test_a_text_of_the_user_stays_to_the_byte(tmp_path: Path) -> None:
    model, plan = planned()
    folder = tmp_path / "out"
    folder.mkdir()
    mine = b"---\nlicense: mit\n---\r\n# Mine\r\nf\xfcr \\1 | $x$ <!-- a comment -->"
    (folder / "README.md").write_bytes(mine)
    save_adapter(model, folder, plan=plan)
    first = (folder / "README.md").read_bytes()
    assert first.startswith(mine) and first.count(BEGIN.encode()) == 1
    (folder / "README.md").write_bytes(first + b"\nand more, after it\n")
    other = copy.deepcopy(model)  # of whose layers no start is known
    save_adapter(other, folder)
    second = (folder / "README.md").read_bytes()
    assert second.startswith(mine) and second.endswith(b"\nand more, after it\n")
    assert second.count(BEGIN.encode()) == 1 and b"not known" in second and b"not known" not in first


def test_marks_that_do_not_match_swallow_nothing() -> None:
    broken = f"a\n{BEGIN}\nmy text, whose end mark I lost\n"
    once = updated_card(broken, "S1", None)
    assert once.startswith(broken)
    twice = updated_card(once, "S2", None)
    assert twice.startswith(broken) and "S1" not in twice and twice.count(END) == 1


def test_no_card_if_it_is_not_wanted(tmp_path: Path) -> None:
    model, _ = planned()
    save_adapter(model, tmp_path / "out", model_card=False)
    assert not (tmp_path / "out" / "README.md").exists()
    (tmp_path / "out" / "README.md").write_text("mine")
    save_adapter(model, tmp_path / "out", model_card=False)
    assert (tmp_path / "out" / "README.md").read_text() == "mine"


def front_matter(name: str | None) -> Any:
    return yaml.safe_load(updated_card(None, "S", name).split("---")[1])


def test_front_matter_is_what_the_hub_reads() -> None:
    hub = front_matter("meta-llama/Llama-3.1-8B")
    assert hub["base_model"] == "meta-llama/Llama-3.1-8B" and hub["library_name"] == "peft"
    assert hub["tags"] == ["base_model:adapter:meta-llama/Llama-3.1-8B", "lora", "cntlora"]
    local = front_matter("/home/alice/models/tiny")
    assert "base_model" not in local and local["tags"] == ["lora", "cntlora"]
    cached = front_matter("/home/alice/.cache/huggingface/hub/models--org--na-me/snapshots/0f1e2d")
    assert cached["base_model"] == "org/na-me" and "base_model:adapter:org/na-me" in cached["tags"]
    assert "base_model" not in front_matter(None) and "base_model" not in front_matter('x: "y\n')


def test_a_local_folder_is_no_base_model_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the working directory has no folder of its name."""
    model, _ = planned()
    (tmp_path / "models" / "tiny").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    for base, on_hub in ((str(tmp_path / "models" / "tiny"), False), ("org/tiny", True)):
        model.peft_config["default"].base_model_name_or_path = base
        head = yaml.safe_load(card(model, tmp_path / f"hub {on_hub}").split("---")[1])
        assert ("base_model" in head) == on_hub
        assert ("base_model:adapter:org/tiny" in head["tags"]) == on_hub and len(head["tags"]) == 2 + on_hub


# --- paths and secrets --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "public"),
    [
        ("gpt2", "gpt2"),
        ("org/name", "org/name"),
        ("/home/alice/models/tiny/", "tiny"),
        ("~/models/tiny", "tiny"),
        ("./models/tiny", "tiny"),
        ("models/of/mine", "mine"),
        (r"C:\Users\alice\tiny", "tiny"),
        ("/home/a/.cache/huggingface/hub/models--org--na-me/snapshots/0f1e2d", "org/na-me"),
        ("/home/alice/.cache/huggingface/hub/models--gpt2/snapshots/0f1e2d", "gpt2"),
        ("https://alice:secret@host/models/tiny?token=secret", "tiny"),
        ("", None),
        (None, None),
        ("/", None),
        ("..", None),
    ],
)
def test_the_name_of_a_model_without_its_place(name: str | None, public: str | None) -> None:
    assert public_name(name) == public


def test_the_home_folder_itself_has_no_name() -> None:
    assert public_name(str(Path.home())) is None


def test_values_keep_what_is_no_path() -> None:
    values = {"a": {"b", "a"}, "p": Path("/home/alice/cov.pt"), "r": r"(unet\.)?x|y", "n": [1, None, "/etc/x"]}
    wanted = {"a": ["a", "b"], "p": "cov.pt", "r": r"(unet\.)?x|y", "n": [1, None, "x"]}
    assert public_values(values) == wanted


TOKEN = "hf_ThisIsNoRealToken0123456789"


def test_no_file_holds_a_path_a_user_or_a_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model out of a home folder, with a token in the environment and paths in PEFT's own options."""
    home = tmp_path / "home" / "alicia"
    (home / "models" / "tiny-bert").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("USER", "alicia")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    base_model().save_pretrained(home / "models" / "tiny-bert")
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForSequenceClassification

    base = AutoModelForSequenceClassification.from_pretrained(home / "models" / "tiny-bert", token=TOKEN)
    model = get_peft_model(base.eval(), LoraConfig(r=4, target_modules=["query"], revision=TOKEN))
    model.peft_config["default"].auto_mapping = {"parent_library": str(home / "code.py")}
    plan = compute_plan(model, text_batches(), progress=False, config=InitConfig(method="self"))
    apply_plan(model, plan)
    plan.save(tmp_path / "saved" / "plan.safetensors")
    save_adapter(model, tmp_path / "saved" / "adapter", plan=plan)
    model.save_pretrained(tmp_path / "by peft")
    assert found(tmp_path / "by peft", home) == {"adapter_config.json", "README.md"}  # the control: PEFT's own do
    files = [path for path in (tmp_path / "saved").rglob("*") if path.is_file()]
    assert len(files) == 4 and found(tmp_path / "saved", home) == set()
    loaded = PeftModel.from_pretrained(base_model(), tmp_path / "saved" / "adapter")
    torch.testing.assert_close(logits(loaded.eval(), text_batches()[0]), logits(model, text_batches()[0]))


def found(folder: Path, home: Path) -> set[str]:
    """Names of the files that hold the home folder, its user, the token or the temporary folder."""
    words = [str(home), "alicia", TOKEN, os.sep + "tmp" + os.sep]
    return {
        path.name
        for path in folder.rglob("*")
        if path.is_file() and any(word.encode() in path.read_bytes() for word in words)
    }
