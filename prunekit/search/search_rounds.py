"""The search in rounds: fit a predictor, make the space smaller, measure the most promising candidates."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Any

import numpy as np
import pandas as pd

from prunekit.annotations import Rule, is_integer
from prunekit.checks import Count, FilePath, Seed, SharedModel, Tokenizer, Whole, checked
from prunekit.documents import TextSource
from prunekit.escaping import html_paragraph
from prunekit.evaluation.standard_tasks import Tasks
from prunekit.search.campaign import Jobs, drawn, open_campaign
from prunekit.search.pairs import Metric, Pairs, metrics_of
from prunekit.search.predictor import FEWEST, AccuracyPredictor, Trees
from prunekit.search.proposals import PARENTS, Cut, evolve, refined
from prunekit.search.space import Point, Space, key_of

Samples = Annotated[int, Rule(lambda n: is_integer(n) and n >= FEWEST, f"an integer of {FEWEST} or more")]


@dataclass(frozen=True, eq=False)
class Found:
    """The result of a search.

    Attributes:
        pairs: all samples.
        predictor: fitted to all samples.
        space: the space after the last round.
        rounds: one row per round: round, n_pairs, best, expected and measured (means over the round, in the form of
            `Pairs.values`), left_out.
        cuts: the removed parts of the space, in order.
    """

    pairs: Pairs
    predictor: AccuracyPredictor
    space: Space
    rounds: pd.DataFrame
    cuts: Sequence[Cut] = field(default_factory=list)

    @property
    def best(self) -> Point:
        """The best candidate that was measured."""
        return self.pairs.best()

    def __repr__(self) -> str:
        return f"Found({self.pairs!r}; rounds: {len(self.rounds)})"

    def _repr_html_(self) -> str:
        return f"{html_paragraph(self)}{self.rounds.to_html(index=False, float_format='{:.4g}'.format)}"


@checked
def search_space(
    space: Space,
    model: SharedModel,
    tokenizer: Tokenizer | None,
    *,
    n_pairs: Samples = 120,
    n_rounds: Count = 4,
    top_k: Count = 40,
    n_cuts: Whole = 2,
    metric: str | Metric = "perplexity",
    also: str | Metric | Iterable[str | Metric] = (),
    text: TextSource | None = None,
    tasks: Tasks | None = None,
    start: Sequence[Point] = (),
    trees: Trees | None = None,
    seed: Seed = 0,
    folder: FilePath | None = None,
    n_jobs: Jobs = 1,
    backend: str = "loky",
    source: FilePath | None = None,
) -> Found:
    """Searches a space for the best candidate, with a predictor that proposes what to measure next.

    Each round fits the predictor to all samples, removes the most harmful parts of the space, runs an evolution in the
    rest, and measures the k best candidates. At most `n_pairs + n_rounds * top_k` candidates are measured.

    Args:
        space: the space to search.
        model: the dense model; unchanged.
        tokenizer: its tokenizer.
        n_pairs: random candidates of the first round.
        n_rounds: rounds after the first.
        top_k: candidates measured in each of these rounds.
        n_cuts: parts of the space that each round removes, at most; 0 removes nothing.
        metric: the metric to optimise; this and the following are as for `measure_pairs`.
        also: more metrics to measure.
        text: text for perplexity.
        tasks: for accuracy, as `zero_shot` takes them.
        start: candidates to measure first.
        trees: hyperparameters of the predictor.
        seed: random seed.
        folder: where the journal is kept; a search resumes from it, and several processes may share it.
        n_jobs: number of worker processes.
        backend: joblib backend.
        source: where workers load the model.

    Returns:
        The result; `found.best` is the best candidate and `space.plan(found.best)` its plan.

    Raises:
        PrunekitError: what `measure_pairs` raises, or `n_pairs` below 10.

    Source: Ji et al. (arXiv 2309.09507); rounds and their refinement are GBDT-NAS's (Luo et al. 2020), three of them
        there. Reconstructed: how candidates are proposed (`evolve`), and how ratios are refined (`refined`).
    """
    metrics = metrics_of(metric, also, tokenizer, text, tasks)
    options: Any = {"folder": folder, "n_jobs": n_jobs, "backend": backend, "source": source}
    inside, cuts, rows = space, list[Cut](), list[dict[str, Any]]()
    with open_campaign(space, model, tokenizer, metrics, **options) as campaign:
        campaign.run(0, drawn(space, n_pairs, seed, start))
        for number in range(1, n_rounds + 1):
            pairs = campaign.pairs(before=number)
            points, values = pairs.points, pairs.values
            predictor = AccuracyPredictor(space, trees).fit(points, values)
            inside, new = refined(inside, predictor, pairs, n_cuts)
            cuts += new
            rng = np.random.default_rng([seed, number])
            best = [points[i] for i in np.argsort(values, kind="stable")[:PARENTS]]
            known = campaign.trials.points(before=number)
            propose = partial(evolve, inside, predictor, best, rng, n=top_k, known=known)
            campaign.run(number, partial(_missing, propose, top_k))
            rows.append(_row(number, campaign.pairs(before=number + 1), predictor, new))
        pairs = campaign.pairs()
    predictor = AccuracyPredictor(space, trees).fit(pairs.points, pairs.values)
    return Found(pairs, predictor, inside, pd.DataFrame(rows), cuts)


def _missing(propose: Callable[[], list[Point]], n: int, there: list[Point]) -> list[Point]:
    """The proposed candidates that are new; none if the round is complete already."""
    known = {key_of(point) for point in there}
    return [] if len(there) >= n else [point for point in propose() if key_of(point) not in known]


def _row(number: int, pairs: Pairs, predictor: AccuracyPredictor, cuts: Sequence[Cut]) -> dict[str, Any]:
    """The table row of a round."""
    new = (pairs.table["round"] == number).to_numpy()
    expected = predictor.predict([point for point, is_new in zip(pairs.points, new, strict=True) if is_new])
    return {
        "round": number,
        "n_pairs": len(pairs),
        "best": pairs.best_row()[pairs.metric],
        "expected": float(expected.mean()) if len(expected) else math.nan,
        "measured": float(pairs.values[new].mean()) if new.any() else math.nan,
        "left_out": ", ".join(f"{cut.knob}: {cut.left!r} stays" for cut in cuts),
    }
