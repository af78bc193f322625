"""Images with captions and classes that ship inside packages: clip art, emoji, textiles, clothes, digits."""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..image_files import layered, open_layered
from .downloads import packaged_file

WHITE = (255, 255, 255)


@dataclass(frozen=True)
class Pictures:
    """Images, opened one at a time, with a caption and a class each.

    Attributes:
        files: n files, or uint8 arrays (H, W) or (H, W, 3) where the source has no files.
        captions: n English captions, without line breaks; "" where there is none.
        labels: n class indices.
        names: the name of each class.

    Raises:
        ValueError: if the numbers of files, captions and labels differ, or a label has no name.
    """

    files: tuple[Path | NDArray[np.uint8], ...]
    captions: tuple[str, ...]
    labels: tuple[int, ...]
    names: tuple[str, ...]

    def __post_init__(self) -> None:
        for what, values in (("captions", self.captions), ("labels", self.labels)):
            if len(values) != len(self.files):
                raise ValueError(f"{what}: expected one for each of {len(self.files)} images, got {len(values)}")
        strange = sorted({label for label in self.labels if not 0 <= label < len(self.names)})
        if strange:
            raise ValueError(f"labels: expected indices of the {len(self.names)} names, got {strange[:5]}")

    def __len__(self) -> int:
        return len(self.files)

    def open(
        self, row: int, size: int | tuple[int, int] | None = None, background: tuple[int, int, int] = WHITE
    ) -> Image.Image:
        """An image as RGB, with what is transparent in it laid on the background.

        Args:
            row: which one.
            size: None for its own size; an int for a square that the whole image fits in, in its own shape and in the
                middle, the rest being background; (width, height) to stretch it. Bicubic.
            background: red, green and blue, 0 to 255.

        Raises:
            ValueError: if the file is no image or a broken one; names the file.
        """
        return laid_out(_read(self.files[row]), size, background)

    def take(self, rows: Sequence[int]) -> Pictures:
        """The given rows, in the given order, with the same classes."""
        return Pictures(
            tuple(self.files[i] for i in rows),
            tuple(self.captions[i] for i in rows),
            tuple(self.labels[i] for i in rows),
            self.names,
        )

    def split(self, eval_size: int | float, seed: int) -> tuple[Pictures, Pictures]:
        """Training images and held-out images, in random order, with the same shares of the classes.

        Args:
            eval_size: held-out images as a number, or as a share in (0, 1).
            seed: the same seed gives the same split; no global generator is used.

        Raises:
            ValueError: if they do not suffice, or a class has too few of them to be in both parts.
        """
        from sklearn.model_selection import train_test_split  # which takes seconds to import

        try:
            train, held_out = train_test_split(
                range(len(self)), test_size=eval_size, random_state=seed, stratify=self.labels
            )
        except ValueError as error:
            raise ValueError(f"eval_size={eval_size} of {len(self)} images cannot be held out: {error}") from error
        return self.take(train), self.take(held_out)

    def only(self, names: Sequence[str]) -> Pictures:
        """The images of these classes, which are numbered in the given order.

        Raises:
            ValueError: for a name that is no class.
        """
        unknown = [name for name in names if name not in self.names]
        if unknown:
            raise ValueError(f"names: {unknown[0]!r} is no class; there are {', '.join(self.names)}")
        index = {self.names.index(name): i for i, name in enumerate(names)}
        kept = self.take([i for i, label in enumerate(self.labels) if label in index])
        labels = tuple(index[label] for label in kept.labels)
        return replace(kept, labels=labels, names=tuple(names))


