"""What is remembered between layers and between steps."""

import torch

from sparse.reuse import SelectionMemory
from sparse.selection import Selection


def selection(number: int) -> Selection:
    return Selection(torch.tensor([[number]]), None, 1)


def test_anchors_belong_to_one_step() -> None:
    memory = SelectionMemory()
    memory.begin()
    memory.keep_blocks(0, selection(7), 32)
    assert memory.anchor is not None and memory.anchor[0].blocks.item() == 7 and memory.anchor[1] == 32
    memory.begin()
    assert memory.anchor is None


def test_old_selections_age_and_expire() -> None:
    memory = SelectionMemory()
    memory.begin()
    assert memory.old_blocks(2, 3) is None and memory.old_channels(2, 3) is None
    memory.keep_blocks(2, selection(5), 48)
    memory.keep_channels(2, torch.tensor([4, 9]))
    for age in (1, 2):
        memory.begin()
        old, channels = memory.old_blocks(2, 3), memory.old_channels(2, 3)
        assert old is not None and old[0].blocks.item() == 5 and old[1:] == (48, age)
        assert channels is not None and channels[0].tolist() == [4, 9] and channels[1] == age
        assert memory.old_blocks(1, 3) is None
    memory.begin()
    assert memory.old_blocks(2, 3) is None and memory.old_channels(2, 3) is None
