"""What a teacher predicts: the most likely tokens after each token of some windows, kept so that it runs once."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm

from prunekit.calibration import check_finite, check_tokens
from prunekit.checks import Count, FilePath, Length, Model, Positive, Tokenizer, check_value, checked
from prunekit.digests import RECORD, check_recorded, digest_of, record, recorded
from prunekit.documents import TextSource, is_stream
from prunekit.errors import PrunekitError
from prunekit.files import alone_in, new_file, read_json, reading, write_text
from prunekit.models import evaluating, logits_alone
from prunekit.recovery.data import TrainingWindows, TrainOn, training_windows

ABOUT = "teacher.json"
TOP_K = 64
_A_SHARD = 256  # windows in one file
_TOKENS_AT_ONCE = 4096
_LOGITS_AT_ONCE = 2**26  # numbers, so that their exponentials take some hundred MB


@dataclass(frozen=True, eq=False)
class TeacherLogits:
    """A teacher's predictions for windows of tokens: at every place the likeliest next tokens.

    Attributes:
        vocabulary: number of tokens that the teacher predicts over.
        temperature: by which its logits were divided.
        tokens: int64 (n_windows, seq_len), what it read.
        folder: of the files that the predictions are in; None where they are in memory.
        in_memory: of each window, ids and log-probabilities.
    """

    vocabulary: int
    temperature: float
    tokens: Tensor
    folder: Path | None = None
    in_memory: tuple[tuple[Tensor, Tensor], ...] = ()

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, window: int) -> tuple[Tensor, Tensor]:
        """Of one window, ids of tokens, int32 (seq_len - 1, k), and their log-probabilities, float32."""
        if not 0 <= window < len(self):
            raise IndexError(f"window {window} of {len(self)}")
        if self.folder is None:
            return self.in_memory[window]
        shard = _shard(self.folder, window // _A_SHARD)
        with reading(shard, "predictions of a teacher", "keep_logits"), safe_open(shard, "pt") as file:
            ids, log_probabilities = (file.get_slice(n)[window % _A_SHARD] for n in ("ids", "log_probabilities"))
        return ids, log_probabilities

    @classmethod
    def load(cls, folder: str | Path) -> "TeacherLogits":
        """Read what `keep_logits` wrote; files are read when they are needed.

        Raises:
            PrunekitError: they are missing, were changed, or are not complete.
        """
        path, writer = Path(folder), "keep_logits"
        with reading(path / ABOUT, "predictions of a teacher", writer):
            about = read_json(path / ABOUT, writer)
            for name in ("vocabulary", "n_windows"):
                check_value(name, about[name], Count)
            check_value("temperature", about["temperature"], Positive)
        check_recorded(path / RECORD, path, "delete the folder and call keep_logits again")
        tokens = [_tokens_in(path / name) for name in sorted(recorded(path / RECORD))]
        n_windows = sum(map(len, tokens))
        if n_windows != about["n_windows"]:
            raise PrunekitError(
                f"{str(path)!r} holds {n_windows} of {about['n_windows']} windows; call keep_logits again as before, "
                "and it goes on"
            )
        return cls(about["vocabulary"], about["temperature"], torch.cat(tokens), path)

    def __repr__(self) -> str:
        n, length = self.tokens.shape
        where = "in memory" if self.folder is None else f"in {str(self.folder)!r}"
        return f"TeacherLogits({n} windows of {length} tokens, temperature {self.temperature:g}, {where})"


@checked
@torch.no_grad()
def keep_logits(
    teacher: Model,
    data: Tensor | TextSource | TrainingWindows,
    folder: FilePath | None = None,
    *,
    top_k: Count = TOP_K,
    temperature: Positive = 1.0,
    train_on: TrainOn = "replies",
    tokenizer: Tokenizer | None = None,
    seq_len: Length = 128,
    n_windows: Count | None = None,
) -> TeacherLogits:
    """Runs a teacher over recovery data once and keeps what it predicts, for `Distillation`.

    A run that was killed goes on where it was when it is called again with the same arguments.

    Args:
        teacher: a causal LM, such as the model before pruning; unchanged afterwards.
        data: as for `recover`; give both the same data, options and tokenizer.
        folder: for the predictions, `8 * top_k` bytes a token; None keeps them in memory.
        top_k: likeliest tokens that are kept at every place; the others are one entry with what is left.
        temperature: by which logits are divided, above 0; above 1, unlikely tokens count for more.
        train_on: as for `recover`.
        tokenizer: needed where `data` is text.
        seq_len: tokens a window, where `data` is not a tensor.
        n_windows: read no more than so many; None reads all. A stream needs it: `max_steps` times `batch_size` of the
            training.

    Returns:
        The predictions.

    Raises:
        PrunekitError: bad data or weights, a folder that holds another teacher's predictions or those for other
            windows, or a disk that is full.
    """
    check_finite(teacher)
    if n_windows is None and is_stream(data):
        raise PrunekitError(
            "data is a stream, of which training reads a part only; give n_windows, its max_steps times its batch_size"
        )
    windows = training_windows(data, tokenizer, seq_len, train_on=train_on, enough=n_windows)
    tokens = check_tokens(windows.tokens[:n_windows], teacher)
    k = min(top_k, n_outputs(teacher))
    if folder is None:
        found = _predicted(teacher, tokens, k, temperature)
        return TeacherLogits(n_outputs(teacher), temperature, tokens.cpu(), None, tuple(found))
    path = Path(folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    with alone_in(path):
        return _kept_in(path, teacher, tokens, k, temperature)


def _kept_in(path: Path, teacher: Any, tokens: Tensor, k: int, temperature: float) -> TeacherLogits:
    """The predictions in a folder, with what is missing there added."""
    _check_same(path, {
        "teacher": digest_of(teacher).hexdigest(), "vocabulary": n_outputs(teacher), "top_k": k,
        "temperature": float(temperature), "n_windows": len(tokens), "seq_len": tokens.shape[1],
    })  # fmt: skip
    check_recorded(path / RECORD, path, "delete the folder and call keep_logits again")
    done = recorded(path / RECORD)
    for number, windows in enumerate(tokens.cpu().split(_A_SHARD)):
        if (file := _shard(path, number)).name in done:
            if not torch.equal(_tokens_in(file), windows):
                raise PrunekitError(f"{str(path)!r} holds predictions for another text or tokenizer; give a new folder")
            continue
        predicted = _predicted(teacher, windows.to(tokens.device), k, temperature)
        ids, log_probabilities = map(torch.stack, zip(*predicted, strict=True))
        with new_file(file) as beside:
            save_file({"tokens": windows, "ids": ids, "log_probabilities": log_probabilities}, beside)
        record([file], path / RECORD)
    return TeacherLogits(n_outputs(teacher), float(temperature), tokens.cpu(), path)


def n_outputs(model: Any) -> int:
    """Tokens that a model predicts over: the rows of its head, or of its embedding where it has none."""
    head = model.get_output_embeddings()
    return len((model.get_input_embeddings() if head is None else head).weight)


def _shard(folder: Path, number: int) -> Path:
    return folder / f"windows-{number:05}.safetensors"


def _tokens_in(shard: Path) -> Tensor:
    with safe_open(shard, "pt") as file:
        tokens: Tensor = file.get_tensor("tokens")
    return tokens


def _check_same(folder: Path, about: dict[str, Any]) -> None:
    """Write what a folder is about, or raise an error where it is about something else."""
    if not (folder / ABOUT).is_file():
        if folder.exists() and (not folder.is_dir() or any(path.name[0] != "." for path in folder.iterdir())):
            raise PrunekitError(f"{str(folder)!r} exists and holds no predictions of a teacher; give a new folder")
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / ABOUT, json.dumps(about, indent=1))
    found = read_json(folder / ABOUT, "keep_logits")
    wrong = [name for name in about if not isinstance(found, dict) or found.get(name) != about[name]]
    if wrong:
        told = "another teacher" if wrong[0] == "teacher" else f"another {wrong[0]}"
        raise PrunekitError(f"{str(folder)!r} holds predictions of {told}; give another folder, or delete it")


def _predicted(teacher: Any, tokens: Tensor, k: int, temperature: float) -> list[tuple[Tensor, Tensor]]:
    """Of each window, the ids of the k likeliest tokens behind every token but the last, and log-probabilities."""
    found: list[tuple[Tensor, Tensor]] = []
    at_once = max(1, min(_LOGITS_AT_ONCE // n_outputs(teacher), _TOKENS_AT_ONCE) // tokens.shape[1])
    places = max(1, _LOGITS_AT_ONCE // n_outputs(teacher))
    bar = tqdm(total=len(tokens), desc="teacher", unit="window", leave=False, delay=1)
    with evaluating(teacher), bar:
        for batch in tokens.split(at_once):
            logits = teacher(input_ids=batch, **logits_alone(teacher)).logits[:, :-1]
            parts = [(part.float() / temperature).log_softmax(-1).topk(k, -1) for part in logits.split(places, 1)]
            ids, best = (torch.cat([part[i] for part in parts], 1).cpu() for i in (1, 0))
            if not bool(best.isfinite().all()):
                raise PrunekitError("the teacher's logits are not finite: load it in float32 or bfloat16")
            found += zip(ids.int(), best, strict=True)
            bar.update(len(batch))
    return found
