"""The rows about text: a scripted step beside TRL's, whole runs with generation, and the learner beside the matmul rate."""

from __future__ import annotations

from benchmarks.harness import Row, Side, same_update

MODELS = ("transformers.models.qwen2.modeling_qwen2", "transformers.models.qwen3.modeling_qwen3")
OURS = ("benchmarks.text.ours_update", "benchmarks.text.ours_run", *MODELS)
PEER = ("benchmarks.text.trl_update", "benchmarks.text.trl_run", *MODELS)
NEWEST, OLDER = "trl 1.16.0", "trl 1.10.0"
HOMES = {NEWEST: ("venv", "trl"), OLDER: ("trl-1.10.0", "trl-1.10.0")}
"""Version of TRL -> (where it lives, what must be installed)."""
BATCHES = (4, 8, 16, 32)
SMALL = ("--model", "m3")
"""QUICK=1 scores the same tokens with a model of 1.4M instead of 26M parameters."""
KNOWN = {NEWEST: (), OLDER: (4, 16)}
"""Rows per forward pass that won sweeps of scripted steps on two cores; QUICK=1 runs only these."""


def trl(version: str, module: str, label: str, *arguments: str, quick: tuple[str, ...] | None) -> Side:
    place, needs = HOMES[version]
    return Side(name=f"{version}, {label}", command=("-m", f"benchmarks.text.{module}", *arguments), quick=quick, home=place,
                needs=needs, preload=PEER)  # fmt: skip


def ours(name: str, module: str, *arguments: str, quick: tuple[str, ...] | None) -> Side:
    return Side(name=name, command=("-m", f"benchmarks.text.{module}", *arguments), quick=quick, preload=OURS)


def matmul(dtype: str = "float32") -> Side:
    return Side(name="matmul", command=("-m", "benchmarks.text.matmul", "--dtype", dtype), preload=("torch",))


# ---- a step on given tokens ------------------------------------------------------------------------------------------
def scripted_row(name: str, shape: str, title: str, goal: float) -> Row:
    peers = [
        trl(version, "trl_update", f"batch {rows}", shape, "--batch", str(rows),
            quick=SMALL if rows in KNOWN[version] else None)
        for version in HOMES for rows in BATCHES
    ]  # fmt: skip
    peers += [
        trl(version, "trl_update", f"batch {rows}, compiled", shape, "--batch", str(rows), "--compile", quick=None)
        for version, rows in ((NEWEST, 8), (OLDER, 8), (OLDER, 16))
    ]
    with_entropy = ours("unipo", "ours_update", shape, quick=(*SMALL, "--steps", "2"))
    without = ours("without entropy", "ours_update", shape, "--signals", "", quick=None)
    return Row(name=name, title=title, goal=goal, ours=with_entropy, also=(without,), peers=tuple(peers), gate=same_update(),
               limit=matmul())  # fmt: skip


SCRIPTED = (
    scripted_row("grpo-s1", "s1", "GRPO step: prompts of 256, 8 completions of 4-64 tokens", 6.0),
    scripted_row("grpo-s2", "s2", "GRPO step: prompts of 16, 8 completions of 192 tokens", 1.3),
    scripted_row("grpo-s3", "s3", "GRPO step: prompts of 64, 8 completions of 4-256 tokens", 3.0),
    scripted_row("dpo-d1", "d1", "DPO step: 16 pairs, prompts of 256, answers of 4-64 tokens", 4.0),
    scripted_row("dpo-d2", "d2", "DPO step: 16 pairs, prompts of 16, answers of 192 tokens", 1.3),
)


# ---- with generation -------------------------------------------------------------------------------------------------
def run_row(size: str, title: str, goal: float, best: int, steps: str, known: tuple[str, ...] = (OLDER,)) -> Row:
    """`best` rows per forward pass of the versions `known` won sweeps: QUICK=1 runs only these."""
    quick = ("--quick", "--steps", steps)
    peers = [
        trl(version, "trl_run", f"batch {rows}", size, "--batch", str(rows), 
            quick=quick if rows == best and version in known else None)
        for version in HOMES for rows in (4, 8, 16, 32)
    ]  # fmt: skip
    mine = ours("unipo", "ours_run", size, quick=quick)
    return Row(name=f"grpo-{size}", title=title, goal=goal, ours=mine, peers=tuple(peers), limit=matmul())


RUNS = (
    run_row("1m", "GRPO with generation: 0.9M parameters, 64 rollouts of 32 tokens", 4.0, 16, "3", tuple(HOMES)),
    run_row("10m", "GRPO with generation: 9.7M parameters, 64 rollouts of up to 128 tokens", 3.0, 16, "1"),
    run_row("60m", "GRPO with generation: 59M parameters, 16 rollouts of up to 128 tokens", 2.0, 16, "1"),
)


# ---- until it is right -----------------------------------------------------------------------------------------------
def race(chosen: str) -> tuple[str, ...]:
    """Arguments of a setting "METHOD LEARNING_RATE PROMPTS", with a fresh seed in every turn."""
    method, rate, prompts = chosen.split()
    return method, "--lr", rate, "--prompts", prompts, "--seed", "-1", "--cap", "120"


def time_to_90(best: str, mixed: str, peer: str) -> Row:
    """The settings that won on seed 0, of equally many: results/time_to_90.json."""
    quick = ("--seed", "1", "--cap", "25")
    title = "arithmetic from the tiny model until 90 % of held-out answers are right: a run, rollouts only"
    also = ours("with demonstrations", "time_to_90_ours", *race(mixed), quick=None)
    theirs = trl(OLDER, "time_to_90_trl", peer.split()[0], *race(peer), quick=quick)
    return Row(name="grpo-time-to-90", title=title, goal=10.0, ours=ours("unipo", "time_to_90_ours", *race(best), quick=quick),
               also=(also,), peers=(theirs,), turns=3)  # fmt: skip


# ---- beside the limit ------------------------------------------------------------------------------------------------
def rate_row(dtype: str) -> Row:
    mine = ours("unipo", "learner_rate", "--precision", dtype, quick=("--steps", "2", "--sequences", "4"))
    title = f"an update of 59M parameters in {dtype}, as a share of the matmul rate"
    return Row(name=f"learner-60m-{dtype}", title=title, goal=0.6, ours=mine, limit=matmul(dtype), extra=True)


TO_90 = time_to_90("dapo-bytedance 5e-4 32", "grpo+4*sft 5e-4 4", "dr_grpo 5e-4 32")
ROWS: tuple[Row, ...] = (*SCRIPTED, *RUNS, TO_90, rate_row("float32"), rate_row("bfloat16"))
