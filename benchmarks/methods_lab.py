"""What an arm of benchmarks/methods.py is: worlds of pairs, two control sources, training, and the figures.

The controls can be used elsewhere too: `train.py --import benchmarks/methods_lab.py --weights oracle`.
"""
# ruff: noqa: E402 - train.py is no part of the installed package: its folder must be known first

import functools
import itertools
import math
import random
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # train.py

from train import Run, micro_batches, train_step
from twdpo import dist
from twdpo.batch import PairBatch, collate, plan_micro_batches
from twdpo.config import PRESETS, ExtractConfig, TrainConfig
from twdpo.files import hash_json
from twdpo.forms import parse_row
from twdpo.judge.extraction import Extraction
from twdpo.log import StageClock
from twdpo.logps import Contrast, response_logps
from twdpo.logratio import segment_sum
from twdpo.losses import LOSSES
from twdpo.models.anchor import ANCHOR_TOKENS, with_anchor, write_anchors
from twdpo.models.attribution import with_input_gradients
from twdpo.models.generate import continuations, turn_ends, writing
from twdpo.models.policy import Policy, load_policy
from twdpo.models.reference import Reference, load_reference, response_logps_of
from twdpo.models.source import open_model
from twdpo.objective import bind_objective, forward
from twdpo.plugins import bind_options
from twdpo.postprocess import pin_and_share
from twdpo.rows import RowOptions, evaluation_batches, global_batch
from twdpo.tokens import Example, tokenize_pairs
from twdpo.toy.grammar import KINDS, SLOT_WORDS, UNSEEN_QUESTIONS, all_prompts, all_sentences, draw_row, is_good
from twdpo.toy.planted import content_tokens, filler_drift, planted_lift, planted_tokens, source_lift
from twdpo.weights import WEIGHTS, Logps, WeightContext, attention, attention_pins
from twdpo.weights_file import WeightsFile

# How probable a training pair's filler is to go with its preference (twdpo.toy.grammar.draw_row's `lean`).
WORLDS = {"confounded": 0.9, "plain": 0.5}
NUM_PAIRS, BATCH = 256, 16
STEPS = (4, 8, 16, 32, 64)  # after which an arm is measured
VALIDATION, TEST = 256, 1024  # pairs of a seed, of each set
WRITTEN, MOST_TOKENS = 128, 96  # prompts that the policy answers; tokens of an answer at most: the grammar's have 63
AUXILIARY, AUXILIARY_STEPS, AUXILIARY_LR = 512, 60, 5e-4  # of the auxiliary models; pairs
ROWS = RowOptions(False, 4096)
JUDGE_PROMPT = PRESETS["toy"]["judge_prompt"]
OTHER_PROMPT = """\
Question: {question}

Answer A: {answer_a}

Answer B: {answer_b}"""
ENDLESS = 10 ** 9  # steps of the schedule, which so stays at its peak
LEARNED = 2.0  # nats: the mean margin on validation pairs from which on a policy has learned
TIE = 1e-4  # nats: the rounding of log-probs that are summed
SOURCE_OPTIONS = {"attention_contrast": "against=the pair alone"}  # which Lab.context gives


def oracle(batch, context: WeightContext) -> torch.Tensor:
    """The planted words alone (a control of benchmarks/methods.py); the end of the turn keeps 1/n."""
    ends = np.cumsum(batch.seq_lens_S.tolist())[:-1]
    return torch.from_numpy(np.concatenate([
        pin_and_share(planted.astype(float), ~content) for planted, content in
        zip(np.split(planted_tokens(batch).numpy(), ends), np.split(content_tokens(batch).numpy(), ends))])).float()


def shuffled(batch, context: WeightContext) -> torch.Tensor:
    """The judge's attention, permuted within each answer (a control of benchmarks/methods.py); pinned tokens stay."""
    parts = attention(batch, context).split(batch.seq_lens_S.tolist())
    keys = [hash_json([example.pair.key, side]) for example in batch.examples for side in (0, 1)]
    for raw, pinned, key in zip(parts, attention_pins(batch, context), keys):
        free = torch.from_numpy(~pinned)
        order = np.random.default_rng(int(key[:15], 16)).permutation(int(free.sum()))
        raw[free] = raw[free][order]
    return torch.cat(parts)


