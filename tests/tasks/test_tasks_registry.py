"""Every task through the same tests, on its bundled data, and on real data where that lies beside the repository."""

import json
from itertools import islice
from pathlib import Path

import pytest

from tasks import TASKS, Task, TaskError, make
from tasks.prompting import prepare
from tasks.sources import DATA, read_bundled

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data" / "dev"
REAL = {
    "xsum": "xsum.jsonl.gz",
    "squad": "squad.jsonl.gz",
    "math": "math500.jsonl",
    "gsm8k": "gsm8k.jsonl",
    "squad_long": "long/squad_article_qa.jsonl.gz",
    "qmsum": "long/qmsum.jsonl.gz",
}
LEAST = {"xsum": 20, "squad": 24, "math": 20, "gsm8k": 16, "squad_long": 16, "needle": 64, "qmsum": 4}


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("style", ["chat", "plain"])
def test_every_task(name, style, settings, tokenizer):
    task: Task = make(name, settings(style=style, shots=2))
    examples = list(task.examples())
    assert len(examples) >= LEAST[name]
    assert len({example.id for example in examples}) == len(examples)
    assert [example.id for example in make(name, settings(offset=3)).examples()] == [e.id for e in examples[3:]]
    for example in examples[:4]:
        prompt = task.prompt(example)
        assert len(prompt.shots) == 2
        assert example.cluster in example.id or name == "squad"
        best = task.grade(example, example.references[0])
        assert tuple(best) == task.metrics
        assert all(value == pytest.approx(100) for value in best.values())
        assert all(0 <= value < 100 for value in task.grade(example, "quite another thing").values())
        for stop in task.stop:
            assert task.grade(example, f"{example.references[0]}{stop}and on 99") == best
            assert task.grade(example, f"{stop}{example.references[0]}")[task.metrics[0]] < 50
    prepared = prepare(task, tokenizer, style=style, limit=2, min_prompt_tokens=0, max_prompt_tokens=100_000)
    assert [each.truncated_tokens for each in prepared] == [0, 0]
    assert prepared[0].sha != prepared[1].sha


@pytest.mark.parametrize("name", TASKS)
def test_demonstrations_are_never_graded(name, settings):
    task = make(name, settings(shots=2))
    shown = [text for text, _ in task.prompt(next(iter(task.examples()))).shots]
    for example in islice(task.examples(), 30):
        prompt = task.prompt(example)
        assert f"{prompt.before}{prompt.document}{prompt.after}" not in shown


@pytest.mark.parametrize("name", TASKS)
def test_settings_of_the_user_win_and_bad_ones_are_refused(name, settings):
    assert make(name, settings(stop=("END",))).stop == ("END",)
    for changes, key in (
        ({"shots": 99}, "shots=99"),
        ({"shots": -1}, "shots=-1"),
        ({"style": "loud"}, "style=loud"),
        ({"source": "moon"}, "source=moon"),
        ({"offset": -1}, "offset=-1"),
    ):
        with pytest.raises(TaskError, match=rf"task\.{key}: ") as caught:
            make(name, settings(**changes))
        assert "\n" not in str(caught.value)


def test_unknown_task(settings):
    with pytest.raises(TaskError, match=r"task\.name=sudoku: choose one of xsum, squad, math"):
        make("sudoku", settings())


def test_bundled_answers_are_spans_of_their_paragraphs():
    for row in read_bundled("squad"):
        for text, start in zip(row["answers"]["text"], row["answers"]["answer_start"], strict=True):
            assert row["context"][start : start + len(text)] == text
    for row in read_bundled("squad_shots"):
        assert row["answer"] in row["quote"] and row["quote"] in row["context"]


def test_bundled_reports_have_their_length():
    for row in read_bundled("xsum"):
        assert 330 <= len(row["document"].split()) <= 480
        assert row["summary"] not in row["document"]


def test_bundled_files_are_one_row_a_line():
    for path in DATA.glob("*.jsonl"):
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        assert all(list(row) == list(rows[0]) for row in rows), path.name


def test_squad_grades_questions_without_answer(tmp_path, settings):
    path = tmp_path / "v2.jsonl"
    row = {"id": "1", "title": "t", "context": "c", "question": "q", "answers": {"text": [], "answer_start": []}}
    path.write_text(json.dumps(row) + "\n")
    task = make("squad", settings(source="files", data_files=(str(path),)))
    (example,) = task.examples()
    assert example.references == ()
    assert task.grade(example, " unanswerable\n") == {"f1": 100, "em": 100}
    assert task.grade(example, " Paris\n") == {"f1": 0, "em": 0}


