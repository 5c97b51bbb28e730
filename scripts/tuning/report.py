"""What a study leaves behind: a table on the screen, and <study>.json, .md, .png and .pdf."""

from __future__ import annotations

import io
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from harness.evidence.store import write_text
from harness.fields import show
from scripts import cells
from scripts.cells import Grid
from scripts.figures import tuning
from scripts.tuning.measure import Estimate
from scripts.tuning.space import Values
from scripts.tuning.trials import COUNTED, Outcome

AS_TYPED = "as typed"


def number(estimate: Estimate | None, *, speed: bool = False) -> str:
    """A value with its interval: "1.93x [1.71, 2.20]" or "0.031 [0.02, 0.05]"."""
    if estimate is None:
        return cells.NOTHING
    form = "{:.2f}" if speed else "{:.3g}"
    bounds = "" if estimate.ci is None else f" [{form.format(estimate.ci[0])}, {form.format(estimate.ci[1])}]"
    return form.format(estimate.value) + ("x" if speed else "") + bounds


def differences(words: Sequence[str], base: Values) -> str:
    """The words that say something else than the configuration as it was typed."""
    split = [word.partition("=") for word in words]
    told = [f"{key}={value}" for key, _, value in split if key not in base or show(base[key]) != value]
    return " ".join(told) or AS_TYPED


def line(trial: int, done: int, wanted: int, outcome: Outcome, base: Values) -> str:
    """A trial in one line."""
    head = f"trial {trial} [{done}/{wanted}] {outcome.state}"
    if outcome.state == "repeated":
        return f"{head}: trial {outcome.reason} has the same setting"
    numbers = ""
    if outcome.speed is not None:
        numbers = f" {number(outcome.speed, speed=True)}, loss {number(outcome.loss)}, {outcome.seconds:.0f} s;"
    reason = f" ({outcome.reason})" if outcome.reason else ""
    return f"{head}:{numbers} {differences(outcome.words, base)}{reason}"


def front_grid(document: Mapping[str, Any]) -> Grid:
    """The Pareto front, fastest first, and the default where it is not on it."""
    trials = {one["number"]: one for one in document["trials"]}
    default, chosen = document["default"], document["chosen"]["number"]
    numbers = [*document["front"], *([] if default in document["front"] else [default])]
    rows = []
    for index in numbers:
        one = trials[index]
        marks = [word for word, holds in (("default", index == default), ("chosen", index == chosen)) if holds]
        rows.append(
            (
                str(index),
                number(Estimate.of(one["speed"]), speed=True),
                number(Estimate.of(one["loss"])),
                ", ".join(marks),
                one["setting"],
            )
        )
    counts = {state: sum(one["state"] == state for one in document["trials"]) for state in (*COUNTED, "impossible")}
    told = ", ".join(f"{count} {state}" for state, count in counts.items() if count)
    title = f"Pareto front of {document['study']}: {document['examples']} examples of {document['task']}; {told}"
    header = ("trial", f"speed-up over {tuning.BASELINES[document['speed']]}", document["loss"], "", "setting")
    return Grid(title, header, tuple(rows), frozenset({0, 1, 2}))


def validation_grid(document: Mapping[str, Any]) -> Grid:
    """Default and tuned on the held-back examples, and what is between them."""
    found = document["validation"]
    body = [
        (side, *(number(Estimate.of(found[side][key]), speed=key == "speed") for key in ("speed", "loss")))
        for side in ("default", "tuned")
    ]
    ratio, difference = Estimate.of(found["speed_ratio"]), Estimate.of(found["loss_difference"])
    body.append(("tuned / default, tuned - default", number(ratio, speed=True), number(difference)))
    title = f"Held-back examples: {found['examples']} from task.offset={found['offset']} on"
    header = ("setting", f"speed-up over {tuning.BASELINES[document['speed']]}", document["loss"])
    return Grid(title, header, tuple(body), frozenset({1, 2}))


def notes(document: Mapping[str, Any]) -> list[str]:
    """What the tables do not say."""
    told = [
        f"Chosen: {document['chosen']['rule']}. Intervals are 95%, paired and clustered; the front is judged on the "
        "examples that it was chosen on, so its best values are lucky ones too."
    ]
    if document["chosen"]["number"] == document["default"]:
        told.append("The search found nothing better than the default, so there is nothing to validate.")
    if found := document.get("validation"):
        told.append(
            f"{found['verdict'][0].upper()}{found['verdict'][1:]}. Only the one chosen setting was validated: picking "
            "among several there would make the held-back examples part of the search."
        )
    return told


def write(document: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write all files, each atomically; the figure's and the table's content is in the JSON."""
    stem = str(document["study"])
    grids = [front_grid(document), *([validation_grid(document)] if document.get("validation") else [])]
    written = [folder / f"{stem}.json", folder / f"{stem}.md"]
    write_text(written[0], json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    write_text(
        written[1], "\n".join([*(cells.markdown(grid) for grid in grids), *(f"{one}\n" for one in notes(document))])
    )
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure = tuning.figure(document)
    for suffix, options in (("png", {"dpi": 160}), ("pdf", {"metadata": {"CreationDate": None}})):
        buffer = io.BytesIO()
        figure.savefig(buffer, format=suffix, bbox_inches="tight", **options)
        written.append(_replace(folder / f"{stem}.{suffix}", buffer.getvalue()))
    plt.close(figure)
    return written


def _replace(file: Path, content: bytes) -> Path:
    with tempfile.NamedTemporaryFile(dir=file.parent, delete=False) as stream:
        stream.write(content)
    Path(stream.name).chmod(0o644)
    os.replace(stream.name, file)
    return file
