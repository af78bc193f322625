"""Tiny random models with several streams of tokens, or with tokens in another order, and batches of uneven rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers as hf
from peft import LoraConfig, get_peft_model
from tests.versions import before
from torch import Tensor, nn

Batch = dict[str, Tensor]
VOCABULARY, WIDTH, HEADS = 40, 16, 2
PAD, JUNK = 0, 3  # embeddings of the padding token are zero, which would not show that padding counts


@dataclass(frozen=True)
class Architecture:
    """A family of models.

    Attributes:
        make: a tiny one.
        targets: layers that get LoRA.
        batch: from lengths of the rows, the side that padding is on and columns more than needed, a batch.
        alone: the same rows one at a time and without padding.
        sides: that padding may be on.
        counts: from the batch, stream of a site → its tokens.
        stream: from the name of a site, its stream.
    """

    make: Callable[[], nn.Module]
    targets: tuple[str, ...]
    batch: Callable[..., Batch]
    sides: tuple[str, ...] = ("right", "left")
    stream: Callable[[str], str] = lambda name: "text"


def _text(lengths: list[int], side: str, extra: int, labels: str = "tokens", positions: bool = False) -> Batch:
    """Rows of text; their tokens depend on the row alone, not on the padding."""
    width = max(lengths) + extra
    ids, mask = torch.full((len(lengths), width), JUNK), torch.zeros(len(lengths), width, dtype=torch.long)
    own = torch.full((len(lengths), width), -100)
    for row, length in enumerate(lengths):
        tokens = torch.randint(4, 37, (length,), generator=torch.Generator().manual_seed(row))
        where = slice(0, length) if side == "right" else slice(width - length, width)
        ids[row, where], mask[row, where], own[row, where] = tokens, 1, tokens
    batch = {"input_ids": ids, "attention_mask": mask}
    if positions:
        batch["position_ids"] = (mask.cumsum(1) - 1).clamp_min(0)
    if labels == "tokens":
        batch["labels"] = own
    elif labels == "rows":
        batch["labels"] = torch.tensor([0, 1, 1, 0, 1, 0, 0, 1][: len(lengths)])
    return batch


def _begun(batch: Batch) -> Batch:
    """Return the batch without the label of each row's first token, which padding on the left would predict."""
    first = batch["attention_mask"].cumsum(1) == 1
    return {**batch, "labels": batch["labels"].masked_fill(first, -100)}


def text(lengths: list[int], side: str = "right", extra: int = 0) -> Batch:
    return _begun(_text(lengths, side, extra))


def text_with_positions(lengths: list[int], side: str = "right", extra: int = 0) -> Batch:
    return _begun(_text(lengths, side, extra, positions=True))


def classified(lengths: list[int], side: str = "right", extra: int = 0) -> Batch:
    return _text(lengths, side, extra, labels="rows")


def pairs(lengths: list[int], side: str = "right", extra: int = 0) -> Batch:
    """Texts as `DataCollatorForSeq2Seq` gives them: a mask of the encoder alone, labels padded with −100."""
    batch = _text(lengths, side, extra, labels="none")
    answers = _text([length % 4 + 2 for length in lengths], "right", extra)
    return {**batch, "labels": answers["labels"]}


def heard(lengths: list[int], side: str = "right", extra: int = 0) -> Batch:
    """Spectra of one length, as Whisper takes them, and texts."""
    features = [torch.randn(8, 16, generator=torch.Generator().manual_seed(row)) for row in range(len(lengths))]
    return {"input_features": torch.stack(features), "labels": pairs(lengths, side, extra)["labels"]}


def sound(lengths: list[int], side: str = "right", extra: int = 0) -> Batch:
    """Samples of sound, of which the model makes fewer frames."""
    width = 8 * (max(lengths) + extra) + 3
    values, mask = torch.zeros(len(lengths), width), torch.zeros(len(lengths), width, dtype=torch.long)
    for row, length in enumerate(lengths):
        size = 8 * length + 3
        values[row, :size] = torch.randn(size, generator=torch.Generator().manual_seed(row))
        mask[row, :size] = 1
    return {"input_values": values, "attention_mask": mask, "labels": torch.tensor([0, 1, 1, 0][: len(lengths)])}


