"""User files to Arrow, with everything that is wrong in them collected and located.

A file is read as a stream of `Part`s (some thousand rows each), so a row's Python objects live only until their part is
an Arrow table. Text, numbers, booleans and lists of numbers are Arrow columns; anything nested (chat messages, free-form
records) is kept as JSON text, which round-trips exactly whatever the rows hold. Nothing in a file is ever executed:
JSON, CSV and Parquet only, no pickle.
"""

from __future__ import annotations

import csv
import gzip
import json
import re
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from unipo.sources.data.problems import FAMILY, SHOWN, Findings, Problem, Where, a_

ROWS_PER_PART = 4096
_SPLITS = {"train": "train", "test": "test", "eval": "test", "validation": "validation", "valid": "validation",
           "val": "validation", "dev": "validation"}  # fmt: skip
_METADATA = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}


# ---- parts ---------------------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class Part:
    """Rows of one file: `table` [n], `numbers` [n] int64 line or row numbers, `encoded` columns hold JSON text."""

    file: str
    unit: str
    table: pa.Table
    numbers: np.ndarray
    encoded: frozenset[str] = frozenset()


def encode(values: Sequence[Any]) -> pa.Array:
    """JSON text of any values; None stays missing."""
    return pa.array([None if v is None else json.dumps(v, default=str) for v in values], pa.large_string())


class _Builder:
    """Plain rows in, `Part`s out."""

    def __init__(self, file: str, unit: str, findings: Findings) -> None:
        self.file, self.unit, self.findings = file, unit, findings
        self.rows: list[dict[str, Any]] = []
        self.numbers = array("q")

    def add(self, number: int, row: Any) -> Iterator[Part]:
        if not isinstance(row, dict) or not row:
            found = "an empty object" if row == {} else f"{a_(FAMILY.get(type(row), 'null'))} where a row was expected"
            remedy = 'write each row as an object with named columns, like {"prompt": "..."}'
            self.findings.add(Where(self.file, number, self.unit).problem(None, found, remedy))
            return
        self.rows.append(row)
        self.numbers.append(number)
        if len(self.rows) == ROWS_PER_PART:
            yield from self.flush()

    def flush(self) -> Iterator[Part]:
        if not self.rows:
            return
        names: dict[str, None] = {}
        for row in self.rows:
            if not names.keys() >= row.keys():
                names.update(dict.fromkeys(row))
        arrays, encoded = {}, set()
        for name in names:
            arrays[name], nested = self._column(name, [row.get(name) for row in self.rows])
            encoded |= {name} if nested else set()
        yield Part(self.file, self.unit, pa.table(arrays), np.array(self.numbers), frozenset(encoded))
        self.rows, self.numbers = [], array("q")

    def _column(self, name: str, values: list[Any]) -> tuple[pa.Array, bool]:
        """The Arrow array of a column, and whether it holds JSON text."""
        families = dict.fromkeys(FAMILY[t] for t in dict.fromkeys(map(type, values)) if t is not NoneType)
        for family in families:
            rows = (i for i, v in enumerate(values) if v is not None and FAMILY[type(v)] == family)
            count = len(values) - values.count(None) if len(families) == 1 else sum(
                v is not None and FAMILY[type(v)] == family for v in values)  # fmt: skip
            places = (Where(self.file, self.numbers[i], self.unit) for i in rows)
            self.findings.saw(name, family, places, count)
        if list(families) == ["text"]:
            return self._text(name, values), False
        if len(families) > 1 or "object" in families or any(v and type(v[0]) not in (int, float)
                                                            for v in values if type(v) is list):  # fmt: skip
            return encode(values), True
        try:
            return pa.array(values), False
        except (pa.ArrowException, OverflowError):  # ragged nesting, integers beyond 64 bits
            return encode(values), True

    def _text(self, name: str, values: list[Any]) -> pa.Array:
        try:
            return pa.array(values, pa.large_string())
        except UnicodeEncodeError:  # JSON may escape half of a surrogate pair; no tokenizer can read it
            clean = [v and v.encode("utf-8", "replace").decode() for v in values]
            for i, (old, new) in enumerate(zip(values, clean, strict=True)):
                if old != new:
                    found = "an unpaired surrogate (\\ud800 to \\udfff), which is not Unicode text"
                    where = Where(self.file, self.numbers[i], self.unit)
                    self.findings.add(where.problem(name, found, "replace the character"))
            return pa.array(clean, pa.large_string())


