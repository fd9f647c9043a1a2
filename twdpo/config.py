"""Every setting of `extract.py` and `train.py`: one flat dataclass per entry point, its command line made from it.

Precedence, lowest first: the field's default, the preset, `--config FILE.json`, an explicit flag.
"""

import argparse
import dataclasses
import json
import math
import typing
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


class InputError(ValueError):
    """Something the user gave is wrong: the message holds the value, where it is, and what to do."""


def flag(default, group: str, help: str, **metadata):
    """A field with its place and line in `--help`; `name` overrides the flag's name, `free` lets a resume change it; of
    one that is `settled` the default leaves it to the run, and config.json holds what the run found."""
    return dataclasses.field(default=default, metadata={"group": group, "help": help, **metadata})


@dataclass(frozen=True)
class SharedConfig:
    """What both entry points need: which model, which pairs, how the model judges them."""

    model: str = flag("", "model and data", "model directory, hub id (id@revision), or 'toy'; the reference, the judge "
                      "and the start of the policy; empty: the toy")
    data: str = flag("", "model and data", "pairs: .jsonl or .json file, directory, hub id, or 'toy'; empty: the "
                     "paper's data for this model")
    eval_data: str = flag("", "model and data", "held-out pairs, same forms; empty: the data's own test split, else "
                          "--eval-fraction")
    chat_template: str = flag("", "model and data", "Jinja file; empty: the tokenizer's own template")
    skip_bad_rows: bool = flag(False, "model and data", "write bad rows to rejected_rows.jsonl and go on; off: stop")
    empty_answers: str = flag("refuse", "model and data", "an answer of white space alone: 'refuse' (a bad row) or "
                              "'space' (it becomes one space, as in the authors' code)")
    preset: str = flag("", "model and data", "settings to start from: paper, authors, toy, or tuned, tuned-base, "
                       "tuned-v0.2 (as SimPO's authors tuned some of the losses on Llama-3-8B-Instruct, on "
                       "Llama-3-Base-8B-SFT, and on the former's second set of pairs); empty: toy for --data toy, else "
                       "paper")
    config: str = flag("", "model and data", "JSON file of settings, keys as in OUT/config.json; empty: none",
                       free=True)
    cache_dir: str = flag("", "model and data", "folder for attention and reference log-probs; empty: "
                          "$XDG_CACHE_HOME/twdpo, else ~/.cache/twdpo", free=True)

    judge_prompt: str = flag("paper", "judge", "'paper' (Fig. 6), 'authors' (their code's: four spaces on its second "
                             "line), 'short', or a text file with {question}, {answer_a} and {answer_b}")
    question: str = flag("conversation", "judge", "what the judge sees before the answers: 'conversation' (all turns) "
                         "or 'first' (the first user turn)")
    strip_answers: bool = flag(False, "judge", "the judge sees answers without white space around them; off: as the "
                               "chat template prints them")
    max_judge_length: int = flag(0, "judge", "tokens of one judge input; longer ones are cut; 0: the model's context",
                                 settled=True)
    judge_cut: str = flag("common", "judge", "how too long inputs are cut: 'common' (the question, then both answers "
                          "to one length) or 'authors' (at 2048 tokens: answers to 768, the question to the rest)")
    spans: str = flag("exact", "judge", "'exact': all of an answer's tokens; 'authors': without its last ones, by the "
                      "rules of their code")
    query: str = flag("prompt", "judge", "whose attention is read: 'prompt' (the last prompt position, whose output is "
                      "the verdict) or 'verdict' (the likelier of A and B is appended: a second forward)")
    heads: str = flag("mean", "judge", "'mean' of all heads, or of these: 1-based, separated by commas")
    attention: str = flag("row", "judge", "'row': one fp32 row beside SDPA; 'eager': the whole map on the wanted "
                          "layers, as a check")
    rounds: str = flag("raw", "judge", "'raw': the two rounds are averaged, then normalised (Eq. 13); 'normalized': "
                       "each is normalised first (authors' code)")
    judge_dtype: str = flag("auto", "judge", "float32 or bfloat16; auto: bfloat16 on CUDA, float32 on CPU",
                            settled=True)
    judge_batch_tokens: int = flag(0, "judge", "most tokens in one judge batch; 0: 8192 on CPU, 32768 "
                                   "on CUDA", free=True)
    judge_sharding: str = flag("auto", "judge", "the judge's parameters: 'off' (a whole copy on every process), 'on' "
                               "(FSDP2 shards; processes then run in step); auto: on for a model that takes more than "
                               "80 % of a GPU", free=True)

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            require(self, field.name, not isinstance(value, float) or math.isfinite(value), "a finite number")
        require(self, "judge_prompt", bool(self.judge_prompt), "paper, short or a file")
        require(self, "max_judge_length", self.max_judge_length >= 0, ">= 0")
        require(self, "question", self.question in ("conversation", "first"), "conversation or first")
        require(self, "judge_cut", self.judge_cut in ("common", "authors"), "common or authors")
        require(self, "spans", self.spans in ("exact", "authors"), "exact or authors")
        require(self, "rounds", self.rounds in ("raw", "normalized"), "raw or normalized")
        require(self, "query", self.query in ("prompt", "verdict"), "prompt or verdict")
        require(self, "attention", self.attention in ("row", "eager"), "row or eager")
        require(self, "judge_dtype", self.judge_dtype in ("auto", "float32", "bfloat16"), "auto, float32 or bfloat16")
        require(self, "judge_batch_tokens", self.judge_batch_tokens >= 0, ">= 0")
        require(self, "judge_sharding", self.judge_sharding in ("auto", "on", "off"), "auto, on or off")
        require(self, "empty_answers", self.empty_answers in ("refuse", "space"), "refuse or space")


