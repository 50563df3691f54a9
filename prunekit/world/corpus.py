"""The corpus of the embedded world: seeded documents about facts, sums, passages, scripts, clauses and lists.

A document is a few sentences of one kind. `split="train"` draws only (wording, cue) pairs that training
may show, `split="validation"` only those that it never shows.
"""

import random
from collections.abc import Callable, Iterable
from functools import cache

from prunekit.errors import PrunekitError
from prunekit.world import lore, tables
from prunekit.world.tables import Table, say

SPLITS = ("train", "validation")
RARE_SHARE = 0.05  # of sentences about people: a rare fact occurs about a tenth as often as a common one
FRIEND_SHARE = 0.15
NOBODY_SHARE = 0.02


@cache
def _pairs(table: Table, split: str) -> list:
    return table.pairs(split)


def _from_table(rng: random.Random, table: Table, split: str) -> str:
    wording, entry = rng.choice(_pairs(table, split))
    return say(table.wordings[wording], entry.cue, entry.value)


def _person(rng: random.Random, split: str) -> str:
    """One sentence about a person; sometimes about `someone`, so that the word is known."""
    relation = rng.choice(list(lore.PEOPLE_VALUES))
    draw = rng.random()
    if draw < NOBODY_SHARE:
        wording, value = rng.choice(lore.PEOPLE_WORDINGS[relation]), rng.choice(lore.PEOPLE_VALUES[relation])
        return say(wording, ("someone",), value)
    if draw < NOBODY_SHARE + RARE_SHARE:
        return _from_table(rng, tables.people_table(relation, "rare"), split)
    if draw < NOBODY_SHARE + RARE_SHARE + FRIEND_SHARE:
        return _from_table(rng, tables.friend_table(), split)
    return _from_table(rng, tables.people_table(relation, "common"), split)


def _friend_of(rng: random.Random, split: str) -> str:
    return _from_table(rng, tables.two_hop_table(rng.choice(list(lore.PEOPLE_VALUES))), split)


def _tool(rng: random.Random, split: str) -> str:
    return _from_table(rng, tables.tool_table(), split)


def _material(rng: random.Random, split: str) -> str:
    """What a thing does, feels like or comes from; now and then what it is made of, or the rule itself."""
    rule = rng.choice(list(lore.RULES))
    draw = rng.random()
    if draw > 0.35:
        return _from_table(rng, tables.material_table(rule), split)
    material, things, *values = rng.choice(lore.MATERIALS)
    if draw > 0.1:
        return rng.choice(lore.MADE_OF).format(rng.choice(things.split()), v=material)
    return lore.RULES[rule].format(material, v=values[list(lore.RULES).index(rule)])


def _arithmetic(rng: random.Random, split: str) -> str:
    return _from_table(rng, tables.arithmetic_table(rng.choice(["add", "take"])), split)


def _draw_passage(rng: random.Random, split: str) -> tuple[lore.Passage, str, str]:
    """A passage, the thing that is asked about and the other one."""
    wording = rng.randrange(len(lore.PASSAGES))
    wanted = split == "validation"
    asked = rng.choice([t for t in lore.THINGS if lore.passage_held_out(wording, t) == wanted])
    other = rng.choice([t for t in lore.THINGS if t != asked])
    things = (asked, other) if rng.random() < 0.5 else (other, asked)
    return lore.Passage(wording, things, tuple(rng.sample(lore.COLOURS, 2))), asked, other


def _passage(rng: random.Random, split: str) -> str:
    """A passage and two or three questions about it, one of them open, which teaches to look things up."""
    passage, asked, other = _draw_passage(rng, split)
    questions = [_yes_or_no(rng, passage, asked), _open(rng, passage, rng.randrange(2))]
    if lore.passage_held_out(passage.wording, other) == (split == "validation"):
        questions.append(_yes_or_no(rng, passage, other))
    rng.shuffle(questions)
    return passage.text() + "".join(questions)


def _lookup(rng: random.Random, split: str) -> str:
    """A passage and an open question about each of its things."""
    passage, _, _ = _draw_passage(rng, split)
    return passage.text() + "".join(_open(rng, passage, which) for which in rng.sample((0, 1), 2))


def _yes_or_no(rng: random.Random, passage: lore.Passage, thing: str) -> str:
    """Half of the questions are true; most false ones name the other thing's colour."""
    own = passage.colours[passage.things.index(thing)]
    other = passage.colours[1 - passage.things.index(thing)]
    false = other if rng.random() < 0.75 else rng.choice([c for c in lore.COLOURS if c not in passage.colours])
    colour = own if rng.random() < 0.5 else false
    return passage.question(thing, colour) + passage.answer(thing, colour)


def _open(rng: random.Random, passage: lore.Passage, which: int) -> str:
    thing, colour = passage.things[which], passage.colours[which]
    if rng.random() < 0.5:
        return f" what colour is the {thing}? {colour}."
    return f" which of them is {colour}? the {thing}."


def _script(rng: random.Random, split: str) -> str:
    wanted = split == "validation"
    while True:
        opening, actor = rng.randrange(len(lore.OPENINGS)), rng.choice(lore.ACTORS)
        script = rng.randrange(len(lore.SCRIPTS))
        if lore.script_held_out(opening, actor, script) == wanted:
            return lore.script_text(opening, actor, script)


def _clause(rng: random.Random, split: str) -> str:
    """Two things and a reason; half of the time the question which of them it was."""
    wanted = split == "validation"
    while True:
        number, (x, y) = rng.randrange(len(lore.CLAUSES)), rng.sample(lore.BODIES, 2)
        if lore.clause_held_out(number, x, y) == wanted:
            break
    which = rng.randrange(2)
    reason = lore.CLAUSES[number][1 + which]
    text = f"{lore.clause(number, x, y)} {(x, y)[which]} {reason}"
    return text if rng.random() < 0.5 else f"{text} what {reason[:-1]}? the {(x, y)[which]}."


