"""Fidelity and trace blocks of a summary against sums done by hand."""

from dataclasses import replace
from typing import Any

import pytest

from harness.evidence.records import Record
from harness.evidence.traces import fidelity_block, trace_block

BASE = Record(
    example_id="0",
    arm="sparse",
    output_ids=(1, 2),
    text="x",
    grade={},
    seconds=1.0,
    ttft_seconds=0.1,
    steps=4,
    histogram=(0, 4),
    paths={"reuse.anchor": 8, "block_attention.torch": 12},
    prompt_sha="s",
    prompt_tokens=10,
)


def record(number: int, **values: Any) -> Record:
    return replace(BASE, example_id=str(number), **values)


def test_fidelity_is_pooled_over_tokens_and_steps() -> None:
    first = {"tokens": 30, "agreeing": 27, "kl": 3.0, "steps": 10, "flips": 1}
    second = {"tokens": 10, "agreeing": 10, "kl": 1.0, "steps": 10, "flips": 0}
    rows = [record(0, fidelity=first), record(1, fidelity=second), record(2)]
    found = fidelity_block(rows)
    assert found["agreement"] == 37 / 40 and found["kl"] == 0.1 and found["accept_flips"] == 0.05
    assert found["tokens"] == 40 and found["agreement_ci95"][0] <= 37 / 40 <= found["agreement_ci95"][1]


def test_nothing_replayed_is_null_not_zero() -> None:
    assert set(fidelity_block([record(0)]).values()) == {None}
    found = trace_block([record(0)])
    assert found["overlap"] is None and found["similarity"] is None and found["unique_experts"] is None


def test_means_over_steps_leave_unobserved_entries_out() -> None:
    seen = {"steps": 1, "overlap": [[0.5, None]], "recall": [0.8], "oracle_recall": [0.9], "similarity": [[1.0]]}
    more = {"steps": 3, "overlap": [[0.9, 0.4]], "recall": [0.4], "oracle_recall": [0.5], "similarity": [[0.2]]}
    none = {"steps": 0, "overlap": [[None, None]], "recall": [None], "oracle_recall": [None], "similarity": [[None]]}
    seen |= {"overlap_pairs": [[10, 0]], "observed": [3]}
    more |= {"overlap_pairs": [[30, 2]], "observed": [1]}
    none |= {"overlap_pairs": [[0, 0]], "observed": [0]}
    rows = [record(n, selections=value) for n, value in enumerate((seen, more, none))]
    found = trace_block(rows)
    assert found["overlap"] == [[pytest.approx(0.8), pytest.approx(0.4)]]
    assert found["recall"] == [pytest.approx(0.7)] and found["oracle_recall"] == [pytest.approx(0.8)]
    assert found["similarity"] == [[pytest.approx(0.4)]]


def test_densities_are_weighted_by_steps_and_counts_are_summed() -> None:
    rows = [
        record(0, layer_density={"ffn": [1.0, 0.5]}, pairs={"kept": 3}, stale={"1": 2}, unique_experts=[4.0]),
        record(1, layer_density={"ffn": [1.0, 0.1]}, pairs={"kept": 5}, unique_experts=[8.0], steps=12),
        record(2, layer_density={"ffn": [0.0, 0.0]}, steps=0),
    ]
    found = trace_block(rows)
    assert found["layer_density"] == {"ffn": [1.0, pytest.approx(0.2)]}
    assert found["unique_experts"] == [7.0]
    assert found["pairs"] == {"kept": 8} and found["stale"] == {"1": 2} and found["reuse"] == {"reuse.anchor": 16}
