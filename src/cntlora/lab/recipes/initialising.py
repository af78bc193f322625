"""The work of `cntlora init`: the user's data and a model by name or folder become an initialised adapter's folder.

The data, the task and the folder of the model are checked first: this module imports pandas, and the rest when all of
that is right.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...messages import unknown_name, warn_caller
from .frames import read_frame
from .model_folder import check_folder, check_names, check_rank, default_targets, find_folder
from .text.dialogue import (
    Columns,
    MissingColumnsError,
    RowBatches,
    check_rows,
    encode_row,
    said_of_cut,
    segments_of,
)
from .text.tables import Table, encode_batches, label_line, one_class_only, random_order, read_table

if TYPE_CHECKING:
    import pandas as pd
    from torch import nn

    from ...config import InitConfig

TASKS = ("auto", "causal-lm", "classification", "regression", "encoder")
_TASK_TYPES = {
    "causal-lm": "CAUSAL_LM",
    "classification": "SEQ_CLS",
    "regression": "SEQ_CLS",
    "encoder": "FEATURE_EXTRACTION",
}


@dataclass(frozen=True)
class LoraOptions:
    """The LoRA to put in: as in `peft.LoraConfig`; alpha None for 2·rank, targets None for PEFT's own choice."""

    rank: int = 16
    alpha: float | None = None
    targets: tuple[str, ...] | None = None
    rslora: bool = False
    dora: bool = False


@dataclass(frozen=True)
class Source:
    """The user's data, as `cntlora init` is told.

    Attributes:
        data: a file or a data set of the hub, see `cntlora.lab.recipes.frames.read_frame`; None for none.
        text, label, prompt, response, messages: its columns; label None for none.
        batch_size: rows a batch. max_length: tokens a row.
    """

    data: str | None = None
    text: str = "text"
    label: str | None = None
    prompt: str = "prompt"
    response: str | None = None
    messages: str = "messages"
    batch_size: int = 16
    max_length: int = 256

    @cached_property
    def frame(self) -> pd.DataFrame:
        """All rows."""
        return read_frame(str(self.data))

    @property
    def columns(self) -> Columns:
        """The columns of a language model's rows."""
        return Columns(self.text, self.prompt, self.response or "response", self.messages)

    def table(self, task: str) -> Table:
        """Texts with their classes or numbers, of which there are at least two.

        Raises:
            ValueError: for rows that cannot be used; names file, column and row.
        """
        regression = task == "regression"
        table = read_table(
            str(self.data),
            self.text,
            self.label,
            regression=regression,
            instead="--task regression",
            frame=self.frame,
            settings=("--text", "--label", ""),
        )
        for kind, found in (("class", table.names), ("number", sorted(set(table.values)))):
            if len(found) == 1:
                raise ValueError(one_class_only(self.data, self.label, kind, found[0]))
        return table


@dataclass(frozen=True)
class Told:
    """Additions to the report: a line about the labels, and the names of the classes; "" and none without."""

    line: str = ""
    names: Sequence[str] = ()


def initialise(
    name: str,
    source: Source,
    task: str,
    lora: LoraOptions,
    options: dict[str, Any],
    outputs: tuple[Path, Path | None],
    dry_run: bool = False,
) -> tuple[Any, Told]:
    """Check everything that can be checked, load the model, make the plan and write the adapter's folder.

    Args:
        name: of the model.
        source: of the data.
        task: one of `TASKS`.
        lora: the adapter.
        options: of `cntlora.InitConfig`, as flat keys; None leaves one out.
        outputs: folder of the adapter, and file of the plan or None.
        dry_run: foretell seconds and memory, and write nothing.

    Returns:
        The report, or with `dry_run` the forecast, and what is said beside it.

    Raises:
        ValueError: for what cannot be used; says what to change.
    """
    _check_task(task, source)
    table = source.table(task) if source.label else None
    folder = find_folder(name)
    config = check_folder(folder, tokenizer=True) if folder is not None else None
    resolved = None if config is None else resolve_task(task, config.get("architectures") or [], bool(source.label))
    if source.data is not None and table is None:
        table = _checked_rows(source, resolved or task)
    targets = lora.targets or default_targets(str((config or {}).get("model_type")))
    if folder is not None and not options.get("adaptive_ranks"):
        check_rank(folder, lora.rank, targets)

    from ...config import InitConfig

    settings = InitConfig.from_dict(options)
    _check_reads(settings, source, resolved)
    if folder is not None and settings.method is not None and not settings.adaptive_ranks:
        check_rank(folder, lora.rank, targets, settings.method.width)
    if folder is not None:
        check_names(folder, lora.targets or (), "targets")

    from ...api import apply_plan, compute_plan
    from ...files.saving import save_adapter
    from .loading import load_tokenizer

    config, tokenizer = load_tokenizer(name)
    resolved = resolve_task(task, list(config.architectures or ()), bool(source.label))
    _check_reads(settings, source, resolved)
    batches = None if source.data is None else _batches(source, table, resolved, tokenizer, settings)
    model, new = load_model(name, resolved, table, settings.seed, tokenizer)
    model = add_lora(model, resolved, lora, settings.seed, new)
    if dry_run:
        from ...execution.forecast import forecast

        return forecast(model, batches, settings), Told()
    plan = compute_plan(model, batches, settings)
    report = apply_plan(model, plan)
    save_adapter(model, outputs[0], fold_alpha=settings.fold_alpha, plan=plan)
    if outputs[1] is not None:
        plan.save(outputs[1])
    if source.label is None or table is None:
        return report, Told()
    return report, Told(label_line(table), table.names)


