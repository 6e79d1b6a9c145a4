"""Preferences as a game: a policy is good if no other wins against it, whether or not preferences have a reward behind them.

P(y > y') is a judge's (a reward's by default; `judge` names a function or model). w(y) = mean over opponents of P(y > y').

                 opponents                    anchors                        how the step is taken
    spo          own group, or recent ones    none (the host's clip)         policy gradient of w
    nash-md      policy^(1-c) reference^c     reference                      policy gradient of w
    nash-ema     an average of the policy     reference                      policy gradient of w
    nash-mp      own group                    reference, a slow copy         policy gradient of w
    inpo         own group                    reference, pi_t                pairs:  (h - 1/(2 eta))^2
    online-dpo   own group                    pi_t                           pairs:  - log sigmoid(h)
    dno          own group and a teacher      pi_t                           pairs:  - log sigmoid(h)
    sppo         own group                    pi_t                           answers: (log pi/pi_t - eta (w - 1/2))^2
    apo          its base's                   its base's, and momentum       its base's, then pi (pi / pi_before)^alpha

pi_t is the policy at the beginning of an iteration of `every` steps (1: of the step, whose `epochs` then make the iteration:
answers are then drawn from pi_t exactly). Their exact steps on enumerable answers are in `unipo.tabular.game_solvers`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from unipo.methods.method import Method, Study, choice
from unipo.methods.policy_gradients import regularised
from unipo.objectives import (
    AffineOutcome,
    ClipMask,
    Condition,
    EpisodeSum,
    LeaveOneOut,
    Link,
    LogRatioScore,
    LogRatioToGo,
    Normalised,
    Outcome,
    Pairwise,
    Plain,
    Plus,
    PolicyGradient,
    ScoreRegression,
    ScoreSum,
    ShapedOutcome,
    SquaredLink,
    TokenRatio,
    Zero,
    demonstrations,
    rollouts,
)
from unipo.recipe import Recipe, RolloutSpec, Snapshot
from unipo.sources.augment import Augment
from unipo.sources.injection import Injected
from unipo.sources.preferences import (
    Choice,
    Compared,
    Disjoint,
    Extremes,
    FarApart,
    Judge,
    Opponents,
    Paired,
    Recent,
    Sampled,
    ScoreJudge,
    Verdicts,
    judge_of,
)
from unipo.tabular.halpern import halpern

WIN, AMONG = Outcome("win_rate"), Outcome("win_rate", group_size=2)
LABEL = Outcome("confidence")


def _iteration(every: int) -> tuple[str, dict[str, Snapshot]]:
    """The name of pi_t's column, and the snapshot that keeps it where an iteration has several steps."""
    if every < 1:
        raise ValueError(f"every is {every}: an iteration has at least one step")
    return ("old", {}) if every == 1 else ("previous", {"previous": Snapshot(every=every)})


def _drawn_pairs(judge: Judge, among: str) -> tuple[Augment, ...]:
    """Stages that make pairs whose label is one draw of the judge's probability."""
    picked = choice(PAIRS, "pairs", among)
    ranked = (Compared(judge),) if isinstance(picked, Extremes) else ()
    return (*ranked, Paired(Verdicts(judge), picked))


PAIRS: Mapping[str, Choice] = {"all": Choice(), "disjoint": Disjoint(), "extremes": Extremes()}


# ---- policy gradients of the win rate --------------------------------------------------------------------------------
def spo(*, group: int = 8, recent: int = 0, clip: float = 0.2, kl: float = 0.0, judge: str | Judge = "reward",
        temperature: float = 1.0, epochs: int = 1, minibatches: int = 1) -> Recipe:  # fmt: skip
    """Self-play preference optimisation (arXiv 2401.04056): one policy plays against itself; the win rate is its reward.

        R_i = mean over opponents of 2 P(y_i > y_j) - 1                L = - SUM( min(r R, clip(r) R) )

    `recent` 0: the others of the group, whose R sum to 0; else the last so many answers to the prompt. No baseline is needed.
    The guarantee is for the average of the policies: max_pi P(pi > average) - 1/2 is the average regret.
    """
    opponents = Recent(most=recent) if recent else Opponents()
    reward = AffineOutcome(2.0, -1.0, WIN if recent else AMONG)
    gradient = PolicyGradient(
        advantage=Plain(reward), weight=TokenRatio(), mask=ClipMask(clip, clip), aggregate=EpisodeSum()
    )
    spec = RolloutSpec(group=group, augment=(Compared(judge_of(judge, temperature), opponents),))
    return regularised(Recipe(objective=gradient, rollouts=spec, epochs=epochs, minibatches=minibatches), kl, 0.0)


