"""Rewards that are models: the score of a reward model, the verdict of a preference model, a log-ratio of two policies.

    --reward "model(runs/rm/final)"                   s(y | x) of a reward model
    --reward "density_ratio(STRONG, WEAK)"            log p_strong(y | x) - log p_weak(y | x)
    --spo.judge "model(runs/pm/final)"                P(y > y' | x) of a preference model, or of a reward model's scores

Each reads text with its own tokenizer, an answer as a finished one: with its end-of-sequence token. Models are loaded once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from unipo.episodes import Episodes
from unipo.objectives import FinalValue
from unipo.policies.encode import encode_completion, encode_prompt
from unipo.policies.loading import ModelError, load_policy
from unipo.policies.token import TokenPolicy, ValueHead
from unipo.rewards.calling import RewardError

Prompt = Any
Context = str | Callable[[Prompt], str]
BUDGET = 16384
"""Tokens computed at once."""


# ---- loading -----------------------------------------------------------------------------------------------------------
def model_folder(name: str) -> str:
    """Where a model is: a run's folder stands for what it trained."""
    final = Path(name) / "final"
    return str(final) if (final / "config.json").exists() else name


@lru_cache(maxsize=8)
def loaded(folder: str) -> TokenPolicy:
    """The model in a folder, frozen. Raises RewardError where it cannot be loaded."""
    try:
        policy = load_policy(folder, device="cuda" if torch.cuda.is_available() else "cpu")
    except ModelError as error:
        raise RewardError(str(error)) from error
    for _, parameter in policy.named_parameters():
        parameter.requires_grad_(False)
    return policy


def judges_of(name: str) -> str:
    """What the model in a folder says of an answer: "answers" (a reward model), or "pairs" (a preference model).

    Raises RewardError, with what it is instead and how to train one, where it is neither.
    """
    folder = Path(model_folder(name))
    remedy = "train one with: unipo run reward-model TASK --pairs FILE, and give its run or its final/"
    if not folder.is_dir():
        raise RewardError(f"there is no reward model {name!r}: no such folder; {remedy}")
    if not (folder / ValueHead.FILE).exists():
        raise RewardError(f"{name} is no reward model: it has no value head ({ValueHead.FILE}); {remedy}")
    try:
        with safe_open(folder / ValueHead.FILE, "pt") as file:
            judges = str((file.metadata() or {}).get("judges", ""))
    except SafetensorError as error:
        raise RewardError(f"{folder / ValueHead.FILE} cannot be read: {error}") from error
    if not judges:
        raise RewardError(
            f"{name} is no reward model: its value head is a critic's, which says what its own policy will still earn; {remedy}"
        )
    return judges


# ---- reading -----------------------------------------------------------------------------------------------------------
def answered(
    tokenizer: Any, prompts: Sequence[Prompt], answers: Sequence[str], rivals: Sequence[str] | None = None
) -> Episodes:
    """Finished answers to prompts, each behind its rival (as finished) where there is one."""
    contexts = [encode_prompt(tokenizer, p) for p in prompts]
    if rivals is not None:
        contexts = [[*c, *encode_completion(tokenizer, r)] for c, r in zip(contexts, rivals, strict=True)]
    return Episodes.build([encode_completion(tokenizer, a) for a in answers], contexts)


@torch.no_grad()
def signal_of(policy: TokenPolicy, rows: Episodes, name: str) -> Tensor:
    """A signal [N] of all steps in float64, micro-batch by micro-batch."""
    made = torch.zeros(rows.count("step"), dtype=torch.float64)
    for part in rows.split(BUDGET, policy.total_lengths(rows)):
        made[rows.step_index(part)] = policy.signals(rows.select(part), [name])[name].double().cpu()
    return made


def scores(policy: TokenPolicy, rows: Episodes) -> Tensor:
    """[E] what a model with a value head says at the end of each answer."""
    return FinalValue()(rows, {"value": signal_of(policy, rows, "value")})


# ---- rewards -----------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class ModelReward:
    """s(y | x) of the reward model in `folder`. Raises RewardError where that is none, or compares answers with rivals."""

    folder: str

    def __post_init__(self) -> None:
        if judges_of(self.folder) != "answers":
            raise RewardError(
                f"{self.folder} is a preference model: it says which of two answers is better, and gives no number to one. Take "
                f'it as a judge, such as --spo.judge "model({self.folder})", or train a reward-model on the same pairs'
            )

    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[str], **columns: Any) -> list[float]:
        policy = loaded(model_folder(self.folder))
        return scores(policy, answered(policy.tokenizer, prompts, completions)).tolist()


