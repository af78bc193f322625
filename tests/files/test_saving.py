"""Every checkpoint is an ordinary LoRA: trained, saved, and read by plain PEFT on the pristine base.

All cases are trained here, then one fresh interpreter in which cntlora cannot be imported loads them all.
"""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, inject_adapter_in_model
from safetensors import SafetensorError
from safetensors.torch import load_file
from tests.conftest import RunFresh
from tests.tiny import (
    KINDS,
    adapted,
    base_model,
    denoise,
    image_batches,
    logits,
    lora_config,
    text_batches,
    train,
    unet,
    unet_batches,
)
from torch import Tensor, nn

from cntlora import InitConfig, apply_plan, compute_plan, initialize, save_adapter
from cntlora.files.class_names import read_names

BASES = ["offset", "paired", "subtract", "keep"]
SAVERS = ["save_pretrained", "folded", "plain alpha"]
DENSE = ["query", "value", "dense"]  # 11 sites
ADAPTIVE: dict[str, Any] = {"adaptive_ranks": True, "rank_budget": 9}
EXACT = {"rtol": 2e-4, "atol": 2e-5}
READER = """
import copy
from pathlib import Path
import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForImageClassification, AutoModelForSequenceClassification
torch.set_num_threads(1)
auto = {"bert": AutoModelForSequenceClassification, "gpt2": AutoModelForCausalLM, "llama": AutoModelForCausalLM,
        "vit": AutoModelForImageClassification}
root, outputs, keys = Path(sys.argv[1]), {}, {}
warnings.resetwarnings()
warnings.filterwarnings("error", message=".*(missing|unexpected).*")
bases = {k: auto[k].from_pretrained(root / "base" / k) for k in auto}
for folder in sorted(root.glob("*/*")):
    if folder.parent.name == "base":
        continue
    kind = folder.parent.name.split(".")[0]
    model = PeftModel.from_pretrained(copy.deepcopy(bases[kind]), folder).eval()
    batch = load_file(root / "base" / f"{kind}.safetensors")
    with torch.no_grad():
        outputs[f"{folder.parent.name}/{folder.name}"] = model(**batch).logits
    held = {k: tuple(v.shape) for k, v in get_peft_model_state_dict(model).items()}
    assert held == {k: tuple(v.shape) for k, v in load_file(folder / "adapter_model.safetensors").items()}, folder
assert not any(name.startswith("cntlora.") for name in sys.modules)
save_file(outputs, root / "read.safetensors")
"""


@dataclass(frozen=True)
class Case:
    """One way to adapt, initialise and train."""

    name: str
    base: str
    kind: str = "bert"
    lora: dict[str, Any] = field(default_factory=dict)
    init: dict[str, Any] = field(default_factory=dict)

    def make(self) -> Any:
        """The adapted model before initialisation; `route` says by whom."""
        options = dict(self.lora)
        if options.pop("route", None) == "add_adapter":
            model = base_model(self.kind)
            model.add_adapter(lora_config(self.kind, **options))
            return model.eval()
        return adapted(self.kind, **options)

    def trained(self) -> Any:
        model, batches = self.make(), KINDS[self.kind].batches()
        initialize(
            model, batches, InitConfig.from_dict({"method": "self", "base": self.base, **self.init}), on_missing="warn"
        )
        train(model, batches)
        return model


VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "lora": ({}, {}),
    "odd": ({"r": 5, "lora_alpha": 3}, {}),
    "dora": ({"use_dora": True}, {}),
    "rslora": ({"use_rslora": True}, {}),
    "adaptive": ({"target_modules": DENSE}, ADAPTIVE),
    "adaptive rslora": ({"use_rslora": True, "target_modules": DENSE}, ADAPTIVE),
    "adaptive dora": ({"use_dora": True, "target_modules": DENSE}, ADAPTIVE),
    "folded at start": ({"use_rslora": True, "target_modules": DENSE}, {"fold_alpha": True, **ADAPTIVE}),
    "bias": ({"lora_bias": True}, {}),
    "head": ({"task_type": "SEQ_CLS", "target_modules": DENSE}, ADAPTIVE),
    "some plain": ({"target_modules": ["query", "word_embeddings"], "use_rslora": True}, {"fold_alpha": True}),
    "added": ({"route": "add_adapter", "target_modules": DENSE}, ADAPTIVE),
}
PEERS = ("lora", "pissa", "olora", "eva", "corda", "lora_ga", "lora_one", "lora_da", "gora")
VARIANTS |= {method: ({}, {"method": method}) for method in PEERS}
VARIANTS["eva dora"] = ({"use_dora": True}, {"method": "eva"})
VARIANTS["adaptive eva"] = ({"target_modules": DENSE}, {"method": "eva", **ADAPTIVE})
CASES = [Case(f"{v}.{b}", b, lora=lora, init=init) for v, (lora, init) in VARIANTS.items() for b in BASES]
CASES += [Case(f"{kind}.{b}", b, kind) for kind in ("gpt2", "llama", "vit") for b in BASES]
NAMED = {f"{case.kind}.{case.name}": case for case in CASES}
FAST = [name for i, name in enumerate(NAMED) if (i // len(BASES) + i) % 2 == 0]
"""Every variant with two of the bases, and every base with half of the variants; the others are slow."""


def marks(name: str) -> Any:
    return () if name in FAST else pytest.mark.slow


SAVED = [
    pytest.param(name, saver, id=f"{name}-{saver}", marks=marks(name))
    for name, case in NAMED.items()
    for saver in SAVERS
    if not (case.base == "subtract" and saver == "save_pretrained")
]


def save(model: Any, folder: Path, saver: str) -> None:
    if saver == "save_pretrained":
        model.save_pretrained(folder)
    else:
        save_adapter(model, folder, fold_alpha=saver == "folded")


@dataclass(frozen=True)
class Checkpoints:
    """Folders by case and saver, what the trained models gave, and what plain PEFT gives in another process.

    Of the cases that the selected tests ask for.
    """

    root: Path
    trained: dict[str, Tensor]
    pristine: dict[str, Tensor]
    read: dict[str, Tensor]


@pytest.fixture(scope="module")
def checkpoints(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, run_fresh: RunFresh
) -> Checkpoints:
    from safetensors.torch import save_file

    selected = [getattr(item, "callspec", None) for item in request.session.items if item.path == request.path]
    asked = {call.params["name"] for call in selected if call is not None and "name" in call.params} or set(FAST)
    root = tmp_path_factory.mktemp("checkpoints")
    pristine, trained = {}, {}
    for kind, entry in KINDS.items():
        base_model(kind).save_pretrained(root / "base" / kind)
        batch = {k: v for k, v in entry.batches(seed=9)[0].items() if k != "labels"}
        save_file(batch, root / "base" / f"{kind}.safetensors")
        pristine[kind] = logits(base_model(kind), batch)
    for name, case in ((name, case) for name, case in NAMED.items() if name in asked):
        model = case.trained()
        trained[name] = logits(model, load_file(root / "base" / f"{case.kind}.safetensors"))
        for saver in SAVERS:
            save(model, root / name / saver, saver)
    run_fresh(READER, root, block=True)
    return Checkpoints(root, trained, pristine, load_file(root / "read.safetensors"))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "saver"), SAVED)
def test_plain_peft_reads_it_in_a_fresh_process(checkpoints: Checkpoints, name: str, saver: str) -> None:
    trained, pristine = checkpoints.trained[name], checkpoints.pristine[NAMED[name].kind]
    torch.testing.assert_close(checkpoints.read[f"{name}/{saver}"], trained, **EXACT)
    assert (trained - pristine).abs().max() > 1e-2  # the control: training moved the function well beyond that


def test_subtract_needs_save_adapter(checkpoints: Checkpoints) -> None:
    """The control for the reader: save_pretrained of a subtracted model is for the subtracted base only."""
    for name in checkpoints.trained:
        case = NAMED[name]
        if case.base == "subtract" and case.init.get("method") not in ("lora", "eva"):  # these start at B = 0
            read = checkpoints.read[f"{name}/save_pretrained"]
            least = 1e-3 if case.init.get("method") == "lora_da" else 1e-2  # whose start is a thousandth of W
            assert (read - checkpoints.trained[name]).abs().max() > least, name


