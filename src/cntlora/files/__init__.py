"""Saved adapters: writing, exporting, reading back, and their model cards."""
