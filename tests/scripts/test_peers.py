"""python -m scripts.bench --peers: our arms are those of a run, and rivals decode from the same token."""

import sys
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from harness import schema
from scripts.bench import checks, cli, peers, rivals
from scripts.bench.measure import Spread
from tests.engine.tiny import library_model, repetitive_prompt

FAKE = '''
from pathlib import Path


class Llama:
    """Counts upwards from the last token; remembers what it was told."""

    made = []

    def __init__(self, path, **options):
        self.path, self.options, self.evaluated = path, options, []
        Llama.made.append(self)

    def close(self):
        self.closed = True

    def reset(self):
        self.evaluated = []

    def eval(self, tokens):
        self.evaluated += tokens

    def generate(self, tokens, **options):
        assert tokens[:-1] == self.evaluated and options["temp"] == 0.0
        token = tokens[-1]
        while True:
            token += 1
            yield token
'''
SPECULATIVE = """
class LlamaPromptLookupDecoding:
    def __init__(self, max_ngram_size, num_pred_tokens):
        self.tokens = num_pred_tokens
"""


def options_of(*arguments):
    return cli.parser().parse_args(["--peers", "--device=cpu", *arguments])


@pytest.mark.parametrize(
    ("arguments", "overrides"),
    [
        ([], ["draft=lookup"]),
        (["--draft=suffix", "--kept=1024"], ["draft=suffix", "attn.topk=64"]),
        (["--draft=eagle3", "--block-size=32"], ["draft=eagle3", "attn.topk=16", "attn.block_size=32"]),
        (["--contexts=3000"], ["task.context_tokens=3000", "task.max_prompt_tokens=3000"]),
        (
            ["--draft=joined"],
            [
                "draft=combined",
                "draft.join=true",
                "draft.min_match=99",
                "draft.suffix.depth=8",
                "draft.suffix.topk=1",
                "draft.eagle3.depth=3",
                "draft.eagle3.topk=3",
                "draft.eagle3.total=7",
                "draft.eagle3.window=512",
            ],
        ),
    ],
)
def test_our_arms_are_those_of_a_run(compose, arguments, overrides):
    common = ["task=needle", "track=none", "analysis=none", "model.device=cpu", "task.limit=1"]
    common += ["task.max_new_tokens=25"] + ([] if "attn.topk" in " ".join(overrides) else ["attn.topk=32"])
    assert peers.configuration(options_of(*arguments)) == schema.resolve(compose(*common, *overrides))


def test_a_file_of_prompts_is_read_as_squad_long(compose, tmp_path):
    file = tmp_path / "own.jsonl"
    file.write_text("{}\n")
    config = peers.configuration(options_of(f"--data-file={file}", "--prompts=3"))
    assert (config.task.name, config.task.source, config.task.data_files) == ("squad_long", "files", (str(file),))
    assert config.task.limit == 3
    with pytest.raises(ValueError, match=r"--data-file=.*: there is no such file"):
        peers.configuration(options_of(f"--data-file={file}x"))


def test_transformers_goes_on_from_the_given_token_every_round():
    model, prompt = library_model("llama"), repetitive_prompt(40)
    with torch.inference_mode():
        whole = model.generate(torch.tensor([prompt]), max_new_tokens=9, do_sample=False)[0, 40:].tolist()
    for rival in (rivals.Generate(model), rivals.Generate(model, lookup=3)):
        rival.prefill(prompt, whole[0])
        for _ in range(2):
            rival.ready()
            assert rival.decode(8) == whole[1:]


