"""Find, fingerprint and load a model: as a plain judge, or as the sharded policy whose forward ends in log-ratios."""

import hashlib
import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from twdpo.attention import ATTENTION_NAME, JudgeCapture, all_layers_attending, judge_forward, packed
from twdpo.batch import PairBatch, collate
from twdpo.chat import Example, set_chat_template
from twdpo.config import InputError, SharedConfig
from twdpo.dist import Process, shard_module
from twdpo.files import hash_file, hash_json, make_directory
from twdpo.logratio import HeadOptions, logits_of, weighted_logratio
from twdpo.rows import MicroBatch
from twdpo.tensors import read_tensors

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def cache_directory(config: SharedConfig) -> Path:
    """--cache-dir, else the user's cache folder; made if it is not there. Raises InputError."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "twdpo"
    return make_directory(Path(config.cache_dir).expanduser() if config.cache_dir else default, "--cache-dir")


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """`auto` is bfloat16 on CUDA and float32 elsewhere."""
    return DTYPES["bfloat16" if device.type == "cuda" else "float32"] if name == "auto" else DTYPES[name]


TOY_MODEL = Path(__file__).parent / "toy_model"  # made by twdpo.toy_train


def find_model(config: SharedConfig, process: Process) -> Path:
    """The model as a local folder: as given, fetched from the hub, or the toy. Raises InputError. All ranks."""
    return process.on_main(lambda: _find_model(config))


def _find_model(config: SharedConfig) -> Path:
    if not config.model:
        return TOY_MODEL
    return locate_model(config.model, "--model")


def locate_model(name: str, flag: str) -> Path:
    """A model as a local folder: as it is, or fetched from the hub. Raises InputError.

    flag: what names it, for messages.
    """
    directory = Path(name)
    if not directory.is_dir():
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError
        try:
            directory = Path(snapshot_download(
                name, allow_patterns=["*.json", "*.safetensors", "*.jinja", "*.model"],
                ignore_patterns=["original/*"]))
        except (HfHubHTTPError, HFValidationError, OSError) as error:
            raise InputError(f"{flag} is {name!r}: no such folder here, and the hub does not give it "
                             f"({error})") from error
    if not (directory / "config.json").is_file():
        raise InputError(f"{flag} {name}: no config.json in {directory}")
    if not list(directory.glob("*.safetensors")):
        raise InputError(f"{flag} {name}: no .safetensors file in {directory}; convert the checkpoint "
                         "(pickled weights are never read)")
    return directory


def load_tokenizer(directory: Path, chat_template: str, needs_template: bool = True):
    """The model's fast tokenizer with a chat template. Raises InputError."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory)
    except (OSError, ValueError) as error:
        raise InputError(f"the tokenizer in {directory} can't be loaded: {error}") from error
    if needs_template:
        set_chat_template(tokenizer, chat_template)
    return tokenizer


def load_model_config(directory: Path):
    """The model's config. Raises InputError."""
    try:
        return AutoConfig.from_pretrained(directory)
    except (OSError, ValueError) as error:
        raise InputError(f"the config in {directory} can't be loaded: {error}") from error


def fingerprint_model(directory: Path) -> str:
    """sha256 over config.json and every weight file, by content."""
    paths = [directory / "config.json", *sorted(directory.glob("*.safetensors"))]
    return hash_json([[path.name, hash_file(path)] for path in paths])


def fingerprint_tokenizer(tokenizer) -> str:
    """sha256 over vocabulary, merges, special tokens and chat template."""
    digest = hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode())
    digest.update(json.dumps([tokenizer.chat_template, tokenizer.bos_token, tokenizer.eos_token]).encode())
    return digest.hexdigest()


def context_length(model_config) -> int:
    """Positions the model was made for, in tokens; a large number when its config names none."""
    return getattr(model_config.get_text_config(), "max_position_embeddings", None) or 1 << 30


def is_rotary(model_config) -> bool:
    """Whether positions past the context are at least defined (rotary) rather than an index out of a table."""
    text_config = model_config.get_text_config()
    return any(getattr(text_config, name, None) for name in ("rope_parameters", "rope_scaling", "rope_theta"))


def check_length(name: str, length: int, model_config) -> str:
    """A warning for a longest input past a rotary model's context, "" when it fits; InputError for other models."""
    context = context_length(model_config)
    if length <= context:
        return ""
    if not is_rotary(model_config):
        raise InputError(f"{name} reaches {length} tokens, the model has {context} positions: lower it")
    return f"warning: {name} reaches {length} tokens, the model was made for {context}"


