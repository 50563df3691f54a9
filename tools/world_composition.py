"""Does the world's model combine two facts? `python tools/world_composition.py`: three minutes.

Every two-hop fact ("the friend of Ann lives in") is told as such in training, so a right answer may be memory. Here
half of the common people get other values, told in one-hop sentences alone, for some steps of training among documents
without two-hop facts. If the model looks a friend's fact up where the friend's own is kept, its two-hop answers follow;
if it keeps them apart, they stay. Prints, for one hop and two, the share of facts whose new value is likelier than the
old one, asked in wordings that training never shows; beside it the same for people who were left alone.
"""

import argparse
import random
from collections import defaultdict
from collections.abc import Iterator
from itertools import product
from typing import Any

import torch
from train_world import packed, train_step

import prunekit as pk
from prunekit.questions import Question, Task
from prunekit.world import lore, tables
from prunekit.world.corpus import document

RELATIONS = tuple(lore.PEOPLE_VALUES)


def next_value(relation: str, value: str) -> str:
    """The value behind another one in the relation's list, the first behind the last."""
    values = list(lore.PEOPLE_VALUES[relation])
    return values[(values.index(value) + 1) % len(values)]


def new_sentences(changed: set[str]) -> list[str]:
    """One-hop sentences about common people in trained wordings, with the new values of those that changed."""
    found = []
    for relation in RELATIONS:
        table = tables.people_table(relation, "common")
        for wording, entry in table.pairs("train"):
            value = next_value(relation, entry.value) if entry.cue[0] in changed else entry.value
            found.append(tables.say(table.wordings[wording], entry.cue, value))
    return found


def two_hop_sentences() -> set[str]:
    """Every sentence of the world that tells a joined fact."""
    joined = [tables.two_hop_table(relation) for relation in RELATIONS]
    rows = [(entry, wording) for table in joined for entry in table.entries for wording in table.wordings]
    return {tables.say(wording, entry.cue, entry.value) for entry, wording in rows}


def documents(rng: random.Random, sentences: list[str]) -> Iterator[str]:
    """Without end: half are new sentences, the others documents of the world that tell no two hops."""
    joined = two_hop_sentences()
    while True:
        told = rng.choice(sentences) if rng.random() < 0.5 else document(rng, "train", 0)
        if not any(sentence in told for sentence in joined):  # a document has several
            yield told


def shares(model: torch.nn.Module, tokenizer: Any, changed: set[str]) -> dict[str, float]:
    """Hops and group → share of facts whose next value is likelier than the planted one."""
    friend, asked = tables.friends(), defaultdict(list)
    for hops, relation in product((1, 2), RELATIONS):
        table = tables.people_table(relation, "common") if hops == 1 else tables.two_hop_table(relation)
        for number, entry in table.pairs("validation"):
            person = entry.cue[0] if hops == 1 else friend[entry.cue[0].removeprefix("the friend of ")]
            values, wording = (entry.value, next_value(relation, entry.value)), table.wordings[number]
            (context, old), (_, new) = (tables.ask(wording, entry.cue, value) for value in values)
            key = f"{hops} hop{'s' * (hops > 1)}, {'changed' if person in changed else 'left alone'}"
            asked[key].append(Question(context, (old, new), 1, "fact"))
    tasks = {key: Task(key, "composition", tuple(questions)) for key, questions in asked.items()}
    return pk.zero_shot(model, tokenizer, tasks).accuracy().to_dict()


def main() -> None:
    """Print the shares after so many steps."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, nargs="+", default=[0, 100, 200])
    parser.add_argument("--rate", type=float, default=5e-4)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    model, tokenizer = pk.load("world")
    rng = random.Random(args.seed)
    changed = set(rng.sample(sorted(lore.COMMON), len(lore.COMMON) // 2))
    told = documents(rng, new_sentences(changed))
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.rate, weight_decay=0.0)
    for step in range(max(args.steps) + 1):
        if step in args.steps:
            model.eval()
            found = shares(model, tokenizer, changed)
            print(f"after {step} steps:", ", ".join(f"{key} {share:.0%}" for key, share in found.items()), flush=True)
        tokens = torch.tensor([packed(told, tokenizer, 128) for _ in range(16)])
        train_step(model.train(), optimizer, tokens, args.rate)


if __name__ == "__main__":
    main()
