"""python -m scripts.calibrate and the loading of texts and models that it shares with scripts.profile."""

import gzip
import json

import pytest

from harness import schema
from harness.calibration import Calibration
from harness.engine.model.byte_tokenizer import ByteTokenizer
from harness.engine.model.shapes import SHAPES
from harness.fields import ConfigError, to_plain
from scripts import calibrate, texts

TINY = {
    "model_type": "llama",
    "vocab_size": 257,
    "hidden_size": 48,
    "intermediate_size": 88,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
EXPERTS = {
    "model_type": "qwen3_moe",
    "head_dim": 16,
    "num_experts": 5,
    "num_experts_per_tok": 3,
    "norm_topk_prob": True,
    "moe_intermediate_size": 24,
    "mlp_only_layers": [1],
}
SMALL = ["--windows=2", "--context=200", "--steps=2", "--rows=3", "--topk=4", "--dtype=float32", "--device=cpu"]


@pytest.fixture(autouse=True)
def shapes(monkeypatch):
    monkeypatch.setitem(SHAPES, "tiny", TINY)
    monkeypatch.setitem(SHAPES, "tiny_experts", TINY | EXPERTS)


def options(*arguments):
    return calibrate._parser().parse_args(arguments)


def test_the_file_loads_holds_what_was_asked_and_fits_this_model_alone(tmp_path, capsys):
    out = tmp_path / "new" / "tiny.json"
    arguments = ["--model=shape:tiny", *SMALL, f"--out={out}"]
    assert calibrate.main(arguments) == 0
    printed = capsys.readouterr().out
    line = json.loads(printed.splitlines()[-1])
    made = Calibration.load(out)
    assert line["status"] == "ok" and line["path"] == str(out) and line["tokens"] == made.tokens == 2 * 206
    assert (made.layers, made.kv_heads, made.block_size, made.topk) == (3, 2, 16, 4)
    assert made.text_sha256 == texts.read(None).sha256 and made.moe_beta is None
    assert line["anchors"]["jaccard"] == [
        len(made.anchors(theta, "jaccard", 0)) for theta in calibrate.THETAS["jaccard"]
    ]
    assert "theta" in printed and "mass" in printed
    source = texts.find(options(*arguments))
    made.check(source.identity)
    with pytest.raises(ConfigError, match="made for tiny, all layers, random weights of seed 0, this run uses tiny, 2"):
        made.check(texts.find(options(*arguments, "--layers=2")).identity)
    first = out.read_text()
    assert calibrate.main(arguments) == 0 and out.read_text() == first


def test_a_model_with_experts_gets_betas(tmp_path):
    out = tmp_path / "experts.json"
    assert calibrate.main(["--model=shape:tiny_experts", *SMALL, f"--out={out}"]) == 0
    made = Calibration.load(out)
    assert len(made.moe_beta) == 3 and made.moe_beta[1] == (0, 0)
    assert 0 < made.moe_beta[0][0] < 1 / 3 and made.moe_beta[0][0] < made.moe_beta[0][1] < 2 / 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model=shape:tiny", "--topk=12"], "--topk=12: 200 positions have 12 blocks"),
        (["--model=shape:tiny", "--topk=1"], "topk=1 is below sinks + window"),
        (["--model=shape:tiny", "--steps=0"], "--steps=0: must be at least 1"),
        (["--model=shape:tiny", "--context=507"], "512 positions (valid: up to 506)"),
        (["--model=shape:tiny", "--text", "absent.txt"], "--text=absent.txt: cannot be read (No such file"),
        (["--model=shape:nothing"], "model.arch=nothing: unknown architecture"),
        (["--model=shape:tiny", "--layers=0"], "--layers=0: must be at least 1"),
        (["--model=shape:tiny", "--revision=main"], "--revision=main: --model=shape:tiny has no revisions"),
        (["--model=smollm2", "--layers=2"], "--layers=2: --model=smollm2 keeps all its layers"),
        (["--model=smollm2", "--carving=x"], "--carving=x: --model=smollm2 is not carved"),
        (["--model=carved_moe", "--carving=absent.safetensors"], "absent.safetensors"),
        (["--model=./absent"], "model.path=./absent: there is no such folder"),
        (["--model=shape:tiny", "--out=."], "--out=.: is a folder"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert calibrate.main([*SMALL, *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("calibrate: ") and message in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "overrides"),
    [
        (["--model=smollm2"], ["model=smollm2"]),
        (["--model=shape:llama_7b", "--layers=2"], ["model=shape", "model.arch=llama_7b", "model.layers=2"]),
        (["--model=org/name", "--revision=v2"], ["model=hf", "model.path=org/name", "model.revision=v2"]),
        (["--model=carved_moe", "--carving=F", "--active=3"], ["model=carved_moe", "model.path=F", "model.active=3"]),
    ],
)
def test_the_model_is_that_of_a_run(compose, arguments, overrides):
    model, config = texts.model_settings(options(*arguments)), schema.resolve(compose(*overrides))
    ours, theirs = to_plain(model), to_plain(config.model)
    assert {**ours, "name": None} == {**theirs, "name": None}


def test_text_files_are_joined_and_bad_ones_named(tmp_path):
    plain, packed, bad = tmp_path / "a.txt", tmp_path / "b.txt.gz", tmp_path / "c.txt.gz"
    plain.write_text("één", encoding="utf-8")
    packed.write_bytes(gzip.compress(b"two"))
    assert texts.read([str(plain), str(packed)]) == texts.Text("één\n\ntwo", "a.txt and 1 more")
    bad.write_bytes(b"no gzip")
    with pytest.raises(texts.TextError, match="not a gzip file"):
        texts.read([str(bad)])
    bad.write_bytes(gzip.compress(b"two words")[:-9])
    with pytest.raises(texts.TextError, match="damaged gzip file"):
        texts.read([str(bad)])
    plain.write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(texts.TextError, match="not UTF-8"):
        texts.read([str(plain)])
    plain.write_text(" \n")
    with pytest.raises(texts.TextError, match="no text in it"):
        texts.read([str(plain)])
    with pytest.raises(texts.TextError, match=r"neither .txt nor .gz"):
        texts.read([str(tmp_path / "d.pdf")])


def test_windows_are_separate_where_the_text_is_long_and_say_so_where_not():
    text = texts.Text("".join(chr(97 + at % 26) + chr(65 + at // 26) for at in range(500)), "letters")
    apart, note = texts.cut(ByteTokenizer(), text, 3, 100)
    joined = ["".join(map(chr, window)) for window in apart]
    assert note is None and [len(window) for window in apart] == [100] * 3
    starts = [text.content.index(part) for part in joined]
    assert starts == [0, 333, 666]
    overlapping, note = texts.cut(ByteTokenizer(), text, 3, 600)
    assert [text.content.index("".join(map(chr, window))) for window in overlapping] == [0, 200, 400]
    assert "1000 tokens, so 3 windows of 600 overlap" in note
    repeated, note = texts.cut(ByteTokenizer(), texts.Text("abc", "short"), 2, 8)
    assert "is repeated" in note and bytes(repeated[0]) == b"abcabcab"
    with pytest.raises(texts.TextError):
        texts.cut(ByteTokenizer(), texts.Text("", "empty"), 1, 8)


def test_each_window_starts_with_the_tokens_in_front_of_any_text():
    class WithBos(ByteTokenizer):
        def encode(self, text, /, *, add_special_tokens=True):
            return [1] * add_special_tokens + list(text.encode())

    windows, _ = texts.cut(WithBos(), texts.Text("x" * 50, "x"), 2, 10)
    assert windows == [[1] + [120] * 9] * 2


def test_bundled_documents_fill_the_default_windows_of_a_byte_tokenizer():
    text = texts.read(None)
    _, note = texts.cut(ByteTokenizer(), text, 4, 4096 + 16 * 7)
    assert note is None and text.content.count("\n\n") > 20
