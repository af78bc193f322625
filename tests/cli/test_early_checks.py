"""Mistakes that the commands refuse before they import anything slow, each in one line; commands without torch."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tests.conftest import RunFresh
from tests.tiny import base_model

import cntlora
from cntlora.cli.arguments import method_names
from cntlora.lab.recipes.model_folder import check_names, check_rank, default_targets, find_folder, layer_shapes

MISTAKES = """
import inspect, json
from typer.testing import CliRunner
from cntlora.cli.app import app
found = []
apart = {"mix_stderr": False} if "mix_stderr" in inspect.signature(CliRunner).parameters else {}  # click before 8.2
for arguments in json.loads(sys.argv[1]):
    result = CliRunner(**apart).invoke(app, arguments)
    slow = sorted(name for name in ("torch", "transformers", "peft", "sklearn") if name in sys.modules)
    found.append([result.exit_code, result.stderr, slow])
print(json.dumps(found))
"""


def model_folder(folder: Path, *, kind: str = "BertModel") -> Path:
    """A folder that looks like a model: its layers are not read before all else is right."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"architectures": [kind], "model_type": "bert"}))
    (folder / "tokenizer.json").write_text("{}")
    save_file({"layer.query.weight": torch.ones(8, 6), "layer.query.bias": torch.ones(8)}, folder / "model.safetensors")
    return folder


def test_mistakes_are_found_before_torch_is_imported(run_fresh: RunFresh, tmp_path: Path) -> None:
    model, out = model_folder(tmp_path / "model"), str(tmp_path / "out")
    rows = tmp_path / "rows.csv"
    rows.write_text("review;stars\nfine;1\ndull;0\n")
    latin = tmp_path / "latin.csv"
    latin.write_bytes("text,label\ncaf\xe9,1\n".encode("latin-1"))
    control = tmp_path / "control.csv"  # with a byte that Windows-1252, and so iconv, does not know
    control.write_bytes("text,label\ncaf\xe9 \x9d,1\n".encode("latin-1"))
    bare, empty = tmp_path / "bare", tmp_path / "empty"
    bare.mkdir()
    model_folder(empty)
    (empty / "model.safetensors").unlink()
    untold = model_folder(tmp_path / "untold")
    (untold / "tokenizer.json").unlink()
    good = ["init", str(model), "--data", str(rows), "--text", "review", "--label", "stars", "--out", out]

    def other(option: str, value: object) -> list[str]:
        return [*good, option, str(value)]

    cases: list[tuple[list[str], str]] = [
        (other("--rank", 0), "--rank: expected at least 1, got 0"),
        (other("--num-batches", 0), "--num-batches: expected at least 1"),
        (other("--max-length", 0), "--max-length: expected at least 1"),
        (other("--method", "slef"), "method: 'slef' is not known (did you mean 'self'?)"),
        ([*other("--rank", 7), "--targets", "query"], "rank: 7 is above min(in, out) = 6 of layer.query; lower it"),
        (other("--batch-weights", "1;2"), "--batch-weights: expected numbers with commas"),
        (other("--out", rows / "a"), "is a file, so no folder can be made there"),
        (other("--plan", tmp_path), "is a folder; expected the name of a file"),
        (other("--data", tmp_path / "absent.csv"), "there is no such file"),
        (other("--data", latin), "iconv -f WINDOWS-1252 -t UTF-8 latin.csv"),
        (other("--data", f"{tmp_path}/nowhere/"), "nowhere/: there is no such folder"),
        (other("--data", control), "iconv -f ISO-8859-1 -t UTF-8 control.csv"),
        (other("--text", "body"), "there is no column 'body'; its columns are: review, stars"),
        (other("--task", "poetry"), "'poetry' is not known"),
        (["init", str(tmp_path / "typo"), *good[2:]], "there is no such folder"),
        (["init", str(bare), *good[2:]], "no config.json is there"),
        (["init", str(empty), *good[2:]], "no weights are there"),
        (["init", str(untold), *good[2:]], "no tokenizer is there"),
        (["init", str(model), "--data", str(rows), "--out", out], "there is no column 'text'"),
        (["init", str(model), "--out", out, "--task", "regression"], "needs labels: name their column with --label"),
    ]
    found = json.loads(run_fresh(MISTAKES, json.dumps([arguments for arguments, _ in cases])))
    for (arguments, says), (code, told, slow) in zip(cases, found, strict=True):
        assert code == 1 and says in told and told.count("\n") == 1, (arguments, told)
        assert not slow, arguments
    assert not Path(out).exists()


