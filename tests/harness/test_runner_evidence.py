"""What a run measures beside its timings, and how a caller that watches it can end it."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from harness import build, estimate, runner
from harness.evidence import Record
from harness.schema import Config, resolve
from harness.timing import OtherLoad
from tests.harness.test_runner import TINY, stored

Compose = Callable[..., dict[str, Any]]


@pytest.fixture
def configured(compose: Compose, tmp_path: Path) -> Callable[..., Config]:
    return lambda *more: resolve(compose(*TINY, f"results_dir={tmp_path}/results", *more))


def test_the_reference_is_scored_by_every_arm_and_dense_like_token_by_token(
    configured: Callable[..., Config],
) -> None:
    config = configured("task.limit=2", "arms=[ar,dense,sparse,sparse_ar]", "analysis=fidelity")
    runner.run(config)
    _, records, _ = stored(config)
    scores = {arm: [row["reference"] for row in records if row["arm"] == arm] for arm in config.arms}
    assert all(row["tokens"] == config.task.max_new_tokens and row["logprob"] < 0 for row in scores["ar"])
    for ar, dense, sparse, lone in zip(*scores.values(), strict=True):
        assert dense["logprob"] == pytest.approx(ar["logprob"], rel=1e-4)
        assert sparse["logprob"] != pytest.approx(dense["logprob"], rel=1e-6)
        assert lone["logprob"] != pytest.approx(sparse["logprob"], rel=1e-6), "one token a step picks other blocks"
        assert {row["tokens"] for row in (ar, dense, sparse, lone)} == {ar["tokens"]}
    assert all(row["fidelity"]["tokens"] and not row["selections"] for row in records if row["arm"] == "sparse")


def test_analysis_can_be_left_out(configured: Callable[..., Config]) -> None:
    config = configured("task.limit=1", "analysis=none")
    runner.run(config)
    _, records, _ = stored(config)
    assert all(not row["reference"] and not row["fidelity"] for row in records)


def test_a_watched_run_ends_early_and_goes_on_later(configured: Callable[..., Config]) -> None:
    config, seen = configured("task.limit=3"), []

    def watch(records: Sequence[Record]) -> str | None:
        seen.append(len(records))
        return "hopeless" if len(records) >= 6 else None

    runner.run(config, watch=watch)
    summary, records, _ = stored(config)
    assert seen == [3, 6] and (summary["status"], summary["reason"], summary["examples"]) == ("partial", "hopeless", 2)
    assert runner.run(config) is not None
    summary, resumed, _ = stored(config)
    assert summary["status"] == "ok" and summary["reason"] is None and resumed[:6] == records and len(resumed) == 9


def test_members_of_one_process_share_prefills(
    configured: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The outputs are those of a process that prefills anew, and the summary says whose times these are."""
    limit, topk = "task.limit=2", "attn.topk=6"
    monkeypatch.setattr(build, "_PREFILLS", build.PrefillStore())
    runner.run(
        configured(limit, topk, "results_dir=" + str(configured().results_dir) + "/alone", "prefill_memory_gb=0")
    )
    alone = stored(configured(limit, topk, "results_dir=" + str(configured().results_dir) + "/alone"))[1]
    first, second = configured(limit), configured(limit, topk, f"results_dir={configured().results_dir}/second")
    runner.run(first)
    runner.run(second)
    summary, records, _ = stored(second)
    assert [row["output_ids"] for row in records] == [row["output_ids"] for row in alone]
    assert any("2 prompts were prefilled by an earlier run" in note for note in summary["notes"])
    assert not any("prefilled" in note for note in stored(first)[0]["notes"])
    before = {row["example_id"]: row["ttft_seconds"] for row in stored(first)[1] if row["arm"] == "dense"}
    assert {row["example_id"]: row["ttft_seconds"] for row in records if row["arm"] == "dense"} == before


def test_a_run_that_shares_the_machine_says_so(configured: Callable[..., Config]) -> None:
    config = configured("task.limit=1", "exclusive=false")
    runner.run(config)
    summary = stored(config)[0]
    assert summary["exclusive"] is False and any("exclusive=false" in note for note in summary["notes"])


def test_a_dry_run_tells_the_time_and_stores_nothing(
    configured: Callable[..., Config], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(estimate, "_FORESEEN", {})
    dry, real = configured("dry_run=true"), configured()

    def told() -> dict[str, Any]:
        assert runner.run(dry) is None
        return dict(json.loads(capsys.readouterr().out.splitlines()[-1]))

    first, again = told(), told()
    assert first["examples"] == first["missing"] == 3 and first["expected_seconds"] > 0
    assert again["expected_seconds"] < first["expected_seconds"], "its prompts would be prefilled by then"
    assert not list(Path(dry.results_dir).rglob("*.json"))
    runner.run(real, watch=lambda records: "enough")
    assert stored(real)[2].name == first["fingerprint"]
    capsys.readouterr()
    assert told()["missing"] == 2
    runner.run(real)
    capsys.readouterr()
    done = told()
    assert done["missing"] == 0 and done["expected_seconds"] == 0


@pytest.mark.parametrize("when", ["before", "after"])
def test_an_interrupted_run_goes_on(
    when: str, configured: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also one that waited, or loaded, and had no example yet: it must not count as finished."""
    config = configured("task.limit=2")

    def interrupt(records: Sequence[Record]) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        if when == "before":
            patched.setattr(build, "load", interrupt)
        with pytest.raises(KeyboardInterrupt):
            runner.run(config, watch=interrupt)
    runner.run(config)
    summary, records, _ = stored(config)
    assert summary["status"] == "ok" and len(records) == 6


def test_a_resumed_run_remembers_what_disturbed_its_first_half(
    configured: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configured("task.limit=2")
    with monkeypatch.context() as patched:
        patched.setattr(OtherLoad, "share", lambda self: 0.6)
        runner.run(config, watch=lambda records: "enough")
    monkeypatch.setattr(OtherLoad, "share", lambda self: 0.0)
    runner.run(config)
    summary = stored(config)[0]
    assert summary["status"] == "ok" and summary["exclusive"] is False
    assert any("used 60% of the CPU" in note for note in summary["notes"])
