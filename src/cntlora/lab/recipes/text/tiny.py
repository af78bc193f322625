"""Tiny random text models with a tokenizer, made offline in a second: what `--smoke` runs instead of the real ones."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from ....messages import quiet_transformers

_SPECIAL = {
    "roberta": {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"},
    "bert": {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"},
    "llama": {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<pad>", "unk_token": "<unk>"},
}
_CHAT = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_SIZES: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48,
    "initializer_range": 0.2,  # at the usual 0.02 so small a model hardly depends on its adapters
}  # fmt: skip


def tiny_encoder(model: str, folder: Path, texts: Iterable[str]) -> str:
    """A folder with a random RoBERTa, where the name of the model or its configuration says so, or else a BERT.

    Args:
        model: the name or folder of the real model, whose architecture is meant.
        folder: new; configuration, weights and tokenizer are written into it.
        texts: sentences that the tokenizer is made from.

    Returns:
        The folder, for `from_pretrained`.
    """
    from transformers import BertConfig, BertForMaskedLM, RobertaConfig, RobertaForMaskedLM

    kind = "roberta" if "roberta" in _architecture(model) else "bert"
    tokenizer = _tokenizer(kind, texts)
    sizes = {**_SIZES, "vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made: Any = (
            RobertaForMaskedLM(RobertaConfig(max_position_embeddings=72, type_vocab_size=1, **sizes))
            if kind == "roberta"
            else BertForMaskedLM(BertConfig(max_position_embeddings=64, **sizes))
        )
    return _saved(made, tokenizer, folder)


def tiny_language_model(folder: Path, texts: Iterable[str]) -> str:
    """A folder with a random Llama and a tokenizer with a chat template; arguments as in `tiny_encoder`."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = _tokenizer("llama", texts)
    tokenizer.chat_template = _CHAT
    ids = {key: getattr(tokenizer, key) for key in ("pad_token_id", "bos_token_id", "eos_token_id")}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LlamaConfig(vocab_size=len(tokenizer), num_key_value_heads=1, **_SIZES, **ids)
        made = LlamaForCausalLM(config)
    return _saved(made, tokenizer, folder)


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> str:
    """Rows as a .jsonl file; its name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def at_most(settings: Any, **highs: int) -> dict[str, Any]:
    """Fields of settings, none above the given value."""
    return {key: min(getattr(settings, key), high) for key, high in highs.items()}


def _architecture(model: str) -> str:
    """Return what tells the kind of a model: the name, and the model_type of a local folder."""
    config = Path(model) / "config.json"
    kind = json.loads(config.read_text(encoding="utf-8")).get("model_type", "") if config.is_file() else ""
    return f"{model} {kind}".lower()


def _tokenizer(kind: str, texts: Iterable[str]) -> Any:
    """Words, or pieces of words (byte level), learned from the texts, with the special tokens of the kind."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special = _SPECIAL[kind]
    trained = Tokenizer(models.BPE(unk_token=special["unk_token"]))
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.decoder = decoders.ByteLevel()
    trained.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=400, special_tokens=list(special.values()), show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )  # fmt: skip
    first, last = {"bert": ("[CLS]", "[SEP]"), "roberta": ("<s>", "</s>"), "llama": ("", "")}[kind]
    if first:
        middle = f"{last} {last}" if kind == "roberta" else last
        second = "$B" if kind == "roberta" else "$B:1"
        end = last if kind == "roberta" else f"{last}:1"
        trained.post_processor = processors.TemplateProcessing(
            single=f"{first} $A {last}",
            pair=f"{first} $A {middle} {second} {end}",
            special_tokens=[(token, trained.token_to_id(token)) for token in (first, last)],
        )
    names = ["input_ids", "attention_mask"] + (["token_type_ids"] if kind == "bert" else [])
    return PreTrainedTokenizerFast(tokenizer_object=trained, model_input_names=names, **special)


def _saved(model: Any, tokenizer: Any, folder: Path) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    with quiet_transformers():
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
