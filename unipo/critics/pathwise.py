"""The critic's value of the policy's own action, differentiable in the policy: what pathwise policy gradients ascend."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor, nn

from unipo.critics.action_value import refuse_unknown
from unipo.episodes import Episodes
from unipo.policies.control import ControlPolicy
from unipo.policies.distributions import (
    Beta,
    Categorical,
    Deterministic,
    Gaussian,
    GaussianMixture,
    SquashedGaussian,
)

REDUCTIONS: dict[str, tuple[Callable[[Tensor], Tensor], dict[str, int]]] = {
    "min": (lambda q: q.amin(1), {}),
    "first": (lambda q: q[:, 0], {"members": 1}),
    "mean": (lambda q: q.mean(1), {}),
}
"""Q [N, n, ...] -> [N, ...] over the n critics, and which of them it reads: the others are not computed."""


class ActionCritic(Protocol):
    """Q [N, n] at (observation [N, d], action [N, A]); `frozen`: with detached weights; `members`: of the first so many."""

    def q(self, observation: Tensor, action: Tensor, frozen: bool = False, members: int | None = None) -> Tensor: ...


Estimate = Callable[["Pathwise", Tensor, Tensor, Episodes], dict[str, Tensor]]


def _sampled(join: Pathwise, observation: Tensor, raw: Tensor, episodes: Episodes) -> dict[str, Tensor]:
    action, logp = join.policy.distribution.sample_with_logp(raw, episodes["noise"])
    q = join.value(join.critic.q, observation, action)
    made = {"pathwise_q": q, "pathwise_logp": logp, "pathwise_action": action}
    if join.reference is not None:
        made["pathwise_reference_logp"] = _of_sample(join, raw, join.reference.raw(observation), action, episodes)
    return made


def _of_sample(join: Pathwise, raw: Tensor, reference: Tensor, action: Tensor, episodes: Episodes) -> Tensor:
    """log-density [N] of the sampled action under other raw parameters; of a squashed one without inverting the tanh."""
    distribution: Any = join.policy.distribution
    if isinstance(distribution, SquashedGaussian):
        return distribution.logp_of_sample(raw, episodes["noise"], reference)
    return distribution.logp(reference, action)


def _at_mode(join: Pathwise, observation: Tensor, raw: Tensor, episodes: Episodes) -> dict[str, Tensor]:
    action = join.policy.distribution.mode(raw)
    return {"pathwise_q": join.value(join.critic.q, observation, action), "pathwise_action": action}


def _enumerated(join: Pathwise, observation: Tensor, raw: Tensor, episodes: Episodes) -> dict[str, Tensor]:
    logp = raw.log_softmax(-1)
    q = join.value(join.critic.values, observation)
    made = {"pathwise_q": (logp.exp() * q).sum(-1), "pathwise_logp": (logp.exp() * logp).sum(-1)}
    if join.reference is not None:
        made["pathwise_reference_logp"] = (logp.exp() * join.reference.raw(observation).log_softmax(-1)).sum(-1)
    return made


def _by_component(join: Pathwise, observation: Tensor, raw: Tensor, episodes: Episodes) -> dict[str, Tensor]:
    mixture: Any = join.policy.distribution
    action_NKA, logp_NK = mixture.components(raw, episodes["noise"])
    rows = observation.repeat_interleave(mixture.experts, 0)
    q = join.value(join.critic.q, rows, action_NKA.flatten(0, 1))
    return {"pathwise_q": q.unflatten(0, logp_NK.shape), "pathwise_logp": logp_NK,
            "pathwise_action": action_NKA, "router": mixture.weights(raw)}  # fmt: skip


_ALL = frozenset({"pathwise_q", "pathwise_logp", "pathwise_action"})
_ESTIMATES: Mapping[type, tuple[Estimate, frozenset[str]]] = {
    Categorical: (_enumerated, _ALL - {"pathwise_action"}),
    Deterministic: (_at_mode, _ALL - {"pathwise_logp"}),
    GaussianMixture: (_by_component, _ALL | {"router"}),
    Gaussian: (_sampled, _ALL),
    SquashedGaussian: (_sampled, _ALL),
    Beta: (_sampled, _ALL),
}


class Pathwise:
    """A policy's own actions, valued by a frozen critic; gradients reach the policy through the action.

    Signals: `pathwise_q` [N] = reduce_j Q_j(s, a), `pathwise_logp` [N] = log pi(a|s), `pathwise_action` [N, A], at
    a = sample(raw(s), column `noise`). Categorical policies: the exact expectations sum_a pi Q and sum_a pi log pi, no
    noise needed. Deterministic policies: at the mode, no log-prob.
    Mixtures: each component's own sample, all [N, K] (actions [N, K, A]), `pathwise_logp` under that component, and `router`,
    the weights w [N, K] (PMOE, arXiv:2104.09122).
    With a `reference` policy, which is not trained: `pathwise_reference_logp` [N], log pi_ref(a|s) at the same action (of
    categorical policies sum_a pi log pi_ref); the gradient flows through the action (off-policy MDPO, arXiv:2005.09814).
    It has no parameters of its own: the policy trains as a player itself. `reduce`: min | first | mean over critics.
    """

    def __init__(self, policy: ControlPolicy, critic: Any, reduce: str = "min",
                 reference: ControlPolicy | None = None) -> None:  # fmt: skip
        if reduce not in REDUCTIONS:
            raise ValueError(f"unknown reduction {reduce!r}: expected one of {', '.join(REDUCTIONS)}")
        kind = type(policy.distribution)
        if kind not in _ESTIMATES:
            known = ", ".join(k.__name__ for k in _ESTIMATES)
            raise ValueError(f"no pathwise gradient through {kind.__name__} actions: expected one of {known}")
        self.policy, self.critic = policy, critic
        self.reduce, self.asked = REDUCTIONS[reduce]
        self.reference = reference
        self._estimate, self.emits = _ESTIMATES[kind]
        if reference is not None:
            if "pathwise_logp" not in self.emits or kind is GaussianMixture:
                raise ValueError(f"{kind.__name__} actions have no log-density to compare with a reference policy's")
            self.emits = self.emits | {"pathwise_reference_logp"}

    def signals(self, episodes: Episodes, names: Sequence[str]) -> dict[str, Tensor]:
        """The signals `names`, from one pass; KeyError names any other, and the column that is missing."""
        refuse_unknown(names, self.emits)
        observation = episodes["observation"]
        made = self._estimate(self, observation, self.policy.raw(observation), episodes)
        return {name: made[name] for name in names}

    def value(self, critics: Callable[..., Tensor], *at: Tensor) -> Tensor:
        """[N, ...]: the reduction of what the critics [N, n, ...], frozen, say."""
        return self.reduce(critics(*at, frozen=True, **self.asked))

    def total_lengths(self, episodes: Episodes) -> Tensor:
        """[E] steps of each fragment: what its signals cost."""
        return episodes.lengths()

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Nothing: see above."""
        return iter(())
