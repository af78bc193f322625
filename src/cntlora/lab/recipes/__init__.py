"""Recipes: data, models and loops of the paper's task families, and samples that need no hub."""
