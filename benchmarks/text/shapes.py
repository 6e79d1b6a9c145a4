"""Models and scripted batches of the text rows: made from seeds, the same on both sides. Nothing of unipo is imported here.

Models are random: `folder(name)` writes weights and tokenizer once, both sides load that folder. Tokens are words "t0", "t1",
..., so that text and ids are one another's inverse. Lengths are those of language_models.md, section 10.2 of the field notes:
S1 long prompts, S2 nothing to share and nothing uneven, S3 uneven lengths; D1 and D2 the same for pairs.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

FOLDER = Path(__file__).resolve().parents[2] / "build" / "bench"
GROUP = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """A decoder with tied embeddings. `ends`: mean tokens until a sampled completion ends by itself (0: hardly ever)."""

    kind: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    inner: int
    words: int
    ends: float = 0.0


SIZES = {
    "m25": Size(kind="qwen2", hidden=384, layers=6, heads=6, kv_heads=2, inner=1536, words=32_768),
    "m3": Size(kind="qwen2", hidden=128, layers=4, heads=4, kv_heads=2, inner=512, words=4096),
    "1m": Size(kind="qwen3", hidden=128, layers=4, heads=4, kv_heads=2, inner=384, words=1024),
    "10m": Size(kind="qwen3", hidden=320, layers=7, heads=5, kv_heads=1, inner=960, words=4096, ends=64),
    "60m": Size(kind="qwen3", hidden=640, layers=10, heads=10, kv_heads=2, inner=1920, words=20_480, ends=64),
}
"""m25 and m3 score scripted tokens; the others also sample: 0.9, 9.7 and 59 million parameters."""


# ---- models ----------------------------------------------------------------------------------------------------------
def folder(name: str) -> Path:
    """The folder of a model, written on first use: whole or not at all."""
    made = FOLDER / "models" / name
    if not made.is_dir():
        made.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(dir=made.parent))
        write_model(SIZES[name], scratch)
        os.replace(scratch, made)
    return made


def write_model(size: Size, path: Path) -> None:
    import transformers

    config_of = {"qwen2": transformers.Qwen2Config, "qwen3": transformers.Qwen3Config}
    torch.manual_seed(0)
    config = config_of[size.kind](
        hidden_size=size.hidden, num_hidden_layers=size.layers, num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads, head_dim=size.hidden // size.heads, intermediate_size=size.inner,
        vocab_size=size.words, tie_word_embeddings=True, max_position_embeddings=2048,
        pad_token_id=size.words - 2, eos_token_id=size.words - 1, bos_token_id=None,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    if size.ends:
        end_after(model, size.ends)
    model.save_pretrained(path)
    tokenizer_of(size.words).save_pretrained(path)


@torch.no_grad()
def end_after(model: Any, tokens: float) -> None:
    """Make the end of a sequence have probability 1 / tokens wherever it is: lengths are then close to geometric.

    The first channel of every embedding becomes 1, which the residual stream carries to the head, where the end's larger
    weight on it is a bias. As the other logits of a random model are all but equal, that bias is log((V - 1) / (tokens - 1)).
    """
    table, end = model.get_input_embeddings().weight, model.config.eos_token_id
    table[:, 0] = 1.0
    ids = torch.randint(0, end - 1, (4, 64), generator=torch.Generator().manual_seed(0))
    carried = float(model.get_decoder()(input_ids=ids).last_hidden_state[..., 0].mean())
    table[end, 0] += math.log((len(table) - 1) / (tokens - 1)) / carried


def tokenizer_of(words: int) -> Any:
    """Words t0, t1, ... with spaces between; the last two ids are padding and the end."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    vocabulary = {f"t{i}": i for i in range(words - 2)} | {"<pad>": words - 2, "<eos>": words - 1}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="t0"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="t0")


def text_of(ids: Sequence[int]) -> str:
    return " ".join(f"t{i}" for i in ids)


# ---- scripted tokens -------------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """`groups` prompts of `prompt` tokens; completions of exp(N(mu, sigma)) tokens, within [`shortest`, `longest`]."""

    prompt: int
    longest: int
    groups: int
    group: int
    shortest: int = 4
    mu: float = 0.0
    sigma: float = 0.0


SHAPES = {
    "s1": Shape(prompt=256, longest=64, groups=4, group=GROUP, mu=3.2, sigma=0.6),
    "s2": Shape(prompt=16, longest=192, shortest=192, groups=4, group=GROUP),
    "s3": Shape(prompt=64, longest=256, groups=4, group=GROUP, mu=4.2, sigma=0.8),
    "d1": Shape(prompt=256, longest=64, groups=16, group=2, mu=3.2, sigma=0.6),
    "d2": Shape(prompt=16, longest=192, shortest=192, groups=16, group=2),
}


@dataclass(frozen=True, slots=True)
class Batch:
    """One step: prompts [B], completions [B * G] (neighbours share a prompt; for pairs the chosen one first), rewards [B * G]."""

    prompts: list[list[int]]
    completions: list[list[int]]
    rewards: list[float]


def scripted(shape: Shape, words: int, step: int) -> Batch:
    """The batch of a step: other tokens and lengths at every step, the same for everyone."""
    draw = torch.Generator().manual_seed(step)
    n = shape.groups * shape.group
    lengths = (shape.mu + shape.sigma * torch.randn(n, generator=draw)).exp().round().long()
    counts = lengths.clamp(shape.shortest, shape.longest).tolist()

    def tokens(count: int) -> list[int]:
        return list(torch.randint(0, words - 2, (count,), generator=draw).tolist())

    prompts = [tokens(shape.prompt) for _ in range(shape.groups)]
    completions = [[*tokens(length - 1), words - 1] for length in counts]
    return Batch(prompts, completions, [reward_of(c) for c in completions])


# ---- sampled tokens --------------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """A step of an end-to-end row: `groups` prompts of `prompt` tokens, `GROUP` completions of at most `longest` tokens each."""

    groups: int
    prompt: int
    longest: int


SAMPLING = {
    "1m": Sampling(groups=8, prompt=24, longest=32),
    "10m": Sampling(groups=8, prompt=64, longest=128),
    "60m": Sampling(groups=2, prompt=64, longest=128),
}
QUICK = {
    "1m": SAMPLING["1m"],
    "10m": Sampling(groups=2, prompt=64, longest=64),
    "60m": Sampling(groups=1, prompt=64, longest=32),
}


def prompt_texts(prompt: int, words: int, count: int = 256) -> list[str]:
    """The prompts of an end-to-end row."""
    draw = torch.Generator().manual_seed(0)
    return [text_of(torch.randint(0, words - 2, (prompt,), generator=draw).tolist()) for _ in range(count)]


def reward_of(completion: Sequence[int]) -> float:
    """A number in [0, 1] that any side can compute from the tokens: the share of even ones."""
    return sum(i % 2 == 0 for i in completion) / max(len(completion), 1)
