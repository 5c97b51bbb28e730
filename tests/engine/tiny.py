"""Tiny random models of every supported family, and decoders over them."""

import time
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from harness.engine.decoding import Decoder, StopRule
from harness.engine.model.families import adapt
from harness.engine.model.step import Step
from sparse.budget import Sparsity

VOCAB = 61
EXTRAS: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": False, "tie_word_embeddings": False},
    "mistral": {"sliding_window": None, "head_dim": 16},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 16},
    "mixtral": {"num_local_experts": 6, "num_experts_per_tok": 2, "intermediate_size": 24},
    "qwen3_moe": {
        "head_dim": 16,
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "norm_topk_prob": True,
        "moe_intermediate_size": 20,
        "mlp_only_layers": [1],
    },
    "olmoe": {"num_experts": 7, "num_experts_per_tok": 3, "norm_topk_prob": False, "intermediate_size": 28},
}


def library_model(family: str, seed: int = 0, **changes: Any) -> Any:
    """A random model of the library with odd sizes, its norms and biases away from one and zero."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(
        family,
        **{
            "vocab_size": VOCAB,
            "hidden_size": 48,
            "intermediate_size": 88,
            "num_hidden_layers": 3,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "max_position_embeddings": 1024,
            "eos_token_id": None,
            **EXTRAS[family],
            **changes,
        },
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.add_(torch.randn_like(parameter) * 0.3)
            elif "weight" in name or "proj" in name:
                parameter.mul_(10)
    return model


def decoder(family: str = "llama", budget: Sparsity | None = None, capacity: int = 700, **options: Any) -> Decoder:
    """A decoder over a tiny random model."""
    step = Step(adapt(library_model(family), packed=False, channels=True))
    cache = step.new_cache(capacity, (budget or Sparsity()).attention)
    stop = options.pop("stop", StopRule())
    return Decoder(step, cache, stop=stop, clock=time.perf_counter, prefill_chunk=options.pop("chunk", 64))


def repetitive_prompt(length: int, seed: int = 0) -> list[int]:
    """Token ids with repeated phrases, so that prompt lookup finds something."""
    generator = torch.Generator().manual_seed(seed)
    phrase = torch.randint(0, VOCAB, (23,), generator=generator).tolist()
    noise = torch.randint(0, VOCAB, (length,), generator=generator).tolist()
    return [phrase[i % 23] if i % 61 < 40 else noise[i] for i in range(length)]
