"""Samples of runs: which are shown, what stands where a file is missing, and the grid and tables made from them."""

from __future__ import annotations

import base64
import io
import re
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("plotly", reason="the page needs the extra `report`")

from PIL import Image
from tests import report_cases as cases

from cntlora.lab.report import load_records, write_report
from cntlora.lab.report.gallery import caption_tables, gallery_part
from cntlora.lab.report.grids import save_grids
from cntlora.lab.report.page import build_page
from cntlora.lab.report.sample_images import SIDE, data_uri, read_image
from cntlora.lab.report.samples import Sample, gallery_of, spread_over
from cntlora.lab.report.study import Study, studies

COLOURS = dict.fromkeys(cases.METHODS, "#000000")


def study_of(folder: Path, kind: str = "image", records: list[dict[str, Any]] | None = None) -> Study:
    made = cases.with_samples(cases.few() if records is None else records, folder, kind)
    return studies(load_records(cases.write(made, folder)))[0]


class TestChoice:
    def test_every_method_is_shown_at_its_best_learning_rate_and_smallest_seed(self, tmp_path: Path) -> None:
        study = study_of(tmp_path)
        found = gallery_of(study)
        assert found and found.names == cases.PROMPTS and found.steps == cases.SAMPLED and found.note == ""
        assert found.methods == ("lora", "eva", "self", "self+vas") and set(found.seeds.values()) == {0}
        for (_, method, step), sample in found.cells.items():
            rate = study.best[method].learning_rate
            assert str(sample.path).startswith(f"{tmp_path}/{method}-lr{rate:g}-seed0/step-{step:04d}/")

    def test_a_seed_that_did_not_finish_is_not_shown(self, tmp_path: Path) -> None:
        runs = [r | {"status": "diverged"} if r["seed"] == 0 else r for r in cases.few()]
        made = cases.with_samples(cases.few(), tmp_path)
        runs = [r | {"samples": s["samples"]} for r, s in zip(runs, made, strict=True)]
        found = gallery_of(studies(load_records(cases.write(runs, tmp_path)))[0])
        assert found and set(found.seeds.values()) == {1}

    def test_what_is_left_out_is_said(self, tmp_path: Path) -> None:
        study = study_of(tmp_path)
        few = gallery_of(study, names=2, steps=2)
        assert few and few.names == cases.PROMPTS[:2] and few.steps == (0, 40)
        assert few.note == (
            "Shown are 2 of 3 samples; the others lie beside the records. "
            "Shown are 2 of 4 steps; the others lie beside the records."
        )
        bounded = gallery_of(study, pictures=20)
        assert bounded and len(bounded.names) == 1 and len(bounded.cells) == 16

    def test_steps_are_spread_with_the_first_and_the_last(self) -> None:
        assert spread_over(range(0, 101, 10), 5) == [0, 20, 50, 80, 100]
        assert spread_over([1, 2], 5) == [1, 2] and spread_over([1, 2, 3], 1) == [3]

    def test_the_second_of_a_name_at_a_step_has_a_name_of_its_own(self, tmp_path: Path) -> None:
        run = cases.record(
            "lora", 0.001, 0, samples=[{"step": 1, "kind": "text", "name": "a", "text": t} for t in "xy"]
        )
        found = gallery_of(studies([run])[0])
        assert found and {place[0]: sample.text for place, sample in found.cells.items()} == {"a": "x", "a (2)": "y"}

    def test_names_and_texts_are_of_one_line(self) -> None:
        sample = {"step": 1, "kind": "text", "name": "a\nb ", "text": "x\n\n| y"}
        study = studies([cases.record("lora", 0.001, 0, samples=[sample])])[0]
        table = caption_tables(study)[0]
        assert table.title == "Generated text by step: a b" and r"| LoRA | x \| y |" in table.to_markdown()

    @pytest.mark.parametrize("samples", [None, [], [{"kind": "sound", "step": 1}], ["text"], [{"kind": "image"}]])
    def test_no_samples_no_gallery(self, samples: object) -> None:
        study = studies([cases.record("lora", 0.001, 0, samples=samples)])[0]
        assert gallery_of(study) is None and gallery_part(study, COLOURS) is None and caption_tables(study) == []


