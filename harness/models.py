"""The target model of a configuration: where it lies, what it is, how it is loaded (DESIGN section 2)."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from harness import schema
from harness.engine.model import carving, healing, loading
from harness.engine.model.byte_tokenizer import ByteTokenizer
from harness.engine.model.families import model_shape
from harness.fields import ConfigError
from sparse.cost import ModelShape


def checkpoint(model: schema.ModelConfig) -> tuple[str, str | None]:
    """Path and revision of the checkpoint of a model that has one; a carved model's is the dense one.

    Raises:
        harness.engine.model.loading.ModelError: the packaged model is not installed.
    """
    if isinstance(model, schema.HfModelConfig):
        assert model.path is not None
        return model.path, model.revision
    return str(loading.smollm2_folder()), None


def library_config(model: schema.ModelConfig) -> Any:
    """The library's configuration.

    Raises:
        harness.engine.model.loading.ModelError: it cannot be read.
    """
    if isinstance(model, schema.ShapeModelConfig):
        return loading.shape_config(model.arch, model.layers)
    return loading.load_config(*checkpoint(model))


def tokenizer(model: schema.ModelConfig) -> Any:
    """The model's tokenizer; random weights read bytes.

    Raises:
        harness.engine.model.loading.ModelError: it cannot be read.
    """
    return ByteTokenizer() if isinstance(model, schema.ShapeModelConfig) else loading.load_tokenizer(*checkpoint(model))


def end_ids(model: schema.ModelConfig, config: Any, tokenizer: Any) -> frozenset[int]:
    """Tokens that end a text, from the library's configuration and the tokenizer; random weights have none."""
    if isinstance(model, schema.ShapeModelConfig):
        return frozenset()
    found: set[int] = set()
    for value in (getattr(config, "eos_token_id", None), tokenizer.eos_token_id):
        found |= {value} if isinstance(value, int) else set(value or ())
    return frozenset(found)


def library_model(model: schema.ModelConfig, config: Any, dtype: torch.dtype, device: torch.device, seed: int) -> Any:
    """The library's model, ready for ``adapt``.

    Args:
        model: as configured.
        config: from :func:`library_config`.
        dtype, device: of the weights.
        seed: of random weights.

    Raises:
        harness.engine.model.loading.ModelError: the weights cannot be read.
    """
    if isinstance(model, schema.ShapeModelConfig):
        return loading.random_model(config, dtype, device, seed)
    path, revision = checkpoint(model)
    if isinstance(model, schema.CarvedModelConfig):
        return healing.load_carved(str(carving_file(model)), model.active, dtype, device, path)
    return loading.load_model(path, dtype, device, revision)


def shape(model: schema.ModelConfig, config: Any, dtype: torch.dtype) -> ModelShape:
    """Sizes for budgets, the cost model and the memory check, without weights.

    Raises:
        harness.engine.model.loading.ModelError: a carved model's file is missing or damaged.
        ConfigError: it has fewer experts than ``model.active``.
    """
    found = model_shape(config, dtype)
    if not isinstance(model, schema.CarvedModelConfig):
        return found
    file = carving_file(model)
    info = carving.read_info(file)
    carved = carving.Carving.load(file if info["kind"] == "carving" else file.with_name(str(info.get("carving"))))
    _, experts, width = carved.experts.shape
    if model.active > experts:
        raise ConfigError(f"model.active={model.active}: a layer has {experts} routed experts (valid: up to that)")
    return replace(
        found,
        experts=experts,
        top_k=model.active,
        expert_ffn=width,
        shared_ffn=carved.shared.shape[1],
        moe_layers=found.layers,
    )


def carving_file(model: schema.CarvedModelConfig) -> Path:
    """Where the model's carving lies."""
    return carving.default_path() if model.path is None else Path(model.path).expanduser()


def identity(model: schema.ModelConfig, seed: int) -> dict[str, str | None]:
    """What a calibration must have been made for: checkpoint or random shape, revision, and hash of the carving.

    Raises:
        ConfigError: the carving cannot be read.
    """
    if isinstance(model, schema.ShapeModelConfig):
        name = f"{model.arch}, {model.layers or 'all'} layers, random weights of seed {seed}"
    elif isinstance(model, schema.HfModelConfig):
        name = checkpoint_name(str(model.path))
    else:
        name = model.kind
    carved = None
    if isinstance(model, schema.CarvedModelConfig):
        name, carved = f"{name}, {model.active} experts a token", file_sha256("model.path", carving_file(model))
    return {"model": name, "revision": getattr(model, "revision", None), "carving": carved}


def checkpoint_name(path: str) -> str:
    """A hub id as it is; a local checkpoint by its last part and a mark of its configuration and file sizes."""
    local = Path(path).expanduser()
    if not local.exists():
        return path
    mark = hashlib.sha256()
    for file in sorted(local.iterdir()) if local.is_dir() else [local]:
        if file.suffix in (".safetensors", ".bin", ".gguf"):
            mark.update(f"{file.name} {file.stat().st_size}".encode())
        elif file.name == "config.json":
            mark.update(file.read_bytes())
    return f"{local.resolve().name} {mark.hexdigest()[:16]}"


def file_sha256(key: str, file: Path) -> str:
    """Hash of the file that a key names.

    Raises:
        ConfigError: it cannot be read; one line.
    """
    try:
        return healing.file_sha256(file.expanduser())
    except OSError as error:
        hint = f"; make it with {carving.COMMAND}" if key == "model.path" else ""
        raise ConfigError(f"{key}={file}: cannot be read ({error.strerror}){hint}") from error
