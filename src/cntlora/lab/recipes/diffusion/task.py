"""DreamBooth: a text-to-image model learns one subject from a few photos; images of its class hold the rest."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor, nn

from ....data.batches import to_device
from ....messages import warn_caller
from ...record import Sample
from ..image_files import dark_warning, is_dark
from ..model_folder import find_folder
from ..scoring import modes
from ..task import Defaults, Recipe
from .data import (
    DreamboothBatches,
    Subject,
    class_files,
    class_folder,
    generate,
    open_photo,
    photo_files,
    read_subject,
)
from .metrics import measures, similarity, text_fidelity
from .prompts import filled
from .settings import TARGETS, DreamboothSettings

EVAL_SEED = 20_000
"""First seed of scored images: others than those of the images of the class, which start at 0."""
EVAL_DRAWS = 8
"""Draws of noise a photo in the held-out loss."""


@dataclass(frozen=True)
class DreamboothTask(Defaults):
    """One subject. The loss of photos and images of the class is what trains; images of new prompts are scored."""

    settings: DreamboothSettings
    peft_type: ClassVar[str | None] = None
    targets: ClassVar[tuple[str, ...]] = (TARGETS,)

    @property
    def metrics(self) -> dict[str, str]:
        """ "loss", of the photos under fixed noise, and the similarities and fidelity of generated images."""
        s = self.settings
        names = [*measures(s.dino, s.clip, s.stand_ins), *(["clip_t"] if s.clip else [])]
        return {**dict.fromkeys(names, "max"), "loss": "min"}

    @property
    def main_metric(self) -> str:
        """DINO, or whatever stands in for it."""
        return next(iter(self.metrics))

    def check_data(self) -> None:
        """Open every photo, and warn if they are almost black.

        Raises:
            ValueError: for a folder without images, or a broken one; names it.
        """
        files = photo_files(self.settings.data)
        dark = [path for path in files if is_dark(open_photo(path))]
        if said := dark_warning(self.settings.data, dark, len(files)):
            warn_caller(said)

    def check_model(self) -> None:
        """Check that a folder holds a pipeline; one of the hub is looked for when it is loaded.

        Raises:
            ValueError: if it does not; names the file that is missing.
        """
        folder = find_folder(self.settings.model)
        if folder is not None and not (folder / "model_index.json").is_file():
            raise ValueError(
                f"model {folder}: no model_index.json is there; expected the folder of a diffusers pipeline, or its "
                "name on the hub"
            )

    @cached_property
    def _pipeline(self) -> Any:
        """The pretrained pipeline; nothing changes it."""
        from .denoisers import load_pipeline  # diffusers takes seconds to import, and photos are checked without it

        return load_pipeline(self.settings.model)

    @cached_property
    def subject(self) -> Subject:
        """Photos and images of the class, which are generated now unless they are there."""
        s, of_class = self.settings, []
        if s.prior_weight and s.class_pictures:
            folder = Path(s.class_folder).expanduser() if s.class_folder else self._class_folder()
            of_class = class_files(
                self._on_device(), s.class_prompt, s.class_pictures, folder,
                steps=s.sampling_steps, guidance=s.guidance, batch_size=s.generate_batch,
            )  # fmt: skip
        return read_subject(self._on_device(), photo_files(s.data), of_class, (s.instance_prompt, s.class_prompt))

    def _class_folder(self) -> Path:
        s = self.settings
        return class_folder(s.model, s.class_prompt, s.sampling_steps, s.guidance)

    def _on_device(self) -> Any:
        return self._pipeline.to("cuda" if torch.cuda.is_available() else "cpu")

    def build_model(self, seed: int) -> nn.Module:
        """The parts of the pipeline that are trained; nothing in it is new, so the seed is not used."""
        from .denoisers import build_denoiser

        return build_denoiser(self._pipeline)

    def _batches(self, seed: int, photos: Tensor, *, clean: bool = False) -> DreamboothBatches:
        s, subject = self.settings, self.subject
        return DreamboothBatches(
            photos, subject.of_class, subject.texts, subject.scheduler, s.batch_size, s.prior_weight, seed, clean
        )

    def train_batches(self, seed: int) -> DreamboothBatches:
        """Each photo once a pass, with noise, time steps and images of the class drawn anew."""
        return self._batches(seed, self.subject.photos)

    def init_batches(self, seed: int) -> DreamboothBatches:
        """The first pass over the first `init_photos` photos, with clean latents or noised ones.

        A clean latent comes with time step 0, which is what the denoiser is told of latents (almost) without noise. Its
        target is that of the least noise, so starts that read gradients (lora_ga) want "noised".
        """
        s = self.settings
        return self._batches(seed, self.subject.photos[: s.init_photos], clean=s.init_latents == "clean")

    def eval_batches(self) -> list[dict[str, Tensor]]:
        """The photos without images of the class, under noise that is always the same."""
        bare = dataclasses.replace(self._batches(EVAL_SEED, self.subject.photos), of_class=self.subject.of_class[:0])
        return [batch for _ in range(EVAL_DRAWS) for batch in bare]

    def evaluate(self, model: nn.Module, batches: Iterable[Mapping[str, Any]]) -> dict[str, float]:
        """Mean loss of the batches, and the similarities of images of every prompt and seed to the photos."""
        s, device = self.settings, next(model.parameters()).device
        with (
            modes(model, training=False),
            torch.random.fork_rng(),
            torch.no_grad(),
        ):  # scoring models draw when they load
            losses = [float(model(**to_device(batch, device)).loss) for batch in batches]
            prompts = [filled(template, s.words) for template in s.templates for _ in range(s.seeds)]
            made = self._generate(model, prompts, [EVAL_SEED + i % s.seeds for i in range(len(prompts))])
            scores = {name: similarity(of, made, self._photos[name]) for name, of in self._measures.items()}
            if s.clip:
                texts = [filled(template, s.class_words) for template in s.templates for _ in range(s.seeds)]
                scores["clip_t"] = text_fidelity(s.clip, made, texts)
        return {**scores, "loss": sum(losses) / len(losses)}

    @cached_property
    def _measures(self) -> dict[str, Any]:
        return measures(self.settings.dino, self.settings.clip, self.settings.stand_ins)

    @cached_property
    def _photos(self) -> dict[str, Tensor]:
        """Features of the photos by metric."""
        return {name: of(self.subject.pictures) for name, of in self._measures.items()}

    def _generate(self, model: nn.Module, prompts: list[str], seeds: list[int]) -> list[Image.Image]:
        from .denoisers import denoiser_in

        s, pipeline, made = self.settings, denoiser_in(model).pipeline, []
        for start in range(0, len(prompts), s.generate_batch):
            part = slice(start, start + s.generate_batch)
            made += generate(pipeline, prompts[part], seeds[part], steps=s.sampling_steps, guidance=s.guidance)
        return made

    def sample(self, model: nn.Module, step: int, folder: Path) -> list[Sample]:
        """An image of each sample prompt, the same seed at every step and for every arm."""
        s = self.settings
        prompts = [filled(template, s.words) for template in s.sample_prompts or s.templates[:3]]
        with modes(model, training=False):
            made = self._generate(model, prompts, [EVAL_SEED] * len(prompts))
        rows: list[Sample] = []
        for i, (prompt, picture) in enumerate(zip(prompts, made, strict=True)):
            picture.save(folder / f"{i}.png")
            rows.append({"kind": "image", "name": prompt, "file": f"{i}.png", "text": None})
        return rows

    def save(self, model: nn.Module, folder: Path) -> None:
        """`pytorch_lora_weights.safetensors`, which the pipeline's `load_lora_weights` reads."""
        from .saving import save_diffusers_lora

        save_diffusers_lora(model, folder)


def _tiny(settings: DreamboothSettings, folder: Path) -> DreamboothSettings:
    from .tiny import tiny_settings

    return tiny_settings(settings, folder)


RECIPES = {"dreambooth": Recipe(DreamboothSettings, DreamboothTask, _tiny)}
"""The tasks of this module."""