def laid_out(
    picture: Image.Image, size: int | tuple[int, int] | None = None, background: tuple[int, int, int] = WHITE
) -> Image.Image:
    """An image of any mode as RGB on the background, sized as `Pictures.open` says."""
    picture = layered(picture).convert("RGBA")
    if isinstance(size, tuple):
        picture, canvas = picture.resize(size, Image.Resampling.BICUBIC), size
    elif size is not None:
        scale = size / max(picture.size)
        width, height = (max(1, round(side * scale)) for side in picture.size)
        picture, canvas = picture.resize((width, height), Image.Resampling.BICUBIC), (size, size)
    else:
        canvas = picture.size
    result = Image.new("RGBA", canvas, (*background, 255))
    offset = ((canvas[0] - picture.width) // 2, (canvas[1] - picture.height) // 2)
    result.alpha_composite(picture, offset)
    return result.convert("RGB")


def _read(file: Path | NDArray[np.uint8]) -> Image.Image:
    return open_layered(file) if isinstance(file, Path) else Image.fromarray(file)


def stamps(*, mirrored: bool = False) -> Pictures:
    """785 clip-art images and photos of Tux Paint in 16 classes, each with a caption.

    The class is the first folder, animals to vehicles (`files[i].parts` has the finer ones). Each image has a text
    file, whose first line is the English caption ("A great blue heron."); 674 captions differ. Sizes are 12 to 1226
    pixels; most images have a transparent background. 158 are letters of alphabets. Left out: sounds, SVG, the
    translations, and 11 images that are mirror images of others and have no caption of their own (`mirrored` adds
    them, with the caption of their original: 796).

    Source: Debian tuxpaint-stamps-default 2022.06.04, 161 MB, downloaded once, 25 MB kept. GPL-2.

    Raises:
        RuntimeError: if it cannot be downloaded; the message says what to do.
    """
    root = packaged_file(
        "tuxpaint-stamps-default",
        "2022.06.04",
        "617be7d57f40c6e03b4bf2e5dc93568d9c95839a7526e9a3d543f58dad383a18",
        "usr/share/tuxpaint/stamps",
        kind="debian",
        only=r".*\.(png|txt)",
    )
    return _stamps(root, mirrored)


def _stamps(root: Path, mirrored: bool) -> Pictures:
    files = [path for path in sorted(root.rglob("*.png")) if mirrored or not path.stem.endswith("_mirror")]
    classes = [path.relative_to(root).parts[0] for path in files]
    names = tuple(sorted(set(classes)))
    return Pictures(
        tuple(files), tuple(_stamp_caption(path) for path in files), tuple(map(names.index, classes)), names
    )


def _stamp_caption(path: Path) -> str:
    text = path.with_name(path.stem.removesuffix("_mirror") + ".txt")
    lines = text.read_text(encoding="utf-8-sig").splitlines() if text.is_file() else []
    return " ".join(lines[0].split()) if lines else ""


def emoji(*, skin_tones: bool = False) -> Pictures:
    """1,911 emoji images, 64×64, in 10 classes, each with its name as caption.

    The caption is the Unicode name in small letters ("polar bear", "flag of Nicaragua" as "nicaragua flag"). Classes
    are Unicode's categories: 386 of people down to 5 of "Component" (hair and skin samples). `skin_tones` adds the
    1,875 images that are another one in other skin tones, under the same caption; they are left out since near
    copies on both sides of a split would make held-out scores too good.

    Source: npm emoji-datasource-twitter 16.0.0, 62 MB, downloaded once, 17 MB kept. Code MIT, images of Twitter's
    Twemoji CC-BY 4.0. Left out: the sheets of all images in one.

    Raises:
        RuntimeError: if it cannot be downloaded (needs npm); the message says what to do.
    """
    version, sha256 = "16.0.0", "f64a530c63bca463bd8317fdc4615ce63a53a0c65018e4ce2d848aaba7a28877"
    wanted = r"emoji\.json|img/twitter/64/.*"
    root = packaged_file("emoji-datasource-twitter", version, sha256, "package", kind="npm", only=wanted)
    return _emoji(root, skin_tones)


def _emoji(root: Path, skin_tones: bool) -> Pictures:
    rows: list[tuple[Path, str, str]] = []
    for entry in json.loads((root / "emoji.json").read_text(encoding="utf-8")):
        variants = entry.get("skin_variations", {}).values() if skin_tones else ()
        for one in (entry, *variants):
            if one["has_img_twitter"]:
                rows.append((root / "img/twitter/64" / one["image"], entry["name"].lower(), entry["category"]))
    rows.sort(key=lambda row: row[0].name)
    files, captions, classes = zip(*rows, strict=True)
    names = tuple(sorted(set(classes)))
    return Pictures(files, captions, tuple(map(names.index, classes)), names)


TEXTILES = {"nominal": "without a defect", "local": "with a local defect", "global": "with a global defect"}


def textiles() -> Pictures:
    """2,000 simulated textile surfaces, 250×250, grey: 1,000 without a defect, 500 with a local, 500 with a global one.

    The images are made by a computer (the source says "simulated"), no photos. A local defect is a small spot of
    another texture and hard to see; a global one changes the whole weave. The caption is the same for each of a class.

    Source: PyPI conformal-clip-data 0.1.4 (Megahed et al. 2025, arXiv 2501.12596), 42 MB, downloaded once. MIT.

    Raises:
        RuntimeError: if it cannot be downloaded; the message says what to do.
    """
    root = packaged_file(
        "conformal-clip-data",
        "0.1.4",
        "00144ccc179a887dbea15923be8cf236d0c0f49bf7fb6f7bb288e40b53fb1bcb",
        "conformal_clip_data/data/textile_images/simulated",
    )
    rows = [(path, label) for label, name in enumerate(TEXTILES) for path in sorted((root / name).glob("*.jpg"))]
    captions = tuple(f"a textile {TEXTILES[path.parent.name]}" for path, _ in rows)
    return Pictures(tuple(path for path, _ in rows), captions, tuple(label for _, label in rows), tuple(TEXTILES))


CLOTHES = (
    "T-shirt", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot",
)  # fmt: skip


def fashion_mnist(part: str = "train", count: int | None = None) -> Pictures:
    """Fashion-MNIST: 28×28 grey images of clothes on black in 10 classes, as arrays in memory.

    Args:
        part: "train" (60,000) or "test" (10,000).
        count: only so many, the first ones; the files are in random order, 10 % of each class on the whole.

    Source: Debian dataset-fashion-mnist 0.0~git20200523 (Xiao et al. 2017), 31 MB, downloaded once. MIT.

    Raises:
        ValueError: for another part, or a count that there is not.
        RuntimeError: if it cannot be downloaded; the message says what to do.
    """
    prefixes = {"train": "train", "test": "t10k"}
    if part not in prefixes:
        raise ValueError(f"part: expected train or test, got {part!r}")
    root = packaged_file(
        "dataset-fashion-mnist",
        "20200523",
        "f37bf62265b0989968a94c78e420344f1ede1007dabf032a0dc5e88371fef370",
        "usr/share/datasets/fashion-mnist",
        kind="debian",
    )
    images = _idx(root / f"{prefixes[part]}-images-idx3-ubyte.gz")
    labels = _idx(root / f"{prefixes[part]}-labels-idx1-ubyte.gz")
    if count is not None and not 0 < count <= len(images):
        raise ValueError(f"count: expected 1 to {len(images)}, got {count}")
    some = tuple(labels[:count].tolist())
    return Pictures(tuple(images[:count]), tuple(_a(CLOTHES[label].lower()) for label in some), some, CLOTHES)


def _idx(path: Path) -> NDArray[np.uint8]:
    """The uint8 array of a gzipped IDX file: two zeros, the type 8, the number of axes, their lengths, the values."""
    content = gzip.decompress(path.read_bytes())
    axes = content[3] if content[:3] == b"\0\0\x08" else 0
    shape = np.frombuffer(content, ">u4", count=axes, offset=4).tolist()
    values = np.frombuffer(content, np.uint8, offset=4 + 4 * axes)
    if axes == 0 or values.size != np.prod(shape):
        raise ValueError(f"{path}: no IDX file of bytes, or a broken one")
    return values.reshape(shape)


def _a(noun: str) -> str:
    return noun if noun == "trousers" else f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def digits() -> Pictures:
    """1,797 handwritten digits of scikit-learn, 8×8, white on black, as arrays in memory; nothing is downloaded.

    Their 17 grey levels are spread over 0 to 255. The caption is "the digit 3".

    Source: the test part of UCI's optical recognition of handwritten digits (Alpaydin & Kaynak 1998). CC-BY 4.0.
    """
    from sklearn.datasets import load_digits

    loaded = load_digits()
    images = np.rint(loaded.images * (255 / 16)).astype(np.uint8)
    labels = tuple(int(label) for label in loaded.target)
    names = tuple(str(i) for i in range(10))
    return Pictures(tuple(images), tuple(f"the digit {label}" for label in labels), labels, names)
