"""What is said about models that cannot be loaded, and what random shapes give."""

import json
from pathlib import Path

import pytest
import torch

from harness.engine.model import loading
from harness.engine.model.byte_tokenizer import ByteTokenizer
from harness.engine.model.families import check_supported
from harness.engine.model.shapes import SHAPES


def test_missing_paths_are_named(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_text(json.dumps({"model_type": "llama"}))
    for path, word in (
        (str(tmp_path / "absent"), "no such folder"),
        ("./absent", "no such folder"),
        (str(tmp_path / "absent.gguf"), "no such file"),
        (str(tmp_path / "empty"), "config.json"),
        (str(tmp_path / "bare"), "no weights"),
    ):
        with pytest.raises(loading.ModelError, match=word) as raised:
            loading.check_path(path)
        assert path in str(raised.value) and "\n" not in str(raised.value)


def test_an_unreachable_hub_is_one_line() -> None:
    with pytest.raises(loading.ModelError, match=r"some/model.*without a network") as raised:
        loading.load_config("some/model")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("arch", SHAPES)
def test_every_shape_is_supported(arch: str) -> None:
    config = loading.shape_config(arch, 2)
    check_supported(config)
    assert config.num_hidden_layers == 2


def test_unknown_shapes_and_layers_are_refused() -> None:
    with pytest.raises(loading.ModelError, match="llama_7b"):
        loading.shape_config("gpt2", None)
    with pytest.raises(loading.ModelError, match="30 layers"):
        loading.shape_config("smollm2_135m", 31)


def test_random_weights_follow_the_seed_and_leave_the_generator_alone() -> None:
    config = loading.shape_config("smollm2_135m", 1)
    config.vocab_size = 64
    before = torch.random.get_rng_state()
    first, second, third = (
        loading.random_model(config, torch.float32, torch.device("cpu"), seed) for seed in (1, 1, 2)
    )
    assert torch.equal(before, torch.random.get_rng_state())
    assert torch.equal(first.lm_head.weight, second.lm_head.weight)
    assert not torch.equal(first.lm_head.weight, third.lm_head.weight)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is present")
def test_an_absent_device_is_refused() -> None:
    with pytest.raises(loading.ModelError, match="no CUDA device"):
        loading.resolve_device("cuda")
    assert loading.resolve_device("auto").type == "cpu"


def test_dtypes_by_name() -> None:
    cpu = torch.device("cpu")
    assert loading.resolve_dtype("float16", cpu) is torch.float16
    assert loading.resolve_dtype("auto", cpu) in (torch.bfloat16, torch.float32)


def test_bytes_go_there_and_back() -> None:
    tokenizer = ByteTokenizer()
    assert tokenizer.decode(tokenizer.encode("Größe")) == "Größe"
    assert tokenizer.decode([256 + 65]) == "A"
    assert tokenizer.apply_chat_template([{"role": "user", "content": "x"}]) == "user: x\nassistant: "
