import csv
import multiprocessing

import pytest

from harness.evidence import load_runs, rows
from harness.evidence.labels import TIMES
from tests.evidence_samples import config, stored_run


def labels(*configs):
    return labels_of.setting_labels(configs)


def test_settings_are_named_by_their_budget_and_what_else_varies():
    assert labels(config(topk=8), config(topk=16)) == [f"topk 8{TIMES}32", f"topk 16{TIMES}32"]
    assert labels(config(k=4), config(k=6)) == [f"topk 16{TIMES}32, draft.k=4", f"topk 16{TIMES}32, draft.k=6"]
    assert labels(config("xsum", k=4), config("squad", k=6)) == [f"topk 16{TIMES}32"] * 2
    assert labels(config() | {"attn": {"name": "dense"}}) == ["dense"]
    assert labels(config(limit=8), config(limit=24)) == [
        f"topk 16{TIMES}32, task.limit=8",
        f"topk 16{TIMES}32, task.limit=24",
    ]


@pytest.mark.parametrize(
    ("settings", "task", "data"),
    [
        (config(), "xsum", "bundled"),
        (config("squad_long", bucket="8k"), "squad_long 8k", "bundled"),
        (config("needle", context_tokens=6000, depth=0.5), "needle 6000 tok, depth 0.5", "synthetic"),
        (config(source="files", data_files=["a.jsonl", "b.jsonl"]), "xsum", "a.jsonl, b.jsonl"),
        (config(source="hub", hub={"path": "EdinburghNLP/xsum"}), "xsum", "EdinburghNLP/xsum"),
    ],
)
def test_tasks_say_how_long_and_from_where(settings, task, data):
    assert (rows.task_label(settings), rows.data_label(settings)) == (task, data)


def test_rows_are_sorted_selected_and_marked(tmp_path):
    stored_run(tmp_path, config("squad"), sources="old")
    stored_run(tmp_path, config("xsum", topk=64), argv=["run.py", "+experiment=table1"])
    stored_run(tmp_path, config("xsum", topk=8), experiment="table1")
    found = rows.collect(tmp_path, sources="abc")
    assert [(row.task, row.kept_tokens, row.marks) for row in found] == [
        ("xsum", 256, ()),
        ("xsum", 2048, ()),
        ("squad", 512, ("stale",)),
    ]
    assert [row.task for row in rows.collect(tmp_path, sources="abc", tasks=["squad"])] == ["squad"]
    assert [row.task for row in rows.collect(tmp_path, sources="abc", experiment="table1")] == ["xsum", "xsum"]
    assert rows.collect(tmp_path, sources="abc", experiment="other") == []


@pytest.mark.parametrize("how", [{"status": "failed", "reason": "no memory"}, {"required": {"sparse": ["moe."]}}])
def test_runs_that_do_not_count_show_no_number(tmp_path, how):
    stored_run(tmp_path, **how)
    (row,) = rows.collect(tmp_path, sources="abc")
    assert not row.counted and row.reason and row.marks[0] in ("failed", "invalid")
    assert row.sparse_vs_ar == row.delta == rows.Estimate()
    assert (row.limit, row.acceptance, dict(row.tokens_per_second), dict(row.quality)) == (None, None, {}, {})


def test_a_partial_run_counts_and_is_marked(tmp_path):
    stored_run(tmp_path, status="partial", reason="stopped")
    (row,) = rows.collect(tmp_path, sources="abc")
    assert row.counted and row.marks == ("partial",) and row.sparse_vs_ar.value > 1


def test_the_overview_has_a_line_for_each_ended_run(tmp_path):
    stored_run(tmp_path, config(topk=8))
    stored_run(tmp_path, config(topk=16), status="failed", reason="x")
    file = rows.write_overview(tmp_path, sources="abc")
    lines = list(csv.DictReader(file.open()))
    assert [line["kept_tokens"] for line in lines] == ["256", "512"]
    assert float(lines[0]["sparse_vs_ar_low"]) < float(lines[0]["sparse_vs_ar"]) < float(lines[0]["sparse_vs_ar_high"])
    assert lines[1]["status"] == "failed" and lines[1]["sparse_vs_ar"] == ""
    assert len(load_runs(tmp_path)) == 2


def _member(folder, topk):
    stored_run(folder, config(topk=topk), examples=2)
    rows.write_overview(folder, sources="abc")


def test_members_that_end_together_all_reach_the_overview(tmp_path):
    context = multiprocessing.get_context("spawn")
    members = [context.Process(target=_member, args=(tmp_path, topk)) for topk in (8, 16)]
    for member in members:
        member.start()
    for member in members:
        member.join()
    assert [member.exitcode for member in members] == [0, 0]
    lines = list(csv.DictReader((tmp_path / "summary.csv").open()))
    assert [line["kept_tokens"] for line in lines] == ["256", "512"]
