"""Loading causal language models by folder or hub name, with what can be wrong about them said at the door."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from unipo.policies.token import TokenPolicy

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class ModelError(ValueError):
    """A model or tokenizer that cannot be used as it is; the message says why and what to do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraSettings:
    """LoRA adapters on every linear layer: `rank`, and `alpha` (0: twice the rank)."""

    rank: int
    alpha: float = 0.0


def load_policy(name: str, dtype: str = "float32", lora: LoraSettings | None = None, device: str = "cpu",
                temperature: float = 1.0) -> TokenPolicy:  # fmt: skip
    """A `TokenPolicy` from a folder or hub name (AutoModelForCausalLM; safetensors only, no remote code).

    Raises ModelError: not a model, tokenizer and embedding disagree, no end-of-sequence token.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = Path(name)
    if folder.exists() and not (folder / "config.json").exists():
        raise ModelError(
            f"{name} is not a model: expected a folder with config.json, model.safetensors and a tokenizer"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model: Any = AutoModelForCausalLM.from_pretrained(name, dtype=getattr(torch, dtype), use_safetensors=True)
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise ModelError(f"could not load the model {name!r}: {first} Give a folder saved by save_pretrained (with "
                         "safetensors weights and its tokenizer), or a hub name you have access to.") from error  # fmt: skip
    check_tokenizer(name, model, tokenizer)
    model.requires_grad_(True)
    if lora is not None:
        model = with_lora(model, lora)
    return TokenPolicy(model.to(device), tokenizer, temperature)


def check_tokenizer(name: str, model: Any, tokenizer: Any) -> None:
    """Raise ModelError where the two cannot work together; a missing pad token becomes the end-of-sequence token."""
    rows, words = model.get_input_embeddings().weight.shape[0], len(tokenizer)
    if words > rows:
        raise ModelError(
            f"the tokenizer of {name!r} has {words} tokens, the model's embedding {rows} rows: they do not belong together. "
            "Save the matching tokenizer in the model's folder, or call model.resize_token_embeddings first."
        )
    if tokenizer.eos_token_id is None:
        raise ModelError(
            f"the tokenizer of {name!r} has no end-of-sequence token, so no completion could ever finish: set "
            "tokenizer.eos_token and save it with the model"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token


def with_lora(model: Any, lora: LoraSettings) -> Any:
    """The model with trainable adapters and everything else frozen."""
    from peft import LoraConfig, get_peft_model

    present = {n.rsplit(".", 1)[-1] for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    targets: Any = sorted(present & set(TARGETS)) or "all-linear"
    config = LoraConfig(
        r=lora.rank, lora_alpha=int(lora.alpha) or 2 * lora.rank, target_modules=targets, lora_dropout=0.0
    )
    return get_peft_model(model, config)
