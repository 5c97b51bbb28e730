"""Measured peaks: plausible, kept on disk, measured anew when asked for."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from harness import roofline


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder, and a process that knows nothing."""
    monkeypatch.setenv("SPARSE_VERIFICATION_CACHE", str(tmp_path))
    monkeypatch.setattr(roofline, "_known", {})
    return tmp_path / "peaks"


def others(monkeypatch: pytest.MonkeyPatch, share: float) -> None:
    """Other processes use this share of the processor."""
    monkeypatch.setattr(roofline, "OtherLoad", lambda: SimpleNamespace(share=lambda: share))


def forget() -> None:
    """As a new process."""
    roofline._known.clear()


def test_measured_peaks_are_plausible(folder: Path) -> None:
    peaks = roofline.peaks("cpu", 1, torch.float32)
    assert 1e8 < peaks.bandwidth < 1e13 and 1e8 < peaks.rate < 1e14
    assert roofline.bandwidth("cpu", 1) == peaks.bandwidth, "measured once"


def test_what_is_kept_is_not_measured_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = iter((3.0, 4.0))
    others(monkeypatch, 0.0)
    monkeypatch.setattr(roofline, "_measured_bandwidth", lambda device: next(values))
    assert roofline.bandwidth("cpu", 2) == 3.0
    forget()
    assert roofline.bandwidth("cpu", 2) == 3.0, "from disk"
    assert roofline.bandwidth("cpu", 2, anew=True) == 4.0
    forget()
    assert roofline.bandwidth("cpu", 2) == 4.0, "replaced"
    assert [file.suffix for file in folder.iterdir()] == [".json"], "one whole file, nothing temporary"


def test_threads_and_dtypes_are_told_apart(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = iter((1.0, 2.0, 3.0))
    others(monkeypatch, 0.0)
    monkeypatch.setattr(roofline, "_measured_rate", lambda device, dtype: next(values))
    assert roofline.matrix_rate("cpu", 1, torch.float32) == 1.0
    assert roofline.matrix_rate("cpu", 2, torch.float32) == 2.0
    assert roofline.matrix_rate("cpu", 1, torch.bfloat16) == 3.0
    assert roofline.matrix_rate("cpu", 1, torch.float32) == 1.0 and len(list(folder.iterdir())) == 3


def test_measurements_under_load_are_not_kept(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    others(monkeypatch, 0.5)
    monkeypatch.setattr(roofline, "_measured_bandwidth", lambda device: 3.0)
    assert roofline.bandwidth("cpu", 2) == 3.0 and not folder.exists()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"key": 1, "value": 5}', "nan", "same but negative"])
def test_a_damaged_entry_is_measured_again(folder: Path, monkeypatch: pytest.MonkeyPatch, content: str) -> None:
    others(monkeypatch, 0.0)
    monkeypatch.setattr(roofline, "_measured_bandwidth", lambda device: 7.0)
    roofline.bandwidth("cpu", 2)
    (file,) = folder.iterdir()
    if content == "same but negative":
        content = json.dumps(json.loads(file.read_text()) | {"value": -1})
    file.write_text(content)
    forget()
    assert roofline.bandwidth("cpu", 2) == 7.0
    assert json.loads(file.read_text())["value"] == 7.0, "repaired"


def test_a_cache_that_cannot_be_written_does_not_matter(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    others(monkeypatch, 0.0)
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("SPARSE_VERIFICATION_CACHE", str(blocked))
    monkeypatch.setattr(roofline, "_measured_bandwidth", lambda device: 3.0)
    assert roofline.bandwidth("cpu", 2) == 3.0 and blocked.read_text() == ""
