"""All records of a study in one compressed table (Parquet), a row a run, and back without a loss.

A setting is a column by its dotted name (`config.lora.rank`); a curve (`losses`, `evaluations.accuracy`) and what is
known of the adapted layers (`sites.rank`, beside `sites.name`) are columns of lists; so a reader of the table needs
pandas or DuckDB and none of our code.

Two things a table does not have of its own. A key that a record lacks, other than one that is null, is listed in its
column `absent`. A column whose values have no type in common is one of JSON texts, marked as such in its metadata.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..atomic import write_atomically
from ..extras import MissingExtraError
from .record import SCHEMA, RunRecord, check_required, file_name, write_record

SUFFIX = ".parquet"
ABSENT = "absent"
_BY_NAME = ("sites",)  # name → facts, every name with the same facts
_LISTS = ("evaluations", "samples")  # entries with the same keys
_DIGEST = "cntlora.digest"
_JSON = {b"encoding": b"json"}
_ADVICE = "get the file again"


def write_table(path: Path, records: Sequence[RunRecord]) -> None:
    """Write the records as one table, whole or not at all, after reading it back and comparing it with them.

    Args:
        path: of the table; ends in .parquet.
        records: as `load_records` gives them; the place where they were found is not written.

    Raises:
        ValueError: there are none, the name ends otherwise, or a record cannot be written without a loss.
    """
    if path.suffix != SUFFIX:
        raise ValueError(f"{path}: expected a name that ends in {SUFFIX}")
    if not records:
        raise ValueError(f"{path}: expected at least one record, got none")
    plain = [{key: value for key, value in record.items() if key != "folder"} for record in records]
    data = _encoded([flattened(record) for record in plain], _digest(plain))
    for before, after in zip(plain, _decoded(data)[0], strict=True):
        if json.dumps(before, sort_keys=True) != json.dumps(after, sort_keys=True):
            raise ValueError(f"{path}: the record of {before['method']} cannot be written as a row without a loss")
    write_atomically(path, data)


def unpack(table: Path, folder: Path) -> int:
    """Write the records of a table into a folder, one file a run, as `cntlora run` does; return how many there were.

    Raises:
        ValueError: see `read_table`.
        FileExistsError: a file of a record is there already; nothing has been written.
    """
    records = read_table(table)
    several = len({record["experiment"] for record in records}) > 1
    files = {(folder / r["experiment"] if several else folder) / file_name(r): r for r in records}
    for path in files:
        if path.exists():
            raise FileExistsError(f"{path} is there already; give another folder")
    for path, record in files.items():
        write_record(path, {key: value for key, value in record.items() if key not in ("folder", "digest")})
    return len(files)


def read_table(path: Path) -> list[RunRecord]:
    """Read the records of a table.

    Returns:
        The records. Files of samples lie in a folder of the table's name beside it; where there is one, it is `folder`.

    Raises:
        ValueError: if it is no table of runs, was cut short or changed, or is of another schema; names the file.
    """
    try:
        found, digest = _decoded(path.read_bytes())
    except ModuleNotFoundError as error:
        raise MissingExtraError(str(error.name), "lab", "a table of runs") from error
    except Exception as error:  # pyarrow's errors have no root in common
        raise ValueError(f"{path}: cannot be read as a table of runs ({error}); {_ADVICE}") from error
    if digest not in (None, _digest(found)):
        raise ValueError(f"{path}: the table is not what was saved (its digest differs), so it was changed; {_ADVICE}")
    other = {record.get("schema") for record in found} - {SCHEMA}
    if other:
        raise ValueError(f"{path}: records of schema {other.pop()!r}, this cntlora reads {SCHEMA}; {_ADVICE}")
    checked = [check_required(f"{path}, row {row}", record, _ADVICE) for row, record in enumerate(found)]
    folder = path.with_suffix("")
    return [{**record, "folder": str(folder)} for record in checked] if folder.is_dir() else checked


def flattened(record: Mapping[str, Any]) -> dict[str, Any]:
    """Turn a record into columns by dotted name."""
    columns: dict[str, Any] = {}
    for key, value in record.items():
        if key in _BY_NAME and (facts := _in_common(value.values() if value else ())):
            columns[f"{key}.name"] = list(value)
            columns |= {f"{key}.{fact}": [entry[fact] for entry in value.values()] for fact in facts}
        elif key in _LISTS and (facts := _in_common(value or ())):
            columns |= {f"{key}.{fact}": [entry[fact] for entry in value] for fact in facts}
        elif key in (*_BY_NAME, *_LISTS):
            columns[key] = value  # none, or without a key in common
        else:
            columns |= _leaves(key, value)
    return columns


def restored(columns: Mapping[str, Any]) -> dict[str, Any]:
    """Turn columns by dotted name back into a record."""
    record: dict[str, Any] = {}
    rows: dict[str, dict[str, list[Any]]] = {}
    for column, value in columns.items():
        first, dot, rest = column.partition(".")
        if dot and first in (*_BY_NAME, *_LISTS):
            record.setdefault(first, None)  # keeps its place
            rows.setdefault(first, {})[rest] = value
            continue
        *sections, last = column.split(".")
        place = record
        for section in sections:
            place = place.setdefault(section, {})
        place[last] = value
    for key, facts in rows.items():
        names = facts.pop("name") if key in _BY_NAME else None
        entries = [dict(zip(facts, values, strict=True)) for values in zip(*facts.values(), strict=True)]
        record[key] = entries if names is None else dict(zip(names, entries, strict=True))
    return record


def _in_common(entries: Iterable[Mapping[str, Any]]) -> list[str]:
    """The keys of the entries if all have the same ones, else none."""
    found = list(entries)
    same = all(isinstance(entry, Mapping) and entry.keys() == found[0].keys() for entry in found)
    return list(found[0]) if found and same else []


def _leaves(name: str, value: Any) -> dict[str, Any]:
    """Every value below a key, by dotted name; a mapping that is empty, or whose keys have dots, is a value."""
    if not isinstance(value, Mapping) or not value or any("." in key for key in value):
        return {name: value}
    return {column: leaf for key, item in value.items() for column, leaf in _leaves(f"{name}.{key}", item).items()}


def _digest(records: Sequence[Mapping[str, Any]]) -> str:
    return hashlib.sha256(json.dumps(records, sort_keys=True).encode()).hexdigest()


def _encoded(rows: Sequence[Mapping[str, Any]], digest: str) -> bytes:
    """Write rows of columns as a Parquet file, with the digest of the records in its metadata."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    names = list(dict.fromkeys(name for row in rows for name in row))
    arrays, fields = [], []
    for name in names:
        array, metadata = _array([row.get(name) for row in rows])
        arrays.append(array)
        fields.append(pa.field(name, array.type, metadata=metadata))
    arrays.append(pa.array([[name for name in names if name not in row] for row in rows], pa.list_(pa.string())))
    fields.append(pa.field(ABSENT, arrays[-1].type))
    table = pa.Table.from_arrays(arrays, schema=pa.schema(fields, metadata={_DIGEST: digest}))
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd", compression_level=19, write_page_checksum=True)
    return buffer.getvalue()


