"""The runnable blocks of the guides, with tiny models for what they take as given."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from tests.tiny import base_model, causal_batches
from tests.trainer_cases import assert_plain, copies, text, tokenizer
from torch.utils.data import DataLoader

from cntlora.model.provenance import start_of
from cntlora.model.sites import find_sites

GUIDES = sorted((Path(__file__).parents[2] / "docs" / "guides").glob("*.md"))
PAGES = "\n".join(path.read_text(encoding="utf-8") for path in GUIDES)
BLOCKS = dict(re.findall(r"<!-- runnable: (\w+) -->\n```python\n(.*?)```", PAGES, re.DOTALL))


def rows() -> list[dict[str, Any]]:
    batch = causal_batches(1, rows=24)[0]
    return [{key: value[i] for key, value in batch.items()} for i in range(24)]


def columns(**lengths: int) -> Dataset:
    offsets = {name: 50 * i for i, name in enumerate(lengths)}
    return Dataset.from_list(
        [{name: text(i + offsets[name], n + i % 3) for name, n in lengths.items()} for i in range(24)]
    )


def causal(folder: Path) -> dict[str, Any]:
    return {"base": base_model("llama"), "dataset": rows(), "loader": DataLoader(rows(), batch_size=4)}  # type: ignore[arg-type]


def prompts(folder: Path) -> dict[str, Any]:
    parts = {"dataset": columns(prompt=3, completion=3), "preferences": columns(prompt=3, chosen=2, rejected=3)}
    return {"base": base_model("llama"), "tokenizer": tokenizer(), **parts}


def sentences(folder: Path) -> dict[str, Any]:
    from sentence_transformers import SentenceTransformer

    base_model("bert").bert.save_pretrained(folder / "bert")
    tokenizer().save_pretrained(folder / "bert")
    model = SentenceTransformer(str(folder / "bert"), device="cpu")
    return {"model": model, "pairs": columns(anchor=3, positive=4)}


def pipeline(folder: Path) -> dict[str, Any]:
    from diffusers import StableDiffusionPipeline

    from cntlora.lab.recipes.diffusion import tiny

    tiny.stable_diffusion(folder / "sd")
    pipe = StableDiffusionPipeline.from_pretrained(folder / "sd", safety_checker=None)
    g = torch.Generator().manual_seed(0)
    ids = pipe.tokenizer(["sks", "a dog"], padding="max_length", return_tensors="pt").input_ids
    shapes = {"noisy_latents": (2, 4, 8, 8), "noise": (2, 4, 8, 8)}
    loader = [
        {
            **{name: torch.randn(*shape, generator=g) for name, shape in shapes.items()},
            "timesteps": torch.randint(0, 1000, (2,), generator=g),
            "input_ids": ids,
        }
        for _ in range(8)
    ]
    return {"unet": pipe.unet, "text_encoder": pipe.text_encoder, "loader": loader}


GIVEN: dict[str, Callable[[Path], dict[str, Any]]] = {
    "transformers": causal,
    "sft": prompts,
    "dpo": prompts,
    "accelerate": causal,
    "diffusers": pipeline,
    "sentence_transformers": sentences,
}


def run(name: str, given: dict[str, Any]) -> dict[str, Any]:
    exec(compile(BLOCKS[name], f"docs/guides, {name}", "exec"), given)
    return given


def assert_exported(folder: Path) -> None:
    """The file that the block saved becomes a file of either format by the commands that the page names next."""
    from diffusers import StableDiffusionPipeline
    from typer.testing import CliRunner

    from cntlora.cli.app import app

    def weights(file: Path) -> dict[str, torch.Tensor]:
        pipe = StableDiffusionPipeline.from_pretrained(folder / "sd", safety_checker=None)
        pipe.load_lora_weights(file.parent, weight_name=file.name)
        pipe.fuse_lora()
        parts = (pipe.unet, pipe.text_encoder)
        return {n: p for part in parts for n, p in part.named_parameters() if n.endswith("base_layer.weight")}

    saved = weights(folder / "out" / "pytorch_lora_weights.safetensors")
    pristine = StableDiffusionPipeline.from_pretrained(folder / "sd", safety_checker=None).unet.state_dict()
    assert len(saved) > 10 and any(
        not torch.equal(p, pristine.get(n.replace(".base_layer", ""), p)) for n, p in saved.items()
    )
    looked_at = CliRunner().invoke(app, ["inspect", str(folder / "out")])
    assert looked_at.exit_code == 0 and f"· {len(saved)} sites · " in looked_at.stdout, looked_at.stderr
    for format in ("kohya", "diffusers"):
        file = folder / f"{format}.safetensors"
        result = CliRunner().invoke(app, ["export", str(folder / "out"), "--format", format, "--out", str(file)])
        assert result.exit_code == 0, result.stderr
        again = weights(file)
        assert again.keys() == saved.keys()
        assert all(torch.allclose(again[n], p, rtol=1e-4, atol=1e-6) for n, p in saved.items())


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name == "diffusers" else name for name in GIVEN]
)
def test_the_block_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = run(name, GIVEN[name](tmp_path))
    model = names["unet"] if name == "diffusers" else names["model"]
    sites = find_sites(model)[0]
    start = start_of(model, "default")
    assert start is not None and start.base in ("offset", "zero")
    rank = 8 if start.base == "offset" else 4  # of whitened, which a trainer with a loss takes, as of LoraConfig
    assert sites and all(site.rank == rank and bool(site.B.detach().all(dim=0).any()) for site in sites)
    if name == "diffusers":
        assert_exported(tmp_path)
    elif name == "sentence_transformers":
        loaded = PeftModel.from_pretrained(base_model("bert").bert, tmp_path / "out" / "adapter")
        ours = copies(model)
        assert len(ours) == 8
        assert all(torch.equal(ours[key], value) for key, value in copies(loaded).items())
    else:
        assert_plain(model, tmp_path / "out" / "adapter", moved=1e-5)


def test_resuming_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = run("transformers", causal(tmp_path))
    straight = copies(names["model"])
    resumed = copies(run("resume", {**names, "base_again": base_model("llama")})["model"])
    assert all(torch.allclose(straight[key], resumed[key], rtol=1e-4, atol=1e-6) for key in straight)


def test_every_runnable_block_is_run() -> None:
    assert set(BLOCKS) == {*GIVEN, "resume"}
    assert len(BLOCKS) == PAGES.count("<!-- runnable: ")
