"""Image classification: images from everywhere, batches, backbones with a new head, errors before training."""

from __future__ import annotations

import copy
import dataclasses
import json
import re
import warnings
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from torch import nn
from transformers import AutoModel

import cntlora
from cntlora.files.class_names import read_names
from cntlora.lab.recipes.vision.images import LabelledImages, open_image, read_images
from cntlora.lab.recipes.vision.models import ImageClassifier, build_classifier, new_modules, tiny_backbone
from cntlora.lab.recipes.vision.pixels import IMAGENET_MEAN, IMAGENET_STD, ImageBatches, Pixels
from cntlora.lab.recipes.vision.settings import VisionSettings, VtabSettings
from cntlora.lab.recipes.vision.task import LINEAR_LAYERS, RECIPES, load_classifier
from cntlora.lab.recipes.vision.vtab import CLASSES, TABLE_5


def picture(path: Path, seed: int, size: tuple[int, int] = (20, 16)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    g = np.random.default_rng(seed)
    Image.fromarray(g.integers(0, 256, (*size, 3), dtype=np.uint8)).save(path)
    return path


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Six photos in two folders, one of them a folder deeper."""
    root = tmp_path / "photos"
    for row in range(3):
        picture(root / "dog" / f"{row}.png", row)
        picture(root / "cat" / ("old" if row else ".") / f"{row}.png", 10 + row)
    return root


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("models") / "dinov2"
    tiny_backbone(folder)
    return str(folder)


def task_of(data: Path, model: str = "unused", **options: Any) -> Any:
    return RECIPES["vision"].make(VisionSettings(model=model, data=str(data), size=28, batch_size=4, **options))


# ----------------------------------------------------------------------------------------- where images come from


def test_class_folders(photos: Path) -> None:
    images, held_out = read_images(str(photos))
    assert held_out is None
    assert images.names == ("cat", "dog") and list(images.labels) == [0, 0, 0, 1, 1, 1]
    assert [p.name for p in images.sources] == ["0.png", "1.png", "2.png"] * 2


def test_other_files_are_left_out_with_a_warning_and_hidden_ones_without(photos: Path) -> None:
    (photos / "cat" / ".DS_Store").write_text("x")
    (photos / ".cache").mkdir()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(read_images(str(photos))[0]) == 6
    (photos / "cat" / "notes.txt").write_text("x")
    with pytest.warns(UserWarning, match=r"1 file is no image by its name and left out, .*notes\.txt"):
        assert len(read_images(str(photos))[0]) == 6


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl"])
def test_a_table_gives_the_same_as_the_folders(photos: Path, kind: str) -> None:
    images, _ = read_images(str(photos))
    files = [path.relative_to(photos).as_posix() for path in images.sources]
    rows = [{"image": f, "label": images.names[i]} for f, i in zip(files, images.labels, strict=True)]
    separator = "\t" if kind == "tsv" else ","
    lines = [separator.join(row.values()) for row in rows] if kind != "jsonl" else [json.dumps(row) for row in rows]
    table = photos / f"table.{kind}"
    table.write_text("\n".join(lines if kind == "jsonl" else [f"image{separator}label", *lines]), encoding="utf-8")
    found, _ = read_images(str(table))
    assert (list(found.sources), list(found.labels), found.names) == (images.sources, images.labels, images.names)


def test_train_and_test_folders(photos: Path, tmp_path: Path) -> None:
    root = tmp_path / "parted"
    for part, classes in (("train", ("ant", "bee", "cow")), ("test", ("bee", "cow"))):
        for name in classes:
            picture(root / part / name / "0.png", 0)
    train, held_out = read_images(str(root))
    assert held_out is not None and held_out.names == train.names == ("ant", "bee", "cow")
    assert list(held_out.labels) == [1, 2]  # by the classes of the training folder
    picture(root / "test" / "dog" / "0.png", 0)
    with pytest.raises(ValueError, match="class 'dog' is not among the classes of"):
        read_images(str(root))


@pytest.mark.parametrize("named", [True, False])
def test_a_published_data_set(monkeypatch: pytest.MonkeyPatch, photos: Path, named: bool) -> None:
    images, _ = read_images(str(photos))
    labels: list[Any] = list(images.labels) if named else [images.names[i] for i in images.labels]
    kind = datasets.ClassLabel(names=["cat", "dog"]) if named else datasets.Value("string")
    features = datasets.Features({"img": datasets.Image(), "label": kind})
    whole = datasets.Dataset.from_dict({"img": [str(p) for p in images.sources], "label": labels}, features=features)
    asked: list[tuple[Any, ...]] = []

    def load_dataset(name: str, configuration: str | None, split: str) -> Any:
        asked.append((name, configuration, split))
        return whole if split == "train" else whole.select([5, 0])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    train, held_out = read_images("some/pets:small", image="img", eval_split="test")
    assert asked == [("some/pets", "small", "train"), ("some/pets", "small", "test")]
    assert held_out is not None
    assert train.names == held_out.names == ("cat", "dog") and list(held_out.labels) == [1, 0]
    expected = np.asarray(open_image(images.sources[5]))
    assert np.array_equal(np.asarray(held_out.load(held_out.sources[0], 8)), expected)
    with pytest.raises(ValueError, match="no column 'image'; its columns are: img, label"):
        read_images("some/pets")


def test_pictures_are_upright_and_white_where_transparent(tmp_path: Path) -> None:
    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    clear.putpixel((0, 0), (255, 0, 0, 255))
    clear.save(tmp_path / "clear.png")
    pixels = np.asarray(open_image(tmp_path / "clear.png"))
    assert pixels[0, 0].tolist() == [255, 0, 0] and pixels[1, 1].tolist() == [255, 255, 255]
    lying = Image.new("RGB", (6, 3))
    exif = lying.getexif()
    exif[0x0112] = 6  # turned by a quarter
    lying.save(tmp_path / "lying.jpg", exif=exif)
    assert open_image(tmp_path / "lying.jpg").size == (3, 6)


# ---------------------------------------------------------------------------------------------------------- errors


def _broken(root: Path) -> Path:
    (root / "cat" / "9.png").write_bytes(b"not an image")
    return root


def _cut_off(root: Path) -> Path:
    whole = picture(root / "cat" / "9.png", 5, (200, 200)).read_bytes()
    (root / "cat" / "9.png").write_bytes(whole[: len(whole) // 2])
    return root


def _one_class(root: Path) -> Path:
    for file in root.glob("dog/*"):
        file.unlink()
    (root / "dog").rmdir()
    return root


def _no_pictures(root: Path) -> Path:
    (root / "emu").mkdir()
    return root


def _single(root: Path) -> Path:
    picture(root / "emu" / "0.png", 0)
    return root


def _table(root: Path, text: str) -> Path:
    (root / "table.csv").write_text(text, encoding="utf-8")
    return root / "table.csv"


BAD_DATA = {
    "broken": (_broken, r"cat/9\.png: expected an image, but cannot be read .*replace or remove it"),
    "cut off": (_cut_off, r"cat/9\.png: expected an image, but cannot be read"),
    "one class": (_one_class, "expected at least two classes, got only 'cat'"),
    "folder without images": (_no_pictures, r"emu: no image is in it"),
    "class with one image": (_single, "two images of each class, .* but class 'emu' has 1"),
    "nothing there": (lambda root: root / "nowhere/", "nowhere: there is no such folder or file; expected a folder"),
    "no classes": (lambda root: root / "cat" / "old", "old: expected a subfolder of images for each class"),
    "a file": (lambda root: root / "cat" / "0.png", r"0\.png: expected a folder, or a file that ends in \.csv"),
    "missing table": (lambda root: root / "table.csv", r"table\.csv: there is no such folder or file"),
    "missing column": (lambda root: _table(root, "file,label\na.png,x\n"), "no column 'image'; its columns are: file"),
    "missing file": (
        lambda root: _table(root, "image,label\ncat/0.png,x\nno.png,y\n"),
        r"row 2: there is no file",
    ),
    "empty label": (lambda root: _table(root, "image,label\ncat/0.png,\n"), "row 1 has nothing in column 'label'"),
}


@pytest.mark.parametrize("case", BAD_DATA)
def test_bad_data_is_one_error_before_training(photos: Path, backbone: str, case: str) -> None:
    make, message = BAD_DATA[case]
    task_of(photos, backbone, eval_size=2).check()  # control: it was right before
    with pytest.raises(ValueError, match=message) as caught:
        task_of(make(photos), backbone, eval_size=2).check()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 30}, "task.size: expected a multiple of the model's patches of 14, got 30; take 28"),
        ({"feature_layer": 4}, "task.feature_layer: expected 1 to 3"),
        ({"model": "nowhere/"}, "model 'nowhere/': cannot be loaded"),
        ({"model": "sample:clip"}, "the sample for images is 'sample:dinov2'"),
        ({"train_size": 1}, "train_size=1 is less than one for each of 2 classes"),
        ({"eval_size": 100}, "photos: 6 images, so task.eval_size=100 leaves nothing to train on; set it to a fifth"),
        ({"eval_size": 5}, "task.eval_size=5 leaves 1 to train on, less than one for each of 2 classes; set it"),
        ({"eval_size": 1}, "less than one for each of 2 classes; set it to a fifth of the images or so: --set task"),
    ],
)
def test_settings_that_do_not_fit_model_or_data(
    photos: Path, backbone: str, options: dict[str, Any], message: str
) -> None:
    task = task_of(photos, backbone, eval_size=2)
    with pytest.raises(ValueError, match=re.escape(message)):
        dataclasses.replace(task, settings=dataclasses.replace(task.settings, **options)).check()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": ""}, "task.model: task 'vision' needs it"),
        ({"pooling": "clss"}, "did you mean 'cls'"),
        ({"augment": "flop"}, "did you mean 'flip'"),
        ({"mean": (0.5,)}, "task.mean: expected three numbers"),
        ({"batch_size": 0}, "task.batch_size: expected at least 1"),
        ({"eval_size": 0.0}, "task.eval_size"),
    ],
)
def test_wrong_settings(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        VisionSettings(**{"model": "m", "data": "d", **options})


# --------------------------------------------------------------------------------------------------------- batches


class Counter:
    """Opens images and counts how often."""

    def __init__(self) -> None:
        self.opened: list[Path] = []

    def __call__(self, source: Any, size: int) -> Image.Image:
        self.opened.append(source)
        return open_image(source, size)


def batches_of(photos: Path, seed: int | None = 0, cache_mib: int = 1, **options: Any) -> tuple[ImageBatches, Counter]:
    counter = Counter()
    images = dataclasses.replace(read_images(str(photos))[0], load=counter)
    return ImageBatches(Pixels(images, 14, cache_mib), 4, seed, **options), counter


def read(batches: ImageBatches) -> tuple[torch.Tensor, list[int]]:
    parts = list(batches)
    assert len(parts) == len(batches)
    return torch.cat([b["pixel_values"] for b in parts]), torch.cat([b["labels"] for b in parts]).tolist()


def test_pixels_are_resized_bicubic_and_normalised(photos: Path) -> None:
    values, labels = read(batches_of(photos, seed=None)[0])
    assert labels == [0, 0, 0, 1, 1, 1]
    image = Image.open(photos / "dog" / "0.png").resize((14, 14), Image.Resampling.BICUBIC)
    expected = (np.asarray(image) / 255 - IMAGENET_MEAN) / IMAGENET_STD
    np.testing.assert_allclose(values[3].permute(1, 2, 0), expected, atol=1e-5)


@pytest.mark.parametrize("augment", ["none", "flip", "crop"])
def test_every_pass_is_new_and_the_same_for_a_seed(photos: Path, augment: str) -> None:
    one, two = (batches_of(photos, augment=augment)[0] for _ in range(2))
    passes = [read(one)[0] for _ in range(3)]
    for first in passes:
        assert torch.equal(first, read(two)[0])
    assert not torch.equal(passes[0], passes[1])
    assert not torch.equal(passes[0], read(batches_of(photos, seed=1, augment=augment)[0])[0])
    two.set_epoch(1)
    assert torch.equal(passes[1], read(two)[0])


def test_augmentation_changes_pixels_and_nothing_else(photos: Path) -> None:
    plain, _ = read(batches_of(photos)[0])
    flipped, _ = read(batches_of(photos, augment="flip")[0])
    cropped, _ = read(batches_of(photos, augment="crop")[0])
    same = [torch.equal(a, b) for a, b in zip(plain, flipped, strict=True)]
    mirrored = [torch.equal(a.flip(-1), b) for a, b in zip(plain, flipped, strict=True)]
    assert any(same) and any(mirrored) and all(a != b for a, b in zip(same, mirrored, strict=True))
    assert cropped.shape == plain.shape and not torch.equal(cropped, flipped)
    low, high = ((torch.tensor(v) - torch.tensor(IMAGENET_MEAN)) / torch.tensor(IMAGENET_STD) for v in (0.0, 1.0))
    assert (cropped >= low.view(3, 1, 1) - 1e-6).all() and (cropped <= high.view(3, 1, 1) + 1e-6).all()


def test_the_cache_changes_nothing_and_is_bounded(photos: Path) -> None:
    cached, once = batches_of(photos)
    lazy, always = batches_of(photos, cache_mib=0)
    for _ in range(2):
        assert torch.equal(read(cached)[0], read(lazy)[0])
    assert len(once.opened) == 6 and len(always.opened) == 12


def test_split_keeps_shares_and_needs_no_global_generator(photos: Path) -> None:
    for row in range(3, 12):
        picture(photos / "dog" / f"{row}.png", row)
    images, _ = read_images(str(photos))
    torch.manual_seed(0)
    train, held_out = images.split(5, seed=0)
    assert sorted(held_out.labels) == [0, 1, 1, 1, 1] and len(train) == 10
    assert not set(train.sources) & set(held_out.sources)
    torch.manual_seed(1)
    assert images.split(5, seed=0)[1].sources == held_out.sources != images.split(5, seed=1)[1].sources


def test_a_limited_set_keeps_shares_and_every_class(photos: Path) -> None:
    picture(photos / "emu" / "0.png", 0)
    for row in range(3, 12):
        picture(photos / "dog" / f"{row}.png", row)
    images, _ = read_images(str(photos))
    assert sorted(images.limited(5, 0).labels) == [0, 1, 1, 1, 2] and images.limited(None, 0) is images
    assert sorted(images.limited(3, 0).labels) == [0, 1, 2]  # in proportion, emu would have none
    assert images.limited(5, 0).sources == images.limited(5, 0).sources != images.limited(5, 1).sources


# --------------------------------------------------------------------------------------------------------- VTAB-1K


def vtab(tmp_path: Path, **options: Any) -> Any:
    settings = VtabSettings(model="facebook/dinov2-giant", data="unused", dataset="eurosat", **options)
    return RECIPES["vtab"].make(RECIPES["vtab"].tiny(settings, tmp_path))


def test_vtab_reads_the_lists_of_its_part(tmp_path: Path) -> None:
    root = tmp_path / "data" / "eurosat"
    task = vtab(tmp_path)
    (root / "train800.txt").write_text("images/1.png 9\nimages/0.png 0\n", encoding="utf-8")
    train, held_out = task.images
    assert len(train.names) == 10 and (len(train), len(held_out)) == (12, 4)
    settings = dataclasses.replace(task.settings, part="val")
    assert [p.name for p in dataclasses.replace(task, settings=settings).images[0].sources] == ["1.png", "0.png"]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("images/0.png 10", "line 1: expected a file and a class below 10, got 'images/0.png 10'"),
        ("images/0.png", "line 1: expected a file and a class below 10"),
        ("images/0.png 1\nimages/99.png 1", "line 2: there is no file"),
        ("", "the list is empty"),
        (None, "there is no such file; expected lines such as"),
    ],
)
def test_vtab_errors_name_list_and_line(tmp_path: Path, lines: str | None, message: str) -> None:
    task = vtab(tmp_path)
    path = tmp_path / "data" / "eurosat" / "test.txt"
    path.unlink() if lines is None else path.write_text(lines, encoding="utf-8")
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        task.check()
    assert str(path) in str(caught.value)


def test_vtab_names() -> None:
    assert len(CLASSES) == 19 and len(TABLE_5) == 14 and set(TABLE_5.values()) <= set(CLASSES)
    with pytest.raises(ValueError, match="did you mean 'caltech101'"):
        VtabSettings(model="m", data="d", dataset="caltech")
    with pytest.raises(ValueError, match=r"there is no such folder; expected d to hold a folder for each task"):
        RECIPES["vtab"].make(VtabSettings(model="m", data="d")).images  # noqa: B018


# ---------------------------------------------------------------------------------------------------------- models


def build(model: str, pooling: str = "cls", layer: int | None = None, seed: int = 0, std: float = 2e-5) -> Any:
    return build_classifier(model, ("a", "b", "c"), pooling=pooling, feature_layer=layer, head_std=std, seed=seed)


@pytest.mark.parametrize("pooling", ["cls", "own"])
def test_the_new_head_is_drawn_as_in_the_paper(backbone: str, pooling: str) -> None:
    state = torch.random.get_rng_state()
    models = [build(backbone, pooling, seed=seed) for seed in (0, 0, 1)]
    assert torch.equal(torch.random.get_rng_state(), state)
    (name,) = new_modules(backbone, pooling)
    heads = [model.get_submodule(name) for model in models]
    assert torch.equal(heads[0].weight, heads[1].weight) and not torch.equal(heads[0].weight, heads[2].weight)
    assert heads[0].weight.std().item() == pytest.approx(2e-5, rel=0.25) and not heads[0].bias.any()
    assert heads[0].out_features == 3


def test_poolings_are_what_they_say(backbone: str) -> None:
    images = torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    plain = AutoModel.from_pretrained(backbone).eval()
    with torch.no_grad():
        hidden = plain(pixel_values=images, output_hidden_states=True)
        expected = {
            ("cls", None): hidden.last_hidden_state[:, 0],
            ("mean", None): hidden.last_hidden_state[:, 1:].mean(1),
            ("pooler", None): hidden.pooler_output,
            ("cls", 2): plain.layernorm(hidden.hidden_states[2])[:, 0],
        }
        for (pooling, layer), features in expected.items():
            model = build(backbone, pooling, layer, std=1.0).eval()
            torch.testing.assert_close(model(images).logits, model.head(features))
    assert not torch.allclose(expected["cls", None], expected["cls", 2], atol=1e-2)  # control


def test_loss_is_the_mean_cross_entropy(backbone: str) -> None:
    model, labels = build(backbone, std=1.0).eval(), torch.tensor([0, 2])
    output = model(torch.randn(2, 3, 28, 28), labels)
    torch.testing.assert_close(output.loss, nn.functional.cross_entropy(output.logits, labels))
    assert model(torch.randn(2, 3, 28, 28)).loss is None


@pytest.mark.parametrize("gated", [False, True])
def test_lora_adapts_every_linear_layer_but_the_head(tmp_path: Path, gated: bool) -> None:
    tiny_backbone(tmp_path, gated)
    model = build(str(tmp_path))
    linear = {n for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    found = {name for name in linear if re.fullmatch(LINEAR_LAYERS.removeprefix("re:"), name)}
    assert found == linear - {"head"} and len(found) == 3 * (7 if gated else 6)
    older = "encoder.layer.0.attention.attention.query", "encoder.layer.0.attention.output.dense"
    assert all(re.fullmatch(LINEAR_LAYERS.removeprefix("re:"), name) for name in older)


def adapted(task: Any, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    targets = task.targets[0].removeprefix("re:")
    config = LoraConfig(
        r=2, lora_alpha=4, target_modules=targets, modules_to_save=list(task.modules_to_save), bias="all"
    )
    return get_peft_model(task.build_model(seed), config)


@pytest.mark.parametrize("pooling", ["cls", "own"])
def test_initialised_trained_saved_and_loaded(tmp_path: Path, pooling: str) -> None:
    settings = VisionSettings(model="any/dinov2-giant", data="unused", pooling=pooling, head_std=0.1)
    task = RECIPES["vision"].make(RECIPES["vision"].tiny(settings, tmp_path))
    task.check()
    model = adapted(task)
    start = task.evaluate(model, task.eval_batches())
    cntlora.initialize(model, task.init_batches(0), cntlora.InitConfig(method="self", num_batches=2), progress=False)
    assert task.evaluate(model, task.eval_batches()) == pytest.approx(start, abs=1e-4)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    for batch in [batch for _ in range(4) for batch in task.train_batches(0)]:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    scores = task.evaluate(model, task.train_batches(0))
    assert scores["loss"] < 0.6 < task.evaluate(adapted(task), task.train_batches(0))["loss"]

    task.save(model, tmp_path / "adapter")
    text = (tmp_path / "adapter" / "vision.json").read_text()
    assert str(tmp_path) not in text and json.loads(text)["model"] == "model"
    with pytest.raises(ValueError, match="was a local folder .model.; give the folder as model="):
        load_classifier(tmp_path / "adapter")
    loaded = load_classifier(tmp_path / "adapter", task.settings.model)
    files = task.images[1].sources
    batch = next(iter(task.eval_batches()))
    with torch.no_grad():
        expected = model.eval()(batch["pixel_values"]).logits.softmax(-1)
        base = task.build_model(0).eval()(batch["pixel_values"]).logits.softmax(-1)
    assert loaded.names == ("cat", "dog")
    assert task.describe() == "classes: 0 = cat, 1 = dog (6, 6 images); 4 images held out"
    assert read_names(tmp_path / "adapter") == ("cat", "dog") and model.config.id2label == {0: "cat", 1: "dog"}
    torch.testing.assert_close(loaded.probabilities(files), expected)
    assert not torch.allclose(base, expected, atol=1e-2)  # control
    with pytest.raises(ValueError, match=r"there is no vision\.json"):
        load_classifier(tmp_path)


def test_the_metrics_are_known_without_model_and_data(photos: Path) -> None:
    task = task_of(photos / "nowhere")
    assert task.main_metric in task.metrics and task.peft_type is None
    assert isinstance(copy.copy(task), type(task)) and task.modules_to_save == ("head",)


def test_an_images_only_model_class_needs_no_class_token(tmp_path: Path) -> None:
    from transformers import ConvNextConfig, ConvNextModel

    torch.manual_seed(0)
    config = ConvNextConfig(hidden_sizes=[4, 8], depths=[1, 1], num_stages=2, patch_size=2, image_size=8)
    ConvNextModel(config).save_pretrained(tmp_path)
    model = build(str(tmp_path), "pooler")
    assert isinstance(model, ImageClassifier) and model(torch.randn(2, 3, 8, 8)).logits.shape == (2, 3)


@pytest.mark.slow
@pytest.mark.packages
def test_dinov2_and_stamps_from_packages() -> None:
    settings = VisionSettings(model="sample:dinov2", data="sample:stamps", size=56, feature_layer=11, eval_size=64)
    task = RECIPES["vision"].make(settings)
    task.check()
    assert len(task.images[0].names) == 16
    model = task.build_model(0)
    assert len(model.backbone.encoder.layer) == 11
    assert model(**next(iter(task.train_batches(0)))).loss.item() == pytest.approx(np.log(16), abs=0.05)


def test_labelled_images_need_two_classes() -> None:
    with pytest.raises(ValueError, match="x: expected at least two classes, got none"):
        LabelledImages([], [], (), "x")


def test_what_macos_puts_into_archives_is_no_class(tmp_path: Path) -> None:
    for name in ("cat", "dog", "__MACOSX"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (8, 8)).save(tmp_path / name / "1.png")
    assert read_images(str(tmp_path))[0].names == ("cat", "dog")
