import random
from dataclasses import replace

import matplotlib
import pytest

matplotlib.use("Agg")
from matplotlib import pyplot

from harness.evidence import rows
from harness.evidence.rows import Difference, Estimate
from scripts import plots
from scripts.figures import beside, pareto
from scripts.figures.front import front
from tests.drawings import check_labels, quietly_drawn
from tests.evidence_samples import config, stored_run

NAN = float("nan")


@pytest.mark.parametrize(
    ("points", "best"),
    [
        ([], []),
        ([(1.0, 2.0)], [0]),
        ([(3.0, 3.0), (1.0, 1.0), (2.0, 2.0)], [1, 2, 0]),  # by growing loss
        ([(1.0, 2.0), (2.0, 1.0)], [0]),  # more loss, less gain
        ([(1.0, 2.0), (1.0, 3.0)], [1]),  # equal loss, less gain
        ([(1.0, 2.0), (2.0, 2.0)], [0]),  # more loss, equal gain
        ([(1.0, 2.0), (1.0, 2.0), (2.0, 2.0)], [0, 1]),  # equals stand together
        ([(None, 9.0), (1.0, None), (NAN, 9.0), (0.0, NAN), (1.0, 1.0)], [4]),
        ([(-1.0, 1.0), (0.0, 1.5), (0.5, 1.2)], [0, 1]),  # a negative loss is a gain in quality
    ],
)
def test_the_front_holds_what_nothing_dominates(points, best):
    assert front(points) == best


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Thirty settings of one task, made of six runs, and one run of another."""
    folder = tmp_path_factory.mktemp("pareto")
    for seed in range(6):
        stored_run(folder, config("xsum", topk=2 + seed), seed=seed, gain=1.6 - 0.1 * seed, examples=4)
    stored_run(folder, config("squad"), examples=4)
    stored = rows.collect(folder, sources="abc")
    rng = random.Random(0)
    return [
        row if copy == 0 else moved(row, copy, rng) for row in stored for copy in range(5 if row.task == "xsum" else 1)
    ]


def moved(row, copy, rng):
    """Another setting, somewhat faster and more or less lossy."""
    new = {"fingerprint": f"{row.fingerprint}/{copy}", "setting": f"{row.setting}, variant {copy}"}
    for name, by in (("sparse_vs_ar", 0.1), ("agreement", -0.02), ("reference_delta", 0.005), ("delta", 1.0)):
        old, shift = getattr(row, name), by * rng.uniform(0, copy)
        new[name] = replace(old, value=old.value + shift, ci=tuple(end + shift for end in old.ci))
    return replace(row, **new)


@pytest.fixture(scope="module")
def drawn(found):
    yield from quietly_drawn("pareto", found)


def points(axis):
    """(x, y) of each setting, with the colour of its mark."""
    lines = [bars[0] for bars in axis.containers]
    return [((line.get_xdata()[0], line.get_ydata()[0]), line.get_color()) for line in lines]


def test_thirty_settings_are_drawn_and_those_of_the_front_are_named(drawn, found):
    check_labels(drawn)
    members = [row for row in found if row.task == "xsum"]
    (part,) = drawn.subfigs
    assert "xsum" in part._suptitle.get_text() and "squad" not in part._suptitle.get_text()  # one run makes no front
    named = dict(zip(pareto._numbers(pareto.panels_of(members)), part.legends[0].get_texts(), strict=True))
    for axis, loss in zip(drawn.axes, pareto.LOSSES, strict=True):
        places = [(loss.of(row).value, row.sparse_vs_ar.value) for row in members]
        best = {places[index] for index in front(places)}
        assert {place for place, colour in points(axis) if colour != pareto.PALE} == best and len(points(axis)) == 30
        told = {int(text.get_text()): text.xy for text in axis.texts}
        assert set(told.values()) == best
        for number, place in told.items():
            name = list(named)[number - 1]
            row = next(row for row in members if row.fingerprint == name)
            assert named[name].get_text() == row.setting and place == (loss.of(row).value, row.sparse_vs_ar.value)


def test_losses_grow_with_what_is_lost_and_keep_their_intervals(found):
    row = replace(
        found[0],
        agreement=Estimate(0.9, (0.8, 0.95)),
        reference_delta=Difference(-0.02, (-0.05, 0.01)),
        delta=Difference(1.5, None),
        floor=Difference(0.5, (-1.0, 2.0)),
    )
    fidelity, reference, quality = (loss.of(row) for loss in pareto.LOSSES)
    assert fidelity.value == pytest.approx(10.0) and fidelity.ci == pytest.approx((5.0, 20.0))
    assert reference == Estimate(0.02, (-0.01, 0.05))
    assert quality == Estimate(-1.5, None)
    assert pareto.LOSSES[2].floor(row).ci == (-2.0, 1.0)


def test_simulated_and_forced_runs_are_never_on_the_front(found):
    members = [row for row in found if row.task == "xsum"][:4]
    fast = Estimate(9.0, (8.0, 10.0))
    masked = replace(members[0], simulated=True, sparse_vs_ar=fast, delta=Difference(50.0))
    chosen = replace(members[1], forced=True, sparse_vs_ar=fast, delta=Difference(50.0))
    panel = pareto.panels_of([masked, chosen, *members[2:]])[-1]
    assert masked in panel.rows and chosen not in panel.rows
    assert masked not in [panel.rows[index] for index in panel.best] and panel.best


def test_stale_runs_are_hollow_and_missing_intervals_have_no_bars(found):
    members = [row for row in found if row.task == "xsum"][:3]
    bare = replace(members[0], stale=True, sparse_vs_ar=Estimate(3.0), agreement=Estimate(1.0))
    lacking = replace(members[1], agreement=Estimate(), reference_delta=Difference(), delta=Difference())
    figure = plots.FIGURES["pareto"]([bare, lacking, members[2]])
    axis = figure.axes[0]
    assert [line[0].get_markerfacecolor() == "white" for line in axis.containers] == [True, False]
    segments = [collection.get_segments()[0] for collection in axis.containers[0][2]]
    assert all((segment[0] == segment[1]).all() for segment in segments)
    assert "hollow: stale" in [text.get_text() for text in figure.legends[0].get_texts()]
    pyplot.close(figure)


def test_speed_is_over_dense_where_ar_was_hardly_measured(found):
    members = [row for row in found if row.task == "xsum"][:4]
    lacking = [replace(row, sparse_vs_ar=Estimate(), dense_vs_ar=Estimate()) for row in members[1:]]
    assert {panel.speed for panel in pareto.panels_of(members)} == {pareto.over_ar}
    mixed = pareto.panels_of([members[0], *lacking])
    assert {panel.speed for panel in mixed} == {pareto.over_dense} and len(mixed[0].rows) == 4


def test_one_setting_makes_no_figure(found):
    assert plots.FIGURES["pareto"]([row for row in found if row.task == "squad"]) is None


def test_labels_of_near_points_stay_apart():
    figure, axis = pyplot.subplots()
    near = [(0.5 + 0.005 * index, 0.5) for index in range(12)]
    figure.draw_without_rendering()
    beside.label(axis, near, [str(index) for index in range(12)], others=[(0.5, 0.52)])
    figure.canvas.draw()
    check_labels(figure)
    assert [text.xy for text in axis.texts] == near
    pyplot.close(figure)