@dataclass(frozen=True)
class ExtractConfig(SharedConfig):
    """`extract.py`: pairs -> raw attention on disk."""

    layers: str = flag("last", "judge", "layers to store, 1-based, separated by commas; 'last' or 'all'")
    rollout: bool = flag(False, "judge", "store attention rollout through all layers beside them (keeps the queries "
                         "and keys of a batch in memory); off: layers only")
    verbalized: bool = flag(False, "judge", "let the model write down scores of each answer's parts instead (paper "
                            "section 4.2; one generation an answer); off: attention")
    out: str = flag("", "output", "folder for the weights file (required); one that holds the same extraction is "
                    "completed", free=True)
    export: str = flag("", "output", ".jsonl file of the rows with the columns of the authors' code (token ids, "
                       "weights by layer); held-out rows go into FILE_held_out.jsonl; empty: off", free=True)
    report: str = flag("", "output", "folder for statistics of the weights (the paper's Tables 1 and 2 among them) and "
                       "a page that shows them; empty: off", free=True)
    report_pairs: int = flag(24, "output", "pairs shown on that page", free=True)
    report_min_count: int = flag(100, "output", "tokens of the most weighted ones occur at least so often", free=True)

    def __post_init__(self):
        super().__post_init__()
        require(self, "out", bool(self.out), "a folder to write to")
        require(self, "layers", bool(self.layers) or self.rollout, "last, all or numbers, unless --rollout is given")
        require(self, "export", not self.export or self.export.endswith(".jsonl"), "a .jsonl file")
        if self.verbalized and (self.export or self.report):
            raise InputError("--export and --report are of attention: leave them out with --verbalized")
        if self.verbalized and self.judge_sharding == "on":
            raise InputError("--judge-sharding on is for attention: --verbalized generates on a whole copy")
        require(self, "report_pairs", self.report_pairs >= 0, ">= 0")
        require(self, "report_min_count", self.report_min_count >= 1, ">= 1")


