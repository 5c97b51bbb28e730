"""Runs one configuration, or a sweep of them with -m. `python run.py --help` lists every group and every key."""

import sys
from typing import Any

import hydra
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf, read_write

from harness import cli, sweeping


class CheckMembers(Callback):
    """Composes and checks every member of a sweep before the first one runs, so that a typing error costs nothing."""

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        params = [f"{key}={value}" for key, value in (config.hydra.sweeper.get("params") or {}).items()]
        with cli.guard(), read_write(config.hydra):
            parsed = OverridesParser.create().parse_overrides([*params, *config.hydra.overrides.task])
            typed = BasicSweeper.split_arguments(parsed, None)[0]
            plain = (OmegaConf.to_container(hydra.compose("config", member), resolve=True) for member in typed)
            config.hydra.overrides.hydra.append(sweeping.begin(typed, list(map(cli.checked, plain)), config.hydra))


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(composed: DictConfig) -> float | None:
    """Validates the composed configuration, runs it and returns the objective that a sweeper maximises."""
    job: Any = HydraConfig.get()
    number = job.job.num if job.mode.name == "MULTIRUN" else None
    with cli.guard(number, job.overrides.task):
        config = cli.checked(OmegaConf.to_container(composed, resolve=True))
        return cli.run(config, number)


if __name__ == "__main__":
    cli.entry(main, sys.argv[1:])
