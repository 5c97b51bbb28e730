"""Scores worked out by hand, and maths grading that neither hangs nor leaks."""

import os
import subprocess
import sys
import threading
import time

import pytest

from tasks.grading import (
    contains,
    cut_at_stop,
    final_answer,
    last_boxed,
    maths,
    normalise,
    rouge,
    squad_scores,
    word_f1,
)
from tasks.sources import read_bundled
from tasks.verifier import VERIFIER, Verifier


@pytest.mark.parametrize(
    ("text", "stops", "kept"),
    [
        ("Paris\nText: more", ("\n",), "Paris"),
        ("a b\n\nc\nd", ("\n\n", "\nd"), "a b"),
        ("one Q: two\n\n", ("\n\n", "Q:"), "one "),
        ("nothing to cut", ("\n",), "nothing to cut"),
        ("no stops\n\n", (), "no stops\n\n"),
        ("an empty stop cuts nothing", ("",), "an empty stop cuts nothing"),
        ("\nlate", ("\n",), ""),
    ],
)
def test_cut_at_stop(text, stops, kept):
    assert cut_at_stop(text, stops) == kept


def test_rouge_by_hand():
    # 3 of 4 words match in order; bigrams: "the cat", "cat sat" of 3 and 3.
    scores = rouge("the cat sat there", ["the cat sat down"])
    assert scores["rouge1"] == scores["rougeL"] == pytest.approx(75.0)
    assert scores["rouge2"] == pytest.approx(100 * 2 / 3)
    # Precision 2/2, recall 2/4; the longest common subsequence of "b a" and "a b c d" is one word.
    scores = rouge("b a", ["a b c d"])
    assert scores["rouge1"] == pytest.approx(100 * 2 / 3)
    assert scores["rougeL"] == pytest.approx(100 / 3)
    assert scores["rouge2"] == 0


def test_rouge_stems_ignores_line_breaks_and_takes_the_best_reference():
    assert rouge("Dogs running", ["dog runs"])["rouge1"] == 100
    assert rouge("one two\nthree four", ["one two three four"])["rougeL"] == 100
    assert rouge("a b", ["x y", "a b", "a c"])["rougeL"] == 100
    assert rouge("", ["a b"]) == {"rougeL": 0, "rouge1": 0, "rouge2": 0}


def test_squad_normaliser():
    assert normalise(" The  U.S.A.'s, an\tAnswer! ") == "usas answer"
    assert normalise("the a an") == ""
    assert normalise("theatre") == "theatre"


def test_squad_by_hand():
    assert squad_scores("The Broncos.", ["broncos"]) == {"f1": 100, "em": 100}
    # found {denver, broncos, team}, wanted {denver, broncos}: 2 * 2 / (3 + 2).
    assert squad_scores("Denver Broncos team", ["Denver Broncos", "Carolina"]) == {"f1": pytest.approx(80), "em": 0}
    # Repeated words count as often as both sides have them: 2 * 1 / (3 + 1).
    assert word_f1("yes yes yes", "yes") == pytest.approx(50)
    assert squad_scores("", ["x"]) == {"f1": 0, "em": 0}


@pytest.mark.parametrize(("text", "right"), [("", 100), ("Unanswerable.", 100), ("no answer", 100), ("Paris", 0)])
def test_squad_without_answers(text, right):
    assert squad_scores(text, []) == {"f1": right, "em": right}


def test_contains_whole_words_only():
    assert contains("On 4 May, Ann Lee paid 612 crowns.", ["4 May", "ann lee", "612 crowns"]) == 100
    assert contains("On 14 May", ["4 May"]) == 0
    assert contains("", ["x"]) == 0


@pytest.mark.parametrize(
    ("text", "boxed"),
    [
        (r"first \boxed{1}, then \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        (r"\fbox{7}", None),
        (r"\boxed {3}", "3"),
        (r"complete \boxed{4} and cut \boxed{\frac{1}{", "4"),
        ("none", None),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
    ],
)
def test_last_boxed(text, boxed):
    assert last_boxed(text) == boxed


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("so 3 apples and 4 pears make 7 fruits.", "7"),
        ("it costs $1,234.50.", "1,234.50"),
        ("the answer is -5", "-5"),
        ("the answer is $-5$", "-5"),
        ("5 - 3", "3"),
        ("5-3", "3"),
        (r"a loss of -\$8", "-8"),
        (r"which is $\frac{3}{4}$ of it", r"\frac{3}{4}"),
        ("about 3/4", "3/4"),
        ("10, 20, and 30,", "30"),
        ("no number", None),
        (r"\boxed{2} of 9", "2"),
    ],
)
def test_final_answer(text, answer):
    assert final_answer(text) == answer


