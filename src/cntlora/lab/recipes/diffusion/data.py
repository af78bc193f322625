"""Photos of a subject, images of its class, and the batches of DreamBooth (Ruiz et al. 2023)."""

from __future__ import annotations

import hashlib
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from ....messages import counted, warn_caller
from ..image_files import SUFFIXES, left_out, open_image
from ..samples.downloads import cache_dir
from .small_pictures import SUBJECTS, subject_photos

INIT_LATENTS = ("clean", "noised")


def photo_files(data: str) -> list[Path]:
    """The images of a folder in the order of their names; "sample:dog" and others are made, see `small_pictures`.

    Raises:
        ValueError: if there is no such folder or sample, or no image in it.
    """
    if data.startswith("sample:"):
        subject = data.removeprefix("sample:")
        if subject not in SUBJECTS:
            raise ValueError(f"task.data: sample {subject!r} is not known; there are {', '.join(SUBJECTS)}")
        data = str(subject_photos(cache_dir() / "small-diffusion" / "subjects", subject))
    folder = Path(data).expanduser()
    if not folder.is_dir():
        raise ValueError(f"{data}: there is no such folder; task.data is a folder with a few photos of one subject")
    files = sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    photos = [path for path in files if path.suffix.lower() in SUFFIXES]
    if not photos:
        raise ValueError(f"{data}: no image is in it ({', '.join(SUFFIXES)}); put 3 to 6 photos of one subject there")
    others = sorted(set(files) - set(photos))
    if others:
        warn_caller(left_out(data, len(others), others[0].name))
    return photos


def open_photo(path: Path) -> Image.Image:
    """An image as RGB, see `cntlora.lab.recipes.image_files.open_image`."""
    return open_image(path)


def as_pixels(pictures: Sequence[Image.Image], side: int) -> Tensor:
    """Images as (n, 3, side, side) in [−1, 1]: the largest square from the middle, resized (bicubic)."""
    fitted = [ImageOps.fit(picture, (side, side), Image.Resampling.BICUBIC) for picture in pictures]
    array = np.stack([np.asarray(picture) for picture in fitted])
    return torch.tensor(array).permute(0, 3, 1, 2).float() / 127.5 - 1


def check_prompts(instance: str, of_class: str, identifier: str) -> None:
    """Return whether the identifier is a word of the instance prompt and no word of the class prompt.

    Raises:
        ValueError: if not, or a prompt is empty.
    """
    for name, prompt in (("instance_prompt", instance), ("class_prompt", of_class)):
        if not prompt.strip():
            raise ValueError(f"task.{name}: expected a sentence such as 'a photo of a dog', got an empty one")
    word = re.compile(rf"(?<!\w){re.escape(identifier)}(?!\w)")
    if not word.search(instance):
        raise ValueError(
            f"task.instance_prompt: expected the identifier {identifier!r} as a word in it, such as "
            f"'a photo of {identifier} dog', got {instance!r}"
        )
    if word.search(of_class):
        raise ValueError(
            f"task.class_prompt: expected no {identifier!r} in it, which is your subject; got {of_class!r}"
        )


def class_folder(model: str, prompt: str, steps: int, guidance: float) -> Path:
    """Return the cache folder of a class's generated images: one for each model, prompt and way of sampling."""
    key = hashlib.sha256(f"{model} {prompt} {steps} {guidance}".encode()).hexdigest()[:12]
    return cache_dir() / "class-pictures" / key


def class_files(
    pipeline: Any, prompt: str, count: int, folder: Path, *, steps: int, guidance: float, batch_size: int
) -> list[Path]:
    """Images of a class that the pretrained pipeline makes of its prompt, each once: those in `folder` are kept.

    Image i is drawn under seed i, and written under another name first, so an interrupted call goes on where it was.
    With a large model this takes longer than the training, so a line on stderr says what is going on.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{i:04d}.png" for i in range(count)]
    missing = [i for i in range(count) if not files[i].is_file()]
    if missing:
        images = counted(len(missing), "image")
        sys.stderr.write(f"generating {images} of the class for {prompt!r}, once; they are kept in {folder}\n")
        sys.stderr.flush()
    for start in range(0, len(missing), batch_size):
        rows = missing[start : start + batch_size]
        pictures = generate(pipeline, [prompt] * len(rows), rows, steps=steps, guidance=guidance)
        for row, picture in zip(rows, pictures, strict=True):
            partial = files[row].with_suffix(".partial.png")
            picture.save(partial)
            partial.replace(files[row])
    return files


def generate(
    pipeline: Any, prompts: Sequence[str], seeds: Sequence[int], *, steps: int, guidance: float
) -> list[Image.Image]:
    """One image a prompt, each drawn under its own seed; no global generator is used."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    with torch.no_grad():
        made = pipeline(list(prompts), num_inference_steps=steps, guidance_scale=guidance, generator=generators)
    images: list[Image.Image] = made.images
    return images


