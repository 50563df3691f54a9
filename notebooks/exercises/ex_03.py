"""Exercises of notebook 03: entries that a matrix loses, and the units of one group that stay."""

from collections.abc import Callable

import torch
from exercises.answers import forgiving, hint_for
from torch import Tensor

KeepUnits = Callable[[Tensor, float, int], list[int]]

SCORES = torch.tensor([0.9, 0.1, 0.5, 0.3, 0.8, 0.2, 0.7, 0.4, 0.6, 0.0])


def stub_entries_gone(n_rows: int, n_columns: int, rows_gone: int, columns_gone: int) -> int:
    """What the notebook starts from: both savings added up."""
    return rows_gone * n_columns + columns_gone * n_rows


def solution_entries_gone(n_rows: int, n_columns: int, rows_gone: int, columns_gone: int) -> int:
    """Entries before minus entries after; what lies in a row and a column that go is gone once."""
    return n_rows * n_columns - (n_rows - rows_gone) * (n_columns - columns_gone)


@forgiving()
def check_entries_gone(entries_gone: Callable[[int, int, int, int], int]) -> str:
    """`✓ …` where the answer is right, or else a hint at the first thing that is not."""
    found = entries_gone(100, 50, 20, 10)
    hints = {
        1800: "✓ Right: entries in a row *and* a column that go are gone only once.",
        2000: "Entries that lie in a row and in a column that go are counted twice: there are 20 · 10 of them.",
        3200: "That many entries stay. How many go?",
        200: "These are the entries where rows and columns that go meet. All other entries of these rows go too.",
    }
    told = hint_for(found, hints, f"From 100 × 50 entries, 80 × 40 are left. You say that {found} go.")
    if not told.startswith("✓"):
        return told
    return told if entries_gone(3, 7, 1, 0) == 7 else "Right for 100 × 50, wrong for 3 × 7 without a row."


def stub_keep_units(scores: Tensor, fraction: float, round_to: int) -> list[int]:
    """What the notebook starts from; wrong in more than one way."""
    n_kept = round(len(scores) * fraction)
    return scores.argsort()[:n_kept].tolist()


def solution_keep_units(scores: Tensor, fraction: float, round_to: int) -> list[int]:
    """Ascending list of the units that stay: the most important ones, their number rounded up."""
    n_kept = len(scores) - int(len(scores) * fraction + 1e-9)
    n_kept = min(len(scores), -(-n_kept // round_to) * round_to)
    return sorted(scores.argsort(descending=True)[:n_kept].tolist())


@forgiving()
def check_keep_units(keep_units: KeepUnits) -> str:
    """`✓ …` where the answer is right, or else a hint at the first thing that is not."""
    given = SCORES.clone()
    found = keep_units(given, 0.2, 1)
    if not torch.equal(given, SCORES):
        return "The scores that you were given have changed: work on a copy, or sort without changing them."
    if any(unit != int(unit) for unit in found):
        return "These are scores. Return the numbers of the units that stay: 0, 2, 3, …"
    if len(found) == 2:
        return "Two of ten units are left: `fraction` is what goes, not what stays."
    if len(found) != 8:
        return f"Removing 20% of ten units leaves eight; your answer has {len(found)}."
    if 0 not in found:
        return "Unit 0 has the highest score and is gone: `argsort` puts the lowest first, and higher means keep."
    if sorted(found) != [0, 2, 3, 4, 5, 6, 7, 8]:
        return f"Eight units stay, but not the eight best ones: {sorted(found)}."
    if found != sorted(found):
        return "The right units in the wrong order: a plan lists them ascending, so that slices keep their order."
    return _check_rounding(keep_units)


def _check_rounding(keep_units: KeepUnits) -> str:
    found = keep_units(SCORES, 0.5, 4)
    if len(found) == 4:
        return "Five units rounded to a multiple of 4 became four: round up, or more goes than was asked for."
    if found != [0, 2, 3, 4, 5, 6, 7, 8]:
        return f"With round_to=4 and half of ten units to go, eight stay (five, rounded up); you keep {found}."
    if keep_units(SCORES - 1, 0.5, 1) != [0, 2, 4, 6, 8]:
        return "Scores may be negative: with 1 subtracted from each, the order is the same. Take no |…|."
    if len(keep_units(SCORES, 0.35, 1)) != 7:
        return "35% of ten units are 3.5. At most that much may go, so 3 go and 7 stay: round what stays up."
    if keep_units(SCORES, 0.0, 4) != list(range(10)):
        return "Nothing is to be removed, yet the answer is not all ten units: there are no twelve to round up to."
    return "✓ Right: lowest scores go, the width is rounded up, and the order is kept. That is a local plan."