shuffled.needs = ("attention",)
WEIGHTS |= {"oracle": oracle, "shuffled": shuffled}


class Quiet(dist.Process):
    """A process that says nothing: several run side by side."""

    def print(self, *values) -> None:
        pass

    def progress(self, items=None, **options):
        return tqdm(items, **options | {"disable": True})


@dataclass(frozen=True)
class Arm:
    """One training run: what it is, and how its setting is searched for. All of it names the run in the results."""

    world: str = "confounded"
    loss: str = "twdpo"
    source: str = "uniform"
    judge: str = ""  # folder under --out/judges; empty: the toy's model
    sink_k: int = 1
    factor: float = 1.0  # of the loss's own beta
    lr: float = 5e-4
    seed: int = 0  # draws training, validation and test pairs, and the order
    tests: Literal["none", "chosen", "all"] = "none"  # steps after which test pairs are read


@dataclass
class Pool:
    """Pairs in tokens, with the reference's log-probs by their keys."""

    examples: list[Example]
    logps: dict[int, Logps]


class Lab:
    """The toy's model, and pools of pairs with what sources need of them; made when first asked for."""

    def __init__(self, judges: Path):
        """judges: folder of those that are not the toy's model."""
        started = dist.start()
        self.process = Quiet(started.rank, started.world_size, torch.device("cpu"))
        self.folder, self.judges = Path(tempfile.mkdtemp(prefix="methods-")), judges
        self.model = open_model("toy", self.process)
        self.policy = load_policy(self.model.folder, torch.float32, self.process)
        self.start = {name: value.clone() for name, value in self.policy.state_dict().items()}
        prompts = all_prompts()
        random.Random(0).shuffle(prompts)
        self.auxiliary_prompts, self.prompts = prompts[:AUXILIARY], prompts[AUXILIARY:]

    def pool(self, prompts: list[str], seed: str, lean: float) -> Pool:
        """One pair a prompt, kinds in turn; lean: twdpo.toy.grammar.draw_row."""
        rng = random.Random(seed)
        pairs = [parse_row(f"methods:{number}", draw_row(rng, prompt, KINDS[number % 2], lean=lean)[1])
                 for number, prompt in enumerate(prompts)]
        examples, _, _ = tokenize_pairs(self.model.chat, pairs, PRESETS["toy"]["max_length"],
                                        PRESETS["toy"]["max_prompt_length"])
        self.policy.load_state_dict(self.start)  # a policy that an arm has trained is lost
        return Pool(examples, self.logps(self.policy, examples, f"reference-{seed}"))

    def logps(self, model, examples: list[Example], name: str) -> dict[int, Logps]:
        """Log-probs under a model, by the pair's key."""
        return response_logps(model, self.process, examples, evaluation_batches(len(examples), 64), ROWS,
                              self.folder / name)

    def seen_prompts(self, seed: int) -> list[str]:
        """Prompts of a seed's training and then its validation pairs, of those that the toy's model was made with."""
        return random.Random(seed).sample(self.prompts, NUM_PAIRS + VALIDATION)

    @functools.lru_cache(maxsize=2)  # noqa: B019 - lives as long as its process
    def training(self, world: str, seed: int) -> Pool:
        return self.pool(self.seen_prompts(seed)[:NUM_PAIRS], f"train-{world}-{seed}", WORLDS[world])

    @functools.lru_cache(maxsize=2)  # noqa: B019
    def validation(self, world: str, seed: int) -> dict[str, Pool]:
        """Pairs whose filler says nothing ("neutral"), and pairs like those of training ("like training")."""
        leans = {"neutral": 0.5} | ({"like training": WORLDS[world]} if WORLDS[world] != 0.5 else {})
        return {name: self.pool(self.seen_prompts(seed)[NUM_PAIRS:], f"validation-{lean}-{seed}", lean)
                for name, lean in leans.items()}

    @functools.lru_cache(maxsize=2)  # noqa: B019
    def tests(self, world: str, seed: int) -> dict[str, Pool]:
        """Pairs with questions that the toy's model never saw: "neutral", and "reversed": filler goes against the
        preference as often as it goes with it in training."""
        prompts = random.Random(seed).sample(all_prompts(UNSEEN_QUESTIONS), TEST)
        leans = {"neutral": 0.5} | ({"reversed": 1 - WORLDS[world]} if WORLDS[world] != 0.5 else {})
        return {name: self.pool(prompts, f"test-{lean}-{seed}", lean) for name, lean in leans.items()}

    @functools.lru_cache(maxsize=16)  # noqa: B019
    def attention(self, world: str, seed: int, judge: str = "", is_other: bool = False) -> WeightsFile:
        """A judge's attention on a seed's training pairs; under the other prompt if asked for."""
        folder, prompt = self.folder / f"attention-{world}-{seed}-{judge}{'-other' * is_other}", JUDGE_PROMPT
        if is_other:
            (self.folder / "other.txt").write_text(OTHER_PROMPT)
            prompt = str(self.folder / "other.txt")
        model = open_model(str(self.judges / judge), self.process) if judge else self.model
        config = ExtractConfig(model=model.name, data="toy", out=str(folder), judge_prompt=prompt)
        extraction = Extraction(config, model, "last", f"{world}-{seed}", folder, self.process)
        extraction.run([example.pair for example in self.training(world, seed).examples])
        return extraction.open()

    @functools.cached_property
    def auxiliary(self) -> tuple[Policy, Policy]:
        """The toy's model after a few steps of next-token training on chosen answers, and on rejected ones."""
        pool = self.pool(self.auxiliary_prompts, "auxiliary", 0.5)
        models = []
        for side in (0, 1):
            model = load_policy(self.model.folder, torch.float32, self.process)
            optimizer = torch.optim.AdamW(model.parameters(), lr=AUXILIARY_LR, weight_decay=0.0, fused=True)
            for step in range(AUXILIARY_STEPS):
                pairs = global_batch(step, AUXILIARY, BATCH, 0)
                for micro_batch in plan_micro_batches(pairs, pool.examples, 1, RowOptions(False, 1 << 20))[0]:
                    batch = collate(micro_batch, pool.examples, pairs)
                    logps_N = model(batch).logps_N
                    sides = torch.cat([part for number, part in enumerate(logps_N.split(batch.seq_lens_S.tolist()))
                                       if number % 2 == side])
                    (-sides.mean()).backward()
                optimizer.step()
                optimizer.zero_grad()
            models.append(model)
        return tuple(models)

    @functools.lru_cache(maxsize=6)  # noqa: B019
    def auxiliary_logps(self, world: str, seed: int, name: str) -> dict[int, Logps]:
        """Log-probs of a seed's training pairs under "positive", "negative" or "contrast", by the pair's key."""
        models = dict(zip(("positive", "negative"), self.auxiliary)) | {"contrast": Contrast(*self.auxiliary)}
        return self.logps(models[name], self.training(world, seed).examples, f"{name}-{world}-{seed}")

    def context(self, arm: Arm, needs: frozenset[str], config: TrainConfig) -> WeightContext:
        """What a source may read of an arm's training pairs."""
        place = arm.world, arm.seed
        names = [*(("positive", "negative") if "aux" in needs else ()), *(("contrast",) if "contrast" in needs else ())]
        logps = {name: self.auxiliary_logps(*place, name) for name in names}
        if "ref" in needs:
            logps["reference"] = self.training(*place).logps
        files = {name: self.attention(*place, arm.judge, is_other) for name, is_other in
                 (("attention", False), ("attention_against", True)) if name in needs}
        passes = tuple(make for need, make in self.passes(config.seed).items() if need in needs)
        return WeightContext(config, **files, logps=logps, passes=passes)

    def passes(self, seed: int) -> dict[str, Callable]:
        """What runs around the policy's forward, by the need that asks for it, outermost first."""
        write = partial(write_anchors, chat=self.model.chat, seed=seed, max_new_tokens=ANCHOR_TOKENS)
        return {"input_gradient": with_input_gradients,
                "anchor": lambda *given: with_anchor(*given, write, partial(response_logps_of, self.reference)),
                "ref_states": lambda policy, run, batch: self.reference(batch, run)}

    @functools.cached_property
    def reference(self) -> Reference:
        """The toy's model, frozen."""
        return load_reference(self.model.folder, torch.float32, self.process)


