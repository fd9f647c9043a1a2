"""Building a model from its config alone: without memory or dropout; its layers and its head."""

import copy

import torch
from transformers import AutoModelForCausalLM

from twdpo.config import InputError
from twdpo.logratio import HeadOptions, check_head_cache
from twdpo.models.attention import ATTENTION_NAME


def head_options(model_config) -> HeadOptions:
    """What the architecture does to its logits after the head's matrix product."""
    config = model_config.get_text_config()
    scaling = getattr(config, "logits_scaling", None)
    scale = 1 / scaling if scaling else getattr(config, "logit_scale", None)
    return HeadOptions(logit_scale=scale, softcap=getattr(config, "final_logit_softcapping", None))


def check_architecture(model_config, checkpointing: str, head_cache_gib: float = 0.0) -> None:
    """Raise InputError for a model that can't be built, sharded or checkpointed, before anything is spent on it."""
    model = build_on_meta(model_config, torch.float32)
    decoder_layers(model)
    if checkpointing != "none":
        enable_checkpointing(model, checkpointing)
    try:
        check_head_cache(head_cache_gib, head_options(model_config))
    except ValueError as error:
        raise InputError(f"--head-cache-gib: {error}") from error


def build_on_meta(model_config, dtype: torch.dtype):
    """A model without memory and without dropout. Raises InputError.

    dtype: of the parameters; from_config would take the checkpoint's.
    """
    model_config = copy.deepcopy(model_config)  # which a model keeps, and writes into
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
