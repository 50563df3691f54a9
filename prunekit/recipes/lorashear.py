"""LoRAShear (Chen et al., arXiv 2310.18356): find where knowledge lies, prune progressively, tune on what was lost."""

from dataclasses import replace
from typing import Any, NamedTuple

from prunekit.discovery import discover
from prunekit.errors import PrunekitError
from prunekit.importance import Importance, Taylor, score
from prunekit.knowledge import KnowledgeDistribution, knowledge_distribution
from prunekit.pruning import PruningPlan, prune
from prunekit.pruning.planning import DEFAULT_KINDS
from prunekit.recovery import LoRA
from prunekit.recovery.lhspg import importance_saliency, update_saliency
from prunekit.recovery.mixture import Mixture, MixtureLog, recover_on_mixture
from prunekit.recovery.progressive import Progressed, prune_progressively
from prunekit.recovery.sources import Sources, join, open_sources, shuffle

N_ASKED, N_CALIBRATION = 8, 32  # windows of each source, and of all together
RATIOS = (0.25, 0.5)  # of a group's units, at which it is asked what the model knows without them


class Sheared(NamedTuple):
    """What the recipe returns.

    Attributes:
        model: the smaller one, recovered.
        plan: by which it was cut.
        knowledge: the distribution over the groups of the dense model.
        progress: the progressive pruning: loss curve, and the norms of the units that went.
        mixture: what was measured and drawn in each round of the dynamic fine-tuning.
    """

    model: Any
    plan: PruningPlan
    knowledge: KnowledgeDistribution
    progress: Progressed
    mixture: MixtureLog


def lorashear(
    model: Any,  # noqa: ANN401
    tokenizer: Any,  # noqa: ANN401
    sources: Sources,
    pruning_ratio: float = 0.2,
    *,
    instructions: Sources | None = None,
    method: LoRA | None = None,
    mixture: Mixture | None = None,
    gamma: float = 0.1,
    importance: Importance | None = None,
    n_periods: int = 5,
    shares: tuple[float, float, float] = (0.6, 0.3, 0.1),
) -> Sheared:
    """Distribution, protection, progressive pruning with transfer, construction, dynamic fine-tuning.

    Args:
        model: the dense model; it is left alone.
        tokenizer: its tokenizer.
        sources: pretraining-like text, name → text or tokens. Progressive pruning reads all of it but a few windows,
            which say where knowledge lies.
        pruning_ratio: fraction of all the model's parameters that goes.
        instructions: the sources of the second stage; None goes on with `sources`.
        method: how LoRA trains, over all stages together. None is `LoRA()`.
        mixture: how sources are weighed.
        gamma: fraction of the groups that stays whole.
        importance: by which units are silenced for the distribution and chosen at each period's start; None silences
            by `Taylor()` and chooses by the paper's proxies.
        n_periods: in which the units go.
        shares: of the steps, for progressive pruning, `sources` and `instructions`.

    Returns:
        The smaller model, and what was found on the way.

    Raises:
        PrunekitError: shares that do not sum to 1, or what the steps raise.

    Source: Alg. 1 to 5. Reconstructed: the ratios of the distribution and γ, which are not given; see `Mixture` and
        `prune_progressively` for what else.
    """
    if len(shares) != 3 or min(shares) < 0 or abs(sum(shares) - 1) > 1e-9:
        raise PrunekitError(f"shares={shares!r}; give three that sum to 1, such as (0.6, 0.3, 0.1)")
    method = method or LoRA()
    opened = open_sources(sources, tokenizer, method.seq_len, model, n_validation=N_ASKED)
    everything = join(shuffle([d for source in opened for d in source.documents], seed=0), opened[0].seq_len)
    n_steps = method.n_steps(len(everything))
    pruning, tuning, instructing = (replace(method, max_steps=round(share * n_steps) or None) for share in shares)

    calib = everything[:N_CALIBRATION]
    units = discover(model).of_kind(*DEFAULT_KINDS)
    scores = score(model, units, importance or Taylor(), calib)
    asked = {source.name: source.validation for source in opened}
    knowledge = knowledge_distribution(model, tokenizer, units, scores, ratios=RATIOS, text=asked)

    progress = prune_progressively(
        model,
        pruning_ratio,
        everything,
        pruning,
        protect=knowledge.unprunable(gamma),
        n_periods=n_periods,
        saliency=update_saliency if importance is None else importance_saliency(importance, calib),
    )
    small, log = prune(progress.model, progress.plan), MixtureLog(())
    for data, how in ((sources, tuning), (instructions or sources, instructing)):
        if how.max_steps:
            small = recover_on_mixture(small, model, data, how, mixture, tokenizer=tokenizer, inplace=True)
            log += small.mixture_log
    return Sheared(small, progress.plan, knowledge, progress, log)
