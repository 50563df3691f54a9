"""Names, values and wordings of the embedded world: people, tools, materials and sums."""


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
