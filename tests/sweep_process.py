"""Sweeps in processes of their own for the tests: run.py with a stand-in for the runner, and what they leave behind."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import psutil
import yaml

from harness.evidence.store import is_held

ROOT = Path(__file__).resolve().parents[1]
SITE = '''
"""Python imports this at start: every stored example leaves a line in TRACE; without REAL a runner decodes nothing."""
import os
import sys
import time
import types

from harness.evidence import store

append = store.RunStore.append


def traced(self, examples):
    names = dict.fromkeys(row.example_id for row in examples)
    with open(os.environ["TRACE"], "a") as trace:
        trace.write("".join(f"{self.fingerprint} {name}\\\\n" for name in names))
    append(self, examples)


store.RunStore.append = traced


class RunFailed(Exception):
    pass


def run(config, member):
    from harness import sweeping
    from harness.evidence import sources_hash
    from tasks.base import TaskError
    from tests.evidence_samples import example, proof
    if config.seed == 5:
        raise TaskError("task.data_files=[x]: no such file")
    with store.RunStore(config.results_dir, resolved(config), config.arms) as held:
        if held.begin(proof(sources_hash(sweeping.ROOT), argv=sweeping.command())) != "reuse":
            for name in (f"e{index}" for index in range(config.task.limit)):
                if name not in held.done():
                    time.sleep(float(os.environ.get("DECODE", "0")))
                    held.append(example(name, config.arms))
            reason = "as it was told to" if config.seed == 1 else None
            held.finish({"status": "failed" if reason else "ok", "reason": reason})
    if config.seed == 1:
        raise RunFailed(f"run {held.fingerprint} is failed: as it was told to")


def resolved(config):
    from harness.schema import to_dict
    return to_dict(config) | ({"machine": os.environ["MACHINE"]} if "MACHINE" in os.environ else {})


if "REAL" not in os.environ:
    RunFailed.__module__ = run.__module__ = "harness.runner"
    sys.modules["harness.runner"] = types.ModuleType("harness.runner")
    sys.modules["harness.runner"].RunFailed, sys.modules["harness.runner"].run = RunFailed, run
    sys.modules["harness.build"] = types.ModuleType("harness.build")
    sys.modules["harness.build"].resolved = resolved
'''.replace("\\\\n", "\\n")
ARMS = 3


class Sweep:
    """One command on one results folder, called again and again.

    `calls` counts; `kept` holds what was stored when a call was killed, as `complete` gives it.
    """

    def __init__(self, folder: Path, *argv: str, **environment: str) -> None:
        (folder / "site").mkdir(parents=True, exist_ok=True)
        (folder / "site" / "sitecustomize.py").write_text(SITE)
        self.folder, self.results, self.calls = folder, folder / "results", 0
        self.kept: dict[int, set[tuple[str, str]]] = {}
        self.argv = [sys.executable, str(ROOT / "run.py"), "-m", *argv, "results_dir=results"]
        path = os.pathsep.join([str(folder / "site"), str(ROOT)])
        self.environment = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", **environment}
        self.environment["SPARSE_VERIFICATION_LOCKS"] = str(folder)

    def start(self) -> subprocess.Popen[bytes]:
        self.calls += 1
        environment = {**self.environment, "TRACE": str(self.trace(self.calls))}
        with (self.folder / f"out{self.calls}").open("w") as out, (self.folder / f"err{self.calls}").open("w") as err:
            files = {"stdout": out, "stderr": err}  # workers that outlive their parent would keep a pipe open
            return subprocess.Popen(self.argv, cwd=self.folder, env=environment, start_new_session=True, **files)

    def run(self, timeout: float = 250) -> tuple[int, str, str]:
        """Exit code, stdout and stderr of one more call that nobody disturbs."""
        code = self.start().wait(timeout)
        return code, self.printed("out"), self.printed("err")

    def printed(self, stream: str, call: int | None = None) -> str:
        """What a call, by default the last, wrote to ``out`` or ``err``."""
        return (self.folder / f"{stream}{call or self.calls}").read_text()

    def trace(self, call: int) -> Path:
        return self.folder / f"trace{call}"

    def appended(self, call: int) -> list[tuple[str, str]]:
        """(fingerprint, example) of every example that a call was about to store."""
        file = self.trace(call)
        return [tuple(line.split()) for line in file.read_text().splitlines()] if file.exists() else []

    def stored(self) -> dict[str, bytes]:
        """Fingerprint -> whole lines of its records."""
        found = {}
        for file in self.results.glob("runs/*/records.jsonl"):
            content = file.read_bytes()
            found[file.parent.name] = content[: content.rfind(b"\n") + 1]
        return found

    def kill(self, process: subprocess.Popen[bytes], *, workers: bool = True) -> None:
        """kill -9 of the process, and of all below it unless its workers shall go on."""
        below = psutil.Process(process.pid).children(recursive=True) if workers else []
        process.kill()
        for child in below:
            if child.is_running():
                child.send_signal(signal.SIGKILL)
        psutil.wait_procs(below, timeout=10)
        process.wait()

    def kill_at(self, examples: int, delay: float, *, workers: bool = True) -> None:
        """Start a call and kill it `delay` seconds after `examples` more are stored."""
        before, process, deadline = lines(self.stored()), self.start(), time.monotonic() + 200
        while lines(self.stored()) < before + ARMS * examples:
            assert process.poll() is None, self.printed("err")
            assert time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(delay)
        assert process.poll() is None, "the kill must come in the middle of the sweep"
        self.kill(process, workers=workers)
        self.kept[self.calls] = complete(self.stored())

    def settle(self) -> None:
        """Wait until no process holds a run: workers whose parent was killed may go on for a while."""
        deadline = time.monotonic() + 100
        while any(is_held(folder) for folder in self.results.glob("runs/*")):
            assert time.monotonic() < deadline
            time.sleep(0.1)


def lines(stored: dict[str, bytes]) -> int:
    return sum(content.count(b"\n") for content in stored.values())


def survives_two_kills(sweep: Sweep, members: int, examples: int, rng: random.Random) -> str:
    """Kill a sweep and its workers twice and call it once more; returns the last standard error.

    Asserts that it is complete then, that no stored example ran again, and that no file is half-written.
    """
    for _ in range(2):
        sweep.kill_at(rng.randint(1, members * examples // 3), rng.uniform(0, 0.1))
        before = sweep.stored()
        assert len(complete(before)) < members * examples
    code, _, err = sweep.run()
    assert code == 0, err
    for call in (2, 3):
        assert sweep.appended(call) and not sweep.kept[call - 1] & set(sweep.appended(call)), (
            "a stored example ran again"
        )
    check_complete(sweep, members, examples, before)
    return err


def check_complete(sweep: Sweep, members: int, examples: int, before: dict[str, bytes]) -> None:
    """Every example is stored once, those that were stored ``before`` to the byte, in files that can be read."""
    after = sweep.stored()
    assert all(after[name].startswith(whole(content)) for name, content in before.items())
    assert len(complete(after)) == members * examples and lines(after) == members * examples * ARMS
    check_files(sweep.results)


def complete(stored: dict[str, bytes]) -> set[tuple[str, str]]:
    """(fingerprint, example) of the examples that every arm finished; none twice."""
    found = Counter(
        (name, json.loads(line)["example_id"]) for name, text in stored.items() for line in text.splitlines()
    )
    assert max(found.values(), default=0) <= ARMS
    return {key for key, count in found.items() if count == ARMS}


def whole(content: bytes) -> bytes:
    """The lines of whole examples."""
    kept = content.splitlines(keepends=True)
    return b"".join(kept[: len(kept) // ARMS * ARMS])


def check_files(results: Path) -> None:
    """Every file can be read, and no temporary one is left."""
    for file in (path for path in results.rglob("*") if path.is_file() and ".submitit" not in path.parts):
        assert not file.name.endswith(".tmp"), file
        text = file.read_text()
        if file.suffix == ".json":
            json.loads(text)
        elif file.suffix == ".jsonl":
            [json.loads(line) for line in text.splitlines()]
        elif file.suffix == ".yaml":
            yaml.safe_load(text)
