import base64
import hashlib
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import matplotlib
import pytest

matplotlib.use("Agg")
from matplotlib import pyplot

from harness.evidence import rows, sources_hash
from scripts import common, plots, report
from scripts.reporting import drawings
from scripts.reporting.page import MARKS as page_marks
from tests.evidence_samples import config, growing, stored_run

HOSTILE = "</script></p><img src=x onerror=alert(1)><b>loud & clear</b>"
SECRET = "a sentence of somebody's article"
VOID = {"meta", "link", "img", "input", "rect", "line"}


class Page(HTMLParser):
    """Elements with their attributes, the text of each kind of element, and whether tags are nested properly."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.texts, self.open, self.flow = [], {}, [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag, f"</{tag}> at {self.getpos()}"

    def handle_data(self, data):
        inside = self.open[-1] if self.open else ""
        self.texts.setdefault(inside, []).append(data)
        if inside not in ("script", "style"):
            self.flow.append(data)

    def all(self, tag, **wanted):
        return [attrs for name, attrs in self.elements if name == tag and wanted.items() <= attrs.items()]

    @property
    def text(self):
        return "".join(self.flow)


def dot(_):
    figure, axis = pyplot.subplots(figsize=(1, 1))
    axis.plot([0, 1])
    return figure


def hostile(store):
    """Give one example of a run a text that must not become part of the page, and a plain one to another."""
    file = store.path / "records.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    for line in lines:
        line["text"] = HOSTILE + line["arm"] if line["example_id"] == "e0" else f"{SECRET}, {line['arm']}"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """A sweep with outputs, a stale run without, an invalid and a failed one."""
    folder = tmp_path_factory.mktemp("report") / "results"
    now = sources_hash(common.ROOT)
    for topk, gain in ((8, 1.5), (16, 1.3), (128, 1.1)):
        settings = config("squad_long", bucket="8k", topk=topk) | {"draft": growing("lookup")}
        argv = ["run.py", "-m", "attn.topk=8,16,128", "arms=[ar,dense,sparse]"]
        hostile(stored_run(folder, settings, sources=now, gain=gain, argv=argv, seed=topk))
    kept = stored_run(folder, config("xsum"), sources="old")
    (kept.path / "records.jsonl").unlink()
    stored_run(folder, config("qmsum"), sources=now, required={"sparse": ["sparse_ffn."]})
    stored_run(folder, config("needle"), sources=now, status="failed", reason="out of <memory>")
    return folder


@pytest.fixture(scope="module")
def found(results):
    return rows.collect(results, sources=sources_hash(common.ROOT))


@pytest.fixture(scope="module")
def written(results):
    """The page with the outputs and the one without; a figure stands for all."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "FIGURES", {"tradeoff": dot, "axes": lambda rows: None})
        assert report.main(["--results", str(results), "--title", "A <title>", "--examples", "6"]) == 0
        bare = results / "bare.html"
        assert report.main(["--results", str(results), "--out", str(bare), "--without-texts"]) == 0
    return (results / "report.html").read_text(), bare.read_text()


@pytest.fixture(scope="module")
def page(written):
    return Page(written[0])


def test_every_figure_has_a_title_and_says_what_to_look_for():
    assert set(plots.FIGURES) <= set(drawings.LOOK_FOR)
    assert all(title and look.startswith("Look for") for title, look in drawings.LOOK_FOR.values())


def test_the_page_is_whole_and_every_link_leads_somewhere(page):
    assert page.open == []
    ids = [attrs["id"] for _, attrs in page.elements if "id" in attrs]
    assert len(ids) == len(set(ids))
    targets = [attrs["href"] for attrs in page.all("a")]
    assert targets and all(target.startswith("#") and target[1:] in ids for target in targets)
    for attribute in ("aria-labelledby", "for"):
        named = [attrs[attribute] for _, attrs in page.elements if attribute in attrs]
        assert named and set(named) <= set(ids)


def test_nothing_is_fetched_and_only_its_own_script_may_run(written, page):
    for _, attrs in page.elements:
        for name, value in attrs.items():
            assert not name.startswith("on")
            if name in ("src", "href", "data", "srcset", "action", "poster"):
                assert value.startswith(("data:", "#"))
    assert "url(" not in written[0] and "@import" not in written[0]
    (script,) = re.findall(r"<script>(.*?)</script>", written[0], re.DOTALL)
    (policy,) = page.all("meta", **{"http-equiv": "Content-Security-Policy"})
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert "default-src 'none'" in policy["content"] and f"script-src 'sha256-{digest}';" in policy["content"]


