"""Text-to-image models for training: how the denoiser of each family of pipelines is called. A new family is one row.

Covered: Stable Diffusion (1.x, 2.x), SDXL, and the pixel-space pipeline of `pixel_pipeline`. Not covered: families
that are trained by flow matching or whose denoiser takes other conditions (SD 3, FLUX, PixArt, DiT by class label).
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler, DiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from torch import Tensor, nn
from transformers.utils import ModelOutput

from ....messages import first_line, quiet_logging, quiet_transformers
from .pixel_pipeline import PixelPipeline, patch_side, to_positions

Texts = dict[str, Tensor]


@dataclass
class DenoiserOutput(ModelOutput):  # type: ignore[misc]  # published without annotations
    """Attributes: loss, a scalar; prediction, of the shape of the latents."""

    loss: Tensor | None = None
    prediction: Tensor | None = None


@dataclass(frozen=True)
class Family:
    """Calls of the models of one class of pipelines.

    Attributes:
        trained: the pipeline's parts that training sees, the denoiser first; those may get LoRA layers.
        tokens: (pipeline, prompts) → what a batch holds of its texts, every tensor (prompts, …).
        conditions: (model, those tensors) → the denoiser's arguments besides latents and time steps.
    """

    trained: tuple[str, ...]
    tokens: Callable[[Any, Sequence[str]], Texts]
    conditions: Callable[[Any, Texts], dict[str, Any]]


def _ids(tokenizer: Any, prompts: Sequence[str], length: int) -> Tensor:
    ids: Tensor = tokenizer(
        list(prompts), padding="max_length", max_length=length, truncation=True, return_tensors="pt"
    ).input_ids
    return ids


def _sd_tokens(pipeline: Any, prompts: Sequence[str]) -> Texts:
    return {"input_ids": _ids(pipeline.tokenizer, prompts, pipeline.tokenizer.model_max_length)}


def _sd_conditions(model: Any, texts: Texts) -> dict[str, Any]:
    """The text encoder's last hidden states; padding counts, as in Stable Diffusion's own training."""
    return {"encoder_hidden_states": model.text_encoder(texts["input_ids"])[0]}


def _sdxl_tokens(pipeline: Any, prompts: Sequence[str]) -> Texts:
    """Ids of both tokenizers, and the sizes that SDXL is told: original, crop at 0, target, all the model's own."""
    side = pipeline.unet.config.sample_size * pipeline.vae_scale_factor
    sizes = torch.tensor([[side, side, 0, 0, side, side]], dtype=torch.float32)
    return {
        "input_ids": _ids(pipeline.tokenizer, prompts, pipeline.tokenizer.model_max_length),
        "input_ids_2": _ids(pipeline.tokenizer_2, prompts, pipeline.tokenizer_2.model_max_length),
        "time_ids": sizes.repeat(len(prompts), 1),
    }


def _sdxl_conditions(model: Any, texts: Texts) -> dict[str, Any]:
    """Return both encoders' states before their last layer, and the second one's pooled embedding."""
    first = model.text_encoder(texts["input_ids"], output_hidden_states=True)
    second = model.text_encoder_2(texts["input_ids_2"], output_hidden_states=True)
    states = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1)
    added = {"text_embeds": second[0], "time_ids": texts["time_ids"]}
    return {"encoder_hidden_states": states, "added_cond_kwargs": added}


def _pixel_tokens(pipeline: Any, prompts: Sequence[str]) -> Texts:
    return {"input_ids": _ids(pipeline.tokenizer, prompts, pipeline.config.max_length)}


def _pixel_conditions(model: Any, texts: Texts) -> dict[str, Any]:
    """Encode as `PixelPipeline.encode`; the mask is no part of the batch: the UNet sees padding too."""
    ids = texts["input_ids"]
    mask = (ids != model.text_encoder.config.pad_token_id).long()
    return {"encoder_hidden_states": model.text_encoder(ids, attention_mask=mask)[0]}


FAMILIES: Mapping[str, Family] = {
    "PixelPipeline": Family(("unet", "text_encoder"), _pixel_tokens, _pixel_conditions),
    "StableDiffusionPipeline": Family(("unet", "text_encoder"), _sd_tokens, _sd_conditions),
    "StableDiffusionXLPipeline": Family(("unet", "text_encoder", "text_encoder_2"), _sdxl_tokens, _sdxl_conditions),
}
"""By the name of the pipeline's class."""


@contextmanager
def quiet_diffusers() -> Iterator[None]:
    """Silence all but errors inside: no bars, and no remarks on options that a pipeline does not have."""
    with quiet_logging(diffusers_logging), quiet_transformers():
        yield


def family_of(pipeline: Any) -> Family:
    """The row of a pipeline.

    Raises:
        ValueError: for a class that is not covered; says which are.
    """
    name = type(pipeline).__name__
    if name not in FAMILIES:
        raise ValueError(
            f"model: its pipeline is a {name}, which this recipe does not train; it trains {', '.join(FAMILIES)}. "
            "Another one is a row in cntlora.lab.recipes.diffusion.denoisers.FAMILIES"
        )
    return FAMILIES[name]