@dataclass(frozen=True)
class TrainConfig(SharedConfig):
    """`train.py`: pairs -> judge -> weights -> TwDPO -> evaluated checkpoint. Defaults: paper Table 6."""

    imports: str = flag("", "model and data", "Python files that add to LOSSES or WEIGHTS, separated by commas; "
                        "empty: none", name="import")
    loss: str = flag("twdpo", "objective", "a name in LOSSES (twdpo/losses.py)")
    loss_options: str = flag("", "objective", "settings of the loss, NAME=VALUE separated by commas (listed below); "
                             "empty: its defaults")
    weights: str = flag("", "objective", "a name in WEIGHTS (twdpo/weights.py), a folder made by extract.py, or a file "
                        "of its --export; empty: the loss's own source")
    weights_options: str = flag("", "objective", "settings of the weight source, NAME=VALUE separated by commas "
                                "(listed below); empty: its defaults")
    aux_model: str = flag("", "objective", "POSITIVE or POSITIVE,NEGATIVE: model folders or hub ids for weight sources "
                          "that compare two models; without the second: the policy's starting weights; empty: none")
    weights_tokenizer: str = flag("", "objective", "model whose token ids a --weights file holds; empty: --model")
    layer: str = flag("last", "objective", "stored layer that attention weights are read from, 1-based; 'last': the "
                      "last one stored; 'all' stored, or several separated by commas: see --layer-merge; 'rollout'",
                      settled=True)
    layer_merge: str = flag("mean", "objective", "weights of several layers: their 'mean', or their 'sum' as in the "
                            "authors' code")
    align: str = flag("characters", "objective", "judge tokens to training tokens by 'characters', or by 'edits' as in "
                      "appendix D")
    beta: float = flag(5e-3, "objective", "strength of the KL penalty; losses of other papers bring their own "
                       "default; else 2.0 with --length-normalize")
    length_by: str = flag("tokens", "objective", "what losses that divide by an answer's length count: its 'tokens', "
                          "or the 'mass' of its weights")
    length_normalize: bool = flag(False, "objective", "drop the factor |y| (Eq. 15); off: Eq. 5")
    label_smoothing: float = flag(0.0, "objective", "share of labels taken as flipped, 0 to 0.5; 0: off")
    sink_k: int = flag(1, "objective", "first judge tokens whose weight is reset to 1/n (Eq. 14); 0: off")
    sink_k_min: int = flag(5, "objective", "the reset applies to answers of at least this many judge tokens")
    sink_on: str = flag("training", "objective", "tokens that the reset is made on: 'training', after the alignment, "
                        "or 'judge', before it (authors' code)")
    unseen: str = flag("mean", "objective", "weight of tokens that the judge did not see, the end of the turn among "
                       "them: 'mean' (1/n) or 'zero' (authors' code)")
    renormalize: bool = flag(True, "objective", "weights sum to 1 in each answer; off: to what cuts and the alignment "
                             "left (authors' code)")
    multiplier: str = flag("answer", "objective", "what |y| counts: tokens of the 'answer', or those 'judged' "
                           "(authors' code)")

    eval_fraction: float = flag(0.05, "held-out pairs", "share of the pairs held out when the data has no test split, "
                                "split by prompt; 0: no evaluation at all")
    eval_every: int = flag(500, "held-out pairs", "steps between evaluations, the first step's start and the last step "
                           "always included; 0: only those two")

    lr: float = flag(1e-6, "optimisation", "peak learning rate of AdamW (cosine to 0)")
    warmup_ratio: float = flag(0.1, "optimisation", "share of the steps spent in linear warmup; 0: none")
    weight_decay: float = flag(0.0, "optimisation", "AdamW's decoupled decay; 0: off")
    max_grad_norm: float = flag(1.0, "optimisation", "gradients are clipped to this norm; 0: off")
    batch_size: int = flag(32, "optimisation", "pairs a step, over all processes")
    epochs: int = flag(1, "optimisation", "passes over the pairs")
    max_steps: int = flag(0, "optimisation", "steps, overriding --epochs and repeating the data as needed; 0: off")
    max_length: int = flag(2048, "optimisation", "tokens of prompt and one response; responses keep their first ones")
    max_prompt_length: int = flag(1800, "optimisation", "tokens of a prompt; longer ones keep BOS and their last ones")
    seed: int = flag(42, "optimisation", "of the held-out split and the order of the pairs")

    dtype: str = flag("auto", "hardware", "compute dtype, float32 or bfloat16 (parameters and reductions stay fp32); "
                      "auto: bfloat16 on CUDA, float32 on CPU",
                      settled=True)
    micro_batch_tokens: int = flag(0, "hardware", "most tokens in one micro-batch on one process, padding counted; 0: "
                                   "4096 on CPU, on CUDA 16384 or what the memory plan says fits", free=True)
    packing: str = flag("auto", "hardware", "'on': the sequences of many pairs in one row without padding, each pair's "
                        "common beginning once; 'off': a padded row a sequence; auto: on, unless a check at the start "
                        "finds other log-probs",
                        settled=True)
    checkpointing: str = flag("auto", "hardware", "activations: 'none' (all are kept for the backward pass), 'full' "
                              "(each layer's input is kept and the rest computed again), 'selective' (of every second "
                              "layer); auto: none on CPU, on CUDA the least that lets --micro-batch-tokens fit by the "
                              "memory plan", free=True)
    replicate: int = flag(1, "hardware", "copies of the sharded parameters: 1: every process holds one part of them; "
                          "the number of nodes: each node holds all parts, and only gradients go between nodes",
                          free=True)
    compile: bool = flag(False, "hardware", "torch.compile each layer, its attention left out (a minute or more at the "
                         "start); off: eager")
    no_sync: bool = flag(False, "hardware", "reduce gradients on the last micro-batch only (holds full gradients); "
                         "off: on every one", free=True)

    output_dir: str = flag("", "output", "folder of the run; empty: runs/NAME-TIME", free=True)
    resume: str = flag("", "output", "go on from the newest complete checkpoint of --output-dir ('auto', or no value) "
                       "or from the checkpoint folder given; empty: off", free=True, optional_value="auto")
    overwrite: bool = flag(False, "output", "delete a run that stands in --output-dir; off: refuse", free=True)
    save_every: int = flag(500, "output", "steps between checkpoints, the last step included; 0: no checkpoints",
                           free=True)
    keep_last: int = flag(2, "output", "checkpoints kept; 0: all", free=True)
    token_stats: bool = flag(False, "output", "also log token_entropy (nats) and token_top1 (share of response tokens "
                             "that are the policy's likeliest); off: not computed", free=True)
    sample: int = flag(0, "output", "answers that the policy writes to held-out prompts at each evaluation, greedily, "
                       "into samples.jsonl; 0: none", free=True)
    profile: bool = flag(False, "output", "also log the shares of time in data, forward, backward and optimizer, "
                         "TFLOP/s, and on known GPUs MFU (a GPU is waited for at each stage); off: not measured",
                         free=True)
    plan: bool = flag(False, "output", "print what memory the run would need, from the model's config alone, and stop; "
                      "off: run", free=True)
    save_dtype: str = flag("", "output", "dtype of final/ and best/: float32, bfloat16 or float16; empty: the source "
                           "checkpoint's")
    wandb: str = flag("", "output", "project of Weights & Biases to log to as well (WANDB_MODE=offline works without "
                      "an account); empty: off", free=True)

    def __post_init__(self):
        super().__post_init__()
        require(self, "beta", self.beta > 0, "> 0")
        require(self, "label_smoothing", 0 <= self.label_smoothing < 0.5, "in [0, 0.5)")
        require(self, "length_by", self.length_by in ("tokens", "mass"), "tokens or mass")
        require(self, "layer_merge", self.layer_merge in ("mean", "sum"), "mean or sum")
        require(self, "align", self.align in ("characters", "edits"), "characters or edits")
        require(self, "sink_k", self.sink_k >= 0, ">= 0")
        require(self, "sink_on", self.sink_on in ("training", "judge"), "training or judge")
        require(self, "unseen", self.unseen in ("mean", "zero"), "mean or zero")
        require(self, "multiplier", self.multiplier in ("answer", "judged"), "answer or judged")
        require(self, "eval_fraction", 0 <= self.eval_fraction < 1, "in [0, 1)")
        require(self, "lr", self.lr > 0, "> 0")
        require(self, "warmup_ratio", 0 <= self.warmup_ratio <= 1, "in [0, 1]")
        for name in ("seed", "weight_decay", "max_grad_norm", "eval_every", "save_every", "keep_last", "max_steps",
                     "micro_batch_tokens", "sink_k_min", "sample"):
            require(self, name, getattr(self, name) >= 0, ">= 0")
        for name in ("batch_size", "epochs", "max_prompt_length", "replicate"):
            require(self, name, getattr(self, name) >= 1, ">= 1")
        require(self, "max_length", self.max_length > self.max_prompt_length,
                f"more than --max-prompt-length ({self.max_prompt_length}), so that a response has room")
        require(self, "checkpointing", self.checkpointing in ("auto", "none", "selective", "full"),
                "auto, none, selective or full")
        require(self, "packing", self.packing in ("auto", "on", "off"), "auto, on or off")
        require(self, "dtype", self.dtype in ("auto", "float32", "bfloat16"), "auto, float32 or bfloat16")
        require(self, "save_dtype", self.save_dtype in ("", "float32", "bfloat16", "float16"),
                "float32, bfloat16 or float16")
        if self.resume and self.overwrite:
            raise InputError("--resume and --overwrite contradict each other: give one")


