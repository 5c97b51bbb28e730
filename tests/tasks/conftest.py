"""A byte-level tokenizer built in memory, and task settings with defaults."""

from collections.abc import Callable
from typing import Any

import pytest

from tasks import TaskSettings

TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] | trim }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def build_tokenizer(*, bos: bool = False, eos: bool = False, template: str | None = TEMPLATE) -> Any:
    """One token for each byte, special tokens for the turns, and on request a BOS in front and an EOS at the end."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    marks = ["<s>", "</s>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
    inner.add_special_tokens([AddedToken(mark, special=True) for mark in marks])
    if bos or eos:
        single = f"{'<s> ' if bos else ''}$A{' </s>' if eos else ''}"
        tokens = [(mark, inner.token_to_id(mark)) for mark in ("<s>", "</s>")]
        inner.post_processor = processors.TemplateProcessing(single=single, special_tokens=tokens)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return build_tokenizer()


@pytest.fixture(scope="session")
def make_tokenizer() -> Callable[..., Any]:
    return build_tokenizer


@pytest.fixture
def settings() -> Callable[..., TaskSettings]:
    def build(**changes: Any) -> TaskSettings:
        values: dict[str, Any] = {
            "source": "bundled",
            "data_files": (),
            "offset": 0,
            "style": "plain",
            "shots": 0,
            "stop": (),
            "seed": 0,
            "hub": None,
            "options": {},
        }
        return TaskSettings(**{**values, **changes})

    return build
