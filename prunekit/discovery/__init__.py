"""Discovers the coupled groups of a model by tracing one token."""

from dataclasses import replace

from prunekit.checks import Network, checked
from prunekit.discovery.groups import KINDS, CoupledGroup, Groups, Member
from prunekit.discovery.partition import find_groups
from prunekit.discovery.tracing import Traced, trace

__all__ = ["KINDS", "CoupledGroup", "Groups", "Member", "discover"]


@checked
def discover(model: Network) -> Groups:
    """Finds the coupled groups of a model: slices of parameters that must be removed together.

    One token is traced through the model with an integer label on every channel; operations move, join
    or reduce the labels, and connected components of them are the units. Nothing is looked up by model
    name. An operation without a rule locks what it touches (`groups.locked` says what and why).

    What one token cannot show is not seen: code that branches on the length of the sequence, or that folds positions
    and channels into one dimension. While it runs, the model has stand-ins for its weights: another thread should not
    run it (one that calls this package waits).

    Args:
        model: a causal language model. Its weights are not read; they may stand on the meta device.

    Returns:
        Groups of interchangeable units, layer by layer.

    Raises:
        PrunekitError: this is no model with parameters, or it does not run on a single token.

    Source: dependency groups as in LLM-Pruner (Ma et al. 2023, §3.1) and Torch-Pruning's DepGraph (Fang et
    al. 2023). Differs: labels on single channels in place of edges between layers, so fused projections,
    grouped-query attention and rotary halves need no special cases.
    """
    traced = trace(model)
    return replace(find_groups(traced), traced=Traced.of(traced, model))
