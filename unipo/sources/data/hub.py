"""Saved `datasets` folders and hub names, read as parts of Arrow rows like any file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from unipo.sources.data.files import READERS, Part, arrow_parts, format_of
from unipo.sources.data.problems import Findings, Problem


def is_saved_dataset(path: Path) -> bool:
    return (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()


def may_be_hub_name(name: str) -> bool:
    return format_of(Path(name)) not in READERS and not name.startswith((".", "/", "~")) and name.count("/") <= 1


def huggingface(name: str | Path, split: str, findings: Findings) -> Iterator[Part]:
    import datasets  # takes a second: only for those who need it

    try:
        if Path(name).exists():
            loaded = datasets.load_from_disk(str(name))
        else:
            hub, _, config = str(name).partition(":")
            loaded = datasets.load_dataset(hub, config or None)
    except Exception as error:  # its errors share no base class
        found = f"no such file, folder or saved data set, and the hub gave: {type(error).__name__}: {error}"
        remedy = "check the name and the connection; without one, download it elsewhere and use save_to_disk"
        findings.add(Problem(str(name), found, remedy))
        return
    if isinstance(loaded, dict):
        if split not in loaded:
            found = f"no split {split!r}; there are: {', '.join(loaded)}"
            findings.add(Problem(str(name), found, "ask for one of these"))
            return
        loaded = loaded[split]
    yield from arrow_parts(str(name), loaded.with_format("arrow")[:], findings)
