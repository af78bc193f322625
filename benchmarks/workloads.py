"""Workloads of the cost of an initialisation: real models on real data, and random weights (`shapes`).

A workload is one row of `WORKLOADS`. Everything is drawn under fixed seeds, so that two runs do the same work.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from benchmarks.shapes import (
    StableDiffusionAttention,
    attention_batches,
    dinov2_giant,
    labelled_ids,
    llama,
    predicted_noise,
    prompted_latents,
    random_ids,
    random_images,
    random_model,
    roberta_large,
    seeded,
    squared_output,
    stable_diffusion,
    tiny_stable_diffusion,
)
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from cntlora.data.gradients import gradients_of

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Workload:
    """A model, its LoRA layers and the batches that an initialisation reads.

    Attributes:
        name, about: `about` is one line for tables; it says whether the weights are real.
        build: the base model in float32, in evaluation mode, the same at every call.
        batches: mappings of what the model's forward takes; 2-D token batches bring an attention mask.
        lora: options of `peft.LoraConfig` besides the initialisation.
        loss: (model, batch) → a scalar that methods which read gradients go back from.
        skip: row → reason, for rows that make no sense here or would take an hour.
        hidden: left out unless asked for by name (for tests, or for a GPU).
    """

    name: str
    about: str
    build: Callable[[], nn.Module]
    batches: Callable[[], list[Batch]]
    lora: Mapping[str, Any]
    loss: Callable[[nn.Module, Batch], Tensor]
    skip: Mapping[str, str] = field(default_factory=dict)
    hidden: bool = False


def with_lora(workload: Workload, base: nn.Module) -> nn.Module:
    """The base model with plain LoRA layers, which an initialisation starts from."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(0)
        return get_peft_model(base, LoraConfig(**workload.lora)).eval()  # type: ignore[arg-type]


def forward_pass(model: nn.Module, batches: Iterable[Batch]) -> None:
    """Run every batch once through the model, which no method that reads data can avoid."""
    with torch.no_grad():
        for batch in batches:
            model(**batch)


def backward_pass(workload: Workload, model: nn.Module, batches: Iterable[Batch]) -> None:
    """Run every batch there and back to the weights of the sites, which no method of gradients can avoid."""
    weights = [layer.base_layer.weight for layer in model.modules() if hasattr(layer, "base_layer")]
    with gradients_of(weights, model):
        for batch in batches:
            workload.loss(model, batch).backward()
            for weight in weights:
                weight.grad = None


def output_loss(model: nn.Module, batch: Batch) -> Tensor:
    """The loss in the output of transformers models, whose batches have labels."""
    return model(**batch).loss


def _lora(targets: Iterable[str], rank: int = 8, **options: Any) -> dict[str, Any]:
    return {"r": rank, "lora_alpha": 2 * rank, "lora_dropout": 0.0, "target_modules": list(targets), **options}


BERT_TARGETS = ("query", "key", "value", "attention.output.dense")
LLAMA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
DINOV2_TARGETS = (*BERT_TARGETS, "q_proj", "k_proj", "v_proj", "o_proj")
"""The same four layers under the names that older and newer transformers give them."""
SD15_TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "q_proj", "k_proj", "v_proj", "out_proj")


# --- real models and data -------------------------------------------------------------------------------------


def _minilm() -> nn.Module:
    from cntlora.lab.recipes.text.sentiment import make_task

    return make_task().build_model(0).eval()


def _tweet_batches() -> list[Batch]:
    from cntlora.lab.recipes.text.sentiment import make_task

    return [batch for batch, _ in zip(make_task().train_batches(0), range(8), strict=False)]


def _dinov2() -> nn.Module:
    from transformers import Dinov2ForImageClassification

    from cntlora.lab.recipes.samples.models import dinov2_folder
    from cntlora.messages import quiet_transformers

    with quiet_transformers():
        return seeded(lambda: Dinov2ForImageClassification.from_pretrained(dinov2_folder(), num_labels=10))


