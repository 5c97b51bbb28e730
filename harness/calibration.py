"""What was measured on calibration text, once per model (METHOD sections 2 to 4); made by scripts.calibrate. No torch.

The file is JSON: version, identity of the model, the text and the settings of the measurement, and its tables.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from harness.evidence.store import write_text
from harness.fields import ConfigError
from harness.schema_sparsity import CALIBRATE

VERSION = 1
RULES = ("jaccard", "mass")
_DIGITS = 4
"""Significant digits kept; a calibration on some thousand tokens knows fewer."""

Matrix = tuple[tuple[float, ...], ...]


@dataclass(frozen=True, slots=True)
class Calibration:
    """Tables of one model, measured with dense attention, FFNs and experts.

    Attributes:
        identity: ``model``, ``revision`` and ``carving`` (hash of a carved model's layout); None where there is none.
        text_sha256: of the calibration text.
        tokens: its length in tokens.
        layers, kv_heads: of the model.
        block_size, topk: of the block selections that were compared.
        jaccard: [layers][layers], mean Jaccard similarity of the blocks that two layers select; symmetric.
        recovered_mass: [anchor][layer], attention mass in ``layer`` on the blocks that ``anchor`` selects, over the
            mass on the blocks that ``layer`` itself selects.
        head_map: [layer][anchor][kv_heads], the anchor's KV head whose blocks suit each KV head of ``layer`` best.
        head_contribution: [layer][kv_heads], how much the output depends on a head beyond its sinks and window.
        ffn_quantiles: share -> [layers], gate magnitude that this share of a layer's channels stays below; at least
            two shares, each written as the shortest decimal number (``"0.5"``).
        moe_beta: [layers][m], median weight share of the m lowest experts of a token, m from 1; None without experts.
        path: file it was read from, for messages.
        version: of this layout.

    Raises:
        ValueError: a table has another shape than the sizes say, or holds a number that cannot be.
    """

    identity: Mapping[str, str | None]
    text_sha256: str
    tokens: int
    layers: int
    kv_heads: int
    block_size: int
    topk: int
    jaccard: Matrix
    recovered_mass: Matrix
    head_map: tuple[tuple[tuple[int, ...], ...], ...]
    head_contribution: Matrix
    ffn_quantiles: Mapping[str, tuple[float, ...]]
    moe_beta: Matrix | None = None
    path: str = field(default="", compare=False)
    version: int = VERSION

    def __post_init__(self) -> None:
        for name in ("tokens", "layers", "kv_heads", "block_size", "topk"):
            if type(getattr(self, name)) is not int or getattr(self, name) < 1:
                raise ValueError(f"{name} is not a whole number of at least 1")
        if not isinstance(self.identity, Mapping) or not isinstance(self.identity.get("model"), str):
            raise ValueError("identity does not name a model")
        layers, heads = self.layers, self.kv_heads
        _check("jaccard", self.jaccard, (layers, layers))
        _check("recovered_mass", self.recovered_mass, (layers, layers))
        _check("head_map", self.head_map, (layers, layers, heads), heads)
        _check("head_contribution", self.head_contribution, (layers, heads))
        if any(self.jaccard[a][b] != self.jaccard[b][a] for a in range(layers) for b in range(a)):
            raise ValueError("jaccard is not symmetric")
        if not isinstance(self.ffn_quantiles, Mapping) or len({float(share) for share in self.ffn_quantiles}) < 2:
            raise ValueError("ffn_quantiles names fewer than two shares")
        for share, row in self.ffn_quantiles.items():
            if not 0 <= float(share) <= 1:
                raise ValueError(f"ffn_quantiles: {share} is not a share")
            _check(f"ffn_quantiles of {share}", row, (layers,))
        if self.moe_beta is not None:
            _check("moe_beta", self.moe_beta, (layers, len(self.moe_beta[0]) if self.moe_beta else 0))

    @staticmethod
    def load(path: str | Path) -> Calibration:
        """The calibration in a file.

        Raises:
            ConfigError: the file cannot be read, is not a calibration or has another version; one line.
        """
        remake = f"make one with {CALIBRATE}"
        try:
            raw = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            reason = str(error.strerror).lower()
            raise ConfigError(f"calibration={path}: cannot be read ({reason}); {remake}") from error
        except ValueError as error:
            raise ConfigError(f"calibration={path}: is not JSON; {remake}") from error
        version = raw.get("version") if isinstance(raw, dict) else None
        if version != VERSION:
            raise ConfigError(f"calibration={path}: has version {version}, this code reads {VERSION}; {remake}")
        try:
            return Calibration(**{name: _tuples(value) for name, value in raw.items()}, path=str(path))
        except (TypeError, ValueError) as error:
            reason = " ".join(str(error).replace("Calibration.__init__() ", "").split())
            raise ConfigError(f"calibration={path}: is no calibration ({reason}); {remake}") from error

    def save(self, path: str | Path) -> None:
        """Write the file atomically, numbers rounded to four significant digits; its folder is made where missing."""
        content = {item.name: _rounded(getattr(self, item.name)) for item in fields(self) if item.name != "path"}
        write_text(Path(path), json.dumps(content, separators=(",", ":"), allow_nan=False) + "\n")

    def check(self, identity: Mapping[str, str | None]) -> None:
        """Refuse a calibration of another model.

        Args:
            identity: of the model that runs, as in :attr:`identity`.

        Raises:
            ConfigError: it differs; one line.
        """
        if dict(identity) != dict(self.identity):
            raise ConfigError(
                f"calibration={self.path}: made for {_named(self.identity)}, this run uses {_named(identity)}; "
                f"make one with {CALIBRATE}"
            )

    def anchors(self, theta: float, rule: str, first_layer: int) -> tuple[int, ...]:
        """Layers that retrieve, ascending: a new one where the current one's blocks no longer fit (METHOD section 2).

        Args:
            theta: a layer less similar than this to the current anchor becomes the next anchor.
            rule: ``jaccard`` or ``mass`` (attention mass recovered).
            first_layer: first sparse layer, always an anchor.

        Raises:
            ValueError: an unknown rule, or a layer that the model does not have.
        """
        if rule not in RULES or not 0 <= first_layer < self.layers:
            raise ValueError(f"rule={rule!r} is not one of {RULES}, or layer {first_layer} not one of {self.layers}")
        similarity = self.jaccard if rule == "jaccard" else self.recovered_mass
        found = [first_layer]
        for layer in range(first_layer + 1, self.layers):
            if similarity[found[-1]][layer] < theta:
                found.append(layer)
        return tuple(found)

    def heads(self, anchors: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
        """[layers][kv_heads], the KV head of the nearest anchor before whose blocks each KV head takes.

        Anchors, and layers before the first one, keep their own numbers.
        """
        own = tuple(range(self.kv_heads))
        nearest = [
            max((anchor for anchor in anchors if anchor <= layer), default=layer) for layer in range(self.layers)
        ]
        return tuple(own if at == layer else self.head_map[layer][at] for layer, at in enumerate(nearest))

    def low_heads(self, share: float, first_layer: int = 0) -> tuple[tuple[int, int], ...]:
        """(layer, KV head) of the lowest contributions from ``first_layer`` on, the floor of ``share`` of them."""
        ranked = sorted(
            (contribution, layer, head)
            for layer, row in enumerate(self.head_contribution)
            for head, contribution in enumerate(row)
            if layer >= first_layer
        )
        return tuple(sorted((layer, head) for _, layer, head in ranked[: math.floor(round(share * len(ranked), 6))]))

    def thresholds(self, sparsity: float) -> tuple[float, ...]:
        """One gate magnitude per layer that the share ``sparsity`` of its channels stays below (METHOD section 3).

        Interpolated linearly between the two nearest stored shares.

        Raises:
            ConfigError: ``sparsity`` lies outside the stored shares; one line.
        """
        stored = sorted((float(share), row) for share, row in self.ffn_quantiles.items())
        for (low, below), (high, above) in itertools.pairwise(stored):
            if low <= sparsity <= high and low < high:
                part = (sparsity - low) / (high - low)
                return tuple(a + part * (b - a) for a, b in zip(below, above, strict=True))
        raise ConfigError(
            f"ffn.sparsity={sparsity}: calibration={self.path} holds thresholds for shares from {stored[0][0]} to "
            f"{stored[-1][0]}; choose one of these"
        )


def _check(name: str, value: Any, shape: tuple[int, ...], below: int | None = None) -> None:
    """Nested sequences of ``shape`` with finite numbers that are not negative; whole ones under ``below`` if given."""
    if shape:
        if not isinstance(value, list | tuple) or len(value) != shape[0]:
            raise ValueError(f"{name} does not hold {shape[0]} entries where it should")
        for item in value:
            _check(name, item, shape[1:], below)
        return
    number = isinstance(value, int | float if below is None else int) and not isinstance(value, bool)
    if not (number and 0 <= value < (math.inf if below is None else below)):
        raise ValueError(f"{name} holds {value!r}")


def _tuples(value: Any) -> Any:
    """Lists as tuples, at every depth."""
    if isinstance(value, dict):
        return {key: _tuples(item) for key, item in value.items()}
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value


def _rounded(value: Any) -> Any:
    """The same content with fewer digits, as JSON takes it."""
    if isinstance(value, Mapping):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    return float(f"{value:.{_DIGITS}g}") if isinstance(value, float) else value


def _named(identity: Mapping[str, str | None]) -> str:
    """A model in words."""
    extras = [f"{key} {value}" for key, value in identity.items() if key != "model" and value is not None]
    return ", ".join([str(identity.get("model")), *extras])
