import itertools

import matplotlib
import pytest

matplotlib.use("Agg")
from matplotlib import pyplot

from harness.evidence import rows, sources_hash
from scripts import common, plots
from tests.evidence_samples import config, stored_run


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Three single tasks, one of them stale, a sweep over four budgets, and a failed run."""
    folder = tmp_path_factory.mktemp("plots") / "results"
    now = sources_hash(common.ROOT)
    stored_run(folder, config("xsum"), sources=now, gain=1.0)
    stored_run(folder, config("squad"), sources="old", gain=1.05)
    stored_run(folder, config("math"), sources=now, status="failed", reason="no memory")
    for step, topk in enumerate((8, 16, 32, 64)):
        settings = config("squad_long", bucket="8k", topk=topk, source="files", data_files=["squad_article_qa.jsonl"])
        stored_run(folder, settings, sources=now, gain=1.5 - 0.1 * step, examples=10, seed=step)
    return folder


@pytest.fixture(scope="module")
def found(results):
    return rows.collect(results, sources=sources_hash(common.ROOT))


@pytest.fixture(scope="module")
def figure(found, request):
    drawn = getattr(plots, request.param)(found)
    drawn.canvas.draw()
    yield drawn
    pyplot.close(drawn)


def points(axis):
    """(x, y) of the settings: every container of error bars."""
    return [(bars[0].get_xdata()[0], bars[0].get_ydata()[0]) for bars in axis.containers]


@pytest.mark.parametrize("figure", ["tradeoff"], indirect=True)
def test_a_panel_for_each_task_and_a_point_for_each_setting(figure, found):
    titles = [axis.get_title(loc="left").split("\n")[0] for axis in figure.axes]
    assert titles == ["xsum", "squad", "squad_long 8k"]
    assert [len(points(axis)) for axis in figure.axes] == [1, 1, 4]
    row = next(row for row in found if row.task_name == "xsum")
    assert points(figure.axes[0]) == [(row.delta.value, row.sparse_vs_ar.value)]
    dense = [line for line in figure.axes[0].lines if line.get_linestyle() == "--"]
    assert dense[0].get_ydata()[0] == row.dense_vs_ar.value


@pytest.mark.parametrize("figure", ["tradeoff"], indirect=True)
def test_stale_points_are_hollow(figure):
    faces = [axis.containers[0][0].get_markerfacecolor() for axis in figure.axes]
    assert faces[1] == "white" and "white" not in (faces[0], faces[2])


@pytest.mark.parametrize("figure", ["tradeoff", "kept_tokens"], indirect=True)
def test_labels_stay_inside_and_do_not_overlap(figure):
    renderer = figure.canvas.get_renderer()
    texts = [figure._suptitle] if figure._suptitle else []
    texts += [text for legend in figure.legends for text in legend.get_texts()]
    for axis in figure.axes:
        texts += [axis.title, axis._left_title, axis.xaxis.label, axis.yaxis.label, *axis.texts]
        for side, labels in ((0, axis.get_xticklabels()), (1, axis.get_yticklabels())):
            low, high = (axis.get_xlim(), axis.get_ylim())[side]
            texts += [label for label in labels if low <= label.get_position()[side] <= high]
    shown = [text for text in texts if text.get_text() and text.get_visible()]
    boxes = [(text.get_text(), text.get_window_extent(renderer)) for text in shown]
    visible = [(name, box) for name, box in boxes if box.width > 0]
    for _, box in visible:
        inches = box.transformed(figure.dpi_scale_trans.inverted())
        assert inches.x0 >= -0.01 and inches.x1 <= figure.get_figwidth() + 0.01
    for (one, first), (other, second) in itertools.combinations(visible, 2):
        width = min(first.x1, second.x1) - max(first.x0, second.x0)
        height = min(first.y1, second.y1) - max(first.y0, second.y0)
        assert width <= 1 or height <= 2, (one, other)


@pytest.mark.parametrize("figure", ["kept_tokens"], indirect=True)
def test_the_sweep_is_a_curve_with_its_limit(figure, found):
    top, bottom = figure.axes
    sweep = [row for row in found if row.task_name == "squad_long"]
    (curve,) = [bars[0] for bars in top.containers]
    assert list(curve.get_xdata()) == [256, 512, 1024, 2048]
    assert list(curve.get_ydata()) == [row.sparse_vs_dense.value for row in sweep]
    (limit,) = [line for line in top.lines if line.get_linestyle() == ":" and len(line.get_xdata())]
    assert list(limit.get_ydata()) == [row.limit for row in sweep]
    assert list(bottom.containers[0][0].get_ydata()) == [row.delta.value for row in sweep]


def test_curves_join_only_what_differs_in_kept_tokens(tmp_path):
    for topk, k in itertools.product((8, 16), (4, 6)):
        stored_run(tmp_path, config(topk=topk, k=k), examples=3)
    series = plots._sweeps(rows.collect(tmp_path, sources="abc"))
    assert [[row.kept_tokens for row in members] for members in series.values()] == [[256, 512]] * 2
    assert sorted("draft.k=4" in label for label in series) == [False, True]


def test_files_are_written_as_png_and_pdf(results, capsys):
    assert plots.main(["--results", str(results)]) == 0
    names = sorted(file.name for file in (results / "figures").iterdir())
    assert names == ["kept_tokens.pdf", "kept_tokens.png", "tradeoff.pdf", "tradeoff.png"]
    assert (results / "figures" / "tradeoff.png").read_bytes().startswith(b"\x89PNG")
    assert (results / "figures" / "tradeoff.pdf").read_bytes().startswith(b"%PDF")
    assert len(capsys.readouterr().out.splitlines()) == 4


def test_nothing_to_draw_is_one_line_and_code_2(tmp_path, capsys):
    assert plots.main(["--results", str(tmp_path)]) == 2
    stored_run(tmp_path, arms=("ar", "dense"))
    assert plots.main(["--results", str(tmp_path)]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2 and "no finished run below" in said[0] and "arms=[ar,dense,sparse]" in said[1]


def test_a_run_of_one_example_has_points_without_bars(tmp_path):
    stored_run(tmp_path, examples=1)
    figure = plots.tradeoff(rows.collect(tmp_path, sources="abc"))
    assert len(points(figure.axes[0])) == 1
    pyplot.close(figure)


def test_no_difference_is_drawn_on_a_scale_of_a_point(tmp_path):
    """A difference of exactly nothing must not blow the axis up to rounding errors."""
    stored_run(tmp_path, examples=1)
    figure = plots.tradeoff(rows.collect(tmp_path, sources="abc"))
    axis = figure.axes[0]
    for line in axis.lines:
        line.set_xdata([0.0 for _ in line.get_xdata()])
    plots._at_least_a_point(axis)
    low, high = axis.get_xlim()
    assert low <= -1 and high >= 1
    pyplot.close(figure)


@pytest.mark.parametrize("settings", [1, 2, 5])
def test_the_legend_fits_a_square_of_panels(tmp_path, settings):
    for task in ("xsum", "squad", "math", "needle"):
        for topk in (8, 16, 32, 64, 128)[:settings]:
            stored_run(tmp_path, config(task, topk=topk), sources="abc")
    figure = plots.tradeoff(rows.collect(tmp_path, sources="abc"))
    figure.canvas.draw()
    box = figure.legends[0].get_window_extent().transformed(figure.dpi_scale_trans.inverted())
    assert box.x0 >= 0 and box.x1 <= figure.get_figwidth()
    pyplot.close(figure)
