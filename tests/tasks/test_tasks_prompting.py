"""Rendering, truncation and hashing of prompts, with a tokenizer of one token per byte."""

from collections.abc import Iterator
from dataclasses import replace

import pytest

from tasks import Example, Prompt, TaskError, make
from tasks.prompting import hash_ids, prepare, render

PROMPT = Prompt(
    instruction="Read it.",
    shots=(("Text: one\nQuestion: a", "1"), ("Text: two\nQuestion: b", "2")),
    before="Text: ",
    document="0123456789" * 20,
    after="\nQuestion: c",
    cue="Answer:",
)


class Fixed:
    """A task whose prompts are given."""

    name = "fixed"
    metrics = ("em",)
    stop: tuple[str, ...] = ()
    answer: str | None = None

    def __init__(self, *prompts: Prompt) -> None:
        self.prompts = prompts

    def examples(self) -> Iterator[Example]:
        for number in range(len(self.prompts)):
            yield Example(str(number), str(number), {}, ())

    def prompt(self, example: Example) -> Prompt:
        return self.prompts[int(example.id)]

    def target(self, example: Example) -> str | None:
        return self.answer

    def grade(self, example: Example, text: str) -> dict[str, float]:
        return {"em": 0.0}


def ready(tokenizer, *prompts, style="plain", limit=None, least=0, most=None):
    return prepare(
        Fixed(*prompts), tokenizer, style=style, limit=limit, min_prompt_tokens=least, max_prompt_tokens=most
    )


def test_plain_text(tokenizer):
    wanted = (
        "Read it.\n\nText: one\nQuestion: a\nAnswer: 1\n\nText: two\nQuestion: b\nAnswer: 2\n\n"
        f"Text: {PROMPT.document}\nQuestion: c\nAnswer:"
    )
    assert render(PROMPT, tokenizer, "plain") == wanted
    (prepared,) = ready(tokenizer, PROMPT)
    assert tokenizer.decode(prepared.ids) == wanted
    assert prepared.truncated_tokens == 0


def test_chat_is_what_the_template_gives(tokenizer):
    turns = []
    for text, answer in PROMPT.shots:
        turns += [{"role": "user", "content": f"Read it.\n\n{text}"}, {"role": "assistant", "content": answer}]
    question = f"{PROMPT.before}{PROMPT.document}{PROMPT.after}"
    turns.append({"role": "user", "content": f"Read it.\n\n{question}"})
    wanted = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    (prepared,) = ready(tokenizer, PROMPT, style="chat")
    assert list(prepared.ids) == tokenizer.encode(wanted, add_special_tokens=False)


def test_chat_without_template_is_refused(make_tokenizer):
    with pytest.raises(TaskError, match=r"task\.style=chat.*task\.style=plain"):
        ready(make_tokenizer(template=None), PROMPT, style="chat")


@pytest.mark.parametrize("style", ["chat", "plain"])
@pytest.mark.parametrize("room", [1, 2, 7, 100, 199])
def test_only_the_middle_of_the_document_is_cut(tokenizer, style, room):
    (whole,) = ready(tokenizer, PROMPT, style=style)
    limit = len(whole.ids) - len(PROMPT.document) + room
    (cut,) = ready(tokenizer, PROMPT, style=style, most=limit)
    assert len(cut.ids) == limit
    assert cut.truncated_tokens == len(PROMPT.document) - room
    first = (room + 1) // 2
    kept = PROMPT.document[:first] + PROMPT.document[len(PROMPT.document) - (room - first) :]
    shorter = replace(PROMPT, document=kept)
    assert tokenizer.decode(cut.ids) == render(shorter, tokenizer, style)


def test_a_limit_that_fits_cuts_nothing(tokenizer):
    (whole,) = ready(tokenizer, PROMPT)
    assert ready(tokenizer, PROMPT, most=len(whole.ids)) == [whole]


@pytest.mark.parametrize("prompt", [PROMPT, replace(PROMPT, document="", before="x" * 300)])
def test_an_instruction_that_does_not_fit_is_an_error(tokenizer, prompt):
    with pytest.raises(TaskError, match=r"task\.max_prompt_tokens=60: example 0 needs \d+ tokens"):
        ready(tokenizer, prompt, most=60)


def test_short_prompts_are_skipped_before_truncation(tokenizer):
    short = replace(PROMPT, document="x")
    (whole,) = ready(tokenizer, PROMPT)
    only = ready(tokenizer, short, PROMPT, least=len(whole.ids), most=len(whole.ids) - 50)
    assert [prepared.example.id for prepared in only] == ["1"]
    with pytest.raises(TaskError, match=r"task\.min_prompt_tokens=9999: all 2 examples"):
        ready(tokenizer, short, PROMPT, least=9999)
    with pytest.raises(TaskError, match=r"task\.offset"):
        ready(tokenizer)


def test_limit(tokenizer):
    assert len(ready(tokenizer, PROMPT, PROMPT, PROMPT, limit=2)) == 2
    with pytest.raises(TaskError, match=r"task\.limit=0"):
        ready(tokenizer, PROMPT, limit=0)


def test_plain_has_the_tokenizers_own_lead_and_no_end(make_tokenizer, tokenizer):
    text = tokenizer.encode(render(PROMPT, tokenizer, "plain"), add_special_tokens=False)
    both = make_tokenizer(bos=True, eos=True)
    (prepared,) = ready(both, PROMPT)
    assert list(prepared.ids) == [both.bos_token_id, *text]
    (cut,) = ready(both, PROMPT, most=len(text) - 5)
    assert cut.ids[0] == both.bos_token_id and len(cut.ids) == len(text) - 5
    (chat,) = ready(both, PROMPT, style="chat")
    assert both.bos_token_id not in chat.ids


def test_hash_is_of_the_ids(tokenizer):
    assert hash_ids((1, 22, 3)) == hash_ids([1, 22, 3]) != hash_ids((12, 2, 3))
    first, second = ready(tokenizer, PROMPT), ready(tokenizer, PROMPT)
    assert first[0].sha == second[0].sha == hash_ids(first[0].ids)
    assert ready(tokenizer, replace(PROMPT, cue="A:"))[0].sha != first[0].sha


def test_hash_is_stable_over_releases():
    assert hash_ids((1, 2, 3)) == "8a6ae15122001229edb8866f56e342af12ae8187203c3e3b33931743e7c0c48d"


def test_text_in_several_bytes_survives_the_bound(tokenizer):
    prompt = replace(PROMPT, document="é€𝄞" * 40)
    (whole,) = ready(tokenizer, prompt)
    for limit in range(len(whole.ids) - 12, len(whole.ids)):
        (cut,) = ready(tokenizer, prompt, most=limit)
        assert len(cut.ids) == limit


def test_real_task_end_to_end(tokenizer, settings):
    task = make("squad", settings(shots=2))
    prepared = prepare(task, tokenizer, style="plain", limit=3, min_prompt_tokens=0, max_prompt_tokens=1500)
    assert len({each.sha for each in prepared}) == 3
    assert all(len(each.ids) <= 1500 for each in prepared)
