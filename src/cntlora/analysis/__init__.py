"""Comparison of adapters, and diagnostics of a model before its first training step."""
