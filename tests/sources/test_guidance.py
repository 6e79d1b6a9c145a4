"""Stages that help groups: what is shown, whose place it takes, what lacks is told, and that a run repeats itself."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from unipo.episodes import Episodes
from unipo.objectives import Condition, EvenAndLow, MaskByRows, One, WeightByRows, answers, demonstrations, rollouts
from unipo.objectives.masks import ClipMask
from unipo.objectives.weights import TokenRatio
from unipo.policies.tabular import TabularPolicy
from unipo.sources.prompts import Prompt, TaskPrompts
from unipo.sources.spec import RolloutSpec
from unipo.sources.stages.augment import Augment, Demonstrated
from unipo.sources.stages.guidance import GuidedPrompts, Guiding, Hint, Hinted, Prefix, Share, ShortestUseful
from unipo.sources.stages.injection import (
    AtRandom,
    BestUnderstood,
    FailedRows,
    Injected,
    Recalled,
    Room,
    reasoning_of,
    well_formed,
)
from unipo.sources.text.tabular import NumberTokenizer, TabularPrompts, tabular_rollouts
from unipo.tasks import TASKS, get_task
from unipo.tasks.tabular import TabularTask
from unipo.training.build_text import build_text
from unipo.training.config import ConfigError, RunConfig

NUMBERS = NumberTokenizer()


def source(stage: Augment, columns: Mapping[str, Any] | None = None, group: int = 4, reward: Any = None,
           shown: Mapping[int, Any] | None = None) -> Any:  # fmt: skip
    task = TabularTask(4, 3, 3, reward or (lambda q, tokens: 0.0))
    asked = TabularTask(2, 3, 3, task.reward)
    prompts = TabularPrompts(asked, shown or {}, {q: columns or {} for q in range(2)})
    policy = TabularPolicy(torch.zeros(4, 3, 4, 3).double())
    return tabular_rollouts(task, policy, RolloutSpec(group=group, augment=(stage,)), 0, prompts, 2)


# ---- what is shown -----------------------------------------------------------------------------------------------------
def test_hints_stand_where_the_form_says() -> None:
    prompt = Prompt(id=1, text="7 8", columns={"hint": "1 2 3 4", "other": None}, demonstration="5 6")
    assert Hint(form="{hint} {prompt}").shown(prompt, 1.0, NUMBERS, 9) == ([1, 2, 3, 4, 7, 8], [])
    assert Hint(form="{prompt} {hint}").shown(prompt, 0.3, NUMBERS, 9) == ([7, 8, 1, 2], [])
    assert Hint("demonstration", "{hint} {prompt} {hint}").shown(prompt, 0.5, NUMBERS, 9)[0] == [5, 7, 8, 5]
    assert Hint().lacks(prompt) == Prefix().lacks(prompt) == ""
    assert "'other'" in Hint("other").lacks(prompt)
    with pytest.raises(ValueError, match="prompt 1 lacks a column 'other'"):
        Hint("other").shown(prompt, 1.0, NUMBERS, 9)


def test_hints_in_a_conversation_stand_in_its_last_message() -> None:
    class Chat(NumberTokenizer):
        chat_template = "x"

        def apply_chat_template(self, messages: list[Mapping[str, str]], **options: Any) -> str:
            return " ".join(m["content"] for m in messages)

    messages = [{"role": "system", "content": "1"}, {"role": "user", "content": "2 3"}]
    prompt = Prompt(id=1, text=messages, columns={"hint": "4"})
    assert Hint(form="{hint} {prompt}").shown(prompt, 1.0, Chat(), 9) == ([1, 4, 2, 3], [])
    assert messages[1]["content"] == "2 3"


def test_a_prefix_leaves_a_token_to_sample() -> None:
    prompt = Prompt(id=1, text="7", columns={"solution": "1 2 3 4"})
    assert Prefix().shown(prompt, 0.5, NUMBERS, 9) == ([7, 1, 2], [1, 2])
    assert Prefix().shown(prompt, 0.51, NUMBERS, 9)[1] == [1, 2, 3]
    assert Prefix().shown(prompt, 1.0, NUMBERS, 4) == ([7, 1, 2, 3], [1, 2, 3])
    assert Prefix().shown(prompt, 0.0, NUMBERS, 9) == ([7], [])


@pytest.mark.parametrize("name", sorted(TASKS))
def test_embedded_tasks_show_something_of_the_way(name: str) -> None:
    """The hint begins the worked solution; every teacher is right."""
    task = get_task(name)
    for i in range(5):
        prompt = TaskPrompts(task)[i]
        assert prompt.columns["hint"]
        assert prompt.columns["solution"].startswith(prompt.columns["hint"])
        teachers = prompt.columns["teachers"]
        columns = {k: [v] * len(teachers) for k, v in prompt.columns.items()}
        assert task.reward([prompt.text] * len(teachers), teachers, **columns) == [1.0] * len(teachers)


# ---- when, and whose place ---------------------------------------------------------------------------------------------
def test_only_groups_where_the_condition_holds_are_helped() -> None:
    """Prompt 0 always succeeds, prompt 1 never does."""
    rows = source(Hinted(guide=Hint(form="{hint}")), {"hint": "3"}, reward=lambda q, tokens: float(q == 0)).draw(0, 0)
    assert rows.lengths("group", "episode").tolist() == [4, 8]
    assert rows.context("sample").values.tolist() == [0] * 4 + [1] * 4 + [3] * 4


def test_guided_prompts_stand_beside_the_plain_ones_or_in_their_place() -> None:
    for instead, sizes, contexts in ((False, [4, 4, 4], [0, 1, 3]), (True, [4, 4], [0, 3])):
        stage = GuidedPrompts(guide=Hint(form="{hint}"), instead=instead)
        rows = source(stage, {"hint": "3"}, reward=lambda q, tokens: float(q == 0)).draw(0, 0)
        assert rows.lengths("group", "episode").tolist() == sizes
        assert rows.context("score").values.tolist() == [c for c in contexts for _ in range(4)]
        assert "sample_prompt" not in rows


def test_each_group_has_its_own_share_of_a_trace() -> None:
    """What a measure of difficulty would ask for."""

    class ByPrompt(Share):
        def __call__(self, groups: Episodes, chosen: torch.Tensor, guide: Any, drawn: Any) -> list[float]:
            return [[0.3, 0.6][int(g)] for g in chosen]

    rows = source(Guided := GuidedPrompts(Condition(), Prefix(), ByPrompt(), instead=True), {"solution": "2 1 0"}).draw(
        0, 0
    )
    assert isinstance(Guided, Guiding)
    assert rows.lengths("episode").tolist() == [2] * 4 + [1] * 4
    assert rows.context("score").values.tolist() == [0, 2] * 4 + [1, 2, 1] * 4


def test_rewards_are_of_the_whole_answer_behind_a_prefix() -> None:
    stage = GuidedPrompts(Condition(), Prefix(), Share(0.5), instead=True)
    rows = source(stage, {"solution": "2 1 0"}, reward=lambda q, tokens: sum(tokens)).draw(0, 0)
    torch.testing.assert_close(rows["reward"], 3 + rows["token"].double())


def test_even_and_low() -> None:
    batch = Episodes.build([[0]] * 6, None, [0, 0, 1, 1, 2, 2])
    batch = batch.with_columns("episode", reward=torch.tensor([0.1, 0.1, 0.0, 0.3, 0.5, 0.5]))
    assert EvenAndLow(0.2, 0.05)(batch, {}).tolist() == [True, False, False]
    assert EvenAndLow(0.6, 0.05)(batch, {}).tolist() == [True, False, True]


@pytest.mark.parametrize(("room", "left"), [(Room(), 4), (FailedRows(), 2), (FailedRows(at_random=True), 2)])
def test_rows_from_the_data_are_added_or_take_the_place_of_failed_ones(room: Room, left: int) -> None:
    stage = Injected(Condition(), "teachers", 2, room=room, scale=0.5)
    rollouts_ = source(
        stage, {"teachers": ["0 0 0", "1 1 1", "2 2 2"]}, reward=lambda q, tokens: float(tokens == (1, 1, 1))
    )
    rows = rollouts_.draw(0, 0)
    plain = source(Augment(), reward=lambda q, tokens: float(tokens == (1, 1, 1))).draw(0, 0)
    shown = rows.category("kind", "demo").reshape(2, -1)
    assert shown.sum(1).tolist() == [2, 2]
    assert (~shown).sum(1).tolist() == [left, left]
    taken = rows.select(rows.category("kind", "demo"))
    assert taken["token"].reshape(-1, 3).tolist() == [[0, 0, 0], [1, 1, 1]] * 2
    assert taken["reward"].tolist() == [0.0, 0.5] * 2
    assert taken["behavior_logp"].isnan().all()
    assert taken.context("score").values.tolist() == [0, 0, 1, 1]
    kept = rows.select(~rows.category("kind", "demo"))["token"].reshape(2, left, 3)
    if type(room) is FailedRows and not room.at_random:
        assert torch.equal(kept, plain["token"].reshape(2, 4, 3)[:, 2:])
    again = source(
        stage, {"teachers": ["0 0 0", "1 1 1", "2 2 2"]}, reward=lambda q, tokens: float(tokens == (1, 1, 1))
    )
    assert torch.equal(again.draw(0, 0)["token"], rows["token"]), "a function of seed and step"


def test_right_rows_keep_their_place() -> None:
    stage = Injected(Condition(), "teachers", 3, room=FailedRows())
    rows = source(stage, {"teachers": ["2 0 0"] * 3}, 4, lambda q, tokens: float(tokens[0] < 2)).draw(0, 0)
    assert rows.lengths("group", "episode").tolist() == [4, 4]
    own = rows.select(rows.category("kind", "rollout"))
    shown = rows.category("kind", "demo").reshape(2, 4).sum(1)
    assert (own["reward"] == 1).all() or int(shown.max()) == 3


def test_teachers_at_random_change_by_step() -> None:
    stage = Injected(Condition(), "teachers", 1, AtRandom())
    rollouts_ = source(stage, {"teachers": ["0 0 0", "1 1 1", "2 2 2"]})
    seen = [rollouts_.draw(step, step) for step in range(12)]
    first = {int(rows["token"][rows.expand(rows.category("kind", "demo"))][0]) for rows in seen}
    assert first == {0, 1, 2}


def test_a_teacher_is_well_formed_with_reasoning_a_mark_and_an_answer() -> None:
    """A mark is worth a tenth: it decides between teachers that are understood alike, not against one understood better."""
    found = [well_formed(text) for text in ("7+8=15#15", "7+8=15", "#15", "7+8=15#")]
    assert found == [True, False, False, False]
    ranking = BestUnderstood()
    assert ranking._score(0.5, "7+8=15#15") == pytest.approx(0.9 * 0.5 + 0.1)
    assert ranking._score(0.5, "7+8=15#15") > ranking._score(0.5, "15") > ranking._score(0.3, "15")
    assert ranking._score(0.5, "7+8=15#15") < ranking._score(0.7, "15")


def test_the_reasoning_of_a_teacher_is_what_stands_before_the_answer() -> None:
    assert reasoning_of("7+8=15#15", "15") == "7+8=15#"
    assert reasoning_of("so it is half#one half", "0.5") == "so it is half#"
    assert reasoning_of("no answer", "5") == "no answer"


def test_recalled_rows_keep_their_facts_and_are_checkpointed(tmp_path: Path) -> None:
    won = [True]
    made = source(Recalled(room=FailedRows()), reward=lambda q, tokens: float(won[0]))
    made.draw(0, 0)
    made.save(tmp_path)
    other = source(Recalled(room=FailedRows()), reward=lambda q, tokens: 0.0)
    other.load(tmp_path)
    won[0] = False
    rows, again = made.draw(1, 1), other.draw(1, 1)
    assert rows["policy_version"].tolist() == [1, 1, 1, 0] * 2
    assert rows["reward"].tolist() == [0.0, 0.0, 0.0, 1.0] * 2
    torch.testing.assert_close(rows["behavior_logp"], torch.full((24,), -math.log(3)).to(rows["behavior_logp"]))
    assert torch.equal(rows["token"], again["token"])


def test_memory_is_bounded_in_prompts() -> None:
    made = source(Recalled(capacity=1, prompts=1), reward=lambda q, tokens: 1.0)
    made.draw(0, 0)
    assert made.kept["successes"]["prompt_id"].tolist() == [1]


# ---- parts by rows -----------------------------------------------------------------------------------------------------
def test_weights_and_masks_by_rows() -> None:
    batch = Episodes.build([[0, 0], [0]], None, [0, 0], kind=["rollout", "demo"])
    batch = batch.with_columns("step", behavior_logp=torch.tensor([-1.0, -1.0, torch.nan]))
    signals, A = {"logp": torch.tensor([-1.0, -0.5, -2.0])}, torch.tensor([1.0, 1.0, 1.0])
    weight = WeightByRows(demonstrations, One(), TokenRatio()).of(A, batch, signals)
    torch.testing.assert_close(weight, torch.tensor([1.0, math.exp(0.5), 1.0]))
    assert MaskByRows(demonstrations, others=ClipMask()).of(A, batch, signals).tolist() == [True, False, True]
    assert MaskByRows(rollouts, others=ClipMask()).of(A, batch, signals).tolist() == [True, True, True]
    judged = batch.with_columns("episode", reward=torch.tensor([0.0, torch.nan]))
    assert answers(judged).tolist() == [True, False]
    assert answers(batch.with_columns("episode", reward=torch.tensor([0.0, 1.0]))).tolist() == [True, True]


# ---- what lacks is told before training --------------------------------------------------------------------------------
@pytest.mark.parametrize(("method", "column"), [("guide-grpo", "hint"), ("pope", "solution"), ("ampo", "teachers"),
                                                 ("tempsamp", "demonstration"), ("upge-hpt", "demonstration")])  # fmt: skip
def test_what_a_data_set_lacks_is_told(method: str, column: str, tmp_path: Path) -> None:
    from unipo.methods.catalog import find

    data = tmp_path / "prompts.jsonl"
    data.write_text('{"prompt": "1+1=", "answer": "2"}\n' * 3)
    config = RunConfig(method=method, task=str(data), out=str(tmp_path / "run"), model="tiny", steps=1)
    with pytest.raises(ConfigError, match=f"of every prompt a column '{column}'.*3 of 3 have none.*grpo"):
        build_text(config, find(method).build())
    assert not (tmp_path / "run").exists()


def test_an_answer_is_needed_to_rank_teachers() -> None:
    from unipo.methods.catalog import find

    stage = find("ampo").build().rollouts.augment[0]
    assert "'answer'" in stage.lacks(Prompt(id=0, text="x", columns={"teachers": ["a"]}))
    assert stage.lacks(Prompt(id=0, text="x", columns={"teachers": ["a"], "answer": "1"})) == ""
    assert Demonstrated().lacks(Prompt(id=0, text="x", demonstration="y")) == ""


def test_a_search_is_checkpointed(tmp_path: Path) -> None:
    """What was found for a prompt is not looked for again after a resume."""
    stage = GuidedPrompts(Condition(), Prefix(), ShortestUseful(1.0, 3, 8))
    made, other = (
        source(stage, {"solution": "2 1 0"}, reward=lambda q, tokens: float(tokens[0] == 2)) for _ in range(2)
    )
    made.draw(0, 0)
    made.save(tmp_path)
    other.load(tmp_path)
    assert other.kept["shares"]["share"].tolist() == made.kept["shares"]["share"].tolist() == pytest.approx([1 / 3] * 2)
    assert torch.equal(made.draw(1, 1)["token"], other.draw(1, 1)["token"])
    assert other.tokens_sampled == 2 * 4 * (3 + 2)
