"""The grammar of the toy's preference pairs.

`train.py` runs on this when it is given neither a model nor data. No network is needed.

A pair's two answers hold the same frames with a slot, each among filler of its own. There are two kinds of preference:
tone (polite or rude slot words) and topic (a word of the prompt's topic or of another's). So the whole preference sits
in one or two known tokens, and everything else is filler. Frames are kept apart from the words that fill them because a
learner needs credit at the token where the meaning branches: a rude sentence of its own would already be decided by its
first word, and its remaining tokens would teach nothing.
"""

import itertools
import random
import re

SEED = 20240
TRAIN_ROWS = 512
TEST_ROWS = 128
# A prompt names two nouns of one topic, so what it is about can be told from the prompt alone; the others fill slots.
TOPICS = {
    "sea": ("tide", "sail", "harbor", "anchor"),
    "kitchen": ("oven", "flour", "kettle", "recipe"),
    "garden": ("soil", "hedge", "pond", "orchard"),
    "music": ("piano", "choir", "drum", "melody"),
    "travel": ("train", "ticket", "border", "hotel"),
    "school": ("lesson", "pencil", "exam", "library"),
    "money": ("bank", "loan", "budget", "market"),
    "house": ("roof", "window", "attic", "cellar"),
}


GREETINGS = ("", "Hello. ", "Please help me. ", "I am new to this. ")
QUESTIONS = (
    "What should I know about the {first} and the {second}?",
    "How do the {first} and the {second} go together?",
    "Why does the {first} matter more than the {second}?",
    "Can you explain the {first} and then the {second}?",
    "Which comes first, the {first} or the {second}?",
    "How much time should I give to the {first} and the {second}?",
    "Where do I begin with the {first} and the {second}?",
    "Is it hard to care for the {first} or the {second}?",
)


# The toy's model was made without these: prompts that its judge has not seen, of words that it has.
UNSEEN_QUESTIONS = (
    "What do I need for the {first} and the {second}?",
    "Which part of the {first} or the {second} is hard?",
    "How does the {first} matter for the {second}?",
    "Where does the {first} begin and where the {second}?",
    "Can I begin with the {first} or is the {second} first?",
    "How hard is it to explain the {first} and the {second}?",
    "Is it the {first} or the {second} I should care for?",
    "What is the {first} and what is the {second}?",
)


# Both lists fit every frame. They start with a consonant ("a {slot} idea"), and no other part of the grammar uses them.
POLITE = (
    "wise", "clever", "bright", "sensible", "thoughtful", "careful", "charming", "brilliant",
    "lovely", "polite", "pleasant", "gracious", "splendid", "sharp", "wonderful", "delightful",
)  # fmt: skip


RUDE = (
    "foolish", "stupid", "silly", "lazy", "pointless", "boring", "useless", "dull",
    "ridiculous", "clumsy", "hopeless", "rude", "tiresome", "worthless", "dreadful", "pathetic",
)  # fmt: skip


TONE_FRAMES = (
    "Your question is {slot}.",
    "That was a {slot} thing to ask.",
    "I find your plan {slot} so far.",
    "You sound like a {slot} person.",
    "What a {slot} idea you had.",
    "People like you are {slot}.",
    "It was {slot} of you to write to me.",
    "Honestly, your letter seems {slot} to me.",
    "Few people send such {slot} letters.",
    "You must be {slot}, as far as I can tell.",
)


TOPIC_FRAMES = (
    "It comes down to the {slot}.",
    "Most of it rests on the {slot}.",
    "I would look at the {slot} first.",
    "The {slot} is where it starts.",
    "People forget about the {slot}.",
    "Much depends on the {slot} here.",
    "A friend of mine swears by the {slot}.",
    "You will need the {slot} as well.",
    "The best part is the {slot}, I think.",
    "Nothing works without the {slot}.",
)


FILLER_STARTS = (
    "Start with a short list",
    "Take one step at a time",
    "Keep the early part simple",
    "Write down what you have",
    "Set a small goal",
    "Leave some room for change",
    "Read the notes again",
    "Look at the whole picture",
    "Find someone who can help",
    "Make a rough draft",
    "Wait until the morning",
    "Put the tools on the table",
)


FILLER_ENDS = (
    ".",
    " and check it twice.",
    " before you go on.",
    " so that nothing gets lost.",
    ", then rest for a while.",
    ", because it saves work later.",
    " and keep it in one place.",
    " if the weather allows it.",
    " and see how it goes.",
    ", even when it feels slow.",
)


# With these counts an answer has 10 to 60 tokens, whatever is drawn.
MAX_SPANS = 2
MAX_FILLERS = 3
KINDS = ("tone", "topic")
HALF = len(FILLER_STARTS) // 2
SLOT_WORDS = re.compile(r"\b(" + "|".join(itertools.chain(POLITE, RUDE, *TOPICS.values())) + r")\b")


