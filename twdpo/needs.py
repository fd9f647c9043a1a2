"""What losses and weight sources need beside the policy and the pairs: how each is checked, made and found unchanged.

A new need is one class and one entry of NEEDS.
"""

from dataclasses import replace
from functools import partial
from pathlib import Path

from twdpo.authors_columns import WeightsColumns
from twdpo.aux_prompts import prompted_examples, read_aux_prompts
from twdpo.config import TrainConfig
from twdpo.data_files import BadRow
from twdpo.dist import Process, pick_dtype
from twdpo.files import cache_directory, hash_json
from twdpo.flags import InputError
from twdpo.forms import Reading
from twdpo.inputs import Inputs, Need
from twdpo.judge.extraction import Extraction
from twdpo.judge.verbalize import Scoring
from twdpo.judge.verbalized import ScoresFile, describe_left_out
from twdpo.leave_out import check_massless
from twdpo.logps import (
    Part,
    auxiliary_logps,
    logps_directory,
    open_aux_models,
    prompted_logps,
    response_logps,
    store_states,
)
from twdpo.loss_parts import loss_needs
from twdpo.models.anchor import ANCHOR_TOKENS, with_anchor, write_anchors
from twdpo.models.attribution import with_input_gradients
from twdpo.models.reference import Reference as ModelReference
from twdpo.models.reference import StoredReference, keep_head, load_reference, response_logps_of
from twdpo.models.source import check_length, context_length, load_tokenizer
from twdpo.objective import Objective
from twdpo.plugins import bound_options, name_of
from twdpo.postprocess import alignment_shares
from twdpo.rows import RowOptions, evaluation_batches
from twdpo.tokens import Example
from twdpo.weights import WEIGHTS, Logps, WeightContext, check_covered, source_needs
from twdpo.weights_file import WeightsFile, describe_verdicts, parse_layer, read_meta, warn_of_verdicts

ALIGNMENT_SAMPLE = 256  # pairs that the printed shares of moved mass are of


class Scores(Need):
    """Verbalised scores, of the folder that --weights names or written first."""

    def check(self, config: TrainConfig, inputs: Inputs) -> list[BadRow]:
        path = stored_weights(config)
        self.scores = ScoresFile(Path(path)) if path else None
        return []

    def prepare(self, config: TrainConfig, inputs: Inputs) -> Inputs:
        pairs = [example.pair for example in inputs.examples]
        if self.scores is None:  # of all pairs: which can be used is not known before
            scoring = Scoring(config, inputs.model, inputs.data_fingerprint, None, self.process)
            scoring.run(pairs)
            self.scores = scoring.open()
        self.process.print(describe_left_out(self.scores, [pair.key for pair in pairs]))
        inputs = inputs.without(self.scores.left_out)
        if not inputs.train:
            raise InputError("no pair is left to train on: the model's scores cover too little of every answer; use "
                             "those of another model (extract.py --verbalized, then --weights)")
        check_covered(self.scores, inputs.used(config))
        return inputs

    def provide(self) -> dict[str, object]:
        return {"scores": self.scores}

    def identity(self) -> dict[str, str]:
        return {"the token weights": hash_json(self.scores.meta)}