def digit_images(count: int, size: int = 112) -> tuple[Tensor, Tensor]:
    """scikit-learn's handwritten digits (count, 3, size, size), bicubic and normalised as for ImageNet, and labels."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(0))[:count]
    small = torch.tensor(digits.images, dtype=torch.float32)[order, None] / 16
    grey = nn.functional.interpolate(small, size=(size, size), mode="bicubic").clamp(0, 1)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    return (grey.expand(-1, 3, -1, -1) - mean) / std, torch.tensor(digits.target)[order]


def _digit_batches() -> list[Batch]:
    images, labels = digit_images(64)
    return [{"pixel_values": x, "labels": y} for x, y in zip(images.split(8), labels.split(8), strict=True)]


def _smollm2() -> nn.Module:
    from cntlora.lab.recipes.samples.models import smollm2

    return smollm2()[0]


def _running_text_batches(count: int = 8, rows: int = 2, tokens: int = 128) -> list[Batch]:
    """Tweets one after another, cut into rows of as many tokens each."""
    from cntlora.lab.recipes.samples.models import smollm2, tweets

    tokenizer = smollm2()[1]
    needed = count * rows * tokens
    ids = tokenizer("\n".join(tweets().texts[: needed // 4]), return_tensors="pt")["input_ids"][0][:needed]
    return [language_batch(x) for x in ids.view(count, rows, tokens)]


def language_batch(ids: Tensor) -> Batch:
    """(rows, tokens) ids of a causal language model, every token of which counts."""
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def _llama_7b(layers: int) -> nn.Module:
    return llama(4096, 11008, 32, layers, vocabulary=32000, dtype=torch.bfloat16)


def _language_batches(count: int, rows: int, tokens: int, vocabulary: int = 1000) -> list[Batch]:
    return [language_batch(ids) for ids in random_ids(vocabulary, count, rows, tokens)]


_AGAIN = "the same work as shift, which inverts 11008 × 11008 matrices in float64, and ranks besides"
_MINUTES = "whole SVDs in float32 of 7 matrices, where one of 4096 × 4096 takes 38 s on one core of a Xeon"

WORKLOADS: dict[str, Workload] = {
    w.name: w
    for w in (
        Workload(
            "minilm", "MiniLM-L6 (real weights) on tweets: 8 batches of 16 × up to 48 tokens, d = 384, 24 sites",
            _minilm, _tweet_batches, _lora(BERT_TARGETS, task_type="SEQ_CLS"), output_loss,
        ),
        Workload(
            "dinov2", "DINOv2-S/14 (real weights, trained on for saliency) on digits: 8 batches of 8 images of "
            "112 × 112, 65 tokens each, d = 384, 48 sites",
            _dinov2, _digit_batches, _lora(DINOV2_TARGETS), output_loss,
        ),
        Workload(
            "smollm2", "SmolLM2-135M-Instruct (real weights, 4-bit, made float32) on tweets: 8 batches of 2 × 128 "
            "tokens, d = 576, 120 sites",
            _smollm2, _running_text_batches, _lora(LLAMA_TARGETS[:4], task_type="CAUSAL_LM"), output_loss,
        ),
        Workload(
            "roberta-large", "2 layers in the shapes of RoBERTa-large (random weights): 8 batches of 16 × 72 tokens, "
            "d = 1024, 8 sites",
            roberta_large, lambda: labelled_ids(8, 16, 72), _lora(BERT_TARGETS, task_type="SEQ_CLS"), output_loss,
        ),
        Workload(
            "sd15-attention", "one block of each width of SD 1.5's UNet (random weights): 8 batches of 2 latents of "
            "32 × 32 (a quarter of the tokens of 512-pixel images), d = 320, 640, 1280 and 768 for text, 24 sites",
            lambda: random_model(StableDiffusionAttention), attention_batches,
            _lora(("to_q", "to_k", "to_v", "to_out.0")), squared_output,
        ),
        Workload(
            "dinov2-giant", "2 layers in the shapes of DINOv2-giant (random weights): 4 batches of 7 images of "
            "224 × 224, 257 tokens each, d = 1536 and 4096, 12 to 14 sites",
            dinov2_giant, lambda: random_images(4, 7, 224),
            _lora((*DINOV2_TARGETS, "weights_in", "weights_out", "gate_proj", "up_proj", "down_proj")), output_loss,
        ),
        Workload(
            "llama-7b-block", "one block in the shapes of Llama-7B (random weights): 2 batches of 1 × 512 tokens, "
            "d = 4096 and 11008, 7 sites",
            lambda: llama(4096, 11008, 32), lambda: _language_batches(2, 1, 512),
            _lora(LLAMA_TARGETS, rank=16, task_type="CAUSAL_LM"), output_loss,
            skip={"PEFT pissa": _MINUTES, "PEFT corda": _MINUTES, "shift + VAS": _AGAIN},
        ),
        Workload(
            "llama-7b-2-layers", "2 layers in the shapes of Llama-7B (random weights, bfloat16), for a GPU: 8 batches "
            "of 4 × 512 tokens, d = 4096 and 11008, 14 sites",
            lambda: _llama_7b(2), lambda: _language_batches(8, 4, 512, 32000),
            _lora(LLAMA_TARGETS, rank=16, task_type="CAUSAL_LM"), output_loss, hidden=True,
        ),
        Workload(
            "llama-7b", "all 32 layers in the shapes of Llama-7B (random weights, bfloat16), for a GPU: 8 batches of "
            "4 × 512 tokens, d = 4096 and 11008, 224 sites",
            lambda: _llama_7b(32), lambda: _language_batches(8, 4, 512, 32000),
            _lora(LLAMA_TARGETS, rank=16, task_type="CAUSAL_LM"), output_loss, hidden=True,
        ),
        Workload(
            "sd15", "UNet and text encoder of SD 1.5 (random weights), all attention at rank 128: 5 batches of one "
            "latent of 64 × 64 (an image of 512 × 512) with a prompt of 77 tokens, d = 320 to 1280, 176 sites",
            stable_diffusion, lambda: prompted_latents(5, 64, 49408), _lora(SD15_TARGETS, rank=128), predicted_noise,
            hidden=True,
        ),
        Workload(
            "sd15-tiny", "the same at tiny shapes, for tests",
            tiny_stable_diffusion, lambda: prompted_latents(2, 8, 100), _lora(SD15_TARGETS, rank=4), predicted_noise,
            hidden=True,
        ),
        Workload(
            "tiny", "a Llama of 2 layers, d = 32 (random weights), for tests",
            lambda: llama(32, 48, 4, layers=2),
            lambda: _language_batches(3, 2, 24),
            _lora(LLAMA_TARGETS, rank=4, task_type="CAUSAL_LM"), output_loss, hidden=True,
        ),
    )
}  # fmt: skip
