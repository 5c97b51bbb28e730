"""Building and opening the CPU kernels.

A library lies in a folder of the user, named by a hash of its sources, the compiler's flags, torch and the CPU. Every
build works in a folder of its own and moves the finished library into place, so processes may build at the same time
and a killed build blocks nobody.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

SWITCH = "SPARSE_VERIFICATION_NATIVE"
"""Environment variable: 0 switches the kernels off."""

_SHARED = ("numbers.h", "tiles.h")
_FLAGS = ("-O3", "-march=native", "-std=c++20", "-fPIC", "-fopenmp", "-w")
_BUILD_SECONDS = 180


def switched_off() -> bool:
    """Whether the user wants torch operators instead of the kernels."""
    return os.environ.get(SWITCH) == "0"


def cache_folder() -> Path:
    """Where built libraries lie: ``native`` in $SPARSE_VERIFICATION_CACHE, else in the user's cache folder."""
    own = os.environ.get("SPARSE_VERIFICATION_CACHE")
    if own:
        return Path(own) / "native"
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "sparse-verification" / "native"


def library_path(name: str, folder: Path, sources: Sequence[str]) -> Path:
    """Where the library of these sources, this torch and this CPU belongs."""
    files = [*(folder / source for source in sources), *(Path(__file__).with_name(source) for source in _SHARED)]
    parts = [*(file.read_text() for file in files), *_FLAGS, *_compiler(), torch.__version__, _cpu()]
    return cache_folder() / f"{name}-{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()[:16]}.so"


def open_library(name: str, folder: Path, sources: Sequence[str]) -> ctypes.CDLL:
    """The library of ``sources``, built first where it is missing or broken.

    Args:
        name: first part of the library's file name.
        folder: of the sources.
        sources: their names, the one to compile first, then the headers it includes.

    Raises:
        OSError, subprocess.SubprocessError: it cannot be built or opened.
    """
    library = library_path(name, folder, sources)
    try:
        return ctypes.CDLL(str(library))
    except OSError:
        _build(library, folder / sources[0])
        return ctypes.CDLL(str(library))


def reason(error: Exception) -> str:
    """Why a library is unavailable, in a few words of the compiler or the system."""
    text = error.stderr.decode(errors="replace") if isinstance(error, subprocess.CalledProcessError) else str(error)
    return text.strip()[-2000:]


def _build(library: Path, source: Path) -> None:
    """Compiles the library; linked against torch alone, so that both share one pool of threads."""
    library.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    root = Path(torch.__file__).parent
    includes = [f"-I{root / 'include'}", f"-I{Path(__file__).parent}"]
    with tempfile.TemporaryDirectory(prefix="build-", dir=library.parent) as folder:
        unit, linked = f"{folder}/native.o", f"{folder}/native.so"
        for command in (
            [*_compiler(), *_FLAGS, *includes, "-c", str(source), "-o", unit],
            [*_compiler(), "-shared", unit, f"-L{root / 'lib'}", "-ltorch_cpu", "-lc10", "-o", linked],
        ):
            subprocess.run(command, check=True, capture_output=True, timeout=_BUILD_SECONDS)
        os.replace(linked, library)


def _compiler() -> list[str]:
    return shlex.split(os.environ.get("CXX") or "c++")


def _cpu() -> str:
    """What -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = [platform.processor()]
    named = ("vendor_id", "cpu family", "model", "flags", "Features", "CPU part")
    return "\n".join([platform.machine(), *sorted({line for line in lines if line.startswith(named)})])
