"""scripts.bench: records, spreads and draft shapes."""

import subprocess
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from scripts.bench import drafts, records
from scripts.bench.measure import Spread, alternate, ratio
from scripts.bench.records import OpRow, RecordError, StepRow
from sparse.tree import Tree

ROW = StepRow(
    device="a, b",
    arch="tiny",
    dtype="bfloat16",
    engine="eager",
    context=2048,
    batch=1,
    rows=7,
    tree="chain",
    kept=512,
    arm="sparse",
    median_ms=1.25,
    p10_ms=1.0,
    p90_ms=2.0,
    limit_ms=0.5,
    bytes=12345678901.0,
    flops=2e12,
    threads=2,
    torch="2.13.0",
    date="2026-01-02T03:04:05Z",
    git="abc",
)


def test_rows_come_back_as_they_were_written(tmp_path):
    file = tmp_path / "deep" / "steps.csv"
    rows = [ROW, replace(ROW, arm="dense", kept=0, median_ms=3.5)]
    records.append(file, rows[:1])
    records.append(file, rows[1:])
    records.append(file, [])
    assert records.read(file, StepRow) == rows
    assert file.read_text().count("median_ms") == 1
    assert file.read_text().splitlines()[0].startswith("device,arch,dtype,engine,context,batch,rows,tree,kept,arm,")


def test_files_of_another_version_are_neither_extended_nor_read(tmp_path):
    file = tmp_path / "steps.csv"
    with pytest.raises(RecordError, match="no such file"):
        records.read(file, StepRow)
    records.append(file, [ROW])
    before = file.read_text()
    with pytest.raises(RecordError, match="other columns"):
        records.read(file, OpRow)
    file.write_text("device,arch\na,b\n")
    with pytest.raises(RecordError, match="other columns"):
        records.append(file, [ROW])
    assert file.read_text() == "device,arch\na,b\n"
    file.write_text(before.replace("2048", "many"))
    with pytest.raises(RecordError, match="many"):
        records.read(file, StepRow)


def test_latest_keeps_the_last_call_of_every_place():
    old, new = replace(ROW, date="2026-01-01T00:00:00Z"), replace(ROW, median_ms=9.0)
    other = replace(old, engine="compiled")
    assert records.latest([old, new, other]) == [new, other]


def test_the_revision_tells_changed_files_and_survives_without_git(tmp_path):
    assert records.revision(tmp_path).startswith("sources ")
    for command in (["init", "-q"], ["config", "user.email", "a@b"], ["config", "user.name", "a"]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    (tmp_path / "file").write_text("one")
    subprocess.run(["git", "add", "file"], cwd=tmp_path, check=True)
    subprocess.run(["git", "commit", "-qm", "one"], cwd=tmp_path, check=True)
    clean = records.revision(tmp_path)
    assert len(clean) == 12
    (tmp_path / "file").write_text("two")
    assert records.revision(tmp_path) == f"{clean}+"


def test_arms_alternate_and_rounds_turn_round():
    order, now = [], [0.0]

    def arm(name, seconds):
        def call():
            order.append(name)
            now[0] += seconds

        return call

    times = alternate({"a": arm("a", 1.0), "b": arm("b", 2.0)}, lambda: now[0], repeats=3, warmup=1)
    assert "".join(order) == "abbaabba"
    assert times == {"a": [1.0] * 3, "b": [2.0] * 3}


def test_ratios_are_taken_within_rounds():
    spread = ratio({"over": [2.0, 20.0, 8.0], "under": [1.0, 10.0, 1.0]}, "over", "under")
    assert (spread.median, spread.p10, spread.p90) == (2.0, 2.0, 8.0)
    assert Spread.of([3.0]).text() == "3.00 [3.00, 3.00]"
    assert Spread.of(range(1, 21)).p10 == 3 and Spread.of(range(1, 21)).p90 == 18


@given(st.integers(2, 64))
def test_trees_are_valid_and_the_path_leads_to_the_deepest_leaf(rows):
    shape = drafts.parse(f"tree{rows}")
    tree = shape.tree(torch.device("cpu"))
    assert tree is not None and tree.visible.shape == (rows, rows)
    path = shape.path()
    assert path[0] == 0 and len(path) == 1 + tree.depth
    assert torch.equal(tree.visible[path[-1]].nonzero().view(-1), torch.tensor(path))


def test_the_tree_of_sixty_branches_ten_ways_and_is_six_deep():
    shape = drafts.parse("tree60")
    assert shape.rows == 60 and shape.kind == "tree of depth 6" and len(shape.parents) == 59
    assert Tree(shape.parents).visible[1:, 0].all() and shape.parents[:10] == (-1,) * 10


def test_chains_need_no_tree():
    assert drafts.parse("7") == drafts.DraftShape("7", 7)
    assert drafts.parse("chain16").parents is None and drafts.parse("tree1").parents is None
    assert drafts.parse("chain3").path() == [0, 1, 2]


@pytest.mark.parametrize("text", ["", "0", "65", "tree", "7x", "-1", "ring5"])
def test_other_shapes_are_refused(text):
    with pytest.raises(ValueError, match=f"--drafts={text}"):
        drafts.parse(text)
