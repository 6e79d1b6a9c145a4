"""Users' data: JSONL, JSON, CSV, Parquet, text, folders of them, saved `datasets` folders and hub names, checked at the door.

    data = load_rows("problems.jsonl")
    data.kinds                        ("prompts",)
    for row in data.prompts(): ...    PromptRow(prompt=..., columns={"answer": ...}, where=problems.jsonl line 1)

Columns decide the use (any others are kept and reach reward functions by name)::

    prompts         prompt | messages
    demonstrations  prompt + completion | messages that end with an assistant turn
    pairs           prompt + chosen + rejected | chosen + rejected as whole conversations | prompt + completions + ratings
                    (or ranking), optional ratings of pairs and log-probs of a reference (`unipo.sources.data.preferences`)
    ratings         prompt + completion + rating, optional group: a list over several rows
    labels          prompt + completion + label (true or false)
    rollouts        prompt + completion + reward, optional logprobs, token_ids, prompt_ids, policy_version, source,
                    truncated, and group, group_id or prompt_id
    documents       text; of a .txt file, each of the pieces that empty lines divide it into

`load_rows` raises `DataError` for whatever would make any use wrong; `prompts()`, `pairs()`, ... check all rows for their
own use, once, before they give the first.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Generic, TypeVar, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from unipo.sources.data.files import (
    READERS,
    Part,
    encode,
    family_of,
    files_in,
    format_of,
    join,
    read_file,
    split_of,
)
from unipo.sources.data.hub import huggingface, is_saved_dataset, may_be_hub_name
from unipo.sources.data.preferences import lists_of
from unipo.sources.data.problems import DataError, Findings, Problem, Where
from unipo.sources.data.records import (
    DEMONSTRATIONS,
    DOCUMENTS,
    KINDS,
    LABELS,
    LIST_COLUMNS,
    PAIRS,
    PROMPTS,
    RATINGS,
    ROLLOUTS,
    DemonstrationRow,
    DocumentRow,
    Kind,
    LabelRow,
    PairRow,
    PromptRow,
    RatedRow,
    RolloutRow,
    nearest,
)

__all__ = [
    "DataError",
    "Dataset",
    "DemonstrationRow",
    "DocumentRow",
    "LabelRow",
    "PairRow",
    "Problem",
    "PromptRow",
    "RatedRow",
    "Records",
    "RolloutRow",
    "Where",
    "load_rows",
    "read_rows",
]  # fmt: skip
BATCH = 2048
T = TypeVar("T", bound="PromptRow | DocumentRow | DemonstrationRow | PairRow | RatedRow | LabelRow | RolloutRow")


@dataclass(frozen=True, eq=False)
class Dataset(Sequence[dict[str, Any]]):
    """Plain rows (dicts, None where a value is missing) over an Arrow table; read-only.

    `numbers` [n] int64: line or row number of each row in its file. `file_ids` [n] int32: index into `files`, which are
    (name, unit) pairs. `encoded`: the columns that the table holds as JSON text.
    """

    name: str
    table: pa.Table
    numbers: np.ndarray
    file_ids: np.ndarray
    files: tuple[tuple[str, str], ...]
    encoded: frozenset[str] = frozenset()
    _checked: set[str] = field(default_factory=set, repr=False)

    def __len__(self) -> int:
        return int(self.table.num_rows)

    @overload
    def __getitem__(self, index: int) -> dict[str, Any]: ...
    @overload
    def __getitem__(self, index: slice) -> Dataset: ...
    def __getitem__(self, index: int | slice) -> dict[str, Any] | Dataset:
        if isinstance(index, slice):
            return self.take(np.arange(len(self))[index])
        i = range(len(self))[index]
        return next(_plain(self.table.slice(i, 1), self.encoded, arrays=False))

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for start in range(0, len(self), BATCH):
            yield from _plain(self.table.slice(start, BATCH), self.encoded, arrays=False)

    def __repr__(self) -> str:
        return f"Dataset({self.name}: {len(self):,} rows; columns: {', '.join(self.columns)}; uses: {', '.join(self.kinds)})"

    def take(self, index: Sequence[int] | np.ndarray) -> Dataset:
        """The rows at `index` [k], in that order, with their provenance."""
        index = np.asarray(index, np.int64)
        return Dataset(self.name, self.table.take(index), self.numbers[index], self.file_ids[index], self.files,
                       self.encoded, set(self._checked))  # fmt: skip

    def where(self, index: int) -> Where:
        """File and line (or row) that row `index` came from."""
        file, unit = self.files[self.file_ids[index]]
        return Where(file, int(self.numbers[index]), unit)

    @property
    def columns(self) -> tuple[str, ...]:
        return tuple(self.table.column_names)

    @cached_property
    def families(self) -> Mapping[str, str]:
        """Column -> text, number, boolean, list, object, null, ..."""
        return {name: self._family(name) for name in self.columns}

    def _family(self, name: str) -> str:
        if name not in self.encoded:
            return family_of(self.table[name].type)
        first = pc.utf8_slice_codeunits(self.table[name].drop_null(), 0, 1)
        kinds = {"[": "list", "{": "object", '"': "text", "t": "boolean", "f": "boolean"}
        found = {kinds.get(c, "number") for c in pc.unique(first).to_pylist()}
        return found.pop() if len(found) == 1 else "mixed" if found else "null"

    # ---- uses ------------------------------------------------------------------------------------------------------
    @cached_property
    def kinds(self) -> tuple[str, ...]:
        """What the data can be used for: some of prompts, demonstrations, pairs, labels, rollouts, documents."""
        return tuple(name for name in KINDS if not self.missing(name))

    def missing(self, kind: str) -> str:
        """What the data lacks for a use ("no column 'completion'"); "" when it can be used so."""
        if kind not in KINDS:
            raise ValueError(f"unknown use {kind!r}: expected one of {', '.join(KINDS)}")
        lacking = KINDS[kind].missing(self.families)
        if not lacking and kind == "demonstrations" and "completion" not in self.families and not self._answered:
            return "no 'messages' that end with an assistant turn"
        return lacking

    @cached_property
    def _answered(self) -> bool:
        """Whether any row of `messages` ends with an assistant turn."""
        only = self.table.select(["messages"])
        for start in range(0, len(self), BATCH):
            for row in _plain(only.slice(start, BATCH), self.encoded, arrays=False):
                last = row["messages"][-1] if isinstance(row["messages"], list) and row["messages"] else None
                if isinstance(last, dict) and last.get("role") == "assistant":
                    return True
        return False

    def require(self, kind: str) -> Dataset:
        """This data set, when every row can be used as `kind`; else DataError with the rows, columns and remedies."""
        if kind in self._checked:
            return self
        lacking = self.missing(kind)
        if lacking:
            raise DataError([self.lacks(f"cannot be used for {kind}: {lacking}")])
        findings = Findings()
        usable = sum(1 for _ in self.records(KINDS[kind], findings))
        if not usable and not findings.total:
            findings.add(Problem(self.name, f"no usable rows for {kind}", "add rows"))
        findings.raise_any()
        self._checked.add(kind)
        return self

    def lacks(self, found: str) -> Problem:
        """A problem of the columns as a whole, which names those that exist."""
        return Problem(self.name, f"{found}; columns: {', '.join(self.columns)}", "rename or add the column")

    def records(self, kind: Kind[T], findings: Findings, start: int = 0, stop: int | None = None) -> Iterator[T]:
        """The usable rows as records of `kind`, in order; what is wrong with the others goes to `findings`."""
        where, faulty = Where("", 0), False

        def fault(column: str, found: str, remedy: str) -> None:
            nonlocal faulty
            faulty = True
            findings.add(where.problem(column, found, remedy))

        stop = len(self) if stop is None else stop
        for first in range(start, stop, BATCH):
            rows = _plain(self.table.slice(first, min(BATCH, stop - first)), self.encoded, arrays=True)
            for i, row in enumerate(rows, first):
                where, faulty = self.where(i), False
                record = kind.read(row, where, fault)
                if record is not None and not faulty:
                    yield record

    def prompts(self) -> Records[PromptRow]:
        """Rows to sample from. Raises DataError before the first row when any row is unusable; so do those below."""
        return Records(self.require("prompts"), PROMPTS)

    def demonstrations(self) -> Records[DemonstrationRow]:
        return Records(self.require("demonstrations"), DEMONSTRATIONS)

    def pairs(self) -> Records[PairRow]:
        return Records(self.require("pairs"), PAIRS)

    def ratings(self) -> Records[RatedRow]:
        return Records(self.require("ratings"), RATINGS)

    def comparisons(self) -> Sequence[PairRow]:
        """Pairs and lists, in whatever form the data state them; DataError with the rows where they do not."""
        if not self.missing("pairs") or self.missing("ratings"):
            return self.pairs()
        findings = Findings()
        found = lists_of(self.ratings(), findings)
        findings.raise_any()
        return found

    def labels(self) -> Records[LabelRow]:
        return Records(self.require("labels"), LABELS)

    def rollouts(self) -> Records[RolloutRow]:
        return Records(self.require("rollouts"), ROLLOUTS)

    def documents(self) -> Records[DocumentRow]:
        return Records(self.require("documents"), DOCUMENTS)


class Records(Sequence[T], Generic[T]):
    """A checked data set as records of one kind, made when asked for; `rows[i]`, `len(rows)`, `for row in rows`."""

    __slots__ = ("_data", "_kind")

    def __init__(self, data: Dataset, kind: Kind[T]) -> None:
        self._data, self._kind = data, kind

    def __len__(self) -> int:
        return len(self._data)

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> Records[T]: ...
    def __getitem__(self, index: int | slice) -> T | Records[T]:
        if isinstance(index, slice):
            return Records(self._data[index], self._kind)
        i = range(len(self))[index]
        return next(self._data.records(self._kind, Findings(), i, i + 1))

    def __iter__(self) -> Iterator[T]:
        return self._data.records(self._kind, Findings())


def _plain(table: pa.Table, encoded: frozenset[str], arrays: bool) -> Iterator[dict[str, Any]]:
    """Python rows of a table; with `arrays`, token columns come as numpy arrays."""
    columns = []
    for name in table.column_names:
        column = table[name]
        if name in encoded:
            columns.append([None if v is None else json.loads(v) for v in column.to_pylist()])
        elif arrays and name in LIST_COLUMNS and family_of(column.type) == "list":
            columns.append([v for chunk in column.chunks for v in _arrays(chunk)])
        else:
            columns.append(column.to_pylist())
    names = table.column_names
    return (dict(zip(names, cells, strict=True)) for cells in zip(*columns, strict=True))


def _arrays(chunk: pa.Array) -> list[np.ndarray | None]:
    lengths = pc.fill_null(pc.list_value_length(chunk), 0).to_numpy(zero_copy_only=False)
    values = chunk.flatten().to_numpy(zero_copy_only=False)
    parts = np.split(values, np.cumsum(lengths)[:-1])
    return [part if valid else None for part, valid in zip(parts, chunk.is_valid().to_pylist(), strict=True)]


# ---- loading -------------------------------------------------------------------------------------------------------
def load_rows(path_or_name: str | Path, split: str = "train", rename: Mapping[str, str] | None = None) -> Dataset:
    """The rows of a file, a folder, a saved `datasets` folder, or a hub name ("owner/name" or "owner/name:config").

    `rename` {found: wanted} gives columns the names that uses are known by, for data that cannot be edited.
    Raises DataError, with up to 20 located problems, when nothing can be loaded, when bytes, syntax, types, ids or
    prompts are wrong anywhere, or when the columns allow no use.
    """
    findings = Findings()
    data = read_rows(path_or_name, split, findings, rename)
    findings.raise_any()
    if not data.kinds:
        lacking = KINDS["prompts"].missing(data.families)
        raise DataError([data.lacks(f"cannot be used for anything: {lacking}, and none of its alternatives")])
    sampled_from = next((kind for kind in ("prompts", "documents") if kind in data.kinds), None)
    return data.require(sampled_from) if sampled_from else data


def read_rows(
    path_or_name: str | Path, split: str, findings: Findings, rename: Mapping[str, str] | None = None
) -> Dataset:
    """The rows that can be read at all; every problem goes to `findings` instead of being raised."""
    path = Path(path_or_name).expanduser()
    if is_saved_dataset(path) or (not path.exists() and may_be_hub_name(str(path_or_name))):
        parts = list(huggingface(path_or_name, split, findings))
    else:
        parts = [part for file in _files(path, split, findings) for part in read_file(file, findings)]
    findings.add_mixed_types()
    if not parts:
        if not findings.total:
            findings.add(Problem(str(path_or_name), "no rows", 'add rows: one object per line, like {"prompt": "..."}'))
        return Dataset(str(path_or_name), pa.table({}), np.zeros(0, np.int64), np.zeros(0, np.int32), ())
    data = _renamed(_dataset(str(path_or_name), parts), rename or {})
    _find_repeated_ids(data, findings)
    return data


def _dataset(name: str, parts: Sequence[Part]) -> Dataset:
    table, encoded = join(parts)
    files = tuple(dict.fromkeys((p.file, p.unit) for p in parts))
    ids = np.repeat([files.index((p.file, p.unit)) for p in parts], [len(p.numbers) for p in parts])
    return Dataset(name, table, np.concatenate([p.numbers for p in parts]), ids.astype(np.int32), files, encoded)


def _renamed(data: Dataset, names: Mapping[str, str]) -> Dataset:
    for old, new in names.items():
        if old not in data.columns or new in data.columns:
            fault = f"there is no column {old!r}" if old not in data.columns else f"there already is a column {new!r}"
            near = nearest(old, data.families)
            remedy = f"is {near!r} meant?" if near else "name a column that exists"
            raise DataError([Problem(data.name, f"cannot rename {old!r} to {new!r}: {fault}", remedy)])
    table = data.table.rename_columns([names.get(c, c) for c in data.columns])
    encoded = frozenset(names.get(c, c) for c in data.encoded)
    return Dataset(data.name, table, data.numbers, data.file_ids, data.files, encoded)


def _files(path: Path, split: str, findings: Findings) -> list[Path]:
    if path.is_dir():
        return files_in(path, split, findings)
    if not path.exists():
        near = nearest(path.name, {p.name: "" for p in path.parent.iterdir()}) if path.parent.is_dir() else ""
        remedy = f"is {path.parent / near} meant?" if near else "check the path"
        findings.add(Problem(str(path), "there is no such file or folder", remedy))
        return []
    if format_of(path) not in READERS:
        found = f"files of the format {format_of(path) or 'without suffix'!r} cannot be read"
        findings.add(Problem(str(path), found, f"convert it to one of {', '.join(READERS)}"))
        return []
    if split != "train" and split_of(Path(path.name)) != split_of(Path(split)) and split not in path.stem:
        found = f"one file holds one split; {split!r} was asked for, and the name does not say so"
        findings.add(
            Problem(str(path), found, f"name the file that holds {split!r}, or a folder with a file per split")
        )
        return []
    return [path]


# ---- repeats -------------------------------------------------------------------------------------------------------
def repeats(column: pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
    """(rows [m] whose value an earlier row has, the first row [m] with that value); missing values never repeat."""
    if family_of(column.type) not in ("text", "number"):
        column = pa.chunked_array([encode(column.to_pylist())])
    codes = column.combine_chunks().dictionary_encode().indices.to_numpy(zero_copy_only=False)
    rows = np.flatnonzero(~np.isnan(codes)) if codes.dtype.kind == "f" else np.arange(len(codes))
    _, first, inverse = np.unique(codes[rows], return_index=True, return_inverse=True)
    again = np.flatnonzero(first[inverse] != np.arange(len(rows)))
    return rows[again], rows[first[inverse[again]]]


def _find_repeated_ids(data: Dataset, findings: Findings) -> None:
    if "id" not in data.columns:
        return
    again, first = repeats(data.table["id"])
    for i, j in zip(again.tolist(), first.tolist(), strict=True):
        found = f"the id {data.table['id'][i].as_py()!r} is taken by {data.where(j)}"
        findings.add(data.where(i).problem("id", found, "give each row its own id, or drop the column"))
