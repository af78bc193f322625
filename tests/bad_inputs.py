"""Mistakes of users, each as a real call, and the error that it gives."""

from __future__ import annotations

import pickle
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import save_file
from tests.tiny import adapted, base_model, lora_config, text_batches, train
from torch import Tensor

from cntlora import (
    InitConfig,
    InitPlan,
    apply_plan,
    compute_plan,
    freeze_offset,
    initialize,
    initialize_from_trainer,
    save_adapter,
)
from cntlora.files.inspection import inspect_adapter
from cntlora.lab.experiments.settings import load_experiment
from cntlora.lab.recipes.image_files import open_image
from cntlora.lab.recipes.text.tables import read_table
from cntlora.model.sites import find_sites

Call = Callable[[Path], object]


def _init(*batches: Any, model: Any = None, config: dict[str, Any] | None = None, **call: Any) -> Call:
    data = batches[0] if batches else None

    def run(folder: Path) -> object:
        return initialize(
            adapted() if model is None else model(),
            text_batches() if data is None else data,
            InitConfig.from_dict({"method": "self", **(config or {})}),
            **call,
        )

    return run


def _spoiled() -> Any:
    model = adapted()
    with torch.no_grad():
        model.base_model.model.bert.embeddings.word_embeddings.weight[5] = float("nan")
    return model


def _masked() -> list[dict[str, Tensor]]:
    batches = text_batches()
    batches[1]["attention_mask"].zero_()
    return batches


def _merged() -> Any:
    model = adapted()
    model.merge_adapter()
    return model


def _trained() -> Any:
    model = adapted()
    train(model, text_batches(), steps=1)
    return model


def _started() -> Any:
    model = adapted()
    initialize(model, text_batches(), config=InitConfig(method="self"))
    return model


def _with_pissa() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return adapted(init_lora_weights="pissa")


def _zeros() -> Any:
    model = adapted()
    with torch.no_grad():
        for site in find_sites(model)[0]:
            site.base.weight.zero_()
    return model


def _half_shared() -> Any:
    model = adapted()
    one, two, *_ = (site.layer for site in find_sites(model)[0])
    two.lora_A["default"].weight = one.lora_A["default"].weight
    return model


