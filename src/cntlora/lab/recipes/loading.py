"""Text models by name or folder: their tokenizers, classifiers with a new head, language models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ...messages import first_line, quiet_transformers, unknown_name
from .model_folder import check_folder, find_folder

_HEADS = {"classifier", "score"}  # what PEFT trains and saves whole where the task is SEQ_CLS
_SAMPLES = {"sample:minilm": "minilm_folder", "sample:smollm2": "smollm2_folder"}  # functions of `samples`


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
    folder = find_folder(source)
    if folder is not None:
        check_folder(folder, tokenizer=True)
    try:
        config, tokenizer = AutoConfig.from_pretrained(source), AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"model {name!r}: cannot be loaded ({first_line(error)}); expected a folder or a hub name"
        ) from error
    if tokenizer.pad_token is None and tokenizer.eos_token is None:
        raise ValueError(
            f"model {name}: its tokenizer has no token for padding and none for the end of a text; add "
            '"pad_token": "…", a token of its vocabulary, to tokenizer_config.json'
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return config, tokenizer


def load_classifier(
    name: str, names: Sequence[str] | None, seed: int, tokenizer: Any
) -> tuple[nn.Module, tuple[str, ...]]:
    """A sequence classifier with a new head drawn under `seed`; its configuration names the classes.

    A head for another number of classes that the checkpoint may have is replaced.

    Args:
        name: hub name, folder or sample of the model.
        names: of the classes, in the order of the logits; None for a regressor, which has one logit.
        seed: of the head.
        tokenizer: of the model; knows the padding token where the configuration does not.

    Returns:
        The model, and the modules that its checkpoint lacks beside the head that PEFT saves by itself, such as the
        pooler of DeBERTa: drawn anew in every process, they have to be saved with the adapter.

    Raises:
        ValueError: if there is no such model, or it cannot be a sequence classifier.
    """
    from transformers import AutoModelForSequenceClassification

    options: dict[str, Any] = {"ignore_mismatched_sizes": True}
    if names is None:
        options |= {"num_labels": 1, "problem_type": "regression"}
    else:
        index = {name: i for i, name in enumerate(names)}
        options |= {"problem_type": "single_label_classification"}
        options |= {"num_labels": len(names), "id2label": dict(enumerate(names)), "label2id": index}
    model, info = load_pretrained(
        AutoModelForSequenceClassification, name, seed, {**options, "output_loading_info": True}
    )
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

    return load_pretrained(AutoModelForCausalLM, name, 0, {})


def load_pretrained(kind: Any, name: str, seed: int, options: dict[str, Any]) -> Any:
    """A model of one of transformers' classes; what is new in it is drawn under `seed`.

    Raises:
        ValueError: if it cannot be loaded as such.
    """
    source = resolve_model(name)
    with torch.random.fork_rng(), quiet_transformers():
        torch.manual_seed(seed)  # a new head
        try:
            return kind.from_pretrained(source, **options)
        except (OSError, ValueError) as error:
            raise ValueError(f"model {name!r}: cannot be loaded as {kind.__name__} ({first_line(error)})") from error
