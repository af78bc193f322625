"""Masks of the tokens that count, by stream: from the batch, its labels and the user's rule."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..messages import quoted

if TYPE_CHECKING:
    from .anatomy import Anatomy

TokenMask = str | Callable[[Any], Tensor | Mapping[str, Tensor | None] | None] | None

IGNORED = -100
"""The label of a token that transformers' losses leave out."""


@dataclass
class TokenMasks:
    """The masks of one batch.

    Attributes:
        streams: stream → its boolean (batch, tokens) mask and what that comes from.
        sites: of the sites that the user's function names; None for a site all of whose tokens count.
        reached: stream → the tokens that the loss reaches; known only where the model's own loss decides.
        given: whether the batch or the user gave any, so that a site without one is worth a word.
        unusable: why a mask in the batch is none of (batch, tokens), else "".
        pad_id: of ids that tell padding by themselves; None where they are not asked.
    """

    streams: dict[str, tuple[Tensor, str]] = field(default_factory=dict)
    sites: dict[str, Tensor | None] = field(default_factory=dict)
    reached: dict[str, Tensor] = field(default_factory=dict)
    given: bool = False
    unusable: str = ""
    pad_id: int | None = None

    def all(self) -> list[Tensor]:
        """Every mask that the batch or the user gave."""
        return [mask for mask, _ in self.streams.values()] + [mask for mask in self.sites.values() if mask is not None]

    def stream_of(self, key: str) -> str | None:
        """The stream whose mask a batch has under this key."""
        return next((stream for stream, own in KEYS.items() if own == key), None)

    def needed(self) -> bool:
        """Return whether there is any token that may not count, or anything to say about one."""
        return bool(self.streams or self.sites or self.reached or self.unusable or self.pad_id is not None)


KEYS = {"text": "attention_mask", "decoder": "decoder_attention_mask", "encoder": "encoder_attention_mask"}
"""Stream → the key of its mask in a batch."""


def token_masks(model: Anatomy, batch: Any, rule: TokenMask, by_loss: bool = False) -> TokenMasks:
    """The masks of the tokens that count, by stream.

    Args:
        rule: None for the masks in the batch (`attention_mask`, `decoder_attention_mask`, `encoder_attention_mask`) of
            two dimensions, and for the decoder of an encoder-decoder model without one, its labels other than −100, or
            else its ids other than padding; "labels" for tokens with labels other than −100 among them; "none" for
            every token; or a function of the batch that returns a mask, a mapping from streams or sites to masks, or
            None.
        by_loss: leave out the tokens that the model's own loss does not reach too, see `reached_tokens`.

    Raises:
        ValueError: for an unknown rule, "labels" without labels of shape (batch, tokens), or a mask that is none.
    """
    own = rule(batch) if callable(rule) else None
    if not callable(rule) and rule not in (None, "attention", "labels", "none"):
        raise ValueError(f"token_mask: expected None, 'labels', 'none' or a function of the batch, got {quoted(rule)}")
    if rule == "labels" and not isinstance(batch, Mapping):
        raise ValueError(f"token_mask='labels' needs batches that are mappings with labels, got {type(batch).__name__}")
    if rule == "none" or (callable(rule) and own is None):
        return TokenMasks()
    masks = _in_batch(model, batch) if isinstance(batch, Mapping) else TokenMasks()
    if rule == "labels":
        _only_labelled(masks, batch, "decoder" if model.decoder is not None else "text")
    if callable(rule):
        _take_own(masks, own, batch)
    for stream, reached in reached_tokens(model, batch).items() if by_loss and isinstance(batch, Mapping) else ():
        derived = masks.streams.get(stream, (None, ""))[1] == "labels"  # which may leave out more than the loss does
        if derived or not bool(reached.all()):
            masks.reached[stream] = reached
    return masks


def _in_batch(model: Anatomy, batch: Mapping[str, Any]) -> TokenMasks:
    masks = TokenMasks()
    for stream, key in KEYS.items():
        mask = batch.get(key)
        if isinstance(mask, Tensor) and mask.dim() == 2:
            masks.streams[stream] = (mask.bool(), key)
        elif isinstance(mask, Tensor):
            masks.unusable = f"{key} has {mask.dim()} dimensions, expected (batch, tokens); give token_mask="
    masks.given = bool(masks.streams or masks.unusable)
    if "decoder" not in masks.streams and model.decoder is not None:
        _derive_decoder(masks, model, batch)
    return masks


def _derive_decoder(masks: TokenMasks, model: Anatomy, batch: Mapping[str, Any]) -> None:
    """The decoder's tokens where no mask tells them: those with a label, and no padding by its id."""
    labels, pad = labels_of(batch), model.token("pad_token_id")
    if labels is None or labels.dim() != 2:
        masks.pad_id = pad if masks.given or "decoder_input_ids" in batch else None
        return
    masks.streams["decoder"] = (_labelled(labels, pad, model.token("eos_token_id")), "labels")


