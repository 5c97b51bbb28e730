"""Reading of files and of the hub: every problem is a TaskError of one line that names the file."""

import gzip
import json
import os
from pathlib import Path

import pytest

from tasks import HubSource, TaskError, make

ROWS = [{"document": f"Text {i}.\nMore of it.", "summary": f"Sum {i}.", "id": str(i)} for i in range(5)]


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def read(settings, path, name="xsum", **changes):
    return list(make(name, settings(source="files", data_files=(str(path),), **changes)).examples())


def failure(settings, path, name="xsum"):
    with pytest.raises(TaskError) as caught:
        read(settings, path, name)
    message = str(caught.value)
    assert "\n" not in message and str(path) in message
    return message


def test_jsonl_gz_and_parquet_give_the_same(tmp_path, settings):
    import pyarrow as pa
    import pyarrow.parquet as pq

    plain, packed, table = tmp_path / "a.jsonl", tmp_path / "a.jsonl.gz", tmp_path / "a.parquet"
    plain.write_text(lines(ROWS))
    packed.write_bytes(gzip.compress(lines(ROWS).encode()))
    pq.write_table(pa.Table.from_pylist(ROWS), table)
    examples = read(settings, plain)
    assert [example.id for example in examples] == ["0", "1", "2", "3", "4"]
    assert examples[3].references == ("Sum 3.",)
    assert read(settings, packed) == examples == read(settings, table)
    assert [example.id for example in read(settings, plain, offset=3)] == ["3", "4"]


def test_several_files_follow_one_another_and_ids_stay_unique(tmp_path, settings):
    one, two = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    one.write_text(lines(ROWS[:2]))
    two.write_text(lines(ROWS[1:3]))
    task = make("xsum", settings(source="files", data_files=(str(one), str(two))))
    assert [example.id for example in task.examples()] == ["0", "1", "1#2", "2"]


def test_a_changed_file_is_read_again(tmp_path, settings):
    path = tmp_path / "a.jsonl"
    path.write_text(lines(ROWS))
    before = os.stat(path)
    assert read(settings, path)[0].references == ("Sum 0.",)
    path.write_text(lines(ROWS).replace("Sum", "New"))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert read(settings, path)[0].references == ("New 0.",)
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.jsonl"]


def test_missing_file(tmp_path, settings):
    assert "no such file" in failure(settings, tmp_path / "none.jsonl")
    assert "no such file" in failure(settings, tmp_path)


def test_unknown_kind_of_file(tmp_path, settings):
    path = tmp_path / "a.csv"
    path.write_text("document,summary,id\n")
    assert ".parquet" in failure(settings, path)


@pytest.mark.parametrize("content", [b"", b"\n\n", gzip.compress(b"")], ids=["empty", "blank", "empty-gz"])
def test_empty_file(tmp_path, settings, content):
    path = tmp_path / ("a.jsonl.gz" if content[:1] == b"\x1f" else "a.jsonl")
    path.write_bytes(content)
    message = failure(settings, path)
    assert "empty" in message or "no rows" in message
    assert "document, summary, id" in message


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", (lines(ROWS[:2]) + '{"document": "cut').encode(), "line 3 is not JSON"),
        ("a.jsonl", b"plain text\n", "line 1 is not JSON"),
        ("a.jsonl", b"[1, 2]\n", "row 1"),
        ("a.jsonl", (lines(ROWS[:1]) + '{"document": {"a": 1}, "summary": "s", "id": "1"}\n').encode(), "expected"),
        ("a.jsonl.gz", b"not gzip at all", "cannot be read"),
        ("a.jsonl.gz", gzip.compress(lines(ROWS * 50).encode())[:200], "cannot be read"),
        ("a.jsonl", b"\xff\xfe\x00{}\n", "a.jsonl"),
        ("a.parquet", b"PAR1 but no more", "not a parquet file"),
    ],
)
def test_malformed_file(tmp_path, settings, name, content, words):
    path = tmp_path / name
    path.write_bytes(content)
    assert words in failure(settings, path)


