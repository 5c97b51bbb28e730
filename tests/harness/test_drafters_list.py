"""No drafter without an entry in the list that the generic tests run over."""

from harness.schema import GROUPS
from tests.drafters import CASES


def test_every_choice_of_a_drafter_has_a_case() -> None:
    assert {case.choice for case in CASES} == set(GROUPS["draft"][1])


def test_names_are_unique() -> None:
    assert len({case.name for case in CASES}) == len(CASES)
