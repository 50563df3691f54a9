"""Greedy continuations of prompts by several models, in one table."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from html import escape
from typing import Any

import pandas as pd
import torch
from torch import nn

from prunekit.checks import Count, Model, Tokenizer, checked
from prunekit.errors import PrunekitError
from prunekit.evaluation.likelihood import check_tokens_fit
from prunekit.models import device_of, evaluating, max_positions

GREEDY: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None, "num_beams": 1}


@dataclass(frozen=True, eq=False)
class Generations:
    """Continuations of prompts.

    Attributes:
        table: one row per prompt: a column `prompt`, and one column per model with its continuation.
        max_new_tokens: tokens at most.
    """

    table: pd.DataFrame
    max_new_tokens: int

    def __repr__(self) -> str:
        blocks = [
            "\n".join([row["prompt"], *(f"  {name}: {row[name]!r}" for name in self.table.columns[1:])])
            for row in self.table.to_dict("records")
        ]
        return "\n".join(blocks)

    def _repr_html_(self) -> str:
        """An HTML table with escaped cells that keep their line breaks."""
        style = 'style="text-align: left; vertical-align: top; white-space: pre-wrap"'
        head = "".join(f"<th {style}>{escape(str(name))}</th>" for name in self.table)
        rows = [
            "".join(f"<td {style}>{escape(str(cell))}</td>" for cell in row)
            for row in self.table.itertuples(index=False)
        ]
        return f"<table><tr>{head}</tr>{''.join(f'<tr>{row}</tr>' for row in rows)}</table>"


@checked
def generations(
    models: Mapping[str, Model], tokenizer: Tokenizer, prompts: str | Iterable[str], *, max_new_tokens: Count = 40
) -> Generations:
    """Greedy continuations of each prompt by each model.

    Args:
        models: name → causal language model of `transformers`, such as `{"dense": model, "cut": small}`; all of one
            tokenizer.
        tokenizer: the models' own tokenizer.
        prompts: texts to go on from, or one; each is encoded as the tokenizer does by itself (with BOS where it adds
            one).
        max_new_tokens: tokens to write at most; a model stops earlier at its end-of-sequence token.

    Returns:
        A `Generations`, whose `table` has one column a model.

    Raises:
        PrunekitError: there is no model or prompt, a prompt is empty or leaves no room, or the tokenizer does not fit.
    """
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    if not models or "prompt" in models:
        raise PrunekitError('models: give at least one, by name: {"dense": model, "cut": small}; "prompt" is no name')
    bad = next((text for text in texts if not isinstance(text, str) or not text), None)
    if not texts or bad is not None:
        raise PrunekitError(f"prompts: {bad!r:.60}; give at least one text that is not empty")
    encoded = [tokenizer(text, return_tensors="pt", verbose=False)["input_ids"] for text in texts]
    columns = {
        name: [_continue(model, tokenizer, ids, max_new_tokens) for ids in encoded] for name, model in models.items()
    }
    return Generations(pd.DataFrame({"prompt": texts, **columns}), max_new_tokens)


def _continue(model: nn.Module, tokenizer: Any, ids: torch.Tensor, max_new_tokens: int) -> str:
    """The continuation of one prompt by one model, integers (1, seq)."""
    check_tokens_fit(model, int(ids.max()))
    limit = max_positions(model)
    if limit is not None and ids.shape[1] + max_new_tokens > limit:
        raise PrunekitError(
            f"a prompt of {ids.shape[1]} tokens and {max_new_tokens} more are beyond the {limit} that this model "
            "takes; shorten the prompt or give a smaller max_new_tokens"
        )
    ids = ids.to(device_of(model))
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    options: Any = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "max_new_tokens": max_new_tokens}
    with evaluating(model), torch.no_grad():
        written = model.generate(**options, **GREEDY, use_cache=True, pad_token_id=pad)  # type: ignore[operator]
    return tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True)