class _Generates:
    """A trainer in the way of TRL's GRPOTrainer, by what it has."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def get_train_dataloader(self) -> list[Any]:
        return [[{"prompt": "a word"}]]

    def _generate(self, prompts: list[str]) -> None:
        """Is what tells it."""


_OPTIMIZERS: list[Any] = []


def _with_optimizer() -> Any:
    model = adapted()
    _OPTIMIZERS[:] = [torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])]
    return model


def _on_meta() -> Any:
    from peft import get_peft_model

    return get_peft_model(base_model("bert").to("meta"), lora_config())


def _file(content: bytes, name: str = "plan.safetensors") -> Call:
    def run(folder: Path) -> object:
        (folder / name).write_bytes(content)
        return InitPlan.load(folder / name)

    return run


def _plan_of(edit: Callable[[bytes], bytes]) -> Call:
    return lambda folder: _file(
        edit(compute_plan(adapted(), text_batches(1), config=InitConfig(method="self")).to_bytes())
    )(folder)


def _other_model(folder: Path) -> object:
    return apply_plan(adapted(seed=5), compute_plan(adapted(), text_batches(1), config=InitConfig(method="self")))


def _adapter_of_another(folder: Path) -> object:
    save_file({"weight": torch.ones(2)}, folder / "x.safetensors")
    return InitPlan.load(folder / "x.safetensors")


def _experiment(text: str) -> Call:
    def run(folder: Path) -> object:
        (folder / "mine.toml").write_text(text)
        return load_experiment(folder / "mine.toml")

    return run


def _pickled(folder: Path) -> object:
    (folder / "plan.bin").write_bytes(pickle.dumps({"A": [1.0]}))
    return InitPlan.load(folder / "plan.bin")


def _torch_file(folder: Path) -> object:
    torch.save({"A": torch.ones(2)}, folder / "plan.pt")
    return InitPlan.load(folder / "plan.pt")


def _no_config(folder: Path) -> object:
    return inspect_adapter(folder)


def _table(rows: str, **columns: Any) -> Call:
    def run(folder: Path) -> object:
        (folder / "rows.csv").write_text(f"text,label\n{rows}")
        return read_table(folder / "rows.csv", **{"label": "label", **columns})

    return run


def _picture(folder: Path) -> object:
    Image.new("F", (4, 4), 300.0).save(folder / "scan.tif")
    return open_image(folder / "scan.tif")


WRONG: dict[str, Call] = {
    "no batches": _init([]),
    "one batch in place of a list of them": _init(text_batches()[0]),
    "the path of a file in place of batches": _init("reviews.csv"),
    "batches None for a method that reads data": lambda folder: initialize(adapted(), config=InitConfig(method="self")),
    "tuples that the model takes for other arguments": _init([(b["input_ids"], b["labels"]) for b in text_batches()]),
    "a model in place of an option": lambda folder: InitConfig(method=adapted()),
    "on_missing='warn' with nothing left to initialise": _init(model=_zeros, on_missing="warn"),
    "a trainer that generates its data": lambda folder: initialize_from_trainer(
        _Generates(adapted()), config=InitConfig(method="self")
    ),
    "one factor of two layers shared": _init(model=_half_shared),
    "a batch whose mask hides every token": _init(_masked()),
    "NaN in the activations": _init(model=_spoiled),
    "no labels for a method that reads gradients": _init(
        [{k: v for k, v in b.items() if k != "labels"} for b in text_batches()], config={"method": "lora_ga"}
    ),
    "token_mask with a method that reads gradients": _init(config={"method": "lora_ga"}, token_mask="labels"),
    "token_mask misspelt": _init(token_mask="label"),
    "token_mask='labels' with one label a row": _init(token_mask="labels"),
    "a model without an adapter": _init(model=base_model),
    "the name of an adapter that is not there": _init(adapter_name="style"),
    "an adapter that is initialised already": _init(model=_started),
    "an adapter that is trained already": _init(model=_trained),
    "an adapter that is merged": _init(model=_merged),
    "an adapter that PEFT's PiSSA has initialised": _init(model=_with_pissa),
    "an optimizer that holds the parameters": _init(model=_with_optimizer),
    "weights on the meta device": _init(model=_on_meta),
    "a rank above the size of the layer": _init(model=lambda: adapted(r=25)),
    "lora_alpha=0": _init(model=lambda: adapted(lora_alpha=0)),
    "freeze_offset on plain LoRA": lambda folder: freeze_offset(adapted()),
    "a method misspelt": _init(config={"method": "slef"}),
    "an option misspelt": _init(config={"methd": "self"}),
    "p out of range": _init(config={"p": 1.5}),
    "an option of another method": _init(config={"damping": 0.5}),
    "rank_budget without adaptive_ranks": _init(config={"rank_budget": 8}),
    "a rank_budget above all ranks": _init(config={"adaptive_ranks": True, "rank_budget": 10**6}),
    "fewer batch_weights than batches": _init(config={"batch_weights": (1.0, 2.0)}),
    "max_memory too small": _init(max_memory="1KiB"),
    "max_memory that is no size": _init(max_memory="much"),
    "on_missing misspelt": _init(on_missing="ignore"),
    "a plan of another model": _other_model,
    "a plan cut short": _plan_of(lambda data: data[:-7]),
    "a plan of which one bit is flipped": _plan_of(lambda data: data[:-7] + bytes([data[-7] ^ 1]) + data[-6:]),
    "a plan whose header is edited": _plan_of(lambda data: data.replace(b"rtol", b"RTOL", 1)),
    "an empty plan": _file(b""),
    "a pickle in place of a plan": _pickled,
    "a file of torch.save in place of a plan": _torch_file,
    "another safetensors file in place of a plan": _adapter_of_another,
    "a plan that is not there": lambda folder: InitPlan.load(folder / "none.safetensors"),
    "a folder that is no adapter": _no_config,
    "saving a model without an adapter": lambda folder: save_adapter(base_model(), folder / "a"),
    "a column of real numbers as classes": _table("".join(f"a,{i / 7:.3f}\n" for i in range(60))),
    "a column of names of rows as classes": _table("".join(f"a,id-{i}\n" for i in range(60))),
    "rows without a label": _table("a,0\nb,1\nc,nan\nd,\n"),
    "a class in two spellings": _table("a,1\nb,1.0\nc,2\n"),
    "the labels as texts": _table("a,0\nb,1\n", text="label"),
    "an image of numbers without a known range": _picture,
    "an experiment file with a misspelt key": _experiment("[train]\nstepps = 3\n"),
    "an experiment file that is no TOML": _experiment("[train\n"),
    "an experiment file with a value of the wrong kind": _experiment('[train]\nsteps = "many"\n'),
}
"""What is wrong → the call, which gets an empty folder."""


def refusals() -> Iterator[tuple[str, str, str]]:
    """Return the mistake, the kind of the error, and its message without the folder of this trial."""
    for what, call in WRONG.items():
        with tempfile.TemporaryDirectory() as name, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                call(Path(name))
            except Exception as error:
                yield what, type(error).__name__, str(error).replace(f"{name}/", "").replace(name, "folder")
            else:
                yield what, "", ""
            finally:
                _OPTIMIZERS.clear()


def is_clear(kind: str, message: str) -> bool:
    """Return whether an error is one of the documented kinds, in one line of some length."""
    return kind in ("ValueError", "TypeError", "FileNotFoundError") and "\n" not in message and 20 < len(message) < 600
