"""Layer-wise learning rates for full fine-tuning: the nearer to the input, the smaller (as in BEiT and MAE)."""

from __future__ import annotations

import re
from typing import Any

from torch import nn

_BLOCK = re.compile(r"(?:^|\.)(?:layers?|blocks?|h)\.(\d+)\.")
_HEAD = re.compile(r"(?:^|\.)(?:classifier|head|lm_head|score|pooler|fc)\b")


def depth_of(name: str, blocks: int) -> int:
    """Return the depth of a parameter: 0 for embeddings, i + 1 for block i, `blocks` + 1 for what follows the blocks.

    A block is named by a number, as in `encoder.layer.3.`, `layers.3.`, `blocks.3.` or `h.3.`. What has no number is
    taken for the head if it is called classifier, head, score, pooler or fc, or is a norm or a projection after the
    blocks (a name with "norm" or "ln_f" outside the embeddings); else for an embedding.
    """
    match = _BLOCK.search(name)
    if match:
        return int(match[1]) + 1
    last = ("norm" in name or "ln_f" in name) and "embed" not in name
    return blocks + 1 if last or _HEAD.search(name) else 0


def layered_groups(model: nn.Module, learning_rate: float, decay: float) -> list[dict[str, Any]]:
    """Groups of AdamW, one a depth: the learning rate times decay^(depth of the head − depth).

    Raises:
        ValueError: if no trained parameter lies in a numbered block.
    """
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    numbers = [int(match[1]) for name, _ in trained if (match := _BLOCK.search(name))]
    if not numbers:
        raise ValueError("layer_decay: no trained parameter lies in a numbered layer (such as encoder.layer.3)")
    blocks = max(numbers) + 1
    groups: dict[int, list[nn.Parameter]] = {}
    for name, parameter in trained:
        groups.setdefault(depth_of(name, blocks), []).append(parameter)
    return [{"params": groups[depth], "lr": learning_rate * decay ** (blocks + 1 - depth)} for depth in sorted(groups)]
