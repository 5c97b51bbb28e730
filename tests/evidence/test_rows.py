import csv
import multiprocessing

import pytest

from harness.evidence import labels as labels_of
from harness.evidence import load_runs, rows
from harness.evidence.labels import TIMES
from tests.evidence_samples import config, growing, stored_run

BLOCKS = {"name": "block_topk", "budget": "fixed", "topk": 32, "l0": 1024, "rho": 0.25, "block_size": 16}
FFN = {"name": "topk", "keep": 0.6667, "mask": "union"}
UNION = {"name": "union", "union": 6, "outside": "substitute", "free_loaded": False}
ANCHORS = {"name": "anchors", "anchors": "every", "every": 3, "layers": [], "theta": 0.7, "head_map": False}


def labels(*configs):
    return rows.setting_labels(configs)


def label(**groups):
    """The label of a run on its own, dense but for `groups`."""
    return labels(config() | {"attn": {"name": "dense"}} | groups)[0]


@pytest.mark.parametrize(
    ("groups", "text"),
    [
        ({"attn": BLOCKS | {"budget": "piecewise"}}, "piecewise L0=1024 rho=0.25"),
        ({"attn": BLOCKS | {"score": "oracle"}}, f"topk 32{TIMES}16 (simulated)"),
        ({"ffn": FFN}, "ffn keep 0.667 union"),
        ({"ffn": {"name": "threshold", "tau": 0.05, "mask": "token"}}, "ffn tau 0.05 token (simulated)"),
        ({"ffn": {"name": "quantile", "sparsity": 0.5, "mask": "root"}}, "ffn quantile 0.5 root"),
        ({"moe": UNION}, "moe union 6"),
        ({"moe": UNION | {"outside": "drop", "free_loaded": True}}, "moe union 6 drop free loaded"),
        ({"moe": UNION | {"name": "topp", "p": 0.9, "union": None, "outside": "drop"}}, "moe p 0.9"),
        ({"moe": UNION | {"name": "median_ratio", "m_max": 3, "union": 8}}, "moe median m 3 union 8"),
        ({"attn": BLOCKS, "ffn": FFN, "reuse": ANCHORS}, f"topk 32{TIMES}16, ffn keep 0.667 union, anchors every 3"),
        ({"reuse": ANCHORS | {"anchors": "list", "layers": [0, 4, 8]}}, "anchors 0,4,8"),
        ({"reuse": ANCHORS | {"anchors": "mass", "head_map": True}}, "anchors mass 0.7 head map"),
        ({"reuse": {"name": "skips", "skip": ["ffn"], "skip_layers": [3, 5]}}, "skip ffn in 3,5"),
    ],
)
def test_a_setting_is_named_by_the_axes_that_are_on(groups, text):
    assert label(**groups) == text


def test_mixed_sweeps_are_told_apart_and_not_by_what_another_choice_lacks():
    attn = [config() | {"attn": BLOCKS | {"topk": topk, "score": "mean"}} for topk in (8, 16, 32)]
    odd = config() | {"attn": BLOCKS | {"score": "bound"}}
    ffn = config() | {"attn": {"name": "dense"}, "ffn": FFN | {"survival": 0.7}}
    lists = [
        config() | {"attn": BLOCKS, "reuse": ANCHORS | {"anchors": "list", "layers": [*range(7), last]}}
        for last in (8, 9)
    ]
    found = labels(*attn, odd, ffn, *lists)
    assert found[:5] == [
        *(f"topk {topk}{TIMES}16" for topk in (8, 16, 32)),
        f"topk 32{TIMES}16, attn.score=bound",
        "ffn keep 0.667 union",
    ]
    assert len(set(found)) == len(found)


def test_runs_from_before_a_key_was_added_are_not_renamed_by_it():
    assert labels(config(topk=8), config(topk=16) | {"analysis": True, "calibration": None}) == [
        f"topk 8{TIMES}32",
        f"topk 16{TIMES}32",
    ]


def test_numbers_in_settings_are_sorted_by_value(tmp_path):
    for union in (10, 6, 4):
        stored_run(tmp_path, config() | {"attn": {"name": "dense"}, "moe": UNION | {"union": union}}, examples=2)
    assert [row.setting for row in rows.collect(tmp_path, sources="abc")] == [f"moe union {n}" for n in (4, 6, 10)]


