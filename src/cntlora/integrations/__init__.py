"""Plugins of other programs: axolotl's, and PEFT's method comparison. Nothing else here imports this room."""