def _check_task(task: str, source: Source) -> None:
    if task not in TASKS:
        raise ValueError(unknown_name("--task", task, TASKS))
    if task in ("classification", "regression") and not source.label:
        raise ValueError(f"task {task!r} needs labels: name their column with --label")
    if source.label and source.data is None:
        raise ValueError("--label names a column of --data; give the data too")


def resolve_task(task: str, architectures: Sequence[str], has_labels: bool) -> str:
    """Return the task that "auto" stands for: labels mean classification, else what the checkpoint was made for."""
    if task != "auto":
        return task
    if has_labels:
        return "classification"
    return "causal-lm" if any("CausalLM" in name or "LMHead" in name for name in architectures) else "encoder"


def _checked_rows(source: Source, task: str) -> Table | None:
    """Read the texts of an encoder; check the rows of a language model.

    Where the task is not known yet, which the configuration of a model of the hub tells, either may come.
    """
    if task == "encoder":
        return source.table(task)
    try:
        if task == "causal-lm":
            check_rows(source.frame, source.columns, source.data)
        else:
            source.columns.kind(source.frame, source.data)
    except MissingColumnsError as error:
        raise ValueError(f"{error}. Name yours with --text, --prompt and --response, or --messages") from error
    return None


def _check_reads(config: InitConfig, source: Source, task: str | None) -> None:
    """Raise ValueError where a method reads what there is not; `task` None where it is not known yet."""
    if config.method is None and source.data is None:
        raise ValueError("--data: the method is chosen by your texts, so it needs them; or name one that reads none")
    if config.method is None or config.method.reads == "weights":
        return
    name, reads = config.method.name, config.method.reads
    if source.data is None:
        raise ValueError(f"--data: method {name} reads {reads}, so it needs your texts")
    if reads == "gradients" and task == "encoder":
        raise ValueError(
            f"--method {name} reads gradients and so needs a loss, which an encoder without labels has not; name the "
            "column of the classes with --label, or take a method that reads inputs, such as self"
        )


def _batches(source: Source, table: Table | None, task: str, tokenizer: Any, config: InitConfig) -> Iterable[Any]:
    """Make the first batches of the data in random order."""
    most = config.num_batches * source.batch_size
    if task == "causal-lm":
        return _language_batches(source, tokenizer, most, config.seed)
    table = source.table(task) if table is None else table
    some = table.take(random_order(len(table), config.seed)[:most])
    labels: Sequence[int] | Sequence[float] = (some.labels or some.values) if task != "encoder" else []
    return encode_batches(tokenizer, some.texts, labels, batch_size=source.batch_size, max_length=source.max_length)


def _language_batches(source: Source, tokenizer: Any, most: int, seed: int) -> RowBatches:
    segments, chat = segments_of(source.frame, source.columns, tokenizer, source.data)
    chosen = random_order(len(segments), seed)[:most]
    rows = [
        encode_row(
            segments[i], tokenizer, source.max_length,
            special=not chat, where=f"{source.data}: row {i + 1}", limit="--max-length ",
        )
        for i in chosen
    ]  # fmt: skip
    if said := said_of_cut(rows, source.data, "--max-length "):
        warn_caller(said)
    return RowBatches(rows, source.batch_size, tokenizer.pad_token_id)


def load_model(
    name: str, task: str, table: Table | None, seed: int, tokenizer: Any
) -> tuple[nn.Module, tuple[str, ...]]:
    """Load the model (float32 or the checkpoint's dtype), and what is new in a classifier.

    Raises:
        ValueError: if there is no such model; says what was tried.
    """
    from transformers import AutoModel

    from .loading import load_classifier, load_language_model, load_pretrained

    if task in ("classification", "regression"):
        return load_classifier(name, table.names if table and task == "classification" else None, seed, tokenizer)
    if task == "causal-lm":
        return load_language_model(name), ()
    return load_pretrained(AutoModel, name, seed, {}), ()


def add_lora(model: nn.Module, task: str, options: LoraOptions, seed: int, new: tuple[str, ...] = ()) -> nn.Module:
    """Put fresh LoRA layers into the model by PEFT; `new` modules train whole and are saved with them.

    Raises:
        ValueError: for targets that the model does not have.
    """
    import torch
    from peft import LoraConfig, get_peft_model
    from torch import nn

    targets: Any = None if options.targets is None else list(options.targets)
    config = LoraConfig(
        r=options.rank,
        lora_alpha=2 * options.rank if options.alpha is None else options.alpha,
        target_modules="all-linear" if targets == ["all-linear"] else targets,
        use_rslora=options.rslora,
        use_dora=options.dora,
        task_type=_TASK_TYPES[task],
        modules_to_save=list(new) or None,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        try:
            return get_peft_model(model, config)  # type: ignore[arg-type]
        except ValueError as error:
            linears = {n.rsplit(".", 1)[-1] for n, m in model.named_modules() if isinstance(m, nn.Linear)}
            known = ", ".join(sorted(linears))
            what = f"the model has no module named {', '.join(targets)}" if _absent(model, targets) else str(error)
            raise ValueError(f"targets: {what.rstrip('.')}. The model's linear layers end in: {known}") from error


def _absent(model: nn.Module, targets: Any) -> bool:
    """Return whether no module has one of the names that were given."""
    names = [name for name, _ in model.named_modules()]
    given = [] if targets is None or targets == ["all-linear"] else targets
    return bool(given) and not any(f".{name}".endswith(f".{target}") for name in names for target in given)