def test_a_row_knows_density_fidelity_and_what_it_realised(tmp_path):
    store = stored_run(tmp_path, config(topk=8) | {"reuse": ANCHORS})
    (row,) = rows.collect(tmp_path, sources="abc")
    summary = store.summary()
    sparse, dense = (summary["arms"][arm] for arm in ("sparse", "dense"))
    assert row.axes == ("attention", "reuse") and not row.simulated and not row.carved
    assert row.density("attention") == pytest.approx(0.256) and row.density("experts") is None
    assert row.agreement.value == summary["compare"]["fidelity"]["agreement"] and row.agreement.ci is not None
    assert row.acceptance_length("dense") == dense["acceptance_length"]["pooled"]
    assert row.retrieving == pytest.approx(2 / 6)  # layers 0 and 3 of six
    time = sparse["step_ms"]["p50"] / dense["step_ms"]["p50"]
    read = sparse["bytes_per_step"] / dense["bytes_per_step"]
    assert row.time_ratio == pytest.approx(time) and row.byte_ratio == pytest.approx(read)
    assert row.realised == pytest.approx((1 - time) / (1 - read))
    assert row.mean_step_ms("sparse") == pytest.approx(1e3 * sparse["seconds"] / sparse["steps"])
    assert len(row.trace("similarity")) == len(row.trace("overlap")) == 6


@pytest.mark.parametrize("attn", [BLOCKS | {"score": "oracle"}, BLOCKS | {"topk": 500}])
def test_nothing_is_realised_where_nothing_is_saved_or_only_on_paper(tmp_path, attn):
    stored_run(tmp_path, config() | {"attn": attn})
    (row,) = rows.collect(tmp_path, sources="abc")
    assert row.time_ratio is not None and row.realised is None
    assert ("simulated" in row.marks) == row.simulated == (attn.get("score") == "oracle")


def test_runs_without_traces_have_rows(tmp_path):
    stored_run(tmp_path, traces=False)
    (row,) = rows.collect(tmp_path, sources="abc")
    assert row.trace("overlap") is None and row.agreement == rows.Estimate() and row.retrieving is None
    assert row.density("attention") == 0.25 and row.time_ratio is not None


def test_identity_leaves_out_keys_and_groups():
    one, other = config(topk=8), config(topk=16)
    assert labels_of.identity(one) != labels_of.identity(other)
    assert labels_of.identity(one, ("attn.topk",)) == labels_of.identity(other, ("attn.topk",))
    reused = one | {"reuse": ANCHORS}
    assert labels_of.identity(one, ("reuse",)) == labels_of.identity(reused, ("reuse",))
    assert labels_of.identity(one) == labels_of.identity(one | {"results_dir": "elsewhere"})


def test_settings_are_named_by_their_budget_and_what_else_varies():
    assert labels(config(topk=8), config(topk=16)) == [f"topk 8{TIMES}32", f"topk 16{TIMES}32"]
    assert labels(config(k=4), config(k=6)) == [f"topk 16{TIMES}32, lookup 4", f"topk 16{TIMES}32, lookup 6"]
    assert labels(config("xsum", k=4), config("squad", k=6)) == [f"topk 16{TIMES}32"] * 2
    assert labels(config() | {"attn": {"name": "dense"}}) == ["dense"]
    assert labels(config(limit=8), config(limit=24)) == [
        f"topk 16{TIMES}32, task.limit=8",
        f"topk 16{TIMES}32, task.limit=24",
    ]


SUFFIX = growing("suffix", 8, max_match=32, factor=2.0, earlier=False)
HEAD = growing("eagle3", 4, path=None, sample=False)
SELF = growing("selfsparse", 4, blocks=16, skip_layers=[], sample=False)
MODEL = growing("model", 5, path=None, revision=None, sample=False)
COMBINED = {"name": "combined", "min_match": 4, "second": "eagle3"} | {
    part["name"]: part for part in (SUFFIX, MODEL, SELF, HEAD)
}
SAMPLE = {"name": "sample", "temperature": 0.8, "top_p": 1.0, "top_k": None}


@pytest.mark.parametrize(
    ("draft", "text"),
    [
        ({"name": "none"}, "no drafts"),
        ({"name": "lookup", "k": 6, "max_ngram": 3}, "lookup 6"),
        (growing("lookup", 6, max_ngram=3), "lookup 6"),
        (growing("lookup", 4, 3, total=8), f"lookup tree 8 (3{TIMES}4)"),
        (SUFFIX | {"earlier": True, "adaptive": "gain"}, "suffix 8 + earlier outputs + adaptive gain"),
        (HEAD | {"depth": 6, "topk": 10}, f"eagle3 tree 60 (10{TIMES}6)"),
        (HEAD | {"path": "heads/small_1", "sample": True}, "eagle3 4 (small_1) sampled"),
        (MODEL, "model 5 (the target itself)"),
        (MODEL | {"path": "some/folder/Tiny-30M/"}, "model 5 (Tiny-30M)"),
        (SELF | {"adaptive": "confidence"}, "selfsparse 4 (16 blocks) + adaptive confidence 0.3"),
        (SELF | {"blocks": None, "skip_layers": [3, 5]}, "selfsparse 4 (without layers 3,5)"),
        (growing("oracle", acceptance=0.7, forced=False), "oracle 0.7 chain 6"),
        (growing("oracle", 6, 10, acceptance=0.65, forced=True), f"oracle 0.65 tree 60 (10{TIMES}6) forced"),
        (COMBINED, "suffix 8, else eagle3 4"),
        (COMBINED | {"second": "model"}, "suffix 8, else model 5 (the target itself)"),
    ],
)
def test_a_drafter_is_named_by_the_form_of_its_drafts(draft, text):
    assert labels_of.draft_label(config() | {"draft": draft}) == text


