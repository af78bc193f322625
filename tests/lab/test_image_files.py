"""Image files of every kind as 8-bit RGB: the brightness that is in the file, or one line that says why not."""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cntlora.lab.recipes.captioning.data import CaptionRow, check_pictures
from cntlora.lab.recipes.diffusion.data import open_photo
from cntlora.lab.recipes.image_files import is_dark, opaque, open_image, open_layered
from cntlora.lab.recipes.samples.pictures import Pictures
from cntlora.lab.recipes.vision.images import LabelledImages, _open_row, read_images
from cntlora.lab.report.sample_images import read_image
from cntlora.lab.report.samples import Sample

RAMP = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
EIGHT = np.rint(RAMP / 257).astype(np.uint8)


def png(width: int, depth: int, kind: int, *rows: bytes, key: bytes = b"") -> bytes:
    """A PNG file by its parts; `kind` 0 is grey, 2 RGB, 4 grey with alpha, 6 RGBA."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, len(rows), depth, kind, 0, 0, 0))
    body = chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows)))
    return b"\x89PNG\r\n\x1a\n" + head + (chunk(b"tRNS", key) if key else b"") + body + chunk(b"IEND", b"")


def tiff(values: Any, *, bits: int, sample: int = 1, photometric: int = 1, order: str = "<") -> bytes:
    """A grey TIFF by its tags: 258 bits, 339 kind (1 unsigned, 2 signed, 3 float), 262 what is white (1: the most)."""
    height, width = values.shape
    data = values.tobytes()
    tags = {256: width, 257: height, 258: bits, 259: 1, 262: photometric, 273: 8, 277: 1, 278: height, 279: len(data)}
    tags[339] = sample
    entries = b"".join(struct.pack(f"{order}HHII", tag, 4, 1, value) for tag, value in sorted(tags.items()))
    mark = b"II" if order == "<" else b"MM"
    head = mark + struct.pack(f"{order}HI", 42, 8 + len(data))
    return head + data + struct.pack(f"{order}H", len(tags)) + entries + struct.pack(f"{order}I", 0)


def twelve(values: Any) -> bytes:
    """Two values of 12 bits in three bytes."""
    pairs = values.reshape(-1, 2).astype(int)
    return b"".join(bytes([a >> 4, (a & 15) << 4 | b >> 8, b & 255]) for a, b in pairs)


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def pixels(content: bytes) -> Any:
    image = open_image(content, name="it")
    assert image.mode == "RGB"
    return np.asarray(image)


DEEP: dict[str, bytes] = {
    "PNG of 16 bits": saved(Image.fromarray(RAMP), "PNG"),
    "TIFF of 16 bits, little-endian": tiff(RAMP.astype("<u2"), bits=16),
    "TIFF of 16 bits, big-endian": tiff(RAMP.astype(">u2"), bits=16, order=">"),
    "PGM of 16 bits": b"P5 8 8 65535\n" + RAMP.astype(">u2").tobytes(),
    "TIFF of 16 bits in which 0 is white": tiff((65535 - RAMP).astype("<u2"), bits=16, photometric=0),
    "TIFF of floating-point numbers": tiff((RAMP / 65535).astype("<f4"), bits=32, sample=3),
}


@pytest.mark.parametrize("kind", DEEP)
def test_deep_grey_is_scaled_by_the_range_of_its_type(kind: str) -> None:
    found = pixels(DEEP[kind])
    assert np.abs(found[..., 0].astype(int) - EIGHT).max() <= 1
    assert (found[..., :1] == found).all()
    assert found[..., 0].mean() == pytest.approx(127.5, abs=2)
    with Image.open(io.BytesIO(DEEP[kind])) as plain:  # the control: PIL alone clips, or gives all black
        assert abs(np.asarray(plain.convert("RGB")).mean() - 127.5) > 50


@pytest.mark.parametrize("most", [1023, 4095])
def test_fewer_bits_are_scaled_by_what_the_file_says(most: int) -> None:
    levels = np.linspace(0, most, 64).astype(np.uint16).reshape(8, 8)
    assert np.abs(pixels(b"P5 8 8 %d\n" % most + levels.astype(">u2").tobytes())[..., 0].astype(int) - EIGHT).max() <= 1
    packed = np.frombuffer(twelve(np.linspace(0, 4095, 64).astype(int)), np.uint8).reshape(8, 12)
    content = tiff(packed, bits=12).replace(struct.pack("<HHII", 256, 4, 1, 12), struct.pack("<HHII", 256, 4, 1, 8))
    assert np.abs(pixels(content)[..., 0].astype(int) - EIGHT).max() <= 1


def test_a_picture_of_8_bits_stays_as_it_is() -> None:
    assert (pixels(saved(Image.fromarray(EIGHT), "PNG"))[..., 0] == EIGHT).all()
    assert (pixels(tiff(EIGHT, bits=8))[..., 0] == EIGHT).all()


def test_colours_of_16_bits_keep_their_upper_half() -> None:
    rgb = png(2, 16, 2, struct.pack(">6H", 0, 32768, 65535, 257, 1285, 65535))
    assert np.abs(pixels(rgb).astype(int) - [[[0, 128, 255], [1, 5, 255]]]).max() <= 1
    grey = png(2, 16, 4, struct.pack(">4H", 32768, 65535, 0, 0))
    assert pixels(grey).tolist() == [[[128] * 3, [255] * 3]]
    rgba = png(2, 16, 6, struct.pack(">8H", 65535, 0, 0, 65535, 0, 0, 0, 0))
    assert pixels(rgba).tolist() == [[[255, 0, 0], [255] * 3]]


def palette(transparency: Any) -> bytes:
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putdata([0, 1])
    return saved(image, "PNG", **({} if transparency is None else {"transparency": transparency}))


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (palette(1), [[255, 0, 0], [255] * 3]),
        (palette(b"\xff\x00"), [[255, 0, 0], [255] * 3]),
        (palette(None), [[255, 0, 0], [0, 0, 255]]),  # the control: nothing is transparent
        (saved(Image.frombytes("LA", (2, 1), bytes([9, 255, 9, 0])), "PNG"), [[9] * 3, [255] * 3]),
        (saved(Image.frombytes("RGBA", (2, 1), bytes([0, 9, 0, 255, 0, 9, 0, 0])), "PNG"), [[0, 9, 0], [255] * 3]),
        (saved(Image.frombytes("RGBA", (2, 1), bytes([0, 0, 0, 255, 0, 0, 0, 128])), "PNG"), [[0] * 3, [127] * 3]),
        (png(2, 16, 0, struct.pack(">2H", 1000, 65535), key=struct.pack(">H", 1000)), [[255] * 3, [255] * 3]),
        (png(2, 16, 0, struct.pack(">2H", 1000, 65535), key=struct.pack(">H", 9)), [[4] * 3, [255] * 3]),
        (png(2, 8, 0, bytes([7, 200]), key=b"\0\7"), [[255] * 3, [200] * 3]),
        (png(2, 1, 0, b"\x40"), [[0] * 3, [255] * 3]),
        (png(2, 2, 0, b"\x10"), [[0] * 3, [85] * 3]),
    ],
)  # fmt: skip
def test_what_is_transparent_becomes_white(content: bytes, expected: list[list[int]]) -> None:
    assert pixels(content).tolist() == [expected]


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_inks_become_the_colours_that_they_print(kind: str) -> None:
    inks = Image.new("RGB", (16, 16), (255, 0, 0)).convert("CMYK")
    assert np.abs(pixels(saved(inks, kind)).astype(int) - [255, 0, 0]).max() <= 8  # PIL writes a JPEG's inverted


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF"])
@pytest.mark.parametrize("deep", [False, True])
def test_a_picture_is_upright(kind: str, deep: bool) -> None:
    if deep and kind == "JPEG":
        return
    left = np.zeros((8, 16), np.uint8)
    left[:, :8] = 255
    image = Image.fromarray(left.astype(np.uint16) * 257 if deep else left)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: the first column is the top
    turned, plain = pixels(saved(image, kind, exif=exif)), pixels(saved(image, kind))
    assert turned.shape == (16, 8, 3) and turned[:7].min() > 200 and turned[9:].max() < 55
    assert plain.shape == (8, 16, 3) and plain[:, :7].min() > 200  # the control


def test_an_animation_gives_its_first_frame_and_a_tiff_of_pages_is_refused() -> None:
    red, blue = (Image.new("RGB", (4, 4), colour) for colour in ((255, 0, 0), (0, 0, 255)))
    for kind in ("GIF", "WEBP", "PNG"):
        content = saved(
            red, kind, save_all=True, append_images=[blue], **({"lossless": True} if kind == "WEBP" else {})
        )
        assert pixels(content)[0, 0].tolist() == [255, 0, 0]
    stack = saved(red, "TIFF", save_all=True, append_images=[blue, red])
    with pytest.raises(ValueError, match=r"^it: it has 3 pages, expected one; save the page"):
        open_image(stack, name="it")
    small = red.resize((2, 2))
    small.encoderinfo = {"tiffinfo": {254: 1}}  # a smaller copy of the first page
    content = saved(red, "TIFF", save_all=True, append_images=[small])
    with Image.open(io.BytesIO(content)) as opened:
        assert getattr(opened, "n_frames", 1) == 2
    assert pixels(content).shape == (4, 4, 3)


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        (tiff(np.full((2, 2), np.nan, "<f4"), bits=32, sample=3), ["4 of its 4 values are NaN"]),
        (tiff(np.array([[0, np.inf]], "<f4"), bits=32, sample=3), ["1 of its 2 values are NaN or infinite"]),
        (tiff(np.array([[0, 255]], "<f4"), bits=32, sample=3), ["from 0 to 255", "expected 0 (black) to 1 (white)"]),
        (tiff(np.array([[-0.5, 0.5]], "<f4"), bits=32, sample=3), ["from -0.5 to 0.5"]),
        (tiff(np.array([[0, 9]], "<i4"), bits=32, sample=2), ["32 bits or with a sign", "8 or 16 bits"]),
        (tiff(np.array([[0, 9]], "<i2"), bits=16, sample=2), ["32 bits or with a sign", "8 or 16 bits"]),
    ],
)
def test_values_without_a_known_range_are_refused(content: bytes, parts: list[str]) -> None:
    with pytest.raises(ValueError, match="^it: [^\n]*$") as error:
        open_image(content, name="it")
    assert all(part in str(error.value) for part in parts)


# --- one way to open an image ------------------------------------------------------------------------------


def test_every_recipe_and_the_report_see_the_same(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        for row in range(2):
            (tmp_path / "data" / name).mkdir(parents=True, exist_ok=True)
            (tmp_path / "data" / name / f"{row}.png").write_bytes(DEEP["PNG of 16 bits"])
    path = tmp_path / "data" / "cat" / "0.png"
    images, _ = read_images(str(tmp_path / "data"))
    shown = read_image(Sample("image", path, None))
    assert not isinstance(shown, str)
    found = [
        images.load(images.sources[0], 8),
        open_photo(path),
        CaptionRow("row 1", path, "", "").open(),
        CaptionRow("row 1", path.read_bytes(), "", "").open(),
        Pictures((path,), ("",), (0,), ("x",)).open(0),
        _open_row([{"image": Image.open(path)}], "image", "owner/name", 0, 8),
        shown.convert("RGB"),
    ]
    assert all(np.array_equal(np.asarray(image)[..., 0], EIGHT) for image in found)
    with pytest.raises(ValueError, match="owner/name: row 1: expected an image in column 'image', got str"):
        _open_row([{"image": "a.png"}], "image", "owner/name", 0, 8)


def test_pictures_of_the_wrong_range_are_told_of(tmp_path: Path) -> None:
    for row in range(4):
        values = (RAMP >> 4 if row else RAMP).astype(np.uint16)  # 12 bits in a file of 16
        Image.fromarray(values).save(tmp_path / f"{row}.png")
    files = sorted(tmp_path.glob("*.png"))
    with pytest.warns(
        UserWarning, match=r"here: 3 of 4 images are almost black .* such as .*1\.png; values of 10 .* times 64"
    ):
        LabelledImages(files, [0, 0, 1, 1], ("a", "b"), "here").check()
    with pytest.warns(UserWarning, match="3 of 4 images are almost black"):
        check_pictures([CaptionRow(f"row {i}", file, "", "") for i, file in enumerate(files)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        LabelledImages(files[:1] * 3 + files[1:2], [0, 0, 1, 1], ("a", "b"), "here").check()  # the control: one of four


def test_layers_stay_where_they_are_wanted() -> None:
    glass = saved(Image.new("RGBA", (2, 2), (9, 9, 9, 0)), "PNG")
    assert open_layered(glass).mode == "RGBA" and open_layered(saved(Image.new("L", (2, 2)), "PNG")).mode == "RGB"
    assert is_dark(Image.new("RGB", (2, 2), (16, 3, 0))) and not is_dark(Image.new("RGB", (2, 2), (0, 17, 0)))
    assert opaque(Image.new("L", (2, 2), 7)).getpixel((0, 0)) == (7, 7, 7)
