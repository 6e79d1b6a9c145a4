"""Rollouts, replay, rows, the mixer: what is drawn, when, and how it is labelled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.policies.models import saved, trained_tokenizer
from unipo.episodes import Episodes
from unipo.policies import load_policy
from unipo.sources.keyed import shuffled
from unipo.sources.mixer import Mixer
from unipo.sources.prompts import Curriculum, Prompt, RowPrompts
from unipo.sources.replay import Replay
from unipo.sources.rows import Rows, demonstration_episodes, pair_episodes
from unipo.sources.spec import RolloutSpec
from unipo.sources.stages.augment import Demonstrated
from unipo.sources.text.encode import encode_completion, encode_prompt
from unipo.sources.text.filters import LengthPenalty, MaskTruncated, MixedOutcomes, Relabel, SuccessBetween
from unipo.sources.text.rollouts import Rollouts, Scored
from unipo.sources.text.sampler import Sampler, SamplerSettings

PROMPTS = [Prompt(id=i, text=f"{i} + 1", columns={"answer": str(i + 1)}, demonstration=str(i + 1)) for i in range(6)]


def score_by(rule: Any) -> Any:
    def score(prompts: Sequence[Any], completions: Sequence[str], columns: Mapping[str, Sequence[Any]]) -> Scored:
        values = torch.tensor([float(rule(i, c)) for i, c in enumerate(completions)])
        return Scored(values, ~values.isnan())

    return score


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load_policy(str(saved("llama", tmp_path_factory.mktemp("model"))))


def rollouts(policy: Any, rule: Any, **spec: Any) -> Rollouts:
    sampler = Sampler(policy.model, policy.tokenizer, SamplerSettings(max_tokens=6))
    return Rollouts(
        RowPrompts(PROMPTS, 0), sampler, policy.tokenizer, score_by(rule), RolloutSpec(**{"group": 3, **spec}), 2, 0
    )


def test_groups_are_labelled_and_draws_are_keyed(policy: Any) -> None:
    a, b = (rollouts(policy, lambda i, c: len(c) % 2) for _ in range(2))
    first, again = a.draw(0, 5), b.draw(0, 5)
    assert first.count("group") == 2
    assert first.lengths("group", "episode").tolist() == [3, 3]
    assert first["policy_version"].tolist() == [5] * 6
    assert first["token"].tolist() == again["token"].tolist()
    assert a.draw(1, 6)["token"].tolist() != first["token"].tolist()
    state = a.state_dict()
    c = rollouts(policy, lambda i, c: len(c) % 2)
    c.load_state_dict(state)
    assert c.draw(2, 7)["token"].tolist() == a.draw(2, 7)["token"].tolist()


def test_dynamic_sampling_refills_and_counts(policy: Any) -> None:
    """Only the second group of each round of two has mixed rewards: one group a round is kept, until there are two."""
    source = rollouts(policy, lambda i, c: i == 3, keep=MixedOutcomes(), refill=5)
    episodes = source.draw(0, 0)
    assert episodes.count("group") == 1, "in the second round one prompt is sampled, whose rewards are all 0"
    assert source.dropped["equal outcomes"] >= 1
    stuck = rollouts(policy, lambda i, c: 1.0, keep=MixedOutcomes(), refill=1)
    assert stuck.draw(0, 0).count("group") > 0, "a step never has an empty batch"
    assert source.metrics["rollouts"] > 6


@dataclass(frozen=True)
class Ranked(Relabel):
    """Less and less for every further row, as length penalties differ within a group."""

    def __call__(self, episodes: Episodes, max_tokens: int) -> Episodes:
        return episodes.with_columns("episode", reward=episodes["reward"] - torch.arange(len(episodes)))


def test_groups_are_judged_before_their_rewards_are_shaped(policy: Any) -> None:
    """DAPO: answers that are all wrong stay a group of equal outcomes, however their length penalties differ."""
    shaped = rollouts(policy, lambda i, c: 0.0, keep=MixedOutcomes(), relabel=(Ranked(),))
    episodes = shaped.draw(0, 0)
    assert shaped.dropped["equal outcomes"] == 2
    assert episodes["reward"].tolist() == [0, -1, -2, -3, -4, -5], "what is used is still shaped"
    assert shaped.metrics["reward"] == 0.0, "what is reported is not"


def test_rows_without_reward_are_dropped_and_counted(policy: Any) -> None:
    source = rollouts(policy, lambda i, c: float("nan") if i == 0 else 1.0)
    assert len(source.draw(0, 0)) == 5
    assert source.dropped["no reward"] == 1
    assert source.metrics["reward"] == 1.0, "a dropped row is not a 0"


def test_demonstrations_join_their_group(policy: Any) -> None:
    episodes = rollouts(policy, lambda i, c: 0.0, augment=(Demonstrated(),)).draw(0, 0)
    assert episodes.lengths("group", "episode").tolist() == [4, 4]
    assert episodes.category("kind", "demo").tolist() == [False, False, False, True] * 2
    shown = episodes.select(torch.tensor([3]))
    assert policy.tokenizer.decode(shown["token"].tolist(), skip_special_tokens=True) == str(
        int(shown["prompt_id"][0]) + 1
    )


def old_groups(n: int, version: int) -> Episodes:
    group = [i for i in range(n) for _ in range(2)]
    return Episodes.build([[version, i] for i in group], [[1]] * (2 * n), group, kind=["rollout"] * (2 * n),
                          policy_version=[version] * (2 * n))  # fmt: skip


def test_replay_forgets_the_oldest_and_minds_staleness(tmp_path: Path) -> None:
    replay = Replay(groups_per_step=2, seed=0, capacity=5, max_staleness=3)
    assert replay.draw(0, 0) is None
    for version in range(4):
        replay.add(old_groups(2, version))
    assert len(replay) == 5
    assert replay.store is not None
    assert replay.store["policy_version"].unique().tolist() == [1, 2, 3]
    drawn = replay.draw(7, 6)
    assert drawn is not None
    assert set(drawn["policy_version"].tolist()) == {3}
    assert replay.draw(7, 99) is None
    assert replay.draw(7, 6)["token"].tolist() == drawn["token"].tolist()  # type: ignore[index]
    replay.save(tmp_path)
    again = Replay(groups_per_step=2, seed=0, capacity=5, max_staleness=3)
    again.load(tmp_path)
    assert again.draw(7, 6)["token"].tolist() == drawn["token"].tolist()  # type: ignore[index]
    assert Replay(1, 0, max_staleness=0).draw(0, 0) is None


def test_rows_cycle_through_everything_once_an_epoch() -> None:
    source = Rows(old_groups(5, 0), 2, 3)
    seen = [int(source.draw(s, 0)["token"][1]) for s in range(5)] + []
    other = Rows(old_groups(5, 0), 1, 3)
    assert sorted(int(other.draw(s, 0)["token"][1]) for s in range(5)) == [0, 1, 2, 3, 4]
    assert len(seen) == 5
    assert sorted(shuffled(i, 7, "k") for i in range(7, 14)) == list(range(7))
    assert [shuffled(i, 7, "k") for i in range(7)] != [shuffled(i, 7, "k") for i in range(7, 14)]


def test_fixed_rows_say_which_draw_they_are() -> None:
    """Groups of two, three per step of an epoch of four: the same row has another number in every epoch."""
    rows = Rows(old_groups(4, 0), 3, 0)
    first, second = rows.draw(0, 0), rows.draw(1, 0)
    assert first["draw"].tolist() == [0, 0, 1, 1, 2, 2]
    assert second["draw"].tolist() == [3, 3, 4, 4, 5, 5]


def test_the_mixer_labels_and_records_its_shares() -> None:
    mixed = Mixer({"replay": Replay(1, 0), "demos": Rows(old_groups(4, 0), 3, 0), "old": Rows(old_groups(4, 1), 1, 0)})
    batch = mixed.draw(0, 0)
    assert batch.column("source").names == ("demos", "old"), "an empty replay gives nothing"
    assert batch["sampling_weight"].unique().tolist() == [0.25, 0.75]
    with pytest.raises(ValueError, match="no source gave any episodes at step 3"):
        Mixer({"replay": Replay(1, 0)}).draw(3, 0)


def test_text_becomes_tokens_once() -> None:
    tokenizer = trained_tokenizer()
    chat = [{"role": "user", "content": "2 + 2"}]
    assert tokenizer.decode(encode_prompt(tokenizer, chat)) == "<user>2 + 2\n<assistant>"
    assert encode_completion(tokenizer, "4")[-1] == tokenizer.eos_token_id
    assert encode_completion(tokenizer, "4").count(tokenizer.eos_token_id) == 1
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        encode_prompt(tokenizer, chat)
    shown = demonstration_episodes(tokenizer, ["2 + 2 ="], ["4"])
    assert tokenizer.decode(shown["token"], skip_special_tokens=True) == "4"
    pairs = pair_episodes(tokenizer, ["a", "b"], ["good", "fine"], ["bad", "poor"])
    assert pairs["chosen"].tolist() == [True, False, True, False]
    assert pairs.lengths("group", "episode").tolist() == [2, 2]
    groups = pair_episodes(tokenizer, ["a", "b"], [["good", "fine"], "ok"], ["bad", ["poor", "so"]])
    assert groups["chosen"].tolist() == [True, True, False, True, False, False]
    assert groups.lengths("group", "episode").tolist() == [3, 3]
    first = groups.step_index(torch.tensor([1]))
    assert tokenizer.decode(groups["token"][first], skip_special_tokens=True) == "fine"


def test_filters_and_curricula() -> None:
    e = old_groups(3, 0).with_columns(
        "episode", reward=torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0, 0.0]), truncated=torch.arange(6) == 5
    )
    assert MixedOutcomes()(e).tolist() == [True, False, False]
    assert SuccessBetween(low=0.4, high=1.1)(e).tolist() == [True, True, False]
    assert MaskTruncated()(e, 9)["mask"].tolist() == [True] * 10 + [False] * 2
    assert LengthPenalty(0.5)(e, 4)["reward"].tolist() == [0.75, 0.0, 0.75, 0.75, 0.0, 0.0], "two tokens of four"
    easy, hard = RowPrompts(PROMPTS[:2]), RowPrompts(PROMPTS[2:])
    curriculum = Curriculum(stages=[(0, easy), (10, hard)])
    assert curriculum.at(9) is easy
    assert curriculum.at(10) is hard
