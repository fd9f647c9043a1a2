"""Training of the toy's model: a tiny Llama that writes the grammar's answers and judges pairs of them.

    python -m twdpo.toy.train --out toy_model                 about four minutes on two cores
    python -m twdpo.toy.train --out other --seed 1 --no-probe

Each step, from a random start: the next token of conversations whose answers are good and bad ones, and the verdict on
pairs in both orders, under the judge prompt that extraction uses. Verdicts alone leave it open where the last layer
looks; an auxiliary probe with planted labels draws its attention to the words that decide: from the last layer's input
at each judge token of an answer, is this a good slot word, a bad one, or neither. The probe is thrown away at the end.
Then the gates are printed: what the model must be able to do for the default run to show anything.

Legend: B inputs, T tokens, D hidden, J judge tokens of several answers.
"""

import itertools
import math
import random
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig, PreTrainedTokenizerFast

from twdpo.chat import Chat
from twdpo.config import PRESETS, ExtractConfig, TrainConfig
from twdpo.dataset import load_dataset
from twdpo.dist import Process
from twdpo.files import make_directory, mend, temporary_folder, write_atomic, write_json
from twdpo.flags import InputError, flag, parse_flags, require
from twdpo.forms import parse_row
from twdpo.judge.extraction import Extraction
from twdpo.judge.prompt import ROUNDS, JudgeInputs, load_judge_prompt, verdict_ids
from twdpo.lock import take_lock
from twdpo.models.source import open_model
from twdpo.pairs import Pair
from twdpo.script import run_script
from twdpo.tokens import Example, tokenize_pairs
from twdpo.toy.grammar import (
    KINDS,
    MAX_FILLERS,
    SEED,
    all_prompts,
    all_sentences,
    draw_row,
    kind_of,
    toy_rows,
)
from twdpo.toy.planted import overlaps_planted, source_lift
from twdpo.weights import WeightContext, attention

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
    random state is read or changed. (twdpo.toy.train trains it; the trained one is twdpo/toy/model.)
    """
    tokenizer = build_tokenizer()
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


def build_tokenizer() -> PreTrainedTokenizerFast:
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
    sentences = all_sentences()
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


OTHER, GOOD, BAD = range(3)  # the probe's classes
IGNORED = -100  # label of padding
GOOD_SHARE = 0.5  # of the answers that it learns to write: it must know what belongs to a topic, not insist on it
# Answers to judge hold at most so many filler sentences until this share of the steps: with all of them from the start
# the model stays at guessing for long.
CURRICULUM = ((0.25, 0), (0.55, 1), (1.0, MAX_FILLERS))
CLASS_WEIGHTS = (0.1, 1.0, 1.0)  # of the probe: most tokens are neither good nor bad
THREADS = 2  # fixed, as the order of summation depends on them
KIND_CYCLE = (KINDS[0], *[KINDS[1]] * 3)  # topic is the harder kind


@dataclass(frozen=True)
class ToyTrainConfig:
    """`python -m twdpo.toy.train`."""

    out: str = flag("toy_model", "output", "folder for model, tokenizer and gates.json")
    seed: int = flag(0, "training", "of the start and of all draws")
    steps: int = flag(700, "training", "optimizer steps of AdamW")
    keep: str = flag("", "training", "steps, by commas, after which OUT/step-N is written too; empty: none")
    lr: float = flag(4e-3, "training", "peak learning rate (cosine to 0)")
    texts: int = flag(20, "training", "conversations to write, a step")
    pairs: int = flag(16, "training", "pairs to judge in both orders, a step")
    probe: bool = flag(True, "training", "the auxiliary probe with planted labels; off: verdicts alone")
    hidden_size: int = flag(96, "model", "of the two layers' hidden states")

    def __post_init__(self):
        for name in ("steps", "texts", "pairs"):
            require(self, name, getattr(self, name) >= 1, ">= 1")
        require(self, "seed", 0 <= self.seed < 2 ** 63, ">= 0 and below 2^63")
        require(self, "lr", 0 < self.lr <= 1, "in (0, 1]")
        require(self, "keep", all(step.isdigit() and 1 <= int(step) <= self.steps for step in self.kept),
                f"whole numbers from 1 to --steps ({self.steps}), by commas")
        require(self, "hidden_size", self.hidden_size >= 8 and self.hidden_size % 8 == 0, "a multiple of 8")

    @property
    def kept(self) -> list[str]:
        """The steps of --keep, as they are spelled."""
        return [step.strip() for step in self.keep.split(",") if step.strip()]


def main(argv: list[str] | None = None) -> None:
    """Run with a command line (default: sys.argv). Raises SystemExit on a user's error."""
    run_script("twdpo.toy.train", lambda: ToyTrainConfig(**parse_flags(ToyTrainConfig, argv, __doc__.split("\n")[0])),
               toy_train, lambda: "; nothing of it is kept")


