"""Pruning via an accuracy predictor (Ji et al., arXiv 2309.09507): search for the best architecture."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from prunekit.account import few
from prunekit.checks import Count, FilePath, Seed, SharedModel, Tokenizer, Whole, checked
from prunekit.discovery import discover
from prunekit.documents import TextSource
from prunekit.importance import score
from prunekit.importance.scoring import AnyImportance, importance_from_name
from prunekit.pruning import PruningPlan, prune
from prunekit.pruning.plan_options import DEFAULT_KINDS
from prunekit.recovery import LoRA, recover

if TYPE_CHECKING:
    from prunekit.search import Budget, Found, PlanSpace, Range, Trees

IMPORTANCES = ("taylor", "taylor-vector", "l2")  # kinds that the space may choose from


class Searched(NamedTuple):
    """The result of the recipe.

    Attributes:
        model: the smaller one, recovered where there were data to recover with.
        plan: by which it was cut.
        found: all that was measured, the predictor, and how each round went.
        space: in which the plan was found; `space.plan(found.pairs.best(…))` is the plan of another point.
    """

    model: Any
    plan: PruningPlan
    found: "Found"
    space: "PlanSpace"

    def __repr__(self) -> str:
        return f"Searched(\n  {self.plan!r},\n  {self.found!r})"


@checked
def accuracy_predictor(
    model: SharedModel,
    tokenizer: Tokenizer | None,
    calib: Tensor,
    budgets: "float | Range | Sequence[Budget]",
    text: TextSource | None = None,
    *,
    importances: Iterable[str | AnyImportance] = IMPORTANCES,
    whole_layers: Whole = 0,
    start_known: bool = True,
    n_pairs: Count = 120,
    n_rounds: Count = 4,
    top_k: Count = 40,
    trees: "Trees | None" = None,
    seed: Seed = 0,
    folder: FilePath | None = None,
    n_jobs: int = 1,
    data: Tensor | TextSource | None = None,
    recovery: LoRA | None = None,
) -> Searched:
    """Prunes by a search with an accuracy predictor: sample, fit, refine, measure the best, recover.

    Args:
        model: the dense model; unchanged.
        tokenizer: its tokenizer.
        calib: integers (n_samples, seq_len), for the scores.
        budgets: fraction of all parameters to remove, or budgets such as `[latency_table(model, groups).at_most(12)]`
            (12 ms).
        text: text on which the search measures perplexity; keep another one for the final evaluation. None is the
            embedded world's validation text.
        importances: names or importances that are chosen from.
        whole_layers: how many whole layers may be removed, at most.
        start_known: measure even shares and global selection by each importance first.
        n_pairs: architectures of the first round. The paper has 525 in all.
        n_rounds: rounds in which the predictor proposes.
        top_k: architectures measured in each round of the predictor.
        trees: hyperparameters of the predictor; None is `Trees()`.
        seed: random seed.
        folder: where the journal is kept, from which a search goes on.
        n_jobs: worker processes.
        data: to recover with, as for `recover`; None leaves the model untuned.
        recovery: how; None is LLM-Pruner's LoRA, `LoRA.paper()`.

    Returns:
        The smaller model, its plan, the search result, and the space.

    Raises:
        PrunekitError: what `PlanSpace`, `search_space` and `recover` raise.

    Source: Fig. 1. Reconstructed: the bounds of the space, how architectures are drawn, and the rounds (from GBDT-NAS).
        Differs: every architecture meets the budget, and each round proposes architectures by evolution.
    """
    from prunekit.search import PlanSpace, known_points, search_space  # of an extra that no other recipe needs

    groups = discover(model)
    kinds = [importance_from_name(each) if isinstance(each, str) else each for each in importances]
    units = groups.of_kind(*DEFAULT_KINDS)
    scores = {each.label: score(model, units, each, calib) for each in kinds}
    space = PlanSpace(groups, scores, budgets, whole_layers=whole_layers)
    found = search_space(
        space,
        model,
        tokenizer,
        n_pairs=n_pairs,
        n_rounds=n_rounds,
        top_k=top_k,
        text=text,
        start=known_points(space) if start_known else (),
        trees=trees,
        seed=seed,
        folder=folder,
        n_jobs=n_jobs,
    )
    plan = space.plan(found.best)
    small = prune(model, replace(plan, tokens=few(calib)))
    if data is not None:
        small = recover(small, recovery or LoRA.paper(), data, tokenizer=tokenizer, inplace=True)
    return Searched(small, plan, found, space)
