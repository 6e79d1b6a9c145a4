"""Loading causal language models by folder or hub name, with what can be wrong about them said at the door."""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from unipo.policies.token import TokenPolicy, ValueHead

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
DTYPES = ("float32", "bfloat16", "float16", "float64")


class ModelError(ValueError):
    """A model or tokenizer that cannot be used as it is; the message says why and what to do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraSettings:
    """LoRA adapters on every linear layer: `rank`, and `alpha` (0: twice the rank)."""

    rank: int
    alpha: float = 0.0

    def __post_init__(self) -> None:
        if self.rank < 1 or self.alpha < 0:
            raise ValueError(
                f"LoRA rank is {self.rank} and alpha {self.alpha}: expected a rank of 1 or more, alpha >= 0"
            )


def load_policy(name: str, dtype: str = "float32", lora: LoraSettings | None = None, device: str = "cpu",
                temperature: float = 1.0) -> TokenPolicy:  # fmt: skip
    """A `TokenPolicy` from a folder or hub name (AutoModelForCausalLM; safetensors only, no remote code).

    A value head that was saved with the model comes with it. A folder with a PEFT adapter loads its base model too: with
    `lora` None the adapter is trained on, else it is merged and a new one put on top. A missing pad token is set to the
    end-of-sequence token, and told as a warning.
    Raises ModelError: not a model, pickled weights, tokenizer and embedding disagree, no end-of-sequence token.
    """
    from transformers import AutoTokenizer

    if dtype not in DTYPES:
        raise ModelError(f"dtype is {dtype!r}: expected one of {', '.join(DTYPES)}")
    _check_folder(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model = _adapted(name, dtype) if (Path(name) / "adapter_config.json").exists() else _plain(name, dtype)
    except (OSError, ValueError) as error:
        if isinstance(error, ModelError):
            raise
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(f"could not load the model {name!r}: {first} Give a folder saved by save_pretrained (with "
                         "safetensors weights and its tokenizer), or a hub name you have access to.") from error  # fmt: skip
    check_tokenizer(name, model, tokenizer)
    if lora is not None:
        model = with_lora(model.merge_and_unload() if hasattr(model, "merge_and_unload") else model, lora)
    policy = TokenPolicy(model.to(device), tokenizer, temperature)
    if (Path(name) / ValueHead.FILE).exists():
        _with_head(policy, Path(name), dtype)
    return policy


def _with_head(policy: TokenPolicy, folder: Path, dtype: str) -> None:
    """Give the policy the value head that was saved beside it."""
    with safe_open(folder / ValueHead.FILE, "pt") as file:
        told = file.metadata() or {}
    policy.judges = told.get("judges", "")
    policy.value_head = ValueHead(policy.width, getattr(torch, dtype), told.get("names", "value").split()).to(
        policy.device
    )
    policy.value_head.load_state_dict(load_file(folder / ValueHead.FILE))


def _check_folder(name: str) -> None:
    """Raise ModelError where a local path cannot be a model."""
    folder = Path(name)
    if not folder.exists():
        return
    files = {p.name for p in folder.iterdir()} if folder.is_dir() else set()
    if not files & {"config.json", "adapter_config.json"}:
        raise ModelError(
            f"{name} is not a model: expected a folder with config.json, model.safetensors and a tokenizer"
        )
    if not any(f.endswith(".safetensors") for f in files) and any(f.endswith((".bin", ".pt", ".pth")) for f in files):
        raise ModelError(
            f"{name} has pickled weights only, which can run code when they are read: convert them where you trust them "
            "with model.save_pretrained(folder), which writes model.safetensors"
        )


def _plain(name: str, dtype: str) -> Any:
    """All weights trainable."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(
        name, dtype=getattr(torch, dtype), use_safetensors=True, trust_remote_code=False
    )
    if dtype == "float64" and getattr(model.config, "_experts_implementation", None):
        model.set_experts_implementation("eager")  # the grouped product of experts has no float64
    return model.requires_grad_(True)


def _adapted(name: str, dtype: str) -> Any:
    """The base model that an adapter's folder names, with the adapter trainable and everything else frozen."""
    from peft import PeftModel

    base = json.loads((Path(name) / "adapter_config.json").read_text()).get("base_model_name_or_path")
    if not base:
        raise ModelError(
            f"{name} is an adapter that does not name its base model: merge it into the model and save that"
        )
    return PeftModel.from_pretrained(_plain(base, dtype), name, is_trainable=True)


def check_tokenizer(name: str, model: Any, tokenizer: Any) -> None:
    """Raise ModelError where the two cannot work together; a missing pad token becomes the end-of-sequence token, told."""
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
        warnings.warn(f"{name}: no pad token; its end-of-sequence token {tokenizer.eos_token!r} pads (it is masked)")


def with_lora(model: Any, lora: LoraSettings) -> Any:
    """The model with trainable adapters and everything else frozen."""
    from peft import LoraConfig, get_peft_model

    present = {n.rsplit(".", 1)[-1] for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    targets: Any = sorted(present & set(TARGETS)) or "all-linear"
    alpha: Any = lora.alpha or 2 * lora.rank
    return get_peft_model(model, LoraConfig(r=lora.rank, lora_alpha=alpha, target_modules=targets, lora_dropout=0.0))
