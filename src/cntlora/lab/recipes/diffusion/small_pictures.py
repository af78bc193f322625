"""Captioned images for the small text-to-image model, and subjects that it has never seen.

An image is clip art laid on a drawn background, and its caption says so: "a photo of a red apple on the beach".
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..image_files import open_layered
from ..samples.pictures import emoji, stamps

Colour = tuple[int, int, int]
SIZE = 32
STAMP_CLASSES = ("animals", "food", "plants", "vehicles")
EMOJI_CLASSES = ("Animals & Nature", "Food & Drink")
COLOURS: Mapping[str, Colour] = {
    "white": (255, 255, 255),
    "red": (214, 40, 40),
    "orange": (245, 150, 60),
    "yellow": (250, 220, 90),
    "green": (70, 160, 80),
    "blue": (60, 110, 210),
    "purple": (130, 80, 170),
    "pink": (250, 170, 200),
    "gray": (150, 150, 150),
    "black": (20, 20, 20),
}
# place → colours of the upper and the lower half
SCENES: Mapping[str, tuple[Colour, Colour]] = {
    "on the grass": ((150, 205, 250), (90, 165, 70)),
    "on the beach": ((120, 195, 245), (235, 210, 150)),
    "in the snow": ((180, 200, 225), (245, 248, 252)),
    "on the sea": ((190, 225, 250), (40, 100, 170)),
    "in the desert": ((250, 200, 130), (205, 140, 70)),
    "at night": ((15, 20, 60), (35, 40, 80)),
}
# a stamp's file → its class noun: subjects for DreamBooth, left out of pretraining
SUBJECTS: Mapping[str, str] = {
    "rainbow-lorikeet": "bird",
    "butterflyfish": "fish",
    "edward_bear": "bear",
    "dog": "dog",
    "whitestar-petunia": "flower",
    "double_decker_bus": "bus",
}
# folder of a stamp → what it is, so that class words ("a bird") have many images
_NOUNS = {
    "birds": "bird", "fish": "fish", "insects": "insect", "dogs": "dog", "cats": "cat", "bears": "bear",
    "mammals": "animal", "bovines": "cow", "deer": "deer", "equines": "horse", "rodents": "rodent",
    "fruit": "fruit", "vegetables": "vegetable", "flowers": "flower", "trees": "tree", "mushrooms": "mushroom",
    "auto": "car", "ship": "ship", "planes": "plane", "locomotive": "train", "masstransit": "bus",
    "construction": "truck", "emergency": "truck",
}  # fmt: skip


@dataclass(frozen=True)
class Item:
    """One image: RGBA, what it shows ("a red apple"), its class ("a fruit", or the same), "photo" or "drawing"."""

    picture: Image.Image
    what: str
    kind: str
    style: str


def with_article(noun: str) -> str:
    """ "a dog", "an apple"."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def phrase(caption: str) -> str:
    """A stamp's caption as a part of a sentence: "A Fuji apple." is "a fuji apple"; what is in brackets is left out."""
    text = re.sub(r"\(.*?\)", "", caption).split(".")[0].split("!")[0]
    return " ".join(text.lower().replace("“", "").replace("”", "").split())


def items() -> list[Item]:
    """The images that pretraining sees, in a fixed order: stamps of four classes and emoji of two.

    Raises:
        RuntimeError: if a package cannot be downloaded; the message says what to do.
    """
    found = stamps().only(STAMP_CLASSES)
    result = []
    for row, (file, caption) in enumerate(zip(found.files, found.captions, strict=True)):
        assert isinstance(file, Path)
        if file.stem in SUBJECTS and caption:
            continue
        noun = next((_NOUNS[part] for part in reversed(file.parts) if part in _NOUNS), None)
        what = phrase(caption) or with_article(file.stem)
        style = "drawing" if "cartoon" in file.parts else "photo"
        result.append(Item(_opened(found.files[row]), what, with_article(noun) if noun else what, style))
    pictures = emoji().only(EMOJI_CLASSES)
    for file, name in zip(pictures.files, pictures.captions, strict=True):
        what = with_article(name.removesuffix(" face"))
        result.append(Item(_opened(file), what, what, "drawing"))
    return result