IMAGE, GRID = 37, (1, 4, 4)


def seen(lengths: list[int], side: str = "right", extra: int = 0) -> Batch:
    """Texts with an image in each, 16 patches that become 4 tokens."""
    batch = _begun(_text([length + 4 for length in lengths], side, extra))
    for row, mask in enumerate(batch["attention_mask"]):
        first = int(mask.nonzero()[0])
        batch["input_ids"][row, first : first + 4] = IMAGE
        batch["labels"][row, first : first + 4] = -100
    patches = [torch.randn(16, 3 * 2 * 4, generator=torch.Generator().manual_seed(row)) for row in range(len(lengths))]
    grids = torch.tensor([GRID] * len(lengths))
    kinds = (batch["input_ids"] == IMAGE).long()
    return {**batch, "pixel_values": torch.cat(patches), "image_grid_thw": grids, "mm_token_type_ids": kinds}


def captioned(lengths: list[int], side: str = "right", extra: int = 0) -> Batch:
    """Texts with an image in each, 4 patches that become 4 tokens."""
    batch = _begun(_text([length + 4 for length in lengths], side, extra))
    for row, mask in enumerate(batch["attention_mask"]):
        first = int(mask.nonzero()[0])
        batch["input_ids"][row, first : first + 4] = IMAGE
    return {**batch, "pixel_values": _images(len(lengths))}


def _images(rows: int) -> Tensor:
    return torch.stack([torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(row)) for row in range(rows)])


def described(lengths: list[int], side: str = "right", extra: int = 0) -> Batch:
    """Images, and texts about them."""
    return {"pixel_values": _images(len(lengths)), "labels": pairs(lengths, side, extra)["labels"]}


def spectra(lengths: list[int], side: str = "right", extra: int = 0) -> Batch:
    """Spectra of several lengths, of which the model makes a quarter as many frames, and texts."""
    width = 4 * (max(lengths) + extra)
    values, mask = torch.zeros(len(lengths), width, 8), torch.zeros(len(lengths), width, dtype=torch.long)
    for row, length in enumerate(lengths):
        values[row, : 4 * length] = torch.randn(4 * length, 8, generator=torch.Generator().manual_seed(row))
        mask[row, : 4 * length] = 1
    return {"input_features": values, "attention_mask": mask, "labels": pairs(lengths, side, extra)["labels"]}


def one_at_a_time(kind: str, lengths: list[int]) -> list[Batch]:
    """The rows of a batch, each as a batch without padding."""
    whole = ARCHITECTURES[kind].batch(lengths)
    found = []
    for row in range(len(lengths)):
        one = {key: value[row : row + 1] for key, value in whole.items()}
        if "image_grid_thw" in whole:
            one["pixel_values"] = whole["pixel_values"][16 * row : 16 * row + 16]
        if "attention_mask" in one:
            keep = one["attention_mask"][0].bool()
            if "input_features" in one:
                one["input_features"] = one["input_features"][:, keep]
            shape = one["attention_mask"].shape
            of_text = [k for k, v in one.items() if v.shape == shape and (k != "labels" or kind not in SEQ2SEQ)]
            one |= {key: one[key][:, keep] for key in of_text}
        if one["labels"].dim() == 2 and kind in SEQ2SEQ:
            one["labels"] = one["labels"][:, one["labels"][0] != -100]
        found.append(one)
    return found


def _made(cls: Any, config: Any) -> Callable[[], nn.Module]:
    return lambda: cls(config())


