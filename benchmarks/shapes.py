"""Models of random weights in the shapes of known ones, and inputs for them. All is drawn under fixed seeds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn


def seeded(make: Callable[[], nn.Module], seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A model whose random weights depend on `seed` and the device alone; all generators are left as found."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        return make().to(dtype).eval()


def random_model(make: Callable[[], nn.Module], dtype: torch.dtype = torch.float32) -> nn.Module:
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

    return seeded(spread, dtype=dtype)


def random_ids(vocabulary: int, count: int, rows: int, tokens: int) -> list[Tensor]:
    """(rows, tokens) each, from 3 on: 0 to 2 are special tokens."""
    g = torch.Generator().manual_seed(0)
    return [torch.randint(3, vocabulary, (rows, tokens), generator=g, device="cpu") for _ in range(count)]


def roberta_large() -> nn.Module:
    from transformers import RobertaConfig, RobertaForSequenceClassification

    config = RobertaConfig(
        vocab_size=1000, hidden_size=1024, intermediate_size=4096, num_hidden_layers=2, num_attention_heads=16,
        max_position_embeddings=514, num_labels=3,
    )  # fmt: skip
    return random_model(lambda: RobertaForSequenceClassification(config))


def labelled_ids(count: int, rows: int, tokens: int) -> list[dict[str, Tensor]]:
    labels = torch.arange(rows) % 3
    return [
        {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
        for ids in random_ids(1000, count, rows, tokens)
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


class StableDiffusion(nn.Module):
    """UNet and text encoder of SD 1.5 (or smaller ones), with random weights; the VAE takes no LoRA and is left out."""

    def __init__(self, unet: Mapping[str, Any], text: Mapping[str, Any]) -> None:
        super().__init__()
        from diffusers import UNet2DConditionModel
        from transformers import CLIPTextConfig, CLIPTextModel

        self.unet = UNet2DConditionModel(**unet)
        self.text_encoder = CLIPTextModel(CLIPTextConfig(**text))

    def forward(
        self, input_ids: Tensor, latents: Tensor, noise: Tensor, timesteps: Tensor, noised: bool = False
    ) -> Tensor:
        """Return the predicted noise (n, 4, h, w) of the clean latents at time step 0, or of noised ones."""
        if noised:
            kept = (1.0 - timesteps / 1000.0).view(-1, 1, 1, 1)  # stands in for the share of a schedule
            latents = kept.sqrt() * latents + (1.0 - kept).sqrt() * noise
        states = self.text_encoder(input_ids)[0]
        return self.unet(latents, timesteps if noised else timesteps * 0, encoder_hidden_states=states).sample


SD15_UNET: Mapping[str, Any] = {
    "sample_size": 64, "in_channels": 4, "out_channels": 4, "block_out_channels": (320, 640, 1280, 1280),
    "down_block_types": (*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"),
    "up_block_types": ("UpBlock2D", *["CrossAttnUpBlock2D"] * 3),
    "layers_per_block": 2, "attention_head_dim": 8, "cross_attention_dim": 768,
}  # fmt: skip
SD15_TEXT: Mapping[str, Any] = {
    "vocab_size": 49408, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
    "num_attention_heads": 12, "max_position_embeddings": 77, "hidden_act": "quick_gelu", "projection_dim": 768,
}  # fmt: skip


def stable_diffusion() -> nn.Module:
    return random_model(lambda: StableDiffusion(SD15_UNET, SD15_TEXT))


def tiny_stable_diffusion() -> nn.Module:
    unet = {**SD15_UNET, "sample_size": 8, "block_out_channels": (32, 32, 64, 64), "cross_attention_dim": 32,
            "layers_per_block": 1, "attention_head_dim": 4}  # fmt: skip
    text = {**SD15_TEXT, "vocab_size": 100, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
            "num_attention_heads": 4, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
    return random_model(lambda: StableDiffusion(unet, text))


def prompted_latents(count: int, side: int, vocabulary: int) -> list[dict[str, Tensor]]:
    """One clean latent (1, 4, side, side) a batch with a prompt of 77 tokens, and the noise and time step of training.

    Latents are smooth and of unit variance, as those of photos are roughly.
    """
    g = torch.Generator().manual_seed(0)
    batches = []
    for ids in random_ids(vocabulary, count, 1, 77):
        coarse = torch.randn(1, 4, side // 4, side // 4, generator=g)
        smooth = nn.functional.interpolate(coarse, size=(side, side), mode="bicubic")
        latents = smooth / smooth.std() + 0.1 * torch.randn(1, 4, side, side, generator=g)
        noise = torch.randn(1, 4, side, side, generator=g)
        timesteps = torch.randint(1, 1000, (1,), generator=g)
        batches.append({"input_ids": ids, "latents": latents, "noise": noise, "timesteps": timesteps})
    return batches


def predicted_noise(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The loss of training: the mean square of what the prediction of the noise is off by."""
    return nn.functional.mse_loss(model(**batch, noised=True), batch["noise"])


def coloured(rows: int, tokens: int, width: int, generator: torch.Generator) -> Tensor:
    """Random states (rows, tokens, width) whose variances fall as 1/i over random directions, as real ones do roughly.

    With equal variances in all directions none is principal, and PEFT's EVA takes several times as long to find some.
    """
    directions = torch.linalg.qr(torch.randn(width, width, generator=torch.Generator().manual_seed(width))).Q
    spread = torch.arange(1, width + 1).float().rsqrt()
    return (torch.randn(rows, tokens, width, generator=generator) * spread) @ directions * width**0.5


def attention_batches(count: int = 8, rows: int = 2, side: int = 32) -> list[dict[str, Tensor]]:
    g = torch.Generator().manual_seed(0)
    batches = []
    for _ in range(count):
        batch = {"text": coloured(rows, 77, 768, g)}
        for level, width in enumerate(StableDiffusionAttention.widths):
            tokens = (side >> level) ** 2
            batch[f"latents_{width}"] = coloured(rows, tokens, width, g)
        batches.append(batch)
    return batches


def squared_output(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return sum((state.square().mean() for state in model(**batch)), torch.zeros(()))


def dinov2_giant() -> nn.Module:
    from transformers import Dinov2Config, Dinov2ForImageClassification

    config = Dinov2Config(
        hidden_size=1536, num_hidden_layers=2, num_attention_heads=24, use_swiglu_ffn=True, patch_size=14,
        image_size=224, num_labels=10,
    )  # fmt: skip
    return random_model(lambda: Dinov2ForImageClassification(config))


def random_images(count: int, rows: int, size: int) -> list[dict[str, Tensor]]:
    g = torch.Generator().manual_seed(0)
    labels = torch.arange(rows) % 10
    return [{"pixel_values": torch.randn(rows, 3, size, size, generator=g), "labels": labels} for _ in range(count)]


def llama(
    hidden: int, inner: int, heads: int, layers: int = 1, vocabulary: int = 1000, dtype: torch.dtype = torch.float32
) -> nn.Module:
    """A Llama of these shapes with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=heads, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return random_model(lambda: LlamaForCausalLM(config), dtype)