def nash_md(*, group: int = 4, samples: int = 4, mixture: float = 0.25, tau: float = 0.008, judge: str | Judge = "reward",
            temperature: float = 1.0) -> Recipe:  # fmt: skip
    """Nash-MD-PG (arXiv 2312.00886): against a geometric mixture of policy and reference, token by token.

        y ~ pi,   y' ~ softmax( (1 - mixture) l_pi + mixture l_ref )       no gradient through y'
        L = - SUM( (w(y) - 1/2 - tau sum_{m >= n} log(pi / ref)(y_m)) log pi(y_n) )

    w is the mean over `samples` opponents that all answers of the group meet (the paper has one each). `mixture` 0:
    self-play; 1: best response to the reference. The KL is of what is still to come: unbiased as the whole is, less noisy.
    """
    advantage = Plus((Plain(AffineOutcome(1.0, -0.5, WIN)), LogRatioToGo(tau)))
    against = Sampled(player="reference", share=mixture, samples=samples)
    return Recipe(
        objective=PolicyGradient(advantage=advantage, aggregate=EpisodeSum()),
        rollouts=RolloutSpec(group=group, augment=(Compared(judge_of(judge, temperature), against),)),
    )


def nash_ema(*, group: int = 4, samples: int = 4, average: float = 0.99, tau: float = 0.008, judge: str | Judge = "reward",
             temperature: float = 1.0) -> Recipe:  # fmt: skip
    """Nash-EMA-PG (arXiv 2312.00886): `nash_md` against the policy whose parameters are a running average.

    theta_bar <- (1 - average) theta + average theta_bar, from the start of the run. 0: self-play; 1: best response to the start.
    """
    against = Sampled(player="average", share=1.0, samples=samples)
    base = nash_md(group=group, tau=tau, judge=judge, temperature=temperature)
    return base.but(
        augment=(Compared(judge_of(judge, temperature), against),),
        snapshots={"average": Snapshot(every=1, tau=1.0 - average)},
    )


def nash_mp(*, group: int = 8, beta: float = 0.05, eta: float = 0.1, kappa: float = 0.05, copy: int = 0,
            judge: str | Judge = "reward", temperature: float = 1.0) -> Recipe:  # fmt: skip
    """Nash Prox (arXiv 2505.19731): self-play policy gradient, regularised to the reference and to a slow copy of itself.

        k_i = beta log(pi / ref)(y_i) + beta / eta log(pi / anchor)(y_i)           anchor <- (1 - kappa) anchor + kappa pi
        L   = - SUM( (w_i - 1/2 - (k_i - mean_{j != i} k_j)) log pi(y_n) )

    `copy` > 0: the anchor is a hard copy, renewed every so many steps. w sums to its own baseline over the group: subtracting
    the others' mean again would multiply its gradient by K / (K - 1), and move the fixed point to ref exp(K/(K-1) P / beta).
    Our instance of the paper's scheme (a self-play gradient inside a proximal point): its constants are not readable.
    """
    pull = ShapedOutcome(beta / eta, "anchor", ShapedOutcome(beta, "reference", Zero()))
    free = Normalised(center=LeaveOneOut(), outcome=pull)
    advantage = Plus((Plain(AffineOutcome(1.0, -0.5, AMONG)), free))
    return Recipe(
        objective=PolicyGradient(advantage=advantage, aggregate=EpisodeSum()),
        rollouts=RolloutSpec(group=group, augment=(Compared(judge_of(judge, temperature)),)),
        snapshots={"anchor": Snapshot(every=copy) if copy else Snapshot(every=1, tau=kappa)},
    )