class Attention(Need):
    """The judge's attention, of the file that --weights names or extracted first."""

    judge = "judge"  # in what is said
    compares = True  # it is asked which answer is better

    def check(self, config: TrainConfig, inputs: Inputs) -> list[BadRow]:
        path, pairs = stored_weights(config), [example.pair for example in inputs.examples]
        self.extraction = None
        if not path:
            self.extraction = Extraction(config, inputs.model, config.layer, inputs.data_fingerprint, None,
                                         self.process)
            self.check_verdicts(self.extraction, f"--layer {config.layer} ends before the verdicts")
            return self.extraction.check(pairs)
        self.file = open_weights(config, path, inputs.model.tokenizer)
        self.check_verdicts(self.file, f"{path} holds none")
        if not config.skip_bad_rows:
            return []
        return [BadRow(pair.where, f"no attention in {path}", pair.to_row()) for pair in pairs
                if pair.key not in self.file]

    def prepare(self, config: TrainConfig, inputs: Inputs) -> Inputs:
        used = inputs.used(config)
        if self.extraction:
            self.extraction.run([example.pair for example in used])
            self.file = self.extraction.open(config.layer)
        self.layer = ("+" if parse_layer(config.layer)[1] else ",").join(self.file.layers)
        check_covered(self.file, used)
        self.say_verdicts(used, len(used) - len(inputs.held_out))
        if config.align == "characters":
            sample = used[:ALIGNMENT_SAMPLE]
            shares = alignment_shares(sample, self.file, config.judge_rounds)
            self.process.print(f"{self.judge} tokens to training tokens ({len(sample)} pairs): "
                               + ", ".join(f"{share:.1%} of the mass {name}" for name, share in shares.items()))
        return inputs

    @property
    def goes_by_verdicts(self) -> bool:
        """Whether pairs without consistent verdicts are left uniform."""
        return self.compares and bound_options(self.objective.source).get("verdicts") == "consistent"

    def check_verdicts(self, stored: Extraction | WeightsFile | WeightsColumns, why: str) -> None:
        """Raise InputError when weights go by verdicts that are not, or will not be, stored."""
        if self.goes_by_verdicts and not stored.has_verdicts:
            raise InputError(f"--weights-options verdicts=consistent needs the judge's verdicts, and {why}: name a "
                             "folder of extract.py whose --layers have the last layer among them (with --weights; "
                             "--layer may be another one)")

    def say_verdicts(self, used: list[Example], num_train: int) -> None:
        """What the judge's verdicts on the used pairs, `num_train` to train on first, say of it."""
        keys = [example.pair.key for example in used]
        if said := describe_verdicts(self.file, keys):
            self.process.print(f"{self.judge}: {said}")
        if self.goes_by_verdicts:
            differ = ~self.file.is_consistent(keys)
            held_out = f" ({differ[num_train:].sum()} held out)" if differ[num_train:].any() else ""
            self.process.print(f"verdicts=consistent: {differ.sum()} of {len(keys)} pairs{held_out} are left uniform: "
                               "the judge's two verdicts on them are for different answers")
            if differ[:num_train].all():
                self.process.print("warning: so are all pairs to train on, as with --weights uniform: take a larger "
                                   "judge (extract.py --model JUDGE --out DIR, then train.py --weights DIR)")
        elif self.compares and (warning := warn_of_verdicts(self.file, keys)):
            self.process.print(warning)

    def provide(self) -> dict[str, object]:
        return {"attention": self.file}

    def settings(self) -> dict[str, object]:
        if self.extraction:
            return {"layer": self.layer, "judge_dtype": self.extraction.meta["judge_dtype"],
                    "judge_max_length": self.extraction.meta["max_judge_length"]}
        return {"layer": self.layer}

    def identity(self) -> dict[str, str]:
        return {"the token weights": hash_json(self.file.meta)}


class AttentionAgainst(Attention):
    """The attention that the source's option `against` names: of another judge prompt, or a stored one."""

    judge = "judge of against="
    compares = False

    def check(self, config: TrainConfig, inputs: Inputs) -> list[BadRow]:
        source = self.objective.source
        against = bound_options(source).get("against")
        if not against:
            raise InputError(f"{name_of(source)} needs --weights-options against=VALUE: a judge prompt or a folder")
        stored = Path(against).is_dir() or against.endswith(".jsonl")
        self.changes = {"weights": against} if stored else {"weights": "", "judge_prompt": against}
        try:
            if Path(against).is_dir() and read_meta(Path(against)).get("source", "attention") != "attention":
                raise InputError("it holds scores: extract attention without --verbalized")
            return super().check(replace(config, **self.changes), inputs)
        except InputError as error:
            raise InputError(f"--weights-options against={against}: {error}") from error

    def prepare(self, config: TrainConfig, inputs: Inputs) -> Inputs:
        return super().prepare(replace(config, **self.changes), inputs)

    def provide(self) -> dict[str, object]:
        return {"attention_against": self.file}

    def settings(self) -> dict[str, object]:
        return {}

    def identity(self) -> dict[str, str]:
        return {"the attention of against=": hash_json(self.file.meta)}