# ----------------------------------------------------------------------------------------------------------------------
# One arm

def arm_config(arm: Arm) -> TrainConfig:
    """The settings of an arm: the toy's, the loss's own, its beta times the arm's factor, and a constant rate: after
    each of STEPS the policy is what a run of so many steps ends with."""
    settings = {"beta": PRESETS["toy"]["beta"]} | getattr(LOSSES[arm.loss], "settings", {}).get("", {})
    settings["beta"] *= arm.factor
    return TrainConfig(data="toy", loss=arm.loss, batch_size=BATCH, sink_k=arm.sink_k, seed=arm.seed,
                       **settings | {"lr": arm.lr, "warmup_ratio": 0.0})


def arm_loss(loss_name: str, config: TrainConfig) -> Callable:
    """The loss of an arm, with its own options."""
    return bind_options(LOSSES[loss_name], config.loss_options, "--loss-options")


def train_arm(lab: Lab, arm: Arm) -> dict[str, object]:
    """Train from the toy's model. Of each of STEPS, "validation" has what `validate` finds on every set of validation
    pairs (with `tests` none on neutral ones alone), and "test" what `measure` finds on every set of test pairs and what
    the policy writes; None where the arm's `tests` has it not read, writing but for the chosen steps. Beside them the
    weights' lift, the share of its judge's verdicts that are right, and seconds of one core."""
    began, config = time.process_time(), arm_config(arm)
    source = bind_options(WEIGHTS[arm.source], SOURCE_OPTIONS.get(arm.source, ""), "--weights-options")
    objective = bind_objective(arm_loss(arm.loss, config), source, arm.source)
    pool, context = lab.training(arm.world, arm.seed), lab.context(arm, objective.needs, config)
    validation, tests = lab.validation(arm.world, arm.seed), {}
    if arm.tests == "none":
        validation = {"neutral": validation["neutral"]}
    else:
        tests = lab.tests(arm.world, arm.seed)
    lab.policy.load_state_dict(lab.start)
    optimizer = torch.optim.AdamW(lab.policy.parameters(), lr=config.lr, weight_decay=0.0, fused=True)
    run = Run(config, lab.process, objective, lab.model, pool.examples, {}, context, lab.policy, optimizer, ROWS,
              ENDLESS, StageClock(False, lab.process.device))
    lift = online_lift(run) if objective.is_online else source_lift(objective.source, run.train, context)[0]
    found: dict[str, list[dict[str, float]]] = {name: [] for name in validation}
    policies = []
    for steps in STEPS:
        while run.step < steps:
            train_step(run)
        for name, each in validation.items():
            found[name].append(validate(lab, each))
        policies.append({name: value.clone() for name, value in lab.policy.state_dict().items()})
    chosen = {choose_step(found[name]) for name in validation}
    read = {"none": set(), "chosen": chosen, "all": range(len(STEPS))}[arm.tests]
    figures: dict[str, list] = {name: [None] * len(STEPS) for name in (*tests, "written")}
    for place in read:
        lab.policy.load_state_dict(policies[place])
        for name, each in tests.items():
            figures[name][place] = measure(lab, each)
        if place in chosen:
            figures["written"][place] = describe_written(lab, tests["neutral"].examples[:WRITTEN], arm.seed)
    stored = lab.attention(arm.world, arm.seed, arm.judge) if "attention" in objective.needs else None
    keys = [example.pair.key for example in run.train]
    verdicts = float(stored.prefers_chosen(keys).mean()) if stored else None
    return {"beta": config.beta, "lift": lift, "verdicts": verdicts, "validation": found, "test": figures,
            "seconds": time.process_time() - began}