def toy_train(config: ToyTrainConfig, process: Process) -> None:
    """Random start -> trained model, its tokenizer and gates.json in `config.out`. One process. Raises InputError."""
    if process.world_size > 1:
        raise InputError(f"{process.world_size} processes were started: this is trained by one (python -m)")
    started = time.perf_counter()
    out = make_directory(Path(config.out), "--out")
    take_lock(out)
    mend(out)
    with temporary_folder(out / "model") as temporary:
        build_toy_model(temporary, config.hidden_size, config.seed)
        model = AutoModelForCausalLM.from_pretrained(temporary)
        tokenizer = AutoTokenizer.from_pretrained(temporary)
        threads = torch.get_num_threads()
        torch.set_num_threads(THREADS)
        try:
            train_model(model, tokenizer, config, process)
        finally:
            torch.set_num_threads(threads)
        model.save_pretrained(temporary)
        seconds = time.perf_counter() - started
        gates = measure_gates(temporary, process)
        for path in sorted(temporary.iterdir()):
            write_atomic(out / path.name, path.rename)
    size = sum((out / path).stat().st_size for path in ("model.safetensors", "tokenizer.json"))
    write_json(out / "gates.json", {
        "seed": config.seed, "steps": config.steps, "probe": config.probe, "seconds": round(seconds, 1),
        "parameters": model.num_parameters(), "bytes": size, "threads": THREADS,
        "torch": torch.__version__, "transformers": transformers.__version__, **gates})
    process.print(f"{out}: {model.num_parameters():,} parameters, {size:,} bytes, trained in {seconds:.0f} s")
    process.print(describe_gates(gates))


def train_model(model, tokenizer, config: ToyTrainConfig, process: Process) -> None:
    """Train in place: conversations, verdicts and the probe, one optimizer step each round."""
    rng = random.Random(config.seed)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(config.seed)  # torch.manual_seed would reseed accelerators too
        probe = torch.nn.Linear(config.hidden_size, 3)
    inputs = JudgeInputs(Chat(tokenizer), load_judge_prompt(PRESETS["toy"]["judge_prompt"]), CONTEXT)
    draws = Draws(rng)
    parameters = [*model.parameters(), *(probe.parameters() if config.probe else [])]
    optimizer = torch.optim.AdamW(parameters, lr=config.lr, weight_decay=0.0, fused=True)
    recent: dict[str, float] = {}
    kept = set(map(int, config.kept))
    model.train()
    with process.progress(range(config.steps), desc="toy", unit="step") as bar:
        for step in bar:
            for group in optimizer.param_groups:
                group["lr"] = config.lr * min(1, (step + 1) / (0.05 * config.steps)) * 0.5 * (
                    1 + math.cos(math.pi * step / config.steps))
            most_fillers = next(most for share, most in CURRICULUM if step < share * config.steps)
            losses = {"text": text_loss(model, tokenizer, draws.pairs(config.texts), rng)}
            losses["verdict"], losses["probe"] = judge_losses(model, inputs, tokenizer, probe,
                                                              draws.pairs(config.pairs, most_fillers))
            if not config.probe:
                del losses["probe"]
            optimizer.zero_grad()
            total = sum(losses.values())
            if not total.isfinite():
                raise InputError(f"step {step + 1}: the loss is {total.item()}; lower --lr ({config.lr})")
            total.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            for name, loss in losses.items():
                recent[name] = 0.95 * recent.get(name, loss.item()) + 0.05 * loss.item()
            if step + 1 in kept:
                save_model(model, tokenizer, Path(config.out) / f"step-{step + 1}")
            if (step + 1) % 50 == 0:
                process.print(f"step {step + 1}: " + ", ".join(f"{name} {loss:.3f}" for name, loss in recent.items()))
    model.eval()


