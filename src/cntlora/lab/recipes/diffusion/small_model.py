"""A small text-to-image model, trained here from nothing.

    python -m cntlora.lab.recipes.diffusion.small_model --minutes 50

A UNet of 11.5 million weights at 32 × 32 pixels, with all-MiniLM-L6 as its frozen text encoder, learns the images of
`small_pictures`. It is saved as a pipeline folder and is the base of `studies/dreambooth.toml`. The run goes on
where it was stopped, shows samples, and its learning rate falls to zero at the last minute.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler, UNet2DConditionModel
from diffusers.training_utils import EMAModel, compute_snr
from PIL import Image
from torch import Tensor

from ..samples.downloads import cache_dir
from .pixel_pipeline import PixelPipeline, to_positions
from .small_pictures import SIZE, Item, drawn, items

MINUTES = 50.0
MAX_LENGTH = 20
CHANNELS = 12  # squares of 2 × 2 pixels: a quarter of the positions, so four times as fast
SAMPLE_PROMPTS = (
    "a photo of a red apple on a white background", "a photo of a cow on the grass",
    "a drawing of a car on a yellow background", "a photo of a bird in the snow",
    "a drawing of a cat on a purple background", "a photo of a flower on a black background",
    "a photo of a dog on the beach", "a photo of a fish on a blue background",
)  # fmt: skip


def pretrained_folder() -> Path:
    """Return the folder of the finished pipeline."""
    return cache_dir() / "small-diffusion" / "pipeline"


def finished_folder() -> Path:
    """The pretrained pipeline.

    Raises:
        RuntimeError: if it was not trained yet; says how.
    """
    folder = pretrained_folder()
    if not (folder / "model_index.json").is_file():
        raise RuntimeError(
            f"{folder}: the small text-to-image model was not trained yet; "
            f"python -m cntlora.lab.recipes.diffusion.small_model trains it, {MINUTES:g} minutes on one core, "
            "downloads of 310 MB not counted"
        )
    return folder


def new_pipeline(text_folder: Path, channels: tuple[int, ...] = (64, 128, 192), groups: int = 16) -> PixelPipeline:
    """The pipeline with new weights in its UNet: 11.5 M at the default `channels`, attention below the first level."""
    from transformers import AutoModel, AutoTokenizer

    text_encoder = AutoModel.from_pretrained(text_folder).eval().requires_grad_(False)
    unet = UNet2DConditionModel(
        sample_size=SIZE // 2,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        block_out_channels=channels,
        layers_per_block=1,
        down_block_types=("DownBlock2D",) + ("CrossAttnDownBlock2D",) * (len(channels) - 1),
        up_block_types=("CrossAttnUpBlock2D",) * (len(channels) - 1) + ("UpBlock2D",),
        cross_attention_dim=text_encoder.config.hidden_size,
        attention_head_dim=[max(1, width // 32) for width in channels],  # the number of heads, says diffusers
        norm_num_groups=groups,
    )
    noise = DDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction", clip_sample=False)
    scheduler = DPMSolverMultistepScheduler.from_config(noise.config)
    return PixelPipeline(unet, scheduler, text_encoder, AutoTokenizer.from_pretrained(text_folder), MAX_LENGTH)


@dataclass
class Progress:
    """Progress of the training; saved with every checkpoint."""

    steps: int = 0
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    losses: list[float] = field(default_factory=list)

    def state_dict(self) -> dict[str, Any]:
        """Return or take the state, for Accelerator."""
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Return or take the state, for Accelerator."""
        vars(self).update(state)


def rate(done: float, warmup: float = 0.02, least: float = 0.02) -> float:
    """Factor on the learning rate when a share `done` of the time is over: up within `warmup`, then a cosine down."""
    if done < warmup:
        return max(done / warmup, 0.01)
    return least + (1 - least) * 0.5 * (1 + float(np.cos(np.pi * min(1.0, (done - warmup) / (1 - warmup)))))


