"""Rewards that are models: what they read, by which tokenizer, and what is said of a folder that is none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.policies.models import saved
from unipo.policies import TokenPolicy, ValueHead, load_policy
from unipo.policies.encode import encode_completion, encode_prompt
from unipo.rewards import DensityRatio, ModelRater, ModelReward, RewardError, learned, resolve_reward
from unipo.rewards.models import loaded
from unipo.sources.stages.preferences import ModelJudge, judge_of

PROMPTS = ["what is 12", "reverse abc", "0 1 2"]
ANSWERS = ["the answer is 42", "cba", "3"]
OTHERS = ["12", "a", "the the the"]


def judge(folder: Path, judges: str, name: str = "qwen3") -> Path:
    """A saved model with a random value head."""
    policy = load_policy(str(saved(name, folder)))
    policy.value_head, policy.judges = ValueHead(policy.width, torch.float32), judges
    with torch.no_grad():
        policy.value_head.linear.weight.normal_(generator=torch.Generator().manual_seed(3))
        policy.value_head.linear.bias.fill_(0.25)
    policy.save(folder)
    return folder


def at_the_end(policy: TokenPolicy, context: list[int], answer: list[int]) -> float:
    """The value head on the hidden state that has read all but the last token, by the model's own forward pass."""
    ids = torch.tensor([[*context, *answer]])[:, :-1]
    hidden = policy.model.model(input_ids=ids, use_cache=False).last_hidden_state[0, -1]
    assert policy.value_head is not None
    return float(policy.value_head(hidden))


def test_a_value_head_is_saved_with_its_model(tmp_path: Path) -> None:
    folder = judge(tmp_path, "answers")
    again = load_policy(str(folder))
    assert again.judges == "answers"
    assert again.value_head is not None
    assert again.value_head.linear.bias.item() == 0.25
    assert "value" in again.emits


def test_the_score_is_the_value_at_the_end_of_the_answer(tmp_path: Path) -> None:
    """The end-of-sequence token closes the answer, and everything before it has been read."""
    reward = ModelReward(str(judge(tmp_path, "answers")))
    found, policy = reward(PROMPTS, ANSWERS), loaded(str(tmp_path))
    for prompt, answer, score in zip(PROMPTS, ANSWERS, found, strict=True):
        context, tokens = encode_prompt(policy.tokenizer, prompt), encode_completion(policy.tokenizer, answer)
        assert tokens[-1] == policy.tokenizer.eos_token_id
        assert score == pytest.approx(at_the_end(policy, context, tokens), abs=1e-5)
    assert len(set(found)) == 3


def test_a_preference_model_reads_the_rival_first(tmp_path: Path) -> None:
    rater = ModelRater(str(judge(tmp_path, "pairs")))
    found, policy = rater(PROMPTS, ANSWERS, OTHERS), loaded(str(tmp_path))
    for i, prompt in enumerate(PROMPTS):
        context = encode_prompt(policy.tokenizer, prompt)
        own, other = (encode_completion(policy.tokenizer, t[i]) for t in (ANSWERS, OTHERS))
        apart = at_the_end(policy, context + other, own) - at_the_end(policy, context + own, other)
        assert float(found[i]) == pytest.approx(1 / (1 + torch.exp(torch.tensor(-apart)).item()), abs=1e-5)
    assert torch.allclose(found + rater(PROMPTS, OTHERS, ANSWERS), torch.ones(3, dtype=torch.float64))
    assert torch.allclose(rater(PROMPTS, OTHERS, OTHERS), torch.full((3,), 0.5, dtype=torch.float64))


def test_a_reward_model_judges_by_its_scores(tmp_path: Path) -> None:
    folder = str(judge(tmp_path, "answers"))
    one, two = (torch.tensor(ModelReward(folder)(PROMPTS, side)) for side in (ANSWERS, OTHERS))
    assert torch.allclose(ModelRater(folder)(PROMPTS, ANSWERS, OTHERS), torch.sigmoid(one - two).double(), atol=1e-6)


def test_rewards_by_name(tmp_path: Path) -> None:
    """model(FOLDER) and model(RUN) are the same, loaded once, and are called after the run."""
    folder = judge(tmp_path / "helpful" / "final", "answers")
    name, reward, weight = resolve_reward(f"model({folder})*0.5")
    other = resolve_reward(f"model({tmp_path / 'helpful'})")
    assert (name, other[0], weight) == ("helpful", "helpful", 0.5)
    assert reward(PROMPTS, ANSWERS) == other[1](PROMPTS, ANSWERS)
    assert learned([other])
    assert not learned([resolve_reward("math")])
    assert judge_of(f"model({folder})", 1.0) == ModelJudge(str(folder))


