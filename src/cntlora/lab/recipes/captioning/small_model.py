"""A small vision-language model made here: DINOv2-S and SmolLM2-135M, joined by a projector that is trained once.

    python -m cntlora.lab.recipes.captioning.small_model --minutes 40

writes an ordinary folder for `AutoModelForImageTextToText.from_pretrained` into the cache (`--out` for another place).
Vision tower and language model stay as they are; only the projector is trained, to let the language model write
the captions of clip art (`scenes.base_scenes`). A call that was stopped goes on from its last checkpoint.

It is a stand-in that a laptop can fine-tune: it names what is in clip art and the colour behind it, often wrongly, and
nothing else.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from ....console import one_line_errors
from ..samples.downloads import cache_dir
from .parts import PROMPT, join_models, make_processor
from .scenes import SIZE, Scene, base_scenes, held_out_stamps

NAME = "small-vlm-1"


def small_vlm_folder() -> Path:
    """The folder of the small vision-language model in the cache.

    Raises:
        RuntimeError: if it was not made yet; the message says the command.
    """
    folder = cache_dir() / NAME
    if not (folder / "model.safetensors").is_file():
        raise RuntimeError(
            f"{folder}: the small vision-language model was not made yet; "
            "python -m cntlora.lab.recipes.captioning.small_model makes it (see --help for how long)"
        )
    return folder


class Alignment(nn.Module):
    """The projector as the one trained part, with the frozen language model behind it.

    Attributes:
        projector: of the joined model.
        frozen: the joined model, in a tuple, so that it is neither trained nor written into checkpoints.
    """

    def __init__(self, model: Any, prompt: Tensor) -> None:
        super().__init__()
        self.projector: nn.Module = model.model.multi_modal_projector
        self.frozen = (model,)
        self.prompt = prompt

    def forward(self, features: Tensor, caption: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """The loss of the captions, in nats a token.

        Args:
            features: of the vision tower, (n, patches, hidden), any float type.
            caption: token ids (n, t), padded on the right.
            labels: as `caption`, −100 on padding.
        """
        (model,) = self.frozen
        images = self.projector(features.float()).flatten(1, 2)  # (n, tokens of an image, hidden)
        embed = model.get_input_embeddings()
        ids = torch.cat([self.prompt.expand(len(caption), -1), caption], dim=1)
        inputs = torch.cat([images.to(embed.weight.dtype), embed(ids)], dim=1)
        hidden = model.model.language_model(inputs_embeds=inputs).last_hidden_state
        # padding lies on the right, behind every label, so that causal attention needs no mask
        before = hidden[:, -caption.shape[1] - 1 : -1]  # position that predicts each token of the caption
        logits = model.lm_head(before[labels != -100]).float()
        return {"loss": F.cross_entropy(logits, labels[labels != -100])}


def vision_features(model: Any, processor: Any, scenes: Sequence[Scene], batch_size: int = 32) -> Tensor:
    """Return the projector's inputs for each scene, float16 (n, patches, hidden); print the progress."""
    features: list[Tensor] = []
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for start in range(0, len(scenes), batch_size):
            images = [scene.draw() for scene in scenes[start : start + batch_size]]
            pixels = processor.image_processor(images, return_tensors="pt")["pixel_values"]
            output = model.model.vision_tower(pixels, output_hidden_states=True)
            features.append(output.hidden_states[-1][:, 1:].to(torch.float16))  # without the CLS token
            if start % (batch_size * 20) == 0:
                print(f"features of {start} of {len(scenes)} scenes")
    return torch.cat(features)


class _Rows(torch.utils.data.Dataset[dict[str, Any]]):
    def __init__(self, features: Tensor, captions: Sequence[list[int]]) -> None:
        self.features, self.captions = features, captions

    def __len__(self) -> int:
        return len(self.captions)

    def __getitem__(self, row: int) -> dict[str, Any]:
        return {"features": self.features[row], "caption": self.captions[row]}


def _collate(rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    longest = max(len(row["caption"]) for row in rows)
    labels = torch.tensor([row["caption"] + [-100] * (longest - len(row["caption"])) for row in rows])
    return {
        "features": torch.stack([row["features"] for row in rows]),
        "caption": labels.clamp(min=0),
        "labels": labels,
    }


class _Deadline(TrainerCallback):  # type: ignore[misc]
    """Ends the training, with a checkpoint, after some minutes."""

    def __init__(self, minutes: float) -> None:
        self.end = time.monotonic() + 60 * minutes

    def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        if time.monotonic() > self.end:
            control.should_training_stop = control.should_save = True


def train_projector(
    model: Any, processor: Any, scenes: Sequence[Scene], work: Path, *, steps: int, minutes: float, seed: int = 0
) -> int:
    """Train the projector of a joined model in place, from the last checkpoint in `work` if there is one.

    Args:
        model: made by `join_models`, the rest of it frozen.
        processor: its processor.
        scenes: with captions.
        work: folder, made if it is missing, of checkpoints and of the vision features, which are computed once.
        steps: updates of 16 scenes; the learning rate, 1.5e-3, falls to 0 along a cosine.
        minutes: it stops earlier after that time.
        seed: of the order of the scenes.

    Returns:
        The updates done, those of earlier calls counted.
    """
    work.mkdir(parents=True, exist_ok=True)
    tokenizer = processor.tokenizer
    features = _cached_features(model, processor, scenes, work / "features.safetensors")
    captions = [[*tokenizer(scene.caption).input_ids, tokenizer.eos_token_id] for scene in scenes]
    alignment = Alignment(model, torch.tensor([tokenizer(PROMPT.removeprefix("<image>")).input_ids]))
    arguments = TrainingArguments(
        output_dir=str(work), max_steps=steps, per_device_train_batch_size=16, learning_rate=1.5e-3,
        lr_scheduler_type="cosine", warmup_steps=20, save_steps=50, save_total_limit=1, logging_steps=10, report_to=[],
        seed=seed, remove_unused_columns=False, weight_decay=0.01, dataloader_pin_memory=False,
    )  # fmt: skip
    deadline = _Deadline(minutes)
    trainer = Trainer(
        alignment, arguments, train_dataset=_Rows(features, captions), data_collator=_collate, callbacks=[deadline]
    )
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(work)))
    return int(trainer.state.global_step)