def join(parts: Sequence[Part]) -> tuple[pa.Table, frozenset[str]]:
    """One table of all parts, and its JSON-encoded columns. Columns that do not fit together become JSON text."""
    encoded = set().union(*(p.encoded for p in parts))
    schemas = [p.table.schema for p in parts]
    for name in dict.fromkeys(name for s in schemas for name in s.names):
        fields = [pa.schema([s.field(name)]) for s in schemas if name in s.names]
        try:
            pa.unify_schemas(fields, promote_options="permissive")
        except pa.ArrowException:
            encoded.add(name)
    tables = []
    for part in parts:
        table = part.table
        for name in (encoded - part.encoded) & set(table.column_names):
            table = table.set_column(table.column_names.index(name), name, encode(table[name].to_pylist()))
        tables.append(table)
    return pa.concat_tables(tables, promote_options="permissive"), frozenset(encoded)


# ---- formats -------------------------------------------------------------------------------------------------------
def _open(path: Path) -> IO[bytes]:
    return gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb")  # type: ignore[return-value]


def _lines(path: Path, findings: Findings) -> Iterator[tuple[int, str]]:
    """Line number and text; bytes that are not UTF-8 are a problem each line, and read on as replacement characters."""
    offset = 0
    with _open(path) as file:
        for number, line in enumerate(file, 1):
            if number == 1 and line.startswith((b"\xff\xfe", b"\xfe\xff")):
                remedy = "convert it: iconv -f UTF-16 -t UTF-8 FILE > NEW"
                findings.add(Problem(str(path), "the file is UTF-16, not UTF-8", remedy, 1, None, "line"))
                return
            try:
                text = line.decode()
            except UnicodeDecodeError as error:
                found = (f"byte 0x{line[error.start]:02x} is not UTF-8, at byte {error.start} of the line, "
                         f"{offset + error.start} of the file (from 0)")  # fmt: skip
                remedy = "save the file as UTF-8 (iconv -f LATIN1 -t UTF-8, if it is Latin-1)"
                findings.add(Problem(str(path), found, remedy, number, None, "line"))
                text = line.decode(errors="replace")
            offset += len(line)
            yield number, text.removeprefix("\ufeff") if number == 1 else text


def _read_jsonl(path: Path, findings: Findings) -> Iterator[Part]:
    builder = _Builder(str(path), "line", findings)
    for number, text in _lines(path, findings):
        if not text or text.isspace():
            continue
        try:
            row = json.loads(text)
        except (ValueError, RecursionError) as error:
            at = getattr(error, "pos", 0)
            found = (
                f"invalid JSON: {getattr(error, 'msg', error)} at character {at}, near {text[at : at + 30].strip()!r}"
            )
            findings.add(Problem(str(path), found, "write one JSON object per line", number, None, "line"))
            continue
        yield from builder.add(number, row)
    yield from builder.flush()


def _read_json(path: Path, findings: Findings) -> Iterator[Part]:
    """A list of rows, an object with one list of rows, or (mislabelled, but common) one object per line."""
    try:
        rows = json.loads("".join(text for _, text in _lines(path, findings)))
    except (ValueError, RecursionError) as error:
        if str(error).startswith("Extra data"):
            yield from _read_jsonl(path, findings)
            return
        found = f"invalid JSON: {getattr(error, 'msg', error)}"
        remedy = "the file should be one list of objects: [{...}, {...}]"
        findings.add(Problem(str(path), found, remedy, getattr(error, "lineno", None), None, "line"))
        return
    if isinstance(rows, dict):
        lists = [v for v in rows.values() if isinstance(v, list) and v and isinstance(v[0], dict)]
        rows = lists[0] if len(rows) == 1 and lists else [rows]
    builder = _Builder(str(path), "row", findings)
    for number, row in enumerate(rows if isinstance(rows, list) else [rows], 1):
        yield from builder.add(number, row)
    yield from builder.flush()


