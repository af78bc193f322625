"""A model by name or folder with fresh LoRA layers, and batches of the user's texts: what `cntlora init` needs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..config import unknown_name
from ..notices import first_line, quiet_transformers
from .text.tables import EncodedBatches, Table, encode_batches

TASKS = ("auto", "causal-lm", "classification", "encoder")
_TASK_TYPES = {"causal-lm": "CAUSAL_LM", "classification": "SEQ_CLS", "encoder": "FEATURE_EXTRACTION"}
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
        if task == "classification" and not has_labels:
            raise ValueError("task 'classification' needs labels: name their column with --label")
        return task
    if has_labels:
        return "classification"
    return "causal-lm" if any("CausalLM" in name or "LMHead" in name for name in architectures) else "encoder"


def resolve_model(name: str) -> str:
    """What `from_pretrained` takes: a hub name or a folder as it is, the folder of a sample for "sample:NAME".

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


def load_classifier(name: str, outputs: int, seed: int, *, regression: bool = False) -> nn.Module:
    """A sequence classifier with a new head of `outputs` logits drawn under `seed`, or a regressor with one.

    A head for another number of classes that the checkpoint may have is replaced.

    Raises:
        ValueError: if there is no such model, or it cannot be a sequence classifier.
    """
    from transformers import AutoModelForSequenceClassification

    _, tokenizer = load_tokenizer(name)
    problem = "regression" if regression else "single_label_classification"
    options: dict[str, Any] = {"num_labels": outputs, "problem_type": problem, "ignore_mismatched_sizes": True}
    model = _pretrained(AutoModelForSequenceClassification, name, seed, options)
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    return model


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


def load_model(name: str, task: str, table: Table, seed: int) -> tuple[nn.Module, Any, str]:
    """Model (float32 or the checkpoint's dtype), tokenizer and resolved task, from a hub name or a folder.

    Raises:
        ValueError: if there is no such model, or it has no tokenizer; says what was tried.
    """
    config, tokenizer = load_tokenizer(name)
    task = resolve_task(task, list(config.architectures or ()), bool(table.labels))
    if task == "classification":
        return load_classifier(name, len(table.names), seed), tokenizer, task
    if task == "causal-lm":
        return load_language_model(name), tokenizer, task
    from transformers import AutoModel

    return _pretrained(AutoModel, name, seed, {}), tokenizer, task


def add_lora(model: nn.Module, task: str, options: LoraOptions, seed: int) -> nn.Module:
    """The model with fresh LoRA layers by PEFT.

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
    """Whether no module has one of the names that were given."""
    names = [name for name, _ in model.named_modules()]
    given = [] if targets is None or targets == ["all-linear"] else targets
    return bool(given) and not any(f".{name}".endswith(f".{target}") for name in names for target in given)


def batches_of(tokenizer: Any, table: Table, task: str, batch_size: int, max_length: int) -> EncodedBatches:
    """Batches for the task: labels for a classifier, shifted ones for a language model, none for an encoder."""
    labels = table.labels if task == "classification" else None
    return encode_batches(
        tokenizer, table.texts, labels, batch_size=batch_size, max_length=max_length, causal=task == "causal-lm"
    )
