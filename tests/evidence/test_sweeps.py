import json

import pytest

from harness.evidence import RunStore, StoreError, fingerprint, sweeps
from tests.evidence_samples import ARMS, config, example, proof, stored_run

SETTINGS = [config(topk=topk) for topk in (8, 16, 32)]
MEMBERS = [
    sweeps.Member((f"attn.topk={topk}",), fingerprint(one)) for topk, one in zip((8, 16, 32), SETTINGS, strict=True)
]


def written(results, members=MEMBERS, command="python run.py -m attn.topk=8,16,32"):
    return sweeps.write(results, "xsum", command, members, "abc")


def found(results, sources="abc"):
    (sweep,) = sweeps.load_sweeps(results)
    return [member.state for member in sweeps.states(sweep, sources)]


def test_a_manifest_is_read_back_and_its_name_follows_the_members(tmp_path):
    sweep = written(tmp_path)
    assert sweeps.load_sweeps(tmp_path) == [sweep]
    assert written(tmp_path, command="another").title == sweep.title
    assert written(tmp_path, MEMBERS[:2]).title != sweep.title
    assert {file.name for file in (tmp_path / "sweeps").glob("*.json")} == {
        f"{sweep.title}.json", f"{written(tmp_path, MEMBERS[:2]).title}.json"
    }  # fmt: skip


def test_states_of_members(tmp_path):
    written(tmp_path)
    assert found(tmp_path) == ["missing"] * 3
    with RunStore(tmp_path, SETTINGS[0], ARMS) as store:
        store.begin(proof())
        store.append(example("e0"))
        assert found(tmp_path) == ["running", "missing", "missing"]
    stored_run(tmp_path, SETTINGS[1])
    stored_run(tmp_path, SETTINGS[2], status="failed", reason="out of memory")
    (sweep,) = sweeps.load_sweeps(tmp_path)
    first, second, third = sweeps.states(sweep, "abc")
    assert (first.state, first.examples, first.reason) == ("interrupted", 1, None)
    assert (second.state, second.examples) == ("done", 6)
    assert (third.state, third.reason) == ("failed", "out of memory")
    assert found(tmp_path, "other") == ["stale"] * 3
    (third_run := tmp_path / "runs" / MEMBERS[2].fingerprint / "summary.json").write_text('{"status": "invalid"}')
    assert found(tmp_path) == ["interrupted", "done", "invalid"]
    third_run.write_text('{"status": "partial", "reason": "hopeless"}')
    assert sweeps.states(sweep, "abc")[2].state == "interrupted" and sweeps.states(sweep, "abc")[2].reason == "hopeless"
    assert sweeps.counts(sweeps.states(sweep, "abc"))["done"] == 1


def test_looking_creates_nothing(tmp_path):
    written(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    found(tmp_path)
    assert sorted(tmp_path.rglob("*")) == before
    assert sweeps.load_sweeps(tmp_path / "absent") == [] and not (tmp_path / "absent").exists()


def test_members_tell_fingerprints_and_errors(tmp_path):
    sweep = written(tmp_path, [sweeps.Member(("attn.topk=8",), None), MEMBERS[1]])
    assert found(tmp_path) == ["missing", "missing"]
    sweeps.record(tmp_path, sweep.title, {"member": 0, "fingerprint": MEMBERS[0].fingerprint})
    sweeps.record(tmp_path, sweep.title, {"member": 1, "error": "task.data_files=[/a/b/x]: no such file"})
    with (tmp_path / "sweeps" / f"{sweep.title}.jsonl").open("a") as journal:
        journal.write('{"member": 1, "err')
    stored_run(tmp_path, SETTINGS[0])
    (again,) = sweeps.load_sweeps(tmp_path)
    first, second = sweeps.states(again, "abc")
    assert (first.state, first.fingerprint) == ("done", MEMBERS[0].fingerprint)
    assert (second.state, second.reason) == ("missing", "task.data_files=[x]: no such file")


def test_a_run_cut_in_the_middle_of_a_line_is_counted(tmp_path):
    written(tmp_path)
    store = stored_run(tmp_path, SETTINGS[0], examples=3)
    file = store.path / "records.jsonl"
    file.write_bytes(file.read_bytes()[: file.read_bytes().rfind(b'{"example_id": "e2", "arm": "ar"') + 40])
    (store.path / "summary.json").unlink()
    (sweep,) = sweeps.load_sweeps(tmp_path)
    assert sweeps.states(sweep, "abc")[0].state == "interrupted"
    assert sweeps.states(sweep, "abc")[0].examples == 2


@pytest.mark.parametrize("content", ["[", "{}", json.dumps({"members": [{}]})])
def test_an_unreadable_manifest_is_named(tmp_path, content):
    sweep = written(tmp_path)
    (tmp_path / "sweeps" / f"{sweep.title}.json").write_text(content)
    with pytest.raises(StoreError, match=sweep.title):
        sweeps.load_sweeps(tmp_path)
