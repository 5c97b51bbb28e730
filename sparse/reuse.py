"""Memory of selections: from anchor layers to later layers, and from step to step (METHOD sections 2 and 5)."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from sparse.selection import Selection


@dataclass(slots=True)
class SelectionMemory:
    """What one sequence remembers while it decodes.

    Positions from a selection's ``tail_start`` on were unfinished or unknown when it was made; whoever uses it attends
    to all of them, so an old selection never loses new positions.

    Attributes:
        step: number of the current step.
        anchor: selection and ``tail_start`` of the current step's last anchor layer, None before the first.
        blocks: per layer, its own last selection, ``tail_start`` and step.
        channels: per layer, its own last FFN channels and step.
    """

    step: int = 0
    anchor: tuple[Selection, int] | None = None
    blocks: dict[int, tuple[Selection, int, int]] = field(default_factory=dict)
    channels: dict[int, tuple[Tensor, int]] = field(default_factory=dict)

    def begin(self) -> None:
        """A step starts: anchors belong to one step."""
        self.step += 1
        self.anchor = None

    def keep_blocks(self, layer: int, selection: Selection, tail_start: int) -> None:
        """``layer`` retrieved; layers after it may take its selection over."""
        self.anchor = (selection, tail_start)
        self.blocks[layer] = (selection, tail_start, self.step)

    def old_blocks(self, layer: int, refresh: int) -> tuple[Selection, int, int] | None:
        """The layer's own selection, ``tail_start`` and age in steps, None once it is ``refresh`` steps old."""
        selection, tail_start, step = self.blocks.get(layer, (None, 0, 0))
        age = self.step - step
        return None if selection is None or age >= refresh else (selection, tail_start, age)

    def keep_channels(self, layer: int, channels: Tensor) -> None:
        """``layer`` chose FFN channels."""
        self.channels[layer] = (channels, self.step)

    def old_channels(self, layer: int, refresh: int) -> tuple[Tensor, int] | None:
        """The layer's own channels and their age in steps, None once they are ``refresh`` steps old."""
        channels, step = self.channels.get(layer, (None, 0))
        age = self.step - step
        return None if channels is None or age >= refresh else (channels, age)
