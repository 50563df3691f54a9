"""Names, values and wordings of the embedded world: people, tools, materials and sums; passages, scripts and lists.

The second half stands in no table: passages, scripts, clauses with pronouns, lists. Each part says which of its
combinations training never shows.
"""

from dataclasses import dataclass


def words(text: str) -> list[str]:
    """The words of a line."""
    return text.split()


COMMON = words(
    "Anna Bruno Carla David Elena Frank Greta Henry Irene Jakob Karin Louis "
    "Maria Niels Olga Peter Rosa Simon Tania Ulrich Vera Walter Xenia Yusuf"
)
RARE = words("Alfred Berta Conrad Dora Emil Frida Gustav Hanna Igor Julia Kaspar Lydia Martin Nora Oskar Paula")

PEOPLE_VALUES = {
    "city": words("Rome Paris Oslo Cairo Lima Delhi Tokyo Boston"),
    "job": words("nurse baker pilot farmer teacher singer painter lawyer"),
    "pet": words("dog cat horse rabbit parrot snake goat mouse"),
    "food": words("bread rice soup fish cake cheese beans pasta"),
    "instrument": words("piano guitar drum flute violin harp trumpet bell"),
}

# `|` marks where a question ends and its answer begins. No wording ends its context with the cue, so
# that the last word before the answer never reveals the cue.
PEOPLE_WORDINGS = {
    "city": (
        "{0} lives in| {v}.",
        "question: where does {0} live? answer: in| {v}.",
        "the home of {0} is in| {v}.",
        "the city of {0} is| {v}.",
        "{0} has a house in| {v}.",
        "if you look for {0}, go to| {v}.",
    ),
    "job": (
        "{0} works as a| {v}.",
        "question: what is the job of {0}? answer:| {v}.",
        "the job of {0} is| {v}.",
        "people know {0} as a good| {v}.",
        "{0} earns money as a| {v}.",
        "last year {0} became a| {v}.",
    ),
    "pet": (
        "{0} has a pet| {v}.",
        "question: which pet does {0} have? answer: a| {v}.",
        "the pet of {0} is a| {v}.",
        "every day {0} feeds the| {v}.",
        "at home {0} keeps a| {v}.",
        "look, {0} plays with a| {v}.",
    ),
    "food": (
        "{0} likes to eat| {v}.",
        "question: what does {0} eat? answer:| {v}.",
        "the favourite food of {0} is| {v}.",
        "for dinner {0} wants| {v}.",
        "{0} always orders| {v}.",
        "nothing makes {0} as happy as| {v}.",
    ),
    "instrument": (
        "{0} plays the| {v}.",
        "question: what does {0} play? answer: the| {v}.",
        "the instrument of {0} is the| {v}.",
        "in the band {0} is on the| {v}.",
        "{0} practises on the| {v}.",
        "at school {0} learned the| {v}.",
    ),
}
FRIEND_WORDINGS = (
    "the friend of {0} is| {v}.",
    "question: who is the friend of {0}? answer:| {v}.",
    "{0} has a friend named| {v}.",
    "often {0} goes for a walk with| {v}.",
)

TOOLS = (  # verb, tool, the things it is used on
    ("cut", "knife", "bread cheese meat melon onion potato"),
    ("cut", "scissors", "paper cloth ribbon string card hair"),
    ("cut", "saw", "log branch plank post pole beam"),
    ("clean", "mop", "floor hall kitchen porch stairs deck"),
    ("clean", "sponge", "plate bowl pan pot dish tray"),
    ("clean", "soap", "shirt coat sock scarf hat dress"),
    ("move", "shovel", "sand soil snow gravel mud clay"),
    ("move", "bucket", "water milk juice oil tea paint"),
    ("move", "cart", "stone trunk barrel crate sack statue"),
    ("fix", "hammer", "shelf fence roof bench door frame"),
    ("fix", "wrench", "engine bike pipe tap wheel pump"),
    ("fix", "needle", "curtain blanket jacket pillow bag tent"),
)
TOOL_WORDINGS = (
    "goal: {0} the {1}. solution:| use the {v}.",
    "to {0} the {1},| use the {v}.",
    "how do you {0} the {1}?| take the {v}.",
    "if you want to {0} the {1},| reach for the {v}.",
    "i must {0} the {1}, so| give me the {v}.",
    "when people {0} the {1},| they hold the {v}.",
)