def load_pipeline(model: str) -> Any:
    """The pipeline of a hub name, a folder or "sample:small-diffusion", in float32, quiet, without a safety checker.

    Raises:
        ValueError: if there is no such pipeline, or its class is not covered.
    """
    name = _folder_or_name(model)
    index = Path(name) / "model_index.json"
    own = index.is_file() and json.loads(index.read_text(encoding="utf-8")).get("_class_name") == "PixelPipeline"
    options: dict[str, Any] = {} if own else {"safety_checker": None, "requires_safety_checker": False}
    try:
        with quiet_diffusers():
            pipeline = (PixelPipeline if own else DiffusionPipeline).from_pretrained(name, **options)
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(
            f"model {model!r}: cannot be loaded ({first_line(error)}); expected the folder or hub name "
            "of a diffusers pipeline"
        ) from error
    family_of(pipeline)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _folder_or_name(model: str) -> str:
    if model != "sample:small-diffusion":
        return model
    from .small_model import finished_folder

    return str(finished_folder())


class Denoiser(nn.Module):
    """The parts of a pipeline that are trained, with the loss of DreamBooth.

    Attributes:
        unet, text_encoder, …: the parts, under the pipeline's own names.
        pipeline: the whole pipeline these parts came from, for generating; no submodule, so nothing of it is adapted.
    """

    def __init__(self, pipeline: Any) -> None:
        super().__init__()
        self._family = family_of(pipeline)
        for name in self._family.trained:
            self.add_module(name, getattr(pipeline, name))
        self._pipeline = (pipeline,)  # in a tuple, so that it is not registered

    @property
    def pipeline(self) -> Any:
        """The pipeline, on this model's device; it generates with the parts as they are now, LoRA layers too."""
        return self._pipeline[0].to(next(self.parameters()).device)

    def forward(
        self, latents: Tensor, timesteps: Tensor, target: Tensor, weights: Tensor, **texts: Tensor
    ) -> DenoiserOutput:
        """The weighted squared error of the prediction.

        Args:
            latents: noised (n, c, h, w).
            timesteps: (n,).
            target: what is to be predicted, as the scheduler's prediction type says, shaped like `latents`.
            weights: (n,), the loss is Σ wᵢ·MSEᵢ: see `dreambooth_data.DreamboothBatches`.
            texts: what `Family.tokens` gave.

        Returns:
            loss and prediction.
        """
        denoiser = getattr(self, self._family.trained[0])
        conditions = self._family.conditions(self, texts)
        prediction = denoiser(latents, timesteps, **conditions, return_dict=False)[0]
        errors = (prediction.float() - target.float()).square().flatten(1).mean(dim=1)
        return DenoiserOutput(loss=(weights * errors).sum(), prediction=prediction)


def build_denoiser(pipeline: Any) -> Denoiser:
    """A model with its own copy of the parts that are trained; the rest of the pipeline is shared."""
    parts = {name: copy.deepcopy(getattr(pipeline, name)) for name in family_of(pipeline).trained}
    with quiet_diffusers():
        built = type(pipeline).from_pipe(pipeline, **parts)
    built.set_progress_bar_config(disable=True)
    return Denoiser(built).train()


def denoiser_in(model: nn.Module) -> Denoiser:
    """The `Denoiser` that a model is or wraps.

    Raises:
        TypeError: if there is none.
    """
    found = next((module for module in model.modules() if isinstance(module, Denoiser)), None)
    if found is None:
        raise TypeError(f"model: expected one that holds a Denoiser, got {type(model).__name__}")
    return found


def noise_scheduler(pipeline: Any) -> Any:
    """The training noise of the pipeline's own schedule.

    Raises:
        ValueError: for a schedule of another kind than diffusion's betas.
    """
    config = pipeline.scheduler.config
    if "num_train_timesteps" not in config or "beta_schedule" not in config:
        raise ValueError(f"model: its scheduler {type(pipeline.scheduler).__name__} has no beta schedule to train with")
    return DDPMScheduler.from_config(config)


def training_target(scheduler: Any, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """Return what the denoiser has to predict: the noise, the velocity or the clean latents.

    Raises:
        ValueError: for another prediction type.
    """
    kind = scheduler.config.prediction_type
    targets: dict[str, Callable[[], Any]] = {
        "epsilon": lambda: noise,
        "v_prediction": lambda: scheduler.get_velocity(clean, noise, timesteps),
        "sample": lambda: clean,
    }
    if kind not in targets:
        raise ValueError(f"model: prediction type {kind!r} is not known; expected one of {', '.join(targets)}")
    result: Tensor = targets[kind]()
    return result


def side_of(pipeline: Any) -> int:
    """Width and height in pixels of the images that the pipeline makes."""
    unet = pipeline.unet.config
    if getattr(pipeline, "vae", None) is None:
        return int(unet.sample_size) * patch_side(unet.in_channels)
    return int(unet.sample_size) * int(pipeline.vae_scale_factor)


def encode_pictures(pipeline: Any, pixels: Tensor) -> Tensor:
    """Latents (n, c, h, w) of images (n, 3, H, W) in [−1, 1]: the mode of the autoencoder's posterior, scaled.

    Where the pipeline has no autoencoder, the pixels themselves in the UNet's layout.
    """
    vae = getattr(pipeline, "vae", None)
    if vae is None:
        return to_positions(pixels, pipeline.unet.config.in_channels)
    with torch.no_grad():
        parts = [vae.encode(one[None].to(vae.device, vae.dtype)).latent_dist.mode().cpu().float() for one in pixels]
    shift = getattr(vae.config, "shift_factor", None) or 0.0
    return (torch.cat(parts) - shift) * vae.config.scaling_factor
