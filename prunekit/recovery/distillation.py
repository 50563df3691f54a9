"""Distillation: trains a pruned model to predict what the model before pruning predicts."""

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from prunekit.checks import Count, Model, Part, Positive, check_fields
from prunekit.discovery.parts import outermost_elements
from prunekit.errors import PrunekitError
from prunekit.importance.input_statistics import wide
from prunekit.layerwise import fewest_logits, first_float
from prunekit.models import evaluating
from prunekit.pruning.compensation import groups_of
from prunekit.pruning.plans import PruningPlan
from prunekit.recovery.data import IGNORED, TrainingWindows
from prunekit.recovery.lora import LoRA
from prunekit.recovery.settings import FullTuning
from prunekit.recovery.teacher_logits import TOP_K, TeacherLogits, keep_logits, n_outputs
from prunekit.recovery.training import Objective, relative_error

_LEAST = 1e-7  # probability of what is left beside the likeliest tokens, as float32 can tell it from none


@dataclass(frozen=True)
class Distillation:
    """Settings of distillation: the training text decides where, and the teacher what is to be predicted.

    The loss of a token is `text_share` · cross-entropy + (1 - `text_share`) · T² · KL, T the temperature. KL compares
    two distributions over the next token: of the teacher, p, and of the model, q, both with logits divided by T. Of p
    only the likeliest tokens are kept; all others are one entry, in q too, so it is at most the whole divergence.

    With `hidden_share`, that share of the loss is the difference of hidden states: ‖h − h_teacher‖² / ‖h_teacher‖² of
    the residual stream behind each layer of the model, the mean over layers and over the tokens that are trained on.
    Behind the last layer in front of removed ones, h_teacher is the stream behind these: what the next layer reads.

    Attributes:
        teacher: the model before pruning, or what `keep_logits` kept of it, which needs no room beside the model. A
            model reads the data once, and its predictions are kept in memory: `8 * top_k` bytes a token.
        training: what is trained, and how: `LoRA()` or `FullTuning()`.
        kl: `"forward"` is Σ p log(p/q): q is to cover all that the teacher holds likely. `"reverse"` is Σ q log(q/p).
        temperature: T; None takes 1, or that of the predictions kept.
        text_share: share of the plain loss on the text, from 0 to 1.
        top_k: tokens that are kept at every place; None takes 64, or as many as were kept.
        hidden_share: share of the difference of hidden states, from 0 to 1; above 0 the teacher runs at every step too,
            so it must be a model.
        plan: by which the teacher was cut, which says which of its layers and hidden channels the model has; None where
            it has all of them. Used with `hidden_share` alone.

    Raises:
        PrunekitError: a value that cannot be.

    Source: Hinton et al., "Distilling the knowledge in a neural network" (2015), section 2; for pruned language models
        Muralidharan et al., "Compact language models via pruning and knowledge distillation" (2024). Differs: p is cut
        to its likeliest tokens and a remainder. Muralidharan et al. compare hidden states by their mean squared error
        through a learnt projection; here a kept channel is compared with itself, relative to the size of the token.
    """

    teacher: Model | TeacherLogits = field(repr=False)
    training: LoRA | FullTuning = field(default_factory=LoRA)
    kl: Literal["forward", "reverse"] = "forward"
    temperature: Positive | None = None
    text_share: Part = 0.0
    top_k: Count | None = None
    hidden_share: Part = 0.0
    plan: PruningPlan | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        check_fields(self)
        if self.plan is not None and not self.hidden_share:
            raise PrunekitError("Distillation: plan= is for hidden states; give hidden_share too, or leave it out")
        if isinstance(self.teacher, TeacherLogits):
            if self.hidden_share:
                raise PrunekitError(
                    f"Distillation: hidden_share={self.hidden_share} compares hidden states, and of this teacher only "
                    "predictions were kept; give the model before pruning itself"
                )
            kept = {"temperature": self.teacher.temperature, "top_k": self.teacher[0][0].shape[1]}
            for name, value in kept.items():
                every = name == "top_k" and value == self.teacher.vocabulary  # all there are were kept
                if getattr(self, name) not in (None, value) and not every:
                    raise PrunekitError(
                        f"Distillation: {name}={getattr(self, name)}, but the predictions were kept with {value:g}; "
                        "leave it out, or call keep_logits with it"
                    )

    def objective(self, windows: TrainingWindows, model: nn.Module) -> Objective:
        """What the Trainer minimises for a model on these windows.

        Raises:
            PrunekitError: a teacher that is the model itself, has another vocabulary, read other windows, or has other
                layers or hidden channels than the plan says.
        """
        if self.teacher is model:
            raise PrunekitError("the teacher is the model itself: give the model before pruning")
        kept = self.teacher
        n_tokens = kept.vocabulary if isinstance(kept, TeacherLogits) else n_outputs(kept)
        if n_tokens != n_outputs(model):
            raise PrunekitError(
                f"the teacher predicts over {n_tokens:,} tokens and the model over {n_outputs(model):,}: they need one "
                "vocabulary; give the model before pruning, and cut the vocabulary last"
            )
        if not isinstance(kept, TeacherLogits):
            top_k, temperature = self.top_k or TOP_K, self.temperature or 1.0
            kept = keep_logits(kept, windows, top_k=top_k, temperature=temperature)
        n = len(windows)
        if kept.tokens.shape[1:] != windows.tokens.shape[1:] or not torch.equal(kept.tokens[:n], windows.tokens):
            raise PrunekitError(
                f"the predictions were kept for other windows ({len(kept)} windows of {kept.tokens.shape[1]} tokens) "
                f"than those to train on ({n} windows of {windows.tokens.shape[1]} tokens); give keep_logits and "
                "recover the same data, tokenizer, seq_len and train_on"
            )

        hidden = _HiddenStates(self.teacher, self.plan, model) if self.hidden_share else None

        def objective(model: Any, inputs: dict[str, Tensor]) -> Tensor:
            noting: AbstractContextManager[list[Tensor]] = _streams(model) if hidden else nullcontext([])
            with noting as streams:
                logits = model(input_ids=inputs["input_ids"], use_cache=False).logits
            ids, likely = map(torch.stack, zip(*map(kept.__getitem__, inputs["number"].tolist()), strict=True))
            found = self.loss(logits, inputs["labels"], ids, likely, kept.temperature)
            if hidden is None:
                return found
            apart = hidden.difference(streams, inputs["input_ids"], inputs["labels"])
            return self.hidden_share * apart + (1 - self.hidden_share) * found

        return objective

    def loss(
        self, logits: Tensor, labels: Tensor, ids: Tensor, log_probabilities: Tensor, temperature: float = 1.0
    ) -> Tensor:
        """The mean loss over all tokens that are trained on, nats per token.

        Args:
            logits: (batch, seq, vocabulary) of the model.
            labels: int64 (batch, seq), -100 where a token is not trained on.
            ids: integers (batch, seq - 1, k), the teacher's likeliest tokens.
            log_probabilities: float32 of the same shape, of these tokens, at this temperature.
            temperature: by which the logits are divided for the divergence.
        """
        labels, ids, log_probabilities = (t.to(logits.device) for t in (labels, ids, log_probabilities))
        trained = labels[:, 1:] != IGNORED
        logits = logits[:, :-1][trained].float()
        p, chosen = log_probabilities[trained], ids[trained].long()
        model = (logits / temperature).log_softmax(-1)
        q = model.gather(-1, chosen)
        if chosen.shape[-1] < logits.shape[-1]:
            others = model.scatter(-1, chosen, -math.inf).logsumexp(-1, keepdim=True)  # exact, and has a gradient
            rest = (1 - p.exp().sum(-1, keepdim=True)).clamp_min(_LEAST).log()
            p, q = torch.cat([p, rest], -1), torch.cat([q, others], -1)
        if self.kl == "reverse":
            p, q = q, p
        divergence = temperature**2 * (p.exp() * (p - q)).sum(-1).mean()
        if not self.text_share:
            return divergence
        plain = nn.functional.cross_entropy(logits, labels[:, 1:][trained])
        return self.text_share * plain + (1 - self.text_share) * divergence


