"""Parts of a model that matter for its tokens: its decoder, what makes frames, the modules whose calls are followed.

transformers' models are known by their configuration and methods; it is not imported.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor, nn

from ..model.lora_layers import is_lora_layer

OF_FRAMES = ("_get_feature_vector_attention_mask", "_get_feat_extract_output_lengths")
"""Methods of transformers' models of sound: the mask of the frames, and their number, from those of the samples."""


@dataclass(frozen=True)
class Anatomy:
    """Found once for all batches, since walking over the modules takes longer than following their calls."""

    model: nn.Module

    @cached_property
    def decoder(self) -> nn.Module | None:
        """The decoder of an encoder-decoder model, however that is wrapped; None for another model."""
        for module in self.model.modules():
            if getattr(module.__dict__.get("config"), "is_encoder_decoder", False) is True:
                get = getattr(module, "get_decoder", None)
                decoder = get() if callable(get) else None
                if isinstance(decoder, nn.Module) and decoder is not module:
                    return decoder
        return None

    @cached_property
    def innermost(self) -> nn.Module:
        """The user's model inside PEFT's and torch.compile's wrappers."""
        model: Any = self.model
        while True:
            inner = model._modules.get("_orig_mod")
            if inner is None and callable(getattr(type(model), "get_base_model", None)):
                inner = model.get_base_model()
            if not isinstance(inner, nn.Module) or inner is model:
                return model  # type: ignore[no-any-return]
            model = inner

    @cached_property
    def is_causal(self) -> bool:
        """Return whether a token sees those before it alone: by transformers' attention modules, or by the class."""
        said = [module.__dict__.get("is_causal") for module in self.innermost.modules()]
        known = [causal for causal in said if isinstance(causal, bool)]
        return any(known) if known else type(self.innermost).__name__.endswith("ForCausalLM")

    @cached_property
    def predicts_the_next(self) -> bool:
        """Return whether labels are compared with the outputs of the token before."""
        return type(self.innermost).__name__.endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration"))

    def token(self, key: str) -> int | None:
        """A token of the decoder's configuration, or of that around it, such as `pad_token_id`."""
        for module in (self.decoder, *self.model.modules()):
            value = getattr(module.__dict__.get("config"), key, None) if module is not None else None
            if isinstance(value, int):
                return value
        return None

    @cached_property
    def maker_of_frames(self) -> nn.Module | None:
        """The module that tells the mask of frames from that of samples."""
        return next((m for m in self.model.modules() if all(hasattr(type(m), name) for name in OF_FRAMES)), None)

    @property
    def frame_methods(self) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
        """Its methods for the mask of the frames and for their number."""
        mask_of, length_of = (getattr(self.maker_of_frames, name) for name in OF_FRAMES)
        return mask_of, length_of

    @cached_property
    def frame_options(self) -> tuple[dict[str, bool], ...]:
        """Keyword arguments of its methods: for the frames, and for those of the adapter of wav2vec 2.0."""
        of = [inspect.signature(getattr(type(self.maker_of_frames), name)).parameters for name in OF_FRAMES]
        return ({"add_adapter": False}, {"add_adapter": True}) if all("add_adapter" in p for p in of) else ({},)

    @cached_property
    def followed(self) -> list[nn.Module]:
        """Modules that hold others, embeddings, and layers outside repeated blocks; nothing inside a LoRA layer."""
        return list(_followed(self.model))


def _followed(model: nn.Module) -> Iterator[nn.Module]:
    stack = [(model, False)]
    while stack:
        module, repeated = stack.pop()
        if is_lora_layer(module):
            if not repeated or isinstance(module.get_base_layer(), nn.Embedding):  # type: ignore[operator]
                yield module
            continue
        inner = list(module.children())
        if inner or isinstance(module, nn.Embedding) or (not repeated and hasattr(module, "weight")):
            yield module
        repeated = repeated or isinstance(module, (nn.ModuleList, nn.ModuleDict, nn.Sequential))
        stack += [(child, repeated) for child in inner]
