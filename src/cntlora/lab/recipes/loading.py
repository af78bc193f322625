"""A model by name or folder with fresh LoRA layers, and batches of the user's texts: what `cntlora init` needs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ...messages import first_line, quiet_transformers, unknown_name
from .text.tables import EncodedBatches, Table, encode_batches

TASKS = ("auto", "causal-lm", "classification", "regression", "encoder")
_TASK_TYPES = {
    "causal-lm": "CAUSAL_LM",
    "classification": "SEQ_CLS",
    "regression": "SEQ_CLS",
    "encoder": "FEATURE_EXTRACTION",
}
_HEADS = {"classifier", "score"}  # what PEFT trains and saves whole where the task is SEQ_CLS
_SAMPLES = {"sample:minilm": "minilm_folder", "sample:smollm2": "smollm2_folder"}  # functions of `samples`


@dataclass(frozen=True)
class LoraOptions:
    """The LoRA to put in: as in `peft.LoraConfig`; alpha None for 2·rank, targets None for PEFT's own choice."""

    rank: int = 16
    alpha: float | None = None
    targets: tuple[str, ...] | None = None
    rslora: bool = False
    dora: bool = False


def resolve_task(task: str, architectures: list[str], has_labels: bool) -> str:
    """The task that "auto" stands for: labels mean classification, else what the checkpoint was made for."""
    if task not in TASKS:
        raise ValueError(unknown_name("task", task, TASKS))
    if task != "auto":
        if task in ("classification", "regression") and not has_labels:
            raise ValueError(f"task {task!r} needs labels: name their column with --label")
        return task
    if has_labels:
        return "classification"
    return "causal-lm" if any("CausalLM" in name or "LMHead" in name for name in architectures) else "encoder"


def resolve_model(name: str) -> str:
    """Return what `from_pretrained` takes: a hub name or a folder as it is, the folder of a sample for "sample:NAME".

    Raises:
        ValueError: for an unknown sample.
        RuntimeError: if a sample cannot be downloaded.
    """
    if not name.startswith("sample:"):
        return name
    if name not in _SAMPLES:
        raise ValueError(unknown_name("model", name, _SAMPLES))
    from .samples import models as samples

    return str(getattr(samples, _SAMPLES[name])())


def load_tokenizer(name: str) -> tuple[Any, Any]:
    """Configuration and tokenizer of a model; a tokenizer without a padding token pads with its end of text.

    Raises:
        ValueError: if there is no such model, or it has no tokenizer; says what was tried.
    """
    from transformers import AutoConfig, AutoTokenizer

    source = resolve_model(name)
    try:
        config, tokenizer = AutoConfig.from_pretrained(source), AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"model {name!r}: cannot be loaded ({first_line(error)}); expected a folder or a hub name"
        ) from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return config, tokenizer


def load_classifier(name: str, names: Sequence[str] | None, seed: int) -> tuple[nn.Module, tuple[str, ...]]:
    """A sequence classifier with a new head drawn under `seed`; its configuration names the classes.

    A head for another number of classes that the checkpoint may have is replaced.

    Args:
        name: hub name, folder or sample of the model.
        names: of the classes, in the order of the logits; None for a regressor, which has one logit.
        seed: of the head.

    Returns:
        The model, and the modules that its checkpoint lacks beside the head that PEFT saves by itself, such as the
        pooler of DeBERTa: drawn anew in every process, they have to be saved with the adapter.

    Raises:
        ValueError: if there is no such model, or it cannot be a sequence classifier.
    """
    from transformers import AutoModelForSequenceClassification

    _, tokenizer = load_tokenizer(name)
    options: dict[str, Any] = {"ignore_mismatched_sizes": True}
    if names is None:
        options |= {"num_labels": 1, "problem_type": "regression"}
    else:
        index = {name: i for i, name in enumerate(names)}
        options |= {"problem_type": "single_label_classification"}
        options |= {"num_labels": len(names), "id2label": dict(enumerate(names)), "label2id": index}
    model, info = _pretrained(AutoModelForSequenceClassification, name, seed, {**options, "output_loading_info": True})
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    return model, new_modules(info)


def new_modules(info: dict[str, Any]) -> tuple[str, ...]:
    """Modules that the checkpoint lacks, without those that PEFT saves for a classifier by itself.

    Args:
        info: what `from_pretrained` returns with `output_loading_info`.
    """
    modules = {key.rpartition(".")[0] for key in info["missing_keys"]}
    return tuple(sorted(module for module in modules if module and not _HEADS & set(module.split("."))))


def load_language_model(name: str) -> nn.Module:
    """A causal language model in its checkpoint's dtype.

    Raises:
        ValueError: if there is no such model, or it is no causal language model.
    """
    from transformers import AutoModelForCausalLM

    return _pretrained(AutoModelForCausalLM, name, 0, {})


def _pretrained(kind: Any, name: str, seed: int, options: dict[str, Any]) -> Any:
    source = resolve_model(name)
    with torch.random.fork_rng(), quiet_transformers():
        torch.manual_seed(seed)  # a new head
        try:
            return kind.from_pretrained(source, **options)
        except (OSError, ValueError) as error:
            raise ValueError(f"model {name!r}: cannot be loaded as {kind.__name__} ({first_line(error)})") from error


def load_model(name: str, task: str, table: Table, seed: int) -> tuple[nn.Module, Any, str, tuple[str, ...]]:
    """Model (float32 or the checkpoint's dtype), tokenizer, resolved task and what is new in a classifier.

    Raises:
        ValueError: if there is no such model, or it has no tokenizer; says what was tried.
    """
    config, tokenizer = load_tokenizer(name)
    task = resolve_task(task, list(config.architectures or ()), bool(table.labels or table.values))
    if task in ("classification", "regression"):
        model, new = load_classifier(name, table.names if task == "classification" else None, seed)
        return model, tokenizer, task, new
    if task == "causal-lm":
        return load_language_model(name), tokenizer, task, ()
    from transformers import AutoModel

    return _pretrained(AutoModel, name, seed, {}), tokenizer, task, ()


def add_lora(model: nn.Module, task: str, options: LoraOptions, seed: int, new: tuple[str, ...] = ()) -> nn.Module:
    """The model with fresh LoRA layers by PEFT; `new` modules train whole and are saved with them.

    Raises:
        ValueError: for a rank below 1, or targets that the model does not have.
    """
    from peft import LoraConfig, get_peft_model

    if options.rank < 1:
        raise ValueError(f"rank: expected at least 1, got {options.rank}")
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


def batches_of(tokenizer: Any, table: Table, task: str, batch_size: int, max_length: int) -> EncodedBatches:
    """Batches for the task: classes, numbers for regression, shifted tokens for a language model, else no labels."""
    labels: Sequence[int] | Sequence[float] | None = None
    if task in ("classification", "regression"):
        labels = table.labels or table.values
    return encode_batches(
        tokenizer, table.texts, labels, batch_size=batch_size, max_length=max_length, causal=task == "causal-lm"
    )