_SEQ2SEQ: dict[str, Any] = {
    "vocab_size": VOCABULARY, "d_model": WIDTH, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24, "encoder_attention_heads": HEADS, "decoder_attention_heads": HEADS, "init_std": 0.2,
    "pad_token_id": PAD, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2, "forced_eos_token_id": None,
    "max_position_embeddings": 40,
}  # fmt: skip
_T5: dict[str, Any] = {
    "vocab_size": VOCABULARY, "d_model": WIDTH, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": HEADS,
    "decoder_start_token_id": PAD, "initializer_factor": 1.0, "dropout_rate": 0.0,
}  # fmt: skip
_PLAIN: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": HEADS,
    "initializer_range": 0.2, "pad_token_id": PAD,
}  # fmt: skip
_SOUND: dict[str, Any] = {
    **_PLAIN, "intermediate_size": 24, "conv_dim": (8, 8), "conv_kernel": (5, 3), "conv_stride": (4, 2),
    "num_feat_extract_layers": 2, "feat_extract_norm": "layer", "do_stable_layer_norm": True, "num_labels": 2,
    "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "mask_time_prob": 0.0, "mask_feature_prob": 0.0,
    "conv_bias": True, "classifier_proj_size": 8, "apply_spec_augment": False,
}  # fmt: skip


def _qwen() -> nn.Module:
    vision = {
        "depth": 2, "hidden_size": WIDTH, "intermediate_size": 24, "num_heads": HEADS, "in_channels": 3,
        "patch_size": 2, "spatial_merge_size": 2, "temporal_patch_size": 2, "window_size": 8, "out_hidden_size": WIDTH,
        "fullatt_block_indexes": [1], "initializer_range": 0.2,
    }  # fmt: skip
    written = {
        **_PLAIN, "intermediate_size": 24, "num_key_value_heads": HEADS,
        **(
            {"rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}, "rope_theta": 1e4}
            if before("transformers", "5")
            else {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}}
        ),
    }  # fmt: skip
    return hf.Qwen2_5_VLForConditionalGeneration(
        hf.Qwen2_5_VLConfig(
            text_config=written,
            vision_config=vision,
            image_token_id=IMAGE,
            video_token_id=1,
            vision_start_token_id=38,
            vision_end_token_id=39,
        )
    )


_IMAGES: dict[str, Any] = {
    "hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": HEADS, "intermediate_size": 24,
    "image_size": 8, "patch_size": 4, "initializer_range": 0.2,
}  # fmt: skip


def _describer() -> nn.Module:
    written = hf.BertConfig(
        **{**_PLAIN, "hidden_size": 24}, intermediate_size=24, is_decoder=True, add_cross_attention=True
    )
    both = hf.VisionEncoderDecoderConfig.from_encoder_decoder_configs(
        hf.ViTConfig(**_IMAGES), written, decoder_start_token_id=1, pad_token_id=PAD
    )
    return hf.VisionEncoderDecoderModel(both)


def _without(config: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in keys}


def _of_describer(name: str) -> str:
    return "pixel_values" if name.startswith("enc") or "crossattention.self.key" in name else "decoder"


def _of_speech(name: str) -> str:
    return "decoder" if _decoder_or_text(name) == "decoder" else "frames"


def _decoder_or_text(name: str) -> str:
    return (
        "decoder"
        if "decoder" in name
        and not name.endswith(("encoder_attn.k_proj", "cross_attention.k_proj", "EncDecAttention.k"))
        else "text"
    )


def _of_whisper(name: str) -> str:
    return "decoder" if _decoder_or_text(name) == "decoder" else "input_features"


ATTENTION = ("q_proj", "k_proj", "out_proj", "fc1", "fc2")
OF_T5 = ("q", "k", "o", "wi", "wo")