def test_llama_cpp_is_used_where_it_is_installed(tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, rivals.LLAMA_CPP, raising=False)
    found, missing = rivals.installed(library_model("llama"), lookup=6, context=100, threads=2)
    if not missing:
        pytest.skip("llama-cpp-python is installed")
    assert [one.name for one in found] == ["transformers", "transformers lookup 6"]
    assert "not installed" in missing["llama.cpp"]
    package = tmp_path / rivals.LLAMA_CPP
    package.mkdir()
    (package / "__init__.py").write_text(FAKE)
    (package / "llama_speculative.py").write_text(SPECULATIVE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(rivals, "gguf", lambda: tmp_path / "model.gguf")
    found, missing = rivals.installed(library_model("llama"), lookup=6, context=100, threads=2)
    assert missing == {}
    assert [one.name for one in found[2:]] == ["llama.cpp", "llama.cpp fused", "llama.cpp lookup 6"]
    for rival in found[2:]:
        rival.prefill([1, 2, 3], 7)
        for _ in range(2):
            rival.ready()
            assert rival.decode(3) == [8, 9, 10]
        rival.close()
    made = sys.modules[rivals.LLAMA_CPP].Llama.made
    assert [one.options["flash_attn"] for one in made] == [False, True, False]
    assert all(one.closed for one in made)
    assert made[2].options["draft_model"].tokens == 6 and made[0].options["draft_model"] is None
    for name in [name for name in sys.modules if name.startswith(rivals.LLAMA_CPP)]:
        monkeypatch.delitem(sys.modules, name)


def test_equal_tokens_stop_at_the_first_difference():
    assert peers._equal([[1, 2, 3, 4], [5, 6]], [[1, 2, 9, 4], [5, 6]]) == 4 / 6


def test_ratios_are_of_speeds(capsys):
    times = {"ar": [4.0, 8.0, 4.0], "dense": [2.0, 4.0, 2.0], "transformers": [8.0, 8.0, 8.0]}
    outputs = {name: [[1, 2, 3]] * 1 for name in times}
    told = peers._table(
        times, outputs, {"ar": 3, "dense": 2, "transformers": 0}, dict.fromkeys(times, 1.0), 3, Console(markup=False)
    )
    assert told["dense"]["/ ar"] == [2.0, 2.0, 2.0]
    assert told["ar"]["/ transformers"] == [2.0, 1.0, 2.0] and "/ dense" not in told["ar"]
    assert told["dense"]["tokens_a_step"] == 1.5 and told["transformers"]["tokens_a_step"] is None
    assert told["ar"]["tokens_s"] == Spread.of([3 / 4, 3 / 8, 3 / 4]).median
    assert "dense / ar: 2.00 [2.00, 2.00]" in capsys.readouterr().out


@pytest.mark.slow
def test_peers_decode_the_same_prompt(capsys):
    code = cli.main(["--peers", "--contexts=700", "--tokens=6", "--repeats=1", "--kept=128", "--device=cpu"])
    printed = capsys.readouterr()
    assert code == 0 and "sparse / transformers lookup 6: " in printed.out


class Library:
    """A model that would say 3 every time."""

    device = "cpu"

    def __call__(self, inputs, logits_to_keep):
        logits = torch.zeros(1, logits_to_keep, 10)
        logits[0, :, 3] = 1.0
        return SimpleNamespace(logits=logits)


def test_a_loop_that_leaves_the_library_is_red(monkeypatch):
    class Answer:
        def __init__(self, output):
            self.seconds, self.output, self.steps, self.first = [1.0, 1.0], output, 1, 0

    answers = {"ar": Answer([1, 3]), "dense": Answer([1, 3]), "sparse": Answer([9, 9]), "transformers": Answer([3, 2])}
    monkeypatch.setattr(peers, "_prompt", lambda *_: answers)
    monkeypatch.setattr(peers, "installed", lambda *_, **__: ([], {}))
    monkeypatch.setattr(peers.loading, "load_model", lambda *_: Library())
    monkeypatch.setattr(peers, "_ours", lambda *_: [peers.Ours(name, None, None, peers.Sparsity()) for name in ("ar",)])
    with pytest.raises(checks.Red, match=r"ar: token 0 is 1\.00 below the library's best"):
        peers.run(options_of("--contexts=700", "--kept=128"), Console(quiet=True))
