"""Names of tasks, data and settings, from resolved configurations; which runs differ in one key alone."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

TIMES = "\u00d7"
SIMULATED = "simulated"
AXES = ("attention", "ffn", "experts", "reuse")
GROUPS = {"attention": "attn", "ffn": "ffn", "experts": "moe", "reuse": "reuse"}
BUDGET_KEYS = {
    "attention": ("attn.topk", "attn.rho", "attn.l0"),
    "ffn": ("ffn.keep", "ffn.tau", "ffn.sparsity"),
    "experts": ("moe.union", "moe.k", "moe.p", "moe.weight_floor", "moe.m_max"),
    "reuse": ("reuse.every", "reuse.theta", "reuse.layers"),
}
"""Axis of METHOD sections 2 to 5 -> the keys that say how much of it is left out."""

_TASK_LABELS = {"bucket": "{}", "context_tokens": "{} tok", "depth": "depth {}"}
_NOT_SETTING = ("track", "results_dir", "rerun", "stale", "hydra", "arms", "analysis")
_FILES = ("calibration", "file_hashes")
_SHOWN_ELSEWHERE = (
    *("task.name", "task.source", "task.data_files", "task.data_sha256", "task.bucket", "task.context_tokens"),
    *("task.depth", "model.name", *(f"{group}.name" for group in GROUPS.values())),
)
_KINDS = {"attn": "budget", "reuse": "anchors"}
_LONGEST_LIST = 6


def name_of(config: Mapping[str, Any], group: str) -> str:
    """The choice of a group."""
    value = config.get(group)
    return str(value.get("name")) if isinstance(value, Mapping) else str(value)


def task_label(config: Mapping[str, Any]) -> str:
    """Task with what changes its length: "squad_long 8k"."""
    task = config.get("task") or {}
    parts = [name_of(config, "task")]
    for key, text in _TASK_LABELS.items():
        if task.get(key) is not None:
            parts.append(text.format(task[key]))
    return ", ".join([" ".join(parts[:2]), *parts[2:]])


def data_label(config: Mapping[str, Any]) -> str:
    """Where the examples come from: "bundled", file names, or the hub's data set."""
    task = config.get("task") or {}
    if task.get("source") == "files":
        return ", ".join(str(name) for name in task.get("data_files") or ())
    if task.get("source") == "hub":
        return str((task.get("hub") or {}).get("path"))
    return "synthetic" if name_of(config, "task") == "needle" else str(task.get("source"))


def kept_tokens(config: Mapping[str, Any]) -> int | None:
    """Context tokens kept per KV head by a fixed block budget; None where attention is dense or piecewise."""
    attn = _group(config, "attn")
    if attn.get("topk") is None or attn.get("budget") == "piecewise":
        return None
    return int(attn["topk"]) * int(attn.get("block_size") or 1)


def axes_on(config: Mapping[str, Any]) -> tuple[str, ...]:
    """The axes of AXES that the configuration makes sparse."""
    off = ("dense", "none", "None")
    return tuple(axis for axis, group in GROUPS.items() if name_of(config, group) not in off)


def is_simulated(config: Mapping[str, Any]) -> bool:
    """Whether something is masked instead of skipped, or read that a method would not read (METHOD section 8)."""
    return _group(config, "ffn").get("mask") == "token" or _group(config, "attn").get("score") == "oracle"


def is_carved(config: Mapping[str, Any]) -> bool:
    """Whether the model is a dense one cut into experts."""
    return _group(config, "model").get("kind") == "carved_moe"


def setting_labels(configs: Sequence[Mapping[str, Any]]) -> list[str]:
    """A short name for each run's setting: the budget of each axis that is on, then what else tells it from its peers.

    Peers have the same task, data and model. A key counts where a peer has it with another value; keys of a sparsity
    group only where the peer made the same choice there, and not at the value that most of these have.
    """
    unnamed = (*_NOT_SETTING, *_FILES)
    flat = [flatten({key: value for key, value in config.items() if key not in unnamed}) for config in configs]
    places = [(task_label(config), data_label(config), name_of(config, "model")) for config in configs]
    labels = []
    for config, own, place in zip(configs, flat, places, strict=True):
        peers = [other for other, there in zip(flat, places, strict=True) if there == place]
        parts, shown = _budgets(config)
        told = {*shown, *_SHOWN_ELSEWHERE}
        parts += [f"{key}={own[key]}" for key in own if key not in told and _varies(key, own, peers)]
        labels.append(", ".join(parts) + (f" ({SIMULATED})" if is_simulated(config) else ""))
    return labels


def _varies(key: str, own: Mapping[str, Any], peers: Sequence[Mapping[str, Any]]) -> bool:
    group = key.split(".")[0]
    peers = [peer for peer in peers if key in peer]
    if group in GROUPS.values():
        kinds = (f"{group}.name", f"{group}.{_KINDS.get(group, 'name')}")
        peers = [peer for peer in peers if all(peer.get(kind) == own.get(kind) for kind in kinds)]
        if 2 * sum(peer[key] == own[key] for peer in peers) > len(peers):
            return False
    return any(peer[key] != own[key] for peer in peers)