class TestPictures:
    def test_a_thumbnail_is_bounded_and_keeps_its_shape(self, tmp_path: Path) -> None:
        Image.new("RGB", (1024, 512), "red").save(tmp_path / "a.png")
        found = read_image(Sample("image", tmp_path / "a.png", None, tmp_path))
        assert isinstance(found, Image.Image) and found.size == (SIDE, SIDE // 2)
        uri = data_uri(found)
        back = Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))
        assert uri.startswith("data:image/jpeg;") and back.size == found.size and back.getpixel((9, 9))[0] > 250

    def test_small_and_transparent_pictures_stay_exact(self, tmp_path: Path) -> None:
        Image.new("RGBA", (300, 300), (1, 2, 3, 0)).save(tmp_path / "a.png")
        found = read_image(Sample("image", tmp_path / "a.png", None, tmp_path))
        assert isinstance(found, Image.Image) and data_uri(found).startswith("data:image/png;") and found.mode == "RGBA"

    def test_what_cannot_be_shown_is_said(self, tmp_path: Path) -> None:
        inside = tmp_path / "in"
        inside.mkdir()
        Image.new("RGB", (8, 8)).save(tmp_path / "secret.png")
        (inside / "broken.png").write_bytes((tmp_path / "secret.png").read_bytes()[:30])
        (inside / "page.png").write_text("<html>")
        words = {
            inside / "gone.png": "no file gone.png",
            inside / "broken.png": "broken.png is no whole image",
            inside / "page.png": "page.png is no whole image",
            inside / ".." / "secret.png": "secret.png lies outside the folder of the records",
            Path("/etc/hostname"): "hostname lies outside the folder of the records",
            None: "no image recorded",
        }
        assert {path: read_image(Sample("image", path, None, inside)) for path in words} == words


class TestPage:
    def test_every_picture_is_inside_with_its_row_and_a_choice_of_samples(self, tmp_path: Path) -> None:
        records = load_records(cases.write(cases.with_samples(cases.few(), tmp_path), tmp_path))
        page = build_page(records)
        assert page == build_page(records[::-1])
        assert len(re.findall(r'<img src="data:image/jpeg;base64,', page)) == len(cases.PROMPTS) * 4 * 4
        assert re.findall(r'<option value="\d">(.*?)</option>', page) == [
            "a &lt;*&gt; toy in the snow",
            "a &lt;*&gt; toy with a city &amp; the sea",
            "a &lt;*&gt; toy $1 or $2",
        ]
        assert str(tmp_path) not in page
        assert "data-pick>" not in build_page(cases.few()) and "<img" not in build_page(cases.few())

    def test_a_missing_file_is_said_in_its_place(self, tmp_path: Path) -> None:
        study = study_of(tmp_path)
        rate = study.best["eva"].learning_rate
        (tmp_path / f"eva-lr{rate:g}-seed0" / "step-0010" / "1.png").unlink()
        part = gallery_part(study, COLOURS)
        assert part
        cells = {
            (s["name"], row["method"], step): cell
            for s in part["samples"]
            for row in s["rows"]
            for step, cell in zip(part["steps"], row["cells"], strict=True)
        }
        missing = {place: cell["missing"] for place, cell in cells.items() if "missing" in cell}
        assert missing == {(cases.PROMPTS[1], "eva", 10): "no file 1.png"}
        assert "no file 1.png" in build_page(load_records(tmp_path))

    def test_captions_come_with_their_picture_and_bring_no_markup(self, tmp_path: Path) -> None:
        study = study_of(tmp_path, "text")
        part = gallery_part(study, COLOURS)
        assert part and all(sample["picture"]["image"].startswith("data:") for sample in part["samples"])
        assert part["samples"][0]["rows"][0]["cells"][0] == {"text": "an image of a toy"}
        page = build_page(load_records(tmp_path))
        assert "&lt;*&gt; sits in the snow, eva" in page and "<*>" not in page.partition('<script type="application')[0]

    def test_methods_without_samples_are_named(self, tmp_path: Path) -> None:
        made = cases.with_samples(cases.few(), tmp_path)
        made = [r | {"samples": []} if r["method"] == "eva" else r for r in made]
        part = gallery_part(studies(load_records(cases.write(made, tmp_path)))[0], COLOURS)
        assert part and part["note"] == "Seed 0, each method at its best learning rate. Without samples: EVA."


