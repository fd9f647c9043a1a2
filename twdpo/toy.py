"""The embedded default: preference pairs from a small grammar, and a tiny Llama with its tokenizer.

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
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig, PreTrainedTokenizerFast

SEED = 20240
TRAIN_ROWS = 512
TEST_ROWS = 128

# ----------------------------------------------------------------------------------------------------------------------
# Grammar

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


def all_prompts() -> list[str]:
    """Every prompt of the grammar, in a fixed order."""
    noun_pairs = [pair for nouns in TOPICS.values() for pair in itertools.permutations(nouns, 2)]
    return [
        greeting + question.format(first=first, second=second)
        for greeting, question, (first, second) in itertools.product(GREETINGS, QUESTIONS, noun_pairs)
    ]


def draw_row(rng: random.Random, prompt: str, kind: str, max_fillers: int = MAX_FILLERS, max_spans: int = MAX_SPANS
             ) -> tuple[tuple[str, str], dict]:
    """(skeletons of both answers, row): planted spans of one kind at random places among filler sentences.

    Both answers hold the same frames; what fills the slots decides. Filler, its amount, and the order are each answer's
    own, so that neither length nor place nor filler says anything about the preference.
    """
    count = rng.randint(1, max_spans)
    frames = rng.sample(TONE_FRAMES if kind == "tone" else TOPIC_FRAMES, count)
    skeletons, answers = [], []
    for words in draw_slots(rng, prompt, kind, count):
        sentences = list(zip(frames, words, strict=True))
        sentences += [(filler, "") for filler in _fillers(rng, rng.randint(min(1, max_fillers), max_fillers))]
        rng.shuffle(sentences)
        skeletons.append(" ".join(frame for frame, _ in sentences))
        answers.append(" ".join(frame.format(slot=word) for frame, word in sentences))
    return tuple(skeletons), {"prompt": prompt, "chosen": answers[0], "rejected": answers[1]}


def draw_slots(rng: random.Random, prompt: str, kind: str, count: int) -> tuple[list[str], list[str]]:
    """`count` good and as many bad slot words for an answer to `prompt`, none twice."""
    if kind == "tone":
        return rng.sample(POLITE, count), rng.sample(RUDE, count)
    named = set(SLOT_WORDS.findall(prompt))
    own = next(nouns for nouns in TOPICS.values() if named & {*nouns})
    others = [noun for nouns in TOPICS.values() if nouns is not own for noun in nouns]
    return rng.sample([noun for noun in own if noun not in named], count), rng.sample(others, count)


def _fillers(rng: random.Random, count: int) -> list[str]:
    """Return `count` sentences, no start and no end used twice."""
    halves = zip(rng.sample(FILLER_STARTS, count), rng.sample(FILLER_ENDS, count), strict=True)
    return [start + end for start, end in halves]


# ----------------------------------------------------------------------------------------------------------------------
# Model and tokenizer

BOS, EOT, PAD = "<|bos|>", "<|eot|>", "<|pad|>"
ROLES = ("<|system|>", "<|user|>", "<|assistant|>")
MAX_VOCAB = 1024
CONTEXT = 512

# What a judge prompt says around the question and the answers. Merged into the vocabulary so that judge inputs stay
# short; a judge prompt with other words works too and costs a few more tokens.
JUDGE_WORDS = (
    "Which answer to the question is better?\n\nQuestion:\n\nAnswer A:\n\nAnswer B:\n\n"
    "Reply with A or B only.\n\nBetter answer:"
)

# Every turn ends with the end-of-turn token, which is also eos: a trained answer knows where to stop.
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('unknown role: ' + message['role']) }}"
    "{% endif %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + eos_token }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def build_toy_model(directory: str | Path, hidden_size: int = 96, seed: int = SEED) -> None:
    """Write the toy's tokenizer and a randomly initialised Llama into `directory`, an existing empty folder.

    The files load with `AutoTokenizer` and `AutoModelForCausalLM` and are the same bytes at every call. No global
    random state is read or changed. (twdpo.toy_train trains it; the trained one is twdpo/toy_model.)
    """
    tokenizer = _build_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=hidden_size * 8 // 3,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=CONTEXT,
        # With the usual 0.02 a model this small does not learn to tell which answer fits the prompt.
        initializer_range=0.1,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    # torch.manual_seed would also reseed every accelerator, and those generators are not restored here.
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    )
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def _build_tokenizer() -> PreTrainedTokenizerFast:
    """Train a byte-level BPE on the grammar: each of its words becomes one token, and any other text is bytes."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=MAX_VOCAB,
        special_tokens=[BOS, EOT, PAD, *ROLES],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    sentences = [frame.format(slot=word) for frame, word in itertools.product(TONE_FRAMES, POLITE + RUDE)]
    nouns = [noun for topic in TOPICS.values() for noun in topic]
    sentences += [frame.format(slot=noun) for frame, noun in itertools.product(TOPIC_FRAMES, nouns)]
    sentences += [start + end for start, end in itertools.product(FILLER_STARTS, FILLER_ENDS)]
    # A sentence opens an answer or follows another one; with its leading space, its first word is another token.
    inner = [" " + sentence for sentence in sentences]
    bpe.train_from_iterator([*all_prompts(), *sentences, *inner, JUDGE_WORDS], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=BOS,
        eos_token=EOT,
        pad_token=PAD,
        additional_special_tokens=list(ROLES),
        chat_template=CHAT_TEMPLATE,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )
