"""LoRAShear (Chen et al., arXiv 2310.18356): knowledge distribution, progressive pruning, dynamic fine-tuning."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from prunekit.checks import Count, FilePath, Model, Share, Tokenizer, checked
from prunekit.discovery import discover
from prunekit.errors import PrunekitError
from prunekit.importance import Taylor, score
from prunekit.importance.scoring import AnyImportance
from prunekit.knowledge import KnowledgeDistribution, knowledge_distribution
from prunekit.pruning import PruningPlan, prune
from prunekit.pruning.plan_options import DEFAULT_KINDS
from prunekit.recovery import LoRA
from prunekit.recovery.data import with_replies
from prunekit.recovery.lhspg import importance_saliency, update_saliency
from prunekit.recovery.mixture import Mixture, MixtureLog, opened, recover_on_mixture, steps_over
from prunekit.recovery.progressive import Progressed, prune_progressively, split_steps, units_for
from prunekit.recovery.sources import Source, Sources, join, shuffle

N_ASKED, N_CALIBRATION = 8, 32  # windows of each source, and of all together
KNOWLEDGE, PRUNING = "knowledge.safetensors", "pruning"  # names in the folder
WARMUP = 0.1  # of the steps of progressive pruning
RATIOS = (0.25, 0.5)  # shares of a group's units that the knowledge distribution ablates


class Sheared(NamedTuple):
    """The result of the recipe.

    Attributes:
        model: the smaller one, recovered.
        plan: by which it was cut.
        knowledge: the distribution over the groups of the dense model.
        progress: the progressive pruning: loss curve, and the norms of the units that went.
        mixture: log of the dynamic fine-tuning, round by round.
    """

    model: Any
    plan: PruningPlan
    knowledge: KnowledgeDistribution
    progress: Progressed
    mixture: MixtureLog

    def __repr__(self) -> str:
        return f"Sheared(\n  {self.plan!r},\n  {self.knowledge!r},\n  {self.progress!r},\n  {self.mixture!r})"


@checked
def lorashear(
    model: Model,
    tokenizer: Tokenizer | None,
    sources: Sources,
    pruning_ratio: Share = 0.2,
    *,
    instructions: Sources | None = None,
    method: LoRA | None = None,
    mixture: Mixture | None = None,
    gamma: Share = 0.1,
    importance: AnyImportance | None = None,
    n_periods: Count = 5,
    shares: tuple[float, float, float] = (0.6, 0.3, 0.1),
    folder: FilePath | None = None,
) -> Sheared:
    """Prunes as LoRAShear does: knowledge distribution, progressive pruning, dynamic fine-tuning.

    Args:
        model: the dense model; unchanged.
        tokenizer: its tokenizer.
        sources: pretraining-like text, name → text or tokens. Some windows of each are laid aside: they say where
            knowledge lies and what was lost, and are never trained on.
        pruning_ratio: fraction of all the model's parameters that goes.
        instructions: the sources of the second stage; None goes on with `sources`.
        method: how LoRA trains, over all stages together. None is `LoRA()`; of a learning rate, see
            `prune_progressively`. With the default shares and mixture 40 steps are the least.
        mixture: how sources are weighed.
        gamma: fraction of the groups that stays whole.
        importance: by which units are ablated for the distribution and chosen at each period's start; None ablates
            by `Taylor()` and chooses by the paper's proxies.
        n_periods: in which the units go.
        shares: of the steps, for progressive pruning, `sources` and `instructions`.
        folder: where an interrupted run goes on, as far as the end of the pruning; a new one, or one of the same run.

    Returns:
        The smaller model and the intermediate results.

    Raises:
        PrunekitError: shares that do not sum to 1, or errors of the steps; arguments are checked first.

    Source: Alg. 1 to 5. Reconstructed: the ratios of the distribution and γ, which are not given; see `Mixture` and
        `prune_progressively` for what else.
    """
    method, mixture = method or LoRA(), mixture or Mixture()
    folder = None if folder is None else _own(Path(folder))
    first = opened(sources, tokenizer, method, mixture, model)
    second = first if instructions is None else opened(instructions, tokenizer, method, mixture, model)
    documents = [document for source in first for document in source.documents]
    everything = join(shuffle(documents, seed=0), first[0].seq_len, first[0].bos)
    pruning, *tunings = _shared_out(method, method.n_steps(len(everything)), shares)
    stages = [(stage, how) for stage, how in zip((first, second), tunings, strict=True) if how is not None]
    groups, calib = discover(model), everything.tokens[:N_CALIBRATION]
    split_steps(pruning.max_steps or 0 if pruning else 0, n_periods, WARMUP, 0.0)  # arguments of later steps
    units_for(groups, pruning_ratio)
    _check_stages(stages, mixture)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)

    units, asked = groups.of_kind(*DEFAULT_KINDS), {source.name: source.validation[:N_ASKED] for source in first}
    scores = score(model, units, importance or Taylor(), calib)
    path = None if folder is None else folder / KNOWLEDGE
    knowledge = knowledge_distribution(model, tokenizer, units, scores, ratios=RATIOS, text=asked, path=path)
    progress = prune_progressively(
        model,
        pruning_ratio,
        with_replies(everything),
        pruning,
        protect=knowledge.unprunable(gamma),
        n_periods=n_periods,
        warmup=WARMUP,
        saliency=update_saliency if importance is None else importance_saliency(importance, calib),
        folder=None if folder is None else folder / PRUNING,
    )
    small, log = prune(progress.model, progress.plan), MixtureLog(())
    for stage, how in stages:
        small = recover_on_mixture(small, model, stage, how, mixture, inplace=True)
        log += small.mixture_log
    return Sheared(small, progress.plan, knowledge, progress, log)


def _shared_out(method: LoRA, n_steps: int, shares: tuple[float, float, float]) -> list[LoRA | None]:
    """The method with the steps of each stage; None for one that has none."""
    if min(shares) < 0 or abs(sum(shares) - 1) > 1e-9:
        raise PrunekitError(f"shares={shares!r}; give three that sum to 1, such as (0.6, 0.3, 0.1)")
    steps = [round(share * n_steps) for share in shares]
    return [replace(method, max_steps=n) if n else None for n in steps]


def _check_stages(stages: Sequence[tuple[Sequence[Source], LoRA]], mixture: Mixture) -> None:
    """Raise early for stages that have too few steps."""
    for stage, how in stages:
        try:
            steps_over(stage, how, mixture)
        except PrunekitError as error:
            raise PrunekitError(
                f"shares= gives a stage of fine-tuning {how.max_steps} of the method's steps: {error}, or change shares"
            ) from None


def _own(folder: Path) -> Path:
    """A folder that contains only files of this recipe."""
    if folder.is_file():
        raise PrunekitError(f"{str(folder)!r} is a file; give a new folder")
    others = {path.name for path in folder.glob("*")} - {KNOWLEDGE, PRUNING}
    if others:
        raise PrunekitError(f"{str(folder)!r} holds {min(others)!r}; give a new folder, or one of the same run")
    return folder