def worth(found: dict[str, float]) -> tuple[bool, float]:
    """A key that is smaller for what is better on validation pairs: the lowest loss of what has learned by LEARNED; of
    what has not, the largest margin. (A policy that has hardly moved may order pairs as well as any.)"""
    return (False, found["loss"]) if found["margin"] >= LEARNED else (True, -found["margin"])


def choose_step(found: list[dict[str, float]]) -> int:
    """The place in STEPS of what is best on validation pairs, of equal ones the first."""
    return min(range(len(found)), key=lambda place: worth(found[place]))


@torch.no_grad()
def online_lift(run: Run) -> float:
    """The lift of an online source's weights as they are before the first step, over the training answers."""
    lifts = []
    for pairs in evaluation_batches(len(run.train), 64):
        for batch in micro_batches(run, run.train, pairs):
            outputs = forward(run.policy, batch, run.objective, run.context, run.config)
            lifts.append(planted_lift(outputs.batch.weights_N, batch)[0])
    lift_S = torch.cat(lifts)
    return float(lift_S[~lift_S.isnan()].mean())


@torch.no_grad()
def margins(lab: Lab, pool: Pool) -> dict[str, torch.Tensor]:
    """By how much each chosen answer gains on the rejected one (nats), [P]: in all, on planted words alone and on all
    else; and the drift of filler (nats a token)."""
    parts: dict[str, list[torch.Tensor]] = {name: [] for name in ("all", "planted", "filler", "drift")}
    for batch in evaluation_rows(pool):
        logps_N = lab.policy(batch).logps_N
        gain_N, planted_N = (logps_N - batch.ref_logps_N).double(), planted_tokens(batch)
        for name, tokens_N in (("all", torch.ones_like(planted_N)), ("planted", planted_N), ("filler", ~planted_N)):
            gain_S = segment_sum(gain_N * tokens_N, batch.seq_lens_S)
            parts[name].append(gain_S[0::2] - gain_S[1::2])
        parts["drift"].append(filler_drift(logps_N, batch.ref_logps_N, batch))
    return {name: torch.cat(each) for name, each in parts.items()}


