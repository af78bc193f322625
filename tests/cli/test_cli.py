"""The command line as a user meets it: real files in, an adapter folder out, one line for every mistake."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tests.versions import cli_runner
from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast

from cntlora import InitPlan
from cntlora.cli.app import app
from cntlora.files.inspection import inspect_adapter
from cntlora.methods.method import METHODS
from cntlora.version import VERSION

WORDS = ["the", "a", "good", "bad", "film", "plot", "music", "is", "was", "very", "not", "and", "dull", "bright"]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    (folder / "vocab.txt").write_text("\n".join(vocabulary))
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48
    )
    BertForSequenceClassification(config).save_pretrained(folder)
    return folder


@pytest.fixture
def data(tmp_path: Path) -> Path:
    generator = torch.Generator().manual_seed(1)
    lines = ["text,label"]
    for i in range(48):
        words = [WORDS[int(j)] for j in torch.randint(0, len(WORDS), (3 + i % 5,), generator=generator)]
        lines.append(f"{' '.join(words)},{'yes' if i % 2 else 'no'}")
    path = tmp_path / "data.csv"
    path.write_text("\n".join(lines))
    return path


def cntlora(*arguments: object) -> tuple[int, str, str]:
    result = cli_runner().invoke(app, [str(a) for a in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout, result.stderr


def init(model_folder: Path, data: Path, out: Path, *more: object) -> tuple[int, str, str]:
    fixed = ("--targets", "query,value", "--rank", 4, "--batch-size", 8, "--num-batches", 3, "--label", "label")
    method = () if "--method" in more else ("--method", "self")
    return cntlora("init", model_folder, "--data", data, "--out", out, *fixed, *method, *more)


def test_init_writes_a_folder_that_plain_peft_loads(model_folder: Path, data: Path, tmp_path: Path) -> None:
    code, out, err = init(model_folder, data, tmp_path / "adapter", "--plan", tmp_path / "plan.safetensors")
    assert code == 0, err
    assert "bert.encoder.layer.0.attention.self.query" in out and "freeze_offset" in out
    base = BertForSequenceClassification.from_pretrained(model_folder, num_labels=2).eval()
    ids = torch.tensor([[2, 5, 7, 9, 3]])
    before = base.bert(ids).last_hidden_state
    loaded = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    torch.testing.assert_close(loaded.base_model.model.bert(ids).last_hidden_state, before)
    weights = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    A = weights["base_model.model.bert.encoder.layer.0.attention.self.query.lora_A.weight"]
    assert A.shape == (8, 32) and torch.equal(A[:4], A[4:]) and A.any()
    assert InitPlan.load(tmp_path / "plan.safetensors").config.fold_alpha


def test_a_dry_run_foretells_and_writes_nothing(model_folder: Path, data: Path, tmp_path: Path) -> None:
    code, out, err = init(model_folder, data, tmp_path / "adapter", "--dry-run")
    assert code == 0, err
    assert out.startswith("self, 4 sites: about") and "in one pass over the batches" in out
    assert not (tmp_path / "adapter").exists()
    found = json.loads(init(model_folder, data, tmp_path / "adapter", "--dry-run", "--json")[1])
    assert found["method"] == "self" and found["passes"] == 1 and found["seconds"] >= found["data_seconds"] > 0
    assert not (tmp_path / "adapter").exists()


def test_without_a_method_it_is_whitened_where_there_is_a_loss(model_folder: Path, data: Path, tmp_path: Path) -> None:
    fixed = ("--data", data, "--targets", "query,value", "--rank", 4, "--batch-size", 8, "--num-batches", 3, "--json")
    made = {}
    for name, more in {"classes": ("--label", "label"), "encoder": ("--task", "encoder")}.items():
        code, out, err = cntlora("init", model_folder, "--out", tmp_path / name, *fixed, *more)
        assert code == 0, err
        made[name] = json.loads(out)
    assert made["classes"]["config"]["method"] == "whitened" and made["encoder"]["config"]["method"] == "self"
    assert {site["file_rank"] for site in made["classes"]["sites"].values()} == {4}
    code, _, err = cntlora(
        "init", model_folder, "--out", tmp_path / "no", *fixed, "--task", "encoder", "--method", "descent"
    )
    assert code == 1 and "needs a loss" in err


def test_a_learning_rate_is_met_by_alpha(model_folder: Path, data: Path, tmp_path: Path) -> None:
    fixed = ("--data", data, "--label", "label", "--targets", "query,value", "--rank", 4, "--num-batches", 2)

    def made(name: str, *more: Any) -> tuple[int, str, Any]:
        code, _, err = cntlora("init", model_folder, "--out", tmp_path / name, *fixed, *more)
        config = tmp_path / name / "adapter_config.json"
        return code, err, json.loads(config.read_text())["lora_alpha"] if config.exists() else None

    assert made("told", "--learning-rate", "2e-4") == (0, "", 25 * 2 * 4)
    assert made("as_made")[2] == 4  # the control: alpha is folded
    for name, more, said in (
        ("eva", ("--method", "eva"), "method 'eva' is made for no rate of its own"),
        ("folded", ("--fold-alpha",), "fold_alpha=True sets to 1"),
        ("none", ("--learning-rate", "0"), "learning_rate: expected a finite number"),
    ):
        code, err, alpha = made(name, "--learning-rate", "2e-4", *more)
        assert code == 1 and said in err and err.count("\n") == 1 and alpha is None


def test_keep_moves_the_function(model_folder: Path, data: Path, tmp_path: Path) -> None:
    """The control of the test above: with base keep the loaded adapter is no longer neutral."""
    assert init(model_folder, data, tmp_path / "adapter", "--base", "keep")[0] == 0
    base = BertForSequenceClassification.from_pretrained(model_folder, num_labels=2).eval()
    ids = torch.tensor([[2, 5, 7, 9, 3]])
    before = base.bert(ids).last_hidden_state
    loaded = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    assert (loaded.base_model.model.bert(ids).last_hidden_state - before).abs().max() > 1e-2


def test_json_is_one_document(model_folder: Path, data: Path, tmp_path: Path) -> None:
    _, out, _ = init(model_folder, data, tmp_path / "adapter", "--json", "--adaptive-ranks", "--rank-budget", 10)
    report = json.loads(out)
    assert sum(site["rank"] for site in report["sites"].values()) == 10
    assert report["config"]["adaptive_ranks"] and report["batches"] == 3
    _, out, _ = cntlora("inspect", tmp_path / "adapter", "--json")
    assert sum(site["rank"] for site in json.loads(out)["sites"]) == 20  # offset: twice the rank that trains


def test_inspect_reads_ranks_alphas_and_sizes(model_folder: Path, data: Path, tmp_path: Path) -> None:
    assert init(model_folder, data, tmp_path / "adapter", "--base", "keep", "--no-fold-alpha")[0] == 0
    sites = inspect_adapter(tmp_path / "adapter")
    weights = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    site = sites[0]
    A, B = (weights[f"base_model.model.{site.name}.lora_{x}.weight"] for x in "AB")
    product = site.scaling * B @ A
    assert (site.rank, site.alpha, site.scaling, site.halves) == (4, 8.0, 2.0, "")
    assert site.norm == pytest.approx(float(product.norm()), rel=1e-5)
    assert site.spectral_norm == pytest.approx(float(torch.linalg.matrix_norm(product, 2)), rel=1e-5)
    code, out, _ = cntlora("inspect", tmp_path / "adapter")
    assert code == 0 and site.name in out and "stable rank" in out
    assert "sites · ranks 4, " in out


def test_existing_folder_is_not_overwritten(model_folder: Path, data: Path, tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "precious.txt").write_text("mine")
    code, _, err = init(model_folder, data, tmp_path / "adapter")
    assert code == 1 and "--overwrite" in err
    assert init(model_folder, data, tmp_path / "adapter", "--overwrite")[0] == 0
    assert (tmp_path / "adapter" / "precious.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (("--method", "slef"), "did you mean 'self'"),
        (("--base", "ofset"), "did you mean 'offset'"),
        (("--base", "subtract"), "--base subtract"),
        (("--p", "1.5"), "[0, 1]"),
        (("--rank", "0"), "at least 1"),
        (("--rank", "64"), "above min(in, out) = 32"),
        (("--targets", "quarry"), "targets: the model has no module named quarry. The model's linear layers end in: "),
        (("--task", "poetry"), "causal-lm"),
        (("--text", "body"), "text, label"),
        (("--rank-budget", "5"), "adaptive_ranks"),
        (("--adaptive-ranks", "--rank-budget", "0"), "at least 1"),
        (("--adaptive-ranks", "--rank-budget", "9999"), "between"),
        (("--shift-constant", "gausian"), "gaussian"),
        (("--num-batches", "0"), "at least 1"),
        (("--max-length", "0"), "at least 1"),
    ],
)
def test_mistakes_are_one_line(
    model_folder: Path, data: Path, tmp_path: Path, more: tuple[str, ...], says: str
) -> None:
    code, out, err = init(model_folder, data, tmp_path / "adapter", *more)
    assert code == 1 and out == ""
    lines = [line for line in err.splitlines() if line.startswith("cntlora: ")]
    assert len(lines) == 1 and says in lines[0], err
    assert not (tmp_path / "adapter").exists()


def test_missing_data_and_missing_model(model_folder: Path, data: Path, tmp_path: Path) -> None:
    code, _, err = init(model_folder, tmp_path / "absent.csv", tmp_path / "adapter")
    assert code == 1 and "absent.csv" in err
    code, _, err = init(tmp_path / "no-model", data, tmp_path / "adapter")
    assert code == 1 and "no-model" in err


def test_init_refuses_a_single_class_and_a_file_for_a_folder(model_folder: Path, data: Path, tmp_path: Path) -> None:
    one = tmp_path / "one.csv"
    one.write_text(data.read_text().replace(",no", ",yes"))
    code, _, err = init(model_folder, one, tmp_path / "adapter")
    assert code == 1 and "column 'label' has one class only, 'yes'" in err and not (tmp_path / "adapter").exists()
    code, _, err = init(model_folder, data, one)
    assert code == 1 and f"--out {one} is a file; expected a folder" in err and one.read_text().startswith("text")


def test_inspect_reads_a_file_of_diffusers(tmp_path: Path) -> None:
    file = tmp_path / "pytorch_lora_weights.safetensors"
    key = "unet.mid_block.x.lora.{}.weight"
    save_file({key.format("down"): torch.ones(2, 4), key.format("up"): 3 * torch.ones(5, 2)}, file)
    for path in (tmp_path, file):
        code, out, err = cntlora("inspect", path, "--json")
        assert code == 0, err
        (site,) = json.loads(out)["sites"]
        assert site["name"] == "unet.mid_block.x" and (site["rank"], site["alpha"], site["scaling"]) == (2, 2.0, 1.0)
        assert site["norm"] == pytest.approx(6 * 20**0.5)  # B·A is 5 × 4 of 6
    save_file({key.format("down"): torch.ones(2, 4)}, file)
    code, _, err = cntlora("inspect", file)
    assert code == 1 and "site mid_block.x has {'A': (2, 4)}; expected A (rank, …) and B (…, rank)" in err


def test_the_package_runs_as_a_module() -> None:
    run = [sys.executable, "-m", "cntlora", "--version"]
    assert subprocess.run(run, capture_output=True, text=True, check=True).stdout.strip() == VERSION


def test_inspect_says_that_a_folder_is_not_there(tmp_path: Path) -> None:
    """The control is a folder that is there and has no adapter."""
    (tmp_path / "empty").mkdir()
    for name, says in (("nowhere", "nowhere: there is no such folder"), ("empty", "empty: no adapter_config.json")):
        code, _, told = cntlora("inspect", tmp_path / name)
        assert code == 1 and says in told and len(told.splitlines()) == 1


def test_inspect_refuses_what_is_no_adapter(model_folder: Path, data: Path, tmp_path: Path) -> None:
    code, _, err = cntlora("inspect", tmp_path)
    assert code == 1 and "adapter_config.json" in err
    assert init(model_folder, data, tmp_path / "adapter")[0] == 0
    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    code, _, err = cntlora("inspect", tmp_path / "adapter")
    assert code == 1 and "cut short" in err
    weights.write_bytes(whole)
    state = load_file(weights)
    key = next(k for k in state if "lora_A" in k)
    state[key] = state[key][:2].clone()
    save_file(state, weights)
    code, _, err = cntlora("inspect", tmp_path / "adapter")
    assert code == 1 and "do not fit" in err


REALS = "".join(f"the film,{0.37 * i + 0.013:.3f}\n" for i in range(48))


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        (REALS, ["has 48 different numbers in 48 rows", "regression: --task regression"]),
        ("".join(f"the film,id-{i}\n" for i in range(48)), ["has 48 different values in 48 rows"]),
        ("a,0\nb,1\n" * 5 + "a,nan\nb,\n", ["2 rows (11, 12) of 12 have nothing in column 'label' but 'nan'"]),
        ("a,1\nb,1.0\nc,2\n", ["one number in two ways, '1' (1 row) and '1.0' (1 row)"]),
    ],
)
def test_init_refuses_labels_that_are_no_classes(tmp_path: Path, rows: str, says: list[str]) -> None:
    data = tmp_path / "data.csv"
    data.write_text("text,label\n" + rows)
    code, out, err = init(tmp_path / "no-model", data, tmp_path / "adapter")  # before any model is loaded
    assert code == 1 and out == "" and all(word in err for word in (str(data), *says)) and err.count("\n") == 1


def test_init_takes_numbers_for_regression(model_folder: Path, tmp_path: Path) -> None:
    data = tmp_path / "data.csv"
    data.write_text("text,label\n" + REALS)
    code, out, err = init(model_folder, data, tmp_path / "adapter", "--task", "regression", "--method", "descent")
    assert code == 0, err
    assert "labels: numbers from 0.013 to 17.403 (48 rows)" in out
    weights = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert weights["base_model.model.classifier.weight"].shape == (1, 32)
    assert not (tmp_path / "adapter" / "id2label.json").exists()
    code, _, err = cntlora("init", model_folder, "--out", tmp_path / "b", "--data", data, "--task", "regression")
    assert code == 1 and "task 'regression' needs labels" in err


def test_init_says_and_keeps_the_names_of_the_classes(model_folder: Path, data: Path, tmp_path: Path) -> None:
    code, out, err = init(model_folder, data, tmp_path / "adapter")
    assert code == 0, err
    assert "classes: 0 = no, 1 = yes (24, 24 rows)" in out
    kept = json.loads((tmp_path / "adapter" / "id2label.json").read_text())
    id2label = {int(i): name for i, name in kept["id2label"].items()}
    base = BertForSequenceClassification.from_pretrained(model_folder, id2label=id2label, label2id=kept["label2id"])
    loaded: Any = PeftModel.from_pretrained(base, tmp_path / "adapter")
    assert loaded.config.id2label == {0: "no", 1: "yes"} and loaded.config.label2id == {"no": 0, "yes": 1}
    assert "| Classes | 0 = no, 1 = yes; " in (tmp_path / "adapter" / "README.md").read_text()
    _, out, _ = init(model_folder, data, tmp_path / "adapter", "--overwrite", "--json")
    assert json.loads(out)["classes"] == {"0": "no", "1": "yes"}
    assert "\nclasses: 0 = no, 1 = yes\n" in cntlora("inspect", tmp_path / "adapter")[1]
    assert json.loads(cntlora("inspect", tmp_path / "adapter", "--json")[1])["classes"] == {"0": "no", "1": "yes"}


def test_help_and_version() -> None:
    code, out, _ = cntlora("--help")
    assert code == 0 and all(command in out for command in ("init", "inspect", "demo"))
    code, out, _ = cntlora("--version")
    assert code == 0 and out.strip().count(".") == 2


def test_a_function_of_the_user_is_a_method(model_folder: Path, data: Path, tmp_path: Path) -> None:
    (tmp_path / "starts.py").write_text("def whole(W):\n    return W\n")
    adapters = {}
    for method in (f"{tmp_path}/starts.py:whole", "pissa", "lora"):
        out = tmp_path / str(len(adapters))
        code, _, err = init(model_folder, data, out, "--method", method)
        assert code == 0, err
        adapters[method] = load_file(out / "adapter_model.safetensors")
    whole, pissa, lora = adapters.values()
    assert all(torch.allclose(whole[key], pissa[key], atol=1e-5) for key in pissa)
    assert any(lora[key].shape != whole[key].shape for key in whole)  # a control: of rank 2r, that starts at zero
    METHODS.pop(f"{tmp_path}/starts.py:whole")
    code, _, err = init(model_folder, data, tmp_path / "none", "--method", f"{tmp_path}/starts.py:hole")
    assert code == 1 and "did you mean 'whole'" in err and len(err.splitlines()) == 1


def test_help_names_every_method() -> None:
    import re

    from typer.main import get_command

    from cntlora.cli.app import app
    from cntlora.methods.method import methods

    commands: Any = get_command(app)
    (method,) = [p for p in commands.commands["init"].params if p.name == "method"]
    listed, _, _ = method.help.partition("[default")
    assert set(methods()) == set(re.findall(r"[a-z_]+", listed)) - {"or", "a", "peer"}


# --- what `init` leaves ---------------------------------------------------------------------------------------


def test_init_writes_a_model_card_and_keeps_my_text(model_folder: Path, data: Path, tmp_path: Path) -> None:
    assert init(model_folder, data, tmp_path / "adapter")[0] == 0
    card = tmp_path / "adapter" / "README.md"
    text = card.read_text()
    assert "| Method | self, by cntlora" in text and "`num_batches=3`" in text and "3 batches" in text
    assert str(tmp_path) not in text and str(model_folder.parent) not in text
    card.write_text(text + "\nmy own words\n")
    assert init(model_folder, data, tmp_path / "adapter", "--overwrite", "--method", "eva")[0] == 0
    assert "my own words" in card.read_text() and "| Method | eva, by cntlora" in card.read_text()


def test_export_of_a_classifier_says_what_has_no_place(model_folder: Path, data: Path, tmp_path: Path) -> None:
    assert init(model_folder, data, tmp_path / "adapter")[0] == 0
    code, _, err = cntlora("export", tmp_path / "adapter", "--out", tmp_path / "a.safetensors")
    assert code == 1 and "classifier" in err and "modules_to_save" in err and err.count("\n") == 1
    code, out, _ = cntlora("--help")
    assert code == 0 and "export" in out


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"peft_type": "LOKR"}, "LOKR"),
        ({"r": None}, "r is no number"),
        ({"lora_alpha": "much"}, "lora_alpha is no number"),
    ],
    ids=str,
)
def test_inspect_refuses_a_configuration_that_is_no_loras(
    model_folder: Path, data: Path, tmp_path: Path, change: dict[str, Any], word: str
) -> None:
    assert init(model_folder, data, tmp_path / "adapter")[0] == 0
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    code, _, err = cntlora("inspect", tmp_path / "adapter")
    assert code == 1 and word in err and err.count("\n") == 1