def head_options(model_config) -> HeadOptions:
    """What the architecture does to its logits after the head's matrix product."""
    config = model_config.get_text_config()
    scaling = getattr(config, "logits_scaling", None)
    scale = 1 / scaling if scaling else getattr(config, "logit_scale", None)
    return HeadOptions(logit_scale=scale, softcap=getattr(config, "final_logit_softcapping", None))


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
                                                            output_loading_info=True)
        if missing := found["missing_keys"]:  # transformers would make them up at random
            raise ValueError(f"{len(missing)} tensors are missing, {min(missing)} among them")
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise InputError(f"the model in {directory} can't be loaded: {error}") from error
    except KeyError as error:  # a table of attention classes of its own
        raise InputError(f"the model in {directory} does not use transformers' AttentionInterface ({error}): use "
                         "another one") from error
    return Judge(model.eval(), num_layers).to(device)


def load_sharded_judge(directory: Path, dtype: torch.dtype, device: torch.device, num_layers: int = 0) -> Judge:
    """As `load_judge` with the parameters of the layers that run in FSDP2 shards: its forward is collective.

    All ranks.
    """
    judge = Judge(build_on_meta(load_model_config(directory), dtype), num_layers)
    shard_module(judge, judge.layers, None, device)
    load_shards(judge, directory, device)
    return judge.eval()


def shards_judge(choice: str, directory: Path, dtype: torch.dtype, process: Process) -> bool:
    """What --judge-sharding comes to: `auto` shards a model that would take more than 80 % of one GPU."""
    if choice != "auto" or process.device.type != "cuda" or process.world_size == 1:
        return choice == "on"
    model = build_on_meta(load_model_config(directory), dtype)
    size = sum(parameter.numel() for parameter in model.parameters()) * dtype.itemsize
    return size > 0.8 * torch.cuda.get_device_properties(process.device).total_memory


