"""The peers' installations under build/peers: one virtual environment, and folders beside it for what clashes with it.

venv               benchmarks/requirements-peers.txt: newest TRL, Stable-Baselines3, SBX, and what they need
trl-1.10.0         before venv on the path: an older TRL, whose padded loss is faster on CPUs
d3rlpy-2.8.1       before venv on the path: it pins another gymnasium
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "build" / "peers"
LOCK = Path(__file__).with_name("requirements-peers.txt")
DIRECT = ("torch", "transformers", "trl", "stable-baselines3", "sbx-rl", "gym", "mujoco", "minari", "requests",
          "colorama", "dataclasses-json", "h5py", "scikit-learn", "structlog")  # fmt: skip
"""What is asked for by name where the lock as a whole cannot be installed: the peers, and what --no-deps leaves out."""
BESIDE = ("trl-1.10.0", "d3rlpy-2.8.1")
OURS = "unipo"


@dataclass(frozen=True, slots=True)
class Home:
    """Where a side lives: its interpreter, and folders that come first on its path."""

    python: Path
    path: tuple[Path, ...] = ()

    def environment(self, threads: int) -> dict[str, str]:
        """Everything the same for both sides: threads, no network, no progress bars."""
        path = os.pathsep.join(str(p) for p in (*self.path, ROOT))
        count = str(threads)
        return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": count, "MKL_NUM_THREADS": count,
                "OMP_WAIT_POLICY": "passive", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1",
                "HF_DATASETS_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1", "WANDB_DISABLED": "true",
                "PYTHONWARNINGS": "ignore", "TF_CPP_MIN_LOG_LEVEL": "3", "JAX_PLATFORMS": "cpu"}  # fmt: skip


def home(name: str, folder: Path = FOLDER) -> Home:
    """`unipo`: this interpreter; `venv`: that of the peers; another name: the peers' with a folder before it."""
    if name == OURS:
        return Home(Path(sys.executable))
    python = folder / "venv" / "bin" / "python"
    return Home(python) if name == "venv" else Home(python, (folder / name,))


def install(folder: Path = FOLDER) -> Mapping[str, str]:
    """Install what is not there yet; returns what could not be installed: name -> pip's last word."""
    python, failed = folder / "venv" / "bin" / "python", {}
    if not python.exists():
        print(f"installing the peers into {folder} (a few minutes the first time) ...", flush=True)
        subprocess.run([sys.executable, "-m", "venv", str(folder / "venv")], check=True)
    if not _current(folder / "venv.lock"):
        if _pip(python, "-r", str(LOCK)):
            failed = {name: why for name, pin in _pins().items() if name in DIRECT and (why := _pip(python, pin))}
        if not failed:
            (folder / "venv.lock").write_text(LOCK.read_text())
    for beside in BESIDE:
        name, version = beside.rsplit("-", 1)
        if not (folder / beside).is_dir():
            pin, target = f"{name}=={version}", str(folder / beside)
            if why := _pip(python, "--no-deps", "--target", target, pin):
                failed[beside] = why
    return failed


def _current(marker: Path) -> bool:
    return marker.exists() and marker.read_text() == LOCK.read_text()


def _pins() -> dict[str, str]:
    lines = [line for line in LOCK.read_text().splitlines() if "==" in line and not line.startswith("#")]
    return {re.sub("[-_.]+", "-", line.split("==")[0]).lower(): line for line in lines}


def _pip(python: Path, *arguments: str) -> str:
    """Empty when it worked, else the last line of what pip said."""
    command = [str(python), "-m", "pip", "install", "-qq", "--disable-pip-version-check", "--no-input", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    said = [line for line in done.stderr.strip().splitlines() if not line.startswith("WARNING")]
    return "" if done.returncode == 0 else (said or ["pip failed"])[-1]
