"""Images from packages: reading, laying out and splitting on small fakes; the real ones under `packages`."""

from __future__ import annotations

import gzip
import json
import struct
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cntlora.lab.recipes.samples import downloads, efficientnet, image_text, pictures
from cntlora.lab.recipes.samples.pictures import Pictures, laid_out

RED, BLUE = (255, 0, 0), (0, 0, 255)


def saved(path: Path, color: tuple[int, ...] = RED, size: tuple[int, int] = (8, 4), mode: str = "RGB") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, color if mode in ("RGB", "RGBA") else color[0]).save(path)
    return path


def some(folder: Path, counts: dict[str, int]) -> Pictures:
    rows = [(name, i) for name, count in counts.items() for i in range(count)]
    files = tuple(saved(folder / f"{name}{i}.png", (i, 0, 0)) for name, i in rows)
    names = tuple(counts)
    captions = tuple(f"{name} {i}" for name, i in rows)
    return Pictures(files, captions, tuple(names.index(name) for name, _ in rows), names)


# --- the class ----------------------------------------------------------------------------------------------


def test_a_picture_is_laid_on_the_background_and_fitted_whole() -> None:
    glass = Image.new("RGBA", (8, 4), (255, 0, 0, 0))
    assert laid_out(glass, None, BLUE).getcolors() == [(32, BLUE)]  # nothing of what is transparent shows
    half = np.asarray(laid_out(Image.new("RGBA", (8, 4), (255, 0, 0, 128)), None, BLUE)).astype(int)
    assert np.abs(half - [128, 0, 127]).max() <= 1
    square = np.asarray(laid_out(Image.new("RGB", (8, 4), RED), 16, BLUE))
    assert square.shape == (16, 16, 3)
    assert (square[4:12] == RED).all()
    assert (square[:4] == BLUE).all()
    assert (square[12:] == BLUE).all()
    stretched = laid_out(Image.new("RGB", (8, 4), RED), (6, 10), BLUE)
    assert stretched.size == (6, 10)
    assert stretched.getcolors() == [(60, RED)]  # control: no background where it is stretched


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "I;16"])
def test_every_mode_comes_as_rgb(tmp_path: Path, mode: str) -> None:
    path = tmp_path / "a.png"
    Image.new(mode, (5, 5)).save(path)
    one = Pictures((path,), ("",), (0,), ("x",)).open(0)
    assert (one.mode, one.size) == ("RGB", (5, 5))


def test_arrays_are_pictures_too() -> None:
    grey, colour = np.full((4, 4), 7, np.uint8), np.full((4, 4, 3), RED, np.uint8)
    both = Pictures((grey, colour), ("", ""), (0, 0), ("x",))
    assert both.open(0).getcolors() == [(16, (7, 7, 7))]
    assert both.open(1).getcolors() == [(16, RED)]


@pytest.mark.parametrize("content", [b"", b"not an image", None])
def test_a_broken_picture_is_named(tmp_path: Path, content: bytes | None) -> None:
    path = saved(tmp_path / "broken.png", size=(64, 64))
    path.write_bytes(path.read_bytes()[:60] if content is None else content)
    with pytest.raises(ValueError, match=r"broken\.png: expected an image, but cannot be read"):
        Pictures((path,), ("",), (0,), ("x",)).open(0)


def test_a_split_keeps_shares_and_loses_nothing(tmp_path: Path) -> None:
    all_of_them = some(tmp_path, {"a": 12, "b": 4})
    train, held_out = all_of_them.split(4, seed=0)
    assert Counter(held_out.labels) == {0: 3, 1: 1}
    assert sorted(train.captions + held_out.captions) == sorted(all_of_them.captions)
    assert all(f"{part.names[part.labels[i]]} " in part.captions[i] for part in (train, held_out) for i in range(4))
    assert all_of_them.split(4, seed=0)[1].captions == held_out.captions
    assert all_of_them.split(4, seed=1)[1].captions != held_out.captions
    with pytest.raises(ValueError, match="eval_size=16 of 16 images"):
        all_of_them.split(16, seed=0)