class Policy(torch.nn.Module):
    """A causal LM whose forward ends in weighted log-ratios.

    The head's weight is read inside this forward, where FSDP2 has gathered it: this module is the FSDP root.
    """

    def __init__(self, model):
        super().__init__()
        self.model = model
        self.options = head_options(model.config)

    def forward(self, batch: PairBatch, terms: tuple[str, ...] = ()) -> tuple[torch.Tensor, ...]:
        """(ratio_S, logps_N) of a batch, followed by the op's `terms` (`twdpo.logratio.TERMS`).

        Only response tokens reach the head.
        """
        # No mask: rows are causal, and padded on the right only or packed (twdpo/rows.py).
        hidden_ND, head = self._states(batch), self.model.get_output_embeddings()
        ratio_S, logps_N, values = weighted_logratio(
            hidden_ND, head.weight, batch.targets_N, batch.ref_logps_N, batch.weights_N, batch.seq_lens_S,
            batch.scale_S, getattr(head, "bias", None), self.options, terms)
        return ratio_S, logps_N, *values.values()

    def _states(self, batch: PairBatch) -> torch.Tensor:
        """Hidden states that predict the response tokens [N, D]."""
        with all_layers_attending(self.model.config), packed(batch.ranges):
            hidden_RTD = self.model.get_decoder()(input_ids=batch.input_ids_RT, position_ids=batch.positions_RT,
                                                  use_cache=False).last_hidden_state
        return hidden_RTD.flatten(0, 1).index_select(0, batch.predict_N)

    def states_and_head(self, batch: PairBatch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """(hidden_ND, head_VD, bias_V) for what `forward` does not do; copies of the head, which outlive its shards.

        Under FSDP2 all ranks.
        """
        head = self.model.get_output_embeddings()
        bias = getattr(head, "bias", None)
        return self._states(batch), head.weight.detach().clone(), None if bias is None else bias.detach().clone()

    def set_requires_gradient_sync(self, on: bool) -> None:
        """FSDP2 replaces this; one process that holds everything has nothing to reduce."""

    def generate(self, **arguments) -> torch.Tensor:
        """transformers' `generate` of the model. Under FSDP2 all ranks."""
        return self.model.generate(**arguments)


@torch.no_grad()
def settle_packing(policy: Policy, packing: str, examples: list[Example], process: Process) -> bool:
    """Whether rows are packed: as --packing says; `auto` compares the log-probs of a few short pairs. All ranks.

    Raises InputError when --packing on changes them.
    """
    if packing == "off" or not examples:
        return False
    few = sorted(examples, key=lambda example: example.longest)[:4]
    micro_batch = MicroBatch(tuple(range(len(few))))
    packed_N, plain_N = (policy(collate(micro_batch, few, list(micro_batch.pairs), packs=packs).to(process.device))[1]
                         for packs in (True, False))
    difference = max(process.gather(((packed_N - plain_N).norm() / plain_N.norm()).item()))  # sync, all ranks
    exact = next(policy.model.parameters()).dtype == torch.float32 and packed_N.device.type == "cpu"
    if difference <= (1e-4 if exact else 2e-2):
        return True
    message = f"packed rows change log-probs by {difference:.2g} (relative) for this model"
    if packing == "on":
        raise InputError(f"--packing on: {message}; use --packing off")
    process.print(f"{message}: plain rows are used")
    return False


def load_policy(directory: Path, compute_dtype: torch.dtype, process: Process, checkpointing: str = "none",
                replicate: int = 1, compile: bool = False) -> Policy:
    """The policy: built without memory, sharded, then each process reads its own shards of the checkpoint. All ranks.

    Parameters are fp32. checkpointing, replicate, compile: as the flags say. Raises InputError for a checkpoint whose
    tensors don't match the architecture.
    """
    policy = build_policy(load_model_config(directory), compute_dtype, process, checkpointing, replicate, compile)
    load_shards(policy, directory, process.device)
    assert all(parameter.dtype == torch.float32 for parameter in policy.parameters())
    return policy


def build_policy(model_config, compute_dtype: torch.dtype, process: Process, checkpointing: str, replicate: int,
                 compile: bool) -> Policy:
    """The sharded policy, still on meta. All ranks."""
    model = build_on_meta(model_config, torch.float32)
    layers = decoder_layers(model)
    if checkpointing != "none":
        enable_checkpointing(model, checkpointing)
    policy = Policy(model)
    shard_module(policy, layers, None if compute_dtype == torch.float32 else compute_dtype, process.device, replicate)
    for name in ("generate", "states_and_head"):
        register_fsdp_forward_method(policy, name)
    if compile:
        for layer in layers:
            layer.compile(dynamic=True)  # rows differ in length
    return policy.train()


def check_architecture(model_config, checkpointing: str) -> None:
    """Raise InputError for a model that can't be built, sharded or checkpointed, before anything is spent on it."""
    model = build_on_meta(model_config, torch.float32)
    decoder_layers(model)
    if checkpointing != "none":
        enable_checkpointing(model, checkpointing)


def build_on_meta(model_config, dtype: torch.dtype):
    """A model without memory and without dropout. Raises InputError.

    dtype: of the parameters; from_config would take the checkpoint's.
    """
    disable_dropout(model_config)
    if getattr(model_config, "quantization_config", None):
        raise InputError(f"{model_config.model_type}: its config holds a quantization_config; use the checkpoint "
                         "before quantisation")
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(model_config, dtype=dtype, attn_implementation=ATTENTION_NAME)
    except KeyError as error:  # a table of attention classes of its own
        raise InputError(f"{model_config.model_type} can't be built from its config with transformers' "
                         f"AttentionInterface (KeyError: {error}): mend the config, or use another model") from error
    except ValueError as error:
        raise InputError(f"{model_config.model_type} is no causal language model ({str(error).splitlines()[0]}): use "
                         "another model") from error
    refuse_converted_checkpoints(model)
    return model


def load_shards(root: Policy | Judge, directory: Path, device: torch.device) -> None:
    """Give a sharded module on meta its memory, and each process its part of the checkpoint. Raises InputError."""
    model = root.model
    root.to_empty(device=device)
    if not isinstance(root, FSDPModule):  # which keeps ties through to_empty
        model.tie_weights()
    state = model.state_dict()
    try:
        read_tensors(model, state, directory)
    except (OSError, ValueError, SafetensorError) as error:
        raise InputError(f"the tensors in {directory} don't match a {model.config.model_type} model: {error}"
                         ) from error
    # to_empty leaves buffers that no checkpoint holds (rotary frequencies) as garbage: compute them, and only them.
    loaded = [*model.parameters(), *(buffer for name, buffer in model.named_buffers() if name in state)]
    for tensor in loaded:
        tensor._is_hf_initialized = True
    model.initialize_weights()


def enable_checkpointing(model, checkpointing: str) -> None:
    """Compute the activations of all layers (`full`) or of every second one (`selective`) again in the backward pass.

    Raises InputError for an architecture that has no such way.
    """
    # transformers 5.23 renamed it.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    try:
        enable({"use_reentrant": False})
    except ValueError as error:
        raise InputError(f"--checkpointing {checkpointing}: {error}") from error
    if checkpointing == "selective":
        for layer in decoder_layers(model)[1::2]:
            layer.gradient_checkpointing = False


def disable_dropout(model_config) -> None:
    """Dropout would make the reference differ from the policy at step 0."""
    config = model_config.get_text_config()
    for name, value in list(vars(config).items()):
        if ("dropout" in name or name.endswith("pdrop")) and isinstance(value, float):
            setattr(config, name, 0.0)


def refuse_converted_checkpoints(model) -> None:
    """Raise InputError for architectures whose checkpoint tensors transformers rearranges while it loads them."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter
    if any(isinstance(item, WeightConverter) for item in get_model_conversion_mapping(model) or []):
        raise InputError(f"{model.config.model_type}: checkpoints of this architecture are rearranged while loading, "
                         "which the sharded loader can't do; use a dense model")


def decoder_layers(model, num_layers: int = 0) -> torch.nn.ModuleList:
    """The decoder's layers, as many as given (0: as its config says). Raises InputError when they can't be found."""
    num_layers = num_layers or model.config.get_text_config().num_hidden_layers
    for module in model.get_decoder().modules():
        if isinstance(module, torch.nn.ModuleList) and len(module) == num_layers:
            return module
    raise InputError(f"{model.config.model_type}: no list of {num_layers} decoder layers to shard")
