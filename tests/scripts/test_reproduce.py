"""scripts.reproduce: stages that compose, files that are found, time that is told beforehand, and a real smoke run."""

import itertools
import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from harness.schema import resolve
from scripts import reproduce
from scripts.reproducing.stages import FILES, SCALES, TABLE1, Data, Stage, command, stages

Compose = Callable[..., dict[str, Any]]


def planned(scale: str, data: Data | None = None, model: str = "smollm2") -> list[Stage]:
    return stages(scale, data or Data(), model, Path("carved"), Path("head"), [Path("text")])


def members(stage: Stage) -> list[list[str]]:
    """Every combination of a stage's swept values, without what only the sweeper reads."""
    words = [word for word in stage.overrides if word != "-m" and not word.startswith("hydra.")]
    choices = [[f"{word.partition('=')[0]}={value}" for value in word.partition("=")[2].split(",")] for word in words]
    return [list(member) for member in itertools.product(*choices)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for names in FILES.values():
        file = tmp_path / "data" / names[0]
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("{}\n")
    return tmp_path / "data"


@pytest.mark.parametrize("scale", SCALES)
def test_every_member_of_every_stage_resolves(scale: str, compose: Compose, folder: Path) -> None:
    for data in (Data(), Data(folder=folder)):
        for stage in planned(scale, data):
            for member in members(stage) if stage.overrides else []:
                config = resolve(compose(*member))
                assert config.task.source == ("files" if data.folder and config.task.name in FILES else "bundled")


def test_scales_grow_and_stages_have_names_of_their_own() -> None:
    counts = []
    for scale in SCALES:
        found = planned(scale)
        assert len({stage.name for stage in found}) == len(found)
        counts.append(sum(len(members(stage)) for stage in found if stage.overrides))
        assert {f"table1_{task}" for task in TABLE1} | {"tradeoff", "context_curve"} <= {stage.name for stage in found}
    assert counts == sorted(set(counts))


def test_the_papers_models_run_the_same_stages_but_what_only_smollm2_has() -> None:
    ours, theirs = planned("full"), planned("full", Data("hub"), "llama_7b")
    joined = {"joined_fast_squad_long", "joined_trees_xsum", "joined_trees_squad_long"}
    assert {one.name for one in ours} - {one.name for one in theirs} == {"carve", "moe_curve", "head", *joined}
    without = stages("full", Data(), "smollm2", Path("carved"), Path("head"))
    assert {one.name for one in ours} - {one.name for one in without} == {"head", *joined}
    runs = [stage for stage in theirs if stage.overrides]
    assert all("model=llama_7b" in stage.overrides for stage in runs)
    hub = [stage.name for stage in runs if "task.source=hub" in stage.overrides]
    assert {"table1_xsum", "table1_squad", "table1_math"} <= set(hub) and "tradeoff" not in hub


def test_commands_can_be_typed() -> None:
    for stage in planned("full"):
        words = shlex.split(command(stage, ["track=none"]))
        assert words[0] == "python" and words[1] == ("run.py" if stage.overrides else "-m")
        assert tuple(words[2:]) == ((*stage.overrides, "track=none") if stage.overrides else stage.module)


@pytest.mark.parametrize("name", ["absent", "empty"])
def test_missing_data_end_before_anything_runs(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.setattr(reproduce, "in_process", lambda *_, **__: pytest.fail("something ran"))
    assert reproduce.main(["--data", str(tmp_path / name)]) == 2
    line = capsys.readouterr().err.strip()
    assert len(line.splitlines()) == 1 and name in line


def test_the_time_is_told_and_failed_stages_do_not_stop_the_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[str] = []

    def stand_in(overrides: list[str], *, quiet: bool = False) -> int:
        if "dry_run=true" in overrides:
            print(json.dumps({"expected_seconds": 90.0, "missing": 2}))
            return 0
        assert capsys.readouterr().out.count(f"expected: {5 * 1.5 * reproduce.TAKEN:.0f} minutes") == (not ran)
        ran.append(overrides[0])
        return 1 if len(ran) == 2 else 0

    monkeypatch.setattr(reproduce, "in_process", stand_in)
    monkeypatch.setattr(reproduce, "_module", lambda words: 0)
    assert reproduce.main(["--results", str(tmp_path), "track=none"]) == 1
    told = json.loads((tmp_path / "reproduce.json").read_text())
    assert len(ran) == len(told["stages"]) == 5 and [row["exit_code"] for row in told["stages"]] == [0, 1, 0, 0, 0]
    assert all(
        row["expected_seconds"] == round(90 * reproduce.TAKEN) and row["command"].startswith("python run.py")
        for row in told["stages"]
    )


def test_a_stage_that_cannot_run_ends_all_with_its_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert reproduce.main(["--results", str(tmp_path), "track=none", "attn.tpk=8"]) == 2
    assert "attn.tpk" in capsys.readouterr().err and not list(tmp_path.rglob("records.jsonl"))


@pytest.mark.slow
def test_the_smoke_scale_writes_everything(tmp_path: Path) -> None:
    assert reproduce.main(["--results", str(tmp_path), "track=none"]) == 0
    assert {file.name for file in (tmp_path / "tables").iterdir()} >= {"results.md", "reference.tex", "budgets.csv"}
    assert (tmp_path / "figures" / "tradeoff.png").stat().st_size > 10_000
    assert "<table" in (tmp_path / "report.html").read_text()
    assert len(list(tmp_path.glob("runs/*/summary.json"))) == 7
