"""A Hugging Face cache with tiny random models under the names that PEFT's tests ask for; nothing is downloaded."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

REVISION = "0" * 40
WORDS = 120
"""Words of the tokenizer, which is the same for all models."""


@dataclass(frozen=True)
class Tiny:
    """A random model: its class, the options of its configuration, and the seed of its weights.

    Attributes:
        std: the standard deviation of the weights, for configurations that name it `initializer_range`.
    """

    model: str
    config: dict[str, Any] = field(default_factory=dict)
    std: float = 0.1


_OPT = Tiny(
    "OPTForCausalLM",
    {
        "vocab_size": 2048, "hidden_size": 32, "num_hidden_layers": 5, "num_attention_heads": 4, "ffn_dim": 32,
        "max_position_embeddings": 128, "word_embed_proj_dim": 32, "dropout": 0.1,
    },
    std=0.05,
)  # fmt: skip
_OPT_12 = Tiny(
    "OPTForCausalLM",
    {
        "vocab_size": 128, "hidden_size": 64, "num_hidden_layers": 12, "num_attention_heads": 4, "ffn_dim": 64,
        "max_position_embeddings": 128, "word_embed_proj_dim": 64,
    },
)  # fmt: skip
_GPT2 = Tiny(
    "GPT2LMHeadModel", {"vocab_size": 128, "n_embd": 32, "n_layer": 5, "n_head": 4, "n_positions": 128}, std=0.2
)
_DECODER = {
    "vocab_size": 128, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32,
    "max_position_embeddings": 128,
}  # fmt: skip
_GROUPED = {**_DECODER, "num_key_value_heads": 4}
_GEMMA = {**_GROUPED, "head_dim": 8, "sliding_window": 64, "layer_types": ["sliding_attention", "full_attention"]}
_ENCODER = {
    "vocab_size": 128, "hidden_size": 32, "num_hidden_layers": 5, "num_attention_heads": 4, "intermediate_size": 37,
    "max_position_embeddings": 128,
}  # fmt: skip
_DEBERTA = {**_ENCODER, "num_hidden_layers": 2, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]}
_T5 = Tiny(
    "T5ForConditionalGeneration",
    {
        "vocab_size": 128, "d_model": 32, "d_kv": 8, "d_ff": 37, "num_layers": 3, "num_heads": 4,
        "decoder_start_token_id": 0,
    },
)  # fmt: skip
_MOE = {**_GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8}

MODELS = {
    "peft-internal-testing/tiny-random-OPTForCausalLM": _OPT,
    "peft-internal-testing/opt-125m": _OPT_12,
    "peft-internal-testing/tiny-random-GPT2LMHeadModel": _GPT2,
    "peft-internal-testing/tiny-random-gpt2": _GPT2,
    "hf-internal-testing/tiny-random-gpt2": _GPT2,
    "gpt2": _GPT2,
    "peft-internal-testing/tiny-random-GPTJForCausalLM": Tiny(
        "GPTJForCausalLM",
        {"vocab_size": 128, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "rotary_dim": 4},
    ),
    "peft-internal-testing/tiny-random-GPTNeoXForCausalLM": Tiny("GPTNeoXForCausalLM", _DECODER),
    "peft-internal-testing/tiny-random-BloomForCausalLM": Tiny(
        "BloomForCausalLM", {"vocab_size": 128, "hidden_size": 32, "n_layer": 5, "n_head": 4}
    ),
    "trl-internal-testing/tiny-random-LlamaForCausalLM": Tiny("LlamaForCausalLM", _GROUPED, std=0.3),
    "peft-internal-testing/tiny-random-LlamaForCausalLM": Tiny("LlamaForCausalLM", _GROUPED, std=0.3),
    "hf-internal-testing/tiny-random-LlamaForCausalLM": Tiny("LlamaForCausalLM", _GROUPED, std=0.3),
    "hf-internal-testing/tiny-random-MistralForCausalLM": Tiny("MistralForCausalLM", _GROUPED, std=0.3),
    "peft-internal-testing/tiny-dummy-qwen2": Tiny(
        "Qwen2ForCausalLM", {**_GROUPED, "tie_word_embeddings": True}, std=0.3
    ),
    "trl-internal-testing/tiny-Qwen3ForCausalLM": Tiny("Qwen3ForCausalLM", {**_GROUPED, "head_dim": 8}, std=0.3),
    "hf-internal-testing/tiny-random-Gemma3ForCausalLM": Tiny("Gemma3ForCausalLM", _GEMMA, std=0.3),
    "trl-internal-testing/tiny-Llama4ForCausalLM": Tiny(
        "Llama4ForCausalLM", {**_MOE, "intermediate_size_mlp": 32, "interleave_moe_layer_step": 1}
    ),
    "trl-internal-testing/tiny-GptOssForCausalLM": Tiny("GptOssForCausalLM", _MOE, std=0.5),
    "peft-internal-testing/tiny-random-t5": _T5,
    "peft-internal-testing/tiny-random-T5ForConditionalGeneration": _T5,
    "peft-internal-testing/tiny-random-T5ForConditionalGeneration-calibrated": _T5,
    "google/flan-t5-small": _T5,
    "peft-internal-testing/tiny-random-BartForConditionalGeneration": Tiny(
        "BartForConditionalGeneration",
        {
            "vocab_size": 128, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
            "decoder_attention_heads": 4, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32,
            "max_position_embeddings": 128,
        },
    ),
    "peft-internal-testing/tiny-random-BertModel": Tiny("BertModel", _ENCODER),
    "peft-internal-testing/tiny-random-RobertaModel": Tiny("RobertaModel", _ENCODER),
    "peft-internal-testing/tiny-random-DebertaModel": Tiny("DebertaModel", _DEBERTA),
    "peft-internal-testing/tiny-random-DebertaV2Model": Tiny("DebertaV2Model", _DEBERTA),
    "peft-internal-testing/tiny-random-BertForSequenceClassification": Tiny("BertForSequenceClassification", _ENCODER),
    "peft-internal-testing/tiny-random-RobertaForSequenceClassification": Tiny(
        "RobertaForSequenceClassification", _ENCODER
    ),
    "trl-internal-testing/tiny-LlamaForSequenceClassification-3.2": Tiny(
        "LlamaForSequenceClassification", {**_GROUPED, "num_labels": 1}
    ),
    "bert-base-uncased": Tiny("BertForSequenceClassification", {**_ENCODER, "num_hidden_layers": 12}),
    "peft-internal-testing/tiny-random-ResNetForImageClassification": Tiny(
        "ResNetForImageClassification",
        {"embedding_size": 10, "hidden_sizes": [10, 20, 30, 40], "depths": [1, 1, 2, 1], "num_labels": 3},
    ),
}  # fmt: skip
"""Name on the hub → the model that stands for it: of the same class, with other random weights."""

ADAPTERS = {"peft-internal-testing/tiny-OPTForCausalLM-lora": "peft-internal-testing/tiny-random-OPTForCausalLM"}
"""Name of a LoRA on the hub → its base model."""


def fill_cache(cache: Path, asked: str) -> None:
    """Write models that are not there into a cache of huggingface_hub, with a tokenizer or an image processor.

    Args:
        asked: text of the tests; a model is made if its name stands in it.
    """
    makers: dict[str, Callable[[Path], None]] = {
        **{name: _model_maker(name) for name in MODELS},
        **{name: _adapter_maker(base) for name, base in ADAPTERS.items()},
        "hf-internal-testing/tiny-sd-pipe": _save_stable_diffusion,
        "hf-internal-testing/tiny-flux2": _save_flux,
        "peft-internal-testing/tiny-clip-text-2": _save_clip_text,
    }
    for name, make in makers.items():
        reference = cache / f"models--{name.replace('/', '--')}" / "refs" / "main"
        if f'"{name}"' not in asked or reference.exists():
            continue
        folder = reference.parents[1] / "snapshots" / REVISION
        folder.mkdir(parents=True, exist_ok=True)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            make(folder)
        reference.parent.mkdir(parents=True, exist_ok=True)
        reference.write_text(REVISION)


def build(name: str) -> Any:
    """The model that stands for a name on the hub."""
    import transformers

    tiny = MODELS[name]
    kind = getattr(transformers, tiny.model)
    options = {"initializer_range": tiny.std, "init_std": tiny.std, **_SPECIAL, **tiny.config}
    return kind(kind.config_class(**options)).eval()


_SPECIAL = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
"""PEFT's tests feed the ids 1 and 2, of which neither may be padding: its embedding is zero."""