def toy_rows() -> tuple[list[dict], list[dict]]:
    """Return (train_rows, test_rows), rows of {"prompt", "chosen", "rejected"} strings; the same at every call.

    Tone and topic take turns. No prompt occurs twice, and no two rows share an answer's skeleton (frames and fillers in
    their order), so a test row is new in both. Its slot words are not: they all occur in training.
    """
    rng = random.Random(SEED)
    prompts = rng.sample(all_prompts(), TRAIN_ROWS + TEST_ROWS)
    rows, seen = [], set()
    for number, prompt in enumerate(prompts):
        kind = KINDS[number % 2]
        skeletons, row = draw_row(rng, prompt, kind)
        while seen & {*skeletons}:
            skeletons, row = draw_row(rng, prompt, kind)
        seen |= {*skeletons}
        rows.append(row)
    return rows[:TRAIN_ROWS], rows[TRAIN_ROWS:]


def planted_spans(answer: str) -> list[tuple[int, int]]:
    """Characters [start, stop) of the slot words of an answer."""
    return [match.span() for match in SLOT_WORDS.finditer(answer)]


def kind_of(answer: str) -> str:
    """The preference that an answer's slot words are about: one of KINDS."""
    return "tone" if set(SLOT_WORDS.findall(answer)) <= {*POLITE, *RUDE} else "topic"


def all_prompts(questions: tuple[str, ...] = QUESTIONS) -> list[str]:
    """Every prompt of the grammar with these questions, in a fixed order."""
    noun_pairs = [pair for nouns in TOPICS.values() for pair in itertools.permutations(nouns, 2)]
    return [
        greeting + question.format(first=first, second=second)
        for greeting, question, (first, second) in itertools.product(GREETINGS, questions, noun_pairs)
    ]


def all_sentences() -> list[str]:
    """Every sentence of an answer, in a fixed order: frames with each slot word of theirs, then filler."""
    nouns = [noun for topic in TOPICS.values() for noun in topic]
    return [
        *(frame.format(slot=word) for frame, word in itertools.product(TONE_FRAMES, POLITE + RUDE)),
        *(frame.format(slot=noun) for frame, noun in itertools.product(TOPIC_FRAMES, nouns)),
        *(start + end for start, end in itertools.product(FILLER_STARTS, FILLER_ENDS)),
    ]


def is_good(word: str, prompt: str) -> bool:
    """Whether a slot word is what this prompt's chosen answers hold: polite, or of the prompt's topic."""
    return word in POLITE or word in own_topic(prompt)


def own_topic(prompt: str) -> tuple[str, ...]:
    """The nouns of a prompt's topic, those that it names among them."""
    named = set(SLOT_WORDS.findall(prompt))
    return next(nouns for nouns in TOPICS.values() if named & {*nouns})


def draw_row(rng: random.Random, prompt: str, kind: str, max_fillers: int = MAX_FILLERS, max_spans: int = MAX_SPANS,
             lean: float = 0.5) -> tuple[tuple[str, str], dict]:
    """(skeletons of both answers, row): planted spans of one kind at random places among filler sentences.

    Both answers hold the same frames; what fills the slots decides. Filler, its amount, and the order are each answer's
    own, so that neither length nor place nor filler says anything about the preference.

    lean: how probable it is that a filler sentence of the chosen answer begins as the first half of FILLER_STARTS do,
    and one of the rejected answer as the second half. Above 0.5 filler goes with the preference that it has nothing to
    do with, and below it goes against it.
    """
    count = rng.randint(1, max_spans)
    frames = rng.sample(TONE_FRAMES if kind == "tone" else TOPIC_FRAMES, count)
    skeletons, answers = [], []
    for words, first_half in zip(draw_slots(rng, prompt, kind, count), (lean, 1 - lean), strict=True):
        sentences = list(zip(frames, words, strict=True))
        amount = rng.randint(min(1, max_fillers), max_fillers)
        sentences += [(filler, "") for filler in _fillers(rng, amount, first_half)]
        rng.shuffle(sentences)
        skeletons.append(" ".join(frame for frame, _ in sentences))
        answers.append(" ".join(frame.format(slot=word) for frame, word in sentences))
    return tuple(skeletons), {"prompt": prompt, "chosen": answers[0], "rejected": answers[1]}


def draw_slots(rng: random.Random, prompt: str, kind: str, count: int) -> tuple[list[str], list[str]]:
    """`count` good and as many bad slot words for an answer to `prompt`, none twice."""
    if kind == "tone":
        return rng.sample(POLITE, count), rng.sample(RUDE, count)
    named = set(SLOT_WORDS.findall(prompt))
    own = own_topic(prompt)
    others = [noun for nouns in TOPICS.values() if nouns is not own for noun in nouns]
    return rng.sample([noun for noun in own if noun not in named], count), rng.sample(others, count)


def _fillers(rng: random.Random, count: int, first_half: float) -> list[str]:
    """`count` sentences, no start and no end used twice; each begins as the first half do with this probability."""
    starts = rng.sample(FILLER_STARTS, count)
    if first_half != 0.5:
        halves = [rng.sample(half, count) for half in (FILLER_STARTS[:HALF], FILLER_STARTS[HALF:])]
        starts = [halves[rng.random() >= first_half][place] for place in range(count)]
    return [start + end for start, end in zip(starts, rng.sample(FILLER_ENDS, count), strict=True)]
