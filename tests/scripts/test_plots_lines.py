from dataclasses import replace

import matplotlib
import pytest

matplotlib.use("Agg")
from harness.evidence import rows
from harness.evidence.rows import Estimate, Split
from scripts import plots
from scripts.figures import context, lengths, split, style
from tests.drawings import check_labels, quietly_drawn
from tests.evidence_samples import config, stored_run

LENGTHS = (1024, 2048, 4096)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """A needle at three lengths with two budgets, one of them stale; articles at two; a length that stands alone."""
    folder = tmp_path_factory.mktemp("lines")
    for topk, sources in ((8, "abc"), (16, "old")):
        for size in LENGTHS:
            settings = config("needle", topk=topk, context_tokens=size)
            stored_run(folder, settings, prompt=size + 40, gain=1 + size / 8192, sources=sources, examples=4)
    for bucket, size in (("4k", 4000), ("8k", 8000)):
        stored_run(folder, config("squad_long", bucket=bucket), prompt=size, examples=4)
    stored_run(folder, config("needle", topk=64, context_tokens=2048), prompt=2088, examples=4)
    return rows.collect(folder, sources="abc")


def test_series_differ_in_the_length_of_prompts_alone(found):
    series = context.series(found)
    told = {
        (home[0], line[0].kept_tokens): [row.prompt_tokens for row in line]
        for home, lines in series.items()
        for line in lines
    }
    assert told == {
        ("squad_long", 512): [4000, 8000],
        ("needle", 256): [1064, 2088, 4136],
        ("needle", 512): [1064, 2088, 4136],
    }


@pytest.fixture(scope="module")
def drawn(found):
    yield from quietly_drawn("context", found)


def test_context_shows_both_speed_ups_with_the_limit(drawn, found):
    check_labels(drawn)
    line = [row for row in found if row.task_name == "needle" and row.kept_tokens == 256]
    over_dense, over_ar = drawn.axes[2:]
    curve = next(bars[0] for bars in over_dense.containers if list(bars[0].get_ydata()) == speeds(line))
    assert list(curve.get_xdata()) == [row.prompt_tokens for row in line]
    dotted = [list(one.get_ydata()) for one in over_dense.lines if one.get_linestyle() == ":"]
    assert [row.limit for row in line] in dotted
    assert [row.sparse_vs_ar.value for row in line] in [list(bars[0].get_ydata()) for bars in over_ar.containers]
    hollow = {one.get_markerfacecolor() for one in over_dense.lines if one.get_marker() in style.MARKERS}
    assert "white" in hollow and len(hollow) == 2
    assert {text.get_text() for text in drawn.legends[0].get_texts()} >= {"topk 8\u00d732", "hollow: stale"}


def speeds(line):
    return [row.sparse_vs_dense.value for row in line]


def test_one_length_makes_no_figure_over_context(found):
    assert plots.FIGURES["context"]([row for row in found if row.task == "needle 2048 tok"]) is None


def test_many_settings_are_capped_and_named(found):
    line = [row for row in found if row.task_name == "squad_long"]
    many = [
        replace(row, setting=f"setting {index}", config=row.config | {"seed": index})
        for index in range(30)
        for row in line
    ]
    for drawn in quietly_drawn("context", many):
        check_labels(drawn)
        assert len(drawn.axes[0].containers) == context.MOST_LINES
        assert "left out for lack of room: squad_long" in drawn.legends[0].get_title().get_text()


def test_intervals_of_acceptance_are_those_of_the_ratio_to_dense(found):
    row = replace(found[0], split={"sparse_vs_dense": Split(tokens_per_step=Estimate(0.9, (0.8, 1.1)))})
    dense = row.acceptance_length("dense")
    assert lengths.length(row) == Estimate(row.acceptance, pytest.approx((0.8 * dense, 1.1 * dense)))
    bare = replace(row, split={"sparse_vs_dense": Split()})
    assert lengths.length(bare) == Estimate(row.acceptance, None)


def test_factors_multiply_to_the_speed_up_also_in_runs_that_do_not_hold_them(found):
    for row in found:
        for one in (row, replace(row, split={"sparse_vs_dense": Split()})):
            tokens, steps = (split.factor(one, name).value for name in split.FACTORS)
            assert tokens * steps == pytest.approx(row.sparse_vs_dense.value, rel=1e-6)
        assert split.factor(row, "tokens_per_step").ci is not None


def test_split_draws_bars_from_one_and_their_product(found):
    line = [row for row in found if row.task_name == "squad_long"]
    for drawn in quietly_drawn("split", line):
        check_labels(drawn)
        for row, axis in zip(line, drawn.axes, strict=True):
            ends = [bar.get_x() + bar.get_width() for bar in axis.patches]
            assert ends == pytest.approx([split.factor(row, name).value for name in split.FACTORS])
            assert axis.containers[-1][0].get_xdata()[0] == row.sparse_vs_dense.value
            assert axis.get_xscale() == "log"


def test_one_drafter_shows_its_settings(found):
    chosen = [row for row in found if row.task == "needle 2048 tok"]
    for drawn in quietly_drawn("acceptance", chosen):
        check_labels(drawn)
        names = [label.get_text() for label in drawn.axes[0].get_yticklabels()]
        assert len(names) == 3 and all("lookup 6" in name for name in names)
        assert all(row.setting in " ".join(names) for row in chosen)


def test_the_most_telling_runs_are_those_at_both_ends_of_every_kind(found):
    first = found[0]
    place = (first.task, first.data, first.model, first.device)
    plain = [replace(first, fingerprint=f"a{index}", acceptance=float(index)) for index in range(20)]
    other = replace(first, fingerprint="ffn", axes=("ffn",), acceptance=0.0)
    stale = replace(first, fingerprint="old", stale=True, acceptance=99.0)
    masked = replace(first, fingerprint="masked", simulated=True, acceptance=99.0)
    shown, missing = style.telling({place: [stale, masked, *plain, other]}, lambda row: row.acceptance)
    names = [row.fingerprint for row in shown[place]]
    assert len(names) == style.MOST_RUNS and {"ffn", "a0", "a19"} <= set(names)
    assert {"old", "masked"}.isdisjoint(names) and names[:-1] == sorted(names[:-1], key=lambda name: int(name[1:]))
    assert len(names) + len(missing) == 23
    few = {place: [stale], ("other", *place[1:]): plain[:9]}
    assert style.telling(few, lambda row: row.acceptance) == (few, [])


def test_notes_name_what_is_left_out(found):
    many = [replace(found[0], setting=f"setting {index}") for index in range(style.MOST_NAMED + 3)]
    (note,) = style.left_out(many)
    assert "setting 0; setting 1" in note and note.endswith("and 3 more")
    assert style.left_out([]) == []


def test_every_figure_has_a_caption():
    assert list(plots.CAPTIONS) == list(plots.FIGURES)
    assert all(text.endswith(".") and text.count(". ") == 0 for text in plots.CAPTIONS.values())


def test_letters_of_a_pdf_stay_letters(found, tmp_path, monkeypatch):
    """Type 3 fonts are refused by publishers; a date would change the file with every call."""
    monkeypatch.setattr(plots, "FIGURES", {"split": split.split})
    _, file = plots.write(found[:2], tmp_path)
    content = file.read_bytes()
    assert b"/FontType 3" not in content and b"/Type3" not in content and b"/Type0" in content
    assert b"CreationDate" not in content