class Captions:
    """Hidden states of captions, computed once each by the frozen text encoder and kept in half precision."""

    def __init__(self, pipeline: PixelPipeline) -> None:
        self.pipeline = pipeline
        self.known: dict[str, Tensor] = {}

    def __call__(self, texts: list[str]) -> Tensor:
        """(N, tokens, width) in float32."""
        missing = sorted(set(texts) - set(self.known))
        if missing:
            with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
                states = self.pipeline.encode(missing)
            self.known.update(zip(missing, states.half(), strict=True))
        return torch.stack([self.known[text] for text in texts]).float()


def picture_batches(found: list[Item], size: int, rng: np.random.Generator) -> Iterator[tuple[Tensor, list[str]]]:
    """Images (N, 3, H, W) in [−1, 1] and captions, of which one in ten is empty; every item once in each pass."""
    while True:
        order = rng.permutation(len(found))
        for start in range(0, len(order) - size + 1, size):
            pairs = [drawn(found[i], rng) for i in order[start : start + size]]
            array = np.stack([np.asarray(picture) for picture, _ in pairs]).transpose(0, 3, 1, 2)
            yield torch.tensor(array).float() / 127.5 - 1, [c if rng.random() > 0.1 else "" for _, c in pairs]


def v_loss(unet: Any, scheduler: Any, latents: Tensor, states: Tensor, generator: torch.Generator) -> Tensor:
    """Mean squared error of the predicted velocity, weighted by min(SNR, 5)/(SNR + 1) (Hang et al. 2023)."""
    noise = torch.randn(latents.shape, generator=generator)
    steps = torch.randint(0, scheduler.config.num_train_timesteps, (len(latents),), generator=generator)
    noisy = scheduler.add_noise(latents, noise, steps)
    target = scheduler.get_velocity(latents, noise, steps)
    snr = compute_snr(scheduler, steps)
    weight = snr.clamp(max=5.0) / (snr + 1)
    guess = unet(noisy, steps, encoder_hidden_states=states).sample.float()
    return (weight * (guess - target).square().mean(dim=(1, 2, 3))).mean() / weight.mean()