def _model_maker(name: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        model = build(name)
        model.save_pretrained(folder)
        if "Image" in type(model).__name__:
            from transformers import ConvNextImageProcessor

            ConvNextImageProcessor(size={"shortest_edge": 96}, crop_pct=1.0).save_pretrained(folder)
        else:
            tokenizer().save_pretrained(folder)

    return make


def tokenizer() -> Any:
    """A tokenizer of words; all that it does not know is one token."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<unk>", "<s>", "</s>"]
    words = [*special, *(f"word{index}" for index in range(WORDS - len(special)))]
    inner = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="<unk>", pad_token="<pad>", bos_token="<s>", eos_token="</s>",
        model_max_length=64,
    )  # fmt: skip


def _adapter_maker(base: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(build(base), LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False))
        model.peft_config["default"].base_model_name_or_path = base
        model.save_pretrained(folder)

    return make


def _save_clip_text(folder: Path) -> None:
    from transformers import CLIPTextConfig, CLIPTextModel

    CLIPTextModel(CLIPTextConfig(**_CLIP)).save_pretrained(folder)
    tokenizer().save_pretrained(folder)


_CLIP = {
    "vocab_size": 128, "hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 5, "num_attention_heads": 4,
    "max_position_embeddings": 77, "bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0,
}  # fmt: skip


def _save_stable_diffusion(folder: Path) -> None:
    import diffusers
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    vocabulary = folder / "tokenizer"
    vocabulary.mkdir(exist_ok=True)
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    pieces = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (vocabulary / "vocab.json").write_text(json.dumps({piece: index for index, piece in enumerate(pieces)}))
    (vocabulary / "merges.txt").write_text("#version: 0.2\n")
    unet = diffusers.UNet2DConditionModel(
        sample_size=32, layers_per_block=1, block_out_channels=(32, 64), cross_attention_dim=32,
        attention_head_dim=8, norm_num_groups=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    vae = diffusers.AutoencoderKL(
        block_out_channels=[32, 64], down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2, latent_channels=4, norm_num_groups=8,
    )  # fmt: skip
    diffusers.StableDiffusionPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(CLIPTextConfig(**_CLIP)),
        tokenizer=CLIPTokenizer(str(vocabulary / "vocab.json"), str(vocabulary / "merges.txt"), model_max_length=77),
        unet=unet,
        scheduler=diffusers.DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)


def _save_flux(folder: Path) -> None:
    from diffusers import Flux2Transformer2DModel

    model = Flux2Transformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, timestep_guidance_channels=256, axes_dims_rope=[4, 4, 4, 4],
    )  # fmt: skip
    model.save_pretrained(folder / "transformer")


def environment(cache: Path) -> dict[str, str]:
    """The variables by which huggingface_hub finds that cache and asks no server, and Python leaves no files behind."""
    return {
        **os.environ,
        "PYTHONDONTWRITEBYTECODE": "1",
        "HF_HUB_CACHE": str(cache.absolute()),
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
