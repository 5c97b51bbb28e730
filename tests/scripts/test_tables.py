import csv
import io
import re

import pytest
from rich.console import Console

from harness.evidence import rows, sources_hash
from scripts import budget_table, cells, common, hybrid_table, tables
from tests.evidence_samples import config, stored_run

KINDS = ("speed", "quality")
ALL = ("ar", "dense", "sparse", "sparse_ar")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Good, stale, invalid and failed runs of several tasks."""
    folder = tmp_path_factory.mktemp("tables") / "results"
    now = sources_hash(common.ROOT)
    for topk in (8, 16):
        stored_run(folder, config("squad_long", bucket="8k", topk=topk), sources=now)
    stored_run(folder, config("squad", source="files", data_files=["some_file.jsonl"]), sources=now)
    stored_run(folder, config("xsum"), sources="old")
    stored_run(folder, config("qmsum"), sources=now, required={"sparse": ["sparse_ffn."]})
    stored_run(
        folder, config("needle", context_tokens=6000), sources=now, status="failed", reason="50% & a_b at /x/y_z"
    )
    return folder


@pytest.fixture(scope="module")
def found(results):
    return rows.collect(results, sources=sources_hash(common.ROOT))


def screen(found, width):
    console = Console(file=io.StringIO(), width=width, highlight=False)
    tables.show(found, console)
    return console.file.getvalue()


def line_of(grid, *parts):
    (line,) = [line for line in grid.rows if all(part in " ".join(line) for part in parts)]
    return line


@pytest.mark.parametrize("width", [160, 120, 80])
def test_the_screen_fits_and_keeps_numbers_whole(found, width):
    text = screen(found, width)
    assert max(len(line) for line in text.splitlines()) <= width
    for row in found:
        if row.counted:
            assert cells.estimate(row.sparse_vs_ar).split("\n")[1] in text
            for whole in (row.delta, row.reference_delta):
                digits = 1 if whole is row.delta else 3
                shown = cells.difference(whole, digits).split("\n")
                assert len(shown) == 3 and all(part in text for part in shown)
    assert "\u2026" not in text


def test_a_row_tells_what_was_measured(found):
    grid, quality = tables.results_grids(found)
    row = next(row for row in found if row.task_name == "squad")
    line = line_of(grid, "some_file.jsonl")
    assert line[0] == "squad\n(some_file.jsonl)"
    assert line[grid.header.index("limit")] == "1.23"
    assert line[grid.header.index("AL")] == cells.number(row.acceptance)
    speed = f"{row.sparse_vs_dense.value:.2f}\n[{row.sparse_vs_dense.ci[0]:.2f}, {row.sparse_vs_dense.ci[1]:.2f}]"
    factors = row.split["sparse_vs_dense"]
    told = f"{factors.tokens_per_step.value:.2f}\u00d7{factors.steps_per_second.value:.2f}"
    assert line[grid.header.index("sparse\n/ dense")] == f"{speed}\n= {told}"
    judged = dict(zip(quality.header, line_of(quality, "some_file.jsonl"), strict=True))
    assert judged[f"quality\ndense\n{cells.ARROW} sparse"].startswith(f"rougeL {row.quality['dense']:.1f}\n")
    assert judged["quality\ndifference"].endswith(f"\ndetects {row.delta.mdd:.1f}")
    assert judged["log p\ndifference"].endswith(f"\ndetects {row.reference_delta.mdd:.3f}")
    assert judged["its floor\n(log p)"] == cells.estimate(row.reference_floor, 3, sign=True)
    assert judged["verdict:\nquality,\nlog p"] == "undecided\nloss"


def test_numbers_that_must_not_be_believed_are_withheld(found):
    grid, quality = tables.results_grids(found)
    for task, mark in (("qmsum", "invalid"), ("needle", "failed")):
        for line in (line_of(grid, task), line_of(quality, task)):
            assert line[-1] == mark and set(line[3:-1]) == {cells.NOTHING}
    assert line_of(grid, "xsum")[-1] == "stale"
    notes = " ".join(tables.footnotes(found))
    assert "sparse_ffn. is switched on but never ran" in notes and "made by other sources" in notes


def test_empty_optional_columns_are_left_out(found, tmp_path):
    good = [row for row in found if not row.marks]
    assert "mark" not in tables.results_grids(good)[0].header
    stored_run(tmp_path, arms=ALL)
    grid, _ = tables.results_grids(rows.collect(tmp_path, sources="abc"))
    assert "sparse AR\n/ AR" in grid.header


def test_models_and_machines_are_never_mixed(tmp_path):
    stored_run(tmp_path, config(name="A"))
    stored_run(tmp_path, config(name="B"))
    stored_run(tmp_path, config(name="B", limit=3), device="GPU")
    titles = [grid.title for grid in tables.results_grids(rows.collect(tmp_path, sources="abc"))]
    assert titles == [
        f"{place}: {kind}" for place in ("A on CPU, 2 threads", "B on CPU, 2 threads", "B on GPU") for kind in KINDS
    ]


def test_the_paper_shaped_table_fills_no_cell_that_was_not_measured(found):
    grid = tables.reference_grid(found)
    assert [line[2] for line in grid.rows if line[1] == "quoted"] == ["LLaMA-7B", "MoE-GLaM-1.2B", "LLaMA-13B"]
    assert next(line[5:8] for line in grid.rows if line[1] == "quoted") == ("1.8\u00d7", "2.4\u00d7", "+33%")
    squad = line_of(grid, "some_file.jsonl")
    assert squad[1:4] == ("measured", "SmolLM2-135M-Instruct", "CPU, 2 threads") and "n=6" in squad[4]
    assert grid.rows[-1] == ("", "not measured", *[cells.NOTHING] * 7)
    assert [line[1] for line in grid.rows].count("measured (stale)") == 1


def test_files_come_from_results_alone(results, capsys):
    assert tables.main(["--results", str(results)]) == 0
    folder = results / "tables"
    assert sorted(file.name for file in folder.iterdir()) == [
        "budgets.csv",
        "budgets.md",
        "budgets.tex",
        "reference.csv",
        "reference.md",
        "reference.tex",
        "results.csv",
        "results.md",
        "results.tex",
    ]
    first = {file.name: file.read_bytes() for file in folder.iterdir()}
    assert tables.main(["--results", str(results)]) == 0
    assert first == {file.name: file.read_bytes() for file in folder.iterdir()}
    for table in (folder / "results.md").read_text().split("### ")[1:]:
        lines = [line for line in table.splitlines() if line.startswith("|")]
        assert len({line.count("|") for line in lines}) == 1 and len(lines) == 2 + 6
    assert "squad_long 8k" in capsys.readouterr().out


def test_a_selection_can_be_asked_for(results, tmp_path, capsys):
    assert tables.main(["--results", str(results), "--task", "squad,xsum", "--out", str(tmp_path / "t")]) == 0
    text = (tmp_path / "t" / "results.md").read_text()
    assert "squad (some_file.jsonl)" in text and "squad_long" not in text
    assert tables.main(["--results", str(results), "--experiment", "none", "--out", str(tmp_path / "t")]) == 2
    assert capsys.readouterr().err.strip().startswith("no finished run for experiment none below")


@pytest.mark.parametrize("make", [lambda folder: None, lambda folder: (folder / "runs" / "x").mkdir(parents=True)])
def test_nothing_to_show_is_one_line_and_code_2(tmp_path, capsys, make):
    make(tmp_path)
    assert tables.main(["--results", str(tmp_path)]) == 2
    said = capsys.readouterr()
    assert said.out == "" and len(said.err.splitlines()) == 1 and "no finished run below" in said.err


def test_a_damaged_run_is_one_line_and_code_2(tmp_path, capsys):
    (stored_run(tmp_path).path / "summary.json").write_text("{")
    assert tables.main(["--results", str(tmp_path)]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_latex_is_well_formed(found, results):
    tables.main(["--results", str(results)])
    for name, count in {"results.tex": 2, "budgets.tex": 1, "reference.tex": 1}.items():
        text = (results / "tables" / name).read_text()
        assert text.isascii()
        braces = re.sub(r"\\[\\{}]", "", text)
        assert braces.count("{") == braces.count("}")
        assert not re.search(r"(?<!\\)[%#_]", re.sub(r"^%.*|\{!\}\{%$", "", text, flags=re.M))
        parts = text.split(r"\begin{table*}")[1:]
        assert len(parts) == count
        for part in parts:
            spec = re.search(r"\\begin\{tabular\}\{([lr]+)\}", part)[1]
            body = part[part.index(r"\toprule") : part.index(r"\bottomrule")]
            lines = [line for line in body.splitlines() if line.endswith(r"\\")]
            assert {len(re.findall(r"(?<!\\)&", line)) + 1 for line in lines} == {len(spec)}
            assert part.count(r"\end{table*}") == 1 and part.count(r"\begin{tabular}") == part.count(r"\end{tabular}")


def test_long_tables_go_on_in_latex_and_notes_stand_once():
    grid = cells.Grid(
        "T", ("a", "b"), tuple((str(i), "[1, 2]\n[3]") for i in range(45)), frozenset({1}), frozenset({19})
    )
    text = cells.latex(grid, ["below"])
    captions = re.findall(r"\\caption\{(.*)\}", text)
    assert captions == ["T", "T (continued)", "T (continued)"] and text.count("below") == 1
    assert text.count(r"{@{}r@{}}{[1, 2]}\\{[3]}\end{tabular} \\") == 45 and text.count(r"\midrule") == 3


def test_the_budget_table_says_what_was_read_kept_and_realised(found):
    (grid,) = budget_table.grids(found)
    row = next(row for row in found if row.task_name == "squad")
    line = dict(zip(grid.header, next(line for line in grid.rows if line[0] == "squad"), strict=True))
    low, high = row.agreement.ci
    assert line["agreement\n%"] == f"{100 * row.agreement.value:.1f}\n[{100 * low:.1f}, {100 * high:.1f}]"
    assert line["density\nattn"] == "0.51" and line["KL"] == f"{row.kl:.4f}"
    assert line["AL dense\n\u2192 sparse"] == f"{row.acceptance_length('dense'):.2f}\n\u2192 {row.acceptance:.2f}"
    assert line["step time\nsparse\n/ dense"] == f"{row.time_ratio:.2f}"
    assert float(line["byte\nlimit"]) == pytest.approx(1 / row.limit, abs=0.005)
    assert line["realised"] == f"{100 * row.realised:.0f}%"
    assert line["select\nms"] == f"{row.components_ms('sparse')['select']:.2f}"
    assert "density\nexperts" not in line
    failed = dict(zip(grid.header, next(line for line in grid.rows if line[0].startswith("needle")), strict=True))
    assert failed.pop("mark") == "failed" and set(list(failed.values())[2:]) == {cells.NOTHING}


def test_the_csv_holds_the_same_as_numbers(found, results):
    tables.main(["--results", str(results)])
    with (results / "tables" / "budgets.csv").open() as stream:
        lines = {line["fingerprint"]: line for line in csv.DictReader(stream)}
    assert len(lines) == len(found)
    for row in found:
        line = lines[row.fingerprint]
        assert line["setting"] == row.setting and line["marks"] == ", ".join(row.marks)
        for key, value in {"agreement": row.agreement.value, "realised": row.realised, "kl": row.kl}.items():
            assert line[key] == "" if value is None else float(line[key]) == pytest.approx(value, rel=1e-5)


def plain(folder, name):
    with (folder / "tables" / f"{name}.csv").open() as stream:
        return list(csv.DictReader(stream))


def test_results_and_reference_are_written_as_numbers(found, results):
    tables.main(["--results", str(results)])
    lines = {line["fingerprint"]: line for line in plain(results, "results")}
    assert len(lines) == len(found)
    for row in found:
        line = lines[row.fingerprint]
        if not row.counted:
            assert line["sparse_vs_dense"] == line["quality_difference_mdd"] == line["quality_verdict"] == ""
            continue
        ratio = float(line["sparse_vs_dense"])
        factors = [float(line[f"sparse_vs_dense_{name}"]) for name in ("tokens_per_step", "steps_per_second")]
        assert ratio == pytest.approx(row.sparse_vs_dense.value, rel=1e-5)
        assert ratio == pytest.approx(factors[0] * factors[1], rel=1e-4)
        assert float(line["quality_difference_mdd"]) == pytest.approx(row.delta.mdd, rel=1e-5)
        assert float(line["reference_floor"]) == pytest.approx(row.reference_floor.value, rel=1e-5)
        assert (line["quality_verdict"], line["reference_verdict"]) == ("undecided", "loss")
    sources = [line["source"] for line in plain(results, "reference")]
    assert sources == ["quoted", "measured", "quoted", "measured", "quoted"]


def test_times_of_shared_machines_are_marked(tmp_path):
    stored_run(tmp_path, exclusive=False)
    (row,) = rows.collect(tmp_path, sources="abc")
    assert row.marks == ("shared",)
    assert any(note.startswith("shared: ") and "times are unreliable" in note for note in tables.footnotes([row]))


def mixed(folder):
    """A hybrid of attention, its anchors and the FFN, and what was made of its parts."""
    dense, ffn = {"name": "dense"}, {"name": "topk", "keep": 0.6667, "mask": "union"}
    anchors = {"name": "anchors", "anchors": "every", "every": 3, "layers": [], "theta": 0.7, "head_map": False}
    base = config("xsum", limit=7) | {"reuse": {"name": "none"}}
    stored_run(folder, base | {"ffn": ffn, "reuse": anchors}, seed=1)
    stored_run(folder, base, seed=2)
    stored_run(folder, base | {"attn": dense, "ffn": ffn | {"keep": 0.5}}, seed=3)
    stored_run(folder, base | {"reuse": anchors}, seed=4)
    return base


def test_a_hybrid_stands_beside_its_parts(tmp_path):
    base = mixed(tmp_path)
    found = {row.setting: row for row in rows.collect(tmp_path, sources="abc")}
    whole = next(row for setting, row in found.items() if setting.count(",") == 2)
    (parts,) = [parts for row, parts in hybrid_table.hybrids(list(found.values())) if row is whole]
    told = {part.name: part.row for part in parts}
    assert list(told) == ["attention", "FFN", "attention with reuse"]
    assert told["FFN"] is None, "another share of channels is another setting"
    assert told["attention"].axes == ("attention",) and told["attention with reuse"].axes == ("attention", "reuse")
    (grid,) = hybrid_table.grids(list(found.values()))
    assert [line[1] for line in grid.rows].count("FFN alone\n(not measured)") == 1
    assert {len(line) for line in grid.rows} == {len(grid.header)}
    assert tables.main(["--results", str(tmp_path)]) == 0
    lines = plain(tmp_path, "hybrid")
    parts = [line["part"] for line in lines if line["hybrid"] == whole.fingerprint]
    assert parts == ["all", "attention", "attention with reuse"]
    stored_run(tmp_path / "other", base)
    assert hybrid_table.grids(rows.collect(tmp_path / "other", sources="abc")) == []


def test_carved_and_simulated_runs_carry_their_notes_in_every_table(tmp_path):
    carved = config("xsum", name="carved")
    carved["model"]["kind"] = "carved_moe"
    stored_run(tmp_path, carved | {"moe": {"name": "union", "union": 6}})
    masked = {"name": "topk", "keep": 0.5, "mask": "token"}
    stored_run(tmp_path, config("xsum") | {"attn": {"name": "dense"}, "ffn": masked})
    assert tables.main(["--results", str(tmp_path)]) == 0
    for name in ("results", "budgets", "reference"):
        for suffix in ("md", "tex"):
            text = (tmp_path / "tables" / f"{name}.{suffix}").read_text()
            assert "its quality says nothing about trained MoEs" in text
            assert "ffn keep 0.5 token (simulated)" in text and "show no saving" in text
    plain = tmp_path / "plain"
    stored_run(plain, config("xsum"))
    assert tables.main(["--results", str(plain)]) == 0
    assert "carved" not in (plain / "tables" / "budgets.md").read_text()


def test_runs_without_traces_show_dashes(tmp_path):
    stored_run(tmp_path, traces=False)
    (grid,) = budget_table.grids(rows.collect(tmp_path, sources="abc"))
    line = dict(zip(grid.header, grid.rows[0], strict=True))
    assert [line[name] for name in ("agreement\n%", "KL", "flips", "select\nms")] == [cells.NOTHING] * 4
    assert line["density\nattn"] == "0.25" and line["realised"].endswith("%")
    speed, quality = tables.results_grids(rows.collect(tmp_path, sources="abc"))
    assert "=" not in speed.rows[0][speed.header.index("sparse\n/ AR")]
    line = dict(zip(quality.header, quality.rows[0], strict=True))
    assert line["its floor"] == line["verdict:\nquality,\nlog p"] == cells.NOTHING
    assert "detects" not in line["quality\ndifference"] and "log p\ndifference" not in line


def test_special_characters_are_escaped():
    assert cells.escape("50% & a_b #1 {x} ~ ^ \\ $ < >|") == (
        r"50\% \& a\_b \#1 \{x\} \textasciitilde{} \textasciicircum{} \textbackslash{} \$ \textless{} \textgreater{}"
        r"\textbar{}"
    )
    assert cells.markdown(cells.Grid("", ("a",), (("x|y\nz",),))).splitlines()[-1] == r"| x\|y z |"


@pytest.mark.parametrize(
    ("value", "digits", "sign", "text"),
    [
        (None, 2, False, "\u2013"),
        (1.005, 1, False, "1.0"),
        (-0.04, 1, True, "0.0"),
        (-1.26, 1, True, "\u22121.3"),
        (2, 0, True, "+2"),
    ],
)
def test_numbers(value, digits, sign, text):
    assert cells.number(value, digits, sign=sign) == text
