"""The model card of a trained world model, written from what was measured."""

import platform
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prunekit.evaluation import perplexity, zero_shot
from prunekit.world.corpus import documents, validation_text
from prunekit.world.tables import facts
from prunekit.world.tasks import tasks

if TYPE_CHECKING:
    import pandas as pd

CARD = """\
# The model of prunekit's embedded world

A small LLaMA with grouped-query attention, trained from nothing on a written world that a seeded program
makes up (`prunekit.world.documents`). Everything it knows was planted, so what pruning takes away can be
checked against the truth (`prunekit.world.facts`, `prunekit.world.tasks`). It is made for teaching and for
tests; it knows nothing about the real world, and its names, places and rules are invented.

## What was trained, on what, for how long

| | |
| --- | --- |
| parameters | {parameters:,} |
| shape | {layers} layers, width {width}, {heads} query heads in {kv_heads} KV heads, FFN {ffn}, {vocabulary} words |
| corpus | {facts} planted facts about 40 people in two tiers (a common one is told about ten times as often as a rare \
one), their friends' facts (two hops), tools, materials, scripts, passages with questions, clauses with a reason, \
sums, agreement, lists to copy |
| tokens seen | {tokens:,} in {steps:,} steps of {batch_size} sequences of {seq_len}, without padding |
| optimizer | AdamW, peak learning rate {learning_rate}, {warmup} steps of warm-up, cosine to zero, float32 |
| time | {minutes:.0f} minutes, {hardware} |
| made by | `python tools/train_world.py --out DIR --tokens {budget} --seed {seed}` |

About a third of all (wording, cue) pairs were held out of training (half of those about rare facts), and
every question asks such a pair.

A two-hop fact (the job of somebody's friend) is told as such in training too, in other wordings than the one that is
asked. So two-hop questions show that it was learned; they do not show that the model combines two facts
(`tools/world_composition.py` measures that).

## What it scores

Zero-shot accuracy by log-likelihood, all questions. *Hidden* is the control: the same questions with what
they ask about replaced by "someone" or "something", which leaves nothing but chance.

{by_task}

{by_domain}

{by_tier}

Perplexity in windows of 128 tokens: {trained:.2f} on documents like those it was trained on, {held_out:.2f} on
the held-out text (`prunekit.world.validation_text`). Neither can approach 1: whom a sentence is about is drawn by lot.
"""


def _table(header: str, rows: Sequence[tuple[str, ...]]) -> str:
    lines = [header, "| --- " + "| ---: " * (len(rows[0]) - 1) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def _by_label(result: Any, columns: list[str], header: str) -> str:
    """Accuracy of the questions that carry all of the labels."""
    questions: pd.DataFrame = result.questions.dropna(subset=columns)
    groups = questions.groupby(columns, sort=False)["hit"].agg(["mean", "size"])
    rows = []
    for key, mean, size in groups.itertuples():
        labels = key if isinstance(key, tuple) else (key,)
        texts = [str(int(label)) if isinstance(label, float) else str(label) for label in labels]
        rows.append((*texts, f"{mean:.1%}", f"{size}"))
    return _table(header, rows)


def write_card(folder: Path, model: Any, tokenizer: Any, settings: Any, progress: dict) -> None:
    """Measure a trained model and write its card, `README.md`, into its folder.

    Args:
        folder: where the checkpoint lies.
        model: the model, in evaluation mode.
        tokenizer: its tokenizer.
        settings: the `Settings` of its training.
        progress: the state it reached: `step`, `seconds`.
    """
    seen, hidden = zero_shot(model, tokenizer, tasks()), zero_shot(model, tokenizer, tasks(hidden=True)).accuracy()
    rows = [
        (name, f"{row.accuracy:.1%}", f"{row.chance:.0%}", f"{hidden[name]:.1%}", f"{int(row.n)}")
        for name, row in seen.by("task").iterrows()
        for row in [row.astype(object)]
    ]
    config = model.config
    text = CARD.format(
        **asdict(settings) | {"tokens": progress["step"] * settings.batch_size * settings.seq_len},
        budget=settings.tokens, steps=progress["step"], minutes=progress["seconds"] / 60, facts=len(facts()),
        parameters=model.num_parameters(), layers=config.num_hidden_layers, width=config.hidden_size,
        heads=config.num_attention_heads, kv_heads=config.num_key_value_heads, ffn=config.intermediate_size,
        vocabulary=config.vocab_size, hardware=_hardware(model),
        by_task=_table("| task | accuracy | chance | hidden | questions |", rows),
        by_domain=_by_label(seen, ["domain"], "| domain | accuracy | questions |"),
        by_tier=_by_label(seen, ["tier", "hops"], "| tier of the fact | hops | accuracy | questions |"),
        trained=perplexity(model, tokenizer, "\n".join(documents(500, seed=1))),
        held_out=perplexity(model, tokenizer, validation_text()),
    )  # fmt: skip
    beside = folder / "README.new"
    beside.write_text(text, encoding="utf-8")
    beside.replace(folder / "README.md")


def _hardware(model: Any) -> str:
    """In general words: what kind of machine."""
    device = next(model.parameters()).device.type
    return "one GPU" if device == "cuda" else f"one thread of a CPU ({platform.machine()})"