def _budgets(config: Mapping[str, Any]) -> tuple[list[str], tuple[str, ...]]:
    """A text per axis that is on ("dense" where none is), and the keys that the texts tell or that are not read."""
    parts: list[str] = []
    told: list[str] = []
    on = axes_on(config)
    for axis, describe in (("attention", _attention), ("ffn", _ffn), ("experts", _moe), ("reuse", _reuse)):
        if axis in on:
            group = _group(config, GROUPS[axis])
            text, keys = describe(group)
            parts.append(text)
            told += [f"{GROUPS[axis]}.{key}" for key in keys]
    return parts or ["dense"], tuple(told)


def _attention(attn: Mapping[str, Any]) -> tuple[str, tuple[str, ...]]:
    if attn.get("budget") == "piecewise":
        return f"piecewise L0={attn.get('l0')} rho={_short(attn.get('rho'))}", ("budget", "topk", "l0", "rho")
    return f"topk {attn.get('topk')}{TIMES}{attn.get('block_size')}", ("budget", "topk", "block_size", "l0", "rho")


def _ffn(ffn: Mapping[str, Any]) -> tuple[str, tuple[str, ...]]:
    names = {"topk": ("keep", "keep"), "threshold": ("tau", "tau"), "quantile": ("sparsity", "quantile")}
    key, word = names.get(str(ffn.get("name")), ("name", "rule"))
    return f"ffn {word} {_short(ffn.get(key))} {ffn.get('mask')}", (key, "mask")


def _moe(moe: Mapping[str, Any]) -> tuple[str, tuple[str, ...]]:
    names = {"median_ratio": ("m_max", "median m"), "topk": ("k", "k"), "topp": ("p", "p")}
    key, word = (names | {"floor": ("weight_floor", "floor")}).get(str(moe.get("name")), ("union", "union"))
    words = [f"moe {word} {_short(moe.get(key))}"]
    if key != "union" and moe.get("union") is not None:
        words.append(f"union {moe['union']}")
    words += ["drop"] if moe.get("outside") == "drop" and moe.get("union") is not None else []
    words += ["free loaded"] if moe.get("free_loaded") else []
    return " ".join(words), (key, "union", "outside", "free_loaded")


def _reuse(reuse: Mapping[str, Any]) -> tuple[str, tuple[str, ...]]:
    if reuse.get("name") == "skips":
        layers, told = _layers(reuse.get("skip_layers") or ())
        skipped = "+".join(str(name) for name in reuse.get("skip") or ())
        return f"skip {skipped} in {layers}", ("skip", *(["skip_layers"] if told else []))
    kind = str(reuse.get("anchors"))
    told = kind != "list"
    if kind == "list":
        text, told = _layers(reuse.get("layers") or ())
    else:
        text = f"every {reuse.get('every')}" if kind == "every" else f"{kind} {_short(reuse.get('theta'))}"
    words = f"anchors {text}" + (" head map" if reuse.get("head_map") else "")
    return words, ("anchors", "every", "theta", "head_map", *(["layers"] if told else []))


def _layers(layers: Sequence[int]) -> tuple[str, bool]:
    """A short list of layers, and whether it is the whole list."""
    whole = len(layers) <= _LONGEST_LIST
    return (",".join(str(layer) for layer in layers) if whole else f"{len(layers)} layers"), whole


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def identity(config: Mapping[str, Any], leave_out: Collection[str] = ()) -> str:
    """Everything that makes the setting, as one text; runs with the same text differ in ``leave_out`` at most.

    Args:
        config: resolved configuration.
        leave_out: flat keys ("attn.topk"), or groups ("reuse") with all their keys.
    """
    own = {key: value for key, value in config.items() if key not in _NOT_SETTING and key not in leave_out}
    kept = {key: value for key, value in flatten(own).items() if key not in leave_out}
    return json.dumps(kept, sort_keys=True, default=str)


def flatten(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, keys joined by dots."""
    flat: dict[str, Any] = {}
    for key, item in value.items():
        name = f"{prefix}{key}"
        flat |= flatten(item, f"{name}.") if isinstance(item, Mapping) else {name: item}
    return flat


def natural(text: str) -> tuple[tuple[float, str], ...]:
    """A sorting key that orders the numbers in a text by their value."""
    return tuple(
        (float(part), "") if part[:1].isdigit() else (-1.0, part) for part in re.findall(r"\d+\.?\d*|\D+", text)
    )


def _group(config: Mapping[str, Any], group: str) -> Mapping[str, Any]:
    value = config.get(group)
    return value if isinstance(value, Mapping) else {}
