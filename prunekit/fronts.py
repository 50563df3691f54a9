"""Pareto fronts of tables."""

import pandas as pd


def unbeaten(table: pd.DataFrame, cost: str, value: str) -> pd.DataFrame:
    """The Pareto front of a table: rows that no other row beats in cost and value, cheapest first.

    Args:
        table: one row per thing.
        cost: name of the column that is to be low.
        value: name of the other one.
    """
    order = table.sort_values([cost, value])
    return order[~(order[value] >= order[value].cummin().shift())]
