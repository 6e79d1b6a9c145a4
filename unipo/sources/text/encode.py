"""Text to tokens, once, at the door (`unipo.policies.encode`)."""

from unipo.policies.encode import Message, encode_completion, encode_prompt, plain_text

__all__ = ["Message", "encode_completion", "encode_prompt", "plain_text"]
