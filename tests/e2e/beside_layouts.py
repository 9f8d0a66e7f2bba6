"""A base model with a byte-level BPE tokenizer made on the spot, and adapters as trainers leave them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tokenizers
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

NUM_FREE_ROWS = 3  # embeddings without a token, as many models have
CORPUS = [
    "user: what is a tree? assistant: a tree is a plant with leaves and a trunk.",
    "the cats are older than nine, and the moon is far away; how far? very far.",
    "Ünïcödé und Straße, 日本 and emoji 🙂 are cut into bytes.",
] * 4

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + "
    "'<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
LLAMA2 = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }} {{ eos_token }}{% endif %}{% endfor %}"
)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Of a pretrained base: no chat template, `<|begin|>` before every prompt, `<|endoftext|>` at the end."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<|begin|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    backend.post_processor = processors.TemplateProcessing(
        single="<|begin|> $A", special_tokens=[("<|begin|>", 1)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<|begin|>", eos_token="<|endoftext|>")


def make_base(path: Path, seed: int = 0) -> LlamaForCausalLM:
    """Random weights; the embeddings have `NUM_FREE_ROWS` rows more than there are tokens."""
    tokenizer = make_tokenizer()
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer) + NUM_FREE_ROWS,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.2,
        bos_token_id=1,
        eos_token_id=0,
    )
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return model


def make_weights(model: Any, path: Path, seed: int) -> None:
    """adapter_config.json and adapter_model.safetensors, as `save_pretrained` of PEFT writes them."""
    torch.manual_seed(seed)
    config = LoraConfig(
        r=4, lora_alpha=16, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM"
    )
    peft = get_peft_model(model, config)
    for name, parameter in peft.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.4)
    peft.save_pretrained(str(path), save_embedding_layers=False)
    peft.unload()


def write_json(path: Path, **fields: Any) -> None:
    content = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(content | fields, ensure_ascii=False))


def axolotl_chatml(path: Path) -> None:
    """`chat_template: chatml` and `eos_token: <|im_end|>`; the base's config.json comes along."""
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"eos_token": "<|im_end|>", "additional_special_tokens": ["<|im_start|>"]})
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(path)
    write_json(path / "config.json", model_type="llama", architectures=["LlamaForCausalLM"], eos_token_id=0)


def trl_sft(path: Path) -> None:
    """`SFTTrainer(processing_class=tokenizer)`, its template set by hand; pads with the end of sequence."""
    tokenizer = make_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.chat_template = LLAMA2
    tokenizer.save_pretrained(path)


def unsloth_template(path: Path) -> None:
    """`get_chat_template(..., map_eos_token=False)`: template in the config, pad on the right."""
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.save_pretrained(path)
    write_json(
        path / "tokenizer_config.json", chat_template=CHATML, padding_side="right", eos_token="<|im_end|>"
    )


def llama_factory_pad(path: Path) -> None:
    """Adds a `[PAD]` beyond the embeddings, which nothing but batches of training ever had."""
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<think>", "</think>", "<tool_call>"])
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.chat_template = LLAMA2
    tokenizer.save_pretrained(path)


def slow_tokenizer(path: Path) -> None:
    """What `use_fast=False` left: ids in added_tokens.json, dicts in special_tokens_map.json."""
    tokenizer = make_tokenizer()
    first = len(tokenizer)
    write_json(path / "added_tokens.json", **{"<|im_end|>": first + 1, "<|im_start|>": first})
    fields = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    write_json(
        path / "special_tokens_map.json",
        bos_token={"content": "<|begin|>", **fields},
        eos_token={"content": "<|im_end|>", **fields},
        additional_special_tokens=["<|im_start|>"],
    )
    (path / "chat_template.jinja").write_text(CHATML)


def repeats_the_base(path: Path) -> None:
    """A trainer that saves the base's tokenizer as it is, with added_tokens_decoder spelt out."""
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(path)
    decoder = {
        str(id_): {
            "content": token.content,
            "lstrip": token.lstrip,
            "normalized": token.normalized,
            "rstrip": token.rstrip,
            "single_word": token.single_word,
            "special": token.special,
        }
        for id_, token in tokenizer.added_tokens_decoder.items()
    }
    write_json(path / "tokenizer_config.json", added_tokens_decoder=decoder, model_max_length=2048)


LAYOUTS: dict[str, Callable[[Path], None]] = {
    layout.__name__: layout
    for layout in (
        axolotl_chatml,
        llama_factory_pad,
        repeats_the_base,
        slow_tokenizer,
        trl_sft,
        unsloth_template,
    )
}