class Auxiliary(Need):
    """Log-probs under both models of --aux-model, or under one behind both prompts of --aux-prompts."""

    names: tuple[str, ...] = ("positive", "negative")

    def check(self, config: TrainConfig, inputs: Inputs) -> list[BadRow]:
        self.prompts = read_aux_prompts(config.aux_prompts, inputs.model.chat) if config.aux_prompts else []
        self.models = open_aux_models(config, inputs.model, inputs.examples, self.process)
        self.prompted, bad = {}, []
        for name, text in zip(self.names, self.prompts):
            self.prompted[name], unfit = prompted_examples(inputs.model.chat, inputs.examples, text, config.fold_system,
                                                           self.process, f"tokenise {name}")
            bad += unfit
        for model in self.models if self.prompts else []:
            longest = max((each.longest for of in self.prompted.values() for each in of.values()), default=0)
            warning = check_length("the longest sequence behind --aux-prompts (--max-length, and the text)", longest,
                                   model.config)
            self.process.print(warning) if warning else None
        return bad

    def prepare(self, config: TrainConfig, inputs: Inputs) -> Inputs:
        used = inputs.used(config)
        if self.prompts:
            self.logps = prompted_logps(config, self.models[0], used, self.prompted, self.process)
        else:
            self.logps = auxiliary_logps(config, self.names, self.models, used, self.process)
        return inputs

    def provide(self) -> dict[str, object]:
        return {"logps": self.logps}

    def identity(self) -> dict[str, str]:
        identity = {"the models of --aux-model": hash_json([model.fingerprint for model in self.models])}
        return identity | ({"the texts of --aux-prompts": hash_json(self.prompts)} if self.prompts else {})


class Contrasted(Auxiliary):
    """Log-probs under the contrast of the models of --aux-model."""

    names = ("contrast",)

    def check(self, config: TrainConfig, inputs: Inputs) -> list[BadRow]:
        if config.aux_prompts:
            raise InputError(f"--aux-prompts {config.aux_prompts}: the weight source contrasts whole distributions of "
                             "two models: name them with --aux-model")
        return super().check(config, inputs)


class Reference(Need):
    """Log-probs under the policy as it starts."""

    def __init__(self, process: Process, objective: Objective):
        super().__init__(process, objective)
        self.logps: dict[int, Logps] = {}  # empty until the policy is there

    def prepare_with_policy(self, config: TrainConfig, inputs: Inputs, policy, rows: RowOptions) -> None:
        folder = reference_folder(config, inputs, rows, self.process)
        for examples, batches in reference_parts(config, inputs):
            self.logps |= response_logps(policy, self.process, examples, batches, rows, folder)

    def provide(self) -> dict[str, object]:
        return {"logps": {"reference": self.logps}}


class InputGradients(Need):
    """How much each token's embedding moves the policy's largest logit at the end."""

    def provide(self) -> dict[str, object]:
        return {"passes": (with_input_gradients,)}


class ReferenceStates(Need):
    """What the distributions of the policy as it starts are made of: a frozen second policy, or with --ref-states disk
    its hidden states on disk and its head. (The run's identity names the model that it starts as.)"""

    reference: ModelReference | StoredReference | None = None  # until the policy is there

    def prepare_with_policy(self, config: TrainConfig, inputs: Inputs, policy, rows: RowOptions) -> None:
        if self.reference is not None:
            return  # anchors needed it first
        dtype = pick_dtype(config.dtype, self.process.device)
        if config.ref_states == "memory":
            self.reference = load_reference(inputs.model.folder, dtype, self.process, config.replicate, config.compile)
            return
        states = store_states(policy, self.process, reference_parts(config, inputs), rows,
                              reference_folder(config, inputs, rows, self.process), dtype)
        self.reference = keep_head(policy, states, dtype, self.process, config.replicate)

    def provide(self) -> dict[str, object]:
        return {"passes": (self.around,)}

    def around(self, policy, run, batch):
        """The policy's forward with batch.ref_states. All ranks."""
        return self.reference(batch, run)


class Anchors(Need):
    """An answer a pair that the policy writes as it is, and its log-probs."""

    states: ReferenceStates  # whose reference gives log-probs, shared with what needs its states

    def check(self, config: TrainConfig, inputs: Inputs) -> list[BadRow]:
        context = context_length(inputs.model.config)
        return [BadRow(example.pair.where, f"its prompt of {len(example.prompt_ids)} tokens leaves no room for an "
                       f"anchor in the model's context of {context} tokens", example.pair.to_row())
                for example in inputs.examples if len(example.prompt_ids) >= context]

    def prepare(self, config: TrainConfig, inputs: Inputs) -> Inputs:
        longest = max(inputs.examples, key=lambda example: len(example.prompt_ids))
        room = context_length(inputs.model.config) - len(longest.prompt_ids)
        # One number for all pairs: a batch's own would make anchors depend on how pairs share batches.
        self.max_new_tokens = min(ANCHOR_TOKENS, room)
        if room < ANCHOR_TOKENS:
            self.process.print(f"anchors have up to {room} tokens, not {ANCHOR_TOKENS}: the longest prompt "
                               f"({longest.pair.where}) leaves no more of the model's context (--max-prompt-length)")
        self.chat, self.seed = inputs.model.chat, config.seed
        return inputs

    def prepare_with_policy(self, config: TrainConfig, inputs: Inputs, policy, rows: RowOptions) -> None:
        self.states.prepare_with_policy(config, inputs, policy, rows)

    def provide(self) -> dict[str, object]:
        return {"passes": (self.run_with_anchor,)}

    def run_with_anchor(self, policy, run, batch):
        """A pass of twdpo.objective.forward. All ranks."""
        write = partial(write_anchors, chat=self.chat, seed=self.seed, max_new_tokens=self.max_new_tokens)
        return with_anchor(policy, run, batch, write, partial(response_logps_of, self.states.reference))


