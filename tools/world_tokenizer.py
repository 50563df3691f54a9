"""The tokenizer of the embedded world: one token a word, number or mark."""

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from prunekit.world.corpus import documents

SPECIAL = ("<unk>", "<bos>", "<eos>")
NEUTRAL = ("something", "someone", "some", "do")
_PIECES = Regex(r"\n|\w+|[^\w\s]")


def vocabulary() -> dict[str, int]:
    """Every word of the world with its number: special tokens, the line break, then the words in order."""
    splitter = _pre_tokenizer()
    words = set(NEUTRAL)
    for split in ("train", "validation"):
        for text in documents(3000, split=split, seed=0):
            words.update(piece for piece, _ in splitter.pre_tokenize_str(text))
    return {word: number for number, word in enumerate([*SPECIAL, "\n", *sorted(words)])}


def _pre_tokenizer() -> pre_tokenizers.PreTokenizer:
    """Words and marks become pieces, spaces go: a text split at a space gives the same pieces as the whole."""
    return pre_tokenizers.Split(_PIECES, behavior="removed", invert=True)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer, made anew from the corpus; `<bos>` is added in front by default."""
    words = vocabulary()
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = _pre_tokenizer()
    # The word-piece decoder puts a space before each word and none before a mark; it does not know the colon.
    tokenizer.decoder = decoders.Sequence([decoders.WordPiece(prefix="##", cleanup=True), decoders.Replace(" :", ":")])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos> $B", special_tokens=[("<bos>", words["<bos>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<eos>",
        model_max_length=256,
    )