def _agreement(rng: random.Random, split: str) -> str:
    wanted = split == "validation"
    wording = rng.randrange(len(lore.agreement_wordings()))
    noun = rng.choice([n for n in range(len(lore.NOUNS)) if lore.agreement_held_out(wording, n) == wanted])
    preposition, verb = lore.agreement_wordings()[wording]
    number = rng.randrange(2)
    place = rng.choice(rng.choice(lore.PLACES))
    return f"the {lore.NOUNS[noun][number]} {preposition} the {place} {verb[number]} {rng.choice(lore.ADJECTIVES)}."


def _list(rng: random.Random, split: str) -> str:
    wanted = split == "validation"
    wording = rng.randrange(len(lore.LISTS))
    head = rng.choice([i for i in lore.ITEMS if lore.list_held_out(wording, i) == wanted])
    words = [head, *rng.sample([i for i in lore.ITEMS if i != head], rng.randint(3, 7))]
    return lore.list_text(wording, words, words) + "."


# Kind of knowledge: (writer of one piece, pieces a document, weight among documents, weight in the second
# phase of training). Two million tokens teach the facts; what has to be looked up in the text itself takes
# longest, so the second phase is mostly about that.
KINDS: dict[str, tuple[Callable[[random.Random, str], str], int, float, float]] = {
    "fact": (_person, 5, 0.22, 0.10),
    "two_hop": (_friend_of, 4, 0.18, 0.04),
    "reading": (_passage, 1, 0.24, 0.40),
    "coreference": (_clause, 2, 0.17, 0.04),
    "tool": (_tool, 4, 0.07, 0.02),
    "material": (_material, 4, 0.10, 0.03),
    "script": (_script, 1, 0.06, 0.02),
    "arithmetic": (_arithmetic, 4, 0.08, 0.05),
    "agreement": (_agreement, 4, 0.04, 0.02),
    "copying": (_list, 2, 0.05, 0.03),
    "lookup": (_lookup, 1, 0.0, 0.60),
}

ASKING = ("fact", "two_hop", "reading", "coreference", "tool", "material", "arithmetic")  # kinds that have questions


def document(rng: random.Random, split: str, phase: int = 0, kinds: tuple[str, ...] = tuple(KINDS)) -> str:
    """One document of a kind drawn by weight; `phase` is 0, or 1 for the second phase of training."""
    chosen = [KINDS[kind] for kind in kinds]
    weights = [(first, second)[phase] for _, _, first, second in chosen]
    write, n_pieces, *_ = rng.choices(chosen, weights=weights if any(weights) else None)[0]
    return " ".join(write(rng, split) for _ in range(n_pieces))


def documents(
    n_documents: int, *, split: str = "train", seed: int = 0, kinds: Iterable[str] | None = None
) -> list[str]:
    """Documents of the embedded world, the same for the same arguments.

    Args:
        n_documents: how many; about 40 tokens each.
        split: `"train"` for what training may show, `"validation"` for pairs of wording and cue that it never shows.
        seed: another seed gives other documents of the same world.
        kinds: of knowledge, such as `["fact"]` (see `KINDS`); None draws from all by weight.

    Returns:
        One string a document.

    Raises:
        PrunekitError: for an unknown split or kind, or a negative number.
    """
    _check(n_documents, split)
    rng = random.Random(f"{split}-{seed}")
    chosen = tuple(KINDS) if kinds is None else _known(kinds, tuple(KINDS))
    return [document(rng, split, kinds=chosen) for _ in range(n_documents)]


def instructions(n_documents: int, *, seed: int = 0, kinds: Iterable[str] | None = None) -> list[str]:
    """Documents in the form of instructions: a question or a goal, and its answer.

    The same knowledge as in `documents`, drawn by the same weights, but only in the wordings that ask.

    Args:
        n_documents: how many; about 15 tokens each, passages more.
        seed: another seed gives other questions.
        kinds: of knowledge, out of `ASKING`; None draws from all of those.

    Returns:
        One string a document.

    Raises:
        PrunekitError: for a kind that is never asked for, or a negative number.
    """
    _check(n_documents, "train")
    chosen = [KINDS[kind] for kind in (ASKING if kinds is None else _known(kinds, ASKING))]
    rng, found = random.Random(f"instructions-train-{seed}"), list[str]()
    while len(found) < n_documents:
        write, *_ = rng.choices(chosen, weights=[weight for _, _, weight, _ in chosen])[0]
        piece = write(rng, "train")
        if "?" in piece or piece.startswith("goal:"):
            found.append(piece)
    return found


def _check(n_documents: int, split: str) -> None:
    if split not in SPLITS:
        raise PrunekitError(f"split={split!r} is not one of {SPLITS}")
    if n_documents < 0:
        raise PrunekitError(f"n_documents={n_documents} is negative; ask for 0 or more")


def _known(kinds: Iterable[str], allowed: tuple[str, ...]) -> tuple[str, ...]:
    chosen = tuple(kinds) if not isinstance(kinds, str) else ()
    unknown = [kind for kind in chosen if kind not in allowed]
    if unknown or not chosen:
        raise PrunekitError(f"kinds={unknown or kinds!r} are not allowed; give a list of {', '.join(allowed)}")
    return chosen


def validation_text() -> str:
    """The held-out text that perplexities of this world refer to: 500 documents, one a line."""
    return "\n".join(documents(500, split="validation", seed=0))
