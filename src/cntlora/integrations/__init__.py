"""Inside other programs: a plugin of axolotl, and PEFT's method comparison. Nothing else here imports this room."""
