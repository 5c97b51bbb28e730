"""Sweeps from the outside: kill -9, two processes on one folder, other launchers. A stand-in for the runner stores."""

import json
import random
from pathlib import Path

import pytest

from scripts import status
from tests.sweep_process import Sweep, complete, survives_two_kills

TWELVE = ("attn.topk=8,9,10,11", "task=xsum,squad,math", "task.limit=2", "track=none")


def manifest(results: Path) -> dict:
    (file,) = results.glob("sweeps/*.json")
    return json.loads(file.read_text())


def test_a_sweep_killed_twice_is_completed_by_the_third_call(tmp_path: Path) -> None:
    sweep = Sweep(tmp_path, *TWELVE, DECODE="0.02")
    err = survives_two_kills(sweep, 12, 2, random.Random(1))
    assert err.splitlines()[-1].endswith("12 ok of 12")
    assert {member["fingerprint"] for member in manifest(sweep.results)["members"]} == set(sweep.stored())
    assert status.main(["--results", str(sweep.results)]) == 0