def reference_parts(config: TrainConfig, inputs: Inputs) -> list[Part]:
    """Of training and held-out pairs those that the run uses, in the rows in which it uses them first."""
    return [(inputs.train, inputs.first_epoch(config)),
            *((part, evaluation_batches(len(part), config.batch_size)) for part in inputs.held_out_sets.values())]


def reference_folder(config: TrainConfig, inputs: Inputs, rows: RowOptions, process: Process) -> Path:
    """The cache folder of what the policy as it starts gives pairs."""
    return logps_directory(cache_directory(config), inputs.model.fingerprint, pick_dtype(config.dtype, process.device),
                           process.device, rows.packs, config.compile)


# In the order in which they are made.
NEEDS: dict[str, type[Need]] = {
    "scores": Scores,
    "attention": Attention,
    "attention_against": AttentionAgainst,
    "aux": Auxiliary,
    "contrast": Contrasted,
    "hidden": Need,
    "logps": Need,
    "input_gradient": InputGradients,
    "ref": Reference,
    "anchor": Anchors,  # outside of the pass of the next, which is within the reference's forward
    "ref_states": ReferenceStates,
}


def open_needs(config: TrainConfig, objective: Objective, process: Process) -> list[Need]:
    """What the objective needs, nothing of it made. Raises InputError for what nobody knows."""
    if unknown := objective.needs - NEEDS.keys():
        raise InputError(f"{name_of(objective.source)}.needs is {source_needs(objective.source)!r}: {min(unknown)!r} is"
                         f" none of {', '.join(NEEDS)}")
    check_massless(config, objective, process)
    kinds = [kind for name, kind in NEEDS.items() if name in objective.needs]
    for flag, value in (("--aux-model", config.aux_model), ("--aux-prompts", config.aux_prompts)):
        if value and not any(issubclass(kind, Auxiliary) for kind in kinds):
            raise InputError(f"{flag} {value} is given, but the weight source reads no such model")
    read = {*objective.needs, *loss_needs(objective.loss)}  # --show asks for the needs of the source alone
    if config.ref_states == "disk" and "anchor" in read:
        raise InputError("--ref-states disk is given, but anchors need the reference itself: use --ref-states memory")
    if config.ref_states == "disk" and "ref_states" not in read:
        raise InputError(f"--ref-states disk is given, but the loss {config.loss} compares no distributions with the "
                         "reference's: leave it out")
    needs = [kind(process, objective) for kind in kinds]
    for need in needs:
        if isinstance(need, Anchors):
            need.states = next((each for each in needs if isinstance(each, ReferenceStates)),
                               ReferenceStates(process, objective))
    return needs


def open_context(config: TrainConfig, needs: list[Need]) -> WeightContext:
    """What weight sources may read, of needs that are made."""
    fields: dict[str, object] = {"logps": {}, "passes": ()}
    for need in needs:
        provided = need.provide()
        fields |= provided | {"logps": fields["logps"] | provided.get("logps", {}),
                              "passes": fields["passes"] + provided.get("passes", ())}
    return WeightContext(config, **fields)


def stored_weights(config: TrainConfig) -> str:
    """The folder or file that --weights names; "" when it names a source."""
    return "" if config.weights in WEIGHTS else config.weights


def open_weights(config: TrainConfig, path: str, tokenizer) -> WeightsFile | WeightsColumns:
    """What --weights names, as a folder or as exported columns. Raises InputError."""
    if Path(path).is_dir():
        return WeightsFile(path, config.layer)
    other = load_tokenizer(Path(config.weights_tokenizer), config.chat_template) if config.weights_tokenizer else None
    return WeightsColumns(path, config.layer, other or tokenizer, Reading.of(config))
