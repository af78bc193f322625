"""A text-to-image pipeline without an autoencoder: the UNet works on the pixels, or on small squares of them."""

from __future__ import annotations

import math
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.image_processor import VaeImageProcessor
from diffusers.loaders import StableDiffusionLoraLoaderMixin
from diffusers.utils import BaseOutput
from PIL import Image
from torch import Tensor
from torch.nn.functional import pixel_shuffle, pixel_unshuffle


class PixelOutput(BaseOutput):  # type: ignore[misc]
    """The images of one call."""

    images: list[Image.Image]


def patch_side(channels: int) -> int:
    """The side of the squares of pixels that make the channels of one position: 1 for 3 channels, 2 for 12.

    Raises:
        ValueError: if `channels` is not three times a square.
    """
    side = math.isqrt(channels // 3)
    if 3 * side * side != channels:
        raise ValueError(f"in_channels: a pixel-space UNet has 3 × a square of them (3, 12, 48), got {channels}")
    return side


def to_positions(pixels: Tensor, channels: int) -> Tensor:
    """Images (N, 3, H, W) as (N, channels, H/s, W/s), with s = `patch_side(channels)`."""
    return pixel_unshuffle(pixels, patch_side(channels))


def to_pixels(positions: Tensor) -> Tensor:
    """The reverse of `to_positions`."""
    return pixel_shuffle(positions, patch_side(positions.shape[1]))


class PixelPipeline(DiffusionPipeline, StableDiffusionLoraLoaderMixin):  # type: ignore[misc]
    """UNet, scheduler, and a text encoder whose last hidden states are the condition; classifier-free guidance.

    Loaded by `PixelPipeline.from_pretrained(folder)`. LoRA files load as in Stable Diffusion's pipeline.
    """

    model_cpu_offload_seq = "text_encoder->unet"
    _lora_loadable_modules = ["unet", "text_encoder"]  # noqa: RUF012 - diffusers reads this list

    def __init__(self, unet: Any, scheduler: Any, text_encoder: Any, tokenizer: Any, max_length: int = 20) -> None:
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler, text_encoder=text_encoder, tokenizer=tokenizer)
        self.register_to_config(max_length=max_length)

    @classmethod
    def load_lora_into_text_encoder(
        cls,
        state_dict: dict[str, Tensor],
        network_alphas: Any,
        text_encoder: Any,
        prefix: str = "text_encoder",
        adapter_name: str = "default",
        metadata: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        """Put the text encoder's part of a LoRA file in; diffusers' own code knows the layer names of CLIP only."""
        from peft import LoraConfig

        start = f"{prefix}."
        own = {key.removeprefix(start): value for key, value in state_dict.items() if key.startswith(start)}
        if not own:
            return
        options = {k.removeprefix(start): v for k, v in (metadata or {}).items() if k.startswith(start)}
        if not options:
            raise ValueError("the LoRA file has no metadata for the text encoder; write it with cntlora")
        text_encoder.load_adapter(adapter_name=adapter_name, adapter_state_dict=own, peft_config=LoraConfig(**options))

    def encode(self, texts: list[str]) -> Tensor:
        """Hidden states (N, max_length, width) of N texts."""
        tokens = self.tokenizer(
            texts, padding="max_length", max_length=self.config.max_length, truncation=True, return_tensors="pt"
        ).to(self.device)
        states: Tensor = self.text_encoder(tokens.input_ids, attention_mask=tokens.attention_mask)[0]
        return states

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str],
        *,
        num_inference_steps: int = 30,
        guidance_scale: float = 3.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
        **_: Any,
    ) -> Any:
        """Images of prompts, as diffusers' pipelines: `.images`, of type "pil", "np" or "pt"."""
        from diffusers.utils.torch_utils import randn_tensor

        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        shape = (len(prompts), self.unet.config.in_channels, *(2 * (self.unet.config.sample_size,)))
        states = self.encode(prompts)
        if guidance_scale > 1:
            states = torch.cat([self.encode([""] * len(prompts)), states])
        x = randn_tensor(shape, generator=generator, device=self.device, dtype=states.dtype)
        self.scheduler.set_timesteps(num_inference_steps, device=self.device)
        x = x * self.scheduler.init_noise_sigma
        for t in self.scheduler.timesteps:
            doubled = torch.cat([x, x]) if guidance_scale > 1 else x
            doubled = self.scheduler.scale_model_input(doubled, t)
            out = self.unet(doubled, t, encoder_hidden_states=states).sample
            if guidance_scale > 1:
                free, held = out.chunk(2)
                out = free + guidance_scale * (held - free)
            x = self.scheduler.step(out, t, x).prev_sample
        images = VaeImageProcessor(do_resize=False).postprocess(to_pixels(x), output_type=output_type)
        return PixelOutput(images=images)