def test_rows_and_classes_can_be_chosen(tmp_path: Path) -> None:
    all_of_them = some(tmp_path, {"a": 2, "b": 2, "c": 1})
    taken = all_of_them.take([4, 0])
    assert (taken.captions, taken.labels, taken.names) == (("c 0", "a 0"), (2, 0), ("a", "b", "c"))
    chosen = all_of_them.only(["c", "a"])
    assert (chosen.captions, chosen.labels, chosen.names) == (("a 0", "a 1", "c 0"), (1, 1, 0), ("c", "a"))
    with pytest.raises(ValueError, match="'d' is no class; there are a, b, c"):
        all_of_them.only(["a", "d"])


def test_fields_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    with pytest.raises(ValueError, match="captions: expected one for each of 1 images, got 2"):
        Pictures((path,), ("", ""), (0,), ("x",))
    with pytest.raises(ValueError, match="labels: expected indices of the 1 names, got"):
        Pictures((path,), ("",), (1,), ("x",))


# --- the sources, on small fakes ----------------------------------------------------------------------------


def test_stamps_have_first_folders_as_classes_and_first_lines_as_captions(tmp_path: Path) -> None:
    for name in ("animals/birds/owl", "animals/birds/owl_mirror", "town/house"):
        saved(tmp_path / f"{name}.png")
    (tmp_path / "animals/birds/owl.txt").write_text("\ufeffAn  owl.\nde.utf8=Eine Eule.\n", encoding="utf-8")
    found = pictures._stamps(tmp_path, mirrored=False)
    assert (found.captions, found.labels, found.names) == (("An owl.", ""), (0, 1), ("animals", "town"))
    both = pictures._stamps(tmp_path, mirrored=True)
    assert both.captions == ("An owl.", "An owl.", "")


def test_emoji_leave_out_skin_tones_and_what_has_no_picture(tmp_path: Path) -> None:
    one = {"name": "WAVING HAND", "category": "People", "image": "2.png", "has_img_twitter": True}
    tone = {"image": "2-1f3fb.png", "has_img_twitter": True}
    bear = {"name": "POLAR BEAR", "category": "Animals", "image": "1.png", "has_img_twitter": True}
    none = {"name": "NONE", "category": "Nothing", "image": "3.png", "has_img_twitter": False}
    (tmp_path / "emoji.json").write_text(json.dumps([one | {"skin_variations": {"1F3FB": tone}}, bear, none]))
    found = pictures._emoji(tmp_path, skin_tones=False)
    assert (found.captions, found.labels, found.names) == (("polar bear", "waving hand"), (0, 1), ("Animals", "People"))
    more = pictures._emoji(tmp_path, skin_tones=True)
    assert Counter(more.captions) == {"polar bear": 1, "waving hand": 2}


def test_idx_files_are_read_and_broken_ones_named(tmp_path: Path) -> None:
    values = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    path = tmp_path / "x.gz"
    head = b"\0\0\x08\x03" + struct.pack(">3I", 2, 3, 4)
    path.write_bytes(gzip.compress(head + values.tobytes()))
    assert np.array_equal(pictures._idx(path), values)
    for content in (head + values.tobytes()[:-1], b"\0\0\x0d\x03" + head[4:] + values.tobytes()):
        path.write_bytes(gzip.compress(content))
        with pytest.raises(ValueError, match=r"x\.gz: no IDX file of bytes"):
            pictures._idx(path)


def test_digits_come_with_scikit_learn() -> None:
    found = pictures.digits()
    assert len(found) == 1797
    assert found.captions[0] == "the digit 0"
    assert found.open(0, 16).size == (16, 16)
    assert max(int(np.max(file)) for file in found.files[:50]) == 255  # type: ignore[arg-type]


