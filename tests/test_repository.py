"""The repository itself: what is tracked, what is pinned, what the verbs are."""

from __future__ import annotations

import os
import re
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LARGEST = 2 * 1024 * 1024
MACHINE_PATHS = re.compile(rb"(?<![\w.~/-])/(?:home|Users|work|root|mnt|opt|srv)/[\w.-]+")
VERBS = ("setup", "demo", "test", "lint", "format", "docs", "bench")


def tracked() -> list[Path]:
    """Files that git tracks and that are there; every file of an unpacked archive, which has no .git."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
    return [ROOT / os.fsdecode(name) for name in listed.split(b"\0") if name and (ROOT / os.fsdecode(name)).is_file()]


def project() -> dict[str, object]:
    return dict(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"])


def test_no_path_of_a_machine_is_tracked() -> None:
    found = {}
    for path in tracked():
        hits = MACHINE_PATHS.findall(path.read_bytes()) if path.suffix not in (".safetensors", ".png") else []
        if hits and path != Path(__file__).resolve():
            found[str(path.relative_to(ROOT))] = hits[:3]
    assert found == {}


def test_no_large_file_is_tracked() -> None:
    large = {str(p.relative_to(ROOT)): p.stat().st_size for p in tracked() if p.stat().st_size > LARGEST}
    assert large == {}


def test_no_build_output_is_tracked() -> None:
    bad = re.compile(r"(^|/)(__pycache__|\.venv|build|dist|runs|[^/]*\.egg-info)/|\.pyc$")
    assert [p for p in map(str, (q.relative_to(ROOT) for q in tracked())) if bad.search(p)] == []


def test_licence_is_apache_2() -> None:
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text
    assert "Version 2.0, January 2004" in text
    assert "END OF TERMS AND CONDITIONS" in text
    assert project()["license"] == "Apache-2.0"


def test_every_direct_dependency_and_tool_is_pinned() -> None:
    def names(lines: list[str]) -> set[str]:
        found = {re.split(r"[<>=!~\[; ]", line.strip())[0].lower() for line in lines if line.strip()}
        return {n for n in found if not n.startswith("#")} - {""}

    described = project()
    wanted = names(described["dependencies"] + described["optional-dependencies"]["dev"])  # type: ignore[operator,index]
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", pin) for pin in pins)
    assert names(pins) == wanted


def test_the_verbs_are_there() -> None:
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    assert set(VERBS) <= set(targets)
    assert os.access(ROOT / ".ci" / "run", os.X_OK)


@pytest.mark.parametrize("folder", sorted(p.name for p in (ROOT / "unipo").iterdir() if (p / "__init__.py").exists()))
def test_every_package_has_a_place_in_the_contract(folder: str) -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    layers = next(c["layers"] for c in contracts if c["id"] == "layers")
    assert folder in re.findall(r"\w+", " ".join(layers))
