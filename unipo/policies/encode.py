"""Text to tokens, once, at the door."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Message = Mapping[str, Any]


def encode_prompt(tokenizer: Any, prompt: str | Sequence[Message]) -> list[int]:
    """Token ids of a prompt: chat messages through the tokenizer's template, a string as it is.

    A string gets the tokenizer's own special tokens, except an end-of-sequence token at its end (some tokenizers append
    one, which would tell the policy to stop). Raises ValueError when messages come without a chat template.
    """
    if isinstance(prompt, str):
        ids = list(tokenizer(prompt)["input_ids"])
        while ids and ids[-1] == tokenizer.eos_token_id and not prompt.endswith(tokenizer.eos_token):
            ids.pop()
        return ids
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            "the prompts are chat messages, but this tokenizer has no chat template: set tokenizer.chat_template and save "
            "it with the model, or give plain text in a 'prompt' column"
        )
    text = tokenizer.apply_chat_template(list(prompt), tokenize=False, add_generation_prompt=True)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def encode_completion(tokenizer: Any, completion: str) -> list[int]:
    """Token ids of a finished answer: no special tokens added but the end-of-sequence token, which is an action too."""
    ids, end = list(tokenizer(completion, add_special_tokens=False)["input_ids"]), tokenizer.eos_token_id
    return ids if end is None or ids[-1:] == [end] else [*ids, end]


def plain_text(prompt: str | Sequence[Message]) -> str:
    """A prompt as one string, for people: messages joined as `role: content` lines."""
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"{m.get('role', '?')}: {m.get('content', '')}" for m in prompt)
