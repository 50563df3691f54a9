"""What a model makes of one prompt: how likely each choice is, how it goes on, and what one of its heads attends to."""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from html import escape
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from prunekit.checks import Count, Model, Tokenizer, Whole, checked
from prunekit.discovery.parts import outermost_elements
from prunekit.errors import PrunekitError
from prunekit.evaluation.language_modelling import generations
from prunekit.evaluation.likelihood import Span, check_tokens_fit
from prunekit.evaluation.multiple_choice import encode, question_spans
from prunekit.layerwise import fewest_logits
from prunekit.models import device_of, evaluating, max_positions, written_out
from prunekit.questions import Question

NEXT = 5  # of the likeliest next tokens, where no choices are given
LONGEST = 256  # tokens of a text whose attention is shown: the pattern has the square of that many entries


@dataclass(frozen=True, eq=False)
class Answers:
    """What a model answers to one prompt.

    Attributes:
        prompt: the prompt.
        table: one row per choice, or per likely next token, with columns choice, log_likelihood (nats, summed over the
            choice's tokens) and probability: among the choices, or of the next token among all tokens.
        continuation: the greedy continuation.
    """

    prompt: str
    table: pd.DataFrame
    continuation: str

    @property
    def best(self) -> str:
        """The likeliest choice, or next token."""
        return str(self.table.loc[self.table["probability"].idxmax(), "choice"])

    def __repr__(self) -> str:
        rows = (
            f"{choice!r} {p:.0%}" for choice, p in zip(self.table["choice"], self.table["probability"], strict=True)
        )
        return f"Answers({self.prompt!r} → {self.continuation!r}; {', '.join(rows)})"

    def _repr_html_(self) -> str:
        said = f"<p>{escape(self.prompt)} <b>{escape(self.continuation)}</b></p>"
        return f"{said}{self.table.to_html(index=False, float_format='{:.3f}'.format)}"


@checked
def ask(
    model: Model,
    tokenizer: Tokenizer,
    prompt: str,
    choices: Iterable[str] | None = None,
    *,
    max_new_tokens: Count = 6,
) -> Answers:
    """Asks a model one question: the probability of each choice, and how the model goes on by itself.

    Inside `with ablate(…)` it asks the ablated model.

    Args:
        model: a causal language model of transformers.
        tokenizer: the model's own tokenizer.
        prompt: the text to go on from.
        choices: continuations to compare, each with the space that separates it from the prompt; None gives the five
            likeliest next tokens instead.
        max_new_tokens: tokens of the greedy continuation.

    Returns:
        An `Answers`: a table, and the continuation.

    Raises:
        PrunekitError: an empty prompt or choice, a prompt that is too long, or the tokenizer of another model.
    """
    check_prompt(prompt)
    written = generations({"model": model}, tokenizer, prompt, max_new_tokens=max_new_tokens).table["model"][0]
    if choices is None:
        return Answers(prompt, _next_tokens(model, tokenizer, prompt), str(written))
    texts = tuple(choices)
    if not texts:
        raise PrunekitError(
            "choices=[] is empty; give at least one continuation, or None for the likeliest next tokens"
        )
    spans = spans_of(model, tokenizer, Question(prompt, texts, 0, ""))
    with evaluating(model), torch.no_grad():
        sums = span_sums_of(model, spans)[:, 0]
    table = pd.DataFrame({"choice": texts, "log_likelihood": sums.tolist(), "probability": sums.softmax(0).tolist()})
    return Answers(prompt, table, str(written))


def side_by_side_answers(answers: Mapping[str, Answers]) -> pd.DataFrame:
    """The answers of several models to one prompt in one table: a column `model`, then those of `Answers.table`.

    Raises:
        PrunekitError: there is none.
    """
    if not answers:
        raise PrunekitError('no answers to compare; give name → ask(…), such as {"dense": …, "cut": …}')
    return pd.concat([one.table.assign(model=name) for name, one in answers.items()], ignore_index=True)[
        ["model", "choice", "log_likelihood", "probability"]
    ]


def check_prompt(prompt: str) -> None:
    """Raises an error for a prompt without any text."""
    if not prompt.strip():
        raise PrunekitError(f"the prompt is {prompt!r}; write some text, such as 'the friend of Anna lives in'")


def spans_of(model: nn.Module, tokenizer: Any, question: Question) -> list[Span]:
    """One span per choice of a question; what the model cannot take is refused."""
    spans = question_spans(tokenizer, question, max_positions(model), "the question")
    if any(span.n_cut for span in spans):
        raise PrunekitError(f"the question has more than the {max_positions(model)} tokens of the model; shorten it")
    check_tokens_fit(model, max(max(span.tokens) for span in spans))
    return spans