def test_hostile_text_stays_text(page, written):
    assert f"{HOSTILE}dense" in page.text and f"{HOSTILE}sparse" in page.text
    assert not page.all("b") and all(attrs["src"].startswith("data:image/png") for attrs in page.all("img"))
    assert "out of <memory>" in page.text and "<memory>" not in written[0] and "A <title>" in page.texts["title"]


def test_texts_are_left_out_where_asked(written, page):
    bare = Page(written[1])
    assert SECRET in page.text and SECRET not in written[1] and "loud" not in written[1]
    assert "Texts are left out" in bare.text and "e0" in bare.texts["code"]
    assert "Parts at token" in bare.text and "against" not in re.search(r"Parts at token[^.]*\.", bare.text).group()
    assert re.search(r"rougeL\s+\d+\.\d \u2192 \d+\.\d", bare.text)


def test_runs_whose_outputs_are_not_stored_are_told(page, results, tmp_path, monkeypatch):
    assert "1 of the runs have outputs" not in page.text and "1 of the runs has" in page.text
    monkeypatch.setattr(plots, "FIGURES", {})
    out = tmp_path / "xsum.html"
    assert report.main(["--results", str(results), "--task", "xsum", "--out", str(out)]) == 0
    alone = Page(out.read_text())
    assert "No run has outputs of a dense and a sparse arm" in alone.text
    assert not alone.all("article") and not alone.all("img") and "#figures" not in out.read_text()


def cells_of(text):
    """Rows of the table of runs as {header: (key, text)}."""
    (table,) = re.findall(r'<table id="run-table">(.*?)</table>', text, re.DOTALL)
    names = re.findall(r"<th [^>]*>(.*?)</th>", table)
    lines = re.findall(r"<tr>(<td.*?)</tr>", table, re.DOTALL)
    cell = r'<td[^>]*?(?: data-key="([^"]*)")?>(.*?)</td>'
    return [dict(zip(names, re.findall(cell, line, re.DOTALL), strict=True)) for line in lines]


def test_the_table_sorts_by_the_stored_numbers_and_withholds_others(written, found):
    lines = cells_of(written[0])
    assert len(lines) == len(found) == 6
    for line, row in zip(lines, found, strict=True):
        assert row.fingerprint in line["run"][0] and f"#run-{row.fingerprint}" in line["run"][1]
        assert line["status"][0] == row.status
        if row.counted:
            assert float(line["sparse / dense"][0]) == row.sparse_vs_dense.value
            assert float(line["quality"][0]) == row.delta.value
            assert float(line["agreement %"][0]) == pytest.approx(100 * row.agreement.value)
        else:
            assert line["sparse / dense"] == ("", "\u2013") and line["agreement %"] == ("", "\u2013")
    assert "stale" in next(line["marks"][1] for line in lines if "xsum" in line["task"][1])


def test_each_run_tells_what_differs_its_charts_and_its_configuration(written, found, page):
    blocks = {
        block[:16]: block
        for block in re.findall(
            r'<details class="run" id="run-(.*?)(?=<details class="run"|</section>)', written[0], re.S
        )
    }
    assert set(blocks) == {row.fingerprint for row in found}
    for row in found:
        block = blocks[row.fingerprint]
        assert f"limit: {row.config['task']['limit']}\n" in block
        if row.task_name == "squad_long":
            assert f"<code>attn.topk</code></td><td>{row.config['attn']['topk']}" in block
            assert block.count('class="charts"') == 1 and len(re.findall(r"<figcaption>(ar|dense|sparse),", block)) == 3
    failed = next(row for row in found if row.status == "failed")
    assert "out of &lt;memory&gt;" in blocks[failed.fingerprint] and "<svg" not in blocks[failed.fingerprint]


