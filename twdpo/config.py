"""Settings of `extract.py` and `train.py`: one flat dataclass per entry point, its command line made from it.

Precedence, lowest first: the field's default, the preset, `--config FILE.json`, an explicit flag.
"""

import dataclasses
import datetime
import math
import typing
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from twdpo.flags import (
    InputError,
    choices_of,
    flag,
    parse_flags,
    read_config_file,
    require,
    spell_choices,
)

Dtype = Literal["auto", "float32", "bfloat16"]
Switch = Literal["auto", "on", "off"]
LEAVE_OUT = ("equal", "empty", "cut", "duplicate", "leak", "massless")  # kinds of pairs: twdpo/leave_out.py


@dataclass(frozen=True)
class SharedConfig:
    """What both entry points need: which model, which pairs, how the model judges them."""

    model: str = flag("", "data", "policy, reference and judge: directory, hub id, id@revision, 'toy'; empty: the toy")
    data: str = flag("", "data", "pairs: files, folders, hub ids, 'toy', by commas; empty: the paper's for --model")
    eval_data: str = flag("", "data", "held-out pairs, same forms, or sets of them: NAME=FILE,NAME=FILE; empty: the "
                          "data's test split, else --eval-fraction")
    chat_template: str = flag("", "data", "Jinja file; empty: the tokenizer's own template")
    date: str = flag("", "data", "YYYY-MM-DD, of a template that prints today's; empty: the day of the start",
                     settled=("",))
    columns: str = flag("", "data", "NAME=COLUMN,...: prompt=question; weight=, margin= of a pair; empty: by name")
    fold_system: bool = flag(False, "data", "put the system turn before the first user turn's text; off: as it is")
    templated: bool = flag(False, "data", "texts hold the template's marks already: taken as they are; off: refused")
    skip_bad_rows: bool = flag(False, "data", "write bad rows to rejected_rows.jsonl and go on; off: stop")
    preset: Literal["", "paper", "authors", "toy", "tuned", "tuned-base", "tuned-v0.2"] = flag(
        "", "data", "settings to start from; tuned*: by SimPO's authors, for some losses, on Llama-3 Instruct, Base, "
        "Instruct's second pairs; empty: toy for --data toy, else paper")
    config: str = flag("", "data", "JSON file of settings, keys as in OUT/config.json; empty: none", free=True)
    cache_dir: str = flag("", "data", "of its passes; empty: twdpo/ in $XDG_CACHE_HOME or ~/.cache", free=True)

    judge_prompt: str = flag("paper", "judge", "paper, authors, short, or file with {question}, {answer_a}, {answer_b}")
    judge_max_length: int = flag(0, "judge", "tokens of an input; longer are cut; 0: its context", settled=(0,))
    judge_query: Literal["prompt", "verdict"] = flag(
        "prompt", "judge", "who attends: the prompt's last token, or its verdict (2 forwards)")
    judge_heads: str = flag("mean", "judge", "mean of all heads, or of these: 1-based, separated by commas")
    judge_attention: Literal["row", "eager"] = flag(
        "row", "judge", "one fp32 row beside SDPA, or whole maps, as a check")
    judge_dtype: Dtype = flag("auto", "judge", "auto: bfloat16 on CUDA, float32 on CPU", settled=("auto",))
    judge_batch_tokens: int = flag(0, "judge", "most tokens in a batch; 0: 8192 on CPU, 32768 on CUDA", free=True)
    judge_sharding: Switch = flag("auto", "judge", "FSDP2 shards; auto: if the judge takes more than 80 % of a GPU",
                                  free=True)

    empty_answers: Literal["refuse", "space"] = flag(
        "refuse", "parity", "answers of white space: bad rows, or one space (authors)")
    judge_question: Literal["conversation", "first"] = flag(
        "conversation", "parity", "all turns, or the first user turn (authors)")
    judge_strip: bool = flag(False, "parity", "strip white space around judged answers (authors); off: as templated")
    judge_cut: Literal["common", "authors"] = flag(
        "common", "parity", "long inputs: the question, then both answers to one length; authors: at 2048 tokens, "
        "answers to 768, the question to the rest")
    judge_spans: Literal["exact", "authors"] = flag(
        "exact", "parity", "all of an answer's tokens; authors: without its last ones")
    judge_rounds: Literal["raw", "normalized"] = flag(
        "raw", "parity", "the mean of both is normalised (Eq. 13), or each (authors)")

    def __post_init__(self):
        hints = typing.get_type_hints(type(self))
        for field in dataclasses.fields(self):
            value, choices = getattr(self, field.name), choices_of(hints[field.name])
            require(self, field.name, not choices or value in choices, spell_choices(choices))
            if isinstance(value, (int, float)):
                require(self, field.name, 0 <= value < math.inf, "a finite number >= 0")
        require(self, "date", not self.date or is_date(self.date), "a day as YYYY-MM-DD")
        require(self, "judge_prompt", bool(self.judge_prompt), "paper, authors, short or a file")


