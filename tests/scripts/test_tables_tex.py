"""Every LaTeX table that `scripts.tables` writes goes through a TeX engine, in one document."""

import shutil
import subprocess

import pytest

from harness.evidence import sources_hash
from scripts import cells, common, tables
from tests.evidence_samples import config, growing, stored_run

SPECIAL = r"a_b & 50% #1 $x$ {y} ~z ^w \LaTeX \end{table*} <u> |v| [w] \\ \"q\" ``r'' --"
FOREIGN = "Größe µ 模型 \U0001f600 \u2192\u2212\u2026\u0394\u2265 a\u0301 \u200b \u00a0x\ttab"
DENSE = {"name": "dense"}
BLOCKS = {"name": "block_topk", "budget": "fixed", "topk": 16, "block_size": 32}
FFN = {"name": "topk", "keep": 0.8, "mask": "union"}
UNION = {"name": "union", "union": 6, "outside": "substitute", "free_loaded": False}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The .tex files of runs of every kind: parts and their hybrids, drafters, marks, hostile names and reasons."""
    folder = tmp_path_factory.mktemp("tex")
    now = sources_hash(common.ROOT)

    def put(task="squad", *, sources=now, name=SPECIAL, **groups):
        told = {key: groups.pop(key) for key in ("status", "reason", "device", "required") if key in groups}
        settings = config(task, name=name, source="files", data_files=[f"{FOREIGN}.jsonl", f"{SPECIAL}.jsonl"])
        settings["model"]["kind"] = "carved_moe" if "moe" in groups else "smollm2"
        stored_run(folder, settings | groups, sources=sources, examples=3, **told)

    for attn, ffn in ((BLOCKS, DENSE), (DENSE, FFN), (BLOCKS, FFN)):
        put(attn=attn, ffn=ffn)
    put("xsum", draft=growing("suffix", 8), device=FOREIGN)
    put("xsum", draft=growing("eagle3", topk=10, total=60), device=FOREIGN, sources="old")
    put("math", attn=DENSE, ffn=FFN | {"mask": "token"})
    put("math", attn=DENSE, moe=UNION)
    put("gsm8k", name=FOREIGN, status="failed", reason=SPECIAL)
    put("qmsum", name=FOREIGN, status="invalid", reason=FOREIGN, required={"sparse": ["sparse_ffn."]})
    for topk in range(2, 50):
        stored_run(folder, config("needle", topk=topk), sources=now, examples=1)
    assert tables.main(["--results", str(folder)]) == 0
    return sorted((folder / "tables").glob("*.tex"))


def test_the_runs_fill_every_table(written):
    assert [file.stem for file in written] == ["budgets", "drafters", "hybrid", "reference", "results"]
    assert all(file.read_text().isascii() for file in written)


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="no TeX engine")
def test_latex_compiles(written, tmp_path):
    inputs = "\n".join(rf"\input{{{file}}}" for file in written)
    packages = r"\usepackage{booktabs,graphicx}"
    (tmp_path / "page.tex").write_text(
        rf"\documentclass{{article}}{packages}\begin{{document}}{inputs}\end{{document}}"
    )
    command = ["pdflatex", "-halt-on-error", "-interaction=nonstopmode", "page.tex"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, timeout=60)
    said = done.stdout.decode(errors="replace")
    assert done.returncode == 0, said[-1500:]
    assert "Float too large" not in said and "Missing character" not in said, said


@pytest.mark.parametrize(
    ("text", "escaped"),
    [
        ("Gr\u00f6\u00dfe a\u0301", "Gro?e a"),
        ("\u6a21 \U0001f600 \x00", "? ? ?"),
        ("a\u200bb\u00a0c\td\n\ne", "ab c d  e"),
        ("\ufb01\u00b2 \uff05", r"fi2 \%"),
        ("\u00b1\u00b5", "??"),
    ],
)
def test_letters_without_ascii_are_told_by_their_base(text, escaped):
    assert cells.escape(text) == escaped
