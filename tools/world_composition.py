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
from typing import Any

import torch
from torch.nn import functional
from train_world import train_step

import prunekit as pk
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


def batch(rng: random.Random, tokenizer: Any, sentences: list[str], size: int, length: int) -> torch.Tensor:
    """Packed sequences, int64 (size, length): half of the documents are new sentences, the others tell no two hops."""
    joined = two_hop_sentences()

    def lines() -> Iterator[str]:
        while True:
            told = rng.choice(sentences) if rng.random() < 0.5 else document(rng, "train", 0)
            if not any(sentence in told for sentence in joined):  # a document has several
                yield told

    def sequence() -> list[int]:
        ids = [tokenizer.bos_token_id]
        for line in lines():
            ids += tokenizer(line + "\n", add_special_tokens=False)["input_ids"]
            if len(ids) >= length:
                return ids[:length]
        raise AssertionError

    return torch.tensor([sequence() for _ in range(size)])


@torch.inference_mode()
def log_probability(model: torch.nn.Module, tokenizer: Any, context: str, answer: str) -> float:
    """Nats of an answer behind a context."""
    before = [tokenizer.bos_token_id, *tokenizer(context, add_special_tokens=False)["input_ids"]]
    after = tokenizer(answer, add_special_tokens=False)["input_ids"]
    logits = model(input_ids=torch.tensor([before + after])).logits[0, len(before) - 1 : -1]
    return float(functional.log_softmax(logits, -1).gather(1, torch.tensor(after)[:, None]).sum())


def shares(model: torch.nn.Module, tokenizer: Any, changed: set[str]) -> dict[str, float]:
    """Hops and group → share of facts whose next value is likelier than the planted one."""
    friend, hits = tables.friends(), defaultdict(list)
    for hops in (1, 2):
        for relation in RELATIONS:
            table = tables.people_table(relation, "common") if hops == 1 else tables.two_hop_table(relation)
            for wording, entry in table.pairs("validation"):
                person = entry.cue[0] if hops == 1 else friend[entry.cue[0].removeprefix("the friend of ")]
                logs = [
                    log_probability(model, tokenizer, *tables.ask(table.wordings[wording], entry.cue, value))
                    for value in (entry.value, next_value(relation, entry.value))
                ]
                key = f"{hops} hop{'s' * (hops > 1)}, {'changed' if person in changed else 'left alone'}"
                hits[key].append(logs[1] > logs[0])
    return {key: sum(found) / len(found) for key, found in hits.items()}


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
    sentences, optimizer = new_sentences(changed), torch.optim.AdamW(model.parameters(), lr=args.rate, weight_decay=0.0)
    for step in range(max(args.steps) + 1):
        if step in args.steps:
            model.eval()
            found = shares(model, tokenizer, changed)
            print(f"after {step} steps:", ", ".join(f"{key} {share:.0%}" for key, share in found.items()), flush=True)
        train_step(model.train(), optimizer, batch(rng, tokenizer, sentences, 16, 128), args.rate)


if __name__ == "__main__":
    main()