@dataclass(frozen=True)
class ModelRater:
    """P(y > y' | x) = sigmoid( s - s' ) of the model in `folder`: of its scores, or of s(y | x, y') and s(y' | x, y)."""

    folder: str
    judges: str = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "judges", judges_of(self.folder))

    def __call__(
        self, prompts: Sequence[Prompt], answers: Sequence[str], others: Sequence[str], **columns: Any
    ) -> Tensor:
        policy = loaded(model_folder(self.folder))
        both, rivals = [*answers, *others], [*others, *answers]
        rows = answered(policy.tokenizer, [*prompts, *prompts], both, rivals if self.judges == "pairs" else None)
        won, lost = scores(policy, rows).chunk(2)
        return torch.sigmoid(won - lost)


PER: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "answer": lambda total, tokens: total,
    "token": lambda total, tokens: total / tokens,
}


@dataclass(frozen=True)
class DensityRatio:
    """log p_strong(y | x) - log p_weak(y | x), summed over the answer: a reward without anybody's labels (arXiv 2411.02481).

    Where the strong model is the KL-regularised optimum of r from the weak one, it is r / beta - log Z(x) exactly. `per`
    token: divided by the strong model's tokens, which is no such reward: it likes brevity where the whole is above 0, and
    length below (what the released scorer returns). `context`: text put before the prompt of the strong model, a criterion
    say, or from Python a function of the prompt that gives one (a router); `weak_context`: of the weak one ("same": the same;
    the paper's numerator only: leave it empty). Each model reads with its own tokenizer.
    """

    strong: str
    weak: str
    per: str = "answer"
    context: Context = ""
    weak_context: Context = "same"

    def __post_init__(self) -> None:
        if self.per not in PER:
            raise RewardError(f"per is {self.per!r}: expected one of {', '.join(PER)}")
        for name in (self.strong, self.weak):
            if not Path(name).exists() and name.startswith((".", "/", "runs")):
                raise RewardError(f"there is no model {name!r}: no such folder")

    @cached_property
    def models(self) -> tuple[TokenPolicy, TokenPolicy]:
        return loaded(model_folder(self.strong)), loaded(model_folder(self.weak))

    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[str], **columns: Any) -> list[float]:
        contexts = (self.context, self.context if self.weak_context == "same" else self.weak_context)
        rows = [answered(m.tokenizer, [behind(c, p) for p in prompts], completions)
                for m, c in zip(self.models, contexts, strict=True)]  # fmt: skip
        strong, weak = (r.reduce(signal_of(m, r, "logp")) for m, r in zip(self.models, rows, strict=True))
        return PER[self.per](strong - weak, rows[0].lengths()).tolist()


def behind(context: Context, prompt: Prompt) -> Prompt:
    """The prompt with a text before it (or what a function says to it): of chat messages as a system message."""
    text = context if isinstance(context, str) else context(prompt)
    if not text:
        return prompt
    return text + prompt if isinstance(prompt, str) else [{"role": "system", "content": text}, *prompt]


MADE: Mapping[str, Callable[..., Any]] = {"density_ratio": DensityRatio, "model": ModelReward}
"""Rewards that are made of what stands in their brackets: folders first, then settings NAME=VALUE."""
USAGE = {
    "density_ratio": "density_ratio(STRONG, WEAK[, per=token][, context=TEXT][, weak_context=TEXT])",
    "model": "model(FOLDER)",
}


def learned(rewards: Sequence[tuple[str, Any, float]]) -> bool:
    """Whether a model is among the rewards (name, function, weight): what it says is no measure of what was learned from it."""
    return any(isinstance(function, ModelReward | DensityRatio) for _, function, _ in rewards)


def made(name: str, text: str) -> tuple[str, Any]:
    """The reward NAME(FOLDER, ..., SETTING=VALUE) with its name in metrics: of a reward model that of its run.

    Raises RewardError, with how it is written, for other brackets.
    """
    parts = [part.strip() for part in text.split(",") if part.strip()]
    words = [part for part in parts if "=" not in part]
    settings = dict(part.split("=", 1) for part in parts if "=" in part)
    try:
        reward = MADE[name](*words, **settings)
    except TypeError as error:
        raise RewardError(f"cannot read the reward {name}({text}): write {USAGE[name]}") from error
    return (called(reward.folder) if isinstance(reward, ModelReward) else name), reward


def called(folder: str) -> str:
    """The last name in a path that is not `final`."""
    return next((part for part in reversed(Path(folder).parts) if part != "final"), folder)