def test_the_head_tells_states_machine_and_commands(page, written):
    text = " ".join(page.text.split())
    assert "4 ok, 1 failed, 1 invalid, 1 stale" in text or "4 ok, 1 invalid, 1 failed, 1 stale" in text
    assert "CPU, 2 threads" in page.texts["dd"] and "sparse_ffn. is switched on but never ran" in page.text
    commands = page.texts["pre"]
    assert commands.count("python run.py -m attn.topk=8,16,128 'arms=[ar,dense,sparse]'") == 1
    assert str(common.ROOT) not in written[0]


def test_every_mark_in_the_runs_is_explained(page, found):
    for mark in {mark for row in found for mark in row.marks}:
        assert f"{mark}: {page_marks[mark]}" in page.text


def test_the_reference_is_quoted_beside_what_was_measured(page):
    assert "LLaMA-7B" in page.texts["td"] and "not measured" in page.text and len(page.all("tr", **{"class": "quoted"}))


def test_the_same_results_give_the_same_page(written, results, monkeypatch, tmp_path):
    monkeypatch.setattr(plots, "FIGURES", {"tradeoff": dot})
    again = tmp_path / "again.html"
    arguments = ["--results", str(results), "--title", "A <title>", "--examples", "6", "--out", str(again)]
    assert report.main(arguments) == 0
    assert again.read_text() == written[0]


@pytest.mark.parametrize(
    "options, told",
    [(["--examples", "-1"], "--examples -1"), (["--task", "gsm8k"], "task gsm8k"), (["--out", "."], "is a folder")],
)
def test_what_cannot_be_shown_ends_with_one_line(options, told, results, capsys):
    assert report.main(["--results", str(results), *options]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert told in line


DRIVER = """<script>
const column = (name) => [...document.querySelectorAll("#run-table th")].findIndex((head) => head.textContent === name);
const keys = (name) => [...document.querySelectorAll("#run-table tbody tr:not([hidden])")]
  .map((line) => line.cells[column(name)].dataset.key ?? null);
const click = (name) => document.querySelectorAll("#run-table th")[column(name)].firstChild.click();
const state = (name) => document.querySelectorAll("#run-table th")[column(name)].getAttribute("aria-sort");
const told = {};
click("sparse / dense"); told.down = [state("sparse / dense"), keys("sparse / dense")];
click("sparse / dense"); told.up = [state("sparse / dense"), keys("sparse / dense")];
click("setting"); told.setting = [state("setting"), state("sparse / dense"), keys("setting")];
const box = document.getElementById("filter");
const filtered = (text) => {
  box.value = text; box.dispatchEvent(new Event("input"));
  return [keys("setting"), document.getElementById("filter-count").textContent];
};
told.filtered = ["SQUAD topk 16", "128\u00d732 (a[+", "128\u00d732"].map(filtered);
location.hash = document.querySelector("#run-table a").hash;
setTimeout(() => {
  told.open = document.querySelector("details.run[open]")?.id ?? null;
  document.title = JSON.stringify(told);
}, 100);
</script></body>"""


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")
def test_a_browser_sorts_filters_and_opens(written, found, tmp_path):
    def dump(text):
        file = tmp_path / "page.html"
        file.write_text(text)
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=2000", "--dump-dom"]
        options += [f"--user-data-dir={tmp_path / 'profile'}", f"file://{file}"]
        return subprocess.run(["chromium", *options], capture_output=True, text=True, timeout=120).stdout

    assert "6 of 6 runs" in dump(written[0])
    free = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", written[0])
    title = Page(dump(free.replace("</body>", DRIVER))).texts["title"]
    told = json.loads("".join(title[:1]))
    ratios = sorted(row.sparse_vs_dense.value for row in found if row.counted)
    for name, state, order in (("down", "descending", ratios[::-1]), ("up", "ascending", ratios)):
        assert told[name][0] == state
        assert [float(key) for key in told[name][1][:4]] == order and told[name][1][4:] == [None, None]
    assert told["setting"][:2] == ["ascending", "none"]
    settings = told["setting"][2]
    assert settings.index("topk 8\u00d732") < settings.index("topk 16\u00d732") < settings.index("topk 128\u00d732")
    assert told["filtered"][0] == [["topk 16\u00d732"], "1 of 6 runs"]
    assert told["filtered"][1:] == [[[], "0 of 6 runs"], [["topk 128\u00d732"], "1 of 6 runs"]]
    assert told["open"].startswith("run-")
