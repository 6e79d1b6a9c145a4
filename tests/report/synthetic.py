"""A run folder as a run writes it, made of formulas."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from unipo.statistics import mean_interval, wilson_interval

MIXED = {"fresh": 0.55, "replay": 0.25, "demos": 0.15, "pairs": 0.05}


def make_run(folder: Path, method: str = "grpo", seed: int = 0, steps: int = 150, final: float = 0.95,
             sources: dict[str, float] | None = None, **config: Any) -> Path:  # fmt: skip
    """Learn from 0.33 to `final`; `sources` are shares of the tokens, and demonstrations lose weight over time."""
    folder.mkdir(parents=True)
    settings = {"method": method, "task": "arithmetic", "method_options": {}, "steps": steps, "seed": seed, "out": str(folder),
                "model": "tiny", "reward": "", "prompts": 32, "rollouts": 0, "demos": "", "temperature": 1.0, "stop": [],
                "learning_rate": 1e-3, "tensorboard": True}  # fmt: skip
    (folder / "config.yaml").write_text(yaml.safe_dump(settings | config, sort_keys=False))
    rng = np.random.default_rng([seed, len(method)])
    rows = [_metrics(step, steps, final, sources or {"fresh": 1.0}, rng) for step in range(steps + 1)]
    write_metrics(folder, rows)
    _lines(
        folder / "samples.jsonl",
        [s for step in (1, 25, steps) for s in _samples(step, steps, sources or {"fresh": 1.0})],
    )
    return folder


def make_control_run(folder: Path, method: str = "ppo", seed: int = 0, final: float = 450.0, steps: int = 40,
                     episodes: int = 10, **config: Any) -> Path:  # fmt: skip
    """Return from 20 to `final`; a step is 4 copies x 64 steps. Evaluated every 10 steps; with `episodes`, each is kept."""
    folder.mkdir(parents=True)
    settings = {"method": method, "task": "CartPole-v1", "method_options": {}, "seed": seed, "out": str(folder),
                "learning_rate": 3e-4, "total_timesteps": 256 * steps - 100, "num_envs": 4, "rollout": 64, "batch_size": 64,
                "env_options": {}, "hidden": [64, 64], "dataset": "", "evaluations": 4, "eval_episodes": 10}  # fmt: skip
    (folder / "config.yaml").write_text(yaml.safe_dump(settings | config, sort_keys=False))
    rng = np.random.default_rng([seed, len(method)])
    returns = {t: control_returns(t / steps, final, seed) for t in range(0, steps + 1, 10)}
    write_metrics(folder, [_control_metrics(t, steps, final, returns.get(t), rng) for t in range(steps + 1)])
    kept = [{"step": t, "prompt": f"episode {i}", "completion": f"{r:.0f} steps", "reward": r, "source": "held_out"}
            for t, found in returns.items() for i, r in enumerate(found[:episodes])]  # fmt: skip
    fragments = [{"step": t, "prompt": f"environment {i}, episode {t}", "completion": "64 steps, cut", "reward": 64.0,
                  "source": "fresh", "truncated": True} for t in (1, steps) for i in range(3)]  # fmt: skip
    _lines(folder / "samples.jsonl", [*kept, *fragments])
    return folder


def control_returns(t: float, final: float, seed: int) -> list[float]:
    """Ten returns around 20 + t (final - 20); a seed is 8 points off the next."""
    return [20 + t * (final - 20) + 2 * (i - 4.5) + 8 * (seed - 1) for i in range(10)]


def _control_metrics(
    step: int, steps: int, final: float, returns: list[float] | None, rng: np.random.Generator
) -> dict[str, float]:
    t = step / steps
    row = {"step": float(step), "seconds": 0.1 * step, "reward": math.nan, "accuracy": math.nan, "tokens_sampled": 0.0,
           "tokens_trained": 2560.0 * step}  # fmt: skip
    if returns is not None:
        mean, low, high = mean_interval(returns)
        row |= {"eval_return": mean, "eval_return_low": low, "eval_return_high": high, "eval_length": mean}
    if step == 0:
        return row
    if rng.random() < 0.8:  # in the other steps no episode ends
        row |= {"reward": 20 + t * (final - 20) + 20 * rng.normal(), "length": 20 + t * (final - 20)}
    row |= {"env_steps": 256.0 * step, "episodes": 3.0, "entropy": 0.69 - 0.3 * t, "kl": 5e-3 * math.exp(rng.normal()),
            "ess": 0.98, "clipped_share": 0.05, "grad_norm": 4.0, "value_error": 10 * (1 - 0.9 * t), "loss": 1.0,
            "knob/clip": 0.2}  # fmt: skip
    for term, share in (("PolicyGradient", 0.1 + 0.1 * t), ("ValueRegression", 0.9 - 0.1 * t)):
        row |= {f"ledger/term/{term}/gradient_share": share, f"ledger/term/{term}/tokens": 256.0}
    return row | {"ledger/sign/raised/gradient_share": 0.75, "ledger/sign/lowered/gradient_share": 0.25}


def write_metrics(folder: Path, rows: list[dict[str, float]]) -> None:
    names = dict.fromkeys(n for r in rows for n in r)
    columns = {n: [float(r.get(n, math.nan)) for r in rows] for n in names}
    pq.write_table(
        pa.table({n: [int(x) for x in c] if n == "step" else c for n, c in columns.items()}), folder / "metrics.parquet"
    )


def add_events(folder: Path) -> None:
    message = "term 'pairs' gave no gradient in the first 5 steps: <b>are the prompts too hard?</b>"
    _lines(folder / "events.jsonl", [{"step": 5, "level": "warning", "message": message}])


def _metrics(
    step: int, steps: int, final: float, sources: dict[str, float], rng: np.random.Generator
) -> dict[str, float]:
    progress = 1 / (1 + math.exp(-10 * (step / steps - 0.35))) - 0.03
    row = {"step": float(step), "seconds": 0.9 * step, "tokens_sampled": 2800.0 * step, "tokens_trained": 3900.0 * step}
    if step % 25 == 0 or step == steps:
        right = int(256 * (0.33 + (final - 0.33) * progress) + rng.normal(0, 4))
        low, high = wilson_interval(min(right, 256), 256)
        row |= {"accuracy": min(right, 256) / 256, "accuracy_low": low, "accuracy_high": high}
    if step == 0:
        return row
    noise = rng.normal(0, 1, 8)
    row |= {
        "reward": min(1.0, 0.33 + (final - 0.33) * progress + 0.03 * noise[0]), "length": 11 - 3 * progress + 0.3 * noise[1],
        "entropy": 0.9 * math.exp(-2 * progress) + 0.02 * noise[2], "kl": 1e-3 * math.exp(0.5 * noise[3]),
        "ess": min(1.0, 0.93 - 0.1 * progress + 0.01 * noise[4]), "clipped_share": abs(0.02 + 0.006 * noise[5]),
        "grad_norm": 0.8 * math.exp(0.3 * noise[6] - progress), "loss": -0.01 + 0.02 * noise[7], "learning_rate": 1e-3,
        "truncated_share": max(0.0, 0.06 * (1 - progress)), "knob/demo_weight": 1 - 0.9 * step / steps,
    }  # fmt: skip
    return row | _ledger(step / steps, sources, rng)


def _ledger(t: float, sources: dict[str, float], rng: np.random.Generator) -> dict[str, float]:
    pull = {
        n: s * (2.5 * (1 - 0.8 * t) if n == "demos" else 1.0) * math.exp(0.08 * rng.normal())
        for n, s in sources.items()
    }
    total, row = sum(pull.values()), {}
    for name, tokens in sources.items():
        key = f"ledger/source/{name}"
        row |= {
            f"{key}/gradient_share": pull[name] / total,
            f"{key}/tokens": 3900 * tokens,
            f"{key}/rows": 300 * tokens,
        }
        row |= {
            f"{key}/kl": 1e-3 if name == "fresh" else 0.04,
            f"{key}/ess": 0.97 if name == "fresh" else 0.61,
            f"{key}/clipped_share": 0.01 if name == "fresh" else 0.09,
        }
        row[f"ledger/term/{ {'demos': 'sft', 'pairs': 'dpo'}.get(name, 'grpo/' + name) }/gradient_share"] = (
            pull[name] / total
        )
    raised = 0.6 + 0.05 * math.sin(9 * t)
    row |= {"ledger/sign/raised/gradient_share": raised, "ledger/sign/lowered/gradient_share": 0.97 - raised}
    old = sources.get("replay", 0.0) * (t > 0.05)
    row["ledger/staleness/9-32/gradient_share"] = 0.3 * old * (t > 0.2)
    row["ledger/staleness/0/gradient_share"] = 1 - old
    row["ledger/staleness/1-2/gradient_share"] = old - row["ledger/staleness/9-32/gradient_share"]
    return row


def _samples(step: int, steps: int, sources: dict[str, float]) -> list[dict[str, Any]]:
    good = step == steps
    problems = [(17 + 5 * i, 26 + 3 * i) for i in range(5)]
    found = [
        {"step": step, "prompt": f"{a}+{b}=", "completion": f"{a + b + (0 if good or a % 2 else 10)}", "source": "held_out",
         "reward": float(good or a % 2), "truncated": False} for a, b in problems
    ]  # fmt: skip
    for name in sources:
        text = "<script>alert('x')</script> 43" if name == "fresh" else "17+26: 7+6=13, carry 1; 1+2+1=4; 43"
        found.append({"step": step, "prompt": "17+26=", "completion": text, "reward": 1.0 if good else None, "source": name,
                      "truncated": not good})  # fmt: skip
    return found


def _lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
