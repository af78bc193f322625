"""Rows of the user's own tables, files or data sets of the hub, and their columns."""

from __future__ import annotations

import csv
import json
import math
import re
import warnings
from collections.abc import Callable
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import pandas as pd

from ...messages import first_line

_NAMES = "names of the classes"
_LONG_LINE = 20_000
"""Characters of the only line of a .txt from which on it is taken for a whole book in one line."""


def read_frame(source: str | PathLike[str], *, quoted: bool = True) -> pd.DataFrame:
    """All rows of a file or of a data set of the hub, every value of a .csv or .tsv as text.

    Args:
        source: a file whose suffix says the format: .csv or .tsv with a header, .jsonl (an object a line), .json (a
            list of objects), .txt (a text a line, column "text", blank lines skipped), .parquet; all but the last
            UTF-8. Columns of a .csv are separated by commas, or by semicolons where its header has no comma. Or a data
            set as "owner/name", "owner/name:configuration", "owner/name#split" (split "train" if none is named), or a
            folder that `datasets` loads: of data files, or written by its save_to_disk.
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
    if Path(str(source).partition("#")[0]).is_dir() or (
        reader is None and not path.exists() and _may_be_published(str(source))
    ):
        return _from_hub(str(source))
    if str(source).endswith("/"):
        raise FileNotFoundError(f"{source}: there is no such folder")
    if reader is None:
        raise ValueError(f"{path}: expected a name that ends in {', '.join(_READERS)}")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file")
    try:
        frame = reader(path)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: {_not_utf8(path, error)}") from error
    if frame.empty:
        raise ValueError(f"{path}: the file has no rows")
    return frame


def _not_utf8(path: Path, error: UnicodeDecodeError) -> str:
    """Describe another encoding: which byte, and the command that converts the file."""
    content = path.read_bytes()
    wide = content[:2] in (b"\xff\xfe", b"\xfe\xff")
    # iconv stops at the five bytes that Windows-1252 leaves without a meaning
    name = "UTF-16" if wide else "ISO-8859-1" if re.search(rb"[\x81\x8d\x8f\x90\x9d]", content) else "WINDOWS-1252"
    found = "UTF-16" if wide else f"not UTF-8 (byte {error.start} is 0x{error.object[error.start]:02x})"
    command = f"iconv -f {name} -t UTF-8 {path.name} > utf8{path.suffix}"
    return f"{found}; save it as UTF-8, {command} if it is {'that' if wide else 'in a Western European encoding'}"


def names_of(frame: pd.DataFrame, column: str) -> list[str] | None:
    """The names of the classes whose indices a column of a published data set holds; None where it says none."""
    names: list[str] | None = frame.attrs.get(_NAMES, {}).get(column)
    return names


def column(frame: pd.DataFrame, name: str, where: object, setting: str = "") -> list[str]:
    """A column as text.

    Args:
        frame, name, where: its table, its name, and the file, for messages.
        setting: that names the column, such as "task.text", for messages.

    Raises:
        ValueError: if there is no such column, or a row has nothing in it; names the columns, or the row (from 1).
    """
    values = raw_column(frame, name, where, setting)
    for number, value in enumerate(values, start=1):
        if not pd.api.types.is_scalar(value):
            kind = type(value).__name__
            raise ValueError(f"{where}: row {number}: expected text in column {name!r}, got {kind}")
        if pd.isna(value) or not str(value).strip():
            raise ValueError(f"{where}: row {number} has nothing in column {name!r}; fill or remove it")
    return [str(value) for value in values]


def raw_column(frame: pd.DataFrame, name: str, where: object, setting: str = "") -> list[Any]:
    """A column as it is; arguments as in `column`.

    Raises:
        ValueError: if there is no such column.
    """
    if name not in frame.columns:
        existing = ", ".join(map(str, frame.columns))
        cure = f"; name yours with {setting}" if setting else ""
        raise ValueError(f"{where}: there is no column {name!r}; its columns are: {existing}{cure}")
    return list(frame[name].tolist())


def numbers(frame: pd.DataFrame, name: str, where: object, setting: str = "") -> list[float]:
    """A column of finite numbers; arguments as in `column`.

    Raises:
        ValueError: as `column`, and for a value that is no finite number; names the row.
    """
    found = []
    for row, text in enumerate(column(frame, name, where, setting), start=1):
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


def _may_be_published(source: str) -> bool:
    """Return whether a name that is no file may be one of the hub: a folder that is there would have the file."""
    name = source.partition("#")[0].partition(":")[0]
    return re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) is not None and not Path(name).parent.is_dir()


def _load(name: str, configuration: str, split: str) -> Any:
    """Load a split by `datasets`, of the hub or of a folder."""
    import datasets

    if Path(name).is_dir() and any((Path(name) / file).is_file() for file in ("state.json", "dataset_dict.json")):
        found = datasets.load_from_disk(name)
        return found[split] if isinstance(found, datasets.DatasetDict) else found
    return datasets.load_dataset(name, configuration or None, split=split)


def _from_hub(source: str) -> pd.DataFrame:
    """Rows of a data set of the hub."""
    name, _, split = source.partition("#")
    name, _, configuration = name.partition(":")
    try:
        rows = _load(name, configuration, split or "train")
        frame = pd.DataFrame(rows.to_pandas())
        frame.attrs[_NAMES] = {key: kind.names for key, kind in rows.features.items() if getattr(kind, "names", None)}
        return frame
    except Exception as error:  # of many libraries: no network, no such data set, configuration or split
        raise ValueError(
            f"data {source!r}: there is no such file, and as a data set of the hub or a folder of data files it cannot "
            f"be loaded ({first_line(error)}); expected a file, or owner/name[:configuration][#split]"
        ) from error


def _read_csv(path: Path, quoting: Literal[0, 3] = csv.QUOTE_MINIMAL) -> pd.DataFrame:
    separator = "\t" if path.suffix.lower() == ".tsv" else _separator(path)
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
        message = f"{path}: rows do not fit the header; quote texts that contain the separator ({first_line(error)})"
        raise ValueError(message) from error


def _separator(path: Path) -> str:
    """Return the separator of a .csv: a comma, or where its header has none a semicolon or a tab."""
    with path.open(encoding="utf-8-sig", newline="") as opened:
        header = opened.readline()
    return next((sign for sign in (",", ";", "\t") if sign in header), ",")


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


def _read_json(path: Path) -> pd.DataFrame:
    content = path.read_text(encoding="utf-8-sig")
    try:
        rows = json.loads(content, object_pairs_hook=partial(_object, str(path)))
    except json.JSONDecodeError as error:
        if content.lstrip().startswith("{") and "Extra data" in error.msg:
            return _read_jsonl(path)  # an object a line, whatever it is called
        raise ValueError(f"{path}: not JSON ({error})") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path}: expected a list of objects [{{…}}, …], got {type(rows).__name__}")
    return pd.DataFrame(rows, dtype=object)


def _read_txt(path: Path) -> pd.DataFrame:
    lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").split("\n") if line.strip()]
    if len(lines) == 1 and len(lines[0]) > _LONG_LINE:
        raise ValueError(
            f"{path}: its {len(lines[0]):,} characters are one line, and a line is one text, of which only the "
            f"beginning would be read; break it into lines, as fold -s -w 2000 {path.name} > lines.txt does"
        )
    return pd.DataFrame({"text": lines}, dtype=object)


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
    ".json": _read_json,
}
