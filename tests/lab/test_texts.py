"""Text samples from packages: pairing and cutting on small fakes; the real ones under `packages`."""

from __future__ import annotations

from pathlib import Path

import pytest

from cntlora.lab.recipes.samples import texts
from cntlora.lab.recipes.samples.texts import paired, passages, read_tab

GROUPS = {f"g{g}": [f"{g} {i}" for i in range(count)] for g, count in enumerate((40, 30, 8, 21))}


def test_pairs_are_balanced_and_every_text_is_in_one() -> None:
    table = paired(GROUPS, seed=0)
    assert sum(table.labels) * 2 == len(table) > 30
    assert len({*table.texts, *table.seconds}) == 2 * len(table)
    for first, second, label in zip(table.texts, table.seconds, table.labels, strict=True):
        assert (first.split()[0] == second.split()[0]) == (label == 1)
    assert table.labels != sorted(table.labels)  # in random order
    train, held_out = table.split(10, seed=0)
    assert not {*train.texts, *train.seconds} & {*held_out.texts, *held_out.seconds}


def test_pairs_depend_on_the_seed_alone() -> None:
    assert paired(GROUPS, seed=0) == paired(dict(reversed(GROUPS.items())), seed=0)
    assert paired(GROUPS, seed=0) != paired(GROUPS, seed=1)


def test_a_text_that_comes_again_is_used_once() -> None:
    table = paired({"a": ["x"] * 20 + ["1", "2", "3"], "b": ["x", "4", "5", "6", "7"]}, seed=0)
    everything = [*table.texts, *table.seconds]
    assert len(everything) == len(set(everything))


@pytest.mark.parametrize("groups", [{}, {"a": ["1", "2", "3", "4"]}, {"a": ["1"], "b": ["2", "3"]}])
def test_too_few_texts_make_no_pairs(groups: dict[str, list[str]]) -> None:
    with pytest.raises(ValueError, match="groups: expected two of four texts or more, got sizes"):
        paired(groups, seed=0)


def test_passages_are_whole_sentences_and_lose_no_word() -> None:
    text = "One two three.  Four five! “Six seven?” Eight nine\nten eleven. Twelve. " * 9
    found = passages(text, 10)
    assert " ".join(found) == " ".join(text.split())
    assert all(10 <= len(one.split()) <= 20 for one in found)
    assert all(one[-1] in ".!?”" for one in found)
    assert passages("A single sentence", 10) == ["A single sentence"]
    assert passages("", 10) == []
    assert passages("a b c d. e.", 4) == ["a b c d. e."]  # a short rest joins the last


def test_parts_share_no_work_and_no_text() -> None:
    works = [[f"{w} {i}" for i in range(3)] for w in range(16)]
    works[7].append("0 0")  # of the first work, comes again in one of the other part
    every, train, held_out = (texts._parts(works, part).texts for part in ("all", "train", "eval"))
    assert sorted(train + held_out) == sorted(every)
    assert len(every) == 48
    assert {text.split()[0] for text in held_out} == {"7", "15"}
    assert "0 0" in train
    with pytest.raises(ValueError, match="part: expected all, train or eval, got 'test'"):
        texts._parts(works, "test")


def test_tables_of_orange_are_read_below_their_three_rows(tmp_path: Path) -> None:
    path = tmp_path / "x.tab"
    path.write_text('Category\tText\nd\tstring\nclass\t\n\na\tsaid "no\nNA\tx\n', encoding="utf-8")
    frame = read_tab(path, ("Text", "Category"), quoted=False)
    assert frame.to_numpy().tolist() == [['said "no', "a"], ["x", "NA"]]
    with pytest.raises(RuntimeError, match=r"x\.tab: no column 'Content'; there are Category, Text"):
        read_tab(path, ["Content"], quoted=False)


@pytest.mark.packages
@pytest.mark.slow
def test_the_real_texts_are_all_there() -> None:
    """Download 38 MB at the first run."""
    pairs = texts.newsgroup_pairs()
    assert (len(pairs), sum(pairs.labels)) == (9028, 4514)
    assert len({*pairs.texts, *pairs.seconds}) == 2 * 9028
    assert texts.newsgroup_pairs() == pairs
    for load, count in ((texts.tales, 917), (texts.dialogue, 7783)):
        every, train, held_out = load(), load("train"), load("eval")
        assert len(every) == len(train) + len(held_out) == count
        assert not {*train.texts} & {*held_out.texts}
        assert all(text.strip() for text in every.texts)
