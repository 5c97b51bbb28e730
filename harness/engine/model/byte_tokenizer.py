"""A tokenizer of bytes for models with random weights, whose text has no meaning anyway."""

from __future__ import annotations

from typing import Any


class ByteTokenizer:
    """One token per UTF-8 byte; ids above 255 decode as their lowest byte."""

    eos_token_id: int | None = None
    chat_template: str | None = "bytes"

    def encode(self, text: str, /, *, add_special_tokens: bool = False) -> list[int]:
        """Token ids of ``text``; there are no special tokens."""
        return list(text.encode())

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool = True) -> str:
        """Text of token ids, undecodable bytes replaced."""
        return bytes(token % 256 for token in token_ids).decode(errors="replace")

    def apply_chat_template(
        self, conversation: list[dict[str, str]], /, *, tokenize: bool = False, add_generation_prompt: bool = True
    ) -> Any:
        """Turns as lines, with the start of the assistant's turn at the end."""
        text = "".join(f"{turn['role']}: {turn['content']}\n" for turn in conversation)
        text += "assistant: " if add_generation_prompt else ""
        return self.encode(text) if tokenize else text
