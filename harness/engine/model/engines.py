"""The step of each engine."""

from __future__ import annotations

import logging

from harness.engine.model.compiled_step import CompiledStep
from harness.engine.model.device_step import DeviceStep
from harness.engine.model.families import ModelWeights
from harness.engine.model.step import Step

_log = logging.getLogger(__name__)

ENGINES: dict[str, type[Step]] = {"eager": Step, "compiled": CompiledStep, "cuda_graph": DeviceStep}


def make_step(weights: ModelWeights, taps: tuple[int, ...] = (), *, engine: str) -> Step:
    """The step that ``engine`` runs.

    Args:
        weights: of the model.
        taps: layers whose input features are wanted.
        engine: a name in ``ENGINES``.

    Raises:
        ValueError: an unknown engine.
    """
    if engine not in ENGINES:
        raise ValueError(f"engine={engine}: unknown (valid: {', '.join(ENGINES)})")
    step = ENGINES[engine](weights, taps)
    if isinstance(step, CompiledStep) and weights.device.type == "cpu" and not step.covers_all:
        _log.warning(
            "engine=compiled: the kernels do not cover this model in %s here, torch runs in part", weights.dtype
        )
    return step
