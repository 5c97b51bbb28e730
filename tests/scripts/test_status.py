import json
import subprocess
import sys

import pytest

from harness.evidence import fingerprint, sources_hash
from harness.evidence.sweeps import Member, write
from scripts import status
from tests.evidence_samples import config, stored_run

SOURCES = sources_hash(status.ROOT)


@pytest.fixture
def results(tmp_path):
    """Three members: done, failed and not begun."""
    stored_run(tmp_path, config(topk=8), sources=SOURCES)
    stored_run(tmp_path, config(topk=16), sources=SOURCES, status="failed", reason="[out] of memory")
    members = [Member(("task=xsum", f"attn.topk={topk}"), fingerprint(config(topk=topk))) for topk in (8, 16, 32)]
    write(tmp_path, "xsum", "python run.py -m attn.topk=8,16,32", members, SOURCES)
    return tmp_path


def test_sweeps_are_counted(results, capsys):
    assert status.main(["--results", str(results)]) == 1
    row = next(line for line in capsys.readouterr().out.splitlines() if "xsum-" in line)
    cells = [cell.strip() for cell in row.strip("│").split("│")]
    shown = dict(zip(status.STATES, cells[1:8], strict=True))
    assert {state: count for state, count in shown.items() if count} == {"done": "1", "failed": "1", "missing": "1"}


def test_members_are_listed_with_what_tells_them_apart(results, capsys):
    assert status.main(["xsum", "--results", str(results)]) == 1
    text = capsys.readouterr().out
    rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in text.splitlines() if "attn.topk=" in line]
    assert [row[0] for row in rows[1:]] == ["attn.topk=8", "attn.topk=16", "attn.topk=32"]
    assert [row[2:] for row in rows[1:]] == [
        ["done", "6", ""],
        ["failed", "6", "[out] of memory"],
        ["missing", "0", ""],
    ]


def test_json_is_for_programs(results, capsys):
    assert status.main(["xsum", "--results", str(results), "--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert told["counts"]["done"] == told["counts"]["missing"] == 1
    assert [member["state"] for member in told["members"]] == ["done", "failed", "missing"]
    assert status.main(["--results", str(results), "--json"]) == 1
    assert json.loads(capsys.readouterr().out) == [told]


def test_all_done_is_exit_code_zero(tmp_path, capsys):
    stored_run(tmp_path, config(), sources=SOURCES)
    sweep = write(tmp_path, "xsum", "", [Member((), fingerprint(config()))], SOURCES)
    assert status.main([sweep.title, "--results", str(tmp_path)]) == 0
    assert "done" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "words"), [(["nope"], ["nope", "choose one of xsum-"]), (["x"], ["several", "xsum-", "xsum2-"])]
)
def test_bad_input_is_one_line(results, capsys, argv, words):
    write(results, "xsum2", "", [Member((), "0" * 16)], SOURCES)
    assert status.main([*argv, "--results", str(results)]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and len(printed.err.splitlines()) == 1 and all(word in printed.err for word in words)


def test_no_sweep_is_bad_input(tmp_path, capsys):
    assert status.main(["--results", str(tmp_path / "absent")]) == 2
    assert "holds no sweep" in capsys.readouterr().err and not (tmp_path / "absent").exists()


def test_it_needs_no_torch():
    code = "import sys, scripts.status; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=status.ROOT, timeout=60, check=False).returncode == 0
