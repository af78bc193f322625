"""DreamBooth: the loss, the batches, what is adapted, files that diffusers reads, clear errors. Tiny random models."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from peft import LoraConfig, get_peft_model
from PIL import Image

from cntlora import InitConfig, initialize
from cntlora.lab.experiments.sections import LoraSettings, SweepSettings
from cntlora.lab.experiments.settings import Experiment
from cntlora.lab.experiments.user_data import check_first
from cntlora.lab.recipes.diffusion import small_pictures as sp
from cntlora.lab.recipes.diffusion import tiny
from cntlora.lab.recipes.diffusion.data import as_pixels, class_files, generate, open_photo, photo_files
from cntlora.lab.recipes.diffusion.denoisers import Denoiser, build_denoiser, encode_pictures, load_pipeline
from cntlora.lab.recipes.diffusion.metrics import measures, similarity, text_fidelity
from cntlora.lab.recipes.diffusion.pixel_pipeline import patch_side, to_pixels, to_positions
from cntlora.lab.recipes.diffusion.prompts import PROMPTS, filled
from cntlora.lab.recipes.diffusion.settings import TARGETS, DreamboothSettings
from cntlora.lab.recipes.diffusion.small_model import Training, rate
from cntlora.lab.recipes.diffusion.task import DreamboothTask

MODELS = {"sd": "stable-diffusion-v1-5", "sdxl": "stable-diffusion-xl", "pixel": "sample:small-diffusion"}
PROMPT = "a sks dog"


def settings(**changed: Any) -> DreamboothSettings:
    words = {"model": "m", "data": "photos", "instance_prompt": PROMPT, "class_prompt": "a dog", **changed}
    return DreamboothSettings(**words)


@pytest.fixture(scope="module", params=MODELS)
def task(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> DreamboothTask:
    """A task of each family."""
    folder = tmp_path_factory.mktemp(request.param)
    return DreamboothTask(tiny.tiny_settings(settings(model=MODELS[request.param]), folder))


@pytest.fixture(scope="module")
def sd(tmp_path_factory: pytest.TempPathFactory) -> DreamboothTask:
    """A task of Stable Diffusion's layout."""
    return DreamboothTask(tiny.tiny_settings(settings(), tmp_path_factory.mktemp("one")))


def adapted(task: DreamboothTask, rank: int = 2) -> Any:
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=TARGETS.removeprefix("re:"))
    return get_peft_model(task.build_model(0), config)  # type: ignore[arg-type]


def most(a: list[Image.Image], b: list[Image.Image]) -> int:
    """The largest difference of two lists of images, in 1/255."""
    return max(int(np.abs(np.asarray(x, np.int16) - np.asarray(y, np.int16)).max()) for x, y in zip(a, b, strict=True))


# --- before anything is loaded


def test_a_rank_above_the_smallest_layer_needs_no_pipeline(task: DreamboothTask) -> None:
    """Found by the headers of the files; the tiny pipeline that is loaded says that it is the smallest layer."""
    layers = [layer for layer in adapted(task).modules() if hasattr(layer, "lora_A")]
    smallest = min(min(layer.base_layer.weight.shape) for layer in layers)
    fresh = DreamboothTask(task.settings)

    def check(rank: int, *methods: str) -> None:
        sweep = SweepSettings(methods=methods or ("lora", "descent"))
        check_first(Experiment(task=task.settings, lora=LoraSettings(rank=rank), sweep=sweep), fresh)

    check(smallest)
    with pytest.raises(ValueError, match=rf"rank: {smallest + 1} is above min\(in, out\) = {smallest} of \S+"):
        check(smallest + 1)
    with pytest.raises(ValueError, match=r"is above min\(in, out\)/2"):  # it takes twice as many directions
        check(smallest, "lora_ga")
    check(smallest + 1, "self+vas")  # its ranks fit by themselves
    check(smallest + 1, "full")
    elsewhere = Experiment(task=dataclasses.replace(task.settings, model="./nowhere"), sweep=SweepSettings())
    with pytest.raises(ValueError, match="there is no such folder"):
        check_first(elsewhere, fresh)
    assert "_pipeline" not in vars(fresh) and "_pipeline" in vars(task)  # the control: what is loaded stays there


# --- the loss and the batches


def test_loss_is_that_of_dreambooth(task: DreamboothTask) -> None:
    model = task.build_model(0).eval()
    batch = next(iter(task.train_batches(0)))
    with torch.no_grad():
        output = model(**batch)
    errors = (output.prediction - batch["target"]).square().mean(dim=(1, 2, 3))
    assert len(errors) == 2
    torch.testing.assert_close(output.loss, errors[0] + 0.1 * errors[1])
    assert abs(float(output.loss - errors.sum())) > 1e-3  # the control: without the weight it is another number


