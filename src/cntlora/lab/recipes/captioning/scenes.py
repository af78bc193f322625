"""Captioned scenes made of clip art: one image on a coloured ground, in many views; what the small VLM learns from.

The images are Tux Paint's stamps and Twitter's emoji (see `pictures`). A fifth of the stamps and the personal
concepts are never among the scenes that the base model is trained on (`base_scenes`): fine-tuning is tested on them.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from ..image_files import open_layered

SIZE = 112
COLOURS = {
    "white": (255, 255, 255), "red": (214, 64, 56), "orange": (240, 150, 50), "yellow": (246, 221, 90),
    "green": (86, 168, 90), "blue": (70, 120, 214), "purple": (140, 84, 176), "pink": (244, 164, 196),
    "brown": (132, 90, 58), "grey": (150, 150, 150), "black": (20, 20, 20),
}  # fmt: skip
# stamp → its made-up name and its kind; no scene with them is among those of the base model
CONCEPTS = {
    "animals/mammals/dogs/dog": ("Bolo", "dog"),
    "household/dishes/teapot": ("Mira", "teapot"),
    "household/rubberduck": ("Quax", "rubber duck"),
    "animals/mammals/bears/toys/edward_bear": ("Edu", "teddy bear"),
    "vehicles/cycle/pink_tricycle": ("Trix", "tricycle"),
    "clothes/hats/sombrero": ("Zumo", "hat"),
    "animals/birds/owl": ("Huhu", "owl"),
    "vehicles/auto/beetle": ("Kiko", "car"),
}
# images of the same kinds that are nobody's: a caption must not name them; the base model has not seen them either
OTHERS = {
    "animals/mammals/dogs/fox": "fox",
    "household/kettle": "kettle",
    "animals/birds/duck": "duck",
    "animals/mammals/bears/cartoon/teddy_bear": "teddy bear",
    "vehicles/wheel_tractor": "wheel",
    "clothes/hats/tophat": "hat",
    "animals/birds/penguin": "penguin",
    "vehicles/auto/sedan": "car",
}
_NO_EMOJI = ("Flags", "Symbols", "Component")  # names that an image of 64 pixels does not show
_SHARE_HELD_OUT = 5


@dataclass(frozen=True)
class Scene:
    """An image on a ground of one colour.

    Attributes:
        file: of the image, transparent where there is nothing.
        caption: what the scene shows.
        colour: of the ground, a key of `COLOURS`.
        scale: longer side of the image as a share of the scene's side, in (0, 1].
        left, top: where the image lies, as shares of the room that is left, in [0, 1].
        mirrored: left and right changed.
        concept: the name of the concept in it; "" if there is none.
    """

    file: Path
    caption: str
    colour: str = "white"
    scale: float = 1.0
    left: float = 0.5
    top: float = 0.5
    mirrored: bool = False
    concept: str = ""

    def draw(self, size: int = SIZE) -> Image.Image:
        """The scene as RGB, `size` pixels wide and high.

        Raises:
            ValueError: if the file is no image or a broken one; names the file.
        """
        picture = open_layered(self.file).convert("RGBA")
        factor = self.scale * size / max(picture.size)
        width, height = (max(1, round(side * factor)) for side in picture.size)
        picture = picture.resize((width, height), Image.Resampling.BICUBIC)
        if self.mirrored:
            picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        ground = Image.new("RGBA", (size, size), (*COLOURS[self.colour], 255))
        ground.alpha_composite(picture, (round(self.left * (size - width)), round(self.top * (size - height))))
        return ground.convert("RGB")


def views(file: Path, subject: str, count: int, seed: int, concept: str = "") -> list[Scene]:
    """Scenes of one image that differ in ground, size, place and side; the caption says the ground's colour.

    Args:
        file: of the image.
        subject: what it is, "A dog": the captions are "A dog on a blue background.".
        count: how many scenes.
        seed: the same seed and file name give the same scenes; no colour comes twice before all came.
        concept: the name of the concept in the image, if there is one.
    """
    draw = torch.Generator().manual_seed(_number(f"{seed} {file.name}"))
    colours = [name for name in COLOURS if name != "white"]
    order = torch.randperm(len(colours), generator=draw).tolist()
    scenes = []
    for i in range(count):
        colour = colours[order[i % len(colours)]]
        scale, left, top, side = torch.rand(4, generator=draw).tolist()
        caption = f"{subject} on {'an' if colour == 'orange' else 'a'} {colour} background."
        scenes.append(Scene(file, caption, colour, 0.6 + 0.4 * scale, left, top, side < 0.5, concept))
    return scenes


def base_scenes(seed: int = 0, count: int = 3) -> list[Scene]:
    """Make the scenes that train the small VLM: stamps and emoji, each on white with a caption, and `count` more views.

    Left out: the stamps of `held_out_stamps`, of `CONCEPTS` and of `OTHERS`, letters and digits, and the emoji of
    flags, symbols and components, whose names say what cannot be seen.

    Raises:
        RuntimeError: if the images cannot be downloaded; the message says what to do.
    """
    from ..samples.pictures import emoji, stamps

    stamp_pictures, emoji_pictures = stamps(), emoji()
    drawn = [name not in _NO_EMOJI for name in emoji_pictures.names]
    chosen = [i for i, label in enumerate(emoji_pictures.labels) if drawn[label]]
    subjects = [(path, caption) for path, caption in _captioned(stamp_pictures) if not _kept_back(path)]
    subjects += _captioned(emoji_pictures.take(chosen))
    return [scene for file, text in subjects for scene in _with_views(file, text, seed, count)]


def _with_views(file: Path, text: str, seed: int, count: int) -> list[Scene]:
    return [Scene(file, f"{text}.", mirrored=False), *views(file, text, count, seed)]


def concept_scenes(train: int = 5, held_out: int = 4, seed: int = 0) -> tuple[list[Scene], list[Scene]]:
    """Scenes of the eight personal concepts and of eight other images of the same kinds, as (training, held out).

    A concept's caption names it, "Bolo the dog on a blue background."; the others' do not, "A fox on a red
    background.", and come half as often, so that a name that is always said is wrong.

    Raises:
        RuntimeError: if the images cannot be downloaded; the message says what to do.
    """
    root = _stamp_root()
    parts: tuple[list[Scene], list[Scene]] = ([], [])
    for stem, (name, kind) in CONCEPTS.items():
        made = views(root / f"{stem}.png", f"{name} the {kind}", train + held_out, seed, name)
        parts[0].extend(made[:train])
        parts[1].extend(made[train:])
    for stem, kind in OTHERS.items():
        made = views(root / f"{stem}.png", f"A {kind}", train // 2 + held_out // 2, seed)
        parts[0].extend(made[: train // 2])
        parts[1].extend(made[train // 2 :])
    return parts


def held_out_stamps() -> list[Scene]:
    """The stamps that the base model has not seen, a fifth of them, on white with their captions.

    Raises:
        RuntimeError: if the images cannot be downloaded; the message says what to do.
    """
    from ..samples.pictures import stamps

    return [Scene(path, f"{caption}.") for path, caption in _captioned(stamps()) if _is_held_out(path)]


def _captioned(pictures: object) -> list[tuple[Path, str]]:
    """Files and first sentences, capital letter first, no full stop; letters and digits are left out."""
    rows = []
    for file, caption in zip(pictures.files, pictures.captions, strict=True):  # type: ignore[attr-defined]
        sentence = re.split(r"[.!?] |[.!?]$|[;:(]| – |—", caption.strip())[0].strip()
        if sentence and "alphabet" not in file.as_posix() and len(sentence) > 2:
            rows.append((file, sentence[0].upper() + sentence[1:]))
    return rows


def _stamp_root() -> Path:
    from ..samples.pictures import stamps

    return next(parent for parent in stamps().files[0].parents if parent.name == "stamps")  # type: ignore[union-attr]


def _stem(path: Path) -> str:
    parts: Sequence[str] = path.with_suffix("").parts
    return "/".join(parts[parts.index("stamps") + 1 :])


def _kept_back(path: Path) -> bool:
    return _stem(path) in CONCEPTS or _stem(path) in OTHERS or _is_held_out(path)


def _is_held_out(path: Path) -> bool:
    stem = _stem(path)
    return stem not in CONCEPTS and stem not in OTHERS and _number(stem) % _SHARE_HELD_OUT == 0


def _number(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big")
