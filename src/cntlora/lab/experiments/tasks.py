"""The table of tasks: which module of `cntlora.lab.recipes` offers a name. A new task is one row.

The table is light: a recipe, and what it needs (transformers, diffusers, pandas), is imported when it is used.
"""

from __future__ import annotations

from importlib import import_module

from ...extras import require
from ...messages import unknown_name
from ..recipes.task import Recipe, Task

TASKS: dict[str, tuple[str, str]] = {
    "tweets": ("text.sentiment", "text"),
    "text": ("text.classification", "text"),
    "pairs": ("text.classification", "text"),
    "glue": ("text.glue", "text"),
    "language-model": ("text.language", "text"),
    "vision": ("vision.task", "vision"),
    "vtab": ("vision.task", "vision"),
    "dreambooth": ("diffusion.task", "diffusion"),
    "captioning": ("captioning.task", "vlm"),
}
"""Name → module of `cntlora.lab.recipes`, and the extra that brings what it imports."""


def task_kind(name: str) -> Recipe:
    """The recipe of a task's name.

    Raises:
        ValueError: for an unknown name, with the nearest right one.
        MissingExtraError: if a library is missing that the recipe imports, now or later, with its extra.
    """
    if name not in TASKS:
        raise ValueError(unknown_name("task.name", name, TASKS))
    module, extra = TASKS[name]
    require(extra, f"task {name!r}")
    recipes: dict[str, Recipe] = import_module(f"cntlora.lab.recipes.{module}").RECIPES
    return recipes[name]


def make_task(settings: object) -> Task:
    """The task of a `[task]` section."""
    return task_kind(str(getattr(settings, "name", ""))).make(settings)
