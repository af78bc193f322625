"""Tiny random models of the kinds that are adapted in practice, and batches for them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)

Batch = dict[str, Tensor]
VOCABULARY = 40


class Wrapper(nn.Module):
    """Stand-in for what DDP, compile or an own module put around a model."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, **batch: Any) -> Any:
        return self.module(**batch)


@dataclass(frozen=True)
class Kind:
    """A family of models: how to make one, what LoRA targets in it, and its batches."""

    make: Callable[[], Any]
    targets: tuple[str, ...]
    batches: Callable[..., list[Batch]]


def text_batches(count: int = 3, rows: int = 8, tokens: int = 8, seed: int = 0, causal: bool = False) -> list[Batch]:
    """Right-padded batches with attention masks; labels per row, or per token for a causal model."""
    g = torch.Generator().manual_seed(seed)
    batches = []
    for _ in range(count):
        ids = torch.randint(3, VOCABULARY, (rows, tokens), generator=g)
        mask = (torch.arange(tokens) < torch.randint(3, tokens + 1, (rows, 1), generator=g)).long()
        labels = ids.masked_fill(mask == 0, -100) if causal else torch.randint(0, 3, (rows,), generator=g)
        batches.append({"input_ids": ids * mask, "attention_mask": mask, "labels": labels})
    return batches


def causal_batches(count: int = 3, rows: int = 8, tokens: int = 8, seed: int = 0) -> list[Batch]:
    return text_batches(count, rows, tokens, seed, causal=True)


def image_batches(count: int = 3, rows: int = 8, seed: int = 0) -> list[Batch]:
    g = torch.Generator().manual_seed(seed)
    return [
        {
            "pixel_values": torch.randn(rows, 3, 8, 8, generator=g),
            "labels": torch.randint(0, 3, (rows,), generator=g),
        }
        for _ in range(count)
    ]


def _bert() -> Any:
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=VOCABULARY,
            hidden_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
            max_position_embeddings=16,
            num_labels=3,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            initializer_range=0.2,
        )
    )


def _llama() -> Any:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=32,
            initializer_range=0.2,
            bos_token_id=1,
            eos_token_id=2,
        )
    )


def _gpt2() -> Any:
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCABULARY,
            n_embd=24,
            n_layer=2,
            n_head=2,
            n_positions=16,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            initializer_range=0.2,
            bos_token_id=1,
            eos_token_id=2,
        )
    )


def _vit() -> Any:
    return ViTForImageClassification(
        ViTConfig(
            image_size=8,
            patch_size=4,
            hidden_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
            num_labels=3,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            initializer_range=0.2,
        )
    )


KINDS = {
    "bert": Kind(_bert, ("query", "value"), text_batches),
    "llama": Kind(_llama, ("q_proj", "v_proj", "o_proj", "down_proj"), causal_batches),
    "gpt2": Kind(_gpt2, ("c_attn", "c_proj"), causal_batches),
    "vit": Kind(_vit, ("q_proj", "fc1", "query", "intermediate.dense"), image_batches),
}


def base_model(kind: str = "bert", seed: int = 0) -> Any:
    """The pretrained model: the same weights for the same seed, without touching the global generator."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return KINDS[kind].make().eval()


def lora_config(kind: str = "bert", **options: Any) -> LoraConfig:
    targets = list(options.pop("target_modules", KINDS[kind].targets))
    plain = {"r": 4, "lora_alpha": 8, "target_modules": targets, "fan_in_fan_out": kind == "gpt2"}
    return LoraConfig(**{**plain, **options})


def adapted(kind: str = "bert", seed: int = 0, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """A PeftModel on `base_model(kind, seed)`."""
    autocast = options.pop("autocast_adapter_dtype", True)
    name = options.pop("adapter_name", "default")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed + 1)
        base = base_model(kind, seed).to(dtype)
        return get_peft_model(
            base, lora_config(kind, **options), adapter_name=name, autocast_adapter_dtype=autocast
        ).eval()


def logits(model: nn.Module, batch: Batch) -> Tensor:
    """The output for a batch, of the dtype of the model."""
    floating = next(model.parameters()).dtype
    batch = {k: v.to(floating) if v.is_floating_point() else v for k, v in batch.items()}
    with torch.no_grad():
        return model(**batch).logits


def train(model: nn.Module, batches: list[Batch], steps: int = 4, accumulate: int = 2, **adamw: Any) -> list[float]:
    """AdamW with weight decay and gradient accumulation; the loss of each update."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, **{"lr": 5e-3, "weight_decay": 0.1, **adamw})
    losses = []
    for step in range(steps):
        total = 0.0
        for part in range(accumulate):
            loss = model(**batches[(step * accumulate + part) % len(batches)]).loss / accumulate
            loss.backward()
            total += loss.item()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses


def state(model: nn.Module) -> dict[str, Tensor]:
    """A copy of all parameters and buffers."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def changed(before: dict[str, Tensor], model: nn.Module) -> set[str]:
    """Names of the tensors that are not bit-equal to `before`, or are in one of the two only."""
    after = model.state_dict()
    both = before.keys() & after.keys()
    return (before.keys() ^ after.keys()) | {n for n in both if not torch.equal(before[n], after[n])}


def one_shot(batches: list[Batch]) -> Iterator[Batch]:
    yield from batches


def unet(seed: int = 0) -> Any:
    """A diffusers UNet with cross-attention, without an adapter; diffusers is imported only here, it takes seconds."""
    from diffusers import UNet2DConditionModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return UNet2DConditionModel(
            sample_size=8,
            in_channels=2,
            out_channels=2,
            layers_per_block=1,
            block_out_channels=(8, 16),
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=12,
            attention_head_dim=4,
            norm_num_groups=4,
        ).eval()


def unet_batches(count: int = 2, rows: int = 3, seed: int = 0) -> list[tuple[Tensor, Tensor, Tensor]]:
    """(latents, time steps, prompt embeddings): neither a mapping nor in the order of the model's arguments' names."""
    g = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(rows, 2, 8, 8, generator=g), torch.tensor([0] * rows), torch.randn(rows, 5, 12, generator=g))
        for _ in range(count)
    ]


def denoise(model: nn.Module, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """The `forward=` of a UNet."""
    latents, steps, prompt = batch
    return model(sample=latents, timestep=steps, encoder_hidden_states=prompt).sample
