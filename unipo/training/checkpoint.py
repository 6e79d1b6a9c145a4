"""Checkpoints: whole or absent, safetensors and JSON only, and exact.

A checkpoint is written to a hidden folder, synced, and renamed: a kill at any moment leaves the last one intact. It holds
tensors (`tensors.safetensors`), numbers (`state.json`, with the checksum of every other file) and the replay.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

PREFIX = "step-"


@dataclass(frozen=True)
class Checkpoint:
    """What was saved: `state` numbers and `tensors`, and the folder for files that sources wrote."""

    folder: Path
    state: Mapping[str, Any]
    tensors: Mapping[str, Tensor]


def save_checkpoint(folder: Path, step: int, state: Mapping[str, Any], tensors: Mapping[str, Tensor],
                    extra: Callable[[Path], None], keep: int) -> Path:  # fmt: skip
    """Write `folder/step-000123` atomically; `extra(path)` may add files; only the newest `keep` stay.

    Raises OSError with what was kept when the disk is full: the previous checkpoint is untouched.
    """
    folder.mkdir(parents=True, exist_ok=True)
    final, temporary = folder / f"{PREFIX}{step:06d}", folder / f".{PREFIX}{step:06d}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir()
        save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, temporary / "tensors.safetensors")
        extra(temporary)
        files = {p.name: _digest(p) for p in sorted(temporary.iterdir())}
        (temporary / "state.json").write_text(json.dumps({**state, "step": step, "files": files}))
        for path in temporary.iterdir():
            _sync(path)
        shutil.rmtree(final, ignore_errors=True)
        os.replace(temporary, final)
        _sync(folder)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        left = ", ".join(p.name for p in existing(folder)) or "none"
        message = (
            f"could not write the checkpoint of step {step} to {folder}: {error.strerror}. Earlier checkpoints are "
            f"intact ({left}); free some space, then `unipo resume`."
        )
        raise OSError(error.errno, message) from error
    for old in existing(folder)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def existing(folder: Path) -> list[Path]:
    """Checkpoint folders, oldest first."""
    return sorted(p for p in folder.glob(f"{PREFIX}*") if p.is_dir()) if folder.is_dir() else []


def load_latest(folder: Path, warn: Callable[[str], None]) -> Checkpoint | None:
    """The newest checkpoint that is whole; damaged ones are reported through `warn` and passed over."""
    for path in reversed(existing(folder)):
        try:
            return _load(path)
        except (OSError, ValueError, KeyError) as error:
            warn(f"checkpoint {path.name} is damaged ({error}); trying the one before it")
    return None


def _load(path: Path) -> Checkpoint:
    state = json.loads((path / "state.json").read_text())
    for name, digest in state["files"].items():
        if _digest(path / name) != digest:
            raise ValueError(f"{name} does not have the checksum that was written")
    return Checkpoint(path, state, load_file(path / "tensors.safetensors"))


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# ---- optimiser state as tensors --------------------------------------------------------------------------------------
def flatten_optimizer(state: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimiser's state_dict as named tensors and JSON."""
    tensors = {f"optimizer/{i}/{k}": v for i, entry in state["state"].items() for k, v in entry.items()}
    groups = [
        {k: v for k, v in g.items() if k != "params"} | {"params": list(g["params"])} for g in state["param_groups"]
    ]
    return tensors, {"param_groups": groups}


def unflatten_optimizer(tensors: Mapping[str, Tensor], plain: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `flatten_optimizer`."""
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        if name.startswith("optimizer/"):
            _, index, key = name.split("/", 2)
            state.setdefault(int(index), {})[key] = value
    groups = [{**g, "betas": tuple(g["betas"])} for g in plain["param_groups"]]
    return {"state": state, "param_groups": groups}
