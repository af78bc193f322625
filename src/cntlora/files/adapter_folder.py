"""The names of the files in an adapter's folder, and of the weights in them."""

from __future__ import annotations

WEIGHTS, CONFIG, CARD = "adapter_model.safetensors", "adapter_config.json", "README.md"
"""As PEFT writes them."""
DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
"""The weights and the configuration, as diffusers writes them."""
PREFIX = "base_model.model."
"""What PEFT puts in front of the name of a layer."""