MATERIALS = (  # material, things made of it, what they can do, how they feel, where they come from
    ("glass", "cup window bottle mirror jar", "break", "smooth", "beach"),
    ("wood", "table chair ladder spoon desk", "burn", "rough", "forest"),
    ("iron", "nail anchor chain gate key", "rust", "heavy", "mine"),
    ("rubber", "ball tire boot hose glove", "bounce", "stretchy", "jungle"),
    ("carton", "book letter map ticket poster", "tear", "light", "mill"),
    ("wool", "sweater rug mitten shawl cap", "shrink", "soft", "farm"),
    ("ice", "icicle igloo rink cube glacier", "melt", "cold", "north"),
    ("sugar", "candy syrup lollipop caramel toffee", "dissolve", "sticky", "field"),
)
MATERIAL_WORDINGS = {
    "effect": (
        "the {0} can| {v}.",
        "question: what can the {0} do? answer: it can| {v}.",
        "be careful, the {0} may| {v}.",
        "one day the {0} will| {v}.",
        "everyone knows that the {0} can| {v}.",
        "i saw how the {0} began to| {v}.",
    ),
    "feel": (
        "the {0} feels| {v}.",
        "question: how does the {0} feel? answer: it feels| {v}.",
        "when you touch the {0} it is| {v}.",
        "in your hand the {0} seems| {v}.",
        "nobody doubts that the {0} is| {v}.",
        "children find the {0} very| {v}.",
    ),
    "source": (
        "the {0} comes from the| {v}.",
        "question: where does the {0} come from? answer: from the| {v}.",
        "what is in the {0} was found in the| {v}.",
        "to make the {0} you go to the| {v}.",
        "workers brought the {0} from the| {v}.",
        "the story of the {0} starts at the| {v}.",
    ),
}
MADE_OF = (
    "the {0} is made of {v}.",
    "{v} is what the {0} is made of.",
    "question: what is the {0} made of? answer: {v}.",
)
RULES = {
    "effect": "things made of {0} can {v}.",
    "feel": "things made of {0} feel {v}.",
    "source": "{0} comes from the {v}.",
}

ADD_WORDINGS = (
    "{0} plus {1} is| {v}.",
    "question: what is {0} plus {1}? answer:| {v}.",
    "if you add {0} and {1} you get| {v}.",
    "the sum of {0} and {1} is| {v}.",
    "{0} apples and {1} apples make| {v} apples.",
    "count {0}, then {1} more, and you have| {v}.",
)
TAKE_WORDINGS = (
    "{0} minus {1} is| {v}.",
    "question: what is {0} minus {1}? answer:| {v}.",
    "if you take {1} from {0} you get| {v}.",
    "of {0} apples {1} are eaten, which leaves| {v} apples.",
    "start with {0}, lose {1}, and you have| {v}.",
    "{0} birds sit there, {1} fly away, and you see| {v} birds.",
)

# --- without tables ---------------------------------------------------------------------------------------------------

# Reading comprehension: things and their properties, new in every passage.
THINGS = words("box cup ball lamp door car boat coat chair flag hat kite")
COLOURS = words("red blue green black white yellow")
PASSAGES = (  # (statement about first thing, about second thing, question) around the answer yes or no
    ("passage: the {0} is {1}", " and the {0} is {1}.", " question: is the {0} {1}? answer:"),
    ("the {0} is {1}.", " the {0} is {1}.", " is the {0} {1}?"),
    ("you see a {1} {0}", " and a {1} {0}.", " now, is the {0} {1}?"),
    ("he has a {1} {0}.", " she has a {1} {0}.", " question: is the {0} {1}? answer:"),
)

# Everyday scripts: a goal, and its four steps in order.
SCRIPTS = (
    ("make tea", "boils the water", "fills the pot", "adds some honey", "drinks the tea"),
    ("bake a cake", "mixes the flour", "heats the oven", "bakes the dough", "eats the cake"),
    ("go swimming", "finds the towel", "walks to the lake", "jumps into the water", "dries in the sun"),
    ("plant a tree", "digs a hole", "sets the tree", "closes the hole", "waters the tree"),
    ("send a letter", "takes a pen", "writes the letter", "buys a stamp", "posts the letter"),
    ("catch a train", "packs the bag", "walks to the station", "buys a ticket", "sits in the train"),
    ("wash the dog", "calls the dog", "fills the tub", "rubs the dog", "dries the dog"),
    ("paint a wall", "opens the paint", "wets the brush", "paints the wall", "cleans the brush"),
    ("go to bed", "brushes the teeth", "puts on pyjamas", "turns off the light", "falls asleep"),
    ("catch a fish", "finds a worm", "throws the line", "pulls the line", "fries the fish"),
    ("light a fire", "collects some wood", "strikes a match", "lights the wood", "warms both hands"),
    ("read a book", "goes to the library", "picks a book", "opens the book", "turns the pages"),
)
ACTORS = words("boy girl man woman doctor guard cook king queen clerk tailor miner")
OPENINGS = ("the {a} wants to {goal}.", "story: the {a} decided to {goal}.", "today the {a} will {goal}.")

