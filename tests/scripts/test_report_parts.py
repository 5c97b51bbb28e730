"""What the page tells of a run: its worst examples, its charts and its differences."""

import json

import pytest

from harness.evidence import load_runs, rows
from scripts.reporting import charts, examples, overview, runs
from tests.evidence_samples import config, proof, record, stored_run


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parts")
    for topk, k, limit in ((8, 6, 4), (16, 6, 4), (16, 3, 4), (16, 6, 5), (32, 6, 4)):
        stored_run(folder, config(topk=topk, k=k, limit=limit), examples=4)
    stored = {run.fingerprint: run for run in load_runs(folder)}
    return rows.collect(folder, sources="abc"), stored


def outputs(run, told):
    """Write records: example -> (dense ids, sparse ids, dense grade, sparse grade)."""
    lines = []
    for name, (dense, sparse, *grades) in told.items():
        for arm, ids, grade in zip(("dense", "sparse"), (dense, sparse), grades, strict=True):
            changes = {"output_ids": tuple(ids), "grade": {"rougeL": grade}, "histogram": (0, len(ids) - 1)}
            lines.append(record(name, arm, text=" ".join(map(str, ids)), **changes).to_json())
    (run.path / "records.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


TOLD = {
    "equal": ([1, 2, 3], [1, 2, 3], 50.0, 50.0),
    "late": ([1, 2, 3, 4], [1, 2, 3, 5], 40.0, 10.0),
    "early": ([1, 2, 3], [1, 9, 3], 20.0, 60.0),
    "short": ([1, 2, 3], [1, 2], 30.0, 29.0),
}


@pytest.fixture
def judged(sweep):
    found, stored = sweep
    row = found[0]
    run = stored[row.fingerprint]
    before = (run.path / "records.jsonl").read_text()
    outputs(run, TOLD)
    yield row, run
    (run.path / "records.jsonl").write_text(before)


def test_the_worst_lose_most_or_part_first(judged):
    told = examples.worst(*judged, most=1, texts=True)
    assert [(pair.example, pair.why) for pair in told.pairs] == [
        ("late", ("largest loss",)),
        ("early", ("parts earliest",)),
    ]
    assert (told.examples, told.lost, told.gained, told.identical) == (4, 2, 1, 1)
    late, early = told.pairs
    assert (late.place, late.tokens, late.loss, late.lengths) == (3, (4, 5), 30.0, (4, 4))
    assert (early.place, early.tokens, early.loss) == (1, (2, 9), -40.0)
    assert [text.parting for text in late.texts] == ["4", "5"]


def test_an_example_on_both_lists_is_shown_once_and_equal_ones_never(judged):
    told = examples.worst(*judged, most=4, texts=True)
    assert [pair.example for pair in told.pairs] == ["late", "short", "early"]
    assert told.pairs[1].why == ("largest loss", "parts earliest") and told.pairs[1].tokens == (3, None)


def test_without_texts_places_and_grades_remain(judged):
    told = examples.worst(*judged, most=4, texts=False)
    assert all(pair.texts is None and pair.tokens == () for pair in told.pairs)
    assert [pair.place for pair in told.pairs] == [3, 2, 1] and told.pairs[0].grades == (("rougeL", 40.0, 10.0),)


def test_a_torn_file_is_read_up_to_there_and_left_alone(judged):
    row, run = judged
    file = run.path / "records.jsonl"
    torn = file.read_bytes()[:-20]
    file.write_bytes(torn)
    assert examples.worst(row, run, most=4, texts=True).examples == 3
    assert file.read_bytes() == torn
    file.unlink()
    assert examples.worst(row, run, most=4, texts=True) is None


@pytest.mark.parametrize(
    "dense, sparse, told",
    [
        ("a small cat sat", "a small car sat", [("a small ", "cat", " sat"), ("a small ", "car", " sat")]),
        ("cat", "car", [("", "cat", ""), ("", "car", "")]),
        ("one two", "one two three", [("one two", "", ""), ("one two", " three", "")]),
        ("one two", "one twofold x", [("one ", "two", ""), ("one ", "twofold", " x")]),
        ("", "one", [("", "", ""), ("", "one", "")]),
        ("a b\u2028c", "a b\u2028d", [("a b\u2028", "c", ""), ("a b\u2028", "d", "")]),
        ("same", "same", [("same", "", ""), ("same", "", "")]),
    ],
)
def test_texts_part_at_a_whole_word(dense, sparse, told):
    cut = examples.parted(dense, sparse)
    assert [(text.same, text.parting, text.rest) for text in cut] == told
    assert [text.same + text.parting + text.rest for text in cut] == [dense, sparse]
    assert [text.ends for text in cut] == [dense != sparse and not parting for _, parting, _ in told]


def test_bars_are_as_tall_as_the_counts_and_long_tails_are_joined(sweep):
    row = sweep[0][0]
    for chart in charts.histograms(row):
        counts = row.histogram(chart.arm)
        assert chart.steps == sum(counts)
        tallest = max(bar.height for bar in chart.bars)
        assert tallest == charts.TALL
        assert [bar.height / tallest * max(counts) for bar in chart.bars] == pytest.approx(list(counts[1:]))
    long = charts._histogram("dense", (0, 5, *[0] * 11, 2, 3))
    assert (long.bars[-1].label, long.bars[-1].share, len(long.bars)) == ("12+", "50", 12)
    assert long.bars[-1].x + charts.BAR + charts.GAP == long.width


def test_components_fill_their_step_on_one_scale(sweep):
    row = sweep[0][0]
    stacked = charts.stacks(row)
    assert {stack.arm for stack in stacked} >= {"dense", "sparse"}
    scale = charts.STACK / max(stack.total for stack in stacked)
    for stack in stacked:
        assert stack.total == pytest.approx(row.mean_step_ms(stack.arm))
        end = 0.0
        for segment in stack.segments:
            assert segment.x == pytest.approx(end, abs=0.02)
            assert segment.width == pytest.approx(segment.ms * scale, abs=0.02)
            end = segment.x + segment.width
    names = [name for name, _ in charts.components(stacked)]
    assert "select" in names and len(names) == len(set(names))


def test_differences_are_told_against_what_most_peers_have(sweep):
    found, stored = sweep
    for detail in runs.details(found, stored):
        expected = {"attn.topk": "16"} if detail.row.config["attn"]["topk"] != 16 else {}
        expected |= {"task.limit": "4"} if detail.row.config["task"]["limit"] != 4 else {}
        expected |= {"draft.k": "6"} if detail.row.config["draft"]["k"] != 6 else {}
        assert {line.key: line.usual for line in detail.differences} == expected
        assert detail.peers == len(found)


def test_where_no_value_is_the_usual_one_all_others_are_told():
    members = [{"a": value, "same": 1} for value in (10, 9, 100)] + [{"same": 1}]
    assert runs.differences(members[0], members) == [runs.Difference("a", "10", "9, 100")]
    assert runs.differences(members[3], members) == []


def test_a_column_that_says_nothing_of_any_run_is_left_out(sweep):
    found, stored = sweep
    titles = [column.title for column in runs.columns(found, stored)]
    assert "marks" not in titles and {"task", "sparse / dense", "quality", "start"} <= set(titles)


def test_ranges_and_ends(sweep):
    assert overview.span([], 1) == "\u2013" and overview.span([1.04, 1.0], 1) == "1.0"
    assert overview.span([0.5, -2, 1], 1, sign=True) == "\u22122.0 to +1.0"
    found, stored = sweep
    glance = overview.glance(found, stored)
    ratios = [row.sparse_vs_dense.value for row in found]
    assert glance.rows[0][glance.header.index("sparse\n/ dense")] == overview.span(ratios, 2)


def test_dirty_trees_and_other_load_are_told(tmp_path):
    git = {"sha": "0123456789abcdef", "dirty": True}
    stored_run(tmp_path, config(), git=git, other_load=0.281, argv=["run.py", "task.data_files=[/home/me/x.jsonl]"])
    found, stored = rows.collect(tmp_path, sources="abc"), {run.fingerprint: run for run in load_runs(tmp_path)}
    facts = {fact.name: fact for fact in overview.facts(found, stored)}
    assert facts["Commit"].value == "0123456789 with changes" and "28% at most" in facts["Other load"].value
    assert proof()["device"] == facts["Machine"].value
    (command,) = overview.commands(found, stored)
    assert command.text == "python run.py 'task.data_files=[x.jsonl]'" and command.runs == tuple(found)