def test_the_help_is_shown_without_torch_and_the_control_needs_it(run_fresh: RunFresh) -> None:
    script = (
        "from typer.testing import CliRunner\nfrom cntlora.cli.app import app\n"
        "for command in ([], ['init'], ['run'], ['compare'], ['export'], ['inspect']):\n"
        "    assert CliRunner().invoke(app, [*command, '--help']).exit_code == 0\n"
        "print('torch' in sys.modules, 'pandas' in sys.modules)\n"
        "import cntlora\ncntlora.InitConfig()\nprint('torch' in sys.modules)\n"
    )
    assert run_fresh(script).split() == ["False", "False", "True"]


def test_the_names_in_the_help_are_those_of_the_methods() -> None:
    assert method_names() == cntlora.methods()


def test_public_names_are_what_their_modules_have() -> None:
    from cntlora import methods
    from cntlora.config import InitConfig
    from cntlora.methods.self_mode import Self

    assert cntlora.InitConfig is InitConfig and cntlora.Self is Self
    assert methods() == cntlora.methods() == tuple(cntlora.methods.method.METHODS)
    assert set(cntlora.__all__) <= set(dir(cntlora)) and all(hasattr(cntlora, name) for name in cntlora.__all__)
    assert not hasattr(cntlora, "initialise") and not hasattr(cntlora, "_HOME")
    with pytest.raises(ImportError):
        exec("from cntlora import initialise")


def test_a_rank_is_checked_by_the_headers_of_the_weights(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model")
    assert layer_shapes(folder) == {"layer.query.weight": (8, 6), "layer.query.bias": (8,)}
    check_rank(folder, 6, ["query"])
    check_rank(folder, 7, ["value"])  # the control: no layer of that name, of which nothing is known
    for rank, targets, width in ((7, ["query"], 1), (4, ["query"], 2), (7, [r"re:.*\.query"], 1)):
        with pytest.raises(ValueError, match=r"layer\.query"):
            check_rank(folder, rank, targets, width)


def test_the_layers_of_a_model_type_are_peft_s_own_choice() -> None:
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as CHOICE

    for kind in ("bert", "llama", "gpt2", "t5"):
        assert default_targets(kind) == tuple(CHOICE[kind])
    assert default_targets("poetry") == ()  # the control


def test_a_name_of_no_layer_is_found_before_the_weights_are_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base_model("bert").save_pretrained(tmp_path)
    check_names(tmp_path, ["q_proj", "query"], "targets")  # one of them is there
    monkeypatch.setattr(torch.nn.Module, "load_state_dict", None)
    with pytest.raises(
        ValueError, match=r"^targets: the model has no module named q_proj\. .* dense, key, query, value"
    ):
        check_names(tmp_path, ["q_proj"], "targets")
    (tmp_path / "model.safetensors").unlink()  # nothing is known of the names in the file
    check_names(tmp_path, ["pooler.dense"], "targets")  # a layer that only the model has
    for targets in (["re:.*q_proj"], ["all-linear"], []):
        check_names(tmp_path, targets, "targets")  # PEFT's own words


def test_what_may_be_a_name_of_the_hub_is_not_looked_for_in_a_folder(tmp_path: Path) -> None:
    assert find_folder("bert-base-uncased") is None and find_folder("owner/name") is None
    for name in (tmp_path / "absent", "./absent", "src/cntlora/absent"):
        with pytest.raises(ValueError, match="there is no such folder"):
            find_folder(str(name))
