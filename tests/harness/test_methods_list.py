"""tests/methods.py holds every choice of the sparsity groups and every value of their switches."""

from sparse import budget
from sparse.budget import AttentionBudget, FfnBudget, MoeBudget, ReuseBudget
from tests.methods import METHODS

ATTENTION = [method.active.attention for method in METHODS]
FFN = [method.active.ffn for method in METHODS]
MOE = [method.active.moe for method in METHODS]
REUSE = [method.active.reuse for method in METHODS]


def test_every_value_of_every_switch_has_an_entry() -> None:
    for values, name, known in (
        (ATTENTION, "score", budget.SCORES),
        (ATTENTION, "query", budget.QUERIES),
        (ATTENTION, "gqa", budget.REDUCTIONS),
        (ATTENTION, "heads", budget.HEAD_BUDGETS),
        (ATTENTION, "block_size", budget.BLOCK_SIZES),
        (FFN, "rule", budget.FFN_RULES),
        (FFN, "mask", budget.FFN_MASKS),
        (MOE, "rule", budget.MOE_RULES),
        (MOE, "outside", budget.OUTSIDE),
    ):
        assert {getattr(value, name) for value in values} == set(known), name
    assert {what for reuse in REUSE for what in reuse.skip} == set(budget.SKIPS)


def test_every_field_of_every_budget_is_used_by_an_entry() -> None:
    """A field that no entry sets away from its default is a field that no generic test reaches."""
    for values, kind in ((ATTENTION, AttentionBudget), (FFN, FfnBudget), (MOE, MoeBudget), (REUSE, ReuseBudget)):
        default = kind()
        idle = {
            name for name in kind.__slots__ if all(getattr(value, name) == getattr(default, name) for value in values)
        }
        assert not idle, f"{kind.__name__}: {sorted(idle)}"


def test_names_are_unique_and_active_budgets_are_sparse() -> None:
    assert len({method.name for method in METHODS}) == len(METHODS)
    assert not any(method.active.is_dense for method in METHODS)
