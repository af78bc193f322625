"""Image captioning by fine-tuning a vision-language model: personal concepts, product descriptions, your own images.

[task]
name = "captioning"
model = "llava-hf/llava-1.5-7b-hf"     # hub name or folder
data = "captions.jsonl"                # columns image and caption; or a folder of images with .txt files
prompt = "Provide a personalized description of the image"
concept = "concept"                    # optional column: what Recall looks for
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from ....messages import first_line, quiet_transformers
from ...record import Sample
from ..task import Defaults, Recipe
from ..values import at_least, one_of
from .batches import CaptionBatches, full_prompt
from .data import (
    CaptionRow,
    check_pictures,
    column_names,
    concepts_of,
    prompt_fields,
    read_captions,
    sample_rows,
    split_rows,
)
from .scores import Sentences, generate, score_captions

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_SAMPLE_MODEL = "sample:small-vlm"
_ATTENTION = r"q_proj|k_proj|v_proj|query|key|value|qkv"
_FFN = r"gate_proj|up_proj|down_proj|gate_up_proj"


@dataclass(frozen=True)
class CaptioningSettings:
    """`[task]` of "captioning".

    Attributes:
        name: "captioning".
        model: hub name or folder of a vision-language model that `AutoModelForImageTextToText` loads, or
            "sample:small-vlm", made by `python -m cntlora.lab.recipes.captioning.small_model`.
        data: .jsonl, .csv, .tsv or .parquet file, a folder of images each with a .txt of the same name, a data set of
            the hub as "owner/name[:configuration][#split]", "sample:concepts" or "sample:stamps".
        prompt: what is asked; {column} is filled from the row. Where it does not place the image itself (by the model's
            image token, such as <image>) it becomes a turn of the model's chat template.
        image, caption: columns of the image's file, relative to the table, and of the caption.
        concept: column of what Recall looks for in the caption; None for no such column.
        identifier: the one concept of all rows whose caption contains it, such as "<*>"; instead of `concept`.
        eval_data: held-out rows of their own, as `data`; then `eval_size` is not used.
        eval_size: held-out rows, at random under `split_seed`; not used by sample:concepts.
        batch_size: images a batch.
        max_caption: tokens of a caption; longer ones are cut, and no more are generated.
        sentences: model of the sentence embeddings of SentSim, or "sample:minilm"; "" leaves SentSim out.
        shown: held-out images whose captions `sample` writes.
        dtype: of the frozen weights, "float32" or "bfloat16".
    """

    name: str = "captioning"
    model: str = _SAMPLE_MODEL
    data: str = "sample:concepts"
    prompt: str = "Provide a personalized description of the image"
    image: str = "image"
    caption: str = "caption"
    concept: str | None = None
    identifier: str | None = None
    eval_data: str | None = None
    eval_size: int = 50
    split_seed: int = 0
    batch_size: int = 8
    max_caption: int = 64
    sentences: str = "sentence-transformers/all-MiniLM-L6-v2"
    shown: int = 8
    dtype: str = "float32"

    def __post_init__(self) -> None:
        at_least("task", self, eval_size=1, split_seed=0, batch_size=1, max_caption=2, shown=0)
        one_of("task.dtype", self.dtype, DTYPES)
        prompt_fields(self.prompt)
        if not self.prompt.strip():
            raise ValueError("task.prompt: expected what to ask about the image, got an empty text")
        if self.concept and self.identifier:
            raise ValueError("task.concept and task.identifier: expected one of them, got both")

    @property
    def has_concepts(self) -> bool:
        """Return whether Recall is measured."""
        return bool(self.concept or self.identifier or self.data == "sample:concepts")


@dataclass(frozen=True)
class CaptioningTask(Defaults):
    """Captions of images; the same split for every seed of training."""

    settings: CaptioningSettings
    peft_type: ClassVar[str | None] = "CAUSAL_LM"
    targets_from_model: ClassVar[bool] = True

    @property
    def metrics(self) -> Mapping[str, str]:
        """SentSim unless it is left out, loss, and Recall and the share of wrong names where there are concepts."""
        similarity = {"sentsim": "max"} if self.settings.sentences else {}
        concepts = {"recall": "max", "wrong_concept": "min"} if self.settings.has_concepts else {}
        return {**similarity, **concepts, "loss": "min"}

    @property
    def main_metric(self) -> str:
        """SentSim, or the first of what is measured without it."""
        return next(iter(self.metrics))

    @cached_property
    def targets(self) -> tuple[str, ...]:
        """Query, key and value of both towers and the language model's FFN, see `caption_targets`."""
        return (caption_targets(self._source),)

    @cached_property
    def _source(self) -> str:
        if self.settings.model != _SAMPLE_MODEL:
            return self.settings.model
        from .small_model import small_vlm_folder

        return str(small_vlm_folder())

    @cached_property
    def processor(self) -> Any:
        """The processor of the model.

        Raises:
            ValueError: if it cannot be loaded, or reads no images.
        """
        from transformers import AutoProcessor

        found = _loaded(AutoProcessor, self._source, self.settings.model)
        if not hasattr(found, "tokenizer"):
            raise ValueError(
                f"model {self.settings.model!r}: it does not read images with text (AutoProcessor gives a "
                f"{type(found).__name__}); expected a vision-language model"
            )
        return found

    @cached_property
    def rows(self) -> tuple[list[CaptionRow], list[CaptionRow]]:
        """Training and held-out rows; images are opened when they are used."""
        s = self.settings
        if s.data.startswith("sample:"):
            return sample_rows(s.data.removeprefix("sample:"), s.prompt, s.eval_size, s.split_seed)
        rows = read_captions(s.data, column_names(s))
        if s.eval_data is not None:
            return rows, read_captions(s.eval_data, column_names(s))
        return split_rows(rows, s.eval_size, s.split_seed, s.data)

    def check_data(self) -> None:
        """Read all rows, and decode up to 2,000 images of each part.

        Raises:
            ValueError: for rows, images or concepts that cannot be used.
        """
        s = self.settings
        for rows in self.rows:
            check_pictures(rows)
        if s.has_concepts and not concepts_of(self.rows[0]):
            what = f"column {s.concept!r} is empty" if s.concept else f"{s.identifier!r} is in no caption"
            raise ValueError(f"{s.data}: {what} in all {len(self.rows[0])} training rows; Recall needs a concept")

    def check_model(self) -> None:
        """Lay out a prompt, and find SentSim's model.

        Raises:
            ValueError: for a prompt or a model of sentences that cannot be used.
        """
        full_prompt(self.processor, self.rows[0][0].prompt)
        if self._sentences:
            self._sentences.check()

    def build_model(self, seed: int) -> nn.Module:
        """The pretrained model; nothing in it is new."""
        from transformers import AutoModelForImageTextToText

        dtype = DTYPES[self.settings.dtype]
        model: nn.Module = _loaded(AutoModelForImageTextToText, self._source, self.settings.model, dtype=dtype)
        return model

    def train_batches(self, seed: int) -> CaptionBatches:
        """All training rows, in another order in every pass."""
        return self._batches(self.rows[0], seed)

    def eval_batches(self) -> CaptionBatches:
        """The held-out rows in their order."""
        return self._batches(self.rows[1], None)

    def _batches(self, rows: list[CaptionRow], seed: int | None) -> CaptionBatches:
        return CaptionBatches(self.processor, rows, self.settings.batch_size, self.settings.max_caption, seed)

    def evaluate(self, model: nn.Module, batches: Iterable[Mapping[str, Any]]) -> dict[str, float]:
        """Loss (nats a token), SentSim in [−1, 1] unless left out, Recall and wrong names as shares of the rows."""
        return score_captions(
            model,
            batches,
            self.processor.tokenizer,
            sentences=self._sentences,
            concepts=concepts_of(self.rows[0]),
            max_tokens=self.settings.max_caption,
        )

    @cached_property
    def _sentences(self) -> Sentences | None:
        return Sentences(self.settings.sentences) if self.settings.sentences else None

    def sample(self, model: nn.Module, step: int, folder: Path) -> list[Sample]:
        """Captions of some held-out images, spread evenly, and the images beside them."""
        held_out = self.rows[1]
        count = min(self.settings.shown, len(held_out))
        chosen = [held_out[i * len(held_out) // count] for i in range(count)]
        if not chosen:
            return []
        said: list[str] = []
        for batch in self._batches(chosen, None):
            said += generate(model, batch, self.processor.tokenizer, self.settings.max_caption)
        folder.mkdir(parents=True, exist_ok=True)
        samples: list[Sample] = []
        for i, (row, text) in enumerate(zip(chosen, said, strict=True)):
            picture = row.open()
            picture.thumbnail((224, 224))
            picture.save(folder / f"picture-{i}.png")
            samples.append({"kind": "text", "name": row.caption, "file": f"picture-{i}.png", "text": text})
        return samples


def _loaded(kind: Any, source: str, name: str, **options: Any) -> Any:
    with quiet_transformers():
        try:
            return kind.from_pretrained(source, **options)
        except (OSError, ValueError, ImportError) as error:
            raise ValueError(f"model {name!r}: {kind.__name__} cannot load it ({first_line(error)})") from error


def caption_targets(source: str) -> str:
    """The layers that LoRA adapts: query, key, value of vision tower and language model, and its FFN.

    As the paper has it for LLaVA-1.5 (appendix A, image understanding). Vision layers behind the one whose states are
    the image's features are left out: nothing depends on them (of CLIP in LLaVA-1.5 the last).

    Returns:
        "re:" and a regular expression for full module names.

    Raises:
        ValueError: if the model's configuration cannot be loaded.
    """
    from transformers import AutoConfig

    config = _loaded(AutoConfig, source, source)
    layer, vision = getattr(config, "vision_feature_layer", None), getattr(config, "vision_config", None)
    unused = ""
    if isinstance(layer, int) and layer < -1 and vision is not None:
        last = int(vision.num_hidden_layers)
        numbers = "|".join(str(i) for i in range(last + layer + 1, last))
        unused = rf"(?!.*layers?\.({numbers})\.)"
    towers = r"vision_tower|vision_model|visual"
    return f"re:(({unused}.*({towers})\\..*({_ATTENTION}))|(.*language_model\\..*({_ATTENTION}|{_FFN})))"


def tiny_settings(settings: CaptioningSettings, folder: Path) -> CaptioningSettings:
    """The same task on a tiny random model of the same architecture and eight images of noise, made in `folder`."""
    from ..text.tiny import tiny_encoder
    from .tiny import CAPTIONS, tiny_vlm, write_captions

    fields = {name: f"some {name}" for name in prompt_fields(settings.prompt)}
    concept = settings.concept or ("concept" if settings.has_concepts and not settings.identifier else None)
    keys = {"image": settings.image, "caption": settings.caption, "concept": concept or ""}
    name = settings.identifier or "Bolo"
    return dataclasses.replace(
        settings,
        model=tiny_vlm(settings.model, folder / "model"),
        sentences=tiny_encoder("bert", folder / "sentences", CAPTIONS),
        data=write_captions(folder / "data" / "captions.jsonl", name, fields, keys),
        prompt=re.sub(r"^(?!.*<image>)", "<image>", settings.prompt, flags=re.DOTALL),
        concept=concept,
        eval_data=None,
        eval_size=2,
        batch_size=4,
        max_caption=8,
        shown=min(settings.shown, 2),
    )


RECIPES = {"captioning": Recipe(CaptioningSettings, CaptioningTask, tiny_settings)}
"""The tasks of this module."""