def is_date(text: str) -> bool:
    try:
        return datetime.date.fromisoformat(text).isoformat() == text
    except ValueError:
        return False


@dataclass(frozen=True)
class ExtractConfig(SharedConfig):
    """`extract.py`: pairs -> raw attention on disk."""

    layers: str = flag("last", "judge", "layers to store: last, all, or 1-based numbers separated by commas")
    rollout: bool = flag(False, "judge", "store attention rollout too (keeps a batch's queries and keys); off: none")
    verbalized: bool = flag(False, "judge", "the model writes scores instead (paper section 4.2); off: attention")
    out: str = flag("", "output", "weights file's folder (required); the same extraction is completed", free=True)
    export: str = flag("", "output", ".jsonl of the authors' columns (and FILE_held_out.jsonl); empty: off", free=True)
    report: str = flag("", "output", "folder for statistics of the weights and a page; empty: off", free=True)
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
        require(self, "report_min_count", self.report_min_count >= 1, ">= 1")


@dataclass(frozen=True)
class TrainConfig(SharedConfig):
    """`train.py`: pairs -> judge -> weights -> TwDPO -> evaluated checkpoint. Defaults: paper Table 6."""

    imports: str = flag("", "data", "Python files that add losses or sources, by commas; empty: none", name="import")

    leave_out: str = flag("", "data", "pairs that can't teach: equal,empty,cut,duplicate,leak,massless; empty: none")

    loss: str = flag("twdpo", "objective", "a name in LOSSES (--help-losses), or a sum: dpo+0.2*sft")
    loss_options: str = flag("", "objective", "of the loss: NAME=VALUE separated by commas; empty: its defaults")
    weights: str = flag("", "objective", "name in WEIGHTS, folder of extract.py, its --export; empty: the loss's own")
    weights_options: str = flag("", "objective", "of the source: NAME=VALUE separated by commas; empty: its defaults")
    aux_model: str = flag("", "objective", "POSITIVE[,NEGATIVE] that sources compare; second: the start; empty: none")
    aux_prompts: str = flag("", "objective", "POSITIVE,NEGATIVE: text files; one model behind either; empty: none")
    weights_tokenizer: str = flag("", "objective", "model whose token ids a --weights file holds; empty: --model")
    layer: str = flag("last", "objective", "stored: last, rollout, 8 (1-based); mean: all, 8,16; sum (authors): 8+16",
                      settled=("last", "all"))
    beta: float = flag(5e-3, "objective", "strength of the KL penalty; losses may bring theirs; --length-normalize: 2")
    length_normalize: bool = flag(False, "objective", "divide an answer's sum by |y| (Eq. 15); off: do not (Eq. 5)")
    sink_k: int = flag(1, "objective", "first judge tokens whose weight is reset to 1/n (Eq. 14); 0: off")
    sink_k_min: int = flag(5, "objective", "the reset applies to answers of at least this many judge tokens")

    lr: float = flag(1e-6, "steps", "peak learning rate of AdamW (cosine to 0)")
    warmup_ratio: float = flag(0.1, "steps", "share of the steps in linear warmup, from a rate of 0 on; 0: none")
    weight_decay: float = flag(0.0, "steps", "AdamW's decoupled decay, not of norms and biases; 0: off")
    max_grad_norm: float = flag(1.0, "steps", "gradients are clipped to this norm; 0: off")
    batch_size: int = flag(32, "steps", "pairs a step, over all processes")
    epochs: int = flag(1, "steps", "passes over the pairs")
    max_steps: int = flag(0, "steps", "steps, overriding --epochs and repeating the data as needed; 0: off")
    max_length: int = flag(2048, "steps", "tokens of prompt and one response; responses keep their first ones")
    max_prompt_length: int = flag(1800, "steps", "tokens of a prompt; longer ones keep BOS and their last ones")
    seed: int = flag(42, "steps", "of the held-out split and the order of the pairs")

    eval_fraction: float = flag(0.05, "held-out", "share held out, by prompt, without a test split; 0: no evaluation")
    eval_every: int = flag(500, "held-out", "steps between evaluations; first and last always; 0: only those")

    dtype: Dtype = flag("auto", "hardware", "to compute in; auto: bfloat16 on CUDA, float32 on CPU", settled=("auto",))
    micro_batch_tokens: int = flag(0, "hardware", "of one pass; 0: 4096 on CPU, on CUDA 16384 or by plan", free=True)
    packing: Switch = flag("auto", "hardware", "many pairs a row, unpadded; off: a sequence; auto: after a check",
                           settled=("auto",))
    checkpointing: Literal["auto", "none", "selective", "attention", "full"] = flag(
        "auto", "hardware", "activations computed again: every second layer's, all but attention's, or all; auto: none "
        "on CPU, on CUDA what fits by the plan: none, selective or full", free=True)
    head_cache_gib: float = flag(0.0, "hardware", "GiB kept on CUDA to make fewer logits twice; 0: none", free=True)
    ref_states: Literal["memory", "disk"] = flag(
        "memory", "hardware", "where losses on whole distributions have the reference: a second model, or its hidden "
        "states in --cache-dir", free=True)
    replicate: int = flag(1, "hardware", "copies of the sharded parameters; number of nodes: one on each", free=True)
    compile: bool = flag(False, "hardware", "torch.compile each layer, not its attention (a minute); off: eager")
    no_sync: bool = flag(False, "hardware", "reduce gradients at the last micro-batch alone; off: at all", free=True)

    output_dir: str = flag("", "output", "folder of the run; empty: runs/NAME-TIME", free=True)
    resume: str = flag("", "output", "from --output-dir's newest checkpoint (auto) or this folder; empty: off",
                       free=True, alone="auto")
    overwrite: bool = flag(False, "output", "delete a run that stands in --output-dir; off: refuse", free=True)
    save_every: int = flag(500, "output", "steps between checkpoints, the last step included; 0: none", free=True)
    keep_last: int = flag(2, "output", "checkpoints kept; 0: all", free=True)
    token_stats: bool = flag(False, "output", "log token_entropy (nats) and token_top1 (share likeliest); off: neither",
                             free=True)
    sample: int = flag(0, "output", "held-out prompts answered at evaluations, in samples.jsonl; 0: none", free=True)
    profile: bool = flag(False, "output", "log shares of time, TFLOP/s, MFU (waits for the GPU); off: not measured",
                         free=True)
    show: int = flag(0, "output", "print so many pairs as they would be trained, show.html too, and stop; 0: run",
                     free=True)
    plan: bool = flag(False, "output", "print what memory the run would need, and stop; off: run", free=True)
    save_dtype: Literal["", "float32", "bfloat16", "float16"] = flag(
        "", "output", "of final/ and best/; empty: the source checkpoint's")
    wandb: str = flag("", "output", "Weights & Biases project (WANDB_MODE=offline: no account); empty: off", free=True)

    align: Literal["characters", "edits"] = flag(
        "characters", "parity", "how judge tokens meet training tokens; edits: appendix D, of answers tokenised "
        "apart from their prompts (authors)")
    sink_on: Literal["training", "judge"] = flag(
        "training", "parity", "the reset is made after the alignment, or before it (authors)")
    unseen: Literal["mean", "zero"] = flag("mean", "parity", "tokens that the judge did not see: 1/n, or 0 (authors)")
    renormalize: bool = flag(
        True, "parity", "on: weights sum to 1; off: to the share of mass that cuts and alignment left (authors)")
    multiplier: Literal["answer", "judged"] = flag(
        "answer", "parity", "tokens that |y| counts: all, or those judged (authors)")

    def __post_init__(self):
        super().__post_init__()
        for name in ("beta", "lr"):
            require(self, name, getattr(self, name) > 0, "> 0")
        require(self, "eval_fraction", self.eval_fraction < 1, "in [0, 1)")
        require(self, "warmup_ratio", self.warmup_ratio <= 1, "in [0, 1]")
        for name in ("batch_size", "epochs", "max_prompt_length", "replicate"):
            require(self, name, getattr(self, name) >= 1, ">= 1")
        require(self, "max_length", self.max_length > self.max_prompt_length,
                f"more than --max-prompt-length ({self.max_prompt_length}), so that a response has room")
        if unknown := self.left_out - set(LEAVE_OUT):
            raise InputError(f"--leave-out has {min(unknown)!r}: the kinds are {', '.join(LEAVE_OUT)}")
        if self.resume and self.overwrite:
            raise InputError("--resume and --overwrite contradict each other: give one")

    @property
    def left_out(self) -> frozenset[str]:
        """The kinds of pairs that --leave-out names."""
        return frozenset(filter(None, (kind.strip() for kind in self.leave_out.split(","))))


