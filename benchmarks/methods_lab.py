"""What an arm of benchmarks/methods.py is: pools of pairs, two control sources, training, and the figures.

The controls can be used elsewhere too: `train.py --import benchmarks/methods_lab.py --weights oracle`.
"""
# ruff: noqa: E402 - train.py is no part of the installed package: its folder must be known first

import functools
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
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
from twdpo.losses import LOSSES
from twdpo.metrics import pair_metrics
from twdpo.models.anchor import ANCHOR_TOKENS, with_anchor, write_anchors
from twdpo.models.attribution import with_input_gradients
from twdpo.models.policy import Policy, load_policy
from twdpo.models.reference import Reference, load_reference, response_logps_of
from twdpo.models.source import open_model
from twdpo.objective import bind_objective, forward
from twdpo.plugins import bind_options
from twdpo.postprocess import pin_and_share
from twdpo.rows import RowOptions, evaluation_batches, global_batch
from twdpo.tokens import Example, tokenize_pairs
from twdpo.toy.grammar import KINDS, all_prompts, draw_row
from twdpo.toy.planted import content_tokens, filler_drift, overlaps_planted, planted_lift, planted_tokens, source_lift
from twdpo.weights import WEIGHTS, Logps, WeightContext, attention, attention_pins
from twdpo.weights_file import WeightsFile

STEPS, BATCH, LR = 60, 16, 5e-4
EVALUATED = 256  # pairs, of validation and of test each
NEUTRAL = 128  # answers without filler
DRAWN = 1024  # training pairs of a seed, of which an arm takes the first
AUXILIARY = 512  # pairs that the auxiliary models are trained on
ROWS = RowOptions(False, 4096)
JUDGE_PROMPT = PRESETS["toy"]["judge_prompt"]
OTHER_PROMPT = """\
Question: {question}

Answer A: {answer_a}

Answer B: {answer_b}"""
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


def num_held_out() -> int:
    """Prompts that no training pair has: of validation, test and neutral pairs, and of the auxiliary models."""
    return 2 * EVALUATED + NEUTRAL + AUXILIARY


@dataclass
class Pool:
    """Pairs in tokens, with the reference's log-probs by their keys."""

    examples: list[Example]
    logps: dict[int, Logps]