def grid(pictures: list[Image.Image], columns: int, scale: int = 3) -> Image.Image:
    """Images of one size in rows, enlarged without smoothing."""
    side = pictures[0].width * scale + 4
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * side, rows * side), (255, 255, 255))
    for i, picture in enumerate(pictures):
        large = picture.resize((side - 4, side - 4), Image.Resampling.NEAREST)
        sheet.paste(large, ((i % columns) * side, (i // columns) * side))
    return sheet


@dataclass
class Training:
    """One run of the command: what it trains, and what is kept in its checkpoints."""

    pipeline: PixelPipeline
    home: Path
    minutes: float
    learning_rate: float = 1e-3
    batch_size: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        self.accelerator = Accelerator(cpu=True, mixed_precision="bf16")
        unet = self.pipeline.unet.to(memory_format=torch.channels_last)
        optimizer = torch.optim.AdamW(unet.parameters(), self.learning_rate, weight_decay=0.01, fused=True)
        self.unet, self.optimizer = self.accelerator.prepare(unet, optimizer)
        self.average = EMAModel(unet.parameters(), decay=0.998, use_ema_warmup=True, power=0.75)
        self.progress = Progress()
        self.accelerator.register_for_checkpointing(self.average, self.progress)
        self.noise = DDPMScheduler.from_config(self.pipeline.scheduler.config)
        if (self.home / "checkpoint").is_dir():
            self.accelerator.load_state(str(self.home / "checkpoint"))
            print(f"going on after {self.progress.steps} steps, {self.progress.seconds / 60:.1f} minutes", flush=True)

    @property
    def done(self) -> float:
        """The share of the time that is over."""
        return self.progress.seconds / (60 * self.minutes)

    def step(self, pictures: Tensor, states: Tensor, generator: torch.Generator) -> None:
        """One update of weights and average."""
        started, cpu = time.perf_counter(), time.process_time()
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate * rate(self.done)
        latents = to_positions(pictures, CHANNELS).contiguous(memory_format=torch.channels_last)
        loss = v_loss(self.unet, self.noise, latents, states, generator)
        self.accelerator.backward(loss)
        self.accelerator.clip_grad_norm_(self.unet.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.average.step(self.pipeline.unet.parameters())
        self.progress.steps += 1
        self.progress.losses.append(loss.item())
        self.progress.seconds += time.perf_counter() - started
        self.progress.cpu_seconds += time.process_time() - cpu

    def checkpoint(self) -> None:
        """Write the state beside the old one, then take its place."""
        new, old = self.home / "checkpoint.new", self.home / "checkpoint"
        shutil.rmtree(new, ignore_errors=True)
        self.accelerator.save_state(str(new))
        shutil.rmtree(old, ignore_errors=True)
        new.rename(old)

    def samples(self) -> Path:
        """Images of `SAMPLE_PROMPTS` by the averaged weights, two seeds each, as one file."""
        parameters = list(self.pipeline.unet.parameters())
        self.average.store(parameters)
        self.average.copy_to(parameters)
        generator = torch.Generator().manual_seed(0)
        self.pipeline.set_progress_bar_config(disable=True)
        images = self.pipeline([*SAMPLE_PROMPTS] * 2, num_inference_steps=20, generator=generator).images
        self.average.restore(parameters)
        path = self.home / f"samples-{self.progress.steps:06d}.png"
        grid(images, len(SAMPLE_PROMPTS)).save(path)
        return path

    def run(self, every: float) -> None:
        """Train until the time is over; a checkpoint and samples every `every` minutes."""
        rng = np.random.default_rng(self.seed + self.progress.steps)
        generator = torch.Generator().manual_seed(self.seed + self.progress.steps)
        encode, last = Captions(self.pipeline), self.progress.seconds
        batches = picture_batches(items(), self.batch_size, rng)
        while self.done < 1:
            pictures, captions = next(batches)
            self.step(pictures, encode(captions), generator)
            if self.progress.seconds - last > 60 * every:
                last = self.progress.seconds
                self.checkpoint()
                self.report(self.samples())
        self.checkpoint()
        self.report(self.samples())

    def report(self, path: Path) -> None:
        """One line: steps, minutes done and left, mean loss of the last 200 steps, the file of samples."""
        p, recent = self.progress, float(np.mean(self.progress.losses[-200:]))
        minutes, left = p.seconds / 60, max(0.0, self.minutes - p.seconds / 60)
        done = f"step {p.steps}: {minutes:.1f} min ({p.cpu_seconds / 60:.1f} of CPU)"
        print(f"{done}, {left:.1f} left, loss {recent:.4f}, {path}", flush=True)


def pretrain(out: Path, minutes: float, every: float = 5.0) -> Path:
    """Train the model and save the pipeline with the averaged weights at `out`.

    Checkpoints, samples and losses lie in the folder `<out>.training`; a run goes on from them, also a finished one
    that is called again with more minutes.

    Raises:
        RuntimeError: if the packages with images and text encoder cannot be downloaded.
    """
    from ..samples.models import minilm_folder

    home = out.with_name(out.name + ".training")
    finished = (out / "model_index.json").is_file()
    if finished and not (home / "checkpoint").is_dir():
        return out
    home.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    training = Training(new_pipeline(minilm_folder()), home, minutes)
    if finished and training.done >= 1:
        return out
    print(f"training for {minutes:g} minutes of steps into {out}; samples in {home}", flush=True)
    training.run(every)
    training.average.copy_to(training.pipeline.unet.parameters())
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    training.pipeline.save_pretrained(partial)
    shutil.rmtree(out, ignore_errors=True)
    partial.rename(out)
    return out


def main(arguments: list[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m cntlora.lab.recipes.diffusion.small_model", description=__doc__)
    parser.add_argument("--out", type=Path, default=None, help="the pipeline's folder; default: in the cache")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="time of training steps (default %(default)s)")
    parser.add_argument("--every", type=float, default=5.0, help="minutes between checkpoints (default %(default)s)")
    options = parser.parse_args(arguments)
    if not options.minutes > 0:
        parser.error(f"--minutes: expected more than 0, got {options.minutes:g}")
    print(pretrain(options.out or pretrained_folder(), options.minutes, options.every))
    return 0


if __name__ == "__main__":
    sys.exit(main())