_CSV_JSON = {"logprobs", "token_ids", "completion_ids", "prompt_ids", "messages", "completions", "ratings", "ranking",
             "ref_logps", "reference_logps", "ref_chosen_logps", "ref_rejected_logps", "reference_chosen_logps",
             "reference_rejected_logps"}  # fmt: skip
_CSV_NUMBER = {"reward", "policy_version", "rating", "chosen_rating", "rejected_rating", "score_chosen", "score_rejected",
               "chosen_score", "rejected_score"}  # fmt: skip
_CSV_WORD = {"true": True, "false": False}


def _cell(name: str, text: str) -> Any:
    """A CSV cell has no type: known numeric and list columns are parsed (as text if that fails), the rest is text."""
    if not text:
        return None
    if name in ("label", "truncated"):
        return _CSV_WORD.get(text.lower(), text)
    if name in _CSV_NUMBER or name in _CSV_JSON or text.startswith('[{"'):
        try:
            return json.loads(text) if name not in _CSV_NUMBER else int(text) if text.isdigit() else float(text)
        except ValueError:
            return text
    return text


def _read_csv(path: Path, findings: Findings) -> Iterator[Part]:
    csv.field_size_limit(2**31 - 1)  # the default of 128 KiB is shorter than a long prompt
    reader = csv.reader((text for _, text in _lines(path, findings)), strict=True)
    builder, number = _Builder(str(path), "line", findings), 1
    try:
        header = next(reader, [])
        for name in {n for n in header if not n or header.count(n) > 1}:
            found = f"the header names {name!r} {header.count(name)} times" if name else "a column has no name"
            findings.add(Problem(str(path), found, "give each column its own name", 1, name or None, "line"))
        number = reader.line_num + 1
        for cells in reader:
            if len(cells) == len(header):
                yield from builder.add(number, {n: _cell(n, c) for n, c in zip(header, cells, strict=True)})
            elif cells:
                found = f"{len(cells)} fields, but the header has {len(header)}"
                remedy = 'put text with commas, quotes or line breaks in "double quotes"'
                findings.add(Problem(str(path), found, remedy, number, None, "line"))
            number = reader.line_num + 1
    except csv.Error as error:
        findings.add(Problem(str(path), f"invalid CSV: {error}", "check the quotes", number, None, "line"))
    yield from builder.flush()


def _read_parquet(path: Path, findings: Findings) -> Iterator[Part]:
    with pq.ParquetFile(path) as file:  # not read_table, which turns folder names like a=b into columns
        yield from arrow_parts(str(path), file.read(), findings)


def arrow_parts(file: str, table: pa.Table, findings: Findings) -> Iterator[Part]:
    """The rows of an Arrow table; `file` is what problems are reported under."""
    names = table.column_names
    for name in {n for n in names if names.count(n) > 1}:
        findings.add(Problem(file, "two columns have this name", "rename or drop one", None, name))
    table = table.replace_schema_metadata(None).select([names.index(n) for n in dict.fromkeys(names)])
    for i, name in enumerate(table.column_names):
        column = table[name]
        if pa.types.is_dictionary(column.type):
            column = column.cast(column.type.value_type)
        if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
            column = _valid_text(file, name, column.cast(pa.large_string()), findings)
        table = table.set_column(i, name, column)
        filled = np.flatnonzero(column.is_valid().to_numpy()) if table.num_rows else np.zeros(0, np.int64)
        if len(filled):
            places = (Where(file, int(row) + 1) for row in filled[:SHOWN])
            findings.saw(name, family_of(column.type), places, len(filled))
    if table.num_rows:
        yield Part(file, "row", table, np.arange(1, table.num_rows + 1))


def _valid_text(file: str, name: str, column: pa.ChunkedArray, findings: Findings) -> pa.ChunkedArray:
    try:
        column.validate(full=True)
        return column
    except pa.ArrowInvalid:
        values: list[bytes | None] = column.cast(pa.large_binary()).to_pylist()
    for row, value in enumerate(values, 1):
        try:
            (value or b"").decode()
        except UnicodeDecodeError as error:
            found = f"byte 0x{error.object[error.start]:02x} at byte {error.start} of the text is not UTF-8"
            findings.add(Problem(file, found, "write the column as UTF-8 text", row, name))
    text = [None if v is None else v.decode(errors="replace") for v in values]
    return pa.chunked_array([pa.array(text, pa.large_string())])