def _array(values: Sequence[Any]) -> tuple[Any, dict[bytes, bytes] | None]:
    """An Arrow array of the values as they are, or of their JSON texts where they have no type in common."""
    import pyarrow as pa

    kinds = {kind for value in values for kind in _kinds(value)}
    if len(kinds) <= 1 and dict not in kinds:
        try:
            return pa.array(values, None if kinds else _empty(values)), None
        except (ValueError, TypeError, OverflowError):
            pass  # lists beside single values, numbers above 64 bits, half a character
    return pa.array([None if value is None else json.dumps(value) for value in values]), _JSON


def _empty(values: Sequence[Any]) -> Any:
    """The type of a column without a single value."""
    import pyarrow as pa

    return pa.list_(pa.float64()) if any(isinstance(value, list) for value in values) else pa.string()


def _kinds(value: Any) -> Iterable[type]:
    """The types of the single values within a value."""
    if isinstance(value, list):
        for item in value:
            yield from _kinds(item)
    elif value is not None:
        yield type(value)


def _decoded(data: bytes) -> tuple[list[dict[str, Any]], str | None]:
    """Read the rows of a Parquet file as records, and the digest in its metadata."""
    import pyarrow.parquet as pq

    table = pq.read_table(io.BytesIO(data), page_checksum_verification=True)
    texts = {field.name for field in table.schema if (field.metadata or {}).items() >= _JSON.items()}
    columns = {name: table.column(name).to_pylist() for name in table.column_names}
    absent = columns.pop(ABSENT)
    rows = []
    for i in range(table.num_rows):
        row = {name: values[i] for name, values in columns.items() if name not in absent[i]}
        rows.append(restored({n: json.loads(v) if n in texts and v is not None else v for n, v in row.items()}))
    digest = (table.schema.metadata or {}).get(_DIGEST.encode())
    return rows, digest and digest.decode()
