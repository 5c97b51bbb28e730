"""python -m scripts.train_draft: end to end on a tiny checkpoint, its data, its messages."""

import gzip
import json

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from harness.engine.model.eagle3 import load_head
from harness.engine.model.eagle3_teacher import Passage
from scripts import draft_data, train_draft
from tests.engine.tiny import library_model

LETTERS = "?abcdefghijklmnopqrstuvwxyz .:\nABCDEFGHIJKLMNOPQRSTUVWXYZ"
SIZES = ["--dtype=float32", "--device=cpu", "--window=160", "--new-tokens=8", "--draft-vocab=30", "--unroll=2"]
ROWS = {
    "squad": [{"context": f"text number {'abcdefg'[row]} is short", "question": "what is it"} for row in range(3)],
    "math": [{"problem": f"add {'abcdefghi'[row]} to b", "answer": "c"} for row in range(5)],
    "xsum": [{"document": "a long report. " * 40}],
}


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("SPARSE_VERIFICATION_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A tiny Llama of 8 layers whose tokens are characters."""
    folder = tmp_path_factory.mktemp("draft") / "tiny_llama"
    tokenizer = Tokenizer(models.WordLevel({letter: number for number, letter in enumerate(LETTERS)}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?").save_pretrained(folder)
    library_model("llama", num_hidden_layers=8, eos_token_id=29).save_pretrained(folder)
    return folder


@pytest.fixture()
def tokenizer(checkpoint):
    return PreTrainedTokenizerFast.from_pretrained(checkpoint)


@pytest.fixture()
def files(tmp_path):
    """A text and files of prompts."""
    (tmp_path / "plain.txt").write_text("a plain text of words. " * 40)
    for name, rows in ROWS.items():
        packed = gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode())
        (tmp_path / f"{name}.jsonl.gz").write_bytes(packed)
    return tmp_path


@pytest.fixture()
def call(checkpoint, tmp_path, capsys):
    """Runs the program on the checkpoint; exit code, standard output and standard error."""

    def run(*arguments):
        code = train_draft.main(
            ["--model", str(checkpoint), *SIZES, "--out", str(tmp_path / "head"), *map(str, arguments)]
        )
        return code, *capsys.readouterr()

    return run


def test_a_head_is_trained_kept_and_gone_on_with(call, files, checkpoint, monkeypatch):
    prompts = [files / "math.jsonl.gz", f"xsum={files / 'squad.jsonl.gz'}", files / "xsum.jsonl.gz"]
    common = ("--text", files / "plain.txt", "--prompts", *prompts, "--validate-every", 2, "--batch-tokens", 200)
    code, output, errors = call(*common, "--steps", 4)
    lines = output.splitlines()
    last = json.loads(lines[-1])
    assert code == 0 and last["steps"] == 4 and last["status"] == "ok" and "answering 9 of 9" in errors
    assert [line.split("  ")[0] for line in lines[:-1]] == ["step 2", "step 4"]
    assert all("answers" in line and "text" in line and "acceptance" in line for line in lines[:-1])
    head = load_head(files / "head", torch.float32, torch.device("cpu"))
    assert head.shape.draft_vocab == 30 and head.shape.features == 3 * 48 and head.shape.vocab == 61
    targets = head.targets.tolist()
    assert targets == sorted(set(targets)) == head.t2d.nonzero().flatten().tolist() and 29 in targets
    config = json.loads((files / "head" / "config.json").read_text())
    notes = config["training"]
    assert config["torch_dtype"] == "bfloat16" and notes["data_sha256"] == last["data_sha256"]
    assert notes["data"] == ["math.jsonl.gz", "squad.jsonl.gz", "xsum.jsonl.gz", "plain.txt"]
    assert notes["validation_acceptance"]["answers"] == pytest.approx(last["best"], abs=1e-4)
    assert str(files) not in json.dumps(config)

    monkeypatch.setattr(draft_data.Decoder, "prefill", lambda *_, **__: pytest.fail("a prompt was answered again"))
    code, output, errors = call(*common, "--steps", 6)
    assert code == 0 and "going on after step 4" in errors and json.loads(output.splitlines()[-1])["steps"] == 6
    assert [line.split("  ")[0] for line in output.splitlines()[:-1]] == ["step 6"]
    code, output, errors = call(*common, "--steps", 6, "--lr", 0.5)
    assert code == 2 and output == "" and "start over" in errors.splitlines()[-1]
    code, output, _ = call(*common, "--steps", 2, "--lr", 0.5, "--fresh")
    assert code == 0 and json.loads(output.splitlines()[-1])["steps"] == 2
    assert {file.name for file in (files / "head").iterdir()} == {"config.json", "model.safetensors", "training.pt"}


def test_answers_are_greedy_survive_a_kill_and_depend_on_the_prompt(checkpoint, files, tokenizer, tmp_path):
    options = train_draft._parser().parse_args(["--model", str(checkpoint), "--dtype=float32", "--device=cpu"])
    source = train_draft.texts.find(options)
    asked = draft_data.questions([draft_data.PromptFile.named(str(files / "math.jsonl.gz"))], tokenizer, 150, None)
    assert len(asked) == 5 and tokenizer.decode(asked[0].ids).startswith("S o l v e")
    file, said = tmp_path / "new" / "answers.jsonl", []

    def stop_after_two():
        said.append(None)
        if len(said) == 3:
            raise KeyboardInterrupt

    step = train_draft.texts.load(source)
    with pytest.raises(KeyboardInterrupt):
        draft_data.Answers(file).find(asked, step, tokenizer, frozenset({29}), 6, 1, stop_after_two)
    with open(file, "a") as out:
        out.write('{"prompt": "to')
    answers = draft_data.Answers(file)
    assert len(answers.missing(asked)) == 1
    answers.find(asked, step, tokenizer, frozenset({29}), 6, 2, lambda: said.append(None))
    assert len(said) == 4 and not draft_data.Answers(file).missing(asked)
    model = library_model("llama", num_hidden_layers=8)
    for question, passage in zip(asked, draft_data.Answers(file).passages(asked), strict=True):
        assert passage.answer == len(question.ids) and passage.tokens[: passage.answer] == question.ids
        best = model(torch.tensor([passage.tokens])).logits[0].argmax(-1)
        assert passage.tokens[passage.answer :] == tuple(best[passage.answer - 1 : -1].tolist())
        assert len(passage.tokens) - passage.answer == 6 or passage.tokens[-1] == 29 or question.stop


def test_prompts_fit_and_rows_find_their_task(files, tokenizer):
    def asked(name, longest=150, limit=None):
        return draft_data.questions([draft_data.PromptFile.named(name)], tokenizer, longest, limit)

    (long,) = asked(str(files / "xsum.jsonl.gz"))
    assert len(long.ids) == 150 and long.stop == ("\n",) == asked(f"xsum={files / 'squad.jsonl.gz'}")[0].stop
    assert len(asked(str(files / "math.jsonl.gz"), limit=2)) == 2
    assert len(asked(str(files / "squad.jsonl.gz"), 2000)) == 3
    with pytest.raises(ValueError, match="no row with"):
        asked(str(files / "math.jsonl.gz"), 20)


def test_windows_cover_a_text_once_and_rows_of_a_file(files, tokenizer):
    whole = tokenizer.encode((files / "plain.txt").read_text())
    found = draft_data.text_passages([files / "plain.txt"], tokenizer, 96)
    joined = [token for one in found for token in one.tokens]
    assert joined == whole[: len(joined)] and len(whole) - len(joined) < 32 and len(found[0].tokens) == 96
    assert all(one.kind == "text" for one in found)
    (report,) = draft_data.text_passages([files / "xsum.jsonl.gz"], tokenizer, 1024)
    assert list(report.tokens) == tokenizer.encode(ROWS["xsum"][0]["document"])
    assert draft_data.text_files([str(files)])[0].name == "math.jsonl.gz"


def test_the_vocabulary_weighs_answers_as_much_as_all_else():
    passages = [Passage((1,) * 90 + (2,) * 10, 100), Passage((9, 9, 3, 3, 4), 2)]
    assert draft_data.vocabulary(passages, 2, 12, frozenset({7})) == [1, 7]
    assert draft_data.vocabulary(passages, 4, 12, frozenset({7})) == [1, 3, 4, 7]
    assert draft_data.vocabulary(passages, 6, 12, frozenset({7})) == [1, 2, 3, 4, 7, 9]
    assert draft_data.vocabulary(passages, 12, 12, frozenset()) == list(range(12))
    assert draft_data.sha256(passages) != draft_data.sha256([passages[0], Passage((9, 9, 3, 3, 4), 3)])


@pytest.mark.parametrize(
    "arguments, word",
    [
        ([], "nothing to train on"),
        (["--text", "absent.txt"], "absent.txt"),
        (["--prompts", "absent.jsonl"], "absent.jsonl"),
        (["--prompts", "needle=absent.jsonl"], "valid: squad"),
        (["--text", "FILE", "--window", "4096"], "1024 positions"),
        (["--text", "FILE", "--window", "8"], "--window=8"),
        (["--text", "FILE", "--steps", "0"], "--steps=0"),
        (["--text", "FILE", "--minutes", "0"], "--minutes=0"),
        (["--text", "FILE", "--lr", "2"], "--lr=2"),
        (["--text", "FILE", "--prompt-weight", "2"], "--prompt-weight=2"),
        (["--prompts", "FILE", "--new-tokens", "81"], "--new-tokens=81"),
        (["--text", "FILE", "--unroll", "0"], "--unroll=0"),
        (["--text", "FILE", "--out", "FILE"], "is a file"),
        (["--text", "FILE", "--model", "./absent"], "no such folder"),
        (["--text", "FILE", "--model", "shape:none"], "none"),
        (["--text", "SHORT"], "too few"),
        (["--prompts", "FILE"], "JSON object"),
    ],
)
def test_bad_input_is_one_line_before_anything_is_computed(call, files, monkeypatch, arguments, word):
    monkeypatch.setattr(train_draft.models, "library_model", lambda *_: pytest.fail("the model was loaded"))
    (files / "short.txt").write_text("short text that is barely a window of its own")
    named = {"FILE": str(files / "plain.txt"), "SHORT": str(files / "short.txt")}
    code, output, errors = call(*[named.get(one, one) for one in arguments])
    assert code == 2 and output == "" and word in errors and len(errors.splitlines()) == 1


def test_a_shallow_target_is_refused(call, files, tmp_path, checkpoint, capsys):
    library_model("llama").save_pretrained(tmp_path / "shallow")
    PreTrainedTokenizerFast.from_pretrained(checkpoint).save_pretrained(tmp_path / "shallow")
    capsys.readouterr()
    code, _, errors = call("--model", tmp_path / "shallow", "--text", files / "plain.txt")
    assert code == 2 and "at least 7 layers" in errors and len(errors.splitlines()) == 1
