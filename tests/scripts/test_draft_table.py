import csv
import re

import matplotlib
import pytest

matplotlib.use("Agg")
from matplotlib import pyplot

from harness.evidence import rows
from scripts import cells, draft_table, plots, tables
from tests.evidence_samples import config, growing, stored_run
from tests.scripts.test_plots import check_labels, quietly_drawn
from tests.scripts.test_tables import screen

LOOKUP = growing("lookup", max_ngram=3)
SUFFIX = growing("suffix", 8, max_match=32, factor=2.0, earlier=False)
TREE = growing("eagle3", 6, 10, total=60, adaptive="gain", path=None, sample=False)
ORACLE = growing("oracle", acceptance=0.7, forced=True)
SAMPLE = {"name": "sample", "temperature": 0.8, "top_p": 1.0, "top_k": None}
HISTOGRAMS = [
    {"dense": (0, 6, 2, 0, 1, 0, 0, 1), "sparse": (0, 4, 4)},
    {"dense": (0, 5, 3, 2), "sparse": (0, 1, 0, 1)},
]
"""Dense: 20 steps with 11, 5, 2, 1, 0, 0 and 1 of 1 to 7 new tokens, 38 tokens; sparse: 10 steps, 16 tokens."""


def put(folder, draft=LOOKUP, task="xsum", *, topk=16, arms=("ar", "dense", "sparse"), traces=True, **changes):
    """A run of two examples whose histograms are HISTOGRAMS, under the sources "abc"."""
    groups = {key: changes.pop(key) for key in ("decode", "engine", "ffn", "model") if key in changes}
    settings = config(task, topk=topk) | {"draft": draft} | groups
    options = {"examples": 2, "arms": arms, "traces": traces, "histograms": HISTOGRAMS}
    return stored_run(folder, settings, **(options | changes))


def collected(folder):
    return rows.collect(folder, sources="abc")


def drafters(found):
    return [(row.drafting, row.setting) for members in draft_table.compared(found).values() for row in members]


def fill(folder):
    """Every kind of row: chains, a tree, sampling, a batch, forced and stale ones, no sparse arm, before drafts."""
    for task in ("xsum", "squad_long"):
        put(folder, LOOKUP, task)
        put(folder, SUFFIX, task, sources="old")
        put(folder, TREE, task, arms=("ar", "dense"))
    put(folder, TREE, decode=SAMPLE)
    put(folder, LOOKUP, engine={"name": "eager", "batch_size": 4, "wave": None})
    put(folder, ORACLE)
    put(folder, growing("lookup", 3, max_ngram=3), traces=False)
    put(folder, SUFFIX, ffn={"name": "topk", "keep": 0.5, "mask": "token"})
    put(folder, LOOKUP, ffn={"name": "topk", "keep": 0.5, "mask": "token"})


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("drafters")
    fill(folder)
    return folder


@pytest.fixture(scope="module")
def found(results):
    return collected(results)


@pytest.fixture(scope="module")
def figure(found):
    yield from quietly_drawn("acceptance", found)


def test_a_row_holds_what_was_counted(tmp_path):
    put(tmp_path)
    put(tmp_path, TREE, status="partial", reason="stopped")
    (grid,) = draft_table.grids(collected(tmp_path))
    assert grid.title == "SmolLM2-135M-Instruct on CPU, 2 threads: drafters"
    first, second = (dict(zip(grid.header, line, strict=True)) for line in grid.rows)
    assert (first["task"], first["drafter"], first["sparse arm"]) == ("xsum", "lookup 6", "topk 16\u00d732")
    assert (first["n"], first["prompt\ntokens"], first["mark"]) == ("2", "1000", "")
    assert first["drafted\ndense\n\u2192 sparse"] == "6.0\n\u2192 6.0"
    assert first["AL\ndense"] == "1.90\n(1.90)"  # 38 / 20; both requests have ten steps
    assert first["AL\nsparse"] == "1.60\n(1.75)"  # 16 / 10; the mean of 12 / 8 and 4 / 2
    assert first["new tokens\n% of steps"] == "1: 55, 2: 25,\n3: 10, 4+: 10"
    assert first["draft time\ndense\n\u2192 sparse"] == "10%\n\u2192 10%"
    row = collected(tmp_path)[0]
    assert first["dense\n/ AR"] == cells.estimate(row.dense_vs_ar) != cells.NOTHING
    assert first["sparse\n/ AR"] == cells.estimate(row.sparse_vs_ar)
    assert first["sparse\n/ dense"] == cells.estimate(row.sparse_vs_dense)
    assert (second["drafter"], second["mark"]) == ("eagle3 tree 60 (10\u00d76) + adaptive gain", "partial")
    assert not {"decoding", "batch"} & set(grid.header)