def test_batches_follow_seed_and_pass(sd: DreamboothTask) -> None:
    def passes(seed: int, first: int = 0) -> list[dict[str, torch.Tensor]]:
        batches = sd.train_batches(seed)
        assert len(batches) == len(list(batches)) == 4
        batches.set_epoch(first)
        return list(batches)

    def same(a: list[dict[str, torch.Tensor]], b: list[dict[str, torch.Tensor]]) -> bool:
        return all(torch.equal(x[key], y[key]) for x, y in zip(a, b, strict=True) for key in x)

    assert same(passes(0), passes(0))
    assert not same(passes(0), passes(1))
    assert not same(passes(0), passes(0, first=1))
    reread = sd.train_batches(0)
    list(reread)
    assert same(list(reread), passes(0, first=1))  # reading again is the next pass


def test_initialisation_reads_clean_latents_at_step_0_or_noised_ones(sd: DreamboothTask) -> None:
    photos = sd.subject.photos
    clean = next(iter(sd.init_batches(0)))
    assert any(torch.equal(clean["latents"][0], photo) for photo in photos)
    assert clean["timesteps"].tolist() == [0, 0]
    noised_task = DreamboothTask(dataclasses.replace(sd.settings, init_latents="noised", init_photos=1))
    noised = list(noised_task.init_batches(0))
    assert len(noised) == 1
    assert not torch.equal(noised[0]["latents"][0], photos[0])
    assert noised[0]["timesteps"].max() > 0


def test_without_prior_there_are_photos_only(sd: DreamboothTask, tmp_path: Path) -> None:
    folder = tmp_path / "class"
    alone = DreamboothTask(dataclasses.replace(sd.settings, prior_weight=0.0, class_folder=str(folder)))
    assert next(iter(alone.train_batches(0)))["weights"].tolist() == [1.0]
    assert not folder.exists()


# --- what is adapted


def test_lora_sits_on_attention_and_nothing_else(task: DreamboothTask) -> None:
    model = adapted(task)
    names = [name for name, module in model.named_modules() if hasattr(module, "lora_A") and hasattr(module, "scaling")]
    attention = ("to_q", "to_k", "to_v", "to_out.0", "q_proj", "k_proj", "v_proj", "out_proj")
    bert = ("query", "key", "value", "attention.output.dense")
    assert all(name.endswith((*attention, *bert)) for name in names)
    parts = [name for name, _ in task.build_model(0).named_children()]
    # 2 transformer blocks down, mid, 2 up; self- and cross-attention; 4 each; 2 layers of text × 4
    expected = sum(8 * 4 if part == "unet" else 8 for part in parts)
    assert len(names) == expected
    assert not any("vae" in name for name, _ in model.named_modules())
    assert any("ff.net" in name for name, _ in model.named_modules())  # the control: there is more that could be


def test_models_are_copies(sd: DreamboothTask) -> None:
    one, other = sd.build_model(0), sd.build_model(0)
    next(one.parameters()).data.add_(1)
    assert not torch.equal(next(one.parameters()), next(other.parameters()))
    assert isinstance(other, Denoiser)
    assert other.pipeline.unet is other.unet


# --- files