def test_adaptive_cases_have_a_site_without_rank() -> None:
    model, batches = NAMED["bert.adaptive.offset"].make(), text_batches()
    report = initialize(model, batches, InitConfig.from_dict({"method": "self", **ADAPTIVE}))
    ranks = [site["rank"] for site in report.sites.values()]
    assert 0 in ranks and len(set(ranks)) > 2


# --- readers that know nothing of patterns ------------------------------------------------------------------


def pattern_blind(base: nn.Module, folder: Path) -> nn.Module:
    """W + B·A (DoRA: its rows scaled to the magnitude) for every pair of factors in the file, whatever alpha says."""
    assert (folder / "adapter_config.json").exists()
    state = load_file(folder / "adapter_model.safetensors")
    for key, A in state.items():
        if not key.endswith(".lora_A.weight"):
            continue
        name = key.removesuffix(".lora_A.weight")
        layer = base.get_submodule(name.removeprefix("base_model.model."))
        W: Any = layer.weight.data
        delta = state[f"{name}.lora_B.weight"] @ A
        delta = delta.T if type(layer).__name__ == "Conv1D" else delta
        m = state.get(f"{name}.lora_magnitude_vector")
        W += delta
        if m is not None:
            W *= (m / W.norm(dim=1))[:, None]
        if f"{name}.lora_B.bias" in state:
            layer.bias.data += state[f"{name}.lora_B.bias"]  # type: ignore[operator, union-attr]
    return base.eval()


BLIND = [name for name in NAMED if not any(word in name for word in ("head", "some plain"))]


@pytest.mark.parametrize("name", [pytest.param(name, marks=marks(name)) for name in BLIND])
def test_folded_files_need_no_alpha(checkpoints: Checkpoints, name: str) -> None:
    kind = NAMED[name].kind
    batch = load_file(checkpoints.root / "base" / f"{kind}.safetensors")
    read = logits(pattern_blind(base_model(kind), checkpoints.root / name / "folded"), batch)
    torch.testing.assert_close(read, checkpoints.trained[name], rtol=1e-3, atol=1e-4)


def test_files_with_alpha_do(checkpoints: Checkpoints) -> None:
    """The control: with alpha ≠ rank the same reader is off, as long as alpha was not folded at the start."""
    for name in checkpoints.trained:
        if name in BLIND and "folded at start" not in name:
            kind = NAMED[name].kind
            batch = load_file(checkpoints.root / "base" / f"{kind}.safetensors")
            read = logits(pattern_blind(base_model(kind), checkpoints.root / name / "plain alpha"), batch)
            assert (read - checkpoints.trained[name]).abs().max() > 1e-3, name


@pytest.mark.parametrize("name", [pytest.param(name, marks=marks(name)) for name in NAMED])
def test_folded_config_has_alpha_equal_to_rank_everywhere(checkpoints: Checkpoints, name: str) -> None:
    config = json.loads((checkpoints.root / name / "folded" / "adapter_config.json").read_text())
    state = load_file(checkpoints.root / name / "folded" / "adapter_model.safetensors")
    assert config["lora_alpha"] == config["r"] and config["alpha_pattern"] == config["rank_pattern"]
    assert not config["use_rslora"]
    ranks = {A.shape[0] for key, A in state.items() if ".lora_A" in key or ".lora_embedding_A" in key}
    assert ranks == {config["r"], *config["rank_pattern"].values()}


def test_folding_what_is_not_trained_yet_warns_that_the_rate_means_something_else(tmp_path: Path) -> None:
    """B = 0 adds nothing, so the file is there to be trained, and what the start was told lies in the scaling."""
    told = adapted("bert")
    initialize(told, text_batches(), InitConfig("whitened", learning_rate=2e-4))  # alpha 2 becomes 50
    with pytest.warns(UserWarning, match=r"not trained yet .* scaling of 50 is 1 in the file.* fold_alpha=False"):
        save_adapter(told, tmp_path / "folded")
    for_one = adapted("bert")
    initialize(for_one, text_batches(), InitConfig("whitened", fold_alpha=True))
    trained = adapted("bert")
    initialize(trained, text_batches(), InitConfig("descent", strength=0.01))
    with warnings.catch_warnings():  # controls
        warnings.simplefilter("error", UserWarning)
        save_adapter(told, tmp_path / "kept", fold_alpha=False)
        save_adapter(for_one, tmp_path / "for one")
        save_adapter(trained, tmp_path / "trained")