PRESETS: dict[str, dict[str, object]] = {
    "paper": {},  # the fields' defaults: paper Table 6 and sections 2.5, 2.6
    # What the authors' code does where it differs from the paper's text (github.com/HCY123902/AttentionPO).
    "authors": {
        "empty_answers": "space",
        "judge_prompt": "authors",
        "question": "first",
        "strip_answers": True,
        "judge_cut": "authors",
        "spans": "authors",
        "layer_merge": "sum",
        "rounds": "normalized",
        "align": "edits",
        "sink_on": "judge",
        "unseen": "zero",
        "renormalize": False,
        "multiplier": "judged",
    },
    # And what the loss itself says of its baseline (its attribute `settings`).
    "tuned": {},
    "tuned-base": {},
    "tuned-v0.2": {},
    "toy": {
        "judge_prompt": "short",
        "lr": 5e-4,
        "beta": 0.3,
        "batch_size": 16,
        "epochs": 2,
        "max_length": 160,
        "max_prompt_length": 64,
        "save_every": 0,
    },
}

# The data that the paper trains each model on (section 3, appendix E and F.1).
PAPER_DATA = {
    "meta-llama/Meta-Llama-3-8B-Instruct": "princeton-nlp/llama3-ultrafeedback",
    "princeton-nlp/Llama-3-Base-8B-SFT": "HuggingFaceH4/ultrafeedback_binarized",
    "alignment-handbook/zephyr-7b-sft-full": "HuggingFaceH4/ultrafeedback_binarized",
}


