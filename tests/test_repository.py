"""The tree keeps its own rules: which packages these are, how long files get, what is pinned."""

import importlib
import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
ROOMS = ("harness", "scripts", "sparse", "tasks")
SOURCES = sorted([ROOT / "run.py", *(file for room in (*ROOMS, "tests") for file in (ROOT / room).rglob("*.py"))])
LONGEST = 400


def requirement(text: str) -> str:
    """The normalised name of a requirement or a pin."""
    return re.sub(r"[-_.]+", "-", re.split(r"[\s\[;<>=]", text, maxsplit=1)[0]).lower()


@pytest.mark.parametrize("name", ROOMS)
def test_packages_are_those_of_the_repository(name: str) -> None:
    module = importlib.import_module(name)
    assert module.__file__ is not None and Path(module.__file__).resolve().is_relative_to(ROOT)


def test_packages_are_named_in_the_project_file() -> None:
    found = {
        ".".join(file.parent.relative_to(ROOT).parts) for room in ROOMS for file in (ROOT / room).rglob("__init__.py")
    }
    assert set(PYPROJECT["tool"]["setuptools"]["packages"]) == found


def test_run_py_stays_short() -> None:
    assert len((ROOT / "run.py").read_text().splitlines()) < 40


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: str(file.relative_to(ROOT)))
def test_files_stay_short(file: Path) -> None:
    assert len(file.read_text().splitlines()) < LONGEST


def test_no_file_shadows_a_module_that_others_import() -> None:
    imported = {requirement(text).replace("-", "_") for text in PYPROJECT["project"]["dependencies"]}
    taken = imported | {"hydra", "yaml", "math", "random", "statistics"}
    assert [str(file) for file in SOURCES if file.stem in taken] == []


def test_every_dependency_is_pinned_for_reproducible_installs() -> None:
    extras = PYPROJECT["project"]["optional-dependencies"]
    declared = {requirement(text) for text in [*PYPROJECT["project"]["dependencies"], *extras["dev"], *extras["sweep"]]}
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines)
    assert declared - {requirement(line) for line in lines} == {"triton"}


def test_hydra_is_imported_by_the_entry_and_tests_alone() -> None:
    allowed = {ROOT / "run.py", ROOT / "scripts" / "tune.py"}
    users = [file for file in SOURCES if re.search(r"^\s*(import|from) hydra", file.read_text(), re.MULTILINE)]
    assert all(file in allowed or file.is_relative_to(ROOT / "tests") for file in users)
