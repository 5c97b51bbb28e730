import itertools

import matplotlib
import numpy as np
import pytest

matplotlib.use("Agg")
from matplotlib import pyplot

from harness.evidence import rows, sources_hash
from scripts import common, plots
from scripts.figures import axis_curves, components, style, tradeoff
from tests.drawings import check_labels, quietly_drawn
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


DRAWN = [name for name in plots.FIGURES if name != "context"]  # these runs have one length: test_plots_lines
BLOCKS = {"name": "block_topk", "budget": "fixed", "topk": 16, "l0": 512, "rho": 0.25, "block_size": 32}
FFN = {"name": "topk", "keep": 0.8, "mask": "union"}
UNION = {"name": "union", "union": 6, "outside": "substitute", "free_loaded": False}
ANCHORS = {"name": "anchors", "anchors": "every", "every": 2, "layers": [], "theta": 0.7, "head_map": False}
DENSE = {"name": "dense"}


def fill(folder, tasks=("squad_long", "qmsum")):
    """Sweeps of every axis and of a hybrid on each task, one mixture of experts, simulated runs, a short task."""
    now = sources_hash(common.ROOT)

    def put(task, seed, **groups):
        extra = {"bucket": "8k"} if task == "squad_long" else {}
        settings = config(task, name=groups.pop("name", "SmolLM2-135M-Instruct"), **extra) | {"attn": DENSE}
        settings["model"]["kind"] = "carved_moe" if "moe" in groups else "smollm2"
        prompt = 4000 if task == "squad_long" else 2000
        stored_run(folder, settings | groups, sources=now, seed=seed, prompt=prompt, examples=6, gain=1.1 + seed / 20)

    for task in tasks:
        for seed, (topk, keep, union, every) in enumerate(
            zip((8, 16, 32), (0.9, 0.6667, 0.3333), (4, 8, 12), (2, 3, 6), strict=True)
        ):
            attn = BLOCKS | {"topk": topk}
            put(task, seed, attn=attn)
            put(task, seed, ffn=FFN | {"keep": keep})
            put(task, seed, moe=UNION | {"union": union}, name="carved_moe")
            put(task, seed, attn=BLOCKS, reuse=ANCHORS | {"every": every})
            put(task, seed, attn=attn, ffn=FFN, reuse=ANCHORS)
    put("squad_long", 0, attn=BLOCKS | {"score": "oracle"})
    put("squad_long", 1, ffn=FFN | {"mask": "token"})
    stored_run(folder, config("xsum"), sources=now)


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    folder = tmp_path_factory.mktemp("swept")
    fill(folder)
    return rows.collect(folder, sources=sources_hash(common.ROOT))


@pytest.fixture(scope="module")
def figure(found, request):
    yield from quietly_drawn(request.param, found)


@pytest.fixture(scope="module")
def rich(swept, request):
    yield from quietly_drawn(request.param, swept)


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


@pytest.mark.parametrize("figure", DRAWN, indirect=True)
def test_labels_stay_inside_and_do_not_overlap(figure):
    check_labels(figure)


@pytest.mark.parametrize("rich", DRAWN, indirect=True)
def test_labels_of_many_runs_stay_inside_and_do_not_overlap(rich):
    check_labels(rich)


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
    series = tradeoff._sweeps(rows.collect(tmp_path, sources="abc"))
    assert [[row.kept_tokens for row in members] for members in series.values()] == [[256, 512]] * 2
    assert sorted("lookup 4" in label for label in series) == [False, True]


def test_files_are_written_as_png_and_pdf(results, capsys):
    assert plots.main(["--results", str(results)]) == 0
    names = sorted(file.name for file in (results / "figures").iterdir())
    assert names == sorted(f"{name}.{suffix}" for name in DRAWN for suffix in ("pdf", "png"))
    assert (results / "figures" / "tradeoff.png").read_bytes().startswith(b"\x89PNG")
    assert (results / "figures" / "tradeoff.pdf").read_bytes().startswith(b"%PDF")
    assert len(capsys.readouterr().out.splitlines()) == 2 * len(DRAWN)