def require(config, name: str, ok: bool, wanted: str) -> None:
    """Raise InputError that names the flag and its value."""
    if not ok:
        raise InputError(f"{flag_name(config, name)} is {getattr(config, name)!r}: it must be {wanted}")


def flag_name(cls, name: str) -> str:
    """`max_length` -> `--max-length`."""
    metadata = {field.name: field.metadata for field in dataclasses.fields(cls)}[name]
    return "--" + metadata.get("name", name).replace("_", "-")


def key_name(field: dataclasses.Field) -> str:
    """The key of a field in a JSON config: its flag's name with underscores."""
    return field.metadata.get("name", field.name)


def to_json(config) -> dict[str, object]:
    """All settings, keyed as in `OUT/config.json`."""
    return {key_name(field): getattr(config, field.name) for field in dataclasses.fields(config)}


class HelpFormatter(argparse.HelpFormatter):
    """Flags are wrapped, the text at the end stays as it is."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=30, width=110)

    def _fill_text(self, text, width, indent):
        return text if "\n" in text else super()._fill_text(text, width, indent)


def build_parser(cls, description: str, epilog: str = "") -> argparse.ArgumentParser:
    """The command line of a config class; a flag that is not given leaves no trace in the namespace."""
    parser = argparse.ArgumentParser(description=description, epilog=epilog, allow_abbrev=False,
                                     argument_default=argparse.SUPPRESS, formatter_class=HelpFormatter)
    groups: dict[str, argparse._ArgumentGroup] = {}
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        name = field.metadata["group"]
        group = groups.setdefault(name, None) or parser.add_argument_group(name)
        groups[name] = group
        text = field.metadata["help"].replace("%", "%%")
        options: dict[str, object] = {"dest": field.name}
        if hints[field.name] is bool:
            text += f" (default: {'on' if field.default else 'off'})"
        elif field.default != "":  # the text says what empty means
            text += f" (default: {field.default})"
        if hints[field.name] is bool:
            options["action"] = "store_true" if field.name.startswith("no_") else argparse.BooleanOptionalAction
        else:
            options |= {"type": hints[field.name], "metavar": hints[field.name].__name__.upper()}
            if "optional_value" in field.metadata:
                options |= {"nargs": "?", "const": field.metadata["optional_value"]}
        group.add_argument(flag_name(cls, field.name), help=text, **options)
    return parser


def parse_config(cls, argv: list[str] | None, description: str, epilog: str = "",
                 more_settings: Callable[[dict[str, object], str], dict[str, object]] | None = None):
    """Command line -> config. Raises InputError for a wrong value; argparse exits on an unknown flag.

    more_settings: called with what is given and the preset's name; what it returns stands above the preset.
    """
    explicit = vars(build_parser(cls, description, epilog).parse_args(argv))
    given = (read_config_file(cls, explicit["config"]) if explicit.get("config") else {}) | explicit
    for name, kind in typing.get_type_hints(cls).items():
        if isinstance(given.get(name), str) and kind is str:
            given[name] = given[name].strip()
    if not given.get("plan"):  # which needs no data
        given |= resolve_data(given.get("model", ""), given.get("data", ""))
    preset = given.get("preset") or ("toy" if "toy" in (given.get("data"), given.get("model") or "toy") else "paper")
    if preset not in PRESETS:
        raise InputError(f"--preset is {preset!r}: it must be one of {', '.join(PRESETS)}")
    names = {field.name for field in dataclasses.fields(cls)}
    settings = {key: value for key, value in PRESETS[preset].items() if key in names}
    more = more_settings(given, preset) if more_settings else {}
    settings |= more | given | {"preset": preset}
    if settings.get("length_normalize") and "beta" not in given and "beta" not in more:
        settings["beta"] = 2.0  # paper section 4.3: Eq. 15 has no |y|, so its beta is larger
    return cls(**settings)


def resolve_data(model: str, data: str) -> dict[str, str]:
    """Fill in what one of --model and --data implies for the other; the toy when both are empty."""
    if not model and data in ("", "toy"):
        model = "toy"
    if model == "toy" and not data:
        data = "toy"
    if not model:
        raise InputError(f"--data is {data!r} but no model is named: add --model DIRECTORY_OR_HUB_ID")
    if not data:
        if model not in PAPER_DATA:
            raise InputError(f"--model is {model!r} and the paper names no data for it: add --data FILE_OR_HUB_ID")
        data = PAPER_DATA[model]
    return {"model": model, "data": data}


def read_config_file(cls, path: str) -> dict[str, object]:
    """Settings from a JSON object; unknown keys and wrong types raise InputError."""
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"--config {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"--config {path}: not JSON ({error})") from error
    if not isinstance(values, dict):
        raise InputError(f"--config {path}: it must hold one JSON object, not {type(values).__name__}")
    hints = typing.get_type_hints(cls)
    by_key = {key_name(field): field.name for field in dataclasses.fields(cls)}
    settings = {}
    for key, value in values.items():
        if key not in by_key:
            raise InputError(f"--config {path}: unknown key {key!r}; the keys are the flags' names with underscores")
        kind = hints[by_key[key]]
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind:
            raise InputError(f"--config {path}: {key} is {value!r}, it must be a {kind.__name__}")
        settings[by_key[key]] = value
    return settings


def changed_settings(old: dict[str, object], new) -> list[str]:
    """Settings that a resume may not change and that differ from a stored config.json, as readable lines."""
    lines = []
    for field in dataclasses.fields(new):
        key, value = key_name(field), getattr(new, field.name)
        if not field.metadata.get("free") and old.get(key) != value:
            lines.append(f"{flag_name(new, field.name)}: was {old.get(key)!r}, is {value!r}")
    return lines
