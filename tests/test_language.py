"""The language of docstrings: each begins with a verb in the imperative or a noun, so that a reader learns at once what
it is about."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
QUESTIONS = {"What", "Whether", "How", "Why", "Where", "Which", "When", "Who"}
FRAGMENTS = {"Of", "As", "By", "From", "With", "Without", "In", "At", "To", "Over", "Only", "Afterwards", "Inside"}
THIRD_PERSON = {
    *("Adds", "Appends", "Asks", "Brings", "Checks", "Copies", "Counts", "Decides", "Decodes", "Deletes", "Ends"),
    *("Finds", "Gives", "Hands", "Holds", "Keeps", "Looks", "Makes", "Measures", "Notes", "Opens", "Prints", "Puts"),
    *("Raises", "Reads", "Refuses", "Removes", "Replaces", "Restores", "Returns", "Runs", "Says", "Sends", "Sorts"),
    *("Stores", "Takes", "Tells", "Trains", "Turns", "Warns", "Writes"),
}
"""Of functions: "Add" and not "Adds". A class may say what its objects do."""


def first_words(source: str) -> Iterator[tuple[str, str, bool]]:
    """Name, first word of the docstring, and whether it is a function, of all that has one."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            words = (ast.get_docstring(node) or "").split()
            function = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
            if words:
                yield getattr(node, "name", "module"), words[0].strip(",.:;"), function


def wrong_first_words(source: str) -> list[str]:
    """Those that begin with a question word, with a fragment of a sentence, or in the third person."""
    return [
        f"{name}: {word}"
        for name, word, function in first_words(source)
        if word in QUESTIONS
        or (word in FRAGMENTS and not name.startswith("test_"))
        or (function and word in THIRD_PERSON)
    ]


@pytest.mark.parametrize("folder", ["src", "tests", "benchmarks", "studies"])
def test_docstrings_begin_with_a_verb_or_a_noun(folder: str) -> None:
    found = {
        path.relative_to(ROOT).as_posix(): wrong
        for path in (ROOT / folder).rglob("*.py")
        if (wrong := wrong_first_words(path.read_text(encoding="utf-8")))
    }
    assert not found


@pytest.mark.parametrize("text", ["What it is.", "Whether it fits.", "Of the model.", "Adds a term."])
def test_other_beginnings_are_found(text: str) -> None:
    """The control of the test above."""
    assert wrong_first_words(f'def f():\n    """{text}"""\n') == [f"f: {text.split()[0]}"]
    assert not wrong_first_words('def f():\n    """Add a term."""\n')
