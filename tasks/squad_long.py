"""SQuAD over a whole article: several paragraphs of 3k to 7k tokens, several questions each; accuracy, F1 and EM.

The model first quotes the sentence that holds the answer and then gives the answer, so that an output is long enough to
time the decoding; the question stands before and after the document. F1 and EM grade the short answer alone, accuracy
asks whether a reference answer stands anywhere in the output. Questions on one article share a cluster.
"""

import re
from collections.abc import Iterable, Iterator
from itertools import islice

from tasks.base import Example, Prompt, TaskError, TaskSettings, choose, whole_number
from tasks.common import BaseTask
from tasks.grading import contains, cut_at_stop, squad_scores
from tasks.sources import Row, read_bundled, text_of, texts_of

BUCKETS = ("4k", "8k")
_STRIDE = 3
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")


class SquadLong(BaseTask):
    """Rows `_id`, `title`, `bucket`, `context`, `queries[{id, input, answers}]`; options `bucket` and `questions`.

    The bundled version joins the paragraphs of the bundled SQuAD-like articles into documents of the bucket's size.
    """

    name = "squad_long"
    metrics = ("accuracy", "f1", "em")
    bundled = "squad"
    fields = ("_id", "title", "bucket", "context", "queries")
    sources = ("bundled", "files")
    plain_stop = ("\n\n", "\nQuestion:", "\nText:")
    chat_stop = ("\n\n",)

    def __init__(self, settings: TaskSettings) -> None:
        self.bucket: str = choose("bucket", settings.options.get("bucket", "8k"), BUCKETS)
        self.questions = whole_number(settings.options, "questions", 2, 1)
        super().__init__(settings)

    def read(self) -> Iterator[Example]:
        if self.settings.source != "bundled":
            yield from super().read()
            return
        for row in _bundled_articles(self.bucket):
            yield from self.parse(row)

    def parse(self, row: Row) -> Iterable[Example]:
        if row["bucket"] not in BUCKETS:
            raise TaskError(f"field 'bucket' is {row['bucket']!r}, expected one of {', '.join(BUCKETS)}")
        if row["bucket"] != self.bucket:
            return
        article, queries = str(row["_id"]), row["queries"]
        if not isinstance(queries, list) or not all(hasattr(query, "get") for query in queries):
            raise TaskError("field 'queries': expected a list of {id, input, answers}")
        context = text_of(row, "context")
        for query in islice(queries, self.questions):
            fields = {"context": context, "question": text_of(query, "input")}
            yield Example(f"{article}/{query.get('id')}", article, fields, texts_of(query, "answers"))

    def demonstrations(self) -> tuple[tuple[str, str], ...]:
        rows = read_bundled("squad_shots")
        return tuple((_input(row["context"], row["question"]), _answer(row)) for row in rows)

    def prompt(self, example: Example) -> Prompt:
        before, after = _input("\0", example.fields["question"]).split("\0")
        return Prompt(
            instruction="Quote the sentence of the text that answers the question, then give a short answer.",
            shots=self.shots,
            before=before,
            document=example.fields["context"],
            after=after,
            cue="Quote:",
        )

    def target(self, example: Example) -> str | None:
        """The sentence of the document that first has the first reference, then that reference; None without one."""
        if not example.references:
            return None
        answer, context = example.references[0], example.fields["context"]
        sentences = (sentence for sentence in _SENTENCE_END.split(context) if answer in sentence)
        return _answer({"quote": next(sentences, answer).strip(), "answer": answer})

    def grade(self, example: Example, text: str) -> dict[str, float]:
        """F1 and EM of what follows `Answer:` (of all text where that is missing), accuracy of all text."""
        output = cut_at_stop(text, self.stop)
        scores = squad_scores(output.rpartition("Answer:")[2].strip(), example.references)
        found = max((contains(output, [answer]) for answer in example.references), default=scores["em"])
        return {"accuracy": found, **scores}


def _input(context: str, question: str) -> str:
    return f"Question: {question}\nText: {context}\nQuestion: {question}"


def _answer(row: Row) -> str:
    return f"{row['quote']}\nAnswer: {row['answer']}"


def _bundled_articles(bucket: str) -> Iterator[Row]:
    """Documents made of bundled paragraphs, in the form of the rows of a file.

    Each document starts with another article; bucket 8k holds all of them, 4k the next half. The n-th question of a
    document comes from the n-th questions of the articles, so no question is asked twice and the places vary.
    """
    articles: dict[str, list[Row]] = {}
    for row in read_bundled("squad"):
        articles.setdefault(row["title"], []).append(row)
    titles = list(articles)
    size = len(titles) if bucket == "8k" else len(titles) // 2
    for start in range(len(titles)):
        members = [titles[(start + step) % len(titles)] for step in range(size)]
        paragraphs = dict.fromkeys(row["context"] for title in members for row in articles[title])
        asked = [
            articles[title][turn]
            for turn in range(max(map(len, articles.values())))
            if turn < len(articles[title := members[_STRIDE * turn % size]])
        ]
        yield {
            "_id": f"bundled_{bucket}_{start}",
            "title": titles[start],
            "bucket": bucket,
            "context": "\n".join(paragraphs),
            "queries": [
                {"id": row["id"], "input": row["question"], "answers": row["answers"]["text"]} for row in asked
            ],
        }