def test_what_is_no_reward_model_is_told(tmp_path: Path) -> None:
    plain, critic, pairs = (
        saved("qwen3", tmp_path / "plain"),
        judge(tmp_path / "critic", ""),
        judge(tmp_path / "pm", "pairs"),
    )
    for text, said in {
        f"model({plain})": "no value head",
        f"model({critic})": "critic",
        f"model({pairs})": "preference model",
        f"model({tmp_path / 'none'})": "no such folder",
        "model()": r"write model\(FOLDER\)",
        f"density_ratio({plain})": r"write density_ratio\(STRONG, WEAK",
        f"density_ratio({plain},{plain},per=word)": "answer, token",
        f"density_ratio({plain},{tmp_path / 'none'})": "no such folder",
        "modell(x)": "did you mean 'model'",
    }.items():
        with pytest.raises(RewardError, match=said):
            resolve_reward(text)
    for folder in (plain, critic):
        with pytest.raises(RewardError, match="no reward model"):
            judge_of(f"model({folder})", 1.0)
    with pytest.raises(ValueError, match=r"model\(FOLDER\)"):
        judge_of("mode", 1.0)


# ---- strong over weak ----------------------------------------------------------------------------------------------------
def logp(folder: Path, prompt: str, answer: str) -> tuple[float, int]:
    """log p of a finished answer by the model's own logits, and its tokens."""
    policy = load_policy(str(folder))
    context, tokens = encode_prompt(policy.tokenizer, prompt), encode_completion(policy.tokenizer, answer)
    scores = policy.model(input_ids=torch.tensor([[*context, *tokens]])).logits[0].log_softmax(-1)
    places = range(len(context) - 1, len(context) + len(tokens) - 1)
    return sum(float(scores[at, t]) for at, t in zip(places, tokens, strict=True)), len(tokens)


def spaced(folder: Path) -> Path:
    """The same model with a tokenizer that spells everything: every merge is taken out."""
    path = saved("llama", folder) / "tokenizer.json"
    described = json.loads(path.read_text())
    described["model"]["merges"] = []
    path.write_text(json.dumps(described))
    return folder


@torch.no_grad()
def test_tokens_and_contexts_of_each_model(tmp_path: Path) -> None:
    """Each model with its own tokenizer, the prompt left out and the first token and the end kept; contexts in both, or one."""
    strong, weak = saved("qwen3", tmp_path / "strong"), spaced(tmp_path / "weak")
    found = DensityRatio(str(strong), str(weak))(PROMPTS, ANSWERS)
    means = DensityRatio(str(strong), str(weak), per="token")(PROMPTS, ANSWERS)
    for prompt, answer, ratio, mean in zip(PROMPTS, ANSWERS, found, means, strict=True):
        (above, n), (below, spelled) = logp(strong, prompt, answer), logp(weak, prompt, answer)
        assert ratio == pytest.approx(above - below, abs=1e-3)
        assert mean == pytest.approx((above - below) / n, abs=1e-3)
        assert spelled >= n
    assert logp(weak, PROMPTS[0], ANSWERS[0])[1] > logp(strong, PROMPTS[0], ANSWERS[0])[1]
    both = DensityRatio(str(strong), str(weak), context="safe: ")(PROMPTS, ANSWERS)[0]
    alone = DensityRatio(str(strong), str(weak), context="safe: ", weak_context="")(PROMPTS, ANSWERS)[0]
    with_it, without = "safe: " + PROMPTS[0], PROMPTS[0]
    routed = DensityRatio(str(strong), str(weak), context=lambda p: "safe: " if "12" in p else "")(PROMPTS, ANSWERS)
    assert routed == pytest.approx([both, *found[1:]], abs=1e-3)
    above = logp(strong, with_it, ANSWERS[0])[0]
    assert both == pytest.approx(above - logp(weak, with_it, ANSWERS[0])[0], abs=1e-3)
    assert alone == pytest.approx(above - logp(weak, without, ANSWERS[0])[0], abs=1e-3)


def test_equal_models_have_no_ratio(tmp_path: Path) -> None:
    folder = saved("qwen3", tmp_path)
    assert DensityRatio(str(folder), str(folder))(PROMPTS, ANSWERS) == [0.0] * 3
    chat = [[{"role": "user", "content": p}] for p in PROMPTS]
    assert DensityRatio(str(folder), str(folder), per="token", context="be kind")(chat, ANSWERS) == [0.0] * 3
    told = DensityRatio(str(folder), str(folder), context="be kind", weak_context="")(chat, ANSWERS)
    assert max(abs(x) for x in told) > 1e-3, "a criterion above alone is a reward of its own"


def test_a_batch_is_its_rows(tmp_path: Path) -> None:
    reward = ModelReward(str(judge(tmp_path, "answers")))
    whole = reward(PROMPTS * 3, ANSWERS * 3)
    alone = [reward([p], [a])[0] for p, a in zip(PROMPTS, ANSWERS, strict=True)]
    assert whole == pytest.approx(alone * 3, abs=1e-5)
