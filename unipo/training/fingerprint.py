"""What a run was made by: two runs with one fingerprint give the same numbers."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch

import unipo
from unipo.compilers import c_compiler, cpp_compiler
from unipo.training.config import BaseConfig

ROOT = Path(unipo.__file__).parent


def fingerprint(config: BaseConfig) -> str:
    """Of everything that could change a number: the library's code, torch's version, its threads, the configuration, and
    whether there is a compiler (native forms round otherwise)."""
    code = hashlib.sha256()
    for path in sorted([*ROOT.rglob("*.py"), *ROOT.rglob("*.c")]):
        if path.relative_to(ROOT).parts[0] not in ("report", "cli.py", "reproduce"):
            code.update(path.read_bytes())
    free = ("out", "keep_checkpoints", "tensorboard", "wandb")
    settings = {k: v for k, v in vars_of(config).items() if k not in free}
    compilers = [c_compiler() is not None, cpp_compiler() is not None]
    text = (
        json.dumps(settings, sort_keys=True, default=str) + f"{torch.__version__} {torch.get_num_threads()} {compilers}"
    )
    return hashlib.sha256((code.hexdigest() + text).encode()).hexdigest()[:16]


def vars_of(config: BaseConfig) -> dict[str, Any]:
    return {name: getattr(config, name) for name in type(config).__dataclass_fields__}