def _labelled(labels: Tensor, pad: int | None, end: int | None) -> Tensor:
    """The places with a label other than −100; of labels without any −100, those that do not end a row with padding."""
    labelled = labels != IGNORED
    if pad is None:
        return labelled
    padding = (labels == pad).flip(1).long().cumprod(dim=1).flip(1).bool()
    if pad == end:  # the first one may be the end of the text
        padding = padding & torch.cat([torch.zeros_like(padding[:, :1]), padding[:, :-1]], dim=1)
    return torch.where(labelled.all(), ~padding, labelled)


def labels_of(batch: Mapping[str, Any]) -> Tensor | None:
    """The labels of a batch if they are whole numbers, which −100 may be among."""
    labels = batch.get("labels")
    usable = isinstance(labels, Tensor) and not labels.is_floating_point() and labels.dtype != torch.bool
    return labels if usable else None


def _only_labelled(masks: TokenMasks, batch: Mapping[str, Any], stream: str) -> None:
    labels = batch.get("labels")
    if not isinstance(labels, Tensor) or labels.dim() != 2:
        shape = tuple(labels.shape) if isinstance(labels, Tensor) else type(labels).__name__
        raise ValueError(f"token_mask='labels' needs labels of shape (batch, tokens), got {shape}")
    counted = labels != IGNORED
    mask, _ = masks.streams.get(stream, (counted, ""))
    masks.streams[stream] = (counted & mask if mask.shape == counted.shape else counted, "token_mask='labels'")
    masks.given = True


def _take_own(masks: TokenMasks, own: Any, batch: Any) -> None:
    """Take what the user's function gave, in place of what is in the batch."""
    masks.given = True
    if not isinstance(own, Mapping):
        mask = _two_dimensional(own)
        masks.streams[_stream_of(mask, masks, batch)] = (mask, "token_mask")
        return
    for name, mask in own.items():
        if name in KEYS or name in ("frames", *(batch if isinstance(batch, Mapping) else ())):
            masks.streams.pop(name, None)
            if mask is not None:
                kept = _two_dimensional(mask, name) if name in KEYS else _boolean(mask, name)
                masks.streams[name] = (kept, "token_mask")
        else:
            masks.sites[name] = None if mask is None else _boolean(mask, name)


def _stream_of(mask: Tensor, masks: TokenMasks, batch: Any) -> str:
    """The stream that one mask of the user is for: the text, unless only the decoder has its shape."""
    if not isinstance(batch, Mapping) or "decoder" not in masks.streams:
        return "text"
    decoder = masks.streams["decoder"][0].shape
    text = [batch.get(key) for key in ("input_ids", "attention_mask")]
    fits_text = any(isinstance(tensor, Tensor) and tensor.shape == mask.shape for tensor in text)
    return "decoder" if mask.shape == decoder and not fits_text else "text"


def _two_dimensional(mask: Any, name: str = "") -> Tensor:
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        got = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        of = f" for {name!r}" if name else ""
        raise ValueError(
            f"token_mask: the function must return a (batch, tokens) mask or None, got {got}{of}; or a mapping from "
            "streams ('text', 'decoder', 'encoder', 'frames') or sites to masks"
        )
    return mask.bool()


def _boolean(mask: Any, name: str) -> Tensor:
    if not isinstance(mask, Tensor):
        raise ValueError(f"token_mask: expected a mask for {name!r}, got {type(mask).__name__}")
    return mask.bool()


def reached_tokens(model: Anatomy, batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """Stream → the tokens that the model's own loss depends on, by the labels; those of others are left out.

    A token of a decoder is reached from labels at its place or behind it, of a causal language model from those
    behind it (logits are compared with the next label), and any other token from every label of its row. Labels of a
    row each reach all of it, unless they are −100. Where labels tell nothing, there is no entry.
    """
    labels = labels_of(batch)
    grid = next((t for k in ("attention_mask", "input_ids") if isinstance(t := batch.get(k), Tensor)), None)
    if labels is None or labels.dim() not in (1, 2) or not hasattr(model.innermost, "config"):
        return {}
    valid = labels != IGNORED
    behind = valid.flip(-1).cumsum(dim=-1).flip(-1) > 0
    rows = valid[:, None] if labels.dim() == 1 else valid.any(dim=1, keepdim=True)
    text = {"text": rows.expand(grid.shape)} if grid is not None and grid.dim() == 2 and len(grid) == len(rows) else {}
    if labels.dim() == 1:
        return text
    if model.decoder is not None:
        return {**text, "decoder": behind}
    if grid is None or grid.shape != labels.shape:
        return {}
    if not model.is_causal:
        return text
    if model.predicts_the_next:
        return {"text": torch.cat([behind[:, 1:], torch.zeros_like(behind[:, :1])], dim=1)}
    return {"text": behind}