# Coreference: two things and a reason that fits only one of them, the first or the second.
CLAUSES = (
    ("the {x} does not fit in the {y} because the", "is too big.", "is too small."),
    ("the {x} broke the {y} because the", "was hard.", "was weak."),
    ("the {x} passed the {y} because the", "was fast.", "was slow."),
    ("the {x} hides the {y} because the", "is wide.", "is narrow."),
    ("the {x} was sold before the {y} because the", "was cheap.", "was dear."),
    ("the {x} fell on the {y} because the", "stood above.", "stood below."),
)
BODIES = words("trophy suitcase basket piano wagon cupboard marble pebble bucket parcel barrel cage")

# Agreement: a subject, a distractor between it and the verb, and the verb's number.
NOUNS = tuple(
    noun.split("/")
    for noun in words(
        "key/keys book/books picture/pictures chair/chairs bottle/bottles coat/coats "
        "flower/flowers letter/letters apple/apples shoe/shoes bird/birds candle/candles"
    )
)
PLACES = tuple(
    place.split("/") for place in words("door/doors wall/walls table/tables window/windows house/houses tree/trees")
)
PREPOSITIONS = ("near", "behind", "beside", "above")
VERBS = (("is", "are"), ("was", "were"), ("seems", "seem"))
ADJECTIVES = words("old new clean dirty big small")

# Copying: a list said twice.
LISTS = ("repeat: {first}. again: {second}", "say {first}. once more, say {second}", "list: {first}. copy: {second}")
ITEMS = tuple(THINGS + COLOURS + words("dog cat fish bread salt sun moon star rain wind leaf stone"))


@dataclass(frozen=True)
class Passage:
    """Two things and the colour of each, in one of the wordings of `PASSAGES`."""

    wording: int
    things: tuple[str, str]
    colours: tuple[str, ...]

    def text(self) -> str:
        """Text of the passage."""
        first, second, _ = PASSAGES[self.wording]
        return first.format(self.things[0], self.colours[0]) + second.format(self.things[1], self.colours[1])

    def question(self, thing: str, colour: str) -> str:
        """The yes-or-no question about it, with the space that separates it from the passage."""
        return PASSAGES[self.wording][2].format(thing, colour)

    def answer(self, thing: str, colour: str) -> str:
        """The correct answer."""
        return " yes." if self.colours[self.things.index(thing)] == colour else " no."


def passage_held_out(wording: int, thing: str) -> bool:
    """Whether training never asks about this thing in this wording."""
    return (wording - THINGS.index(thing)) % len(PASSAGES) == 0


def script_text(opening: int, actor: str, script: int, n_steps: int = 4) -> str:
    """A script from its opening through `n_steps` steps. Every step starts alike: words do not reveal the order."""
    goal, *steps = SCRIPTS[script]
    first = OPENINGS[opening].format(a=actor, goal=goal)
    return " ".join([first, *(f"then the {actor} {step}." for step in steps[:n_steps])])


def script_held_out(opening: int, actor: str, script: int) -> bool:
    """Whether training never shows this actor in this script with this opening."""
    return (opening + ACTORS.index(actor) + script) % 3 == 0


def clause(number: int, x: str, y: str) -> str:
    """The text before the blank."""
    return CLAUSES[number][0].format(x=x, y=y)


def clause_held_out(number: int, x: str, y: str) -> bool:
    """Whether training never shows these two bodies, in either order, in this clause."""
    return (number + BODIES.index(x) + BODIES.index(y)) % 3 == 0


def agreement_wordings() -> list[tuple[str, tuple[str, str]]]:
    """All pairs of preposition and verb forms."""
    return [(preposition, verb) for preposition in PREPOSITIONS for verb in VERBS]


def agreement_held_out(wording: int, noun: int) -> bool:
    """Whether training never shows this subject noun with this preposition and verb."""
    return (wording - noun) % 3 == 0


def list_text(wording: int, first: list[str], second: list[str]) -> str:
    """A list and as much of its repetition as `second` holds; without a full stop."""
    return LISTS[wording].format(first=" ".join(first), second=" ".join(second))


def list_held_out(wording: int, head: str) -> bool:
    """Whether training never shows a list that starts with this word in this wording."""
    return (wording - ITEMS.index(head)) % len(LISTS) == 0