PRESETS: dict[str, dict[str, object]] = {
    "paper": {},  # the fields' defaults: paper Table 6 and sections 2.5, 2.6
    # What the authors' code does where it differs from the paper's text (github.com/HCY123902/AttentionPO). Several
    # layers are summed there: --layer 8+16.
    "authors": {
        "empty_answers": "space",
        "judge_prompt": "authors",
        "judge_question": "first",
        "judge_strip": True,
        "judge_cut": "authors",
        "judge_spans": "authors",
        "judge_rounds": "normalized",
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
        "lr": 1.5e-4,  # the held-out loss is lowest at step 12 to 16 of 32, and little higher at the end
        "beta": 0.3,
        "batch_size": 16,
        "max_length": 160,
        "max_prompt_length": 64,
        "eval_every": 4,
        "save_every": 0,
    },
}


# The data that the paper trains each model on (section 3, appendix E and F.1).
PAPER_DATA = {
    "meta-llama/Meta-Llama-3-8B-Instruct": "princeton-nlp/llama3-ultrafeedback",
    "princeton-nlp/Llama-3-Base-8B-SFT": "HuggingFaceH4/ultrafeedback_binarized",
    "alignment-handbook/zephyr-7b-sft-full": "HuggingFaceH4/ultrafeedback_binarized",
}