def test_squad_long_buckets_and_questions(settings):
    long = list(make("squad_long", settings(options={"bucket": "8k", "questions": 3})).examples())
    short = list(make("squad_long", settings(options={"bucket": "4k", "questions": 3})).examples())
    assert len(long) == len(short) == 24
    assert [example.cluster for example in long[:6]] == [long[0].cluster] * 3 + [long[3].cluster] * 3
    assert len(long[0].fields["context"].split()) == pytest.approx(4663, abs=5)
    assert 0.4 < len(short[0].fields["context"]) / len(long[0].fields["context"]) < 0.6
    for examples in (long, short):
        assert len({example.fields["question"] for example in examples}) == 24
        assert all(example.references[0] in example.fields["context"] for example in examples)


def test_squad_long_grades_the_short_answer_and_the_quote(settings):
    task = make("squad_long", settings())
    example = next(iter(task.examples()))
    answer = example.references[0]
    assert task.grade(example, f" A whole sentence.\nAnswer: {answer}\n\nText: more")["em"] == 100
    assert task.grade(example, f"It was {answer} then.\nAnswer: wrong") == {"accuracy": 100, "f1": 0, "em": 0}
    assert task.grade(example, f"wrong\n\n{answer}") == {"accuracy": 0, "f1": 0, "em": 0}


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("squad_long", {"bucket": "16k"}, "task.bucket=16k: choose one of 4k, 8k"),
        ("squad_long", {"questions": 0}, "task.questions=0"),
        ("qmsum", {"questions": True}, "task.questions=True"),
        ("needle", {"context_tokens": 10}, "task.context_tokens=10"),
        ("needle", {"depth": 1.5}, "task.depth=1.5"),
        ("needle", {"depth": "deep"}, "task.depth=deep"),
    ],
)
def test_bad_options(settings, name, options, words):
    with pytest.raises(TaskError) as caught:
        make(name, settings(options=options))
    assert words in str(caught.value)


def needles(settings, count=8, seed=0, **options):
    return list(islice(make("needle", settings(seed=seed, options=options)).examples(), count))


def test_needle_is_the_same_for_the_same_seed(settings):
    assert needles(settings) == needles(settings)
    assert needles(settings)[0].fields["document"] != needles(settings, seed=1)[0].fields["document"]


@pytest.mark.parametrize("depth", [0.0, 0.25, 0.5, 1.0])
def test_needle_lies_at_its_depth(settings, depth):
    for example in needles(settings, context_tokens=3000, depth=depth):
        document, (entry,) = example.fields["document"], example.references
        assert document.count(f"{example.fields['name']} | goods: {entry}") == 1
        assert document.index(entry) / len(document) == pytest.approx(depth, abs=0.08)


def test_needle_spreads_depths_and_varies_its_prose(settings):
    examples = needles(settings, context_tokens=3000, depth=None)
    depths = sorted(example.fields["depth"] for example in examples)
    assert depths == [i / 8 for i in range(8)]
    sentences = [part for line in examples[0].fields["document"].split("\n") for part in line.split(". ")]
    assert len(set(sentences)) > 0.95 * len(sentences)


def test_needle_length_follows_the_setting(settings):
    for tokens in (500, 2000, 8000):
        words = len(needles(settings, 1, context_tokens=tokens)[0].fields["document"].split())
        assert words * 1.21 == pytest.approx(tokens, rel=0.1, abs=100)


def test_needle_counts_the_values_of_the_right_entry(settings):
    task = make("needle", settings())
    first, second = islice(task.examples(), 2)
    assert task.grade(first, second.references[0])["accuracy"] <= 20
    values = first.fields["values"]
    assert task.grade(first, f"It says: {', '.join(values)}")["accuracy"] == 100
    assert task.grade(first, f"It says: {', '.join(values[:-1])}")["accuracy"] == pytest.approx(80)


@pytest.mark.parametrize("name", REAL)
def test_real_data(name, settings, tokenizer):
    path = SHARED / REAL[name]
    if not path.is_file():
        pytest.skip("the evaluation data is not beside the repository")
    task = make(name, settings(source="files", data_files=(str(path),), shots=1))
    prepared = prepare(task, tokenizer, style="plain", limit=5, min_prompt_tokens=0, max_prompt_tokens=6000)
    assert len(prepared) == 5
    assert all(len(each.ids) <= 6000 for each in prepared)
    assert len({each.example.id for each in prepared}) == 5
    for each in prepared:
        best = each.example.references[0]
        answer = rf"\boxed{{{best}}}" if name == "math" else best
        assert task.grade(each.example, answer)[task.metrics[0]] == pytest.approx(100)


TARGETS = {
    "xsum": None,
    "squad": None,
    "math": "boxed",
    "gsm8k": "The answer is",
    "squad_long": "\nAnswer: ",
    "needle": None,
    "qmsum": None,
}


@pytest.mark.parametrize("name", TARGETS)
def test_targets_are_answers_that_the_grader_takes_as_right(name, settings):
    """Where an answer has another form than its reference, the form that the prompt asks for."""
    task = make(name, settings())
    for example in islice(task.examples(), 4):
        target = task.target(example)
        assert task.grade(example, target)[task.metrics[0]] == 100.0
        assert (TARGETS[name] or example.references[0]) in target
