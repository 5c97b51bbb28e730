"""The stages behind the project's results: sweeps of run.py and the programs that some of them need first."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

SCALES = ("smoke", "small", "full")
FILES: Mapping[str, tuple[str, ...]] = {
    "xsum": ("xsum.jsonl.gz", "xsum.jsonl"),
    "squad": ("squad.jsonl.gz", "squad.jsonl"),
    "math": ("math500.jsonl", "math500.jsonl.gz", "math.jsonl.gz", "math.jsonl"),
    "squad_long": ("long/squad_article_qa.jsonl.gz", "squad_long.jsonl.gz", "squad_long.jsonl"),
}
"""Task -> names under which its file is looked for in a folder of data, the first one found counts."""
WITHOUT_HUB = ("squad_long", "needle")
TABLE1 = ("xsum", "squad", "math")
_ONLY = ("hydra.sweeper.params=null",)
"""The points of a stage, in place of those of its experiment."""


class DataError(ValueError):
    """The data cannot be used; one line that says what to do."""


@dataclass(frozen=True, slots=True)
class Data:
    """Where examples come from: the bundled samples, the hub, or a folder of files."""

    source: str = "bundled"
    folder: Path | None = None

    def overrides(self, task: str) -> list[str]:
        """The overrides that make a task read from here.

        Raises:
            DataError: the folder has no file of this task.
        """
        if self.folder is not None and task in FILES:
            found = next((self.folder / name for name in FILES[task] if (self.folder / name).is_file()), None)
            if found is None:
                raise DataError(f"--data {self.folder}: no file for {task}; looked for {', '.join(FILES[task])}")
            return ["task.source=files", f"task.data_files={found}"]
        return ["task.source=hub"] if self.source == "hub" and task not in WITHOUT_HUB else []


@dataclass(frozen=True, slots=True)
class Stage:
    """One command.

    Attributes:
        name: short and unique.
        what: in a line.
        overrides: of run.py; empty for another program.
        module: of that program, with its arguments.
        seconds: that it takes on two CPU cores, where no dry run can tell.
        makes: a file; where it lies already the stage is left out.
    """

    name: str
    what: str
    overrides: tuple[str, ...] = ()
    module: tuple[str, ...] = ()
    seconds: float = 0.0
    makes: Path | None = field(default=None)


@dataclass(frozen=True, slots=True)
class Size:
    """How much of everything a scale runs.

    Attributes:
        short, long, lengths: examples of each member on short prompts, on long prompts and of each context length.
        answer, long_answer: tokens of an answer in mathematics and on long prompts at most.
        analysis: of the runs on long prompts; each has a single question, so that examples are independent.
        budgets, anchors, channels, experts, hybrids, drafters: points of the curves; an empty text leaves one out.
        contexts: tokens of the synthetic documents.
    """

    short: int
    long: int
    lengths: int
    answer: int
    long_answer: int
    analysis: str
    budgets: str
    contexts: str
    anchors: str = ""
    channels: str = ""
    experts: str = ""
    hybrids: str = ""
    drafters: str = ""


SIZES: Mapping[str, Size] = {
    "smoke": Size(
        short=2, long=1, lengths=1, answer=96, long_answer=16, analysis="full", budgets="8,32", contexts="1024,2048"
    ),
    "small": Size(
        short=24,
        long=8,
        lengths=3,
        answer=96,
        long_answer=48,
        analysis="fidelity",
        budgets="8,16,32,64,128",
        contexts="1024,2048,4096,7168",
        anchors="2,3",
        channels="0.9,0.6667",
        experts="10,6",
        hybrids="64",
        drafters="suffix",
    ),
    "full": Size(
        short=200,
        long=48,
        lengths=12,
        answer=192,
        long_answer=64,
        analysis="full",
        budgets="8,16,32,64,128",
        contexts="1024,2048,4096,7168",
        anchors="2,3,5,10,15",
        channels="0.9,0.8,0.6667,0.5,0.3333",
        experts="11,10,8,6,4",
        hybrids="8,16,32,64,128",
        drafters="suffix,selfsparse,eagle3,combined",
    ),
}


def stages(scale: str, data: Data, model: str, carving: Path, head: Path, texts: Sequence[Path] = ()) -> list[Stage]:
    """Everything that a scale runs, in order.

    Args:
        scale: one of SCALES.
        data: of the tasks.
        model: choice of the model group.
        carving, head: files of the carved model and of the EAGLE-3 head of ``model``, once they are made.
        texts: that the head learns from; without them, and without a head, stages that need one are left out.
    Raises:
        DataError: a task's file is missing.
    """
    size, ours = SIZES[scale], model == "smollm2"
    common = [f"model={model}"] if not ours else []
    found = [_table1(task, size, data) for task in TABLE1]
    found.append(_sweep("tradeoff", "squad_long", size, data, {"attn.topk": size.budgets}))
    found.append(_sweep("context_curve", "needle", size, data, {"task.context_tokens": size.contexts}))
    found += _curves(size, data)
    if ours and size.experts:
        found.append(Stage("carve", "SmolLM2 cut into experts", (), ("scripts.carve_moe",), 240.0, carving))
        found.append(_sweep("moe_curve", "squad", size, data, {"moe.union": size.experts}))
    if size.drafters:
        needs_head = ours and "eagle3" in size.drafters and bool(texts or head.is_file())
        drafters = size.drafters if needs_head else size.drafters.partition(",eagle3")[0]
        training = ("scripts.train_draft", "--minutes", "40", "--text", *map(str, texts))
        found += [Stage("head", "an EAGLE-3 head", (), training, 3000.0, head)] if needs_head else []
        found += [_drafters(task, drafters, size, data) for task in ("xsum", "squad_long")]
        if needs_head:
            found.append(_joined("joined_fast", "squad_long", size, data))
            found += [_joined("joined_trees", task, size, data) for task in ("xsum", "squad_long")]
    if scale == "full":
        found.append(Stage("bench", "operators, steps and loops beside their limits", (), ("scripts.bench",), 600.0))
    return [
        Stage(
            one.name, one.what, (*one.overrides, *(common if one.overrides else ())), one.module, one.seconds, one.makes
        )
        for one in found
    ]


def _table1(task: str, size: Size, data: Data) -> Stage:
    answer = [f"task.max_new_tokens={size.answer}"] if task == "math" else []
    overrides = ["experiment=table1", *_ONLY, *_task(task, size, data), *answer]
    return Stage(f"table1_{task}", f"the paper's table: {task}", tuple(overrides))


def _curves(size: Size, data: Data) -> list[Stage]:
    """Reuse, both together, and the FFN alone, where the scale has points of them."""
    wanted = (
        ("reuse_curve", "squad_long", {"reuse.every": size.anchors}),
        ("hybrid_curve", "squad_long", {"attn.topk": size.hybrids}),
        ("ffn_curve", "squad", {"ffn.keep": size.channels}),
    )
    return [_sweep(name, task, size, data, points) for name, task, points in wanted if all(points.values())]


def _sweep(experiment: str, task: str, size: Size, data: Data, points: Mapping[str, str]) -> Stage:
    swept = [f"{key}={values}" for key, values in points.items()]
    overrides = [f"experiment={experiment}", *_ONLY, *_task(task, size, data), *swept]
    return Stage(experiment, f"{experiment} on {task}: {', '.join(swept)}", tuple(overrides))


def _drafters(task: str, drafters: str, size: Size, data: Data) -> Stage:
    topk = "32" if task == "squad_long" else "8"
    overrides = ["-m", f"draft={drafters}", f"attn.topk={topk}", *_task(task, size, data)]
    return Stage(f"drafters_{task}", f"drafters on {task}: {drafters}", tuple(overrides))


def _joined(experiment: str, task: str, size: Size, data: Data) -> Stage:
    only = _ONLY if experiment == "joined_trees" else ("-m",)
    topk = ["attn.topk=8"] if task == "xsum" else []
    overrides = [f"experiment={experiment}", *only, *_task(task, size, data), *topk]
    return Stage(f"{experiment}_{task}", f"{experiment} on {task}: two drafters in one tree", tuple(overrides))


def _task(task: str, size: Size, data: Data) -> list[str]:
    """A task with as many examples of it as the scale runs."""
    overrides = [f"task={task}", *data.overrides(task)]
    if task == "needle":
        return [*overrides, f"task.limit={size.lengths}"]
    if task != "squad_long":
        return [*overrides, f"task.limit={size.short}"]
    long = [f"task.limit={size.long}", "task.questions=1", f"task.max_new_tokens={size.long_answer}"]
    return [*overrides, *long, f"analysis={size.analysis}"]


def command(stage: Stage, more: Sequence[str] = ()) -> str:
    """What a person would type for a stage; `more` are further overrides of run.py."""
    words = ["run.py", *stage.overrides, *more] if stage.overrides else ["-m", *stage.module]
    return shlex.join(["python", *words])