class TestFiles:
    def test_captions_are_tables_of_method_by_step(self, tmp_path: Path) -> None:
        study = study_of(tmp_path, "text")
        first = caption_tables(study)[0]
        assert [column.head for column in first.columns] == ["Method", "step 0", "step 10", "step 20", "step 40"]
        assert r"| LoRA | an image of a toy | an image of a toy | &lt;\*&gt; sits in the snow" in first.to_markdown()
        assert len(caption_tables(study)) == 3
        write_report(tmp_path, tmp_path / "out", figures=None)
        assert "Generated text by step" in (tmp_path / "out" / "tables.md").read_text()

    def test_a_long_text_is_cut_and_says_so(self) -> None:
        def tables(text: str) -> str:
            sample = {"step": 1, "kind": "text", "name": "a", "text": text}
            return caption_tables(studies([cases.record("lora", 0.001, 0, samples=[sample])])[0])[0].to_markdown()

        assert "x" * 159 + "…" in tables("x" * 200) and "cut at 160" in tables("x" * 200)
        assert "x" * 160 + " " in tables("x" * 160) and "cut at" not in tables("x" * 160)

    @pytest.mark.published
    @pytest.mark.parametrize(("kind", "name"), [("image", "gallery"), ("text", "captions")])
    def test_a_sheet_is_the_same_for_the_same_samples(self, tmp_path: Path, kind: str, name: str) -> None:
        study = study_of(tmp_path / "a", kind)
        (one,), (other,) = (save_grids(study, tmp_path / place) for place in ("one", "other"))
        assert one.name == f"tweets-{name}.png" and one.read_bytes() == other.read_bytes()
        rate = study.best["lora"].learning_rate
        (tmp_path / "a" / f"lora-lr{rate:g}-seed0" / "step-0000" / "0.png").unlink()
        assert save_grids(study, tmp_path / "changed")[0].read_bytes() != one.read_bytes()

    @pytest.mark.published
    def test_the_pictures_stand_in_rows_of_methods_and_columns_of_steps(self, tmp_path: Path) -> None:
        with Image.open(save_grids(study_of(tmp_path / "a"), tmp_path)[0]) as opened:
            pixels, dpi = opened.convert("RGB"), 180
        side, left, top, block = 0.98, 1.3, 0.45, 0.98 * 4 + 0.15
        for n, green in enumerate((60, 120, 180)):
            for i in range(4):
                for j in range(4):
                    x, y = left + block * n + side * j, top + side * i
                    centre = pixels.getpixel((round((x + 0.475) * dpi), round((y + 0.475) * dpi)))
                    corner = pixels.getpixel((round((x + 0.05) * dpi), round((y + 0.05) * dpi)))
                    assert centre == pytest.approx((220, green, 40), abs=3)
                    assert corner == pytest.approx((90, 140, 200), abs=3)
        assert pixels.getpixel((5, 5)) == (255, 255, 255)

    @pytest.mark.published
    def test_the_report_writes_it_beside_the_figures(self, tmp_path: Path) -> None:
        study_of(tmp_path / "r")
        written = write_report(tmp_path / "r", tmp_path / "out")
        assert tmp_path / "out" / "figures" / "tweets-gallery.png" in written