def _cached_features(model: Any, processor: Any, scenes: Sequence[Scene], path: Path) -> Tensor:
    from safetensors.torch import load_file, save_file

    if not path.is_file():
        partial = path.with_suffix(".partial")
        save_file({"features": vision_features(model, processor, scenes)}, partial)
        partial.rename(path)
    features = load_file(path)["features"]
    if len(features) != len(scenes):
        raise ValueError(f"{path}: features of {len(features)} scenes, expected {len(scenes)}; delete the file")
    return features


@torch.no_grad()
def held_out_losses(model: Any, processor: Any, scenes: Sequence[Scene]) -> tuple[float, float]:
    """Loss of captions (nats a token) with their own images, and with images that were changed round.

    The second is the control: a model that does not look at the image has both alike.
    """
    tokenizer = processor.tokenizer
    features = vision_features(model, processor, scenes)
    captions = [[*tokenizer(scene.caption).input_ids, tokenizer.eos_token_id] for scene in scenes]
    alignment = Alignment(model, torch.tensor([tokenizer(PROMPT.removeprefix("<image>")).input_ids]))
    losses = []
    for given in (features, features.roll(len(features) // 2, 0)):
        rows = _collate([_Rows(given, captions)[i] for i in range(len(captions))])
        losses.append(float(alignment(**rows)["loss"]))
    return losses[0], losses[1]


@torch.no_grad()
def sample_captions(model: Any, processor: Any, scenes: Sequence[Scene]) -> list[str]:
    """The most probable caption, token by token, of each scene."""
    batch = processor(images=[s.draw() for s in scenes], text=[PROMPT] * len(scenes), return_tensors="pt")
    batch["pixel_values"] = batch["pixel_values"].to(model.dtype)
    output = model.generate(**batch, max_new_tokens=24, do_sample=False)
    return list(processor.batch_decode(output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True))


def make(out: Path, *, steps: int, minutes: float, seed: int = 0) -> dict[str, Any]:
    """Make the model or go on making it, write it to `out`, print captions of images that it has not seen.

    Returns:
        What is also written to out/vlm.json: updates done, minutes, held-out losses and sample captions.
    """
    start = time.monotonic()
    work = out / "training"
    processor = make_processor(SIZE)
    model = join_models(processor, seed)
    projector = model.model.multi_modal_projector
    model.requires_grad_(False).to(torch.bfloat16)
    projector.float().requires_grad_(True)
    done = train_projector(model, processor, base_scenes(seed), work, steps=steps, minutes=minutes, seed=seed)
    own, other = held_out_losses(model, processor, held_out_stamps())
    model.to(torch.bfloat16).eval()
    shown = held_out_stamps()[::10]
    samples = [[s.caption, text] for s, text in zip(shown, sample_captions(model, processor, shown), strict=True)]
    model.save_pretrained(out)
    processor.save_pretrained(out)
    info = {
        "updates": done, "of": steps, "minutes": round((time.monotonic() - start) / 60, 1),
        "held_out_loss": own, "held_out_loss_with_another_picture": other, "samples": samples,
    }  # fmt: skip
    (out / "vlm.json").write_text(json.dumps(info, indent=1))
    return info


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m cntlora.lab.recipes.captioning.small_model", description=__doc__)
    parser.add_argument("--out", type=Path, default=cache_dir() / NAME, help="folder to write (default: in the cache)")
    parser.add_argument("--steps", type=int, default=400, help="updates of 16 scenes (default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=60, help="stop after that time (default: %(default)s)")
    options = parser.parse_args()
    with one_line_errors("the small model", "vlm"):
        info = make(options.out, steps=options.steps, minutes=options.minutes)
    print(f"{info['updates']} of {info['of']} updates, {info['minutes']} minutes in this call")
    own, other = info["held_out_loss"], info["held_out_loss_with_another_picture"]
    print(f"held-out loss {own:.3f} nats a token, with another image {other:.3f}")
    for truth, said in info["samples"]:
        print(f"  {truth:50.50}  {said}")


if __name__ == "__main__":
    main()
