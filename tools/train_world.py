"""Train the model of the embedded world: `python tools/train_world.py --out DIR`."""

import argparse
import json
import math
import random
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast
from world_card import write_card
from world_tokenizer import build_tokenizer

from prunekit.errors import PrunekitError
from prunekit.evaluation import zero_shot
from prunekit.world.corpus import document
from prunekit.world.tasks import tasks

STATE = "training_state.safetensors"
SECOND_PHASE = 0.526  # share of the run after which documents are mostly passages; the facts sat after 0.3


@dataclass(frozen=True)
class Settings:
    """What a run is; a run resumes only under the settings it began with, its length apart.

    Attributes:
        tokens: length of the run; the learning rate falls to zero there.
        seed: of the weights' start and of the documents.
        batch_size: sequences a step.
        seq_len: tokens a sequence, `<bos>` counted; documents are packed, there is no padding.
        learning_rate: the peak of a cosine schedule.
        warmup: steps of linear warm-up.
    """

    tokens: int = 7_782_400
    seed: int = 0
    batch_size: int = 16
    seq_len: int = 128
    learning_rate: float = 3e-3
    warmup: int = 100

    @property
    def n_steps(self) -> int:
        """Optimizer steps in the whole run."""
        return math.ceil(self.tokens / (self.batch_size * self.seq_len))

    def rate(self, step: int) -> float:
        """Learning rate at a step."""
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.n_steps - self.warmup)
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * done))


def configuration(vocab_size: int) -> LlamaConfig:
    """A LLaMA of 3.5 million parameters with grouped-query attention: 4 KV heads of 2 query heads each."""
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=256,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
        tie_word_embeddings=False,
    )


def batch(settings: Settings, tokenizer: PreTrainedTokenizerFast, step: int) -> Tensor:
    """The tokens of one step, (batch, seq): a function of seed and step, so that a resumed run sees the same."""
    rng = random.Random(f"{settings.seed}-{step}")
    phase = int(step > SECOND_PHASE * settings.n_steps)
    documents = iter(lambda: document(rng, "train", phase), None)
    return torch.tensor([packed(documents, tokenizer, settings.seq_len) for _ in range(settings.batch_size)])


def packed(documents: Iterator[str], tokenizer: PreTrainedTokenizerFast, seq_len: int) -> list[int]:
    """`<bos>` and the next documents, one a line, as many as fit."""
    backend, line_break = tokenizer.backend_tokenizer, tokenizer.convert_tokens_to_ids("\n")
    ids = [tokenizer.bos_token_id]
    while len(ids) < seq_len:
        ids += [*backend.encode(next(documents), add_special_tokens=False).ids, line_break]
    return ids[:seq_len]


def _optimizer(model: PreTrainedModel, settings: Settings) -> torch.optim.AdamW:
    matrices = [p for p in model.parameters() if p.dim() > 1]
    norms = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": norms, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(0.9, 0.98), fused=True)


def train_step(model: PreTrainedModel, optimizer: torch.optim.Optimizer, tokens: Tensor, rate: float) -> float:
    """One step on a batch (batch, seq); returns its loss in nats per token."""
    for group in optimizer.param_groups:
        group["lr"] = rate
    logits = model(input_ids=tokens, use_cache=False).logits[:, :-1]  # (batch, seq - 1, vocabulary)
    loss = functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return float(loss.detach())


def save_state(path: Path, model: PreTrainedModel, optimizer: torch.optim.Optimizer, progress: dict) -> None:
    """Weights, optimizer moments and progress in one safetensors file, written beside and moved into place."""
    tensors = {f"model.{name}": p.detach() for name, p in model.named_parameters()}
    for number, moments in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{number}.{key}": value for key, value in moments.items()}
    beside = path.with_suffix(".new")
    save_file({name: t.contiguous().cpu() for name, t in tensors.items()}, beside, {"progress": json.dumps(progress)})
    beside.replace(path)


def load_state(path: Path, model: PreTrainedModel, optimizer: torch.optim.Optimizer, settings: Settings) -> dict:
    """Put a saved state back and return its progress; a new run where nothing is saved."""
    if not path.exists():
        return {"step": 0, "seconds": 0.0, "settings": asdict(settings)}
    with safe_open(path, "pt") as file:
        progress = json.loads(file.metadata()["progress"])
    if progress["settings"] | {"tokens": settings.tokens} != asdict(settings):
        raise PrunekitError(f"{path.parent} holds a run with {progress['settings']}, not {asdict(settings)}: "
                            "repeat its arguments to resume it, or choose another --out")  # fmt: skip
    tensors = load_file(path)
    model.load_state_dict({n.removeprefix("model."): t for n, t in tensors.items() if n.startswith("model.")})
    state = optimizer.state_dict()
    for name, tensor in tensors.items():
        if name.startswith("optimizer."):
            _, number, key = name.split(".")
            state["state"].setdefault(int(number), {})[key] = tensor
    optimizer.load_state_dict(state)
    return progress | {"settings": asdict(settings)}


