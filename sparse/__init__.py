"""Mechanisms of sparse verification: budgets, scoring, selection, sparse operators and their cost.

Imports torch and the standard library only, so that kernels run wherever torch does.
"""