# --- names of classes ---------------------------------------------------------------------------------------


def test_names_of_classes_lie_beside_a_head_that_is_saved(tmp_path: Path) -> None:
    def saved(model: Any, folder: str, names: tuple[str, ...]) -> tuple[str, ...]:
        model.config.id2label = dict(enumerate(names))
        save_adapter(model, tmp_path / folder)
        return read_names(tmp_path / folder)

    def classifier() -> Any:
        return adapted(task_type="SEQ_CLS")

    names = ("no", "maybe", "yes")
    assert saved(classifier(), "a", names) == names
    assert "| Classes | 0 = no, 1 = maybe, 2 = yes; " in (tmp_path / "a" / "README.md").read_text()
    assert saved(classifier(), "a", ("LABEL_0", "LABEL_1", "LABEL_2")) == ()  # made up by transformers
    assert not (tmp_path / "a" / "id2label.json").exists()  # nor are those of the adapter before it left
    assert saved(classifier(), "b", tuple(f"class {i}" for i in range(1000))) == ()  # of a head that is not in the file
    assert saved(adapted(), "c", names) == ()  # no head is saved
    assert saved(adapted(modules_to_save=["classifier"]), "d", names) == names


@pytest.mark.parametrize("content", ["[]", "{", '{"id2label": {"1": "a"}}', '{"id2label": 3}'])
def test_a_file_of_names_that_is_none_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "id2label.json").write_text(content)
    with pytest.raises(ValueError, match=r"id2label\.json: expected [^\n]*$"):
        read_names(tmp_path)


# --- the folder ---------------------------------------------------------------------------------------------


def test_the_folder_has_three_files_and_no_path_of_this_machine(tmp_path: Path) -> None:
    model = adapted()
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "models" / "tiny")
    initialize(model, text_batches(), config=InitConfig(method="self"))
    save_adapter(model, tmp_path / "deep" / "out")
    assert {p.name for p in (tmp_path / "deep" / "out").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "README.md",
    }
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["out"]  # no temporary folder is left
    text = (tmp_path / "deep" / "out" / "adapter_config.json").read_text()
    assert str(tmp_path) not in text and json.loads(text)["base_model_name_or_path"] == "tiny"
    assert LoraConfig.from_pretrained(str(tmp_path / "deep" / "out")).init_lora_weights is True


def test_saving_changes_nothing_and_can_be_repeated(tmp_path: Path) -> None:
    model = NAMED["bert.adaptive.subtract"].trained()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    config = model.peft_config["default"].to_dict()
    for _ in range(2):
        save_adapter(model, tmp_path / "out")
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    assert model.peft_config["default"].to_dict() == config
    reloaded = PeftModel.from_pretrained(base_model(), tmp_path / "out").eval()
    batch = text_batches()[0]
    torch.testing.assert_close(logits(reloaded, batch), logits(model, batch), **EXACT)