ARCHITECTURES = {
    "bert": Architecture(
        _made(
            hf.BertForTokenClassification, lambda: hf.BertConfig(**_PLAIN, intermediate_size=24, num_labels=VOCABULARY)
        ),
        ("query", "output.dense", "intermediate.dense"),
        text_with_positions,
    ),
    "llama": Architecture(
        _made(
            hf.LlamaForCausalLM, lambda: hf.LlamaConfig(**_PLAIN, intermediate_size=24, bos_token_id=1, eos_token_id=2)
        ),
        ("q_proj", "o_proj", "down_proj", "lm_head"),
        text,
    ),
    "gpt2": Architecture(
        _made(
            hf.GPT2LMHeadModel,
            lambda: hf.GPT2Config(
                vocab_size=VOCABULARY,
                n_embd=WIDTH,
                n_layer=2,
                n_head=HEADS,
                n_positions=40,
                initializer_range=0.2,
                bos_token_id=1,
                eos_token_id=2,
                resid_pdrop=0.0,
                attn_pdrop=0.0,
                embd_pdrop=0.0,
            ),
        ),
        ("c_attn", "c_proj"),
        text_with_positions,
    ),
    "opt": Architecture(
        _made(
            hf.OPTForCausalLM,
            lambda: hf.OPTConfig(
                **_without(_PLAIN, "initializer_range"),
                init_std=0.2,
                ffn_dim=WIDTH,
                word_embed_proj_dim=WIDTH,
                max_position_embeddings=40,
                dropout=0.0,
            ),
        ),
        ("q_proj", "out_proj", "fc1", "fc2"),
        text,
    ),
    "t5": Architecture(
        _made(hf.T5ForConditionalGeneration, lambda: hf.T5Config(**_T5)), OF_T5, pairs, stream=_decoder_or_text
    ),
    "bart": Architecture(
        _made(hf.BartForConditionalGeneration, lambda: hf.BartConfig(**_SEQ2SEQ)),
        ATTENTION,
        pairs,
        ("right",),
        _decoder_or_text,
    ),
    "marian": Architecture(
        _made(hf.MarianMTModel, lambda: hf.MarianConfig(**_SEQ2SEQ)), ATTENTION, pairs, ("right",), _decoder_or_text
    ),
    "whisper": Architecture(
        _made(
            hf.WhisperForConditionalGeneration,
            lambda: hf.WhisperConfig(
                **_without(_SEQ2SEQ, "max_position_embeddings"),
                num_mel_bins=8,
                max_source_positions=8,
                max_target_positions=40,
            ),
        ),
        ATTENTION,
        heard,
        ("right",),
        _of_whisper,
    ),
    "wav2vec2": Architecture(
        _made(hf.Wav2Vec2ForSequenceClassification, lambda: hf.Wav2Vec2Config(**_SOUND)),
        ("q_proj", "out_proj", "output_dense", "feature_projection.projection"),
        sound,
        ("right",),
        lambda name: "frames",
    ),
    "hubert": Architecture(
        _made(hf.HubertForSequenceClassification, lambda: hf.HubertConfig(**_SOUND)),
        ("q_proj", "out_proj", "output_dense", "feature_projection.projection"),
        sound,
        ("right",),
        lambda name: "frames",
    ),
    "xlnet": Architecture(
        _made(
            hf.XLNetForTokenClassification,
            lambda: hf.XLNetConfig(
                vocab_size=VOCABULARY,
                d_model=WIDTH,
                n_layer=2,
                n_head=HEADS,
                d_inner=24,
                initializer_range=0.2,
                num_labels=VOCABULARY,
                dropout=0.0,
                pad_token_id=PAD,
                bos_token_id=1,
                eos_token_id=2,
            ),
        ),
        ("layer_1", "layer_2"),
        text,
    ),
    "longformer": Architecture(
        _made(
            hf.LongformerForTokenClassification,
            lambda: hf.LongformerConfig(
                **_PLAIN,
                intermediate_size=24,
                attention_window=4,
                num_labels=VOCABULARY,
                max_position_embeddings=64,
                bos_token_id=1,
                eos_token_id=2,
                sep_token_id=2,
            ),
        ),
        ("query", "key", "output.dense", "intermediate.dense"),
        text,
        ("right",),
    ),
    "switch": Architecture(
        _made(
            hf.SwitchTransformersForConditionalGeneration,
            lambda: hf.SwitchTransformersConfig(
                **_T5,
                num_decoder_layers=2,
                num_experts=3,
                num_sparse_encoder_layers=1,
                num_sparse_decoder_layers=1,
                expert_capacity=64,
                router_jitter_noise=0.0,
                add_router_probs=False,
            ),
        ),
        ("q", "k", "wi", "wo"),
        pairs,
        stream=_decoder_or_text,
    ),
    "led": Architecture(
        _made(
            hf.LEDForConditionalGeneration,
            lambda: hf.LEDConfig(
                **_without(_SEQ2SEQ, "max_position_embeddings"),
                attention_window=4,
                max_encoder_position_embeddings=64,
                max_decoder_position_embeddings=64,
            ),
        ),
        ("query", "k_proj", "fc1", "fc2"),
        pairs,
        ("right",),
        _decoder_or_text,
    ),
    "nllb_moe": Architecture(
        _made(
            hf.NllbMoeForConditionalGeneration,
            lambda: hf.NllbMoeConfig(
                **_SEQ2SEQ,
                num_experts=4,
                encoder_sparse_step=1,
                decoder_sparse_step=1,
                expert_capacity=64,
                moe_token_dropout=0.0,
                second_expert_policy="all",
            ),
        ),
        ("q_proj", "fc1", "fc2"),
        pairs,
        ("right",),
        _decoder_or_text,
    ),
    "speech_to_text": Architecture(
        _made(
            hf.Speech2TextForConditionalGeneration,
            lambda: hf.Speech2TextConfig(
                **_without(_SEQ2SEQ, "max_position_embeddings"),
                input_feat_per_channel=8,
                input_channels=1,
                conv_channels=8,
                num_conv_layers=2,
                conv_kernel_sizes=[3, 3],
                max_source_positions=100,
                max_target_positions=40,
            ),
        ),
        ("q_proj", "k_proj", "fc1", "fc2"),
        spectra,
        ("right",),
        _of_speech,
    ),
    "vision_encoder_decoder": Architecture(
        _describer, ("query", "key", "q_proj", "fc1", "dense", "enc_to_dec_proj"), described, ("right",), _of_describer
    ),
    "llava": Architecture(
        lambda: hf.LlavaForConditionalGeneration(
            hf.LlavaConfig(
                text_config=hf.LlamaConfig(**_PLAIN, intermediate_size=24),
                vision_config=hf.CLIPVisionConfig(**_IMAGES),
                image_token_index=IMAGE,
            )
        ),
        ("q_proj", "fc2", "down_proj", "linear_1", "linear_2", "lm_head"),
        captioned,
        stream=lambda name: "text" if "language_model" in name or name == "lm_head" else "pixel_values",
    ),
    "qwen2_5_vl": Architecture(
        _qwen,
        ("q_proj", "down_proj", "qkv", "mlp.2"),
        seen,
        stream=lambda name: "pixel_values" if "visual" in name else "text",
    ),
}

SEQ2SEQ = (
    "t5", "bart", "marian", "whisper", "switch", "led", "nllb_moe", "speech_to_text", "vision_encoder_decoder"
)  # fmt: skip


def adapted(kind: str, seed: int = 0, dtype: torch.dtype = torch.float64) -> Any:
    """A PeftModel of an architecture, in float64, so that only the tokens can make a difference."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = ARCHITECTURES[kind].make().to(dtype).eval()
        config = LoraConfig(
            r=2, lora_alpha=4, target_modules=list(ARCHITECTURES[kind].targets), fan_in_fan_out=kind == "gpt2"
        )
        return get_peft_model(model, config, autocast_adapter_dtype=False).eval()


def cast(batch: Batch, dtype: torch.dtype = torch.float64) -> Batch:
    """Cast the floating tensors of a batch to the dtype of a model."""
    return {key: value.to(dtype) if value.is_floating_point() else value for key, value in batch.items()}