@dataclass
class DreamboothBatches:
    """Batches of noised photos, each beside as many images of the class, that can be read again.

    A batch holds latents (2b, c, h, w), timesteps (2b,), target (2b, c, h, w), weights (2b,) and the tensors of the
    texts (2b, …); without class images b rows. With the weights 1/b for photos and prior_weight/b for images of
    the class, Σ wᵢ·MSEᵢ is DreamBooth's loss, also where the rows are read one at a time.

    Attributes:
        photos, of_class: clean latents (n, c, h, w) and (m, c, h, w).
        texts: of one photo and one image of the class, each tensor (2, …).
        scheduler: adds the noise.
        batch_size: photos a batch; the last one of a pass may have fewer.
        prior_weight: of the images of the class.
        seed: order, noise, time steps and the choice of images depend on it and on the pass alone.
        clean: latents without noise, at time step 0, for initialisation.
        epoch: the number of the pass that is read next; every reading from the start adds one.
    """

    photos: Tensor
    of_class: Tensor
    texts: dict[str, Tensor]
    scheduler: Any
    batch_size: int
    prior_weight: float
    seed: int
    clean: bool = False
    epoch: int = 0

    def __len__(self) -> int:
        return -(-len(self.photos) // self.batch_size)

    def set_epoch(self, epoch: int) -> None:
        """Set the pass that is read next, from 0."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        epoch, self.epoch = self.epoch, self.epoch + 1
        generator = torch.Generator().manual_seed(self.seed * 100_003 + epoch)
        order = torch.randperm(len(self.photos), generator=generator)
        return (self._batch(rows, generator) for rows in order.split(self.batch_size))

    def _batch(self, rows: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        count = len(rows)
        clean, weights, texts = self.photos[rows], torch.full((count,), 1 / count), [0] * count
        if len(self.of_class):
            chosen = torch.randint(len(self.of_class), (count,), generator=generator)
            clean = torch.cat([clean, self.of_class[chosen]])
            weights = torch.cat([weights, torch.full((count,), self.prior_weight / count)])
            texts += [1] * count
        from .denoisers import training_target  # diffusers takes seconds to import, and photos are checked without it

        noise = torch.randn(clean.shape, generator=generator)
        timesteps = torch.randint(self.scheduler.config.num_train_timesteps, (len(clean),), generator=generator)
        if self.clean:
            timesteps = torch.zeros_like(timesteps)
        noised = clean if self.clean else self.scheduler.add_noise(clean, noise, timesteps)
        target = training_target(self.scheduler, clean, noise, timesteps)
        chosen_texts = {name: value[texts] for name, value in self.texts.items()}
        return {"latents": noised, "timesteps": timesteps, "target": target, "weights": weights, **chosen_texts}


@dataclass(frozen=True)
class Subject:
    """Images and prompts that batches are made of.

    Attributes:
        pictures: the photos, square, of the pipeline's size.
        photos, of_class: their latents, and those of the images of the class.
        texts: tokens of the instance prompt and of the class prompt.
        scheduler: the training noise.
    """

    pictures: list[Image.Image]
    photos: Tensor
    of_class: Tensor
    texts: dict[str, Tensor]
    scheduler: Any


def read_subject(pipeline: Any, photos: Sequence[Path], of_class: Sequence[Path], prompts: tuple[str, str]) -> Subject:
    """Photos and images of the class, encoded once, with the tokens of their two prompts."""
    from .denoisers import encode_pictures, family_of, noise_scheduler, side_of

    side = side_of(pipeline)
    opened = [ImageOps.fit(open_photo(path), (side, side), Image.Resampling.BICUBIC) for path in photos]
    latents = encode_pictures(pipeline, as_pixels(opened, side))
    priors = [open_photo(path) for path in of_class]
    encoded = encode_pictures(pipeline, as_pixels(priors, side)) if priors else latents[:0]
    texts = family_of(pipeline).tokens(pipeline, list(prompts))
    return Subject(opened, latents, encoded, texts, noise_scheduler(pipeline))
