"""Perplexity of a text, with its protocol, and greedy continuations of prompts by several models."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import pandas as pd
import torch
from torch import nn

from prunekit.annotations import Rule, is_real
from prunekit.checks import Count, Length, Model, NotNegative, Tokenizer, check_fields, checked
from prunekit.documents import TextSource
from prunekit.errors import PrunekitError
from prunekit.evaluation.likelihood import check_tokens_fit
from prunekit.evaluation.sequence_scores import log_likelihoods
from prunekit.evaluation.windows import PAPERS, read_spans
from prunekit.models import device_of, evaluating, max_positions


@dataclass(frozen=True)
class PerplexityResult:
    """A perplexity and how it was measured.

    Attributes:
        value: exp(nll / n_tokens).
        nll: summed negative log-likelihood of all scored tokens, in nats.
        n_tokens: tokens that were scored.
        n_windows: forward passes over a window each.
        protocol: `"windows"` over the whole text, `"documents"` one by one, or `"papers"`.
        window: tokens a window at most; None where documents were never split.
        stride: tokens by which windows advance; None where they do not overlap.
        separator: text that separates documents; None if the text was not split.
        bos: whether the tokenizer's BOS token stood first in every window.
    """

    value: Annotated[float, Rule(lambda value: value == math.inf or is_real(value) and value >= 0, "0 or more")]
    nll: NotNegative
    n_tokens: Count
    n_windows: Count
    protocol: str
    window: Length | None
    stride: Count | None
    separator: str | None
    bos: bool

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> "PerplexityResult":
        """The result from the form of `to_dict`.

        Raises:
            PrunekitError: a figure that cannot be.
        """
        found = cls(**fields)
        check_fields(found)
        return found

    @property
    def description(self) -> str:
        """The protocol in words."""
        start = "BOS first in each" if self.bos else "no BOS"
        if self.protocol == "documents":
            split = f", split at {self.separator!r}" if self.separator else ""
            cut = "each whole" if self.window is None else f"windows of at most {self.window}"
            return f"document by document{split}, {cut}, {start}"
        overlap = f"strided by {self.stride}" if self.stride else "non-overlapping"
        named = " (the papers' protocol)" if self.protocol == PAPERS else ""
        return f"{overlap} windows of {self.window} over the whole text, {start}{named}"

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

    def __repr__(self) -> str:
        return f"PerplexityResult({self.value:.4g}; {self.n_tokens:,} tokens; {self.description})"


@checked
def perplexity(
    model: Model,
    tokenizer: Tokenizer | None,
    text_or_path: TextSource,
    *,
    window: Length | None = None,
    stride: Count | None = None,
    protocol: str = "windows",
    separator: str | None = None,
    bos: bool | None = None,
    batch_size: Count = 16,
) -> float:
    """Perplexity of a text: exp of the mean negative log-likelihood a token.

    `measure_perplexity` measures the same, and returns the protocol and the number of tokens too.

    Args:
        model: a causal language model of `transformers`.
        tokenizer: the model's own tokenizer.
        text_or_path: a text, a file, or whatever else `prunekit.documents.read_documents` takes.
        window: tokens a window, BOS included; by default 128, or in documents as many as the model takes.
        stride: tokens by which windows advance, in [1, window]; by default there is no overlap.
        protocol: `"windows"`, `"documents"` or `"papers"`.
        separator: marker between documents; only for `"documents"`.
        bos: True puts BOS first in every window, False leaves it out, None goes by the tokenizer.
        batch_size: rows of about 128 tokens a forward pass; it does not change the result.

    Returns:
        The perplexity; 1 is certainty, the size of the vocabulary is a blind guess.

    Raises:
        PrunekitError: what `measure_perplexity` raises: no text, a window that does not fit, an unknown protocol.

    Source: see `measure_perplexity`.
    """
    options: Any = {"window": window, "stride": stride, "protocol": protocol, "separator": separator, "bos": bos}
    return measure_perplexity(model, tokenizer, text_or_path, batch_size=batch_size, **options).value


@checked
def measure_perplexity(
    model: Model,
    tokenizer: Tokenizer | None,
    text_or_path: TextSource,
    *,
    window: Length | None = None,
    stride: Count | None = None,
    protocol: str = "windows",
    separator: str | None = None,
    bos: bool | None = None,
    batch_size: Count = 16,
) -> PerplexityResult:
    """Perplexity of a text, with its protocol.

    Every window begins as the model's training did: with BOS where the tokenizer adds it by itself. Then every token
    of the text is scored. Without BOS the first token of a window (of the text, where windows overlap) has no context
    and is not scored. The last window counts however short it is.

    Args:
        model: a causal language model of `transformers`.
        tokenizer: the model's own tokenizer.
        text_or_path: a text, the path of a file that holds one, or whatever else `prunekit.documents.read_documents`
            takes (several documents are joined by an empty line for `"windows"`); `"world"` is the embedded
            world's validation text.
        window: tokens a window, BOS included; by default 128 over a whole text, and as many as the model takes in
            documents.
        stride: tokens by which windows advance, in [1, window]; by default there is no overlap.
        protocol: `"windows"` over the whole text; `"documents"` one by one (longer ones are cut into windows);
            `"papers"`, the usual one of the papers: windows over the whole text that do not overlap, without BOS
            whatever the tokenizer does.
        separator: marker between documents, split off; only for `"documents"`.
        bos: True puts the tokenizer's BOS first in every window, False leaves it out, None goes by the tokenizer. No
            other marker is ever added.
        batch_size: rows of about 128 tokens a forward pass; it does not change the result.

    Returns:
        A `PerplexityResult`.

    Raises:
        PrunekitError: the text is empty, shorter than one window, or the path is missing; the window does not
            fit the model; the protocol, stride, separator or BOS is not allowed; the model's loss is not finite.

    Source: non-overlapping windows of 128, LLM-Pruner (Ma et al. 2023), section 4. Theirs has the mean over
        windows and drops the last short one; here it is the mean over tokens, all of them. `"documents"` is
        lm-evaluation-harness's rolling log-likelihood where a document fits one window.
    """
    options: Any = {"window": window, "stride": stride, "protocol": protocol, "separator": separator, "bos": bos}
    read = read_spans(model, tokenizer, text_or_path, **options)
    nll = -log_likelihoods(model, read.spans, batch_size=batch_size, progress="perplexity").sums.sum().item()
    n_tokens = sum(span.n_scored for span in read.spans)
    value = math.exp(nll / n_tokens) if nll / n_tokens < 700 else math.inf
    strided = stride if stride != read.window else None
    return PerplexityResult(value, nll, n_tokens, len(read.spans), protocol, read.window, strided, separator, read.bos)


# --- continuations ----------------------------------------------------------------------------------------------------

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
        shown = self.table.style.hide(axis="index").format(escape="html").format_index(escape="html", axis=1)
        style = "text-align: left; vertical-align: top; white-space: pre-wrap"
        return shown.set_table_styles([{"selector": "th, td", "props": style}]).to_html()


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