@pytest.mark.parametrize(
    ("task", "row", "words"),
    [
        ("xsum", {"document": "d", "id": "1"}, "no field 'summary'"),
        ("xsum", {"document": 5, "summary": "s", "id": "1"}, "field 'document' is int"),
        ("squad", {"id": "1", "title": "t", "context": "c", "question": "q"}, "no field 'answers'"),
        ("squad", {"id": "1", "title": "t", "context": "c", "question": "q", "answers": "a"}, "{text, answer_start}"),
        ("math", {"problem": "p"}, "no field 'answer or solution'"),
        ("math", {"problem": "p", "solution": "no box"}, "boxed"),
        ("gsm8k", {"question": "q", "answer": "42"}, "####"),
        ("squad_long", {"_id": "1", "title": "t", "bucket": "9k", "context": "c", "queries": []}, "'9k'"),
        ("squad_long", {"_id": "1", "title": "t", "bucket": "8k", "context": "c", "queries": "q"}, "queries"),
        ("qmsum", {"_id": "1", "context": "c", "queries": [{"input": "i", "answers": []}]}, "no answers"),
    ],
)
def test_bad_row_names_file_row_and_field(tmp_path, settings, task, row, words):
    path = tmp_path / "rows.jsonl"
    path.write_text(lines([row]))
    message = failure(settings, path, task)
    assert words in message and "row 1" in message


def test_solution_may_be_null_where_there_is_an_answer(tmp_path, settings):
    path = tmp_path / "math.jsonl"
    rows = [
        {"problem": "p", "solution": None, "answer": "3"},
        {"problem": "q", "solution": r"\boxed{4}", "answer": None},
    ]
    path.write_text(lines(rows))
    assert [example.references for example in read(settings, path, "math")] == [("3",), ("4",)]


def test_files_without_a_file(settings):
    with pytest.raises(TaskError, match=r"task\.data_files=\[\]"):
        list(make("xsum", settings(source="files")).examples())


def test_hub_offline_says_what_to_do(settings, monkeypatch):
    import datasets

    def refuse(*names, **options):
        raise ConnectionError("no network\nat all")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    hub = HubSource("EdinburghNLP/xsum", None, "test", "abc123")
    with pytest.raises(TaskError) as caught:
        list(make("xsum", settings(source="hub", hub=hub)).examples())
    message = str(caught.value)
    assert "\n" not in message
    for words in ("EdinburghNLP/xsum", "abc123", "task.source=files", "task.data_files", "task.source=bundled"):
        assert words in message


def test_hub_out_of_reach_is_noticed_at_once(settings, monkeypatch):
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_ENDPOINT", "https://hub.invalid")
    hub = HubSource("EdinburghNLP/xsum", None, "test", "abc123")
    with pytest.raises(TaskError, match=r"no connection to hub\.invalid.*task\.source=bundled"):
        list(make("xsum", settings(source="hub", hub=hub)).examples())


def test_hub_reads_the_pinned_revision(settings, monkeypatch):
    import datasets

    seen = []

    def load(*names, **options):
        seen.append((names, options))
        return ROWS

    monkeypatch.setattr(datasets, "load_dataset", load)
    hub = HubSource("EdinburghNLP/xsum", "default", "test", "abc123")
    assert len(list(make("xsum", settings(source="hub", hub=hub)).examples())) == 5
    assert seen == [(("EdinburghNLP/xsum", "default"), {"split": "test", "revision": "abc123"})]


def test_hub_without_a_hub_version(settings):
    with pytest.raises(TaskError, match=r"task\.source=hub: choose one of bundled, files"):
        make("qmsum", settings(source="hub"))
    with pytest.raises(TaskError, match=r"task\.source=hub"):
        list(make("xsum", settings(source="hub")).examples())


def test_progress_bars_are_left_as_they_were(tmp_path, settings):
    import datasets

    path = tmp_path / "a.jsonl"
    path.write_text(lines(ROWS))
    shown = not datasets.are_progress_bars_disabled()
    read(settings, path)
    assert shown == (not datasets.are_progress_bars_disabled())


def test_nothing_is_written_into_the_repository(tmp_path, settings):
    root = Path(__file__).resolve().parents[2] / "tasks"
    before = {entry for entry in root.rglob("*") if "__pycache__" not in entry.parts}
    path = tmp_path / "a.jsonl"
    path.write_text(lines(ROWS))
    read(settings, path)
    assert {entry for entry in root.rglob("*") if "__pycache__" not in entry.parts} == before