def save_model(model, tokenizer, folder: Path) -> None:
    """Write model and tokenizer as they are now."""
    write_atomic(folder, lambda temporary: (model.save_pretrained(temporary), tokenizer.save_pretrained(temporary)))


@dataclass
class Draws:
    """Pairs of the grammar that share neither prompt nor an answer with a held-out row, kinds in a fixed cycle."""

    rng: random.Random
    kinds: itertools.cycle = field(default_factory=lambda: itertools.cycle(KIND_CYCLE))

    def __post_init__(self):
        rows = toy_rows()[1]
        held_out = {row["prompt"] for row in rows}
        self.held_out_answers = {row["chosen"] for row in rows} | {row["rejected"] for row in rows}
        self.prompts = [prompt for prompt in all_prompts() if prompt not in held_out]

    def pairs(self, count: int, most_fillers: int = MAX_FILLERS) -> list[Pair]:
        """`count` pairs with at most so many filler sentences an answer."""
        rows = []
        while len(rows) < count:
            _, row = draw_row(self.rng, self.rng.choice(self.prompts), next(self.kinds), most_fillers)
            if not {row["chosen"], row["rejected"]} & self.held_out_answers:
                rows.append(parse_row("toy", row))
        return rows


def text_loss(model, tokenizer, pairs: list[Pair], rng: random.Random) -> torch.Tensor:
    """Cross-entropy of the next token (nats), over prompts and one answer of each pair."""
    examples, _, _ = tokenize_pairs(Chat(tokenizer), pairs, CONTEXT, CONTEXT - 1)
    answers = [example.chosen if rng.random() < GOOD_SHARE else example.rejected for example in examples]
    rows = [np.concatenate([example.prompt_ids, answer.ids]) for example, answer in zip(examples, answers)]
    ids_BT = pad_rows(rows, 0)
    labels_BT = pad_rows(rows, IGNORED)[:, 1:]
    hidden_BTD = model.model(ids_BT, use_cache=False).last_hidden_state[:, :-1]
    known_BT = labels_BT != IGNORED
    return F.cross_entropy(model.lm_head(hidden_BTD[known_BT]), labels_BT[known_BT])


def judge_losses(model, inputs: JudgeInputs, tokenizer, probe: torch.nn.Linear, pairs: list[Pair]
                 ) -> tuple[torch.Tensor, torch.Tensor]:
    """(cross-entropy of the verdict, of the probe's classes), in nats, over both rounds of every pair."""
    judged = inputs.build_all(pairs)
    rows = [each.input_ids[turn] for each in judged for turn in range(ROUNDS)]
    outputs = model.model(pad_rows(rows, 0), use_cache=False, output_hidden_states=True)
    last_BD = outputs.last_hidden_state[torch.arange(len(rows)), torch.tensor([len(row) - 1 for row in rows])]
    # Round 0 shows the chosen answer as A, round 1 as B.
    letters = [spellings[0] for spellings in verdict_ids(tokenizer)]
    verdict = F.cross_entropy(model.lm_head(last_BD), torch.tensor(letters * len(judged)))
    before_BTD = outputs.hidden_states[-2]  # what the last layer receives
    hidden, classes = [], []
    for place, (pair, each) in enumerate(zip(pairs, judged)):
        for side, (text, label) in enumerate(((pair.chosen, GOOD), (pair.rejected, BAD))):
            planted_J = overlaps_planted(text, each.spans_N2[side])
            for turn in range(ROUNDS):
                hidden.append(before_BTD[place * ROUNDS + turn, slice(*each.ranges[turn][side])])
                classes.append(np.where(planted_J, label, OTHER))
    return verdict, F.cross_entropy(probe(torch.cat(hidden)), torch.from_numpy(np.concatenate(classes)),
                                    torch.tensor(CLASS_WEIGHTS))


