"""Text and model of the programs that look into a model: their options, loading, cutting text to windows."""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

import torch

from harness import models, schema
from harness.engine.model import loading
from harness.engine.model.families import adapt, check_supported, max_positions
from harness.engine.model.step import Step
from scripts.common import ROOT
from sparse.cost import ModelShape

_DOCUMENTS = (("xsum", "document"), ("squad", "context"), ("qmsum", "context"))
_CHARACTERS_PER_TOKEN = 12
"""More than any of the supported tokenizers needs for a token of prose, so that a part of a text is long enough."""


class TextError(ValueError):
    """Text that cannot be used; the message is one line that names the option and what is valid."""


@dataclass(frozen=True, slots=True)
class Text:
    """Text to run over.

    Attributes:
        content: all of it.
        label: where it comes from, without folders.
    """

    content: str
    label: str

    @property
    def sha256(self) -> str:
        """Hash of the content, hex."""
        return hashlib.sha256(self.content.encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Source:
    """A model that is known but not loaded.

    Attributes:
        model: its settings, as a run has them.
        seed: of random weights.
        config: the library's configuration.
        tokenizer: of the model.
        identity: what a calibration of it is made for.
        shape: its sizes.
        positions: longest sequence.
        device, dtype: resolved.
    """

    model: schema.ModelConfig
    seed: int
    config: Any
    tokenizer: Any
    identity: dict[str, str | None]
    shape: ModelShape
    positions: int
    device: torch.device
    dtype: torch.dtype

    @property
    def label(self) -> str:
        """Name for files and titles."""
        return str(self.model.name)


def add_options(parser: argparse.ArgumentParser, dtype: str) -> None:
    """The options that name a model and a text; ``dtype`` is the default number format."""
    parser.add_argument(
        "--model",
        default="smollm2",
        help="smollm2, carved_moe, shape:ARCH (random weights), or a checkpoint's hub id, folder or .gguf file "
        "(default %(default)s)",
    )
    parser.add_argument("--revision", help="branch, tag or commit of a checkpoint on the hub")
    parser.add_argument("--layers", type=int, help="decoder layers kept of --model shape:ARCH")
    parser.add_argument("--active", type=int, default=8, help="experts per token of carved_moe (default %(default)s)")
    parser.add_argument("--carving", metavar="FILE", help="of carved_moe (default: where scripts.carve_moe writes it)")
    parser.add_argument("--text", nargs="+", metavar="FILE", help=".txt or .gz files (default: bundled documents)")
    parser.add_argument("--dtype", default=dtype, choices=("auto", "float32", "bfloat16", "float16"))
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--seed", type=int, default=0, help="of random weights and samples (default %(default)s)")


def find(options: argparse.Namespace) -> Source:
    """The model that the options name, without its weights.

    Raises:
        ValueError: it cannot be found or is not supported, or an option does not belong to it; one line.
    """
    model = model_settings(options)
    device = loading.resolve_device(options.device)
    config = models.library_config(model)
    check_supported(config)
    dtype = loading.resolve_dtype(options.dtype, device)
    return Source(
        model=model,
        seed=options.seed,
        config=config,
        tokenizer=models.tokenizer(model),
        identity=models.identity(model, options.seed),
        shape=models.shape(model, config, dtype),
        positions=max_positions(config),
        device=device,
        dtype=dtype,
    )


def load(source: Source) -> Step:
    """The step of a model; with experts, its feed-forward weights also by channel.

    Raises:
        ValueError: the weights cannot be read; one line.
    """
    library = models.library_model(source.model, source.config, source.dtype, source.device, source.seed)
    return Step(adapt(library, packed=True, channels=bool(source.shape.moe_layers)))


def model_settings(options: argparse.Namespace) -> schema.ModelConfig:
    """What a run's ``model`` group would hold for the model that the options name.

    Raises:
        ValueError: an option does not belong to the model; one line.
    """
    name, revision = str(options.model), options.revision
    common = {"dtype": options.dtype, "device": options.device}
    checkpoint = name not in ("smollm2", "carved_moe") and not name.startswith("shape:")
    if revision is not None and not checkpoint:
        raise ValueError(f"--revision={revision}: --model={name} has no revisions (valid with a checkpoint of the hub)")
    if options.layers is not None and not name.startswith("shape:"):
        raise ValueError(f"--layers={options.layers}: --model={name} keeps all its layers (valid with shape:ARCH)")
    if options.carving is not None and name != "carved_moe":
        raise ValueError(f"--carving={options.carving}: --model={name} is not carved (valid with carved_moe)")
    if name == "smollm2":
        return schema.ModelConfig(kind=name, name=name, **common)
    if name == "carved_moe":
        return schema.CarvedModelConfig(kind=name, name=name, path=options.carving, active=options.active, **common)
    if checkpoint:
        label = PurePath(name).name or name
        return schema.HfModelConfig(kind="hf", name=label, path=name, revision=revision, **common)
    if options.layers is not None and options.layers < 1:
        raise ValueError(f"--layers={options.layers}: must be at least 1")
    arch = name.removeprefix("shape:")
    return schema.ShapeModelConfig(kind="shape", name=arch, arch=arch, layers=options.layers, **common)


def read(files: Sequence[str] | None) -> Text:
    """The text of the files, or the bundled sample documents.

    Raises:
        TextError: a file cannot be read, is of another kind, or there is no text; one line.
    """
    if files is None:
        return Text(_bundled(), "bundled documents")
    parts = [_read(Path(name)) for name in files]
    if not any(part.strip() for part in parts):
        raise TextError(f"--text={' '.join(files)}: no text in it")
    label = Path(files[0]).name if len(files) == 1 else f"{Path(files[0]).name} and {len(files) - 1} more"
    return Text("\n\n".join(parts), label)


def _read(file: Path) -> str:
    if not file.name.endswith((".txt", ".gz")):
        raise TextError(f"--text={file}: is neither .txt nor .gz")
    try:
        content = file.read_bytes()
        return (gzip.decompress(content) if file.name.endswith(".gz") else content).decode("utf-8")
    except OSError as error:
        raise TextError(f"--text={file}: cannot be read ({error.strerror or 'not a gzip file'})") from error
    except (EOFError, zlib.error) as error:
        raise TextError(f"--text={file}: cannot be read (a damaged gzip file)") from error
    except UnicodeDecodeError as error:
        raise TextError(f"--text={file}: is not UTF-8 text") from error


def _bundled() -> str:
    """The documents of the bundled samples, each once."""
    found: dict[str, None] = {}
    for name, key in _DOCUMENTS:
        lines = (ROOT / "tasks" / "data" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        found.update(dict.fromkeys(json.loads(line)[key] for line in lines))
    return "\n\n".join(found)


def cut(tokenizer: Any, text: Text, count: int, length: int) -> tuple[list[list[int]], str | None]:
    """Windows of text, spread evenly, each with the tokens that the tokenizer puts in front of any text.

    Args:
        tokenizer: of the model.
        text: to cut.
        count: windows.
        length: tokens of each.

    Returns:
        The windows, and a note where the text is too short for separate ones: they overlap, or the text is repeated.

    Raises:
        TextError: the text has no tokens.
    """
    lead = _lead(tokenizer)
    room = length - len(lead)
    size = len(text.content) // count
    parts = [text.content[at * size : at * size + min(size, _CHARACTERS_PER_TOKEN * room)] for at in range(count)]
    encoded = [_encode(tokenizer, part)[:room] for part in parts]
    if min(map(len, encoded)) == room:
        return [[*lead, *ids] for ids in encoded], None
    ids = _encode(tokenizer, text.content[: _CHARACTERS_PER_TOKEN * room * count])
    if not ids:
        raise TextError(f"--text={text.label}: no text in it")
    known = len(ids)
    if known < room:
        note = f"note: {text.label} has {known} tokens, so it is repeated to fill windows of {length}"
        ids = ids * -(-room // known)
    else:
        note = f"note: {text.label} has {known} tokens, so {count} windows of {length} overlap"
    starts = [(len(ids) - room) * at // max(1, count - 1) for at in range(count)]
    return [[*lead, *ids[start : start + room]] for start in starts], note


def _encode(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
    return ids


def _lead(tokenizer: Any) -> list[int]:
    """Tokens in front of any text, such as a BOS."""
    bare, default = _encode(tokenizer, "a"), list(tokenizer.encode("a"))
    return next((default[:at] for at in range(len(default)) if default[at : at + len(bare)] == bare), [])
