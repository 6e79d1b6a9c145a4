"""The rows about control: PPO and SAC with their environments, TD3+BC and IQL from recorded data, beside the published peers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from benchmarks.harness import Gate, Result, Row, Side

TIMED = ("--warm", "0.5", "--seconds", "1.0")
"""Of a side under QUICK=1."""
OURS, SB3, SCRIPT = ("unipo.api", "unipo.training"), ("stable_baselines3",), ("torch", "gymnasium")
RETURNS = Path(__file__).with_name("returns")


def stored_returns(row: str) -> Gate:
    """What `returns.py` found of the row, which trains both sides for longer than a row takes, and when."""

    def gate(ours: Sequence[Result], theirs: Sequence[Result]) -> str:
        path = RETURNS / f"{row}.json"
        if not path.exists():
            return f"returns not compared yet: python -m benchmarks.control.returns {row}"
        found = json.loads(path.read_text())
        return "" if found["same"] else f"returns {found['ours']} and {found['peer']} ({found['when']})"

    return gate


def ours(name: str, row: str, *arguments: str, quick: tuple[str, ...] | None = TIMED) -> Side:
    return Side(name=name, command=("-m", "benchmarks.control.side_ours", row, *arguments), quick=quick, preload=OURS)


def peer(name: str, module: str, row: str, *arguments: str, needs: str = "stable-baselines3", best: bool = False,
         place: str = "venv", preload: tuple[str, ...] = (), warm: str = "2") -> Side:  # fmt: skip
    """`best`: the setting that runs under QUICK=1 too."""
    command = ("-m", f"benchmarks.control.{module}", row, "--warm", warm, *arguments)
    return Side(name=name, command=command, quick=(*TIMED, "--warm", "1" if preload else "4") if best else None, home=place,
                needs=needs, preload=preload)  # fmt: skip


def limit(kind: str, row: str, *arguments: str) -> Side:
    name = "stepping alone" if kind == "stepping" else "products alone"
    command = ("-m", "benchmarks.control.limits", kind, "--row", row, *arguments)
    return Side(name=name, command=command, quick=("--seconds", "0.8"), preload=OURS)


# ---- with environments -----------------------------------------------------------------------------------------------
def ppo_row(name: str, title: str, goal: float) -> Row:
    peers = (
        peer("Stable-Baselines3", "side_sb3", name, best=True, preload=SB3),
        peer("Stable-Baselines3, compiled", "side_sb3", name, "--compile", warm="20"),
        peer("CleanRL-style", "cleanrl_style_ppo", name, preload=SCRIPT),
        peer("SBX", "side_sbx", name, needs="sbx-rl", warm="8"),
    )  # fmt: skip
    also = (ours("not compiled", name, "--set", "compile=off", quick=None),)
    return Row(name=name, title=title, goal=goal, ours=ours("unipo", name), also=also, peers=peers, gate=stored_returns(name),
               compiles=True, limit=limit("stepping", name))  # fmt: skip


def sac_peers(precision: str, quick: str) -> tuple[Side, ...]:
    """`quick`: the name of the setting that runs under QUICK=1."""
    row, given = "sac-halfcheetah", ("--precision", precision)
    label = "" if precision == "float32" else f", {precision}"
    made = [
        (f"Stable-Baselines3{label}", "side_sb3", "stable-baselines3", SB3, "2"),
        (f"CleanRL-style{label}", "cleanrl_style_sac", "stable-baselines3", SCRIPT, "2"),
    ]
    made += [] if precision == "mkldnn" else [(f"SBX{label}", "side_sbx", "sbx-rl", (), "8")]
    return tuple(
        peer(name, module, row, *given, needs=needs, best=module == quick, preload=preload, warm=warm)
        for name, module, needs, preload, warm in made
    )


BFLOAT16 = ("--precision", "autocast")
SAC = (
    Row(name="sac-halfcheetah", title="SAC with collection, HalfCheetah-v5, 256x256, batch 256: peers as they come", goal=3.0,
        ours=ours("unipo", "sac-halfcheetah", *BFLOAT16), peers=sac_peers("float32", "side_sbx"),
        also=(ours("float32", "sac-halfcheetah", quick=None),
              ours("not compiled", "sac-halfcheetah", "--set", "compile=off", quick=None)),
        gate=stored_returns("sac-halfcheetah"), compiles=True,
        limit=limit("products", "sac-halfcheetah", "--precision", "bfloat16")),
    Row(name="sac-halfcheetah-bfloat16", title="the same, peers with bfloat16 products too", goal=1.7, extra=True,
        ours=ours("unipo", "sac-halfcheetah", *BFLOAT16),
        peers=(*sac_peers("autocast", "cleanrl_style_sac"), *sac_peers("mkldnn", "")), gate=stored_returns("sac-halfcheetah"),
        limit=limit("products", "sac-halfcheetah", "--precision", "bfloat16")),
)  # fmt: skip


# ---- recorded data -----------------------------------------------------------------------------------------------------
def offline_row(method: str, width: int, title: str) -> Row:
    """Peers in float32 and in bfloat16, whichever is faster; ours in bfloat16 where networks are wide."""
    sized, wide = ("--width", str(width)), width >= 256
    peers = tuple(
        peer(f"{name}{label}", module, method, *sized, "--precision", precision, needs=needs, place=place, preload=preload,
             best=module == "corl_style" and (precision == "autocast") == wide)
        for name, module, needs, place, preload in (
            ("CORL-style", "corl_style", "stable-baselines3", "venv", SCRIPT),
            ("d3rlpy", "side_d3rlpy", "d3rlpy-2.8.1", "d3rlpy-2.8.1", ()),
        )
        for precision, label in (("float32", ""), ("autocast", ", autocast"), ("mkldnn", ", mkldnn"))
    )  # fmt: skip
    name, given = (method if wide else f"{method}-{width}"), (*sized, *(BFLOAT16 if wide else ()))
    also = (ours("float32", method, *sized, quick=None),) if wide else ()
    also += (ours("not compiled", method, *sized, "--set", "compile=off", quick=None),)
    return Row(name=name, title=title, goal=3.0, ours=ours("unipo", method, *given), also=also, peers=peers, extra=not wide,
               gate=stored_returns(method), compiles=True,
               limit=limit("products", method, *sized, "--precision", "bfloat16" if wide else "float32"))  # fmt: skip


# ---- the collector -----------------------------------------------------------------------------------------------------
def collector_row(copies: int) -> Row:
    """The goal is at most 1.5 times the seconds of bare stepping."""
    sides = {
        side: Side(name=name, command=("-m", "benchmarks.control.collector", side, "--envs", str(copies)),
                   quick=("--seconds", "1.5"), preload=OURS)
        for side, name in (("ours", "unipo"), ("raw", "bare environments"))
    }  # fmt: skip
    return Row(name=f"collector-{copies}", title=f"collecting from {copies} copies of HalfCheetah-v5, as a share of bare steps",
               goal=0.67, ours=sides["ours"], limit=sides["raw"], extra=True)  # fmt: skip


ROWS: tuple[Row, ...] = (
    ppo_row("ppo-cartpole", "PPO with collection, CartPole-v1, 8 environments, 64x64", 6.0),
    ppo_row("ppo-halfcheetah", "PPO with collection, HalfCheetah-v5, 8 environments, 64x64", 4.0),
    *SAC,
    offline_row("td3bc", 256, "TD3+BC from 100,000 recorded transitions, 256x256, batch 256"),
    offline_row("td3bc", 64, "the same, 64x64"),
    offline_row("iql", 256, "IQL from 100,000 recorded transitions, 256x256, batch 256"),
    offline_row("iql", 64, "the same, 64x64"),
    collector_row(8),
    collector_row(64),
)
