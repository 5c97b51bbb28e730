import json

import pytest

from harness.evidence import Record, RecordError
from harness.evidence.records import complete
from tests.evidence_samples import record


def test_json_round_trip_is_exact():
    row = record("q1", "sparse", histogram=(0, 2, 1), cluster="article 7", seconds=0.1 + 0.2)
    assert Record.from_json(json.loads(json.dumps(row.to_json()))) == row


def test_one_line_holds_every_field_of_the_design():
    names = (
        "example_id arm output_ids text grade seconds ttft_seconds steps histogram paths prompt_sha prompt_tokens "
        "truncated_tokens"
    )
    assert set(names.split()) <= set(record().to_json())


def test_tokens_follow_from_the_histogram():
    assert record(histogram=(1, 2, 0, 4)).tokens == 2 + 12


@pytest.mark.parametrize("spoil", [{"steps": None}, {"output_ids": 3}, {"grade": 1}])
def test_unreadable_records_name_the_example(spoil):
    row = record("q9").to_json() | spoil
    if spoil.get("steps", 0) is None:
        del row["steps"]
    with pytest.raises(RecordError, match="q9"):
        Record.from_json(row)


def test_an_example_is_complete_with_every_arm():
    rows = [record("a", "ar"), record("b", "ar"), record("b", "dense")]
    assert list(complete(rows, ("ar", "dense"))) == ["b"]