def _opened(file: Path | NDArray[np.uint8]) -> Image.Image:
    assert isinstance(file, Path)
    return cropped(open_layered(file).convert("RGBA"))


def cropped(picture: Image.Image) -> Image.Image:
    """An RGBA image without its transparent rim, at most 4 times the size that is drawn."""
    picture = picture.crop(picture.getchannel("A").getbbox())
    picture.thumbnail((4 * SIZE, 4 * SIZE), Image.Resampling.BICUBIC)
    return picture


def background_names() -> list[str]:
    """Return what a caption says of the background: "on a red background", "on the beach"."""
    return [f"on {with_article(name)} background" for name in COLOURS] + list(SCENES)


def background(name: str, size: int = SIZE) -> Image.Image:
    """The background of a name of `background_names`, `size` pixels wide and high."""
    if name in SCENES:
        upper, lower = SCENES[name]
        array = np.empty((size, size, 3), np.uint8)
        array[: size * 5 // 8], array[size * 5 // 8 :] = upper, lower
        if name == "at night":
            array[[size // 8, size // 4, size // 10], [size // 5, size * 3 // 4, size * 9 // 16]] = 240
        return Image.fromarray(array)
    colour = next(name for name in name.split() if name in COLOURS)
    return Image.new("RGB", (size, size), COLOURS[colour])


def composed(
    picture: Image.Image,
    on: Image.Image,
    *,
    scale: float,
    shift: tuple[float, float] = (0.0, 0.0),
    flip: bool = False,
) -> Image.Image:
    """An image laid on a background.

    Args:
        picture: RGBA.
        on: RGB, square.
        scale: the image's longer side as a share of the background's side.
        shift: right and down from the middle, as shares of the free room, −1 to 1.
        flip: left and right exchanged.
    """
    factor = scale * on.width / max(picture.size)
    width, height = (max(1, round(side * factor)) for side in picture.size)
    part = picture.resize((width, height), Image.Resampling.BOX if factor < 0.5 else Image.Resampling.BICUBIC)
    part = part.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else part
    result = on.convert("RGBA")
    left, top = (on.width - width) / 2, (on.height - height) / 2
    result.alpha_composite(part, (round(left + left * shift[0]), round(top + top * shift[1])))
    return result.convert("RGB")


def drawn(item: Item, rng: np.random.Generator, size: int = SIZE) -> tuple[Image.Image, str]:
    """A random image of an item with its caption; one in four says the class only, one in six has white behind it."""
    names = background_names()
    place = names[int(rng.integers(len(names)))] if rng.random() > 0.16 else names[0]
    scale, flip = rng.uniform(0.72, 1.0), bool(rng.random() < 0.5)
    picture = composed(item.picture, background(place, size), scale=scale, shift=_shift(rng), flip=flip)
    what = item.kind if rng.random() < 0.25 else item.what
    return picture, f"a {item.style} of {what} {place}"


def _shift(rng: np.random.Generator) -> tuple[float, float]:
    return float(rng.uniform(-0.7, 0.7)), float(rng.uniform(-0.7, 0.7))


def subject_photos(folder: Path, stem: str, *, count: int = 5, size: int = SIZE) -> Path:
    """Write "photos" of a held-out subject: one stamp on several backgrounds, at several sizes and places.

    Args:
        folder: gets `<stem>/1.png` and so on, if they are not there yet.
        stem: a key of `SUBJECTS`.
        count: number of images.
        size: of the images in pixels.

    Returns:
        The folder of the images.
    """
    home = folder / stem
    if len(list(home.glob("*.png"))) >= count:
        return home
    file = next(f for f in stamps().only(STAMP_CLASSES).files if isinstance(f, Path) and f.stem == stem)
    home.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(sum(map(ord, stem)))
    places = rng.permutation(background_names())[:count]
    for i, place in enumerate(places):
        picture = composed(
            _opened(file),
            background(str(place), size),
            scale=rng.uniform(0.75, 1.0),
            shift=_shift(rng),
            flip=i % 2 == 1,
        )
        picture.save(home / f"{i + 1}.png")
    return home
