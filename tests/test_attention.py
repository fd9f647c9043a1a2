"""The captured attention row equals the map of an eager model, on architectures that differ where it matters."""

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from twdpo.attention import ATTENTION_NAME, attention_rows, parse_layers
from twdpo.config import InputError
from twdpo.logratio import logits_of
from twdpo.model import head_options

SMALL = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
         "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128, "initializer_range": 0.3,
         "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
MODELS = {
    "llama": {},
    "mistral": {"sliding_window": 7},
    "qwen2": {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1},
    "gemma2": {"sliding_window": 7, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0,
               "query_pre_attn_scalar": 8},
    "gpt_neox": {},
}


def build(name: str, implementation: str):
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **(SMALL | MODELS[name]))
    return AutoModelForCausalLM.from_config(config, attn_implementation=implementation).eval()


def sequences() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(3, 97, length) for length in (20, 11, 5)]


@pytest.mark.parametrize("eager", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_rows_and_logits_equal_those_of_separate_eager_forwards(name, eager):
    model, plain = build(name, ATTENTION_NAME), build(name, "eager")

    def head_logits(hidden_ND):
        head = model.get_output_embeddings()
        return logits_of(hidden_ND, head.weight, getattr(head, "bias", None), head_options(model.config))

    rows, logits = attention_rows(model, head_logits, sequences(), [0, 1, 2], eager)
    assert rows.shape == (3, 3, 20) and rows.dtype == torch.float32
    for place, ids in enumerate(sequences()):
        with torch.no_grad():
            output = plain(torch.from_numpy(ids)[None], output_attentions=True)
        for layer in range(3):
            expected = output.attentions[layer][0, :, -1].mean(dim=0)
            torch.testing.assert_close(rows[place, layer, :len(ids)], expected, atol=1e-6, rtol=0)
            assert (rows[place, layer, len(ids):] == 0).all()
            assert rows[place, layer].sum().item() == pytest.approx(1, abs=1e-5)
        torch.testing.assert_close(logits[place], output.logits[0, -1].float(), atol=2e-4, rtol=1e-4)


def test_windows_and_softcap_matter_in_these_models():
    """The cases above would prove little if the window or the softcap changed nothing."""
    rows = {}
    for window in (7, 64):
        config = AutoConfig.for_model("mistral", **(SMALL | {"sliding_window": window}))
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, attn_implementation=ATTENTION_NAME).eval()
        rows[window], _ = attention_rows(model, lambda hidden: hidden, sequences(), [2])
    assert (rows[7][0, 0, :13] == 0).all() and (rows[64][0, 0, :13] > 0).all()


def test_an_architecture_without_the_interface_is_a_clear_error():
    config = AutoConfig.for_model("bloom", vocab_size=97, hidden_size=32, n_layer=2, n_head=4)
    model = AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(InputError, match="bloom: the attention of layer 2 can't be reached"):
        attention_rows(model, lambda hidden: hidden, sequences(), [1])


def test_layers_are_one_based():
    assert parse_layers("last", 32) == [31] and parse_layers("all", 3) == [0, 1, 2]
    assert parse_layers("32,1,8,8", 32) == [0, 7, 31]
    for bad in ("0", "33", "one", "1,,2", ""):
        with pytest.raises(InputError, match="--layers"):
            parse_layers(bad, 32)
