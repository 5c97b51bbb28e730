"""A saved W&B view of the runs, as code: `python -m scripts.workspace --project P` (docs/tracking.md).

Needs wandb-workspaces (`pip install -e ".[track]"`); --dry-run prints the view as JSON without a network or a login.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

from harness.evidence import tracked, tracking
from harness.evidence.tracking import TrackingError

NAME = "Sparse verification"
ARMS = ("ar", "dense", "sparse")
DRAFTING = ("dense", "sparse")
COMPONENTS = ("draft", "select", "attention", "ffn", "moe", "linear", "head", "accept")
COLUMNS = (
    *("run:group", "run:tags", "config:task.value.name", "config:model.value.name"),
    *(f"summary:{key}" for key in (tracked.SPEEDUP_AR, tracked.SPEEDUP_DENSE, tracked.LIMIT)),
    *(f"summary:{key}" for key in (tracked.QUALITY, tracked.AGREEMENT)),
    *(f"summary:{tracked.of_arm(arm, 'acceptance_length')}" for arm in DRAFTING),
    *("summary:examples", "summary:status"),
)
"""Columns of the table of runs, pinned in this order."""

TRADE_OFFS = (
    (tracked.QUALITY, "quality, sparse minus dense (points)"),
    (tracked.AGREEMENT, "agreement with dense"),
)
SPEEDUPS = ((tracked.SPEEDUP_AR, "speed-up over ar"), (tracked.SPEEDUP_DENSE, "speed-up over dense"))


def build(project: str, entity: str) -> Any:
    """The view: trade-offs, acceptance, times and the examples of runs that are grouped by sweep.

    Raises:
        TrackingError: wandb-workspaces is missing.
    """
    try:
        import wandb_workspaces.reports.v2 as panels
        import wandb_workspaces.workspaces as spaces
        from wandb_workspaces import expr
    except ImportError:
        raise TrackingError('wandb-workspaces is missing; install it: pip install -e ".[track]"') from None
    sections = [
        spaces.Section(name=name, panels=shown, is_open=True)
        for name, shown in (
            ("Trade-off", _trade_off(panels)),
            ("Acceptance", _acceptance(panels)),
            ("Time", _time(panels)),
            ("Examples", _examples(panels)),
            ("Report", _report(panels)),
        )
    ]

    class ByMember(spaces.Workspace):
        """Groups the table of runs alone; panels go on showing every member of a sweep."""

        def _to_model(self) -> Any:
            model: Any = super()._to_model()
            section = model.spec.section
            for settings in (
                section.settings,
                *(each.local_panel_settings for each in section.panel_bank_config.sections),
            ):
                settings.use_runs_table_grouping_in_panels = False
            return model

    return ByMember(
        entity=entity,
        project=project,
        name=NAME,
        sections=sections,
        runset_settings=spaces.RunsetSettings(
            groupby=[expr.Metric("Group")],
            order=[expr.Ordering(expr.Summary(tracked.SPEEDUP_DENSE), ascending=False)],
            pinned_columns=list(COLUMNS),
        ),
    )


def _trade_off(panels: Any) -> list[Any]:
    """Speed-up against what it costs, one point per member of a sweep; speed-ups side by side."""
    scatters = [
        panels.ScatterPlot(title=f"{speed} against {loss}", x=panels.SummaryMetric(cost), y=panels.SummaryMetric(gain))
        for gain, speed in SPEEDUPS
        for cost, loss in TRADE_OFFS
    ]
    keys = [gain for gain, _ in SPEEDUPS] + [tracked.LIMIT]
    return [*scatters, panels.BarPlot(title="speed-up, and the limit by bytes over dense", metrics=keys)]


def _acceptance(panels: Any) -> list[Any]:
    """New tokens per verification: their means, and how often each number came."""
    density = tracked.of_arm("sparse", "density/attention")
    accepted = tracked.of_arm("sparse", "acceptance_length")
    return [
        panels.BarPlot(
            title="acceptance length (new tokens per verification)",
            metrics=[tracked.of_arm(arm, "acceptance_length") for arm in DRAFTING],
        ),
        panels.ScatterPlot(
            title="acceptance length against attention density",
            x=panels.SummaryMetric(density),
            y=panels.SummaryMetric(accepted),
        ),
        panels.CustomChart(
            query={"summaryTable": {"tableKey": tracked.ACCEPTED}},
            chart_name="wandb/bar/v0",
            chart_fields={"label": "tokens", "value": "share"},
            chart_strings={"title": "share of steps by new tokens"},
        ),
        *(panels.LinePlot(title=f"new tokens per step, {arm}", y=[tracked.accepted_key(arm)]) for arm in DRAFTING),
    ]


def _time(panels: Any) -> list[Any]:
    """Where the milliseconds of a step go."""
    components = [
        panels.BarPlot(
            title=f"ms per step by component, {arm}",
            metrics=[
                tracked.of_arm(arm, f"components_ms/{name}")
                for name in COMPONENTS
                if (arm, name) != ("dense", "select")
            ],
        )
        for arm in DRAFTING
    ]
    medians = [tracked.of_arm(arm, "step_ms_p50") for arm in ARMS]
    rates = [tracked.of_arm(arm, "tokens_per_second") for arm in ARMS]
    return [
        *components,
        panels.BarPlot(title="median step (ms)", metrics=medians),
        panels.BarPlot(title="tokens per second", metrics=rates),
        *(panels.LinePlot(title=f"step times (ms), {arm}", y=[tracked.step_key(arm)]) for arm in DRAFTING),
    ]


def _examples(panels: Any) -> list[Any]:
    """The course of a run, example by example."""
    return [
        panels.LinePlot(title=title, x=tracked.NUMBER, y=[f"example/{arm}/{name}" for arm in ARMS], title_x="example")
        for name, title in (("tokens_per_second", "tokens per second"), ("acceptance_length", "acceptance length"))
    ]


def _report(panels: Any) -> list[Any]:
    """The figures that `python -m scripts.sync --report` logs."""
    keys = [f"figures/{name}" for name in ("tradeoff", "axes", "acceptance", "components")]
    return [panels.MediaBrowser(title="figures", num_columns=2, media_keys=keys)]


def spec(workspace: Any) -> dict[str, Any]:
    """What would be sent to W&B, as plain JSON."""
    return dict(json.loads(workspace._to_model().spec.model_dump_json(by_alias=True, exclude_none=True)))


def main(argv: Sequence[str] | None = None) -> int:
    """Save the view and print its address, or print it as JSON; 2 where that cannot be."""
    options = argparse.ArgumentParser(prog="python -m scripts.workspace", description="Saves a W&B view of the runs.")
    options.add_argument("--project", required=True, help="W&B project that holds the runs")
    options.add_argument("--entity", default=None, help="W&B user or team (the account's default)")
    options.add_argument("--dry-run", action="store_true", help="print the view as JSON; no network, no login")
    arguments = options.parse_args(argv)
    try:
        if arguments.dry_run:
            print(json.dumps(spec(build(arguments.project, arguments.entity or "")), indent=1))
            return 0
        build(arguments.project, "")
        workspace = build(arguments.project, arguments.entity or tracking.default_entity())
        print(_save(workspace))
    except TrackingError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def _save(workspace: Any) -> str:
    tracking.require_login()
    try:
        workspace.save()
    except Exception as error:
        raise TrackingError(f"W&B did not take the view ({' '.join(str(error).split())})") from None
    return str(workspace.url)


if __name__ == "__main__":
    sys.exit(main())
