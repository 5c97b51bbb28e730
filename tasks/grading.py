"""Scores of an answer against its references, all from 0 to 100.

ROUGE (Lin 2004) as F-measures with Porter stemming; EM and F1 as in SQuAD (Rajpurkar et al. 2016, section 6.1); maths
by math-verify on the last boxed answer, or else on the final number.
"""

import re
import string
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

ROUGE_METRICS = ("rougeL", "rouge1", "rouge2")
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_NO_ANSWER = frozenset({"", "unanswerable", "no answer", "not answerable", "none", "not mentioned", "unknown"})
_NUMBER = re.compile(r"\\d?frac\s*\{[^{}]*\}\s*\{[^{}]*\}|\d[\d,]*(?:\.\d+)?(?:\s*/\s*\d+)?|\.\d+")
_MINUS = re.compile(r"(?:^|[\s=({\[$:,])-\\?\$?$")
_BOXED = re.compile(r"\\f?boxed\s*\{")
_FILLERS = re.compile(r"\\[!,;:]|\\left|\\right|\\\$|\$|\\%|%|\^\\circ|\^\{\\circ\}|\s")


def cut_at_stop(text: str, stops: Sequence[str]) -> str:
    """The text before the first occurrence of any of the stop strings."""
    ends = [text.find(stop) for stop in stops if stop]
    return text[: min((end for end in ends if end >= 0), default=len(text))]


def rouge(prediction: str, references: Sequence[str]) -> dict[str, float]:
    """ROUGE-L, ROUGE-1 and ROUGE-2 F-measures, the best over the references for each.

    Line breaks count as blanks: ROUGE-L is over the whole text, not sentence by sentence (that is ROUGE-Lsum).
    """
    scorer = _rouge_scorer()
    scores = [scorer.score(" ".join(reference.split()), " ".join(prediction.split())) for reference in references]
    return {name: max((100.0 * score[name].fmeasure for score in scores), default=0.0) for name in ROUGE_METRICS}


@lru_cache(maxsize=1)
def _rouge_scorer() -> Any:
    from rouge_score import rouge_scorer

    return rouge_scorer.RougeScorer(list(ROUGE_METRICS), use_stemmer=True)


def normalise(text: str) -> str:
    """SQuAD's normaliser: lower case, no punctuation, no articles, single blanks."""
    bare = text.lower().translate(_PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", bare).split())


def squad_scores(prediction: str, references: Sequence[str]) -> dict[str, float]:
    """Exact match and word F1, the best over the references for each.

    Without references the question has no answer: an empty prediction or words such as "unanswerable" are right.
    """
    if not references:
        right = 100.0 if normalise(prediction) in _NO_ANSWER else 0.0
        return {"f1": right, "em": right}
    return {
        "f1": max(word_f1(prediction, reference) for reference in references),
        "em": max(100.0 * (normalise(prediction) == normalise(reference)) for reference in references),
    }


def word_f1(prediction: str, reference: str) -> float:
    """F1 over the bags of normalised words, 0 to 100; two empty texts score 100."""
    found, wanted = normalise(prediction).split(), normalise(reference).split()
    if not found or not wanted:
        return 100.0 * (found == wanted)
    common = sum((Counter(found) & Counter(wanted)).values())
    return 200.0 * common / (len(found) + len(wanted))


def contains(prediction: str, parts: Sequence[str]) -> float:
    """100 if every part is in the prediction as whole words after normalisation, else 0."""
    text = f" {normalise(prediction)} "
    return 100.0 * all(f" {normalise(part)} " in text for part in parts)


def last_boxed(text: str) -> str | None:
    r"""What the last complete `\boxed{...}` holds, nested braces included; None without one."""
    for match in reversed(list(_BOXED.finditer(text))):
        depth = 1
        for end in range(match.end(), len(text)):
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            if depth == 0:
                return text[match.end() : end].strip()
    return None


def final_answer(text: str) -> str | None:
    r"""The last boxed answer, or else the last number (a fraction counts as one number); None without either."""
    boxed = last_boxed(text)
    if boxed is not None:
        return boxed
    numbers = list(_NUMBER.finditer(text))
    if not numbers:
        return None
    last = numbers[-1]
    sign = "-" if _MINUS.search(text[: last.start()]) else ""
    return sign + last.group().rstrip(",")


def maths(prediction: str, reference: str, seconds: float = 3.0) -> float:
    """100 if the final answer of the prediction equals the reference answer, else 0.

    Equal texts and whole numbers are compared here, all else by math-verify in a process of its own, which is stopped
    after `seconds` of processor time (then the answer counts as wrong). Works in any thread.

    Raises:
        RuntimeError: when the process with math-verify cannot be started.
    """
    answer = final_answer(prediction)
    if not answer:
        return 0.0
    found, wanted = _FILLERS.sub("", answer), _FILLERS.sub("", reference)
    if found == wanted:
        return 100.0
    whole = [_whole(found), _whole(wanted)]
    if None not in whole:
        return 100.0 * (whole[0] == whole[1])
    from tasks.verifier import VERIFIER

    return 100.0 * VERIFIER.equal(reference, answer, seconds)


def _whole(text: str) -> int | None:
    """The whole number that the text writes (commas between groups of three allowed), or None."""
    if not re.fullmatch(r"[+-]?(\d{1,60}|\d{1,3}(,\d{3}){1,20})", text, flags=re.ASCII):
        return None
    return int(text.replace(",", ""))
