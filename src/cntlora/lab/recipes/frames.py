"""Rows of the user's own tables, files or data sets of the hub, and their columns."""

from __future__ import annotations

import csv
import json
import math
import warnings
from collections.abc import Callable
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import pandas as pd

from ...messages import first_line

_NAMES = "names of the classes"


def read_frame(source: str | PathLike[str], *, quoted: bool = True) -> pd.DataFrame:
    """All rows of a file or of a data set of the hub, every value of a .csv or .tsv as text.

    Args:
        source: a file whose suffix says the format: .csv or .tsv with a header, .jsonl (an object a line), .txt (a
            text a line, column "text", blank lines skipped), .parquet; all but the last UTF-8. Or a data set as
            "owner/name", "owner/name:configuration", "owner/name#split" (split "train" if none is named).
        quoted: a field of a .csv or .tsv that begins with a double quote ends at the next one; else quotes are letters.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: for another suffix, an empty or broken file (the message names the line where it can), or a data
            set that cannot be loaded.
    """
    path = Path(source)
    reader = _READERS.get(path.suffix.lower())
    if reader is _read_csv and not quoted:
        reader = partial(_read_csv, quoting=csv.QUOTE_NONE)
    if reader is None and not path.exists() and path.name != str(source) and not path.is_absolute():
        return _from_hub(str(source))
    if reader is None:
        raise ValueError(f"{path}: expected a name that ends in {', '.join(_READERS)}")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file")
    try:
        frame = reader(path)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 (byte {error.start}); save it as UTF-8") from error
    if frame.empty:
        raise ValueError(f"{path}: the file has no rows")
    return frame


def names_of(frame: pd.DataFrame, column: str) -> list[str] | None:
    """The names of the classes whose indices a column of a published data set holds; None where it says none."""
    names: list[str] | None = frame.attrs.get(_NAMES, {}).get(column)
    return names


def column(frame: pd.DataFrame, name: str, where: object) -> list[str]:
    """A column as text.

    Raises:
        ValueError: if there is no such column, or a row has nothing in it; names the columns, or the row (from 1).
    """
    values = raw_column(frame, name, where)
    for number, value in enumerate(values, start=1):
        if not pd.api.types.is_scalar(value):
            kind = type(value).__name__
            raise ValueError(f"{where}: row {number}: expected text in column {name!r}, got {kind}")
        if pd.isna(value) or not str(value).strip():
            raise ValueError(f"{where}: row {number} has nothing in column {name!r}; fill or remove it")
    return [str(value) for value in values]


def raw_column(frame: pd.DataFrame, name: str, where: object) -> list[Any]:
    """A column as it is.

    Raises:
        ValueError: if there is no such column.
    """
    if name not in frame.columns:
        existing = ", ".join(map(str, frame.columns))
        raise ValueError(f"{where}: there is no column {name!r}; its columns are: {existing}")
    return list(frame[name].tolist())


def numbers(frame: pd.DataFrame, name: str, where: object) -> list[float]:
    """A column of finite numbers.

    Raises:
        ValueError: as `column`, and for a value that is no finite number; names the row.
    """
    found = []
    for row, text in enumerate(column(frame, name, where), start=1):
        try:
            value = (
                math.nan if "_" in text else float(text)
            )  # Python's own literals, such as 1_000, are no numbers here
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise ValueError(f"{where}: row {row}: expected a number in column {name!r}, got {text!r}")
        found.append(value)
    return found


def _from_hub(source: str) -> pd.DataFrame:
    """Rows of a data set of the hub."""
    from datasets import load_dataset

    name, _, split = source.partition("#")
    name, _, configuration = name.partition(":")
    try:
        rows = load_dataset(name, configuration or None, split=split or "train")
        frame = pd.DataFrame(rows.to_pandas())
        frame.attrs[_NAMES] = {key: kind.names for key, kind in rows.features.items() if getattr(kind, "names", None)}
        return frame
    except Exception as error:  # of many libraries: no network, no such data set, configuration or split
        raise ValueError(
            f"data {source!r}: there is no such file, and as a data set of the hub it cannot be loaded "
            f"({first_line(error)}); "
            "expected a file, or owner/name[:configuration][#split]"
        ) from error


def _read_csv(path: Path, quoting: Literal[0, 3] = csv.QUOTE_MINIMAL) -> pd.DataFrame:
    separator = "\t" if path.suffix.lower() == ".tsv" else ","
    try:
        with warnings.catch_warnings():
            # more fields than columns: an unquoted separator in a text, which would lose its end
            warnings.simplefilter("error", pd.errors.ParserWarning)
            options: dict[str, Any] = {"sep": separator, "dtype": str, "encoding": "utf-8-sig", "quoting": quoting}
            options |= {"keep_default_na": False, "index_col": False}
            _check_columns(pd.read_csv(path, header=None, nrows=1, **options).iloc[0].tolist(), path)
            return pd.read_csv(path, **options)
    except pd.errors.EmptyDataError:
        return pd.DataFrame()
    except (pd.errors.ParserError, pd.errors.ParserWarning) as error:
        message = f"{path}: rows do not fit the header; quote texts that contain the separator ({error})"
        raise ValueError(message.replace("\n", " ")) from error


def _read_jsonl(path: Path) -> pd.DataFrame:
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line, object_pairs_hook=partial(_object, f"{path}: line {number}"))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}: line {number} is not JSON ({error})") from error
        if not isinstance(row, dict):
            raise ValueError(f"{path}: line {number}: expected an object {{…}}, got {type(row).__name__}")
        rows.append(row)
    return pd.DataFrame(rows, dtype=object)  # object: no column of whole numbers becomes one of floats


def _object(where: str, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON, whose keys have to differ: of two, Python keeps the last."""
    _check_columns([key for key, _ in pairs], where)
    return dict(pairs)


def _check_columns(names: list[str], where: object) -> None:
    twice = [name for name in dict.fromkeys(names) if name and names.count(name) > 1]
    if twice:
        raise ValueError(f"{where}: column {twice[0]!r} is there {names.count(twice[0])} times; name each column once")


def _read_txt(path: Path) -> pd.DataFrame:
    lines = path.read_text(encoding="utf-8-sig").split("\n")
    return pd.DataFrame({"text": [line.strip() for line in lines if line.strip()]}, dtype=object)


def _read_parquet(path: Path) -> pd.DataFrame:
    try:
        return pd.read_parquet(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: not a parquet file ({first_line(error)})") from error


_READERS: dict[str, Callable[[Path], pd.DataFrame]] = {
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
    ".txt": _read_txt,
}
