"""Perplexity of a text, with its protocol, and the texts of the papers' perplexities by name."""

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

from prunekit.annotations import Rule, is_real
from prunekit.checks import Count, FilePath, Length, Model, NotNegative, Tokenizer, check_fields, checked
from prunekit.documents import TextSource, read_documents
from prunekit.errors import PrunekitError
from prunekit.evaluation.records import Record, folders_of, load_hub
from prunekit.evaluation.sequence_scores import log_likelihoods
from prunekit.evaluation.windows import PAPERS, read_spans


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
        window: tokens a window, BOS included; None for 128, or in documents for as many as the model takes.
        stride: tokens by which windows advance, in [1, window]; None for no overlap.
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
        window: tokens a window, BOS included; None for 128 over a whole text, and for as many as the model takes in
            documents.
        stride: tokens by which windows advance, in [1, window]; None for no overlap.
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


C4_PART = "en/c4-validation.00000-of-00008.json.gz"


@dataclass(frozen=True)
class StandardText:
    """A published text.

    Attributes:
        name: the name to ask for.
        hub: arguments of `datasets.load_dataset`.
        column: its texts there.
        between: what stands between two texts, where they are joined.
        files: names of its file in a folder of data, each tried in turn.
        limit: the first so many texts; None takes all.
    """

    name: str
    hub: dict[str, Any]
    column: str
    between: str
    files: tuple[str, ...]
    limit: int | None = None


TEXTS = {
    text.name: text
    for text in (
        StandardText(
            "wikitext2", {"path": "Salesforce/wikitext", "name": "wikitext-2-raw-v1", "split": "test"}, "text", "\n\n",
            ("wikitext2/test.txt", "wikitext2/wiki.test.raw", "wikitext2/wiki.test.tokens"),
        ),
        StandardText(
            "ptb", {"path": "ptb-text-only/ptb_text_only", "revision": "refs/convert/parquet", "split": "test"},
            "sentence", " ", ("ptb/ptb.test.txt", "ptb/test.txt"),
        ),
        StandardText(
            "c4", {"path": "allenai/c4", "data_files": {"validation": C4_PART}, "split": "validation"},
            "text", " ", ("c4/validation.jsonl", "calibration/c4_demo.jsonl"), limit=1100,
        ),
    )
}  # fmt: skip


@checked
def standard_text(name: str, *, data_dir: FilePath | None = None) -> str:
    """A published text, joined as the papers join it, for `perplexity`.

    Args:
        name: `"wikitext2"` (the test set), `"ptb"` (the test set) or `"c4"` (the first 1,100 validation documents).
        data_dir: a folder that holds `wikitext2/test.txt`, `ptb/ptb.test.txt` or `c4/validation.jsonl`; None reads
            from the hub. A text file is read unchanged.

    Returns:
        The whole text.

    Raises:
        PrunekitError: there is no such text, or it cannot be read.

    Source: the loaders of SparseGPT and Wanda (`lib/data.py`), which join WikiText-2 by empty lines, and PTB and C4 by
    spaces. A local file may differ: `wiki.test.tokens` has `<unk>` for rare words.
    """
    if name not in TEXTS:
        raise PrunekitError(f"no text {name!r}; there are {', '.join(TEXTS)}; or give a text or a file of your own")
    text = TEXTS[name]
    texts = _from_hub(text) if data_dir is None else _from_files(text, data_dir)
    return text.between.join(texts[: text.limit])


def _from_hub(text: StandardText) -> list[str]:
    rows = load_hub(repr(text.hub["path"]), f"{text.files[0]} in it", **text.hub)
    return [Record(row, f"{text.hub['path']}, row {number}").text(text.column) for number, row in enumerate(rows)]


def _from_files(text: StandardText, data_dir: str | Path) -> list[str]:
    root = Path(data_dir).expanduser()
    folders_of(root, ())
    found = next((root / file for file in text.files if (root / file).is_file()), None)
    if found is None:
        raise PrunekitError(
            f"{text.name}: no file {root / text.files[0]}; give that ({' or '.join(text.files)}), or data_dir=None "
            f"to read {text.hub['path']} from the hub"
        )
    return read_documents(found)
