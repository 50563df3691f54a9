"""Rows of the published data sets as questions, with lm-evaluation-harness's prompts."""

import re
from collections.abc import Iterable

from prunekit.evaluation.records import Record
from prunekit.questions import Question

LETTERS = ("A", "B", "C", "D")  # of MMLU's choices


def _question(context: str, choices: Iterable[str], answer: int, domain: str) -> Question:
    """A question whose choices follow the context after a space."""
    return Question(context, tuple(f" {choice}" for choice in choices), answer, domain)


def read_boolq(row: Record) -> Question:
    """SuperGLUE has `label`; the data set's own form has a truth value `answer`."""
    said = "label" in row.fields
    label = row.label(row.value("label"), (0, 1)) if said else row.label(row.value("answer"), (False, True))
    context = f"{row.text('passage')}\nQuestion: {row.text('question')}?\nAnswer:"
    return _question(context, ("no", "yes"), label, "reading")


def read_piqa(row: Record) -> Question:
    """A goal and two solutions."""
    context = f"Question: {row.text('goal')}\nAnswer:"
    return _question(context, (row.text("sol1"), row.text("sol2")), row.label(row.value("label"), (0, 1)), "physics")


def read_hellaswag(row: Record) -> Question:
    """The context in two parts, or whole as `ctx`, whose second sentence begins with a capital already."""
    parts = "ctx_a" in row.fields
    context = f"{row.text('ctx_a')} {row.text('ctx_b').capitalize()}" if parts else row.text("ctx")
    endings = [_clean(ending) for ending in row.texts("endings")]
    label = row.label(row.value("label"), range(len(endings)))
    return _question(_clean(f"{row.text('activity_label')}: {context}"), endings, label, "script")


def _clean(text: str) -> str:
    """The text without WikiHow's markup. Source: lm-evaluation-harness, `hellaswag/utils.py`."""
    return re.sub("\\[.*?\\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")


def read_winogrande(row: Record) -> Question:
    """The choices fill the gap, and the text after it is scored."""
    sentence, options = row.text("sentence"), (row.text("option1"), row.text("option2"))
    before, gap, after = sentence.partition("_")
    if not gap:
        raise row.error(f"'sentence' has no gap _: {sentence[:60]!r}")
    label = row.label(row.value("answer"), (1, 2))
    contexts = tuple(before + option for option in options)
    return Question("", (f" {after.strip()}",) * 2, label, "coreference", contexts=contexts)


def read_arc(row: Record) -> Question:
    """Choices with letters or numbers, of which `answerKey` names one."""
    return _labelled(row, f"Question: {row.text('question')}\nAnswer:")


def read_openbookqa(row: Record) -> Question:
    """The beginning of a sentence, and its ends."""
    return _labelled(row, row.text("question_stem"))


def _labelled(row: Record, context: str) -> Question:
    """Choices that have letters or numbers beside them."""
    label = row.label(row.text("answerKey").strip(), row.texts("choices", "label"))
    choices = row.texts("choices", "text")
    if label >= len(choices):
        raise row.error(f"{len(choices)} texts for {len(row.texts('choices', 'label'))} labels in 'choices'")
    return _question(context, choices, label, "science")


def read_mmlu(row: Record) -> Question:
    """The hub has a list of choices and a number; the original files four columns and a letter."""
    original = "A" in row.fields
    choices = [row.text(letter) for letter in LETTERS] if original else row.texts("choices")
    if len(choices) != len(LETTERS):
        raise row.error(f"{len(choices)} choices; there are {len(LETTERS)}")
    label = row.label(row.value("answer"), LETTERS if original else range(len(LETTERS)))
    listed = "\n".join(f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=True))
    return _question(f"{row.text('question').strip()}\n{listed}\nAnswer:", LETTERS, label, "")


def read_lambada(row: Record) -> Question:
    """One choice, the last word: correct if each of its tokens is the greedy choice."""
    whole = f"{row.text('context')} {row.text('continuation')}" if "continuation" in row.fields else row.text("text")
    context, gap, word = whole.rpartition(" ")
    if not gap:
        raise row.error(f"a single word has no context: {whole[:60]!r}")
    return Question(context, (f" {word}",), 0, "last word")
