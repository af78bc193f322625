"""Captioning: own files, batches whose loss is the caption's, generation, scores, targets, errors before training."""

from __future__ import annotations

import dataclasses
import io
import json
import re
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from transformers import Dinov2Config

from cntlora.lab.recipes.captioning.batches import full_prompt, prompts_of, with_captions
from cntlora.lab.recipes.captioning.data import split_rows
from cntlora.lab.recipes.captioning.parts import _shorter
from cntlora.lab.recipes.captioning.scenes import COLOURS, Scene, views
from cntlora.lab.recipes.captioning.scores import Sentences, generate, recall
from cntlora.lab.recipes.captioning.small_model import Alignment, train_projector
from cntlora.lab.recipes.captioning.task import RECIPES, CaptioningSettings, CaptioningTask, caption_targets
from cntlora.lab.recipes.captioning.tiny import tiny_vlm, write_captions
from cntlora.lab.recipes.text.tables import IGNORED

KINDS = {"small-vlm": "aya_vision", "llava": "llava", "glm": "llava"}


@pytest.fixture(scope="module", params=KINDS)
def task(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> CaptioningTask:
    """The task as `--smoke` runs it, for each architecture."""
    return smoke_task(request.param, tmp_path_factory.mktemp("smoke"))


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> CaptioningTask:
    return smoke_task("llava", tmp_path_factory.mktemp("one"))


def smoke_task(model: str, folder: Path) -> CaptioningTask:
    settings = CaptioningSettings(model=f"someone/{model}", data="captions.jsonl", concept="concept")
    made: CaptioningTask = RECIPES["captioning"].make(RECIPES["captioning"].tiny(settings, folder))
    return made


def own_task(data: Path, **options: Any) -> CaptioningTask:
    """A task on the user's files; the model is not needed until the prompt is checked."""
    options = {"model": "none", "prompt": "<image> Describe it.", "eval_size": 2, "sentences": "", **options}
    return CaptioningTask(CaptioningSettings(data=str(data), **options))


@pytest.fixture
def captions(tmp_path: Path) -> Path:
    return Path(
        write_captions(
            tmp_path / "captions.jsonl", "<*>", {"Product Name": "mug"},
            {"image": "image", "caption": "caption", "concept": "concept"},
        )
    )  # fmt: skip


def change(path: Path, row: int, **values: Any) -> None:
    """Overwrite values of a row of a .jsonl file; None takes the key away."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[row] = {key: value for key, value in {**rows[row], **values}.items() if value is not None}
    path.write_text("".join(json.dumps(one) + "\n" for one in rows))


# ------------------------------------------------------------------------------------------------------------- batches


def test_the_loss_is_of_the_caption_alone(task: CaptioningTask) -> None:
    tokenizer = task.processor.tokenizer
    batch = next(iter(task.eval_batches()))
    rows = task.rows[1]
    for ids, labels, row in zip(batch["input_ids"], batch["labels"], rows, strict=True):
        learnt = ids[labels != IGNORED]
        wanted = [*tokenizer(row.caption, add_special_tokens=False).input_ids[:7], tokenizer.eos_token_id]
        assert learnt.tolist() == wanted
    model = task.build_model(0).eval()
    loss = model(**batch).loss
    prompt = (batch["labels"] == IGNORED) & batch["attention_mask"].bool()
    text = prompt & (batch["input_ids"] != task.processor.image_token_id)
    other = {**batch, "input_ids": batch["input_ids"].masked_fill(text, 5)}
    assert model(**other).loss != loss  # the prompt is read …
    logits = model(**{k: v for k, v in batch.items() if k != "labels"}).logits[:, :-1]
    of_captions = torch.nn.functional.cross_entropy(
        logits[batch["labels"][:, 1:] != IGNORED], batch["labels"][:, 1:][batch["labels"][:, 1:] != IGNORED]
    )
    assert torch.allclose(loss, of_captions, atol=1e-5)  # … and only captions are scored


def test_the_picture_reaches_the_loss(task: CaptioningTask) -> None:
    model = task.build_model(0).eval()
    batch = next(iter(task.eval_batches()))
    other = {**batch, "pixel_values": batch["pixel_values"].flip(0)}
    assert not torch.allclose(model(**batch).loss, model(**other).loss, rtol=1e-6)


def test_padding_on_either_side_of_the_prompt_changes_nothing() -> None:
    ids, gap = torch.tensor([[3, 4, 5], [6, 7, 0]]), torch.tensor([[0, 1, 2], [2, 0, 1]])
    tails = [torch.tensor([8, 2]), torch.tensor([9, 9, 2])]
    right = {"input_ids": ids, "attention_mask": torch.tensor([[1, 1, 1], [1, 1, 0]]), "pixel_values": torch.ones(2, 3)}
    left = {name: v if name == "pixel_values" else v.gather(1, gap) for name, v in right.items()}
    left["input_ids"][0], left["attention_mask"][0] = ids[0], 1
    left["input_ids"][1], left["attention_mask"][1] = torch.tensor([0, 6, 7]), torch.tensor([0, 1, 1])
    one, two = with_captions(right, tails, 0), with_captions(left, tails, 0)
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert one["input_ids"].tolist() == [[3, 4, 5, 8, 2], [6, 7, 9, 9, 2]]
    asked = prompts_of(one, 0)
    assert asked["input_ids"].tolist() == [[3, 4, 5], [0, 6, 7]]
    assert asked["attention_mask"].tolist() == [[1, 1, 1], [0, 1, 1]] and "labels" not in asked


def test_order_depends_on_the_seed_and_the_pass_alone(one: CaptioningTask) -> None:
    def shown(batches: Any) -> list[float]:
        return [float(picture.sum()) for batch in batches for picture in batch["pixel_values"]]

    first, again = one.train_batches(1), one.train_batches(1)
    passes = [shown(first), shown(first)]
    assert passes == [shown(again), shown(again)]
    assert passes[0] != passes[1] and sorted(passes[0]) == sorted(passes[1])
    assert shown(one.train_batches(2)) != passes[0]
    assert len(first) == 2 and shown(one.eval_batches()) == shown(one.eval_batches())


def test_generated_text_does_not_depend_on_the_neighbours(one: CaptioningTask) -> None:
    model, tokenizer = one.build_model(0), one.processor.tokenizer
    batch = dict(next(iter(one.eval_batches())))
    model.train()
    both = generate(model, batch, tokenizer, 5)
    assert model.training  # left as found
    assert len(both) == 2 and both[0] == generate(model, {k: v[:1] for k, v in batch.items()}, tokenizer, 5)[0]


def test_prompts_that_place_the_image_stay_and_others_become_a_turn(one: CaptioningTask) -> None:
    processor = one.processor
    assert full_prompt(processor, "<image> What?") == "<image> What?"
    with pytest.raises(ValueError, match="place for the image, '<image>'.*got 'What"):
        full_prompt(processor, "What?")
    template = "{% for m in messages %}{% for c in m.content %}{{ c.text if c.type == 'text' else '<image>' }}"
    processor.chat_template = template + "{% endfor %}{% endfor %}"
    try:
        assert full_prompt(processor, "What?") == "<image>What?"
    finally:
        processor.chat_template = None


# ----------------------------------------------------------------------------------------------------- targets, adapter


def test_targets_are_the_paper_s_and_every_one_gets_a_gradient(task: CaptioningTask) -> None:
    model = task.build_model(0)
    pattern = task.targets[0].removeprefix("re:")
    adapted = get_peft_model(model, LoraConfig(target_modules=pattern, task_type="CAUSAL_LM", r=2))
    names = {n.split(".lora_B")[0] for n, _ in adapted.named_parameters() if "lora_B" in n}
    assert any("vision_tower" in n for n in names) and any("mlp" in n for n in names)
    assert not any(re.search(r"o_proj|out_proj|fc1|projector|lm_head", n) for n in names)
    adapted(**next(iter(task.eval_batches()))).loss.backward()
    still = [n for n, p in adapted.named_parameters() if "lora_B" in n and (p.grad is None or not p.grad.any())]
    assert not still


def test_layers_behind_the_image_s_features_are_left_out(one: CaptioningTask, tmp_path: Path) -> None:
    name = "model.vision_tower.vision_model.encoder.layers.{}.self_attn.q_proj"
    pattern = caption_targets(one.settings.model).removeprefix("re:")
    assert [bool(re.fullmatch(pattern, name.format(i))) for i in range(3)] == [True, True, False]
    text = "model.language_model.layers.2.self_attn.q_proj"
    assert re.fullmatch(pattern, text)  # the same number in the language model stays
    whole = caption_targets(tiny_vlm("glm", tmp_path)).removeprefix("re:")
    assert re.fullmatch(whole, name.format(2))


def test_the_adapter_is_loaded_by_plain_peft(one: CaptioningTask, tmp_path: Path) -> None:
    from peft import PeftModel

    config = LoraConfig(target_modules=one.targets[0].removeprefix("re:"), task_type="CAUSAL_LM", r=2)
    model = get_peft_model(one.build_model(0), config).eval()
    batch = next(iter(one.eval_batches()))
    plain = model(**batch).loss
    for n, p in model.named_parameters():
        if "lora_B" in n:
            torch.nn.init.normal_(p)
    one.save(model, tmp_path)
    loaded = PeftModel.from_pretrained(one.build_model(0), str(tmp_path)).eval()
    assert torch.allclose(model(**batch).loss, loaded(**batch).loss, atol=1e-5)
    assert not torch.allclose(plain, loaded(**batch).loss, atol=1e-3)


# --------------------------------------------------------------------------------------------------------------- scores


def test_recall_counts_the_own_name_and_wrong_names() -> None:
    truth = ["Bolo the dog.", "Mira on red.", "A fox."]
    assert recall(["Bolo!", "a pot", "Bolo"], truth, ["Bolo", "Mira"]) == (1 / 2, 1 / 3)
    assert recall(["Bolo and Mira"] * 3, truth, ["Bolo", "Mira"]) == (1.0, 1.0)  # saying all is not enough
    assert recall(["x"], ["A fox."], ["Bolo"])[0] != recall(["x"], ["A fox."], ["Bolo"])[0]  # nan: nothing to find


def test_sentsim_is_one_for_the_same_text_and_ignores_padding(one: CaptioningTask) -> None:
    sentences = Sentences(one.settings.sentences)
    texts = ["a dog", "a cat on a blue background and a dog"]
    assert sentences.similarity(texts, texts) == pytest.approx(1)
    assert sentences.similarity(texts, texts[::-1]) < 0.999
    assert torch.allclose(sentences.embed(texts)[0], sentences.embed(texts[:1])[0], atol=1e-5)


def test_sentsim_can_be_left_out(one: CaptioningTask) -> None:
    bare = dataclasses.replace(one, settings=dataclasses.replace(one.settings, sentences="", concept=None))
    assert (list(bare.metrics), bare.main_metric) == (["loss"], "loss")
    assert set(bare.evaluate(bare.build_model(0), bare.eval_batches())) == {"loss"}
    assert one.main_metric == "sentsim" and "sentsim" in one.metrics  # the control


def test_evaluate_gives_the_metrics_and_leaves_everything(task: CaptioningTask) -> None:
    model = task.build_model(0).train()
    state = torch.random.get_rng_state()
    scores = task.evaluate(model, task.eval_batches())
    assert list(task.metrics) == ["sentsim", "recall", "wrong_concept", "loss"] and set(scores) == set(task.metrics)
    assert model.training and torch.equal(state, torch.random.get_rng_state())
    assert scores["loss"] == pytest.approx(float(model.eval()(**next(iter(task.eval_batches()))).loss), abs=1e-4)
    with pytest.raises(ValueError, match="at least one batch"):
        task.evaluate(model, [])


def test_samples_are_captions_with_their_pictures(one: CaptioningTask, tmp_path: Path) -> None:
    samples = one.sample(one.build_model(0), 6, tmp_path / "step-0006")
    assert len(samples) == 2 and all(set(s) == {"kind", "name", "file", "text"} for s in samples)
    assert [s["name"] for s in samples] == [row.caption for row in one.rows[1]]
    assert all(Image.open(tmp_path / "step-0006" / s["file"]).size == (28, 28) for s in samples)
    none = dataclasses.replace(one, settings=dataclasses.replace(one.settings, shown=0))
    assert none.sample(one.build_model(0), 6, tmp_path / "none") == []


# ------------------------------------------------------------------------------------------------- own files and errors


def test_rows_of_tables_and_folders_are_the_same(captions: Path, tmp_path: Path) -> None:
    rows = own_task(captions, concept="concept").rows[0]
    pd.read_json(captions, lines=True).to_csv(tmp_path / "captions.csv", index=False)
    assert [
        dataclasses.replace(r, where="") for r in own_task(tmp_path / "captions.csv", concept="concept").rows[0]
    ] == [dataclasses.replace(r, where="") for r in rows]
    for line in captions.read_text().splitlines():
        row = json.loads(line)
        (tmp_path / row["image"]).with_suffix(".txt").write_text(row["caption"] + "\n")
    folder = own_task(tmp_path, identifier="<*>").rows[0]
    assert {(r.image, r.caption, r.concept) for r in folder} == {(r.image, r.caption, r.concept) for r in rows}
    assert {r.concept for r in folder} == {"<*>", ""}


def test_pictures_of_the_hub_s_tables_are_bytes(captions: Path, tmp_path: Path) -> None:
    content = io.BytesIO()
    Image.new("RGB", (4, 4), (10, 200, 30)).save(content, "PNG")
    frame = pd.DataFrame({"image": [{"bytes": content.getvalue(), "path": None}] * 4, "caption": list("abcd")})
    frame.to_parquet(tmp_path / "table.parquet")
    row = own_task(tmp_path / "table.parquet").rows[0][0]
    assert row.open().getpixel((0, 0)) == (10, 200, 30)


def test_the_prompt_is_filled_from_the_columns(captions: Path) -> None:
    task = own_task(captions, prompt="<image> {Product Name}: describe {{it}}")
    assert task.rows[0][0].prompt == "<image> mug: describe {it}"
    with pytest.raises(ValueError, match="no column 'price'.*Product Name"):
        _ = own_task(captions, prompt="<image> {price}").rows
    with pytest.raises(ValueError, match=r"task.prompt: .*\{\{"):
        own_task(captions, prompt="<image> {price")


@pytest.mark.parametrize(
    ("values", "options", "message"),
    [
        ({"caption": "  "}, {}, r"captions.jsonl: row 3 has nothing in column 'caption'"),
        (
            {"image": "gone.png"},
            {},
            r"captions.jsonl: row 3: .*gone.png: expected an image, but there is no such file",
        ),
        ({"image": ""}, {}, r"captions.jsonl: row 3: expected the file of an image, got ''"),
        ({"image": "captions.jsonl"}, {}, r"row 3: .*captions.jsonl: expected an image, but cannot be read"),
        ({}, {"caption": "text"}, r"no column 'text'; its columns are: .*caption"),
        ({"concept": "<sks>"}, {"concept": "concept"}, r"captions.jsonl: row 3: the concept '<sks>' is in none"),
        ({}, {"identifier": "<sks>"}, r"'<sks>' is in no caption in all 6 training rows"),
        ({}, {"eval_size": 8}, r"captions.jsonl: 8 rows, so task.eval_size=8 leaves .*--set task.eval_size=1"),
        ({}, {"prompt": "What?"}, r"expected a place for the image, '<image>'"),
        ({}, {"sentences": "./none"}, r"^task.sentences, which scores captions: .*none.*; \"\" leaves this score out"),
    ],
)
def test_one_clear_error_before_training(
    captions: Path, one: CaptioningTask, values: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    own_task(captions, model=one.settings.model).check()  # the control: as it is, it can be used
    change(captions, 2, **values)
    with pytest.raises(ValueError, match=message):
        own_task(captions, model=one.settings.model, **options).check()


def test_a_broken_picture_is_named(captions: Path, one: CaptioningTask) -> None:
    picture = captions.parent / "4.png"
    picture.write_bytes(picture.read_bytes()[:60])
    with pytest.raises(ValueError, match=r"row 5: .*4.png: expected an image"):
        own_task(captions, model=one.settings.model).check()


def test_folders_name_the_picture_without_a_caption(captions: Path) -> None:
    folder = captions.parent
    with pytest.raises(ValueError, match=r"0.png: has no caption; expected it in 0.txt"):
        _ = own_task(folder).rows
    (folder / "0.txt").write_text("\n")
    with pytest.raises(ValueError, match=r"0.txt: the caption is empty"):
        _ = own_task(folder).rows
    with pytest.raises(ValueError, match=r"task.concept: the folder .* name the concept with task.identifier"):
        _ = own_task(folder, concept="concept").rows


def test_settings_that_cannot_be_are_refused() -> None:
    for options, message in (
        ({"prompt": " "}, "task.prompt"), ({"dtype": "float16"}, "float16"), ({"shown": -1}, "task.shown"),
        ({"concept": "a", "identifier": "b"}, "one of them"), ({"batch_size": 0}, "task.batch_size"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            CaptioningSettings(**options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"model 'no/where': .*cannot load"):
        _ = CaptioningTask(CaptioningSettings(model="no/where")).processor
    with pytest.raises(ValueError, match="concepts"):
        _ = CaptioningTask(CaptioningSettings(data="sample:concept")).rows


def test_the_split_keeps_the_shares_of_the_concepts(captions: Path) -> None:
    task = own_task(captions, concept="concept", eval_size=4)
    assert all([row.concept for row in rows].count("<*>") == 2 for rows in task.rows)
    rows = [*task.rows[0], *task.rows[1]]
    assert split_rows(rows, 2, 1, "") == split_rows(rows, 2, 1, "") != split_rows(rows, 2, 2, "")


# ------------------------------------------------------------------------------------------- scenes and the small model


@pytest.fixture
def stamp(tmp_path: Path) -> Path:
    """A red square, blue on the left, in a transparent image."""
    picture = Image.new("RGBA", (40, 20), (0, 0, 0, 0))
    picture.paste((255, 0, 0, 255), (10, 0, 30, 20))
    picture.paste((0, 0, 255, 255), (10, 0, 20, 20))
    picture.save(tmp_path / "square.png")
    return tmp_path / "square.png"


def test_views_show_the_colour_that_their_caption_says(stamp: Path) -> None:
    made = views(stamp, "A square", 10, seed=0, concept="Bolo")
    assert made == views(stamp, "A square", 10, seed=0, concept="Bolo") != views(stamp, "A square", 10, seed=1)
    assert len({view.colour for view in made}) == 10
    for view in made:
        article = "an" if view.colour == "orange" else "a"
        assert view.caption == f"A square on {article} {view.colour} background." and view.concept == "Bolo"
        pixels = view.draw(56)
        assert pixels.size == (56, 56) and COLOURS[view.colour] in {colour for _, colour in pixels.getcolors(9999)}
    sides = [Scene(stamp, "", mirrored=mirrored).draw(40).getpixel((15, 20)) for mirrored in (False, True)]
    assert sides == [(0, 0, 255), (255, 0, 0)]


def test_the_projector_is_all_that_is_trained_and_training_goes_on(tmp_path: Path, stamp: Path) -> None:
    task = smoke_task("small-vlm", tmp_path / "model")
    scenes = views(stamp, "A dog", 16, seed=0)

    def made() -> Any:
        model = task.build_model(0).requires_grad_(False)
        model.model.multi_modal_projector.requires_grad_(True)
        return model

    def trained(model: Any, work: Path, steps: int, minutes: float) -> int:
        return train_projector(model, task.processor, scenes, work, steps=steps, minutes=minutes)

    model, before = made(), made().state_dict()
    assert trained(model, tmp_path / "whole", 3, 5.0) == 3
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed and all("multi_modal_projector" in name for name in changed)
    stopped, again = made(), made()
    assert trained(stopped, tmp_path / "parts", 3, 0.0) == 1  # the deadline had passed after one step
    assert trained(again, tmp_path / "parts", 3, 5.0) == 3
    for name in changed:
        assert torch.equal(again.state_dict()[name], model.state_dict()[name])
        assert not torch.equal(stopped.state_dict()[name], model.state_dict()[name])


def test_the_projector_s_loss_is_the_model_s(tmp_path: Path, stamp: Path) -> None:
    task = smoke_task("small-vlm", tmp_path / "model")
    model, processor = task.build_model(0).eval(), task.processor
    prompt, scene = "<image>\nDescribe the image.\n", Scene(stamp, "A dog.")
    asked = processor(images=[scene.draw()], text=[prompt], return_tensors="pt")
    ids = torch.tensor([[*processor.tokenizer(scene.caption).input_ids, processor.tokenizer.eos_token_id]])
    batch = with_captions(dict(asked), list(ids), 0)
    with torch.no_grad():
        vision: Any = model.model.vision_tower  # type: ignore[union-attr]
        features = vision(asked["pixel_values"], output_hidden_states=True).hidden_states[-1][:, 1:]
        text = torch.tensor([processor.tokenizer(prompt.removeprefix("<image>")).input_ids])
        own = Alignment(model, text)(features, ids, ids)["loss"]
        assert own == pytest.approx(float(model(**batch).loss), abs=1e-5)
        assert own != pytest.approx(float(Alignment(model, text)(features.flip(1), ids, ids)["loss"]), abs=1e-6)


def test_a_tower_with_fewer_layers_is_saved_and_loaded(tmp_path: Path) -> None:
    whole = Dinov2Config(num_hidden_layers=3)
    shorter = _shorter(whole, 2)
    shorter.save_pretrained(tmp_path)
    assert Dinov2Config.from_pretrained(tmp_path).num_hidden_layers == 2 and shorter.hidden_size == whole.hidden_size
    whole.num_hidden_layers = 2
    whole.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="stage"):  # the control: the number alone is not enough
        Dinov2Config.from_pretrained(tmp_path)


@pytest.mark.slow
@pytest.mark.packages
def test_no_held_out_stamp_or_concept_is_among_the_base_scenes() -> None:
    from cntlora.lab.recipes.captioning.scenes import base_scenes, concept_scenes, held_out_stamps

    base = {scene.file for scene in base_scenes()}
    train, held_out = concept_scenes()
    assert len(train) == 56 and len(held_out) == 48 and len(base) == 1899
    assert not base & {scene.file for scene in [*train, *held_out, *held_out_stamps()]}
    assert not {(s.file, s.colour, s.scale) for s in train} & {(s.file, s.colour, s.scale) for s in held_out}
    assert all(scene.concept in scene.caption for scene in [*train, *held_out])
