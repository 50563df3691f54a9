"""Exercise of notebook 11: what filling uneven layers up to one width costs."""

from collections.abc import Callable

from exercises.answers import forgiving

Filling = Callable[[list[int], int], int]

WIDTHS, D_MODEL = [5, 2, 8], 10


def stub_filling(widths: list[int], d_model: int) -> int:
    """What the notebook starts from."""
    return (max(widths) - min(widths)) * d_model


def solution_filling(widths: list[int], d_model: int) -> int:
    """Each layer lacks max - width channels; a channel is a row of gate, a row of up and a column of down."""
    return sum(max(widths) - width for width in widths) * 3 * d_model


@forgiving()
def check_filling(filling: Filling) -> str:
    """`✓ …` where the answer is right, or else a hint at the mistake."""
    got = filling(list(WIDTHS), D_MODEL)
    hints = {
        270: "✓ Right: 3 + 6 + 0 channels are filling, and each has d_model numbers in three matrices.",
        90: "3 + 6 + 0 channels are right. But a channel of a gated feed-forward layer is in three matrices.",
        60: "That is the narrowest layer, in one matrix. Every layer narrower than the widest is filled up.",
        180: "That is the narrowest layer. Every layer narrower than the widest is filled up.",
        9: "These are the channels that are filling: 3 + 6 + 0. How many numbers has a channel?",
        450: "That is all of the feed-forward parameters left. The question is how many zeros come on top of them.",
        720: "That is the padded size as a whole. How much of it is filling?",
        0: "Filling up costs something, unless all widths are the same.",
    }
    return hints.get(got) or (
        f"For widths {WIDTHS} and d_model={D_MODEL} you have {got!r}. The widest layer has 8 channels: how many does "
        "each of the others lack, and how many numbers has a channel in gate, up and down together?"
    )
