"""The calibration file: written small, read strictly, and what is derived from its tables."""

import dataclasses
import json
import math
import os
import random
from pathlib import Path
from typing import Any

import pytest

from harness.calibration import Calibration
from harness.fields import ConfigError

LAYERS, HEADS = 5, 3
IDENTITY = {"model": "smollm2", "revision": None, "carving": None}


def made(**changes: Any) -> Calibration:
    """A calibration of 5 layers of 3 KV heads with random tables."""
    draw = random.Random(7)
    similar = [[1.0] * LAYERS for _ in range(LAYERS)]
    for a in range(LAYERS):
        for b in range(a):
            similar[a][b] = similar[b][a] = draw.random()
    facts: dict[str, Any] = {
        "identity": IDENTITY,
        "text_sha256": "0" * 64,
        "tokens": 4096,
        "layers": LAYERS,
        "kv_heads": HEADS,
        "block_size": 16,
        "topk": 32,
        "jaccard": tuple(tuple(row) for row in similar),
        "recovered_mass": tuple(tuple(draw.random() for _ in range(LAYERS)) for _ in range(LAYERS)),
        "head_map": tuple(
            tuple(tuple(draw.randrange(HEADS) for _ in range(HEADS)) for _ in range(LAYERS)) for _ in range(LAYERS)
        ),
        "head_contribution": tuple(tuple(draw.random() for _ in range(HEADS)) for _ in range(LAYERS)),
        "ffn_quantiles": {
            "0.9": tuple(0.5 + layer for layer in range(LAYERS)),
            "0.1": tuple(0.01 for _ in range(LAYERS)),
            "0.5": tuple(0.1 * (layer + 1) for layer in range(LAYERS)),
        },
        "moe_beta": tuple((0.01, 0.05, 0.1) for _ in range(LAYERS)),
    }
    return Calibration(**{**facts, **changes})


def refusal(path: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        Calibration.load(path)
    text = str(caught.value)
    assert "\n" not in text and text.startswith(f"calibration={path}: ") and "python -m scripts.calibrate" in text
    return text


def test_a_file_survives_with_four_digits(tmp_path: Path) -> None:
    file = tmp_path / "new" / "smollm2.json"
    made().save(file)
    read = Calibration.load(file)
    assert read.path == str(file) and read.identity == IDENTITY and read.head_map == made().head_map
    for ours, theirs in zip(read.recovered_mass, made().recovered_mass, strict=True):
        assert all(math.isclose(a, b, rel_tol=5e-4) for a, b in zip(ours, theirs, strict=True))
    read.save(file)
    assert Calibration.load(file) == read
    numbers = json.loads(file.read_text())["recovered_mass"]
    assert max(len(repr(number)) for row in numbers for number in row) <= 8
    assert os.listdir(file.parent) == ["smollm2.json"]


def test_a_model_without_experts_has_no_medians(tmp_path: Path) -> None:
    made(moe_beta=None).save(tmp_path / "a.json")
    assert Calibration.load(tmp_path / "a.json").moe_beta is None


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.json"
    made().save(file)
    before = file.read_text()

    def fail(*_: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        made(tokens=1).save(file)
    assert file.read_text() == before and os.listdir(tmp_path) == ["a.json"]


def test_files_that_are_no_calibration_are_refused(tmp_path: Path) -> None:
    assert "no such file" in refusal(tmp_path / "none.json")
    assert "is a directory" in refusal(tmp_path)
    file = tmp_path / "a.json"
    for text in ("", "{", "\ufeff{}"):
        file.write_text(text)
        assert "is not JSON" in refusal(file)
    file.write_bytes(b"\xff\xfe\x00")
    assert "is not JSON" in refusal(file)
    for text in ("[]", "3", "null", "{}"):
        file.write_text(text)
        assert "has version None, this code reads 1" in refusal(file)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("version", 2, "has version 2, this code reads 1"),
        ("identity", "smollm2", "identity"),
        ("identity", {"model": None}, "identity"),
        ("layers", 6, "jaccard"),
        ("layers", "5", "layers"),
        ("kv_heads", 2, "head_map"),
        ("tokens", 0, "tokens"),
        ("block_size", True, "block_size"),
        ("jaccard", [[1.0] * 5] * 4, "jaccard"),
        ("jaccard", 0.5, "jaccard"),
        ("jaccard", [[1.0, 0.2, 1.0, 1.0, 1.0], *[[1.0] * 5] * 4], "not symmetric"),
        ("recovered_mass", [[math.nan] * 5] * 5, "recovered_mass"),
        ("recovered_mass", [[-0.1] * 5] * 5, "recovered_mass"),
        ("recovered_mass", [["0.1"] * 5] * 5, "recovered_mass"),
        ("head_map", [[[0, 1, 3]] * 5] * 5, "head_map holds 3"),
        ("head_map", [[[0, 1, 1.5]] * 5] * 5, "head_map holds 1.5"),
        ("head_contribution", [[1.0, 2.0]] * 5, "head_contribution"),
        ("ffn_quantiles", {"0.5": [0.1] * 5}, "fewer than two shares"),
        ("ffn_quantiles", {"0.5": [0.1] * 5, "0.50": [0.1] * 5}, "fewer than two shares"),
        ("ffn_quantiles", [], "ffn_quantiles"),
        ("ffn_quantiles", {"half": [0.1] * 5, "1": [0.1] * 5}, "half"),
        ("ffn_quantiles", {"0.5": [0.1] * 5, "1.5": [0.1] * 5}, "1.5 is not a share"),
        ("ffn_quantiles", {"0.5": [0.1] * 5, "0.9": [0.1] * 4}, "ffn_quantiles of 0.9"),
        ("moe_beta", [], "moe_beta"),
        ("moe_beta", [[0.1], [0.1], [0.1], [0.1], [0.1, 0.2]], "moe_beta"),
        ("moe_beta", [0.1] * 5, "is no calibration"),
        ("extra", 1, "extra"),
        ("path", "a.json", "path"),
    ],
)
def test_malformed_tables_are_refused(tmp_path: Path, key: str, value: Any, words: str) -> None:
    file = tmp_path / "a.json"
    made().save(file)
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))
    assert words in refusal(file)


