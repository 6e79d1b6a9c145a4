"""Tiny models of many architectures, saved to disk in the real formats with tokenizers trained here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    FalconH1Config,
    Gemma2Config,
    GemmaConfig,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    MambaConfig,
    MixtralConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3MoeConfig,
)

TEXT = [
    "what is 12 + 30 = ?",
    "the answer is 42",
    "reverse abc gives cba",
    "0 1 2 3 4 5 6 7 8 9",
    "user: hello assistant: hi",
]
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def trained_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer, as GPT-2, Llama 3 and Qwen have."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<pad>", "<eos>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXT * 20, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")
    fast.chat_template = TEMPLATE
    return fast


def configurations(vocabulary: int) -> dict[str, Any]:
    """Attention with and without windows and soft caps, experts, state spaces, a hybrid, and logits that are scaled."""
    common: Any = {
        "vocab_size": vocabulary, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 128, "bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0,
    }  # fmt: skip
    ends: Any = {"bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0}
    return {
        "qwen3": Qwen3Config(**common, head_dim=8),
        "llama": LlamaConfig(**common),
        "gemma": GemmaConfig(**common, head_dim=8),
        "gemma2": Gemma2Config(**common, head_dim=8, final_logit_softcapping=5.0, sliding_window=6),
        "mixtral": MixtralConfig(**common, num_local_experts=4),
        "mamba": MambaConfig(vocab_size=vocabulary, hidden_size=32, num_hidden_layers=2, state_size=8, **ends),
        "qwen3_moe": Qwen3MoeConfig(
            **common, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32
        ),
        "cohere": CohereConfig(**common, logit_scale=0.0625),
        "granite": GraniteConfig(**common, logits_scaling=8.0),
        "falcon_h1": FalconH1Config(
            **common,
            head_dim=8,
            mamba_d_ssm=32,
            mamba_n_heads=4,
            mamba_d_head=8,
            mamba_d_state=8,
            lm_head_multiplier=0.3,
        ),
        "gpt2": GPT2Config(vocab_size=vocabulary, n_embd=32, n_layer=2, n_head=4, n_positions=128, **ends),
    }


def saved(name: str, folder: Path) -> Path:
    """The architecture with random weights, and its tokenizer, in `folder`, as `save_pretrained` writes them."""
    tokenizer = trained_tokenizer()
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(configurations(len(tokenizer))[name])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2.0)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