def parse_config(cls, argv: list[str] | None, description: str,
                 more_settings: Callable[[dict[str, object], str], dict[str, object]] | None = None,
                 list_losses: Callable[[str], str] | None = None):
    """Command line -> config. As parse_flags.

    more_settings: called with what is given and the preset's name; what it returns stands above the preset.
    list_losses: gives the text of --help-losses, which is printed instead of a run, for the files of --import.
    """
    explicit, hints = parse_flags(cls, argv, description, list_losses is not None), typing.get_type_hints(cls)
    lists_losses = explicit.pop("help_losses", False)
    given = (read_config_file(cls, explicit["config"]) if explicit.get("config") else {}) | explicit
    if lists_losses:
        print(list_losses(given.get("imports", "")))
        raise SystemExit(0)
    if not given.get("plan"):  # which needs no data
        given |= resolve_data(given.get("model", ""), given.get("data", ""))
    preset = given.get("preset") or ("toy" if "toy" in (given.get("data"), given.get("model") or "toy") else "paper")
    settings = {key: value for key, value in PRESETS.get(preset, {}).items() if key in hints}
    more = more_settings(given, preset) if more_settings else {}
    settings |= more | given | {"preset": preset}
    if settings.get("length_normalize") and "beta" not in given and preset.startswith("tuned"):
        raise InputError(f"--preset {preset} --length-normalize: no beta is known for weights without |y|: give one "
                         "with --beta")
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