@pytest.mark.parametrize(
    ("decode", "text"),
    [
        ({"name": "greedy"}, ""),
        (SAMPLE, "temperature 0.8"),
        (SAMPLE | {"top_p": 0.9, "top_k": 50}, "temperature 0.8 top-p 0.9 top-k 50"),
        (SAMPLE | {"name": "typical", "epsilon": 0.09, "delta": 0.3}, "typical temperature 0.8"),
        ({"name": "topk_match", "k": 2}, "top-2 match"),
    ],
)
def test_decoding_is_named_where_it_is_not_greedy(decode, text):
    assert labels_of.decode_label(config() | {"decode": decode}) == text
    assert labels_of.decode_label(config()) == ""


def test_settings_tell_drafter_decoding_and_batch_only_where_these_differ():
    dense = config() | {"attn": {"name": "dense"}}
    old, new = dense, dense | {"draft": growing("lookup", max_ngram=3), "engine": {"batch_size": 1, "wave": None}}
    assert labels(old, new) == ["dense", "dense"]  # an earlier version's names for the same
    assert labels(new, new | {"draft": HEAD}) == ["dense, lookup 6", "dense, eagle3 4"]
    sampled, four = new | {"decode": SAMPLE}, new | {"engine": {"batch_size": 4, "wave": None}}
    assert labels(new, sampled, four) == ["dense", "dense, temperature 0.8", "dense, batch 4"]
    assert labels(sampled, sampled) == ["dense", "dense"]
    assert labels(new, config("squad") | {"attn": {"name": "dense"}, "draft": HEAD}) == ["dense", "dense"]


def test_drafters_of_one_form_are_told_apart_by_what_else_they_read():
    short, long = (config() | {"draft": growing("lookup", max_ngram=n)} for n in (3, 5))
    found = labels_of.drafting_labels([short, long, config() | {"draft": HEAD}])
    assert [names.drafter for names in found] == ["lookup 6, max_ngram=3", "lookup 6, max_ngram=5", "eagle3 4"]
    first, second = (config() | {"draft": COMBINED | {"suffix": SUFFIX | {"factor": f}}} for f in (1.0, 2.0))
    unread = config() | {"draft": COMBINED | {"model": MODEL | {"depth": 9}, "suffix": SUFFIX | {"factor": 1.0}}}
    text = "suffix 8, else eagle3 4"
    assert [names.drafter for names in labels_of.drafting_labels([first, unread])] == [text, text]
    assert [names.drafter for names in labels_of.drafting_labels([first, second])] == [
        f"{text}, suffix.factor=1",
        f"{text}, suffix.factor=2",
    ]


def test_a_row_knows_its_drafts(tmp_path):
    histograms = [{"dense": (0, 3, 1), "sparse": (0, 2)}, {"dense": (0, 0, 0, 4)}]
    stored_run(tmp_path, config() | {"draft": HEAD}, examples=2, histograms=histograms)
    (row,) = rows.collect(tmp_path, sources="abc")
    assert row.drafting == ("eagle3 4", "", "") and not row.forced
    assert row.histogram("dense") == (0, 3, 1, 4) and row.histogram("sparse_ar") == ()
    assert row.acceptance_length("dense") == pytest.approx(17 / 8)
    assert row.request_acceptance_length("dense") == pytest.approx((5 / 4 + 3) / 2)
    assert row.drafted("tokens_per_step", "dense") == 6 and row.drafted("time_share", "ar") == 0
    assert row.drafted("accepted", "dense") == pytest.approx(9 / 48)
    assert row.drafted("time_share", "dense") == pytest.approx(0.1) and row.drafted("time_share", "sparse_ar") is None


def test_a_forced_oracle_is_marked_in_every_row(tmp_path):
    for forced in (True, False):
        stored_run(tmp_path, config() | {"draft": growing("oracle", acceptance=0.7, forced=forced)}, examples=2)
    assert {row.forced: row.marks for row in rows.collect(tmp_path, sources="abc")} == {
        True: ("forced oracle",),
        False: (),
    }


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
    assert row.sparse_vs_ar == rows.Estimate() and row.delta == row.reference_floor == rows.Difference()
    assert set(row.split.values()) == {rows.Split()}
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
