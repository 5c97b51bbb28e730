"""Runs one configuration, or a sweep of them with -m. `python run.py --help` lists every group and every key."""

import sys
from importlib import import_module
from typing import Any, cast

import hydra
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from harness import cli


class CheckMembers(Callback):
    """Composes and checks every member of a sweep before the first one runs, so that a typing error costs nothing."""

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        params = [f"{key}={value}" for key, value in (config.hydra.sweeper.get("params") or {}).items()]
        with cli.guard():
            overrides = OverridesParser.create().parse_overrides([*params, *config.hydra.overrides.task])
            for member in cli.counted(BasicSweeper.split_arguments(overrides, None)[0]):
                cli.checked(OmegaConf.to_container(hydra.compose("config", member), resolve=True))


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(composed: DictConfig) -> float | None:
    """Validates the composed configuration, runs it and returns the objective that a sweeper maximises."""
    job: Any = HydraConfig.get()
    member = " ".join(job.overrides.task) if job.mode.name == "MULTIRUN" else ""
    with cli.guard(member):
        config = cli.checked(OmegaConf.to_container(composed, resolve=True))
        return cast(float | None, import_module("harness.runner").run(config, cli.place(job.job.num) if member else ""))


if __name__ == "__main__":
    cli.entry(main, sys.argv[1:])