# ---- regressions and classifications against the policy of the iteration ----------------------------------------------
def inpo(*, group: int = 8, tau: float = 0.0025, eta: float = 0.0075, pairs: str = "all", every: int = 1, epochs: int = 4,
         minibatches: int = 1, judge: str | Judge = "reward", temperature: float = 1.0) -> Recipe:  # fmt: skip
    """Iterative Nash policy optimisation (arXiv 2407.00617): online mirror descent of the regularised game, by pairs.

        h = tau/eta log(pi / ref) + (1 - tau/eta) log(pi / pi_t)            L = mean over pairs ( h(won) - h(lost) - 1/(2 eta) )^2

    The minimiser over pairs drawn from pi_t is the step of `tabular.game_solvers.inpo`; no win rate is estimated. `pairs`: all
    or disjoint ones of the group, or its extremes by win rate (the paper's practice, for which that equality does not hold).
    tau = eta: IPO with tau on its own samples; tau = 0: without a reference.
    """
    if not 0 <= tau <= eta:
        raise ValueError(f"tau is {tau} and eta {eta}: expected 0 <= tau <= eta")
    to, snapshots = _iteration(every)
    score = ScoreSum((tau / eta, 1.0 - tau / eta), (LogRatioScore(1.0), LogRatioScore(1.0, to)))
    objective = Pairwise(score=score, link=SquaredLink(target=0.5 / eta), confidence=LABEL, rows=rollouts)
    spec = RolloutSpec(group=group, augment=_drawn_pairs(judge_of(judge, temperature), pairs))
    return Recipe(objective=objective, rollouts=spec, snapshots=snapshots, epochs=epochs, minibatches=minibatches)


def online_dpo(*, group: int = 8, beta: float = 0.1, pairs: str = "all", every: int = 1, epochs: int = 4, minibatches: int = 1,
               judge: str | Judge = "reward", temperature: float = 1.0) -> Recipe:  # fmt: skip
    """Iterative DPO (arXiv 2312.11456, 2402.04792): DPO on pairs of its own answers, the policy of the iteration as reference.

    L = mean over pairs - log sigmoid( beta log(pi / pi_t)(won) - beta log(pi / pi_t)(lost) )
    """
    to, snapshots = _iteration(every)
    objective = Pairwise(score=LogRatioScore(beta, to), link=Link(), confidence=LABEL, rows=rollouts)
    spec = RolloutSpec(group=group, augment=_drawn_pairs(judge_of(judge, temperature), pairs))
    return Recipe(objective=objective, rollouts=spec, snapshots=snapshots, epochs=epochs, minibatches=minibatches)


TARGETS: Mapping[str, Outcome] = {"soft": AMONG, "hard": Outcome("chosen")}


def sppo(*, group: int = 5, eta: float = 1000.0, answers: str = "extremes", labels: str = "soft", every: int = 1, epochs: int = 4,
         minibatches: int = 1, judge: str | Judge = "reward", temperature: float = 1.0) -> Recipe:  # fmt: skip
    """Self-play preference optimisation (arXiv 2405.00675): the exponential weights of the win rate, by least squares.

        L = mean over answers ( log(pi / pi_t)(y) - eta (w(y) - 1/2) )^2           pi' prop. to pi_t exp(eta w)

    w counts an answer itself as 1/2. `answers`: the extremes of the group by win rate (the authors' code, which skips groups
    whose scores are equal) or all. `labels` hard: 1 for the best, 0 for the worst. The constant log Z is taken as eta / 2.
    """
    to, snapshots = _iteration(every)
    goal = choice(TARGETS, "labels", labels)
    if choice({"extremes": True, "all": False}, "answers", answers) < (labels == "hard"):
        raise ValueError("labels are hard for the best and the worst answer: leave answers at extremes")
    rated = judge_of(judge, temperature)
    paired = (Paired(ScoreJudge(0.0, "win_rate"), Extremes()),) if answers == "extremes" else ()
    regression = ScoreRegression(
        target=AffineOutcome(eta, -eta / 2.0, goal), score=LogRatioScore(1.0, to), per="episode"
    )
    spec = RolloutSpec(group=group, augment=(Compared(rated, Opponents(itself=1.0)), *paired))
    return Recipe(
        objective=2.0 * regression, rollouts=spec, snapshots=snapshots, epochs=epochs, minibatches=minibatches
    )