EQUAL = [
    (r"\boxed{\frac12}", "0.5"),
    (r"\boxed{0.5}", r"\frac{1}{2}"),
    ("The answer is 1,234.", "1234"),
    (r"\boxed{x=5}", "5"),
    (r"\boxed{5}", "x=5"),
    (r"\boxed{(x-5)(x-4)}", "(x-4)(x-5)"),
    (r"\boxed{3\sqrt{13}}", r"\sqrt{117}"),
    (r"\boxed{Evelyn}", r"\text{Evelyn}"),
    (r"\boxed{90}", r"90^\circ"),
    (r"\boxed{$3.50}", "3.5"),
    (r"\boxed{-5i+6}", "6-5i"),
    (r"\boxed{\left(3,\frac{\pi}{2}\right)}", r"\left( 3, \frac{\pi}{2} \right)"),
    (r"\boxed{11,\!111}", "11111"),
    ("#### 42", "42"),
    ("007", "7"),
]
DIFFERENT = [
    (r"\boxed{\frac13}", "0.5"),
    (r"\boxed{(1,2)}", "(2,1)"),
    (r"\boxed{p-q}", "q-p"),
    (r"\boxed{}", "1"),
    (r"\boxed{-7}", "7"),
    ("the answer is 12", "1"),
    ("", "1"),
    (r"\boxed{\undefined{}{", r"\frac{1}{2}"),
]


@pytest.mark.parametrize(("text", "reference"), EQUAL)
def test_maths_equal(text, reference):
    assert maths(text, reference) == 100


@pytest.mark.parametrize(("text", "reference"), DIFFERENT)
def test_maths_different(text, reference):
    assert maths(text, reference) == 0


def test_every_bundled_solution_verifies():
    rows = [*read_bundled("math"), *read_bundled("math_shots")]
    for row in rows:
        boxed = last_boxed(row["solution"])
        assert boxed is not None
        assert VERIFIER.equal(row["answer"], boxed, 5.0), row["problem"]


def test_maths_off_the_main_thread():
    found: list[float] = []
    threads = [threading.Thread(target=lambda: found.append(maths(r"\boxed{1/2}", "0.5"))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [100, 100, 100]


def test_a_comparison_without_end_is_stopped_and_the_next_one_works():
    maths(r"\boxed{1/2}", "0.5")
    child = VERIFIER._child
    start = time.monotonic()
    assert maths(r"\boxed{9^{9^{9^9}}}", "3.5", seconds=0.5) == 0
    assert time.monotonic() - start < 4
    assert child is not None and child.poll() is not None
    assert maths(r"\boxed{1/2}", "0.5") == 100


def test_close_ends_the_process():
    verifier = Verifier()
    assert verifier.equal("0.5", r"\frac{1}{2}", 5.0)
    child = verifier._child
    assert child is not None
    verifier.close()
    with pytest.raises(ProcessLookupError):
        os.kill(child.pid, 0)


def test_a_killed_parent_leaves_no_process():
    code = (
        "import os, sys; from tasks.verifier import VERIFIER as v; v.equal('0.5', '1/2', 5.0);"
        "print(v._child.pid, flush=True); os.kill(os.getpid(), 9)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    pid = int(done.stdout)
    for _ in range(100):
        if not os.path.exists(f"/proc/{pid}"):
            break
        with open(f"/proc/{pid}/stat", encoding="utf-8") as status:
            if status.read().rsplit(")", 1)[1].split()[0] == "Z":
                break
        time.sleep(0.05)
    else:
        pytest.fail("the child outlives its parent")


def test_evaluate_metrics_need_no_hub(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setitem(
            sys.modules, "transformers", None
        )  # evaluate imports the pipelines where it can, which takes 15 s
        import evaluate  # noqa: F401
    from tasks.metrics import load

    squad = load("squad").compute(predictions=["the cat", "x"], references=[["cat"], ["y z x"]])
    assert squad == {"f1": pytest.approx(75), "em": pytest.approx(50)}
    lengths = load("rouge").compute(predictions=["the cat"], references=[["dog", "cat sat"]])
    assert lengths["rouge1"] == pytest.approx(50)
    assert load("maths").compute(predictions=[r"\boxed{1/2}"], references=[["0.5"]]) == {"accuracy": 100}
