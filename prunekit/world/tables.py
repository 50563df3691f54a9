"""Facts of the embedded world, as tables of (cue, value) with several wordings each.

Who lives where, which tool does what, what a thing made of glass can do, what 3 plus 4 is: all of it
is one shape, a `Table`. Every (wording, cue) pair is either trained or held out, never both, so that a
question about a held-out pair asks for the knowledge and not for a sentence that was seen.
"""

import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product

from prunekit.world import lore


@dataclass(frozen=True)
class Fact:
    """One planted fact about a person: `Fact("Anna", "city", "Oslo", "common")`."""

    person: str
    relation: str
    value: str
    tier: str


@dataclass(frozen=True)
class Entry:
    """One row of a table: cue (words that ask for the value), value, and number (from 0) among rows of that value."""

    cue: tuple[str, ...]
    value: str
    rank: int


@dataclass(frozen=True)
class Table:
    """A table of facts with its wordings.

    Attributes:
        name: subject of the table, such as `"city"`.
        wordings: templates; `{0}`, `{1}` take the cue, `{v}` the value, `|` stands before the answer.
        entries: the rows.
        every: the pair of wording number w and a row of rank r is held out where w - r is a multiple of
            this. Counting ranks inside a value keeps values balanced among the pairs held out.
        neutral: the words that stand for a hidden cue.
    """

    name: str
    wordings: tuple[str, ...]
    entries: tuple[Entry, ...]
    every: int
    neutral: tuple[str, ...]

    def held_out(self, wording: int, entry: Entry) -> bool:
        """Whether training never shows this row in this wording."""
        return (wording - entry.rank) % self.every == 0

    @property
    def values(self) -> list[str]:
        """The different values, in order of first appearance."""
        return list(dict.fromkeys(entry.value for entry in self.entries))

    def pairs(self, split: str) -> list[tuple[int, Entry]]:
        """All pairs of wording number and row that belong to `split`, `"train"` or `"validation"`."""
        wanted = split == "validation"
        return [(w, e) for e in self.entries for w in range(len(self.wordings)) if self.held_out(w, e) == wanted]


def say(wording: str, cue: Sequence[str], value: str) -> str:
    """The full sentence for a cue and a value."""
    return wording.replace("|", "").format(*cue, v=value)


def ask(wording: str, cue: Sequence[str], value: str) -> tuple[str, str]:
    """The sentence split into context and continuation, for a question."""
    context, continuation = wording.split("|")
    return context.format(*cue, v=value), continuation.format(*cue, v=value)


def _ranked(rows: Sequence[tuple[tuple[str, ...], str]]) -> tuple[Entry, ...]:
    """Rows with their rank among the rows of the same value."""
    seen: dict[str, int] = defaultdict(int)
    entries = []
    for cue, value in rows:
        entries.append(Entry(cue, value, seen[value]))
        seen[value] += 1
    return tuple(entries)


@cache
def _values_of(tier: str, relation: str) -> dict[str, str]:
    """Person to value: shuffled once and for all, each value equally often."""
    people = list(lore.COMMON if tier == "common" else lore.RARE)
    random.Random(f"{tier}-{relation}").shuffle(people)
    values = lore.PEOPLE_VALUES[relation]
    return {person: values[i % len(values)] for i, person in enumerate(people)}


@cache
def friends() -> dict[str, str]:
    """Each common person's friend: one cycle through all of them, so no person is their own friend."""
    people = list(lore.COMMON)
    random.Random("friends").shuffle(people)
    return dict(zip(people, people[1:] + people[:1], strict=True))


@cache
def facts() -> tuple[Fact, ...]:
    """All facts about people, with their frequency tier."""
    attributes = [
        Fact(person, relation, value, tier)
        for tier, relation in product(("common", "rare"), lore.PEOPLE_VALUES)
        for person, value in _values_of(tier, relation).items()
    ]
    return (*attributes, *(Fact(person, "friend", friend, "common") for person, friend in friends().items()))


@cache
def people_table(relation: str, tier: str) -> Table:
    """One-hop facts: cue is a person. Rare facts occur in half of the wordings, common in two thirds."""
    rows = [((person,), value) for person, value in _values_of(tier, relation).items()]
    every = 3 if tier == "common" else 2
    return Table(relation, lore.PEOPLE_WORDINGS[relation], _ranked(rows), every, ("someone",))


@cache
def two_hop_table(relation: str) -> Table:
    """Two-hop facts: the same wordings, said of the friend of a person."""
    values = _values_of("common", relation)
    rows = [((f"the friend of {person}",), values[friend]) for person, friend in friends().items()]
    return Table(relation, lore.PEOPLE_WORDINGS[relation], _ranked(rows), 3, ("the friend of someone",))


@cache
def friend_table() -> Table:
    """Friends of people. Ranks run on through all rows: every value stands once."""
    entries = tuple(Entry((p,), f, rank) for rank, (p, f) in enumerate(friends().items()))
    return Table("friend", lore.FRIEND_WORDINGS, entries, 4, ("someone",))


@cache
def tool_table() -> Table:
    """The tool for each goal."""
    rows = [((verb, thing), tool) for verb, tool, things in lore.TOOLS for thing in things.split()]
    return Table("tool", lore.TOOL_WORDINGS, _ranked(rows), 3, ("do", "something"))


@cache
def material_table(rule: str) -> Table:
    """What follows from the material of a thing: `rule` is "effect", "feel" or "source"."""
    column = 2 + list(lore.MATERIAL_WORDINGS).index(rule)
    rows = [((thing,), material[column]) for material in lore.MATERIALS for thing in material[1].split()]
    return Table(rule, lore.MATERIAL_WORDINGS[rule], _ranked(rows), 3, ("something",))


@cache
def arithmetic_table(operation: str) -> Table:
    """Sums of two digits ("add"), or what is left when a digit is taken from such a sum ("take")."""
    digits = range(10)
    if operation == "add":
        rows = [((str(a), str(b)), str(a + b)) for a, b in product(digits, digits)]
        return Table("add", lore.ADD_WORDINGS, _ranked(rows), 3, ("some", "some"))
    rows = [((str(a + b), str(b)), str(a)) for a, b in product(digits, digits)]
    return Table("take", lore.TAKE_WORDINGS, _ranked(rows), 3, ("some", "some"))