def family_of(kind: pa.DataType) -> str:
    """The family (text, number, boolean, list, object, bytes, null, other) of an Arrow type."""
    tests: dict[str, tuple[Callable[[pa.DataType], bool], ...]] = {
        "null": (pa.types.is_null,),
        "boolean": (pa.types.is_boolean,),
        "number": (pa.types.is_integer, pa.types.is_floating, pa.types.is_decimal),
        "text": (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view),
        "list": (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list),
        "object": (pa.types.is_struct, pa.types.is_map),
        "bytes": (pa.types.is_binary, pa.types.is_large_binary),
    }
    return next((family for family, checks in tests.items() if any(check(kind) for check in checks)), "other")


def _read_text(path: Path, findings: Findings) -> Iterator[Part]:
    """A row with the column `text` for each stretch of lines without an empty one."""
    builder, first = _Builder(str(path), "line", findings), 1
    lines: list[str] = []
    for number, line in _lines(path, findings):
        if line.strip():
            first = first if lines else number
            lines.append(line.rstrip())
        elif lines:
            yield from builder.add(first, {"text": "\n".join(lines)})
            lines = []
    if lines:
        yield from builder.add(first, {"text": "\n".join(lines)})
    yield from builder.flush()


READERS: Mapping[str, Callable[[Path, Findings], Iterator[Part]]] = {
    ".jsonl": _read_jsonl, ".ndjson": _read_jsonl, ".json": _read_json, ".csv": _read_csv, ".parquet": _read_parquet,
    ".txt": _read_text,
}  # fmt: skip


# ---- files ---------------------------------------------------------------------------------------------------------
def format_of(path: Path) -> str:
    """The suffix that tells the format: `.jsonl` for both a.jsonl and a.jsonl.gz."""
    return Path(path.stem).suffix.lower() if path.suffix == ".gz" else path.suffix.lower()


def read_file(path: Path, findings: Findings) -> Iterator[Part]:
    """The parts of one file; a file that cannot be opened or is damaged is a problem, not an exception."""
    try:
        yield from READERS[format_of(path)](path, findings)
    except (OSError, EOFError, UnicodeError, pa.ArrowException) as error:
        found = f"cannot be read as {format_of(path)[1:]}: {error}"
        findings.add(Problem(str(path), found, "check that the file is complete and readable"))


def files_in(folder: Path, split: str, findings: Findings) -> list[Path]:
    """The data files of `split` in a folder, sorted by name.

    A file belongs to the split that its name or sub-folder names (train-00000.parquet, test.jsonl); when no file names
    one, all of them are "train".
    """
    hidden = re.compile(r"(^|/)[._]")
    files = [p for p in sorted(folder.rglob("*")) if format_of(p) in READERS and p.is_file()
             and p.name not in _METADATA and not hidden.search(p.relative_to(folder).as_posix())]  # fmt: skip
    files = [p for p in files if format_of(p) != ".txt"] or files  # beside data, text is about the data
    splits = {p: split_of(p.relative_to(folder)) for p in files}
    named = {s for s in splits.values() if s is not None}
    wanted = _SPLITS.get(split, split)
    chosen = [p for p in files if (splits[p] or ("train" if not named else None)) == wanted or split in p.stem]
    if not files:
        found = f"no data files in this folder (looked for *{', *'.join(READERS)})"
        findings.add(Problem(str(folder), found, "name a folder that holds some, or a file"))
    elif not chosen:
        found = f"no file for the split {split!r}; the files are for: {', '.join(sorted(named)) or 'train'}"
        findings.add(
            Problem(str(folder), found, f"name a file {split}.jsonl (or .parquet, .csv), or ask for another split")
        )
    return chosen


def split_of(path: Path) -> str | None:
    """The split that a file name or its folders name: train, test or validation; None when none is."""
    words = re.split(r"[^a-z]+", path.as_posix().lower())
    return next((_SPLITS[w] for w in reversed(words) if w in _SPLITS), None)
