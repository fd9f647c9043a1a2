"""Tiny random models of architectures that differ where it matters: windows, softcap, sinks, biases, positions."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

SMALL = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
         "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128, "initializer_range": 0.3,
         "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
MODELS = {
    "llama": {},
    "mistral": {"sliding_window": 7},
    "qwen2": {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1},
    "qwen3": {},
    "gemma2": {"sliding_window": 7, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0,
               "query_pre_attn_scalar": 8},
    "gemma3_text": {"sliding_window": 7, "layer_types": ["sliding_attention", "sliding_attention", "full_attention"]},
    "phi3": {"sliding_window": 7},
    "gpt_neox": {},
    "gpt_oss": {"sliding_window": 7, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
                "num_local_experts": 2, "num_experts_per_tok": 1, "rope_parameters": {"rope_type": "default",
                                                                                      "rope_theta": 1e4}},
    "cohere": {},
    "olmo2": {},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "gpt2": {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 128},
}

IN_ONE_CALL = [name for name in MODELS if name not in ("gemma2", "gpt_oss")]  # whose layers have softcap or sinks


def build(name: str, implementation: str, **changes):
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **(SMALL | MODELS[name] | changes))
    return AutoModelForCausalLM.from_config(config, attn_implementation=implementation).eval()


def build_double(name: str, implementation: str):
    """The same model in fp64, of which a grouped product of experts knows nothing."""
    model = build(name, implementation)
    if name == "gpt_oss":
        model.set_experts_implementation("eager")
    return model.double()


class LookingAheadConfig(LlamaConfig):
    model_type = "looking_ahead"


class LookingAheadLayer(torch.nn.Module):
    """Attention of its own, not transformers' AttentionInterface: given no mask, it attends to what comes after."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.keys = torch.nn.Linear(hidden_size, hidden_size, bias=False)

    def forward(self, hidden_states, *args, **kwargs):
        scores = hidden_states @ self.keys(hidden_states).transpose(1, 2)
        return hidden_states + scores.softmax(dim=-1) @ hidden_states


class LookingAheadForCausalLM(LlamaForCausalLM):
    config_class = LookingAheadConfig

    def __init__(self, config):
        super().__init__(config)
        self.model.layers = torch.nn.ModuleList(LookingAheadLayer(config.hidden_size)
                                                for _ in range(config.num_hidden_layers))


AutoConfig.register("looking_ahead", LookingAheadConfig)
AutoModelForCausalLM.register(LookingAheadConfig, LookingAheadForCausalLM)
MODELS_WITHOUT_THE_INTERFACE = ("looking_ahead", "mamba")  # the latter has no attention at all
