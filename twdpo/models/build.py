"""Building a model from its config alone: without memory or dropout; its layers and its head."""

import copy
from functools import cache

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from transformers import AutoModelForCausalLM

from twdpo.flags import InputError
from twdpo.logratio import HeadOptions, check_head_cache
from twdpo.models.attention import ATTENTION_NAME
from twdpo.models.varlen import takes_grouped_heads

_aten = torch.ops.aten
ATTENTION_OPERATIONS = (  # of twdpo.models.attention on all devices: what a fused kernel does in one go
    torch.ops.torch_attn._varlen_attn.default, _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_efficient_attention.default, _aten._scaled_dot_product_flash_attention_for_cpu.default)


def head_options(model_config) -> HeadOptions:
    """What the architecture does to its logits after the head's matrix product."""
    config = model_config.get_text_config()
    scaling = getattr(config, "logits_scaling", None)
    scale = 1 / scaling if scaling else getattr(config, "logit_scale", None)
    return HeadOptions(logit_scale=scale, softcap=getattr(config, "final_logit_softcapping", None))


def check_architecture(model_config, head_cache_gib: float = 0.0) -> None:
    """Raise InputError for a model that can't be built or sharded, before anything is spent on it."""
    decoder_layers(build_on_meta(model_config, torch.float32))
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
            model = AutoModelForCausalLM.from_config(model_config, dtype=dtype, attn_implementation=ATTENTION_NAME,
                                                     trust_remote_code=False)
    except KeyError as error:  # a table of attention classes of its own
        raise InputError(f"{model_config.model_type} can't be built from its config with transformers' "
                         f"AttentionInterface (KeyError: {error}): mend the config, or use another model") from error
    except ValueError as error:
        raise InputError(f"{model_config.model_type} is no causal language model ({str(error).splitlines()[0]}): use "
                         "another model") from error
    refuse_converted_checkpoints(model)
    return model


def enable_checkpointing(layers, checkpointing: str) -> None:
    """Compute the activations of all layers (`full`), of all but their attention's outputs (`attention`) or of every
    second layer (`selective`) again in the backward pass, for `none` of none.

    Not by transformers' own way, which torch.compile can't follow: where it finds a checkpoint around what it must
    leave alone (attention), it gives up the layer without a word. Here what is compiled lies inside.
    """
    options = {"context_fn": keep_attention} if checkpointing == "attention" else {}

    def recompute(layer, forward) -> None:
        def checkpointed(*args, **kwargs):
            if not (layer.training and torch.is_grad_enabled()):
                return forward(*args, **kwargs)
            # Without dropout there is no random state to restore.
            return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **options, **kwargs)
        layer.forward = checkpointed
    for layer in {"none": (), "selective": layers[::2]}.get(checkpointing, layers):
        recompute(layer, layer.forward)


def compile_layers(layers) -> None:
    """torch.compile each layer's forward; FSDP2's hooks stay outside."""
    for layer in layers:
        layer.forward = torch.compile(layer.forward, dynamic=True)  # rows differ in length


def keep_attention():
    """What torch's checkpoint asks for: contexts of a forward and of its repetition, which takes what these operations
    gave from the first."""
    return create_selective_checkpoint_contexts(list(ATTENTION_OPERATIONS))


def disable_dropout(model_config) -> None:
    """Dropout would make the reference differ from the policy at step 0."""
    config = model_config.get_text_config()
    for name, value in list(vars(config).items()):
        if ("dropout" in name or name.endswith("pdrop")) and isinstance(value, float):
            setattr(config, name, 0.0)


def suit_device(model, device: torch.device) -> None:
    """What makes a model fast on a GPU, before its first forward."""
    if device.type == "cuda":
        use_fused_norms(model)
        takes_grouped_heads(device)  # sync; never within a step, nor within a layer that is computed again


def use_fused_norms(model) -> None:
    """Put torch's RMS norm, on a GPU one kernel, in the place of those of the model that compute the same in ten: more
    than half of the bytes that a layer of Llama-3-8B moves beside its matrix products (counted). Parameters and names
    stay."""
    for parent in list(model.modules()):
        for name, module in list(parent.named_children()):
            if is_rms_norm(type(module)):
                norm = torch.nn.RMSNorm(module.weight.shape, eps=module.variance_epsilon, device="meta")
                norm.weight = module.weight
                setattr(parent, name, norm.train(module.training))


@cache
def is_rms_norm(kind: type) -> bool:
    """Whether modules of this class of transformers compute what torch's RMS norm does: tried on a few numbers.
    (Gemma's multiply by 1 + weight.)"""
    if not kind.__name__.endswith("RMSNorm") or kind is torch.nn.RMSNorm:
        return False
    with torch.no_grad(), torch.device("cpu"):
        try:
            module = kind(8, eps=1e-3)
            module.weight.copy_(torch.linspace(-1, 2, 8))
            epsilon, numbers = module.variance_epsilon, torch.linspace(-0.1, 0.2, 24).sin().view(3, 8)
            found = module(numbers)
        except (AttributeError, TypeError):  # built or named in another way
            return False
        return torch.allclose(found, F.rms_norm(numbers, (8,), module.weight, epsilon), rtol=1e-4, atol=1e-6)


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
