"""Names of tasks, data and settings, from resolved configurations; which runs differ in one key alone."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any, NamedTuple

TIMES = "\u00d7"
SIMULATED = "simulated"
FORCED = "forced oracle"
SHARED = "shared"
NO_DRAFTS = "no drafts"
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
_MACHINERY = ("exclusive", "prefill_memory_gb", "dry_run")
_NOT_SETTING = ("track", "results_dir", "rerun", "stale", "hydra", "arms", "analysis", *_MACHINERY)
_FILES = ("calibration", "file_hashes")
_SHOWN_ELSEWHERE = (
    *("task.name", "task.source", "task.data_files", "task.data_sha256", "task.bucket", "task.context_tokens"),
    *("task.depth", "model.name", *(f"{group}.name" for group in GROUPS.values())),
)
_KINDS = {"attn": "budget", "reuse": "anchors"}
_OF_CHOICE = (*GROUPS.values(), "draft", "decode")
_BATCH = "engine.batch_size"
_LONGEST_LIST = 6


class Drafting(NamedTuple):
    """Who drafts, how tokens are picked and how many sequences share a step, as tables and figures name them."""

    drafter: str
    decoding: str
    batch: str


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


def is_forced(config: Mapping[str, Any]) -> bool:
    """Whether acceptance was chosen, and outputs are those of a given continuation whatever an arm computes."""
    draft = _group(config, "draft")
    return draft.get("name") == "oracle" and bool(draft.get("forced"))


def setting_labels(configs: Sequence[Mapping[str, Any]]) -> list[str]:
    """A short name for each run's setting: the budget of each axis that is on, then what else tells it from its peers.

    Peers have the same task, data and model. Drafter, decoding and batch size are told, as `drafting_labels` name them,
    where a peer has another one. Any other key counts where a peer has it with another value; keys of a sparsity group
    only where the peer made the same choice there, and not at the value that most of these have.
    """
    flat, peers_of, drafting = _flat(configs), _peers(configs), drafting_labels(configs)
    labels = []
    for config, own, names, members in zip(configs, flat, drafting, peers_of, strict=True):
        parts, shown = _budgets(config)
        theirs = zip(*(drafting[index] for index in members), strict=True)
        parts += [name for name, others in zip(names, theirs, strict=True) if name and len(set(others)) > 1]
        told = {*shown, *_SHOWN_ELSEWHERE, _BATCH}
        rest = [key for key in own if key not in told and key.split(".")[0] not in ("draft", "decode")]
        parts += [f"{key}={own[key]}" for key in rest if _varies(key, own, [flat[index] for index in members])]
        labels.append(", ".join(parts) + (f" ({SIMULATED})" if is_simulated(config) else ""))
    return labels


def drafting_labels(configs: Sequence[Mapping[str, Any]]) -> list[Drafting]:
    """Drafter, decoding and batch size of each run, as `draft_label`, `decode_label` and `batch_label` name them.

    Keys that these leave out follow where a peer with the same drafter or decoding has them with another value: "lookup
    6, max_ngram=5".
    """
    flat = _flat(configs)
    found = []
    for config, own, members in zip(configs, flat, _peers(configs), strict=True):
        peers = [flat[index] for index in members]
        drafter, decoding = _draft(config), _decode(config)
        words = [_with_rest(group, *told, own, peers) for group, told in (("draft", drafter), ("decode", decoding))]
        found.append(Drafting(words[0], words[1], batch_label(config)))
    return found


def _with_rest(
    group: str, text: str, told: Collection[str], own: Mapping[str, Any], peers: Sequence[Mapping[str, Any]]
) -> str:
    """A choice's text and, as key=value, those of its keys that the text leaves out and that vary among the peers."""
    rest = {key: key.removeprefix(f"{group}.") for key in own if key.startswith(f"{group}.")}
    more = [key for key, short in rest.items() if short not in told and _varies(key, own, peers)]
    return ", ".join([text, *(f"{rest[key]}={_short(own[key])}" for key in more)])


def draft_label(config: Mapping[str, Any]) -> str:
    """The drafter with the form of its drafts: "lookup 6", "eagle3 tree 60 (10\u00d76)", "suffix 8, else eagle3 4".

    A number alone is the length of a chain; a tree has its size and, in brackets, children per token and depth.
    """
    return _draft(config)[0]


def decode_label(config: Mapping[str, Any]) -> str:
    """How tokens are picked, where that is not greedy: "temperature 0.8 top-p 0.9"."""
    return _decode(config)[0]


