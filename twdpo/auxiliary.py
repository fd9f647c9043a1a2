"""Log-probs of the responses under the models of --aux-model: one cached pass of each, before training."""

import gc
from collections.abc import Callable
from pathlib import Path

import torch

from twdpo.batch import PairBatch
from twdpo.chat import Example
from twdpo.config import InputError, TrainConfig
from twdpo.dist import Process
from twdpo.files import hash_json
from twdpo.inputs import Inputs
from twdpo.logratio import HeadOptions, weighted_logratio
from twdpo.model import (
    Policy,
    cache_directory,
    check_length,
    fingerprint_model,
    load_model_config,
    load_policy,
    load_tokenizer,
    locate_model,
    pick_dtype,
    settle_packing,
)
from twdpo.reference import cached_logps, reference_directory, reference_logps
from twdpo.rows import RowOptions, evaluation_batches
from twdpo.weights import Logps

CONTRAST = 1.0  # cDPO's b: softmax((1 + b) z_positive - b z_negative)


def find_aux_models(config: TrainConfig, needs: tuple[str, ...], inputs: Inputs, process: Process) -> list[Path]:
    """Folders of the positive and the negative model; none when the source needs none. Raises InputError. All ranks.

    The negative one is the policy's starting weights unless it is named.
    """
    if not {"aux", "contrast"} & set(needs):
        if config.aux_model:
            raise InputError(f"--aux-model {config.aux_model} is given, but the weight source reads no such model")
        return []
    names = [name.strip() for name in config.aux_model.split(",") if name.strip()]
    if not 1 <= len(names) <= 2:
        raise InputError(f"--aux-model is {config.aux_model!r}: this weight source needs one model or two, POSITIVE or "
                         "POSITIVE,NEGATIVE (without the second: the policy's starting weights)")
    folders = [process.on_main(lambda name=name: locate_model(name, "--aux-model")) for name in names]
    longest = max(example.longest for example in inputs.train + inputs.held_out)
    for folder in folders:
        tokenizer = load_tokenizer(folder, "", needs_template=False)
        warning = check_length(f"the longest sequence (for --aux-model {folder})", longest, load_model_config(folder))
        process.print(warning) if warning else None
        if tokenizer.get_vocab() != inputs.tokenizer.get_vocab():
            raise InputError(f"--aux-model {folder}: its tokenizer is not the policy's, so their log-probs are of "
                             "other tokens")
    return folders if len(folders) == 2 else [*folders, inputs.model_dir]


def auxiliary_logps(config: TrainConfig, needs: tuple[str, ...], folders: list[Path], examples: list[Example],
                    budget: int, process: Process) -> dict[str, dict[int, Logps]]:
    """What WeightContext.aux holds, of all `examples`. All ranks.

    budget: most tokens of a micro-batch.
    """
    if not folders:
        return {}
    dtype, cache = pick_dtype(config.dtype, process.device), cache_directory(config)
    batches = evaluation_batches(len(examples), config.batch_size)
    fingerprints = [process.on_main(lambda folder=folder: fingerprint_model(folder)) for folder in folders]

    def load(folder: Path) -> Policy:
        return load_policy(folder, dtype, process, replicate=config.replicate)

    def run(name: str, fingerprint: str, load_models: Callable[[], list[Policy]]) -> dict[int, Logps]:
        def directory(packs: bool) -> Path:
            # Not the reference's folder: its log-probs are of the rows of epoch 0, to the last bit.
            return reference_directory(cache, hash_json(["aux", fingerprint]), dtype, process.device, packs, False)
        for packs in {"on": [True], "off": [False]}.get(config.packing, [True, False]):
            if cached := cached_logps(process, examples, directory(packs)):
                process.print(f"{name} log-probs: all {len(examples)} pairs cached in {directory(packs)}")
                return {example.pair.key: logps for example, logps in zip(examples, cached)}
        models = load_models()
        packs = all(settle_packing(model, config.packing, examples, process) for model in models)
        model = models[0] if len(models) == 1 else Contrast(*models)
        logps = reference_logps(model, process, examples, batches, RowOptions(packs, budget), directory(packs))
        return {examples[place].pair.key: value for place, value in logps.items()}

    logps = {}
    if "contrast" in needs:
        logps["contrast"] = run("contrast", hash_json(["contrast", CONTRAST, *fingerprints]),
                                lambda: [load(folder) for folder in folders])
        gc.collect()  # FSDP2's modules refer to themselves in circles
    if "aux" in needs:
        for name, folder, fingerprint in zip(("positive", "negative"), folders, fingerprints):
            process.print(f"{name} model of --aux-model: {folder}")
            logps[name] = run(name, fingerprint, lambda folder=folder: [load(folder)])
            gc.collect()
    return logps


class Contrast:
    """Two models as one whose logits are (1 + b) z_positive - b z_negative (cDPO)."""

    def __init__(self, positive: Policy, negative: Policy):
        """Raises InputError for models whose logits are no linear function of their hidden states."""
        for model in (positive, negative):
            if model.options.softcap is not None:
                raise InputError(f"{model.model.config.model_type} caps its logits: their contrast can't be taken "
                                 "blockwise; use another --aux-model")
        self.models = (positive, negative)

    @torch.no_grad()
    def __call__(self, batch: PairBatch) -> tuple[None, torch.Tensor]:
        """(None, log-probs of the response tokens [N]), in the place of a policy's (ratio_S, logps_N). All ranks."""
        hidden, heads, biases = [], [], []
        vocabulary = min(model.model.config.get_text_config().vocab_size for model in self.models)  # some are padded
        for factor, model in zip((1 + CONTRAST, -CONTRAST), self.models):
            hidden_ND, head_VD, bias_V = model.states_and_head(batch)
            factor *= model.options.logit_scale or 1.0
            hidden.append(hidden_ND)
            heads.append(factor * head_VD[:vocabulary])
            biases.append(factor * bias_V[:vocabulary] if bias_V is not None else head_VD.new_zeros(vocabulary))
        # One matrix product over both hidden states is the weighted sum of both logits: V is never written out.
        _, logps_N, _ = weighted_logratio(torch.cat(hidden, 1), torch.cat(heads, 1), batch.targets_N, batch.ref_logps_N,
                                          batch.weights_N, batch.seq_lens_S, batch.scale_S, sum(biases), HeadOptions())
        return None, logps_N
