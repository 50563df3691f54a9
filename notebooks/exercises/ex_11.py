"""Exercises of notebook 11: which plan stays plain, what filling costs, and which checkpoint to ship."""

from collections.abc import Callable, Sequence

from exercises.answers import forgiving, hint_for

Plain = Callable[[list[int], list[int]], bool]
Filling = Callable[[list[int], int], int]
Choose = Callable[[Sequence[float], Sequence[bool], Sequence[int], int], int]

WIDTHS, D_MODEL = [5, 2, 8], 10


def stub_is_plain(widths: list[int], heads: list[int]) -> bool:
    """What the notebook starts from: it compares the two ends of the model."""
    return widths[0] == widths[-1]


def solution_is_plain(widths: list[int], heads: list[int]) -> bool:
    """One number for all widths, and one for all heads."""
    return len(set(widths)) == 1 and len(set(heads)) == 1


@forgiving()
def check_is_plain(answer: Plain) -> str:
    """`✓ …` where the answer is right, or else a hint at the first thing that is not."""
    cases = [
        ([8, 8, 8], [4, 4, 4], True, "All layers are alike here, so one number is enough for each."),
        ([8, 2, 8], [4, 4, 4], False, "Layers between the first and the last count, too: compare all of them."),
        (
            [8, 8, 2],
            [4, 4, 4],
            False,
            "The last layer has another width, and the configuration has one number for all.",
        ),
        (
            [8, 8, 8],
            [4, 2, 4],
            False,
            "The widths are alike, but not the heads: the configuration has one number of heads.",
        ),
        ([8, 2, 8, 2], [4, 4, 4, 4], False, "It is not enough that layers at the same distance are alike."),
        ([4, 4, 4], [2, 2, 2], True, "Widths need not be those of the whole model, and not equal to the heads."),
    ]
    for widths, heads, right, hint in cases:
        got = answer(list(widths), list(heads))
        if not isinstance(got, bool):
            return f"Return True or False; you return {got!r}."
        if got != right:
            return f"For widths {widths} and heads {heads} it is {right}. {hint}"
    return "✓ Right: one number for all widths and one for all heads."


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
    return hint_for(
        got,
        hints,
        f"For widths {WIDTHS} and d_model={D_MODEL} you have {got!r}. The widest layer has 8 channels: how many does "
        "each of the others lack, and how many numbers has a channel in gate, up and down together?",
    )


def stub_choose(perplexities: Sequence[float], plain: Sequence[bool], sizes: Sequence[int], limit: int) -> int:
    """What the notebook starts from: the best of all."""
    return list(perplexities).index(min(perplexities))


def solution_choose(perplexities: Sequence[float], plain: Sequence[bool], sizes: Sequence[int], limit: int) -> int:
    """The lowest perplexity among those that any program loads and that fit, or -1."""
    fits = [i for i, size in enumerate(sizes) if plain[i] and size <= limit]
    return min(fits, key=lambda i: perplexities[i]) if fits else -1


@forgiving()
def check_choose(answer: Choose) -> str:
    """`✓ …` where the answer is right, or else a hint at the mistake."""
    case = ([3.0, 3.1, 3.6, 4.0, 5.0], [False, True, True, True, True], [60, 100, 70, 70, 50])
    got = answer(*map(list, case), 70)
    told = hint_for(
        got,
        {
            2: "",
            0: "This one is not plain: other programs refuse it.",
            1: "This one is plain and good, but larger than the limit.",
            4: "This is the smallest one. Any size up to the limit will do, so the perplexity decides.",
            3: "This one fits and is plain, but another one that fits has a lower perplexity.",
            3.6: "This is the perplexity. Return the number of the model in the lists, from 0 on.",
            70: "This is a size. Return the number of the model in the lists, from 0 on.",
            -1: "There are models that are plain and fit. A size equal to the limit fits.",
        },
        f"Models 2, 3 and 4 are plain and fit into 70; return the number of the best of them. You have {got!r}.",
    )
    if told:
        return told
    try:
        nothing = answer(*map(list, case), 10)
    except Exception:  # min of nothing
        nothing = "an error"
    if nothing != -1:
        return f"Right where one fits. If no model fits, return -1; your function gives {nothing}."
    return "✓ Right: first what must hold, then the best of what is left."