def batch_label(config: Mapping[str, Any]) -> str:
    """Sequences per step, where these are several: "batch 4"."""
    size = int(_group(config, "engine").get("batch_size") or 1)
    return f"batch {size}" if size > 1 else ""


def _flat(configs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    unnamed = (*_NOT_SETTING, *_FILES)
    return [flatten({key: value for key, value in config.items() if key not in unnamed}) for config in configs]


def _peers(configs: Sequence[Mapping[str, Any]]) -> list[list[int]]:
    """Indices of the runs of the same task, data and model, itself among them."""
    places = [(task_label(config), data_label(config), name_of(config, "model")) for config in configs]
    return [[index for index, there in enumerate(places) if there == place] for place in places]


def _varies(key: str, own: Mapping[str, Any], peers: Sequence[Mapping[str, Any]]) -> bool:
    group = key.split(".")[0]
    peers = [peer for peer in peers if key in peer]
    if group in _OF_CHOICE:
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


def _draft(config: Mapping[str, Any]) -> tuple[str, set[str]]:
    """The drafter's text, and the keys of the group that it tells or that are not read."""
    draft = _group(config, "draft")
    name = str(draft.get("name") or "none")
    if name == "none":
        return NO_DRAFTS, set(draft)
    if name != "combined":
        return _growing(draft), _growing_keys(draft)
    used = ("suffix", str(draft.get("second")))
    parts = {key: value for key, value in draft.items() if isinstance(value, Mapping)}
    told = {"name", "second", "join"} | {
        f"{part}.{key}" for part in used for key in _growing_keys(parts.get(part) or {})
    }
    told |= set(flatten({part: keys for part, keys in parts.items() if part not in used}))
    between = " and " if draft.get("join") else ", else "
    return between.join(_growing({"name": part} | dict(parts.get(part) or {})) for part in used), told


def _growing(draft: Mapping[str, Any]) -> str:
    """One drafter; runs of earlier versions have ``k`` instead of ``depth``, and no trees."""
    name, depth, topk = draft["name"], draft.get("depth", draft.get("k")), draft.get("topk") or 1
    form = str(depth) if topk == 1 else f"tree {draft.get('total') or depth * topk} ({topk}{TIMES}{depth})"
    if name == "oracle":
        form = f"{_short(draft.get('acceptance'))} {'chain ' * (topk == 1)}{form}"
    details = _draft_source(draft)
    text = f"{name} {form}" + (f" ({', '.join(details)})" if details else "")
    text += " forced" if draft.get("forced") else " sampled" if draft.get("sample") else ""
    text += " + earlier outputs" if draft.get("earlier") else ""
    adaptive = draft.get("adaptive") or "never"
    if adaptive == "confidence":
        return f"{text} + adaptive confidence {_short(draft.get('min_confidence'))}"
    return text if adaptive == "never" else f"{text} + adaptive {adaptive}"


def _draft_source(draft: Mapping[str, Any]) -> list[str]:
    """Which weights draft, and what of the target is left out."""
    path = draft.get("path")
    details = [PurePosixPath(path).name] if path else ["the target itself"] if draft["name"] == "model" else []
    details += [f"{draft['blocks']} blocks"] if draft.get("blocks") is not None else []
    if draft.get("skip_layers"):
        details.append(f"without layers {_layers(draft['skip_layers'])[0]}")
    return details


def _growing_keys(draft: Mapping[str, Any]) -> set[str]:
    told = {"name", "k", "depth", "topk", "total", "adaptive", "min_confidence", "acceptance", "forced", "earlier"}
    told |= {"path", "blocks", "sample"}
    return told | ({"skip_layers"} if _layers(draft.get("skip_layers") or ())[1] else set())


def _decode(config: Mapping[str, Any]) -> tuple[str, set[str]]:
    """How tokens are picked ("" where greedily), and the keys of the group that the text tells."""
    decode = _group(config, "decode")
    name = str(decode.get("name") or "greedy")
    if name == "greedy":
        return "", {"name"}
    if name == "topk_match":
        return f"top-{decode.get('k')} match", {"name", "k"}
    words = [f"temperature {_short(decode.get('temperature'))}"]
    words += [f"top-p {_short(decode['top_p'])}"] if (decode.get("top_p") or 1) < 1 else []
    words += [f"top-k {decode['top_k']}"] if decode.get("top_k") else []
    return ("typical " if name == "typical" else "") + " ".join(words), {"name", "temperature", "top_p", "top_k"}


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