def accuracies(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, n_questions: int) -> dict[str, float]:
    """Share of right answers a task, on about `n_questions` spread over each."""
    few = [replace(t, questions=t.questions[:: max(1, len(t.questions) // n_questions)]) for t in tasks().values()]
    return {str(name): float(share) for name, share in zero_shot(model, tokenizer, few).accuracy().items()}


def export(out: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    """A plain transformers checkpoint in half precision, each file moved into place when it is whole."""
    beside = out / "export.new"
    half = AutoModelForCausalLM.from_config(type(model.config)(**model.config.to_dict())).half()
    half.load_state_dict(model.state_dict())
    half.save_pretrained(beside)
    tokenizer.save_pretrained(beside)
    for file in beside.iterdir():
        file.chmod(0o644)  # safetensors writes for the owner alone
        file.replace(out / file.name)
    beside.rmdir()


def train(
    out: Path,
    settings: Settings,
    device: str,
    *,
    minutes: float = math.inf,
    config: PreTrainedConfig | None = None,
    save_every: int = 200,
    evaluate_every: int = 250,
) -> PreTrainedModel:
    """Train, or go on training, the model whose state lies in `out`.

    Args:
        out: folder of the run; made where it does not exist.
        settings: see `Settings`.
        device: `"cpu"` or `"cuda"`.
        minutes: stop after this long with everything saved; the next call goes on.
        config: another shape or family of model; it must not drop out.
        save_every: steps between two saved states.
        evaluate_every: steps between two looks at the tasks; 0 for none, and no model card.

    Returns:
        The model as far as it got. `out` holds the checkpoint too once the run is complete.

    Raises:
        PrunekitError: where `out` holds a run with other settings.
    """
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer()
    torch.manual_seed(settings.seed)
    model: Any = AutoModelForCausalLM.from_config(config or configuration(len(tokenizer)))
    model.to(device).train()
    optimizer = _optimizer(model, settings)
    progress = load_state(out / STATE, model, optimizer, settings)
    begun = time.monotonic() - progress["seconds"]
    stop = time.monotonic() + minutes * 60
    for step in _progress_bar(progress["step"], settings):
        loss = train_step(model, optimizer, batch(settings, tokenizer, step).to(device), settings.rate(step))
        progress |= {"step": step + 1, "loss": loss, "seconds": time.monotonic() - begun}
        late, last = time.monotonic() > stop, step + 1 == settings.n_steps
        if late or last or (step + 1) % save_every == 0:
            save_state(out / STATE, model, optimizer, progress)
        if evaluate_every and (last or (step + 1) % evaluate_every == 0):
            _report(progress, accuracies(model, tokenizer, 80))
        if late and not last:
            return model
    export(out, model, tokenizer)
    if evaluate_every and config is None:  # the card is that of the model which comes with the package
        write_card(out, model, tokenizer, settings, progress)
    return model


def _progress_bar(done: int, settings: Settings) -> tqdm:
    return tqdm(range(done, settings.n_steps), initial=done, total=settings.n_steps, unit="step", mininterval=5)


def _report(progress: dict, scores: dict[str, float]) -> None:
    scores_text = " ".join(f"{name} {share:.0%}" for name, share in scores.items())
    tqdm.write(f"step {progress['step']}, loss {progress['loss']:.3f}, {progress['seconds']:.0f} s: {scores_text}")


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python tools/train_world.py",
        description="Train the small language model of prunekit's embedded world from nothing. Stop it at any time and "
        "run the same line again: it goes on where it was. When it is done, --out is a transformers checkpoint.",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the run and, at the end, the checkpoint")
    parser.add_argument("--tokens", type=int, default=Settings.tokens, help="length of the run (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="another seed gives another model of the same world")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to compute (default: cpu)")
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop after this long; run again to go on")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit code: 0, or 2 with one line on bad input."""
    given = _arguments(argv)
    try:
        if given.tokens < 1:
            raise PrunekitError(f"--tokens {given.tokens} trains nothing; give 1 or more, such as {Settings.tokens}")
        if not given.minutes > 0:
            raise PrunekitError(f"--minutes {given.minutes} leaves no time; give more than 0, or leave it out")
        if given.device == "cuda" and not torch.cuda.is_available():
            raise PrunekitError("--device cuda, but this machine shows no CUDA device; use --device cpu")
        if given.out.exists() and not given.out.is_dir():
            raise PrunekitError(f"--out {given.out} is a file; name a folder")
        torch.set_num_threads(1)  # for matrices this small, threads cost more than they bring
        train(given.out, Settings(tokens=given.tokens, seed=given.seed), given.device, minutes=given.minutes)
    except PrunekitError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
