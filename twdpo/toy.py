"""The embedded default: preference pairs from a small grammar, and a tiny Llama with its tokenizer.

`train.py` runs on this when it is given neither a model nor data. Nothing is read from disk or network.

A pair's two answers share their sentences and differ only in the slot words: polite in the chosen answer, rude in the
rejected one. So the whole preference sits in one or two known tokens, and everything else is filler. Frames with a slot
are kept apart from the words that fill it because a learner needs credit at the token where the two texts branch: a
rude sentence of its own would already be decided by its first word, and its remaining tokens would teach nothing.
"""

import itertools
import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig, PreTrainedTokenizerFast

SEED = 20240
TRAIN_ROWS = 512
TEST_ROWS = 128

# ----------------------------------------------------------------------------------------------------------------------
# Grammar

# A prompt names two nouns of one topic, so what it is about can be told from the prompt alone.
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
# With these counts an answer has 10 to 61 tokens, whatever is drawn.
MAX_SPANS = 2
MAX_FILLERS = 3


def toy_rows() -> tuple[list[dict], list[dict]]:
    """Return (train_rows, test_rows), rows of {"prompt", "chosen", "rejected"} strings; the same at every call.

    No prompt occurs twice, and no two rows have the same answer skeleton (frames and fillers in their order), so a test
    row is new in both. Its slot words are not: they all occur in training.
    """
    rng = random.Random(SEED)
    prompts = rng.sample(_all_prompts(), TRAIN_ROWS + TEST_ROWS)
    rows, seen = [], set()
    for prompt in prompts:
        skeleton, chosen, rejected = _draw_answers(rng)
        while skeleton in seen:
            skeleton, chosen, rejected = _draw_answers(rng)
        seen.add(skeleton)
        rows.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    return rows[:TRAIN_ROWS], rows[TRAIN_ROWS:]


def _all_prompts() -> list[str]:
    """Return every prompt of the grammar, in a fixed order."""
    noun_pairs = [pair for nouns in TOPICS.values() for pair in itertools.permutations(nouns, 2)]
    return [
        greeting + question.format(first=first, second=second)
        for greeting, question, (first, second) in itertools.product(GREETINGS, QUESTIONS, noun_pairs)
    ]


def _draw_answers(rng: random.Random) -> tuple[str, str, str]:
    """Return (skeleton, chosen, rejected): planted spans at random places among filler sentences."""
    sentences = _tone_spans(rng, rng.randint(1, MAX_SPANS))
    sentences += [(filler, "", "") for filler in _fillers(rng, rng.randint(1, MAX_FILLERS))]
    rng.shuffle(sentences)
    skeleton = " ".join(frame for frame, _, _ in sentences)
    chosen = " ".join(frame.format(slot=good) for frame, good, _ in sentences)
    rejected = " ".join(frame.format(slot=bad) for frame, _, bad in sentences)
    return skeleton, chosen, rejected


def _tone_spans(rng: random.Random, count: int) -> list[tuple[str, str, str]]:
    """Return `count` spans (frame, good word, bad word), no frame and no word used twice."""
    return list(zip(rng.sample(TONE_FRAMES, count), rng.sample(POLITE, count), rng.sample(RUDE, count), strict=True))


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


def build_toy_model(directory: str | Path) -> None:
    """Write the toy's tokenizer and randomly initialised Llama into `directory`, an existing empty folder.

    The files load with `AutoTokenizer` and `AutoModelForCausalLM` and are the same bytes at every call. No global
    random state is read or changed.
    """
    tokenizer = _build_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=256,
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
        torch.default_generator.manual_seed(SEED)
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
    sentences += [start + end for start, end in itertools.product(FILLER_STARTS, FILLER_ENDS)]
    # A sentence opens an answer or follows another one; with its leading space, its first word is another token.
    inner = [" " + sentence for sentence in sentences]
    bpe.train_from_iterator([*_all_prompts(), *sentences, *inner, JUDGE_WORDS], trainer)
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
