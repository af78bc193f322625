"""What the cost of an initialisation is measured on: real models on real data, and random weights in known shapes.

A workload is one row of `WORKLOADS`. Everything is drawn under fixed seeds, so that two runs do the same work.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

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
        hidden: left out unless asked for by name (for tests).
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
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return get_peft_model(base, LoraConfig(**workload.lora)).eval()  # type: ignore[arg-type]


def forward_pass(model: nn.Module, batches: Iterable[Batch]) -> None:
    """What no method that reads data can avoid: every batch once through the model."""
    with torch.no_grad():
        for batch in batches:
            model(**batch)


def output_loss(model: nn.Module, batch: Batch) -> Tensor:
    """The loss in the output of transformers models, whose batches have labels."""
    return model(**batch).loss


def seeded(make: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    """A model whose random weights depend on `seed` alone; the global generator is left as found."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make().float().eval()


def random_model(make: Callable[[], nn.Module]) -> nn.Module:
    """A model of random weights whose normalisations have gains and shifts, as trained ones have.

    With gains 1 and shifts 0 every output of a LayerNorm is orthogonal to (1, …, 1): the inputs would lack a direction.
    """

    def spread() -> nn.Module:
        model = make()
        for norm in (module for module in model.modules() if type(module).__name__.endswith("Norm")):
            nn.init.normal_(norm.weight, 1.0, 0.2)  # type: ignore[arg-type]
            if getattr(norm, "bias", None) is not None:
                nn.init.normal_(norm.bias, 0.0, 0.1)  # type: ignore[arg-type]
        return model

    return seeded(spread)


def _lora(targets: Iterable[str], rank: int = 8, **options: Any) -> dict[str, Any]:
    return {"r": rank, "lora_alpha": 2 * rank, "lora_dropout": 0.0, "target_modules": list(targets), **options}


BERT_TARGETS = ("query", "key", "value", "attention.output.dense")
LLAMA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
DINOV2_TARGETS = (*BERT_TARGETS, "q_proj", "k_proj", "v_proj", "o_proj")
"""The same four layers under the names that older and newer transformers give them."""


# --- real models and data -------------------------------------------------------------------------------------


def _minilm() -> nn.Module:
    from cntlora.recipes.text.sentiment import SentimentTask

    return SentimentTask().build_model(0).eval()


def _tweet_batches() -> list[Batch]:
    from cntlora.recipes.text.sentiment import SentimentTask

    return [batch for batch, _ in zip(SentimentTask().train_batches(0), range(8), strict=False)]


def _dinov2() -> nn.Module:
    from transformers import Dinov2ForImageClassification

    from cntlora.recipes.loading import quiet
    from cntlora.recipes.samples.models import dinov2_folder

    with quiet():
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
    from cntlora.recipes.samples.models import smollm2

    return smollm2()[0]


def _running_text_batches(count: int = 8, rows: int = 2, tokens: int = 128) -> list[Batch]:
    """Tweets one after another, cut into rows of as many tokens each."""
    from cntlora.recipes.samples.models import smollm2, tweets

    tokenizer = smollm2()[1]
    needed = count * rows * tokens
    ids = tokenizer("\n".join(tweets().texts[: needed // 4]), return_tensors="pt")["input_ids"][0][:needed]
    return [language_batch(x) for x in ids.view(count, rows, tokens)]


def language_batch(ids: Tensor) -> Batch:
    """(rows, tokens) ids of a causal language model, every token of which counts."""
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


# --- random weights in known shapes ---------------------------------------------------------------------------


def _random_ids(vocabulary: int, count: int, rows: int, tokens: int) -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    return [torch.randint(3, vocabulary, (rows, tokens), generator=g) for _ in range(count)]


def _roberta_large() -> nn.Module:
    from transformers import RobertaConfig, RobertaForSequenceClassification

    config = RobertaConfig(
        vocab_size=1000, hidden_size=1024, intermediate_size=4096, num_hidden_layers=2, num_attention_heads=16,
        max_position_embeddings=514, num_labels=3,
    )  # fmt: skip
    return random_model(lambda: RobertaForSequenceClassification(config))


def _labelled_ids(count: int, rows: int, tokens: int) -> list[Batch]:
    labels = torch.arange(rows) % 3
    return [
        {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
        for ids in _random_ids(1000, count, rows, tokens)
    ]


class StableDiffusionAttention(nn.Module):
    """One transformer block of each width of SD 1.5's UNet (320, 640, 1280), with its cross-attention to text."""

    widths = (320, 640, 1280)

    def __init__(self) -> None:
        super().__init__()
        from diffusers.models.attention import BasicTransformerBlock

        self.blocks = nn.ModuleList(BasicTransformerBlock(w, 8, w // 8, cross_attention_dim=768) for w in self.widths)
        for layer in (layer for layer in self.modules() if isinstance(layer, nn.Linear)):
            nn.init.normal_(layer.weight, std=layer.in_features**-0.5)

    def forward(self, text: Tensor, **states: Tensor) -> list[Tensor]:
        """`text` (N, 77, 768) and for each width w the hidden states `latents_w` (N, tokens, w)."""
        return [
            block(states[f"latents_{width}"], encoder_hidden_states=text)
            for width, block in zip(self.widths, self.blocks, strict=True)
        ]


def coloured(rows: int, tokens: int, width: int, generator: torch.Generator) -> Tensor:
    """Random states (rows, tokens, width) whose variances fall as 1/i over random directions, as real ones do roughly.

    With equal variances in all directions none is principal, and PEFT's EVA takes several times as long to find some.
    """
    directions = torch.linalg.qr(torch.randn(width, width, generator=torch.Generator().manual_seed(width))).Q
    spread = torch.arange(1, width + 1).float().rsqrt()
    return (torch.randn(rows, tokens, width, generator=generator) * spread) @ directions * width**0.5


def _attention_batches(count: int = 8, rows: int = 2, side: int = 32) -> list[Batch]:
    g = torch.Generator().manual_seed(0)
    batches = []
    for _ in range(count):
        batch = {"text": coloured(rows, 77, 768, g)}
        for level, width in enumerate(StableDiffusionAttention.widths):
            tokens = (side >> level) ** 2
            batch[f"latents_{width}"] = coloured(rows, tokens, width, g)
        batches.append(batch)
    return batches


def _squared_output(model: nn.Module, batch: Batch) -> Tensor:
    return sum((state.square().mean() for state in model(**batch)), torch.zeros(()))


def _dinov2_giant() -> nn.Module:
    from transformers import Dinov2Config, Dinov2ForImageClassification

    config = Dinov2Config(
        hidden_size=1536, num_hidden_layers=2, num_attention_heads=24, use_swiglu_ffn=True, patch_size=14,
        image_size=224, num_labels=10,
    )  # fmt: skip
    return random_model(lambda: Dinov2ForImageClassification(config))


def _random_images(count: int, rows: int, size: int) -> list[Batch]:
    g = torch.Generator().manual_seed(0)
    labels = torch.arange(rows) % 10
    return [{"pixel_values": torch.randn(rows, 3, size, size, generator=g), "labels": labels} for _ in range(count)]


def llama(hidden: int, inner: int, heads: int, layers: int = 1) -> nn.Module:
    """A Llama of these shapes with a small vocabulary and random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=1000, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=heads, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return random_model(lambda: LlamaForCausalLM(config))


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
            _roberta_large, lambda: _labelled_ids(8, 16, 72), _lora(BERT_TARGETS, task_type="SEQ_CLS"), output_loss,
        ),
        Workload(
            "sd15-attention", "one block of each width of SD 1.5's UNet (random weights): 8 batches of 2 latents of "
            "32 × 32 (a quarter of the tokens of 512-pixel images), d = 320, 640, 1280 and 768 for text, 24 sites",
            lambda: random_model(StableDiffusionAttention), _attention_batches,
            _lora(("to_q", "to_k", "to_v", "to_out.0")), _squared_output,
        ),
        Workload(
            "dinov2-giant", "2 layers in the shapes of DINOv2-giant (random weights): 4 batches of 7 images of "
            "224 × 224, 257 tokens each, d = 1536 and 4096, 12 to 14 sites",
            _dinov2_giant, lambda: _random_images(4, 7, 224),
            _lora((*DINOV2_TARGETS, "weights_in", "weights_out", "gate_proj", "up_proj", "down_proj")), output_loss,
        ),
        Workload(
            "llama-7b-block", "one block in the shapes of Llama-7B (random weights): 2 batches of 1 × 512 tokens, "
            "d = 4096 and 11008, 7 sites",
            lambda: llama(4096, 11008, 32), lambda: [language_batch(ids) for ids in _random_ids(1000, 2, 1, 512)],
            _lora(LLAMA_TARGETS, rank=16, task_type="CAUSAL_LM"), output_loss,
            skip={"PEFT pissa": _MINUTES, "PEFT corda": _MINUTES, "shift + VAS": _AGAIN},
        ),
        Workload(
            "tiny", "a Llama of 2 layers, d = 32 (random weights), for tests",
            lambda: llama(32, 48, 4, layers=2),
            lambda: [language_batch(ids) for ids in _random_ids(1000, 3, 2, 24)],
            _lora(LLAMA_TARGETS, rank=4, task_type="CAUSAL_LM"), output_loss, hidden=True,
        ),
    )
}  # fmt: skip
