"""The program that carves, end to end on a tiny checkpoint."""

import gzip
import json

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from harness.engine.model.carving import Carving
from harness.engine.model.healing import Healing
from scripts import carve_moe
from tests.engine.tiny import library_model

SIZES = ["--experts", "11", "--shared", "3", "--active", "6", "--tokens", "400", "--sequence", "32", "--rounds", "1"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A tiny Llama whose tokens are characters."""
    folder = tmp_path_factory.mktemp("carve") / "tiny_llama"
    letters = {letter: number for number, letter in enumerate(" abcdefghijklmnopqrstuvwxyz.?")}
    tokenizer = Tokenizer(models.WordLevel(letters, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?").save_pretrained(folder)
    library_model("llama").save_pretrained(folder)
    return folder


@pytest.fixture()
def call(checkpoint, tmp_path, capsys):
    """Runs the program on the checkpoint; exit code, standard output and standard error."""

    def run(*arguments, out="carving.safetensors", sizes=SIZES):
        code = carve_moe.main(
            [
                "--model",
                str(checkpoint),
                "--out",
                str(tmp_path / out),
                *sizes,
                "--dtype",
                "float32",
                *map(str, arguments),
            ]
        )
        return code, *capsys.readouterr()

    return run


def test_carve_and_heal(call, tmp_path):
    plain, packed = tmp_path / "a.txt", tmp_path / "b.txt.gz"
    plain.write_text("a plain text of words. " * 60)
    packed.write_bytes(gzip.compress(b"another one that is packed and longer. " * 80))
    files = ("--text", plain, packed)
    code, output, _ = call(*files)
    last = json.loads(output.splitlines()[-1])
    assert code == 0 and last["status"] == "ok" and "not for absolute quality" in output
    carving = Carving.load(tmp_path / "carving.safetensors")
    assert carving.experts.shape == (3, 8, 8) and carving.shared.shape == (3, 24)
    assert carving.info["tokens"] == 13 * 32 and carving.info["active"] == 6 and carving.info["base"] == "tiny_llama"
    assert set(last["quality"]) == {"dense"} | {f"{kind} {n}/8" for kind in ("router", "oracle") for n in (6, 4, 3)}
    assert last["quality"]["dense"]["agreement"] == 1 and last["quality"] == carving.info["quality"]
    assert 0 <= last["use_range"][0] <= 6 / 8 <= last["use_range"][1] <= 1

    carved = (tmp_path / "carving.safetensors").read_bytes()
    options = (*files, "--heal", "--lr", "0.02", "--rank", "2")
    code, output, _ = call(*options, "--steps", "4")
    first = json.loads(output.splitlines()[-1])
    assert code == 0 and first["steps_done"] == 4 and (tmp_path / "carving.safetensors").read_bytes() == carved
    code, output, _ = call(*options, "--steps", "60")
    second = json.loads(output.splitlines()[-1])
    assert code == 0 and second["steps_done"] == 60
    assert second["quality"]["before"] == first["quality"]["before"] == last["quality"]["router 6/8"]
    assert second["quality"]["after"]["agreement"] > second["quality"]["before"]["agreement"]
    healing = Healing.load(tmp_path / "healed.safetensors")
    assert healing.info["quality"] == second["quality"] and healing.tensors["gate_a"].shape == (3, 2, 48)


def test_without_text_the_bundled_samples_serve(call, tmp_path):
    code, output, _ = call("--heal", "--steps", "1", out="mine.safetensors")
    assert code == 0 and json.loads(output.splitlines()[-1])["tokens"] == 13 * 32
    assert (tmp_path / "healed_mine.safetensors").is_file()


def test_bundled_documents_are_text_without_repeats():
    found = list(carve_moe.documents([]))
    assert len(found) == 5 and sum(map(len, found)) > 90_000
    paragraphs = [part for document in found[:1] for part in document.split("\n\n")]
    assert len(paragraphs) == len(set(paragraphs))


@pytest.mark.parametrize(
    "arguments, word",
    [
        (["--experts", "7"], "--experts=7"),
        (["--shared", "11"], "--shared=11"),
        (["--active", "9"], "--active=9"),
        (["--rounds", "-1"], "--rounds=-1"),
        (["--tokens", "0"], "--tokens=0"),
        (["--sequence", "4096"], "1024 positions"),
        (["--lr", "0"], "--lr=0"),
        (["--save-every", "0"], "--save-every=0"),
        (["--text", "absent.txt"], "absent.txt"),
        (["--out", "carving.bin"], ".safetensors"),
        (["--model", "./absent"], "no such folder"),
    ],
)
def test_bad_input_is_one_line_before_anything_is_computed(call, monkeypatch, arguments, word):
    monkeypatch.setattr(carve_moe.loading, "load_model", lambda *_: pytest.fail("the model was loaded"))
    code, output, errors = call(*arguments)
    assert code == 2 and output == "" and word in errors and len(errors.splitlines()) == 1


def test_too_little_and_unreadable_text(call, tmp_path):
    (tmp_path / "short.txt").write_text("short")
    (tmp_path / "broken.gz").write_bytes(b"no gzip")
    for name, word in (("short.txt", "too little"), ("broken.gz", "cannot be read")):
        code, output, errors = call("--text", tmp_path / name)
        assert code == 2 and output == "" and word in errors and len(errors.splitlines()) == 1


def test_sequences_are_spread_over_uneven_texts():
    parts = [torch.arange(90).view(30, 3), torch.arange(900, 906).view(2, 3), torch.arange(300, 330).view(10, 3)]
    chosen = carve_moe._spread(parts, 14)
    assert len(chosen) == 14 and len(torch.unique(chosen[:, 0])) == 14
    assert [
        int(((chosen[:, 0] >= low) & (chosen[:, 0] < high)).sum()) for low, high in ((900, 906), (300, 330), (0, 90))
    ] == [2, 6, 6]
    assert len(carve_moe._spread(parts, 1000)) == 42