class Lab:
    """The toy's model, and pools of pairs with what sources need of them; made when first asked for."""

    def __init__(self, num_pairs: int):
        """num_pairs: of the largest training set."""
        started = dist.start()
        self.process = Quiet(started.rank, started.world_size, torch.device("cpu"))
        self.num_pairs = num_pairs
        self.folder = Path(tempfile.mkdtemp(prefix="methods-"))
        self.model = open_model("toy", self.process)
        self.policy = load_policy(self.model.folder, torch.float32, self.process)
        self.start = {name: value.clone() for name, value in self.policy.state_dict().items()}
        prompts = list(all_prompts())
        random.Random(0).shuffle(prompts)
        self.held_out_prompts, self.prompts = prompts[:num_held_out()], prompts[num_held_out():]
        parts = [self.held_out_prompts[place:place + EVALUATED] for place in (0, EVALUATED, 2 * EVALUATED)]
        self.validation, self.test = self.pool(parts[0], 1_000_001), self.pool(parts[1], 1_000_002)
        self.neutral = self.pool(parts[2][:NEUTRAL], 1_000_003, max_fillers=0, max_spans=1)

    def pool(self, prompts: list[str], seed: int, **limits: int) -> Pool:
        """One pair a prompt, kinds in turn. limits: of fillers and spans (twdpo.toy.draw_row)."""
        rng = random.Random(seed)
        pairs = [parse_row(f"methods:{number}", draw_row(rng, prompt, KINDS[number % 2], **limits)[1])
                 for number, prompt in enumerate(prompts)]
        examples, _, _ = tokenize_pairs(self.model.chat, pairs, PRESETS["toy"]["max_length"],
                                        PRESETS["toy"]["max_prompt_length"])
        self.policy.load_state_dict(self.start)  # a policy that an arm has trained is lost
        return Pool(examples, self.logps(self.policy, examples, f"reference-{seed}"))

    def logps(self, model, examples: list[Example], name: str) -> dict[int, Logps]:
        """Log-probs under a model, by the pair's key."""
        return response_logps(model, self.process, examples, evaluation_batches(len(examples), 64), ROWS,
                              self.folder / name)

    @functools.cache  # noqa: B019 - lives as long as its process
    def training(self, seed: int) -> Pool:
        prompts = random.Random(seed).sample(self.prompts, self.num_pairs)
        return self.pool(prompts, seed)

    @functools.cache  # noqa: B019
    def attention(self, seed: int, is_other: bool = False) -> WeightsFile:
        """The judge's attention on a seed's training pairs; under the other prompt if asked for."""
        folder, prompt = self.folder / f"attention-{seed}{'-other' * is_other}", JUDGE_PROMPT
        if is_other:
            (self.folder / "other.txt").write_text(OTHER_PROMPT)
            prompt = str(self.folder / "other.txt")
        config = ExtractConfig(model="toy", data="toy", out=str(folder), judge_prompt=prompt)
        extraction = Extraction(config, self.model, "last", str(seed), folder, self.process)
        extraction.run([example.pair for example in self.training(seed).examples])
        return extraction.open()

    @functools.cached_property
    def auxiliary(self) -> tuple[Policy, Policy]:
        """The toy's model after a few steps of next-token training on chosen answers, and on rejected ones."""
        pool = self.pool(self.held_out_prompts[-AUXILIARY:], 1_000_004)
        models = []
        for side in (0, 1):
            model = load_policy(self.model.folder, torch.float32, self.process)
            optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.0, fused=True)
            for step in range(STEPS):
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

    @functools.cache  # noqa: B019
    def auxiliary_logps(self, seed: int, name: str) -> dict[int, Logps]:
        """Log-probs of a seed's training pairs under "positive", "negative" or "contrast", by the pair's key."""
        models = dict(zip(("positive", "negative"), self.auxiliary)) | {"contrast": Contrast(*self.auxiliary)}
        return self.logps(models[name], self.training(seed).examples, f"{name}-{seed}")

    def context(self, seed: int, needs: frozenset[str], config: TrainConfig) -> WeightContext:
        """What a source may read of a seed's training pairs."""
        names = [*(("positive", "negative") if "aux" in needs else ()), *(("contrast",) if "contrast" in needs else ())]
        logps = {name: self.auxiliary_logps(seed, name) for name in names}
        if "ref" in needs:
            logps["reference"] = self.training(seed).logps
        files = {name: self.attention(seed, is_other) for name, is_other in
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

def arm_config(loss_name: str, factor: float) -> TrainConfig:
    """The settings of an arm: the toy's, the loss's own, and beta times `factor`."""
    settings = {"beta": PRESETS["toy"]["beta"]} | getattr(LOSSES[loss_name], "settings", {}).get("", {})
    settings["beta"] *= factor
    return TrainConfig(data="toy", loss=loss_name, lr=LR, batch_size=BATCH, **settings)


def arm_loss(loss_name: str, config: TrainConfig) -> Callable:
    """The loss of an arm, with its own options."""
    return bind_options(LOSSES[loss_name], config.loss_options, "--loss-options")


def train_arm(lab: Lab, loss_name: str, source_name: str, num_pairs: int, seed: int, factor: float
              ) -> dict[str, float]:
    """Train from the toy's model: the row's measures, and its accuracy on validation pairs."""
    config = replace(arm_config(loss_name, factor), seed=seed, max_steps=STEPS)
    source = bind_options(WEIGHTS[source_name], SOURCE_OPTIONS.get(source_name, ""), "--weights-options")
    objective = bind_objective(arm_loss(loss_name, config), source, source_name)
    pool, context = lab.training(seed), lab.context(seed, objective.needs, config)
    lab.policy.load_state_dict(lab.start)
    optimizer = torch.optim.AdamW(lab.policy.parameters(), lr=LR, weight_decay=0.0, fused=True)
    run = Run(config, lab.process, objective, lab.model, pool.examples[:num_pairs], {}, context, lab.policy, optimizer,
              ROWS, STEPS, StageClock(False, lab.process.device))
    seconds = []
    while run.step < STEPS:
        started = time.perf_counter()
        train_step(run)
        seconds.append(time.perf_counter() - started)
    lift = online_lift(run) if objective.is_online else source_lift(objective.source, run.train, context)[0]
    return evaluate(lab, lab.test) | {
        "key_margin": key_margin(lab), "planted_lift": lift, "seconds": statistics.median(seconds),
        "validation_accuracy": evaluate(lab, lab.validation)["accuracy"], "beta": config.beta}


@torch.no_grad()
def online_lift(run: Run) -> float:
    """The lift of an online source, whose weights are of the policy as it is, over the training answers."""
    lifts = []
    for pairs in evaluation_batches(len(run.train), 64):
        for batch in micro_batches(run, run.train, pairs):
            outputs = forward(run.policy, batch, run.objective, run.context, run.config)
            lifts.append(planted_lift(outputs.batch.weights_N, batch)[0])
    lift_S = torch.cat(lifts)
    return float(lift_S[~lift_S.isnan()].mean())


@torch.no_grad()
def evaluate(lab: Lab, pool: Pool) -> dict[str, float]:
    """accuracy and drift of the policy as it is, means over the pairs."""
    accuracies, drifts = [], []
    for batch in evaluation_rows(pool):
        ratio_S, logps_N, *_ = lab.policy(batch)
        metrics = pair_metrics(torch.zeros(len(batch.examples)), {}, ratio_S, logps_N, batch, 1.0)
        accuracies += metrics["reward_accuracy"].tolist()
        drifts += filler_drift(logps_N, batch.ref_logps_N, batch).tolist()
    return {"accuracy": statistics.fmean(accuracies), "drift": statistics.fmean(drifts)}


@torch.no_grad()
def key_margin(lab: Lab) -> float:
    """By how much the policy raises the good slot word over the bad one (nats), in answers that differ in it alone."""
    margins = []
    for batch in evaluation_rows(lab.neutral):
        logps_N = lab.policy(batch).logps_N
        gains = (logps_N - batch.ref_logps_N).split(batch.seq_lens_S.tolist())
        for example, chosen_N, rejected_N in zip(batch.examples, gains[0::2], gains[1::2]):
            slot = int(np.argmax(overlaps_planted(example.pair.chosen, example.chosen.spans_N2)))
            margins.append(float(chosen_N[slot] - rejected_N[slot]))
    return statistics.fmean(margins)


def evaluation_rows(pool: Pool) -> Iterator[PairBatch]:
    """All pairs of a pool, with reference log-probs and uniform weights."""
    for pairs in evaluation_batches(len(pool.examples), 64):
        for micro_batch in plan_micro_batches(pairs, pool.examples, 1, ROWS)[0]:
            yield collate(micro_batch, pool.examples, pairs, pool.logps)
