"""Building the CPU kernels: where libraries lie, what makes a new one, and what happens where none can be built."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from types import ModuleType

import pytest
import torch

from harness.engine.model.linear import make_linear
from sparse.ops.decoder_layer import native as layers
from sparse.ops.native import build
from sparse.ops.sparse_ffn import native as ffn

SOURCES = ("answer.cpp", "answer.h")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Sources of a library that says 42; built libraries go to a folder of the test."""
    if shutil.which("c++") is None:
        pytest.skip("no compiler")
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("SPARSE_VERIFICATION_CACHE", str(tmp_path / "cache"))
    sources = tmp_path / "sources"
    sources.mkdir()
    (sources / "answer.cpp").write_text('#include "answer.h"\nextern "C" int answer() { return ANSWER; }\n')
    (sources / "answer.h").write_text("#define ANSWER 42\n")
    return sources


def opened(folder: Path) -> ctypes.CDLL:
    return build.open_library("answer", folder, SOURCES)


def built() -> set[str]:
    return {path.name for path in build.cache_folder().iterdir()}


def test_a_library_is_built_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = build.library_path("answer", folder, SOURCES)
    assert library.parent == build.cache_folder() and not library.parent.exists()
    assert opened(folder).answer() == 42
    assert built() == {library.name} and library.parent.stat().st_mode & 0o777 == 0o700
    monkeypatch.setattr(build, "_build", lambda library, source: pytest.fail("built twice"))
    assert opened(folder).answer() == 42


def test_whatever_changes_a_library_makes_a_new_one(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any of its sources, the compiler, its flags, torch, the CPU."""
    paths = [build.library_path("answer", folder, SOURCES)]
    assert opened(folder).answer() == 42
    for change in (
        lambda: (folder / "answer.h").write_text("#define ANSWER 43\n"),
        lambda: monkeypatch.setenv("CXX", "c++ -DOTHER"),
        lambda: monkeypatch.setattr(build, "_FLAGS", (*build._FLAGS, "-g")),
        lambda: monkeypatch.setattr(torch, "__version__", "0"),
        lambda: monkeypatch.setattr(build, "_cpu", lambda: "another"),
    ):
        change()
        paths.append(build.library_path("answer", folder, SOURCES))
    assert len(set(paths)) == len(paths) and len({path.parent for path in paths}) == 1
    assert opened(folder).answer() == 43


@pytest.mark.parametrize("kernels", [ffn, layers], ids=["FFN", "decoder layers"])
def test_every_source_counts(kernels: ModuleType) -> None:
    """A header that is not among the sources of its library could change without a new build."""
    assert kernels.__file__ is not None and build.__file__ is not None
    for module, names in ((kernels.__file__, kernels._SOURCES), (build.__file__, build._SHARED)):
        files = {path.name for path in Path(module).parent.iterdir() if path.suffix in (".cpp", ".h")}
        assert files == {name for name in names if not name.startswith("../")}


def test_a_killed_build_and_a_broken_library_block_nobody(folder: Path) -> None:
    library = build.library_path("answer", folder, SOURCES)
    (library.parent / "build-killed").mkdir(parents=True)
    library.write_bytes(b"")
    assert opened(folder).answer() == 42
    assert built() == {"build-killed", library.name}


def test_processes_may_build_at_the_same_time(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every one of them gets a whole library."""
    original, together = build._build, Barrier(2, timeout=60)

    def both(library: Path, source: Path) -> None:
        together.wait()
        original(library, source)

    monkeypatch.setattr(build, "_build", both)
    with ThreadPoolExecutor(2) as pool:
        assert [one.answer() for one in pool.map(opened, [folder] * 2)] == [42, 42]
    assert len(built()) == 1


def test_the_compiler_says_why(folder: Path) -> None:
    """What it printed reaches the caller; half a build does not stay."""
    (folder / "answer.h").write_text("#error no answer here\n")
    with pytest.raises(subprocess.CalledProcessError) as caught:
        opened(folder)
    assert "no answer here" in build.reason(caught.value) and built() == set()
    assert build.reason(OSError("gone")) == "gone" and len(build.reason(OSError("x" * 9000))) == 2000


def test_the_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSE_VERIFICATION_CACHE", "/own")
    assert build.cache_folder() == Path("/own/native")
    monkeypatch.delenv("SPARSE_VERIFICATION_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert build.cache_folder() == Path("/somewhere/sparse-verification/native")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert build.cache_folder() == Path.home() / ".cache/sparse-verification/native"


def forget() -> None:
    """Libraries are looked for anew."""
    for found in (ffn.load, layers._load, layers._formats):
        found.cache_clear()


@pytest.fixture
def reloaded() -> Iterator[None]:
    """Libraries are looked for anew, in this test and after it."""
    forget()
    yield
    forget()


AVAILABLE: dict[str, Callable[[torch.dtype], bool]] = {"FFN": ffn.available, "decoder layers": layers.available}


@pytest.mark.parametrize("kernels", AVAILABLE)
def test_the_switch_turns_kernels_off(kernels: str, reloaded: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(build.SWITCH, "0")
    monkeypatch.setattr(build, "_build", lambda library, source: pytest.fail("built for nothing"))
    assert not AVAILABLE[kernels](torch.float32)


@pytest.mark.parametrize("compiler", ["false", "no-such-compiler"])
@pytest.mark.parametrize("kernels", AVAILABLE)
def test_without_a_working_compiler_torch_operators_run(
    kernels: str,
    compiler: str,
    reloaded: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("SPARSE_VERIFICATION_CACHE", str(tmp_path))
    monkeypatch.setenv("CXX", compiler)
    assert not AVAILABLE[kernels](torch.float32) and not AVAILABLE[kernels](torch.bfloat16)
    assert f"for {kernels} are unavailable" in caplog.text or f"{kernels} kernel is unavailable" in caplog.text
    assert list((tmp_path / "native").iterdir()) == []
    weight, rows = torch.randn(32, 20), torch.randn(3, 20)
    assert torch.allclose(make_linear(weight, packed=True)(rows), rows @ weight.T, atol=1e-5)
    with pytest.raises(RuntimeError, match="no kernels for decoder layers"):
        layers.PackedLinear(weight)(rows)


def test_kernels_that_compute_nonsense_are_not_used(reloaded: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the format in which they do."""
    if shutil.which("c++") is None:
        pytest.skip("no compiler")
    linear = layers.linear

    def wrong(packed: layers.PackedLinear, rows: torch.Tensor) -> torch.Tensor:
        found = linear(packed, rows)
        return found * 1.02 if rows.dtype is torch.float32 else found

    before = layers.available(torch.bfloat16)
    forget()
    monkeypatch.setattr(layers, "linear", wrong)
    assert not layers.available(torch.float32) and layers.available(torch.bfloat16) == before
    assert not isinstance(make_linear(torch.randn(32, 20), packed=True), layers.PackedLinear)
