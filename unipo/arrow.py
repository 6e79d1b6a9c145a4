"""Ragged columns as Arrow tables, a row per episode: what `Episodes.save` writes and `load` reads."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor

from unipo.ragged import LEVELS, Column, offsets_of

Offsets = Mapping[str, Tensor]


def table_of(offsets: Offsets, columns: Mapping[str, Column]) -> pa.Table:
    """Step, turn and ragged columns become lists, group columns repeat. All tensors are on the CPU."""
    owner = torch.repeat_interleave(offsets["group"].diff())
    arrays: dict[str, pa.Array] = {
        "group": pa.array(owner.numpy()),
        "turn_lengths": _list(offsets["episode"], pa.array(offsets["turn"].diff().numpy())),
    }
    schema: dict[str, Any] = {}
    for name, c in columns.items():
        dtype = str(c.values.dtype).removeprefix("torch.")
        schema[name] = {"level": c.level, "dtype": dtype, "shape": list(c.values.shape[1:]),
                        "names": list(c.names), "ragged": c.offsets is not None}  # fmt: skip
        arrays[f"column.{name}"] = _written(c, offsets, owner)
    return pa.table(arrays).replace_schema_metadata({"unipo.episodes": json.dumps(schema)})


def read_table(table: pa.Table) -> tuple[dict[str, Tensor], dict[str, Column]]:
    """Offsets and columns: the inverse of `table_of`. Raises ValueError for a table that it did not make."""
    described = (table.schema.metadata or {}).get(b"unipo.episodes")
    if described is None:
        raise ValueError(
            "this table was not written by Episodes.to_arrow; load user data with unipo.sources.data.datasets"
        )
    table = table.combine_chunks()
    turns, owner = _array(table, "turn_lengths"), torch.from_numpy(_array(table, "group").to_numpy().copy())
    groups = torch.unique_consecutive(owner, return_counts=True)[1]
    step_counts = torch.from_numpy(turns.flatten().to_numpy().copy()).long()
    turn_counts = torch.from_numpy(turns.value_lengths().to_numpy().copy()).long()
    offsets = {"turn": offsets_of(step_counts), "episode": offsets_of(turn_counts), "group": offsets_of(groups)}
    first = pa.array(offsets_of(groups)[:-1].numpy())
    columns = {}
    for name, info in json.loads(described).items():
        array = _array(table, f"column.{name}")
        array = array.take(first) if info["level"] == "group" else array
        columns[name] = _read(array, info)
    return offsets, columns


def _written(c: Column, offsets: Offsets, owner: Tensor) -> pa.Array:
    flat = c.values.float() if c.values.dtype == torch.bfloat16 else c.values
    values = pa.array(flat.reshape(-1).numpy())
    for size in reversed(c.values.shape[1:]):
        values = pa.FixedSizeListArray.from_arrays(values, size)
    if c.offsets is not None:
        values = _list(c.offsets, values)
    if c.level == "group":
        return values.take(pa.array(owner.numpy()))
    for level in LEVELS[LEVELS.index(c.level) + 1 : LEVELS.index("episode") + 1]:
        values = _list(offsets[level], values)
    return values


def _read(array: Any, info: Mapping[str, Any]) -> Column:
    level = info["level"]
    for _ in range(max(0, LEVELS.index("episode") - LEVELS.index(level))):
        array = array.flatten()
    offsets = None
    if info["ragged"]:
        offsets = offsets_of(torch.from_numpy(array.value_lengths().to_numpy(zero_copy_only=False).copy()).long())
        array = array.flatten()
    for _ in info["shape"]:
        array = array.flatten()
    flat = torch.from_numpy(array.to_numpy(zero_copy_only=False).copy()).to(getattr(torch, info["dtype"]))
    return Column(flat.reshape(-1, *info["shape"]) if info["shape"] else flat, level, offsets, tuple(info["names"]))


def _list(offsets: Tensor, values: pa.Array) -> pa.Array:
    return pa.LargeListArray.from_arrays(pa.array(offsets.numpy(), pa.int64()), values)


def _array(table: pa.Table, name: str) -> Any:
    chunked = table.column(name)
    return (
        chunked.chunk(0)
        if chunked.num_chunks == 1
        else pa.concat_arrays(chunked.chunks or [pa.array([], chunked.type)])
    )