def span_sums_of(model: nn.Module, spans: Sequence[Span], copies: int = 1) -> Tensor:
    """Summed log-likelihood of each span's scored tokens, float64 (n_spans, copies), in nats, on the CPU.

    Spans with the same inputs are run once. Copies of a span are rows of one batch, which a hook may treat each in its
    own way.
    """
    known: dict[tuple[int, ...], Tensor] = {}
    found = []
    for span in spans:
        inputs, n = span.tokens[:-1], span.n_scored
        if inputs not in known:
            most = max(other.n_scored for other in spans if other.tokens[:-1] == inputs)
            known[inputs] = _log_probabilities(model, inputs, most, copies)
        wanted = torch.tensor(span.tokens[span.start :])[None, :, None]
        found.append(known[inputs][:, -n:].gather(2, wanted.expand(copies, -1, -1)).double().sum((1, 2)))
    return torch.stack(found)


def _log_probabilities(model: nn.Module, inputs: Sequence[int], n: int, copies: int) -> Tensor:
    """Log-probabilities of the tokens behind the last n of some inputs, (copies, n, vocabulary), on the CPU."""
    ids = torch.tensor([inputs] * copies, device=device_of(model))
    some = {name: n for name in fewest_logits(model, ids)}
    logits = model(input_ids=ids, use_cache=False, **some).logits[:, -n:]
    return logits.float().log_softmax(-1).cpu().nan_to_num(nan=-torch.inf, neginf=-torch.inf)


def _next_tokens(model: nn.Module, tokenizer: Any, prompt: str) -> pd.DataFrame:
    inputs = encode(tokenizer, prompt, special=True)
    with evaluating(model), torch.no_grad():
        row = _log_probabilities(model, inputs, 1, 1)[0, 0]
    top = row.topk(min(NEXT, len(row)))
    said = [tokenizer.decode([token]) for token in top.indices.tolist()]
    return pd.DataFrame(
        {"choice": said, "log_likelihood": top.values.tolist(), "probability": top.values.exp().tolist()}
    )


# --- attention --------------------------------------------------------------------------------------------------------


@checked
def attention_pattern(model: Model, tokenizer: Tokenizer, text: str, layer: Whole, head: Whole) -> pd.DataFrame:
    """The attention weights of one query head: how much each token of a text reads from each token before it.

    The eager implementation of attention is used for this call alone, since others do not return weights.

    Args:
        model: a causal language model of transformers; unchanged afterwards.
        tokenizer: the model's own tokenizer.
        text: a text of at most 256 tokens.
        layer: number of the layer, from 0.
        head: number of the query head in that layer, from 0. With grouped-query attention, several query heads share a
            KV head.

    Returns:
        A square table of weights in [0, 1]: one row per token that reads, one column per token that is read. Rows sum
        to 1. Labels are position and token, such as `"3 Anna"`.

    Raises:
        PrunekitError: an empty or too long text, no such layer or head, or a layer that returns no attention weights.
    """
    check_prompt(text)
    ids = encode(tokenizer, text, special=True)
    check_tokens_fit(model, max(ids))
    limit = min(LONGEST, max_positions(model) or LONGEST)
    if len(ids) > limit:
        raise PrunekitError(f"the text has {len(ids)} tokens, and at most {limit} are shown; shorten it")
    weights = _weights(model, torch.tensor([ids], device=device_of(model)), layer)
    if head >= len(weights):
        raise PrunekitError(f"head={head} is not in layer {layer}, whose query heads are 0 to {len(weights) - 1}")
    names = [f"{place} {tokenizer.decode([token]).strip() or '␣'}" for place, token in enumerate(ids)]  # no two alike
    index, columns = pd.Index(names, name="reads"), pd.Index(names, name="is read")
    return pd.DataFrame(weights[head].numpy(), index=index, columns=columns)


def _weights(model: nn.Module, ids: Tensor, layer: int) -> Tensor:
    """Attention weights (heads, seq, seq) of one layer, float32 on the CPU."""
    layers = outermost_elements(model)
    if layer >= len(layers):
        raise PrunekitError(f"layer={layer} is not in the model, whose layers are 0 to {len(layers) - 1}")
    found: list[Tensor] = []

    def attend(_module: nn.Module, _args: Any, result: Any) -> None:
        for value in result if isinstance(result, tuple) else ():
            if isinstance(value, Tensor) and value.ndim == 4 and value.shape[-2:] == (ids.shape[1], ids.shape[1]):
                found.append(value[0].detach().float().cpu())

    with evaluating(model), written_out(model), torch.no_grad(), ExitStack() as hooks:
        for part in model.get_submodule(layers[layer]).modules():
            hooks.enter_context(part.register_forward_hook(attend))
        model(input_ids=ids, use_cache=False)
    if not found:
        raise PrunekitError(
            f"layer {layer} of this {type(model).__name__} returns no attention weights: it has no attention, or its "
            "family does not return them; choose another layer or model"
        )
    return found[0]