# --- EfficientNet -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("length", "kernel", "stride"), [(7, 3, 2), (8, 3, 2), (8, 5, 2), (9, 5, 1)])
def test_same_padding_keeps_every_place_and_puts_the_odd_pixel_at_the_end(
    length: int, kernel: int, stride: int
) -> None:
    layer = efficientnet.SameConv2d(1, 1, kernel, stride, bias=False)
    torch.nn.init.zeros_(layer.weight)
    x = torch.randn(1, 1, length, length + 4)
    with torch.no_grad():
        layer.weight[0, 0, kernel // 2, kernel // 2] = 1  # picks the middle of each window
        y = layer(x)
    assert y.shape[2:] == (-(-length // stride), -(-(length + 4) // stride))
    for axis, size in ((2, length), (3, length + 4)):
        missing = max((-(-size // stride) - 1) * stride + kernel - size, 0)
        first = kernel // 2 - missing // 2  # 0 would be the padding of PyTorch's own for odd kernels
        picked = x.index_select(axis, torch.arange(first, size, stride)[: y.shape[axis]])
        x = picked
    assert torch.equal(y, x)


def test_pixels_are_whole_pictures_in_the_networks_range() -> None:
    batch = efficientnet.pixels([Image.new("RGB", (10, 20), BLUE), Image.new("L", (5, 5), 0)])
    assert batch.shape == (2, 3, 224, 224)
    assert torch.allclose(batch[0, :, :, 0], torch.tensor(1.0))  # white beside a narrow image
    assert torch.allclose(batch[1], torch.tensor(-127 / 128))
    with pytest.raises(ValueError, match="images: expected at least one"):
        efficientnet.efficientnet_features([])
    with pytest.raises(ValueError, match="images: expected at least one"):
        image_text.image_text_score([], ["a"])
    with pytest.raises(ValueError, match="texts: expected at least one"):
        image_text.minilm_embeddings([])


# --- the real ones ------------------------------------------------------------------------------------------


@pytest.mark.packages
@pytest.mark.slow
def test_the_real_pictures_are_all_there() -> None:
    """Download 300 MB at the first run; needs npm and a Debian."""
    sizes = {
        pictures.stamps: (785, 16), pictures.emoji: (1911, 10), pictures.textiles: (2000, 3),
        pictures.fashion_mnist: (60000, 10),
    }  # fmt: skip
    for load, (count, classes) in sizes.items():
        found = load()  # type: ignore[operator]
        assert (len(found), len(found.names)) == (count, classes)
        assert all(found.captions)
        for row in range(0, count, count // 20):
            assert found.open(row, 32).size == (32, 32)
    assert len(pictures.stamps(mirrored=True)) == 796
    assert len(pictures.emoji(skin_tones=True)) == 3786
    assert len(pictures.fashion_mnist("test", 100)) == 100
    with pytest.raises(ValueError, match="count: expected 1 to 10000"):
        pictures.fashion_mnist("test", 10001)


@pytest.mark.packages
@pytest.mark.slow
def test_efficientnet_is_the_packages_own_and_knows_animals(monkeypatch: pytest.MonkeyPatch) -> None:
    """Download the weights (17 MB), the code they were published with (22 kB) and the names of the classes (3 MB)."""
    folder = downloads.packaged_file(
        "efficientnet-lite-pytorch",
        "0.1.0",
        "ce0fe869b0e829aceafc32f84275a40c0e3418d19216401b03f695f5f20cbc41",
        "efficientnet_lite_pytorch",
    )
    monkeypatch.setattr(sys, "path", [str(folder.parent), *sys.path])
    from efficientnet_lite_pytorch import EfficientNet

    ours, theirs = efficientnet.efficientnet(), EfficientNet.from_name("efficientnet-lite0").eval()
    theirs.load_state_dict(ours.state_dict())
    animals = pictures.stamps().only(["animals"])
    wanted = ("A peacock (a male peafowl).", "A badger.", "A Sumatran tiger.")
    images = [animals.open(animals.captions.index(caption)) for caption in wanted]
    with torch.no_grad():
        logits = ours(efficientnet.pixels(images))
        assert (logits - theirs(efficientnet.pixels(images))).abs().max() < 1e-4
    assert [image_text.imagenet_names()[i].split(",")[0] for i in logits.argmax(-1)] == ["peacock", "badger", "tiger"]
    assert image_text.image_text_score(images, wanted).argmax(-1).tolist() == [0, 1, 2]
    similar = efficientnet.image_similarity(images, [image.rotate(5, fillcolor="white") for image in images])
    assert similar.argmax(-1).tolist() == [0, 1, 2]
    assert similar.diag().min() > similar.fill_diagonal_(0).max()  # control: another animal is less similar