def test_runs_without_traces_draw_what_they_can(tmp_path):
    for topk in (8, 16):
        stored_run(tmp_path, config(topk=topk), traces=False)
    drawn = {file.stem for file in plots.write(rows.collect(tmp_path, sources="abc"), tmp_path / "figures")}
    assert drawn == {"pareto", "tradeoff", "kept_tokens", "split", "acceptance"}  # one density makes no curve over it


def test_nothing_to_draw_is_one_line_and_code_2(tmp_path, capsys):
    assert plots.main(["--results", str(tmp_path)]) == 2
    stored_run(tmp_path, arms=("ar", "dense"))
    assert plots.main(["--results", str(tmp_path)]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2 and "no finished run below" in said[0] and "arms=[ar,dense,sparse]" in said[1]


def test_a_run_of_one_example_has_points_without_bars(tmp_path):
    stored_run(tmp_path, examples=1)
    figure = plots.FIGURES["tradeoff"](rows.collect(tmp_path, sources="abc"))
    assert len(points(figure.axes[0])) == 1
    pyplot.close(figure)


def test_no_difference_is_drawn_on_a_scale_of_a_point(tmp_path):
    """A difference of exactly nothing must not blow the axis up to rounding errors."""
    stored_run(tmp_path, examples=1)
    figure = plots.FIGURES["tradeoff"](rows.collect(tmp_path, sources="abc"))
    axis = figure.axes[0]
    for line in axis.lines:
        line.set_xdata([0.0 for _ in line.get_xdata()])
    tradeoff._at_least_a_point(axis)
    low, high = axis.get_xlim()
    assert low <= -1 and high >= 1
    pyplot.close(figure)


@pytest.mark.parametrize("settings", [1, 2, 5])
def test_the_legend_fits_a_square_of_panels(tmp_path, settings):
    for task in ("xsum", "squad", "math", "needle"):
        for topk in (8, 16, 32, 64, 128)[:settings]:
            stored_run(tmp_path, config(task, topk=topk), sources="abc")
    figure = plots.FIGURES["tradeoff"](rows.collect(tmp_path, sources="abc"))
    figure.canvas.draw()
    box = figure.legends[0].get_window_extent().transformed(figure.dpi_scale_trans.inverted())
    assert box.x0 >= 0 and box.x1 <= figure.get_figwidth()
    pyplot.close(figure)


def chosen(found, block):
    return style.longest_contexts(found, block)


@pytest.mark.parametrize("rich", ["overlap"], indirect=True)
def test_overlap_has_a_line_for_each_distance_and_names_its_run(rich, swept):
    for row, left, right in zip(chosen(swept, "overlap"), rich.axes[::2], rich.axes[1::2], strict=True):
        data = np.array(row.trace("overlap"))
        lines = [line for line in left.lines if "apart" in line.get_label()]
        assert [list(line.get_ydata()) for line in lines] == data.T.tolist()
        assert list(lines[0].get_xdata()) == [0, 1, 2, 3, 4, 5]
        assert right.lines[0].get_ydata() == pytest.approx(data.mean(axis=0))
        title = left.get_title(loc="left")
        assert all(part in title for part in (row.task, row.setting, f"{row.prompt_tokens:.0f}", row.fingerprint[:8]))


@pytest.mark.parametrize("rich", ["similarity"], indirect=True)
def test_similarity_is_the_matrix(rich, swept):
    shown = chosen(swept, "similarity")
    images = [axis.images[0] for axis in rich.axes if axis.images]
    assert len(images) == len(shown)
    for image, row in zip(images, shown, strict=True):
        assert image.get_array().tolist() == row.trace("similarity")
        assert image.get_clim() == (0, 1)


def test_the_longest_context_with_attention_alone_is_shown(swept):
    shown = chosen(swept, "overlap")
    assert [(row.task_name, row.prompt_tokens) for row in shown] == [
        ("squad_long", 4000),
        ("qmsum", 2000),
        ("xsum", 1000),
    ]
    assert all(row.axes == ("attention",) and not row.simulated for row in shown)
    assert shown[0].kept_tokens == 512  # the middle of 256, 512 and 1024


@pytest.mark.parametrize("rich", ["recall"], indirect=True)
def test_recall_stands_beside_the_oracle_row_by_row(rich, swept):
    observed = [row for row in swept if row.trace("recall")]
    groups = list(style.by_place(observed).values())
    panels = [axis for axis in rich.axes if axis.images]
    assert len(panels) == 2 * len(groups)
    for members, left, right in zip(groups, panels[::2], panels[1::2], strict=True):
        named = {row.setting: row for row in members}
        settings = [label.get_text() for label in left.get_yticklabels()]
        assert sorted(settings) == sorted(named)
        for axis, name in ((left, "recall"), (right, "oracle_recall")):
            assert axis.images[0].get_array().tolist() == [named[setting].trace(name) for setting in settings]
            assert axis.images[0].get_clim() == left.images[0].get_clim()
            means = [f"{np.mean(named[setting].trace(name)):.3f}" for setting in settings]
            assert [text.get_text() for text in axis.texts[: len(means)]] == means
    assert any("(simulated)" in label.get_text() for label in panels[0].get_yticklabels() + panels[2].get_yticklabels())


def test_models_of_different_depth_share_a_figure(tmp_path):
    stored_run(tmp_path, config(name="deep"), layers=9)
    stored_run(tmp_path, config(name="shallow"), layers=4)
    found = rows.collect(tmp_path, sources="abc")
    for name in ("similarity", "recall"):
        figure = plots.FIGURES[name](found)
        assert {len(axis.images[0].get_array()[0]) for axis in figure.axes if axis.images} == {9, 4}
        pyplot.close(figure)
    figure = plots.FIGURES["overlap"](found)
    assert {len(axis.lines[0].get_xdata()) for axis in figure.axes[::2]} == {9, 4}
    pyplot.close(figure)


def test_layers_that_were_not_observed_stay_empty(tmp_path):
    stored_run(tmp_path)
    (row,) = rows.collect(tmp_path, sources="abc")
    for name in ("recall", "oracle_recall"):
        row.trace(name)[0] = None
    row.trace("overlap")[0] = [None] * 6
    for line in row.trace("overlap"):
        line[5] = None
    figure = plots.FIGURES["recall"]([row])
    (masked,) = figure.axes[0].images[0].get_array().mask
    assert list(masked) == [True] + [False] * 5
    other = plots.FIGURES["overlap"]([row])
    assert sum("apart" in line.get_label() for line in other.axes[0].lines) == 5
    pyplot.close(figure)
    pyplot.close(other)


def test_curves_join_runs_that_differ_in_one_budget_alone(swept):
    found = axis_curves.curves(swept)
    told = sorted((curve.column, curve.variant, len(curve.rows)) for curve in found)
    dots, times = "\u2026", "\u00d7"
    assert told == sorted(
        2 * [("attention", f"topk {dots}{times}32", 3)]
        + 2 * [("experts", f"moe union {dots}", 3)]
        + 2 * [("ffn", f"ffn keep {dots} union", 3)]
        + 2 * [("hybrid", f"topk {dots}{times}32, ffn keep 0.8 union, anchors every 2", 3)]
        + 2 * [("reuse", f"topk 16{times}32, anchors every {dots}", 4)]
    )
    reuse = next(curve for curve in found if curve.column == "reuse")
    assert reuse.across == pytest.approx([1 / 6, 2 / 6, 3 / 6, 1])  # every 6th, 3rd, 2nd and each layer


@pytest.mark.parametrize("rich", ["axes"], indirect=True)
def test_axes_show_the_numbers_of_the_runs(rich, swept):
    grid = np.array(rich.axes).reshape(5, 5)
    assert [axis.get_title(loc="left") for axis in grid[0]] == list(axis_curves.ACROSS)
    curve = next(curve for curve in axis_curves.curves(swept) if curve.column == "attention")
    expected = [
        [100 * row.agreement.value for row in curve.rows],
        [row.kl for row in curve.rows],
        [row.acceptance for row in curve.rows],
        [row.time_ratio for row in curve.rows],
        [row.delta.value for row in curve.rows],
    ]
    for axis, ups in zip(grid[:, 0], expected, strict=True):
        line = axis.containers[0][0]
        assert list(line.get_xdata()) == [row.density("attention") for row in curve.rows]
        assert list(line.get_ydata()) == pytest.approx(ups)
    limits = [line for line in grid[3, 0].lines if line.get_linestyle() == ":"]
    assert list(limits[0].get_ydata()) == [row.byte_ratio for row in curve.rows]
    hybrid = grid[3, 4].containers[0][0]
    assert list(hybrid.get_xdata()) == sorted(hybrid.get_xdata()) and max(hybrid.get_xdata()) < 1


def test_simulated_sweeps_are_hollow(tmp_path):
    for keep in (0.5, 0.7, 0.9):
        stored_run(tmp_path, config() | {"attn": DENSE, "ffn": FFN | {"keep": keep, "mask": "token"}})
    figure = plots.FIGURES["axes"](rows.collect(tmp_path, sources="abc"))
    assert figure.axes[0].containers[0][0].get_markerfacecolor() == "white"
    said = [text.get_text() for text in figure.legends[0].get_texts()]
    assert "hollow: simulated" in said and "simulated:" in figure.legends[0].get_title().get_text()
    pyplot.close(figure)


@pytest.mark.parametrize("rich", DRAWN, indirect=True)
def test_figures_with_carved_runs_say_so(rich):
    told = [legend.get_title().get_text() for legend in rich.legends]
    told += [rich._supxlabel.get_text()] if rich._supxlabel else []
    words = " ".join(" ".join(told).split())
    names = {text.get_text() for legend in rich.legends for text in legend.get_texts()}
    names |= {axis.get_title(loc="left") for axis in rich.axes}
    assert any("carved_moe" in name for name in names) <= ("nothing about trained MoEs" in words)


@pytest.mark.parametrize("rich", ["components"], indirect=True)
def test_components_stack_up_to_the_mean_step(rich, swept):
    shown, missing = style.telling(style.by_place(swept), components._saving)
    assert sum(len(members) for members in shown.values()) <= style.MOST_RUNS and missing
    for axis, members in zip(rich.axes, shown.values(), strict=True):
        ends = {}
        for bar in axis.patches:
            middle = round(bar.get_y() + bar.get_height() / 2, 2)
            ends[middle] = max(ends.get(middle, 0.0), bar.get_x() + bar.get_width())
        steps = [row.mean_step_ms(arm) for row in members for arm in components.ARMS]
        assert [ends[middle] for middle in sorted(ends)] == pytest.approx(steps)
    parts = components.parts_of(swept[0], "sparse")
    assert parts["select"] == swept[0].components_ms("sparse")["select"]
    assert list(parts) == [name for name in components.PARTS if name in parts]


def test_a_tradeoff_of_many_settings_is_told_by_axes(swept, found):
    many, few = plots.FIGURES["tradeoff"](swept), plots.FIGURES["tradeoff"](found)
    named = [text.get_text() for text in many.legends[0].get_texts()]
    assert {"attention", "ffn", "experts", "attention + reuse", "attention (simulated)"} <= set(named)
    assert any("topk 16" in text.get_text() for text in few.legends[0].get_texts())
    pyplot.close(many)
    pyplot.close(few)