def pad_rows(rows: list[np.ndarray], value: int) -> torch.Tensor:
    """Rows of one tensor [B, T], padded on the right: under causal attention no row sees its padding."""
    return torch.nn.utils.rnn.pad_sequence([torch.from_numpy(row).long() for row in rows], batch_first=True,
                                           padding_value=value)


def measure_gates(directory: Path, process: Process) -> dict[str, float]:
    """What a model can do on the held-out rows, by the pipeline's own judge pass.

    verdict_accuracy_chosen_first, verdict_accuracy_rejected_first: share of right verdicts; planted_lift: of the last
    layer's attention (twdpo.toy.planted.planted_lift); planted_share: of the attention inside the answers, mean over
    answers; topic_margin: see below.
    """
    model, tokenizer = (kind.from_pretrained(directory) for kind in (AutoModelForCausalLM, AutoTokenizer))
    dataset = load_dataset("toy", "")
    examples, _, _ = tokenize_pairs(Chat(tokenizer), dataset.held_out, CONTEXT, CONTEXT - 1)
    with tempfile.TemporaryDirectory() as temporary:
        config = ExtractConfig(model=str(directory), data="toy", out=temporary,
                               judge_prompt=PRESETS["toy"]["judge_prompt"])
        extraction = Extraction(config, open_model(str(directory), process), "last", dataset.fingerprint,
                                Path(temporary), process)
        extraction.run(dataset.held_out)
        stored = extraction.open()
    right_ER = stored.prefers_chosen([pair.key for pair in dataset.held_out])
    lift, share = source_lift(attention, examples, WeightContext(TrainConfig(), stored))
    return {
        "verdict_accuracy_chosen_first": float(right_ER[:, 0].mean()),
        "verdict_accuracy_rejected_first": float(right_ER[:, 1].mean()),
        "planted_lift": lift,
        "planted_share": share,
        "topic_margin": topic_margin(model, examples),
    }


@torch.no_grad()
def topic_margin(model, examples: list[Example]) -> float:
    """Mean log-probability of the good slot word over the bad one, in nats, at the good one's place in topic pairs."""
    margins = []
    for example in examples:
        if kind_of(example.pair.chosen) != "topic":
            continue
        good, bad = (int(np.argmax(overlaps_planted(text, response.spans_N2))) for text, response in
                     ((example.pair.chosen, example.chosen), (example.pair.rejected, example.rejected)))
        before = np.concatenate([example.prompt_ids, example.chosen.ids[:good]])
        logits_V = model(torch.from_numpy(before).long()[None]).logits[0, -1]
        margins.append(float(logits_V[example.chosen.ids[good]] - logits_V[example.rejected.ids[bad]]))
    return float(np.mean(margins))


GATES = (  # name, what must hold at least
    ("verdict_accuracy_chosen_first", 0.95),
    ("verdict_accuracy_rejected_first", 0.95),
    ("planted_lift", 2.0),
    ("topic_margin", 1.0),
)


def describe_gates(gates: dict[str, float]) -> str:
    """One line a gate: its figure, its limit, whether it holds."""
    return "\n".join(f"  {name:33}{gates[name]:8.3f}   at least {limit:<5}{'' if gates[name] >= limit else ' MISSED'}"
                     for name, limit in GATES)


if __name__ == "__main__":
    main(sys.argv[1:])