def share_right(margin_P: torch.Tensor) -> float:
    """The share of pairs with a margin above 0; a tie counts one half."""
    return float(torch.where(margin_P.abs() <= TIE, 0.0, margin_P.sign()).add(1).div(2).mean())


def validate(lab: Lab, pool: Pool) -> dict[str, float]:
    """margin: mean over the pairs (nats); loss: DPO's, unweighted, with the beta that makes it lowest, so that it says
    how well margins of either sign are told apart, whatever beta and weights an arm trains with."""
    margin_P = margins(lab, pool)["all"]
    loss_BP = F.softplus(-torch.logspace(-3, 3, 121, dtype=torch.float64)[:, None] * margin_P)
    return {"margin": float(margin_P.mean()), "loss": float(loss_BP.mean(dim=1).min())}


def measure(lab: Lab, pool: Pool) -> dict[str, float]:
    """accuracy; planted_accuracy: by the margin on planted words alone; signal: that margin's mean over the standard
    deviation of the margin on all else; drift."""
    found = margins(lab, pool)
    return {"accuracy": share_right(found["all"]), "planted_accuracy": share_right(found["planted"]),
            "signal": float(found["planted"].mean() / found["filler"].std()), "drift": float(found["drift"].nanmean())}


@torch.no_grad()
def describe_written(lab: Lab, examples: list[Example], seed: int) -> dict[str, float]:
    """What the policy writes when it is sampled from (temperature 1), of all answers together: good: good words' share
    of the slot words; grammar: the share of sentences that the grammar has; length: tokens of an answer; ended: the
    share of answers that end."""
    prompts = [example.prompt_ids.tolist() for example in examples]
    with writing(lab.policy.model), torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        rows = continuations(lab.policy.model, lab.model.chat, prompts, MOST_TOKENS, sampled=True)
    ends = set(turn_ends(lab.model.chat)[0])
    answers = [list(itertools.takewhile(lambda id: id not in ends, row)) for row in rows]
    texts = lab.model.tokenizer.batch_decode(answers, skip_special_tokens=True)
    words = [is_good(word, example.pair.messages[-1][1]) for text, example in zip(texts, examples)
             for word in SLOT_WORDS.findall(text)]
    known, sentences = set(all_sentences()), [each for text in texts for each in re.findall(r"[^ .][^.]*\.?", text)]
    return {"good": statistics.fmean(words or [math.nan]), "grammar": statistics.fmean(
        [sentence in known for sentence in sentences] or [math.nan]), "length": statistics.fmean(map(len, answers)),
        "ended": statistics.fmean(any(id in ends for id in row) for row in rows)}


def evaluation_rows(pool: Pool) -> Iterator[PairBatch]:
    """All pairs of a pool, with reference log-probs and uniform weights."""
    for pairs in evaluation_batches(len(pool.examples), 64):
        for micro_batch in plan_micro_batches(pairs, pool.examples, 1, ROWS)[0]:
            yield collate(micro_batch, pool.examples, pairs, pool.logps)
