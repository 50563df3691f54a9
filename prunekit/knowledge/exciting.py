"""The tokens of a text at which heads and channels are most active."""

from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from prunekit.calibration import check_tokens
from prunekit.checks import Count, Model, Tokenizer, checked
from prunekit.discovery.groups import CoupledGroup
from prunekit.documents import TextSource
from prunekit.errors import PrunekitError
from prunekit.evaluation.likelihood import check_tokens_fit
from prunekit.evaluation.windows import whole_text
from prunekit.importance.input_statistics import Reader, linear_readers
from prunekit.knowledge.ablation_sets import CONSUMED, changing_input, check_units, consumed
from prunekit.knowledge.measurement import check_groups
from prunekit.models import device_of, evaluating, max_positions
from prunekit.text import begin_windows, leading_bos, text_width, tokenize

TOKENS_A_BATCH = 1024
WINDOW = 128  # tokens
BEFORE, AFTER = 8, 3  # tokens of context that are shown


@dataclass(frozen=True, eq=False)
class ExcitingTokens:
    """The most exciting tokens of each unit of some groups.

    Attributes:
        activations: group name → float32 (n_units, top): the activations of the largest size, the largest first. A
            channel's is its output with its sign; a head's, which has many numbers, is their Euclidean norm.
        places: group name → int64 (n_units, top): the window and the position in it, as window · width + position.
        windows: token ids of each window of the text.
        width: number of positions that a place counts per window.
        tokenizer: the tokenizer that decodes them.
    """

    activations: dict[str, Tensor]
    places: dict[str, Tensor]
    windows: list[list[int]]
    width: int
    tokenizer: Any

    def table(self, group: str, unit: int) -> pd.DataFrame:
        """The tokens that excite one unit.

        Args:
            group: name of a group.
            unit: number of a unit in it.

        Returns:
            One row per token, the largest activation first: before (the text before it), token, after, activation,
            window and position.

        Raises:
            PrunekitError: no such group or unit.
        """
        if group not in self.places:
            raise PrunekitError(f"no activations of {group!r} were measured; there are {', '.join(self.places)}")
        check_units(group, len(self.places[group]), [unit])
        pairs = zip(self.activations[group][unit].tolist(), self.places[group][unit].tolist(), strict=True)
        return pd.DataFrame([self._row(value, *divmod(place, self.width)) for value, place in pairs])

    def _row(self, value: float, window: int, position: int) -> dict[str, Any]:
        ids = self.windows[window]
        decode = self.tokenizer.decode
        return {
            "before": decode(ids[max(position - BEFORE, 0) : position]),
            "token": decode([ids[position]]),
            "after": decode(ids[position + 1 : position + 1 + AFTER]),
            "activation": value,
            "window": window,
            "position": position,
        }

    def __repr__(self) -> str:
        n_units = sum(map(len, self.places.values()))
        n_tokens = sum(map(len, self.windows))
        return f"ExcitingTokens({n_units:,} units of {len(self.places)} groups; {n_tokens:,} tokens read)"


@checked
def exciting_tokens(
    model: Model,
    tokenizer: Tokenizer,
    groups: Iterable[CoupledGroup],
    text: Tensor | TextSource,
    *,
    top: Count = 10,
) -> ExcitingTokens:
    """Finds the tokens of a text at which each head or channel is most active, in one pass of the text.

    Args:
        model: a causal language model of transformers; unchanged afterwards.
        tokenizer: the model's own tokenizer.
        groups: groups of heads or FFN channels discovered in it.
        text: a text, file or list of documents, as `perplexity` takes it, or tokens (n_samples, seq_len).
        top: tokens to keep for each unit; fewer if the text is shorter.

    Returns:
        An `ExcitingTokens`; its `table(group, unit)` lists the tokens of one unit.

    Raises:
        PrunekitError: no groups, those of another model or of a kind that no linear layer consumes, or no text.
    """
    chosen = check_groups(model, groups)
    readers = linear_readers(model)
    for group in chosen:
        if not consumed(group, readers):
            raise PrunekitError(
                f"no linear layer consumes {group.name!r}, so its activations cannot be read; give groups of the kinds "
                f"{', '.join(CONSUMED)}"
            )
    windows = _windows(model, tokenizer, text)
    width = max(map(len, windows))
    best = {group.name: _Best(group, readers, top) for group in chosen}
    with evaluating(model), torch.no_grad(), ExitStack() as hooks:
        for one in best.values():
            for module in one.reader.modules:
                hooks.enter_context(changing_input(module, one.see))
        for first, batch in _batches(windows):
            for one in best.values():
                one.begin(first, batch.shape, width)
            model(input_ids=batch.to(device_of(model)), use_cache=False)
    values = {name: one.values for name, one in best.items()}
    return ExcitingTokens(values, {name: one.places for name, one in best.items()}, windows, width, tokenizer)


class _Best:
    """The largest activations of one group's units so far."""

    def __init__(self, group: CoupledGroup, readers: dict[str, Reader], top: int) -> None:
        member = consumed(group, readers)[0]
        self.reader, self.group, self._top = readers[member.parameter], group, top
        self._index, self._places_now = member.index, torch.zeros(0, dtype=torch.long)
        self.values = torch.zeros(group.n_units, 0)
        self.places = torch.zeros(group.n_units, 0, dtype=torch.long)

    def begin(self, first: int, shape: torch.Size, width: int) -> None:
        """Note which windows run next: their first number, and (windows, seq)."""
        numbers = torch.arange(first, first + shape[0])[:, None] * width
        self._places_now = (numbers + torch.arange(shape[1])).flatten()

    def see(self, x: Tensor) -> Tensor:
        """Keep the largest activations of a batch; the inputs are returned as they are."""
        flat = x.detach().float().flatten(0, -2).cpu()
        if len(flat) != len(self._places_now):
            raise PrunekitError(
                f"the consumer layer of {self.group.name!r} does not read every token once (a layer of experts?); "
                "leave this group out"
            )
        own = flat[:, self._index]  # (tokens, n_units, width)
        now = (own[..., 0] if own.shape[-1] == 1 else own.norm(dim=-1)).T  # (n_units, tokens)
        values = torch.cat([self.values, now], 1)
        places = torch.cat([self.places, self._places_now.expand(len(now), -1)], 1)
        kept = values.abs().topk(min(self._top, values.shape[1]), dim=1).indices
        self.values, self.places = values.gather(1, kept), places.gather(1, kept)
        return x


def _windows(model: nn.Module, tokenizer: Any, text: Tensor | TextSource) -> list[list[int]]:
    """Windows of a text, of 128 tokens or what the model takes, the last one shorter; BOS first where it is added."""
    if isinstance(text, Tensor):
        rows: list[list[int]] = check_tokens(text, model).tolist()
        return rows
    first = leading_bos(tokenizer)
    stream = tokenize([whole_text(text, tokenizer)], tokenizer, bos=first)
    check_tokens_fit(model, int(stream.max()))
    width = text_width(min(WINDOW, max_positions(model) or WINDOW), first)
    return [begin_windows(part, first).tolist() for part in stream.split(width)]


def _batches(windows: list[list[int]]) -> list[tuple[int, Tensor]]:
    """Windows in batches, a shorter last one alone: number of the first, and ids (windows, seq)."""
    width = len(windows[0])
    whole = torch.tensor([window for window in windows if len(window) == width])
    at_once = max(1, TOKENS_A_BATCH // width)
    found = list(zip(range(0, len(whole), at_once), whole.split(at_once), strict=True))
    if len(whole) < len(windows):
        found.append((len(whole), torch.tensor(windows[-1:])))
    return found
