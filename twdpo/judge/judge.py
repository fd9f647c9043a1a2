"""The judge: a causal LM that reads judge inputs, row by row, and gives attention and verdicts."""

import gc
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from twdpo.config import SharedConfig
from twdpo.dist import Process, pick_dtype, shard_module
from twdpo.flags import InputError
from twdpo.judge.prompt import ROUNDS, JudgedPair, verdict_ids
from twdpo.logratio import logits_of
from twdpo.models.attention import ATTENTION_NAME, JudgeCapture, judge_forward, parse_heads, rollout_rows
from twdpo.models.build import build_on_meta, decoder_layers, head_options, suit_device
from twdpo.models.shards import load_shards, warn_of_unplaced
from twdpo.models.source import Model, describe_failure, load_model_config
from twdpo.pairs import Pair
from twdpo.rows import common_beginning, fill_rows, pack
from twdpo.weights_file import ROLLOUT


class Judge(torch.nn.Module):
    """A causal LM whose forward ends in attention rows and in the logits of each input's next token.

    The head's weight is read inside this forward: under FSDP2 this module is the root.
    """

    def __init__(self, model, num_layers: int = 0):
        """num_layers: the layers after these are thrown away; 0: none is."""
        super().__init__()
        self.model, self.options = model, head_options(model.config)
        layers = decoder_layers(model)
        self.num_layers = num_layers or len(layers)
        del layers[self.num_layers:]

    def forward(self, capture: JudgeCapture, with_logits: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(hidden states of each input's last token [S, D], logits there [S, V] in fp32 or None); see JudgeCapture."""
        final_layer = self.layers[-1] if capture.final_layer >= 0 else None
        hidden_SD = judge_forward(self.model.get_decoder(), capture, self.num_layers, final_layer)
        if not with_logits:
            return hidden_SD, None
        head = self.model.get_output_embeddings()
        return hidden_SD, logits_of(hidden_SD, head.weight, getattr(head, "bias", None), self.options)

    @property
    def layers(self) -> torch.nn.ModuleList:
        return decoder_layers(self.model, self.num_layers)


def load_judge(directory: Path, dtype: torch.dtype, device: torch.device, num_layers: int = 0) -> Judge:
    """A whole copy of the model that can give attention rows, in eval mode on one device. Raises InputError."""
    try:
        model, found = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, attn_implementation=ATTENTION_NAME,
                                                            output_loading_info=True, trust_remote_code=False,
                                                            use_safetensors=True)
        if missing := found["missing_keys"]:  # transformers would make them up at random
            raise ValueError(f"{len(missing)} tensors are missing, {min(missing)} among them")
    except KeyError as error:  # a table of attention classes of its own
        raise InputError(f"the model in {directory} does not use transformers' AttentionInterface ({error}): use "
                         "another one") from error
    except Exception as error:  # noqa: BLE001 - its files may say anything
        raise InputError(f"the model in {directory} can't be loaded: {describe_failure(error)}") from error
    if warning := warn_of_unplaced(model, found["unexpected_keys"], directory):
        print(warning)
    suit_device(model, device)
    return Judge(model.eval(), num_layers).to(device)


def load_sharded_judge(directory: Path, dtype: torch.dtype, device: torch.device, num_layers: int = 0) -> Judge:
    """As `load_judge` with the parameters of the layers that run in FSDP2 shards: its forward is collective.

    All ranks.
    """
    model = build_on_meta(load_model_config(directory), dtype)
    suit_device(model, device)
    judge = Judge(model, num_layers)
    shard_module(judge, judge.layers, None, device)
    load_shards(judge, directory, device)
    return judge.eval()


def shards_judge(choice: str, model: Model, dtype: torch.dtype, process: Process) -> bool:
    """What --judge-sharding comes to: `auto` shards a model that would take more than 80 % of one GPU."""
    if choice != "auto" or process.device.type != "cuda" or process.world_size == 1:
        return choice == "on"
    size = sum(parameter.numel() for parameter in build_on_meta(model.config, dtype).parameters()) * dtype.itemsize
    return size > 0.8 * torch.cuda.get_device_properties(process.device).total_memory


IDLE, WORKS, FAILED = range(3)  # what a process that runs a sharded judge is up to


class AnotherFailed(InputError):  # noqa: N818 - who failed says why
    """Another process that runs the same sharded judge has stopped."""


def judge_budget(config: SharedConfig, device: torch.device) -> int:
    """Most tokens in one batch."""
    return config.judge_batch_tokens or (32768 if device.type == "cuda" else 8192)


def stores_verdicts(meta: dict[str, object], num_layers: int) -> bool:
    """Whether an extraction reaches the verdicts of a judge of so many layers."""
    return ROLLOUT in meta["layers"] or meta["query"] == "verdict" or num_layers in meta["layers"]


class JudgePass:
    """A loaded judge and its settings. Input 2i + r is round r of pair i."""

    def __init__(self, config: SharedConfig, meta: dict[str, object], model: Model, process: Process):
        device, dtype = process.device, pick_dtype(config.judge_dtype, process.device)
        text_config = model.config.get_text_config()
        self.query, self.eager = config.judge_query, config.judge_attention == "eager"
        self.layers = [layer - 1 for layer in meta["layers"] if layer != ROLLOUT]
        self.rollout = ROLLOUT in meta["layers"]
        self.heads = parse_heads(config.judge_heads, text_config.num_attention_heads)
        self.budget = judge_budget(config, device)
        self.verdicts = verdict_ids(model.tokenizer)
        # Nothing after the last wanted layer is loaded or run; the verdict needs them all.
        num_layers = text_config.num_hidden_layers
        self.has_verdict = stores_verdicts(meta, num_layers)
        if not self.has_verdict:
            num_layers = self.layers[-1] + 1
        self.process, self.sharded = process, shards_judge(config.judge_sharding, model, dtype, process)
        load = load_sharded_judge if self.sharded else load_judge
        self.judge = load(model.folder, dtype, device, num_layers)
        # Some rotary embeddings change with the longest position of a row, and remember it.
        rope = str(getattr(text_config, "rope_parameters", None))
        self.adaptive = "dynamic" in rope or "longrope" in rope
        self.rotary = [(module, {name: buffer.clone() for name, buffer in module._buffers.items()},
                        {name: value for name, value in vars(module).items() if isinstance(value, (int, float))})
                       for module in self.judge.modules()
                       if self.adaptive and any("inv_freq" in name for name in module._buffers)]
        self.shortens = False
        try:
            self.packs = self.check_packing()
        except (AttributeError, TypeError, IndexError, RuntimeError) as error:
            raise InputError(f"{text_config.model_type} can't be run as a judge ({error}): use another model"
                             ) from error
        if not self.packs:
            process.print("judge inputs run one by one: packed rows give this model other hidden states")
        if self.sharded:
            process.print(f"the judge is sharded over {process.world_size} process(es)")

    def check_packing(self) -> bool:
        """Whether two inputs with a common beginning get the hidden states that each gets alone.

        If not, once more with a final layer that does all positions: it may mix tokens outside its attention.
        """
        first = self.filler = np.arange(24, dtype=np.int32) * 7 % self.judge.model.config.get_text_config().vocab_size
        inputs = [first, np.concatenate([first[:12], first[:5:-1]])]
        alone = torch.cat([self.forward(pack([[ids]]), ())[1] for ids in inputs])
        tolerance = 1e-3 if alone.dtype == torch.float32 else 5e-2
        for shortens in (not self.eager, False):
            self.shortens = shortens
            together = self.forward(pack([inputs]), ())[1]
            if (together - alone).norm() <= tolerance * alone.norm():  # sync
                return not self.adaptive
        return False

    def finish(self) -> None:
        """Free the judge; a sharded one first runs along for as long as another process has work. All ranks."""
        while self.keep_step(IDLE) == WORKS:
            self.forward(pack([[self.filler]]), (), keeps_step=False)
        del self.judge
        gc.collect()  # FSDP2's modules refer to themselves in circles

    def keep_step(self, state: int) -> int:
        """Before a forward, which of a sharded judge is collective: tell the other processes what this one is up to;
        the largest of all their states. Raises InputError when another one failed. All ranks."""
        if not self.sharded:
            return IDLE
        largest = self.process.largest(state)
        if largest == FAILED and state != FAILED:
            raise AnotherFailed("another process found its part of the judge's input unfit, see its message")
        return largest

    @torch.no_grad()
    def forward(self, row, layers, keep: bool = False, with_logits: bool = False, keeps_step: bool = True
                ) -> tuple[JudgeCapture, torch.Tensor, torch.Tensor | None]:
        """(what was captured, hidden states of each input's last token [S, D], logits there [S, V] or None).

        The same whatever ran before. keeps_step: tell the other processes, which a sharded judge needs. All ranks then.
        """
        if keeps_step:
            self.keep_step(WORKS)
        for module, buffers, numbers in self.rotary:
            for name, buffer in buffers.items():
                setattr(module, name, buffer.clone())
            for name, number in numbers.items():
                setattr(module, name, number)
        final_layer = self.judge.num_layers - 1 if self.shortens else -1
        capture = JudgeCapture(row, frozenset(layers), self.heads, self.eager, keep, final_layer)
        return capture, *self.judge(capture, with_logits)

    def shard(self, pairs: list[Pair], judged: list[JudgedPair], bar) -> dict[str, np.ndarray]:
        """The arrays of one shard (twdpo.weights_file). Raises InputError, which names the pair, for attention that is
        not finite."""
        units = [(pair, (0, 1)) for pair in range(len(judged))]
        if not self.packs:
            units = [(pair, (turn,)) for pair, turns in units for turn in turns]
        groups = [[judged[pair].input_ids[turn] for turn in turns] for pair, turns in units]
        lengths = [sum(map(len, group)) - (len(group) - 1) * common_beginning(group) if len(group) > 1
                   else len(group[0]) for group in groups]
        rows, verdicts, top_tokens = {}, {}, {}
        for batch in fill_rows(lengths, self.budget if self.packs else 0):
            attention, verdict_S2, top_S = self.judge_rows([groups[unit] for unit in batch])
            inputs = [(units[unit][0], turn) for unit in batch for turn in units[unit][1]]
            for place, (pair, turn) in enumerate(inputs):
                if not (np.isfinite(attention[place]).all() and np.isfinite(verdict_S2[place:place + 1]).all()):
                    raise InputError(f"{pairs[pair].where}: the attention of {self.judge.model.config.model_type} as "
                                     "its judge is not finite; try --judge-dtype float32")
                for side in (0, 1):
                    first, stop = judged[pair].ranges[turn][side]
                    rows[pair, side, turn] = attention[place][:, first:stop]
                if self.has_verdict:
                    verdicts[pair, turn], top_tokens[pair, turn] = verdict_S2[place], top_S[place]
            bar.update(len(inputs) / ROUNDS)
        answers = [(pair, side) for pair in range(len(judged)) for side in (0, 1)]
        attention_RLJ = np.stack([np.concatenate([rows[pair, side, turn] for pair, side in answers], axis=1)
                                  for turn in range(ROUNDS)])
        arrays = {
            "key_E": np.array([pair.key for pair in pairs], dtype=np.int64),
            "length_E2": np.array([[len(ids) for ids in pair.ids] for pair in judged], dtype=np.int32),
            "ids_J": np.concatenate([judged[pair].ids[side] for pair, side in answers]),
            "spans_J2": np.concatenate([judged[pair].spans_N2[side] for pair, side in answers]),
            "attention_RLJ": attention_RLJ,
        }
        if self.has_verdict:
            turns = range(ROUNDS)
            arrays["verdict_ER2"] = np.array([[verdicts[pair, turn] for turn in turns] for pair in range(len(judged))],
                                             dtype=np.float32)
            arrays["top_token_ER"] = np.array([[top_tokens[pair, turn] for turn in turns]
                                               for pair in range(len(judged))], dtype=np.int32)
        return arrays

    def judge_rows(self, groups: list[list[np.ndarray]]) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
        """(attention of each input [L, T] fp32, log-probs of A and of B [S, 2], argmax over the vocabulary [S])."""
        verdict_S2 = top_S = np.zeros(0)
        reads = self.query == "prompt"
        capture, _, logits_SV = self.forward(pack(groups), self.layers if reads else (), self.rollout and reads,
                                             self.has_verdict)
        if self.has_verdict:
            logps_SV = logits_SV.log_softmax(dim=-1)
            verdict_S2 = torch.stack([logps_SV[:, ids].logsumexp(dim=-1) for ids in self.verdicts], dim=-1)
            verdict_S2 = verdict_S2.cpu().numpy()  # sync
            top_S = logps_SV.argmax(dim=-1).cpu().numpy()
        if self.query == "verdict":
            # Append the likeliest spelling of the likelier verdict and read that token's row instead.
            spellings = [self.verdicts[letter] for letter in verdict_S2.argmax(axis=-1)]
            last = iter([spelling[int(logps_V[spelling].argmax())] for spelling, logps_V in zip(spellings, logps_SV)])
            groups = [[np.append(ids, next(last)).astype(np.int32) for ids in group] for group in groups]
            capture, *_ = self.forward(pack(groups), self.layers, self.rollout)
        rows = [torch.cat(capture.rows[layer]) for layer in self.layers]
        if self.rollout:
            rows.append(torch.cat(rollout_rows(capture)))
        attention_LT = torch.stack(rows).cpu().numpy()  # sync
        ends = np.cumsum([len(ids) for group in groups for ids in group])[:-1]
        return np.split(attention_LT, ends, axis=1), verdict_S2, top_S
