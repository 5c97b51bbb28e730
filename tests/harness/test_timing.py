"""The clock, the load of others, and names of devices."""

import time
from types import SimpleNamespace

import psutil
import pytest

from harness import roofline
from harness.timing import OtherLoad, make_clock


def test_the_clock_is_monotonic_and_counts_seconds() -> None:
    clock = make_clock("cpu")
    start = clock()
    time.sleep(0.02)
    assert 0.02 <= clock() - start < 5


@pytest.mark.parametrize("own, expected", [(2.0, 0.3), (5.0, 0.0), (0.0, 0.5)])
def test_the_load_of_others_is_what_we_did_not_use(
    monkeypatch: pytest.MonkeyPatch, own: float, expected: float
) -> None:
    """Ten seconds of processor time pass, half of them idle; `own` seconds were ours."""
    machine = [SimpleNamespace(user=0.0, idle=0.0, iowait=0.0), SimpleNamespace(user=5.0, idle=4.0, iowait=1.0)]
    mine = [SimpleNamespace(user=0.0, system=0.0), SimpleNamespace(user=own, system=0.0)]

    class Times(SimpleNamespace):
        def __iter__(self):  # type: ignore[no-untyped-def]
            return iter(vars(self).values())

    steps = iter([Times(**vars(entry)) for entry in machine])
    monkeypatch.setattr(psutil, "cpu_times", lambda: next(steps))
    monkeypatch.setattr(psutil, "Process", lambda: SimpleNamespace(cpu_times=lambda: mine.pop(0)))
    assert OtherLoad().share() == pytest.approx(expected, abs=1e-9)


def test_devices_are_named_without_the_machine() -> None:
    import platform

    import torch

    text = roofline.device_text(torch.device("cpu"), 3)
    assert text.endswith("3 threads") and platform.node() not in text
