"""Rollouts that are sampled ahead: whose weights they are of, what a checkpoint keeps, and that both sides work at once."""

from __future__ import annotations

import copy
import threading
from pathlib import Path

import pytest
import torch

from unipo.episodes import Episodes
from unipo.policies.tabular import TabularPolicy
from unipo.sources.spec import RolloutSpec
from unipo.sources.text.ahead import Ahead
from unipo.sources.text.tabular import tabular_rollouts
from unipo.tasks.tabular import TabularTask

TASK = TabularTask(3, 4, 3, lambda prompt, tokens: float(sum(tokens) % 3 == prompt))


def made(steps: int, last: int = 100) -> tuple[TabularPolicy, Ahead]:
    policy = TabularPolicy.random(3, 3, 4)
    actor = copy.deepcopy(policy)
    return policy, Ahead(tabular_rollouts(TASK, actor, RolloutSpec(group=4), 0), actor, policy, steps, last)


def moved(policy: TabularPolicy) -> None:
    """Another policy, as an update would leave it."""
    with torch.no_grad():
        policy.logits.mul_(-0.9).add_(0.1)


def drawn(policy: TabularPolicy, ahead: Ahead, steps: range) -> list[Episodes]:
    found = []
    for step in steps:
        found.append(ahead.draw(step, step))
        moved(policy)
    return found


@pytest.mark.parametrize("steps", [1, 3])
def test_a_batch_is_sampled_with_the_weights_of_so_many_steps_before(steps: int) -> None:
    policy, ahead = made(steps)
    weights = [copy.deepcopy(policy)]
    batches = []
    for step in range(6):
        batches.append(ahead.draw(step, step))
        moved(policy)
        weights.append(copy.deepcopy(policy))
    for step, batch in enumerate(batches):
        of = max(0, step - steps)
        assert set(batch["policy_version"].tolist()) == {of}
        logp = weights[of].signals(batch, ["logp"])["logp"].detach()
        torch.testing.assert_close(batch["behavior_logp"].double(), logp, atol=1e-5, rtol=0)
    assert ahead.metrics["rollouts"] == 12.0
    ahead.close()


def test_a_resumed_run_draws_what_an_uninterrupted_one_draws(tmp_path: Path) -> None:
    policy, ahead = made(2)
    whole = drawn(policy, ahead, range(7))
    policy, first = made(2)
    drawn(policy, first, range(3))
    state = first.state_dict()
    first.save(tmp_path)
    restored, second = made(2)
    restored.load_state_dict(policy.state_dict())
    second.load_state_dict(state)
    second.load(tmp_path)
    assert second.tokens_sampled >= first.tokens_sampled
    for again, before in zip(drawn(restored, second, range(3, 7)), whole[3:], strict=True):
        assert torch.equal(again["token"], before["token"])
        assert torch.equal(again["policy_version"], before["policy_version"])


def test_nothing_is_sampled_beyond_the_run_and_a_look_may_be_repeated() -> None:
    policy, ahead = made(3, last=4)
    first = ahead.draw(0, 0)
    assert torch.equal(ahead.draw(0, 0)["behavior_logp"][:0], first["behavior_logp"][:0])
    drawn(policy, ahead, range(1, 4))
    assert ahead.state_dict()["ahead"] == {}
    with pytest.raises(ValueError, match="at least one step"):
        made(0)


def test_what_goes_wrong_in_the_thread_is_told() -> None:
    _, ahead = made(1)
    ahead._rollouts.reward = lambda *given: 1 / 0  # type: ignore[assignment]
    with pytest.raises(ZeroDivisionError):
        ahead.draw(0, 0)


def test_sampling_goes_on_while_the_policy_learns() -> None:
    """The draw of the next batch has begun, in another thread, before this step's learning ends."""
    _, ahead = made(1)
    began, main = threading.Event(), threading.get_ident()
    plain = ahead._rollouts.sampler.sample

    def watched(*given: object) -> object:
        began.set()
        assert threading.get_ident() != main
        return plain(*given)  # type: ignore[arg-type]

    ahead.draw(0, 0)
    ahead.state_dict()
    ahead._rollouts.sampler.sample = watched  # type: ignore[method-assign]
    ahead.draw(1, 1)
    assert began.wait(10.0), "nothing was sampled while this thread did something else"
    ahead.close()