def test_a_failed_save_leaves_the_old_folder_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted()
    initialize(model, text_batches(), config=InitConfig(method="self"))
    save_adapter(model, tmp_path / "out")
    old = (tmp_path / "out" / "adapter_model.safetensors").read_bytes()
    train(model, text_batches())

    def full(*_: object, **__: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("cntlora.files.adapter_folder.save_file", full)
    with pytest.raises(OSError, match="no space"):
        save_adapter(model, tmp_path / "out")
    assert (tmp_path / "out" / "adapter_model.safetensors").read_bytes() == old
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SafetensorError("I/O error: no space")])
def test_a_new_folder_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    model = adapted()
    initialize(model, text_batches(), config=InitConfig(method="self"))

    def full(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("cntlora.files.adapter_folder.save_file", full)
    with pytest.raises(OSError, match="out could not be written.*pace"):
        save_adapter(model, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    save_adapter(model, tmp_path / "out")
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o755
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()} == {0o644}


def test_files_of_others_in_the_folder_stay(tmp_path: Path) -> None:
    model = adapted()
    initialize(model, text_batches(), config=InitConfig(method="self"))
    (tmp_path / "notes.txt").write_text("mine")
    for _ in range(2):
        save_adapter(model, tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine" and len(list(tmp_path.iterdir())) == 4


def test_a_passing_set_scale_is_not_saved(tmp_path: Path) -> None:
    """`set_scale` turns an adapter down for a while; PEFT's own files hold alpha, and so do ours."""
    model, batch = Case("scaled", "subtract").trained(), text_batches()[0]
    wanted = logits(model, batch)
    for module in model.modules():
        if hasattr(module, "lora_A"):
            module.set_scale("default", 0.5)
    assert (logits(model, batch) - wanted).abs().max() > 1e-3
    for fold in (True, False):
        save_adapter(model, tmp_path / str(fold), fold_alpha=fold)
        reloaded = PeftModel.from_pretrained(base_model(), tmp_path / str(fold)).eval()
        torch.testing.assert_close(logits(reloaded, batch), wanted, **EXACT)


@pytest.mark.parametrize("fold", [True, False])
def test_a_copy_of_a_subtracted_model_is_saved_with_its_plan(tmp_path: Path, fold: bool) -> None:
    """The subtracted factors are known of the very object that was initialised; the plan tells it of any other."""
    model, batches = adapted(target_modules=DENSE), text_batches()
    plan = compute_plan(model, batches, InitConfig.from_dict({"method": "self", "base": "subtract", **ADAPTIVE}))
    apply_plan(model, plan)
    train(model, batches)
    other = copy.deepcopy(model)
    for given, right in ((plan, True), (None, False)):
        save_adapter(other, tmp_path / "out", fold_alpha=fold, plan=given)
        read = logits(PeftModel.from_pretrained(base_model(), tmp_path / "out").eval(), batches[0])
        assert torch.allclose(read, logits(model, batches[0]), rtol=2e-4, atol=2e-5) == right
    save_adapter(model, tmp_path / "known", fold_alpha=fold)
    save_adapter(model, tmp_path / "out", fold_alpha=fold, plan=plan)
    known, told = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("known", "out"))
    assert known.keys() == told.keys() and all(torch.equal(known[key], told[key]) for key in known)


@pytest.mark.parametrize("base", ["offset", "subtract"])
def test_injected_adapters_can_be_saved(tmp_path: Path, base: str) -> None:
    model = inject_adapter_in_model(lora_config(target_modules=DENSE), base_model()).eval()
    batches = text_batches()
    initialize(model, batches, InitConfig.from_dict({"method": "self", "base": base, **ADAPTIVE}))
    train(model, batches)
    save_adapter(model, tmp_path)
    reloaded = PeftModel.from_pretrained(base_model(), tmp_path).eval()
    torch.testing.assert_close(logits(reloaded, batches[0]), logits(model, batches[0]), **EXACT)


def test_one_of_two_adapters_is_saved(tmp_path: Path) -> None:
    model, batches = adapted(adapter_name="first"), text_batches()
    model.add_adapter("second", lora_config(r=3, target_modules=["key"]))
    initialize(model, batches, adapter_name="second", config=InitConfig(method="self"))
    model.set_adapter("second")
    train(model, batches)
    save_adapter(model, tmp_path / "second", "second")
    assert all("key" in name for name in load_file(tmp_path / "second" / "adapter_model.safetensors"))
    reloaded = PeftModel.from_pretrained(base_model(), tmp_path / "second").eval()
    torch.testing.assert_close(logits(reloaded, batches[0]), logits(model, batches[0]), **EXACT)


def test_a_second_adapter_loads_beside_ours(tmp_path: Path) -> None:
    """peft#2184: with the base untouched (or folded back by save_adapter) several adapters share one model."""
    batch, saved, wanted = text_batches()[0], {}, {}
    for base in BASES:
        model = Case("many", base).trained()
        save_adapter(model, tmp_path / base)
        saved[base], wanted[base] = tmp_path / base, logits(model, batch)
    model = PeftModel.from_pretrained(base_model(), saved["offset"], adapter_name="offset")
    for base in BASES[1:]:
        model.load_adapter(saved[base], adapter_name=base)
    for base in BASES:
        model.set_adapter(base)
        torch.testing.assert_close(logits(model.eval(), batch), wanted[base], **EXACT)
    assert (wanted["offset"] - wanted["keep"]).abs().max() > 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("base", BASES)
def test_lower_precision(tmp_path: Path, base: str, dtype: torch.dtype) -> None:
    model, batches = adapted("llama", dtype=dtype), KINDS["llama"].batches()
    initialize(model, batches, InitConfig(method="self", base=base))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    for batch in batches:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    start, trained = logits(base_model("llama").to(dtype), batches[0]), logits(model, batches[0])
    save_adapter(model, tmp_path)
    read = logits(PeftModel.from_pretrained(base_model("llama").to(dtype), tmp_path).eval(), batches[0])
    scale = float(trained.abs().max()) * torch.finfo(dtype).eps
    assert float((read - trained).abs().max()) <= 20 * scale
    assert float((trained - start).abs().max()) > 20 * scale  # the control


# --- diffusers ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained_unet() -> Iterator[tuple[Any, Tensor]]:
    model = unet()
    model.add_adapter(lora_config(target_modules=["to_q", "to_k", "to_v", "to_out.0"], r=2, lora_alpha=6))
    batches = unet_batches()
    with torch.no_grad():
        start = denoise(model, batches[0])
    config = InitConfig(method="self", adaptive_ranks=True, rank_budget=24, fold_alpha=True)
    report = initialize(model, batches, config, forward=denoise)
    with torch.no_grad():
        torch.testing.assert_close(denoise(model, batches[0]), start, rtol=1e-4, atol=1e-5)
    assert len(report.sites) >= 16 and 0 in [site["rank"] for site in report.sites.values()]
    # prompts reach to_k and to_v of attn2 only: 5 of them a row, against 64 places of the latents
    tokens = {name: site["tokens"] for name, site in report.sites.items()}
    assert {t for n, t in tokens.items() if "attn2.to_k" in n} == {2 * 3 * 5}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for batch in batches * 2:
        denoise(model, batch).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        trained = denoise(model, batches[0])
    assert (trained - start).abs().max() > 1e-3
    yield model, trained


def test_unet_is_read_by_peft(trained_unet: tuple[Any, Tensor], tmp_path: Path) -> None:
    model, trained = trained_unet
    save_adapter(model, tmp_path)
    reloaded = PeftModel.from_pretrained(unet(), tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(denoise(reloaded, unet_batches()[0]), trained, rtol=1e-4, atol=1e-5)


def test_unet_is_read_by_diffusers(trained_unet: tuple[Any, Tensor], tmp_path: Path) -> None:
    """diffusers takes alpha = rank where its file has no metadata: right for fold_alpha=True, as initialised here."""
    model, trained = trained_unet
    model.save_lora_adapter(tmp_path)
    state = load_file(tmp_path / "pytorch_lora_weights.safetensors")
    for metadata in (False, True):
        fresh = unet()
        if metadata:
            name = "pytorch_lora_weights.safetensors"
            fresh.load_lora_adapter(tmp_path, prefix=None, use_safetensors=True, weight_name=name)
        else:
            fresh.load_lora_adapter(state, prefix=None)
        with torch.no_grad():
            out = denoise(fresh.eval(), unet_batches()[0])
        torch.testing.assert_close(out, trained, rtol=1e-4, atol=1e-5)


def test_vit_batches_have_no_mask() -> None:
    report = initialize(adapted("vit"), image_batches(2), config=InitConfig(method="self"))
    assert not any(site["masked"] for site in report.sites.values())
    assert {site["tokens"] for site in report.sites.values()} == {2 * 8 * 5}
    report = initialize(adapted("bert"), text_batches(2), config=InitConfig(method="self"))
    assert all(site["masked"] for site in report.sites.values())