def test_what_was_not_measured_is_a_dash(tmp_path):
    put(tmp_path, traces=False)
    put(tmp_path, SUFFIX, arms=("ar", "dense"))
    put(tmp_path, TREE, arms=("sparse",))
    (grid,) = draft_table.grids(collected(tmp_path))
    old, dense, sparse = (dict(zip(grid.header, line, strict=True)) for line in grid.rows)
    nothing = cells.NOTHING
    drafted, time, shown = "drafted\ndense\n\u2192 sparse", "draft time\ndense\n\u2192 sparse", "new tokens\n% of steps"
    assert (old[drafted], old[time], old["AL\ndense"]) == (nothing, nothing, "1.90\n(1.90)")
    assert (dense[drafted], dense[time]) == ("6.0\n\u2192 \u2013", "10%\n\u2192 \u2013")
    assert dense["AL\nsparse"] == dense["sparse\n/ AR"] == dense["sparse\n/ dense"] == nothing != dense["dense\n/ AR"]
    assert sparse["AL\ndense"] == sparse[shown] == sparse["dense\n/ AR"] == sparse["sparse\n/ AR"] == nothing
    assert sparse["AL\nsparse"] == "1.60\n(1.75)"
    lines = {line["drafter"]: line for line in draft_table.table(collected(tmp_path))}
    assert lines["lookup 6"]["dense_draft_time_share"] is lines["suffix 8"]["sparse_acceptance_length"] is None
    assert lines["suffix 8"]["sparse_histogram"] == "" and lines["suffix 8"]["sparse_vs_dense"] is None


@pytest.mark.parametrize(
    ("histogram", "expected"),
    [
        ((), {}),
        ((0, 0), {}),
        ((0, 4), {"1": 1.0, "2": 0.0, "3": 0.0, "4+": 0.0}),
        ((1, 1, 0, 0, 1, 1), {"0": 0.25, "1": 0.25, "2": 0.0, "3": 0.0, "4+": 0.5}),
    ],
)
def test_shares_are_of_all_steps(histogram, expected):
    assert draft_table.shares(histogram) == expected


def test_there_is_no_table_without_drafters_to_compare(tmp_path):
    put(tmp_path, LOOKUP, topk=8)
    put(tmp_path, LOOKUP, topk=16)
    put(tmp_path, SUFFIX, "squad")
    put(tmp_path, TREE, status="failed", reason="no memory")
    put(tmp_path, {"name": "none"}, arms=("ar", "sparse_ar"))
    found = collected(tmp_path)
    assert draft_table.compared(found) == {}
    assert not [file for file in tables.write(found, tmp_path / "t") if file.stem == "drafters"]
    assert "Acceptance length (AL)" not in screen(found, 160)
    put(tmp_path, LOOKUP, topk=16, decode=SAMPLE)
    assert [names for names, _ in drafters(collected(tmp_path))] == [
        ("lookup 6", "", ""),
        ("lookup 6", "temperature 0.8", ""),
    ]


def test_models_and_devices_are_not_compared_with_each_other(tmp_path):
    put(tmp_path, LOOKUP)
    put(tmp_path, SUFFIX, device="GPU")
    put(tmp_path, TREE, model={"name": "other", "kind": "smollm2", "dtype": "bfloat16"})
    assert drafters(collected(tmp_path)) == []


def test_a_sweep_of_budgets_does_not_hide_the_drafters(tmp_path):
    for topk in (4, 8, 16):
        put(tmp_path, LOOKUP, topk=topk)
    put(tmp_path, SUFFIX, topk=16)
    put(tmp_path, TREE, topk=32)  # compared with nothing, but shown nowhere else
    wide = "topk 16\u00d732"
    assert drafters(collected(tmp_path)) == [
        (("lookup 6", "", ""), wide),
        (("suffix 8", "", ""), wide),
        (("eagle3 tree 60 (10\u00d76) + adaptive gain", "", ""), "topk 32\u00d732"),
    ]