@pytest.mark.parametrize("method", ["lora", "self"])
def test_diffusers_reads_what_save_writes(task: DreamboothTask, method: str, tmp_path: Path) -> None:
    model = adapted(task, rank=4)
    if method == "self":  # base offset: rank 2r in the file; VAS: another rank at every site
        config = InitConfig(method="self", num_batches=2, adaptive_ranks=True)
        initialize(model, task.init_batches(0), config, progress=False)
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.5 * torch.randn_like(parameter)
    ours = task._generate(model, [PROMPT] * 2, [1, 2])
    task.save(model, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["pytorch_lora_weights.safetensors"]
    pipeline = load_pipeline(task.settings.model)
    pristine = generate(pipeline, [PROMPT] * 2, [1, 2], steps=2, guidance=7.5)
    pipeline.load_lora_weights(str(tmp_path))
    theirs = generate(pipeline, [PROMPT] * 2, [1, 2], steps=2, guidance=7.5)
    assert most(ours, theirs) <= 1
    assert most(ours, pristine) > 20


def test_class_pictures_are_made_once_and_completed(
    sd: DreamboothTask, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pipeline = load_pipeline(sd.settings.model)
    options: dict[str, Any] = {"steps": 1, "guidance": 1.0, "batch_size": 2}
    files = class_files(pipeline, "a dog", 3, tmp_path, **options)
    before = [open_photo(path) for path in files]
    assert "generating 3 images of the class for 'a dog', once; they are kept in" in capsys.readouterr().err
    marked = Image.new("RGB", before[0].size, "red")
    marked.save(files[0])
    files[1].unlink()
    again = [open_photo(path) for path in class_files(pipeline, "a dog", 3, tmp_path, **options)]
    assert "generating 1 image of the class" in capsys.readouterr().err
    class_files(pipeline, "a dog", 3, tmp_path, **options)
    assert capsys.readouterr().err == ""  # nothing to wait for
    assert most([again[0]], [marked]) == 0  # kept
    assert most(again[1:], before[1:]) == 0  # the missing one is drawn again as it was
    assert most([before[0]], [before[1]]) > 0


# --- scores and samples


def test_scores_are_those_that_were_promised_and_leave_all_as_found(task: DreamboothTask) -> None:
    model = adapted(task).train()
    state = torch.get_rng_state()
    scores = task.evaluate(model, task.eval_batches())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training for module in model.modules())
    assert set(scores) == set(task.metrics)
    assert task.main_metric == "dino"
    assert task.evaluate(model, task.eval_batches()) == scores


def test_samples_are_the_same_for_the_same_model(sd: DreamboothTask, tmp_path: Path) -> None:
    model = adapted(sd)
    for name in "ab":
        (tmp_path / name).mkdir()
    first, second = (sd.sample(model, 0, tmp_path / name) for name in "ab")
    assert first == second
    assert first[0]["name"] == "a sks dog in the jungle"
    assert all(
        (tmp_path / "a" / row["file"]).read_bytes() == (tmp_path / "b" / row["file"]).read_bytes() for row in first
    )


def test_similarity_is_a_mean_cosine(sd: DreamboothTask) -> None:
    features = measures(sd.settings.dino, "", ())["dino"]
    noise, white = sd.subject.pictures[0], Image.new("RGB", (16, 16), "white")
    photos = features([noise])
    assert similarity(features, [noise], photos) == pytest.approx(1.0)
    assert similarity(features, [noise, white], photos) < 0.999
    assert -1 <= text_fidelity(sd.settings.clip, [noise], ["a dog"]) <= 1


def test_prompts_are_25_of_a_kind_and_name_the_subject() -> None:
    for kind in ("object", "live"):
        assert len(set(PROMPTS[kind])) == 25
    assert filled("a {} in the snow", "sks dog") == "a sks dog in the snow"
    assert filled("a red {}", "dog") == "a red dog"
    assert filled("a {} in the snow", "apple") == "an apple in the snow"
    assert settings().words == "sks dog"
    assert settings().class_words == "dog"


# --- a user's own data


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"instance_prompt": "a photo of a dog"}, "identifier 'sks'"),
        ({"instance_prompt": "a photo of asks dog"}, "identifier 'sks'"),
        ({"class_prompt": "a sks dog"}, "class_prompt"),
        ({"class_prompt": " "}, "class_prompt"),
        ({"data": ""}, "task.data"),
        ({"prompts": ("in the snow",)}, "{}"),
        ({"kind": "alive"}, "live"),
        ({"init_latents": "noise"}, "noised"),
        ({"prior_weight": float("nan")}, "prior_weight"),
    ],
)
def test_settings_say_what_is_wrong(changed: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        settings(**changed)
    settings()  # the control


def test_bad_photos_are_named_before_training(tmp_path: Path) -> None:
    def check(folder: Path) -> None:
        DreamboothTask(settings(data=str(folder))).check()

    with pytest.raises(ValueError, match="no such folder"):
        check(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no image is in it"):
        check(tmp_path / "empty")
    tiny.noise_photos(tmp_path / "photos", 5)
    check(tmp_path / "photos")
    whole = (tmp_path / "photos" / "3.png").read_bytes()
    (tmp_path / "photos" / "3.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"3\.png: expected an image, but cannot be read"):
        check(tmp_path / "photos")
    with pytest.raises(ValueError, match="sample 'cat' is not known"):
        photo_files("sample:cat")


def test_photos_of_any_shape_and_mode_fit(tmp_path: Path) -> None:
    Image.new("RGBA", (40, 20), (255, 0, 0, 0)).save(tmp_path / "a.png")
    Image.new("L", (20, 40), 128).save(tmp_path / "b.jpg")
    pixels = as_pixels([open_photo(path) for path in photo_files(str(tmp_path))], 16)
    assert pixels.shape == (2, 3, 16, 16)
    assert pixels[0].min() == 1  # what is transparent is white
    assert pixels[1].abs().max() < 0.02


def test_models_that_are_not_covered_are_refused(tmp_path: Path, sd: DreamboothTask) -> None:
    with pytest.raises(ValueError, match="cannot be loaded"):
        load_pipeline(str(tmp_path))
    with pytest.raises(ValueError, match="does not train"):
        build_denoiser(sd)


# --- pixel space and the small model


def test_pixels_and_positions_are_the_same_numbers() -> None:
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(to_pixels(to_positions(x, 12)), x)
    assert torch.equal(to_positions(x, 3), x)
    assert patch_side(48) == 4
    with pytest.raises(ValueError, match="in_channels"):
        patch_side(4)


def test_latents_are_scaled_as_the_pipeline_decodes_them(sd: DreamboothTask) -> None:
    pipeline = load_pipeline(sd.settings.model)
    pixels = torch.rand(1, 3, 16, 16) * 2 - 1
    latents = encode_pictures(pipeline, pixels)
    with torch.no_grad():
        expected = pipeline.vae.encode(pixels).latent_dist.mode()
    torch.testing.assert_close(latents / pipeline.vae.config.scaling_factor, expected)
    assert latents.shape == (1, 4, 8, 8)


def test_backgrounds_and_captions_agree() -> None:
    names = sp.background_names()
    assert len(names) == len(set(names)) == len(sp.COLOURS) + len(sp.SCENES)
    red = sp.background("on a red background", 8)
    assert red.getpixel((0, 0)) == sp.COLOURS["red"]
    item = sp.Item(Image.new("RGBA", (10, 10), (0, 0, 255, 255)), "a blue square", "a square", "drawing")
    picture = sp.composed(item.picture, red, scale=0.5)
    assert picture.getpixel((4, 4)) == (0, 0, 255)
    assert picture.getpixel((0, 0)) == sp.COLOURS["red"]
    _, caption = sp.drawn(item, np.random.default_rng(0), 8)
    assert caption.startswith("a drawing of a ")
    assert any(caption.endswith(name) for name in names)
    assert sp.phrase("A “Fuji” apple. It is red.") == "a fuji apple"


@pytest.fixture
def own_accelerator() -> Iterator[None]:
    """accelerate holds one state a process, which a training in another precision may have left behind."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.usefixtures("own_accelerator")
def test_small_model_goes_on_where_it_was_stopped(tmp_path: Path) -> None:
    def pipeline() -> Any:
        folder = tmp_path / "tiny"
        if not folder.is_dir():
            tiny.pixel(folder)
        return load_pipeline(str(folder))

    def step(training: Training, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        pixels = torch.rand(2, 3, 16, 16, generator=generator) * 2 - 1
        training.step(pixels, torch.ones(2, 4, tiny.WIDTH), generator)

    first = Training(pipeline(), tmp_path, minutes=1.0)
    for seed in range(2):
        step(first, seed)
    first.checkpoint()
    second = Training(pipeline(), tmp_path, minutes=1.0)
    assert second.progress.steps == 2
    assert second.progress.losses == first.progress.losses
    fresh = Training(pipeline(), tmp_path / "elsewhere", minutes=1.0)
    for training in (first, second, fresh):
        training.progress.seconds = 6.0  # the learning rate follows the clock
        step(training, 2)
    one, two, other = (next(t.pipeline.unet.parameters()) for t in (first, second, fresh))
    torch.testing.assert_close(one, two)
    assert not torch.allclose(one, other)  # the control: a new run is elsewhere


def test_the_rate_rises_and_falls_to_nearly_nothing() -> None:
    values = [rate(done / 100) for done in range(101)]
    assert values[0] < 0.02
    assert max(values) == pytest.approx(1.0, abs=0.01)
    assert values[-1] == pytest.approx(0.02)


@pytest.mark.slow
@pytest.mark.packages
def test_subjects_are_held_out_of_pretraining(tmp_path: Path) -> None:
    found = sp.items()
    assert len(found) > 500
    rows = np.stack([np.asarray(sp.composed(item.picture, sp.background("at night"), scale=1.0)) for item in found])
    for stem in sp.SUBJECTS:
        assert len(photo_files(f"sample:{stem}")) == 5
        stamp = next(file for file in sp.stamps().files if isinstance(file, Path) and file.stem == stem)
        alone = np.asarray(sp.composed(sp._opened(stamp), sp.background("at night"), scale=1.0), np.int16)
        assert np.abs(rows.astype(np.int16) - alone).mean(axis=(1, 2, 3)).min() > 1  # none of the images is the stamp