def test_missing_tables_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    made().save(file)
    whole = json.loads(file.read_text())
    for key in whole.keys() - {"moe_beta", "version"}:
        file.write_text(json.dumps({name: value for name, value in whole.items() if name != key}))
        assert key in refusal(file)


def test_another_model_is_refused(tmp_path: Path) -> None:
    made().save(tmp_path / "a.json")
    read = Calibration.load(tmp_path / "a.json")
    read.check(dict(IDENTITY))
    for other in ({"model": "llama"}, {"revision": "abc"}, {"carving": "f00"}):
        with pytest.raises(ConfigError) as caught:
            read.check({**IDENTITY, **other})
        text = str(caught.value)
        assert text.startswith(f"calibration={tmp_path / 'a.json'}: made for smollm2, this run uses ")
        assert next(iter(other.values())) in text and "make one with python -m scripts.calibrate" in text


def test_anchors_open_where_the_current_one_no_longer_fits() -> None:
    rows = [
        [1.0, 0.9, 0.6, 0.2, 0.1],
        [0.9, 1.0, 0.95, 0.9, 0.9],
        [0.6, 0.95, 1.0, 0.7, 0.3],
        [0.2, 0.9, 0.7, 1.0, 0.9],
        [0.1, 0.9, 0.3, 0.9, 1.0],
    ]
    jaccard = tuple(tuple(row) for row in rows)
    recovered = ((1.0, 0.9, 0.9, 0.5, 0.4), *((0.9,) * 5,) * 4)
    calibration = made(jaccard=jaccard, recovered_mass=recovered)
    assert calibration.anchors(0.7, "jaccard", 0) == (0, 2, 4), "against the current anchor, not the layer before"
    assert calibration.anchors(0.7, "jaccard", 1) == (1,)
    assert calibration.anchors(0.05, "jaccard", 0) == (0,) and calibration.anchors(1.0, "jaccard", 0) == (0, 1, 2, 3, 4)
    assert calibration.anchors(0.7, "mass", 0) == (0, 3), "row of the anchor, column of the layer"
    assert calibration.anchors(0.5, "jaccard", 4) == (4,)
    for rule, first in (("mean", 0), ("mass", 5), ("mass", -1)):
        with pytest.raises(ValueError, match="is not one of"):
            calibration.anchors(0.5, rule, first)


def test_heads_come_from_the_nearest_anchor() -> None:
    calibration = made()
    heads = calibration.heads((1, 3))
    own = (0, 1, 2)
    table = calibration.head_map
    assert heads == (own, own, table[2][1], own, table[4][3])


def test_low_heads_are_the_weakest() -> None:
    calibration = made(
        head_contribution=((5.0, 1.0, 4.0), (2.0, 9.0, 1.0), (7.0, 8.0, 0.5), (6.0, 6.0, 6.0), (6.0,) * 3)
    )
    assert calibration.low_heads(0.0) == () and calibration.low_heads(1 / 15 - 1e-6) == ()
    assert calibration.low_heads(0.2) == ((0, 1), (1, 2), (2, 2))
    assert calibration.low_heads(0.27) == ((0, 1), (1, 0), (1, 2), (2, 2)), "4.05 heads are 4"
    assert len(calibration.low_heads(1.0)) == LAYERS * HEADS
    assert all(layer >= 2 for layer, _ in calibration.low_heads(0.5, first_layer=2))
    many = made(kv_heads=20, head_map=(((0,) * 20,) * LAYERS,) * LAYERS, head_contribution=((1.0,) * 20,) * LAYERS)
    assert len(many.low_heads(0.29)) == 29, "29 of 100, though 0.29 * 100 falls short of it in binary"


def test_thresholds_are_interpolated() -> None:
    calibration = dataclasses.replace(made(), path="some.json")
    assert calibration.thresholds(0.5) == pytest.approx(calibration.ffn_quantiles["0.5"])
    assert calibration.thresholds(0.1) == pytest.approx([0.01] * LAYERS)
    assert calibration.thresholds(0.9) == pytest.approx(calibration.ffn_quantiles["0.9"])
    assert calibration.thresholds(0.7) == pytest.approx([0.3, 0.85, 1.4, 1.95, 2.5]), "half way from 0.5 to 0.9"
    assert calibration.thresholds(0.2)[1] == pytest.approx(0.01 + 0.25 * 0.19)
    for outside in (0.05, 0.95):
        with pytest.raises(ConfigError, match=rf"^ffn.sparsity={outside}: calibration=some.json .* from 0.1 to 0.9"):
            calibration.thresholds(outside)


def test_tables_are_checked_when_made() -> None:
    with pytest.raises(ValueError, match="not symmetric"):
        made(jaccard=tuple(tuple(random.random() for _ in range(5)) for _ in range(5)))
    with pytest.raises(dataclasses.FrozenInstanceError):
        made().tokens = 3  # type: ignore[misc]
