import io
import re
import shutil
import subprocess

import pytest
from rich.console import Console

from harness.evidence import rows, sources_hash
from scripts import cells, common, tables
from tests.evidence_samples import config, stored_run

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


@pytest.mark.parametrize("width", [160, 120, 100])
def test_the_screen_fits_and_keeps_numbers_whole(found, width):
    text = screen(found, width)
    assert max(len(line) for line in text.splitlines()) <= width
    for row in found:
        if row.counted:
            assert cells.estimate(row.sparse_vs_ar).split("\n")[1] in text
            assert cells.estimate(row.delta, 1, sign=True).replace("\n", " ") in text
    assert "\u2026" not in text


def test_a_row_tells_what_was_measured(found):
    (grid,) = tables.results_grids(found)
    row = next(row for row in found if row.task_name == "squad")
    line = line_of(grid, "some_file.jsonl")
    assert line[0] == "squad\n(some_file.jsonl)"
    assert line[grid.header.index("limit")] == "1.47"
    assert line[grid.header.index("AL")] == cells.number(row.acceptance)
    speed = f"{row.sparse_vs_dense.value:.2f}\n[{row.sparse_vs_dense.ci[0]:.2f}, {row.sparse_vs_dense.ci[1]:.2f}]"
    assert line[grid.header.index("sparse\n/ dense")] == speed
    assert f"rougeL {row.quality['dense']:.1f}" in " ".join(line)


def test_numbers_that_must_not_be_believed_are_withheld(found):
    (grid,) = tables.results_grids(found)
    for task, mark in (("qmsum", "invalid"), ("needle", "failed")):
        line = line_of(grid, task)
        assert line[-1] == mark and set(line[3:-1]) == {cells.NOTHING}
    assert line_of(grid, "xsum")[-1] == "stale"
    notes = " ".join(tables.footnotes(found))
    assert "sparse_ffn. is switched on but never ran" in notes and "made by other sources" in notes


def test_empty_optional_columns_are_left_out(found, tmp_path):
    good = [row for row in found if not row.marks]
    assert "mark" not in tables.results_grids(good)[0].header
    stored_run(tmp_path, arms=ALL)
    (grid,) = tables.results_grids(rows.collect(tmp_path, sources="abc"))
    assert "sparse AR\n/ AR" in grid.header


def test_models_and_machines_are_never_mixed(tmp_path):
    stored_run(tmp_path, config(name="A"))
    stored_run(tmp_path, config(name="B"))
    stored_run(tmp_path, config(name="B", limit=3), device="GPU")
    titles = [grid.title for grid in tables.results_grids(rows.collect(tmp_path, sources="abc"))]
    assert titles == ["A on CPU, 2 threads", "B on CPU, 2 threads", "B on GPU"]


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
        "reference.md",
        "reference.tex",
        "results.md",
        "results.tex",
    ]
    first = {file.name: file.read_bytes() for file in folder.iterdir()}
    assert tables.main(["--results", str(results)]) == 0
    assert first == {file.name: file.read_bytes() for file in folder.iterdir()}
    lines = [line for line in (folder / "results.md").read_text().splitlines() if line.startswith("|")]
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
    for name in ("results.tex", "reference.tex"):
        text = (results / "tables" / name).read_text()
        assert text.isascii()
        assert re.sub(r"\\[{}]", "", text).count("{") == re.sub(r"\\[{}]", "", text).count("}")
        spec = re.search(r"\\begin\{tabular\}\{([lr]+)\}", text)[1]
        body = text[text.index(r"\toprule") : text.index(r"\bottomrule")]
        lines = [line for line in body.splitlines() if line.endswith(r"\\")]
        assert {len(re.findall(r"(?<!\\)&", line)) + 1 for line in lines} == {len(spec)}
        assert not re.search(r"(?<!\\)[%#_]", re.sub(r"^%.*|\{!\}\{%$", "", text, flags=re.M))
        for environment in ("table*", "tabular"):
            assert text.count(rf"\begin{{{environment}}}") == text.count(rf"\end{{{environment}}}") == 1


def test_special_characters_are_escaped():
    assert cells.escape("50% & a_b #1 {x} ~ ^ \\ $ < >|") == (
        r"50\% \& a\_b \#1 \{x\} \textasciitilde{} \textasciicircum{} \textbackslash{} \$ \textless{} \textgreater{}"
        r"\textbar{}"
    )
    assert cells.markdown(cells.Grid("", ("a",), (("x|y\nz",),))).splitlines()[-1] == r"| x\|y z |"


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="no TeX engine")
def test_latex_compiles(results, tmp_path):
    tables.main(["--results", str(results), "--out", str(tmp_path)])
    inputs = "\n".join(rf"\input{{{name}}}" for name in ("results.tex", "reference.tex"))
    packages = r"\usepackage{booktabs,graphicx}"
    text = rf"\documentclass{{article}}{packages}\begin{{document}}{inputs}\end{{document}}"
    (tmp_path / "page.tex").write_text(text)
    subprocess.run(["pdflatex", "-halt-on-error", "page.tex"], cwd=tmp_path, check=True, capture_output=True)


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