def dno(*, group: int = 5, beta: float = 0.1, gap: float = 0.2, least: float = 0.5, teacher: int = 1, soft: float = 0.0,
        replayed: float = 0.3, every: int = 1, epochs: int = 1, minibatches: int = 1, judge: str | Judge = "reward",
        temperature: float = 1.0) -> Recipe:  # fmt: skip
    """Direct Nash optimisation (arXiv 2404.03715): its own answers and a teacher's are ranked; pairs far apart are learned.

        L = mean over pairs - log sigmoid( beta log(pi / pi_t)(y+) - beta log(pi / pi_t)(y-) )

    Ranked by win rate among the `group` answers and `teacher` demonstrations (0: none); of a pair the better has at least
    `least` and is `gap` above the other. `soft` > 0: labels sigmoid(soft (w - w')) in place of 1, and the minimiser is
    pi_t exp(soft w / beta). A share `replayed` of the groups are pairs of the last two steps. Departs from the paper: scores
    are win rates in place of a rater's six points, so that `gap` and `least` are ours.
    """
    to, snapshots = _iteration(every)
    gold = (Injected(when=Condition(), count=teacher),) if teacher else ()
    label = ScoreJudge(1.0 / soft if soft else 0.0, "win_rate")
    ranked = Compared(judge_of(judge, temperature), Opponents(itself=1.0))
    rows = rollouts | demonstrations if teacher else rollouts
    objective = Pairwise(score=LogRatioScore(beta, to), confidence=LABEL, rows=rows)
    spec = RolloutSpec(group=group, augment=(*gold, ranked, Paired(label, FarApart("win_rate", least, gap))), replay=replayed,
                       replay_steps=2)  # fmt: skip
    return Recipe(objective=objective, rollouts=spec, snapshots=snapshots, epochs=epochs, minibatches=minibatches)


BASES: Mapping[str, Callable[..., Recipe]] = {"online-dpo": online_dpo, "sppo": sppo, "inpo": inpo}


def apo(*, base: str = "online-dpo", alpha: float = 0.3, every: int = 10, group: int = 5, epochs: int = 1,
        judge: str | Judge = "reward", temperature: float = 1.0) -> Recipe:  # fmt: skip
    """Accelerated preference optimisation (arXiv 2410.06293): Nesterov's momentum between the iterations of another method.

        made_{t+1} = an iteration of `base` from pi_t                pi_{t+1} prop. to made_{t+1} (made_{t+1} / made_t)^alpha

    In parameters: theta <- theta + alpha (theta - theta_made before); the same as in logits where these are linear in theta.
    The answers and the reference of the next iteration are those of pi_{t+1}; the run ends with what was made.
    alpha 0: the base. A fixed reward is followed with steps that tend to r / (beta (1 - alpha)).
    """
    made = choice(BASES, "base", base)(every=every, group=group, epochs=epochs, judge=judge, temperature=temperature)
    if not alpha:
        return made
    return made.but(snapshots={"made": Snapshot(every=every, beyond=alpha), **made.snapshots})


_TESTS = "tests/methods/test_preference_games.py::"
_TABULAR = "tests/tabular/test_games.py::"


def _tests(*names: str) -> tuple[str, ...]:
    return tuple(_TESTS + n for n in names)


def _exact(*names: str) -> tuple[str, ...]:
    return tuple(_TABULAR + n for n in names)


METHODS: tuple[Method, ...] = ()
STUDIES: tuple[Study, ...] = ()
_ = (halpern, _exact, _tests)
