"""Chat templates of the kinds that models have, and tokenizers that know their marks or do not."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers_of_tests import TEXT
from transformers import PreTrainedTokenizerFast

LOOP = "{% for m in messages %}"
TEMPLATES = {
    "llama3": LOOP + "{{ bos_token if loop.first }}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
              "{{ m.content | trim }}<|eot_id|>{% endfor %}"
              "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}",
    "qwen2.5": "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are helpful.<|im_end|>\n{% endif %}" + LOOP
               + "<|im_start|>{{ m.role }}\n{{ m.content }}{% for c in m.tool_calls or [] %}"
               "{{ '\n' if m.content or not loop.first }}<tool_call>\n{{ {'name': c.function.name, 'arguments': "
               "c.function.arguments} | tojson }}\n</tool_call>{% endfor %}<|im_end|>\n{% endfor %}"
               "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "qwen3": "{% set last = namespace(user=0) %}{% for m in messages %}{% if m.role == 'user' %}"
             "{% set last.user = loop.index0 %}{% endif %}{% endfor %}" + LOOP + "<|im_start|>{{ m.role }}\n"
             "{% if m.role == 'assistant' %}{% set parts = m.content.split('</think>') %}"
             "{% set thought = parts[0].rstrip('\n').split('<think>')[-1].lstrip('\n') if parts | length > 1 else '' %}"
             "{% set said = parts[-1].lstrip('\n') if parts | length > 1 else m.content %}"
             "{% if loop.index0 > last.user %}<think>\n{{ thought.strip('\n') }}\n</think>\n\n{{ said.lstrip('\n') }}"
             "{% else %}{{ said }}{% endif %}{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
             "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "gemma": "{{ bos_token }}" + LOOP + "{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
             "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<end_of_turn>\n"
             "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}",
    "phi3": LOOP + "<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
            "{{ '<|assistant|>\n' if add_generation_prompt else eos_token }}",
    "mistral": "{{ bos_token }}" + LOOP + "{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
               "{% elif m.role == 'assistant' %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}",
    "zephyr": LOOP + "<|{{ m.role }}|>\n{{ m.content }}{{ eos_token }}\n{% endfor %}"
              "{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
    "chatml": LOOP + "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
              "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "alpaca": LOOP + "{% if m.role == 'user' %}### Instruction:\n{{ m.content }}\n\n{% elif m.role == 'assistant' %}"
              "### Response:\n{{ m.content }}\n\n{% else %}{{ m.content }}\n\n{% endif %}{% endfor %}"
              "{% if add_generation_prompt %}### Response:\n{% endif %}",
    "opened": LOOP + "{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant: <think>"
              "{% endif %}",
}
MARKS = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|im_start|>", "<|im_end|>", "<start_of_turn>",
         "<end_of_turn>", "<|end|>", "<|assistant|>", "<|user|>", "<|system|>", "[INST]", "[/INST]"]


def byte_tokenizer(template: str, knows_marks: bool) -> PreTrainedTokenizerFast:
    """Byte-level BPE in which `.<` and the like are one token; the marks are special tokens or plain text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    text = [*TEXT, "Sure.<|im", "yes.<end", "no!<|e", "Answer: <think>\n", "well.\n\n### Instruction:"] * 4
    trainer = trainers.BpeTrainer(vocab_size=440, special_tokens=["<|bos|>", "<|eos|>"],
                                  initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False)
    tokenizer.train_from_iterator(text, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<|bos|>", eos_token="<|eos|>",
                                   additional_special_tokens=MARKS if knows_marks else [], chat_template=template)