def test_files_are_written_in_the_formats_of_the_others(results, found):
    assert tables.main(["--results", str(results)]) == 0
    folder = results / "tables"
    text = (folder / "drafters.md").read_text()
    assert text.startswith(draft_table.HEAD) and "the bonus token included (METHOD section 8)" in text
    assert draft_table.LEGEND in text and draft_table.FORCED_NOTE in text and "made by other sources" in text
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len({re.sub(r"\\\|", "", line).count("|") for line in lines}) == 1 and len(lines) == 2 + 12
    marks = {line.split(" | ")[1]: line.split(" | ")[-1].rstrip("| ") for line in lines}
    assert marks["oracle 0.7 chain 6 forced"] == "stale forced oracle"
    assert "oracle" not in (folder / "reference.md").read_text() and "oracle" in (folder / "results.md").read_text()
    assert {line.split(" | ")[2] for line in lines[2:]} == {"greedy", "temperature 0.8"}
    assert {line.split(" | ")[3] for line in lines[2:]} == {"1", "4"}
    tex = (folder / "drafters.tex").read_text()
    assert tex.isascii() and tex.count(r"\begin{table*}") == tex.count(r"\end{table*}") == 1
    assert r"tree 60 (10$\times$6)" in tex and "Acceptance length (AL)" in tex
    with (folder / "drafters.csv").open() as stream:
        read = list(csv.DictReader(stream))
    assert len(read) == 12 and {line["batch_size"] for line in read} == {"1", "4"}
    line = next(line for line in read if line["drafter"] == "oracle 0.7 chain 6 forced")
    assert line["dense_histogram"] == "1:11 2:5 3:2 4:1 7:1" and line["marks"] == "stale, forced oracle"
    assert float(line["dense_draft_accepted"]) == pytest.approx(18 / 120)
    row = next(row for row in found if row.fingerprint == line["fingerprint"])
    assert float(line["sparse_vs_dense"]) == pytest.approx(row.sparse_vs_dense.value, rel=1e-5)


@pytest.mark.parametrize("width", [160, 120, 100])
def test_the_screen_shows_it_and_fits(found, width):
    text = screen(found, width)
    assert max(len(line) for line in text.splitlines()) <= width
    assert ": drafters" in text and "1.90" in text and "(1.75)" in text and "temperature 0.8" in text


def test_the_figure_shows_lengths_and_steps_of_both_arms(figure, found):
    grouped = draft_table.compared(found)
    grid = [figure.axes[index : index + 2] for index in range(0, len(figure.axes), 2)]
    for (left, right), ((task, *_), members) in zip(grid, grouped.items(), strict=True):
        assert left.get_title(loc="left").startswith(f"{task} (bundled), n=2\n")
        names = [label.get_text().replace("\n", " ") for label in left.get_yticklabels()]
        assert all(name.startswith(row.drafting.drafter) for name, row in zip(names, members, strict=True))
        pooled = [
            (line.get_label(), line.get_xdata()[0]) for line in left.lines if line.get_label() in ("dense", "sparse")
        ]
        measured = [(arm, row.acceptance_length(arm)) for row in members for arm in draft_table.ARMS]
        assert pooled == [pair for pair in measured if pair[1] is not None]
        ticks = [line.get_xdata()[0] for line in left.lines if line.get_marker() == "|"]
        own = [row.request_acceptance_length(arm) for row in members for arm in draft_table.ARMS]
        assert ticks == [value for value in own if value is not None]
        bars = {}
        for patch in right.patches:
            bars.setdefault(round(patch.get_y(), 2), []).append(patch.get_width())
        assert len(bars) == len(pooled) and all(sum(widths) == pytest.approx(100) for widths in bars.values())
        assert bars[round(-0.19 - 0.18, 2)] == pytest.approx([55, 25, 10, 5, 0, 5])


def test_the_figure_fits_and_says_what_marks_mean(figure):
    check_labels(figure)
    said = figure.get_supxlabel().replace("\n", " ")
    assert draft_table.FORCED_NOTE in said and "show no saving" in said
    names = [label.get_text() for axis in figure.axes for label in axis.get_yticklabels()]
    assert any("[stale]" in name for name in names) and not any("[forced oracle]" in name for name in names)


def test_the_figure_of_two_drafters_is_written_beside_the_others(tmp_path, monkeypatch):
    put(tmp_path, LOOKUP)
    put(tmp_path, SUFFIX)
    found = collected(tmp_path)
    chosen = {name: plots.FIGURES[name] for name in ("tradeoff", "acceptance")}
    monkeypatch.setattr(plots, "FIGURES", chosen)
    written = {file.name for file in plots.write(found, tmp_path / "figures")}
    assert {"acceptance.png", "acceptance.pdf", "tradeoff.png"} <= written
    drawn = plots.FIGURES["acceptance"](found)
    drawn.canvas.draw()
    check_labels(drawn)
    assert [label.get_text() for label in drawn.axes[0].get_yticklabels()] == ["lookup 6", "suffix 8"]
    assert drawn.get_supxlabel() == ""
    pyplot.close(drawn)