class _HiddenStates:
    """The residual stream of a teacher, where the layers and hidden channels of a cut model have theirs."""

    def __init__(self, teacher: Any, plan: PruningPlan | None, model: Any) -> None:
        layers, gone = outermost_elements(teacher), plan.removed_layers if plan else []
        stay = [number for number, path in enumerate(layers) if path not in gone]
        self._teacher, self._channels = teacher, _channels(teacher, plan)
        self._behind = [number - 1 for number in (*stay[1:], len(layers))]
        width = model.get_input_embeddings().weight.shape[1]
        wanted, found = (len(stay), len(self._channels)), (len(outermost_elements(model)), width)
        if wanted != found:
            raise PrunekitError(
                f"the model has {found[0]} layers of {found[1]} hidden channels, and {wanted[0]} of {wanted[1]} of the "
                "teacher's are to be compared; give the plan by which the teacher was cut, Distillation(…, plan=plan) "
                "(in a shell: plan.json in the folder of MODEL)"
            )

    def difference(self, streams: list[Tensor], tokens: Tensor, labels: Tensor) -> Tensor:
        """‖h − h_teacher‖² / ‖h_teacher‖², the mean over layers and tokens that are trained on."""
        with torch.no_grad(), evaluating(self._teacher), _streams(self._teacher) as targets:
            tokens = tokens.to(self._teacher.get_input_embeddings().weight.device)
            self._teacher(input_ids=tokens, use_cache=False, **fewest_logits(self._teacher, tokens))
        parts = []
        for stream, number in zip(streams, self._behind, strict=True):
            trained = (labels[:, 1:] != IGNORED).to(stream.device)
            h, target = (wide(x[:, :-1].to(stream.device)[trained]) for x in (stream, targets[number]))
            parts.append(relative_error(h, target[:, self._channels.to(stream.device)]).to(streams[-1].device))
        return torch.stack(parts).mean()


@contextmanager
def _streams(model: nn.Module) -> Iterator[list[Tensor]]:
    """A context in which the residual stream behind each layer is noted; peft's wrapper may be around the model."""
    found: list[Tensor] = []

    def note(_module: nn.Module, _args: Any, result: Any) -> None:
        stream = first_float(result)
        assert stream is not None  # layers return one
        found.append(stream)

    if isinstance(model, nn.DataParallel):
        raise PrunekitError("hidden states are compared in one process a device: start it with torchrun or accelerate")
    with ExitStack() as hooks:
        for path in outermost_elements(model):
            hooks.callback(model.get_submodule(path).register_forward_hook(note).remove)
        yield found


def _channels(teacher: Any, plan: PruningPlan | None) -> Tensor:
    """The channels of the teacher's residual stream that a plan keeps."""
    embedding = teacher.get_input_embeddings().weight
    groups = None if plan is None else groups_of(plan, teacher, "give the one by which the teacher was cut")
    if plan is None or groups is None or "hidden" not in plan.cut_kinds:
        return torch.arange(embedding.shape[1])
    names = [name for name, p in teacher.named_parameters() if p is embedding]
    for cut in plan.cut_groups("hidden"):
        for member in (m for m in groups[cut].members if m.parameter in names and m.dim == 1):
            return member.owned_by(plan.keep[cut])
    raise PrunekitError(
        "the plan cuts hidden channels, and they are not those of the embedding; leave out hidden_share"
    )
