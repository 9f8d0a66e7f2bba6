"""Fields of OpenAI, vLLM, SGLang, TGI and LoRAX that this server knows and does not have.

A field of `*_NO_EFFECT` can't change an answer. One of `*_NEUTRAL` could, and is taken with the values that
ask for nothing. `*_ELSEWHERE` says what a field of another name is called here.
"""

from __future__ import annotations

from typing import Any

OPENAI_NO_EFFECT = frozenset(
    {
        # what the request is called
        "request_id",
        "rid",
        # of LiteLLM's own
        "max_retries",
        "session_id",
        # how OpenAI runs it
        "prompt_cache_key",
        "prompt_cache_retention",
        # of another library's grammars, of special tokens that are not shown, of chunks of a stream
        "guided_decoding_backend",
        "spaces_between_special_tokens",
        "stream_interval",
        # of vLLM's render routes
        "return_mm_kwargs",
        "return_token_offsets",
    }
)

# Of tools and reasoning, which completions don't have.
COMPLETION_NO_EFFECT = frozenset(
    {"parallel_tool_calls", "include_reasoning", "separate_reasoning", "stream_reasoning", "tool_prompt"}
)
CHAT_NO_EFFECT = frozenset({"stream_reasoning", "tool_prompt"})

OPENAI_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "store": (False,),
    "use_beam_search": (False,),
    "length_penalty": (1.0, 1),
    "early_stopping": (False,),
    "include_stop_str_in_output": (False,),
    "no_stop_trim": (False,),
    "stop_regex": ([],),
    "skip_special_tokens": (True,),
    "truncation_side": ("left",),
    "logprob_token_ids": (),
    "allowed_token_ids": (),
    "bad_words": ([],),
    "logits_processors": ([],),
    "custom_logit_processor": (),
    "custom_params": (),
    "guided_whitespace_pattern": (),
    "structural_tag": (),
    "priority": (0,),
    "watermarking": (False,),
    "repetition_detection": (),
    "return_tokens_as_token_ids": (False,),
    "return_token_ids": (False,),
    "return_prompt_text": (False,),
    "return_hidden_states": (False,),
    "return_routed_experts": (False,),
    "routed_experts_prompt_start": (0,),
    "return_cached_tokens_details": (False,),
    "return_meta_info": (False,),
    "extra_key": (),
    "session_params": (),
    "kv_transfer_params": (),
    "ec_transfer_params": (),
    "vllm_xargs": ({},),
    "bootstrap_host": (),
    "bootstrap_port": (),
    "bootstrap_room": (),
    "data_parallel_rank": (),
}

COMPLETION_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "add_special_tokens": (True,),
    "prompt_embeds": (),
    "thinking_token_budget": (),
}

CHAT_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "modalities": (["text"],),
    "audio": (),
    "web_search_options": (),
    "reasoning": (),
    "separate_reasoning": (True,),
    "verbosity": ("medium",),
    "guideline": (),
    "echo": (False,),
    "add_special_tokens": (False,),
    "media_io_kwargs": ({},),
    "mm_processor_kwargs": ({},),
}

OPENAI_ELSEWHERE = {
    "max_new_tokens": "max_tokens",
    "max_length": "max_tokens",
    "num_predict": "max_tokens",
    "min_new_tokens": "min_tokens",
    "stop_sequences": "stop",
    "repeat_penalty": "repetition_penalty",
    "ignore_eos_token": "ignore_eos",
    "truncate": "truncate_prompt_tokens",
    "top_n_tokens": "logprobs",
    "num_return_sequences": "n",
    "regex": "guided_regex",
    "ebnf": "guided_grammar",
    "grammar": "guided_grammar",
    "json_schema": "guided_json",
    "parameters": "its fields beside it",
    "extra_body": "its fields beside it",
    "sampling_params": "its fields beside it",
}

OPENAI_REASONS = {
    "store": "answers are not kept for later",
    "structural_tag": "guided_grammar takes Lark",
    "allowed_token_ids": "logit_bias of 100 does the same",
    "include_stop_str_in_output": "a stop string is cut from the answer",
    "use_beam_search": "best_of compares sampled answers",
}

POOLING_NO_EFFECT = OPENAI_NO_EFFECT
POOLING_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "add_special_tokens": (True,),
    "priority": (0,),
    "truncation_side": ("left",),
    "activation": (True,),
    "softmax": (True,),
    "embed_dtype": ("float32",),
    "endianness": ("native", "little"),
    "mm_processor_kwargs": ({},),
    "input_type": ("text",),
    "late_chunking": (False,),
    "embedding_type": ("float",),
    "stream": (False,),
}

POOLING_ELSEWHERE = {
    "inputs": "input",
    "prompt": "input",
    "texts": "input",
    "text": "input",
    "output_dimension": "dimensions",
    "normalized": "normalize",
    "truncate": "truncate_prompt_tokens",
    "top_k": "top_n",
    "data_1": "text_1",
    "data_2": "text_2",
    "messages": "input, as text",
}

TGI_NEUTRAL: dict[str, tuple[Any, ...]] = {"watermark": (False,), "apply_chat_template": (False,)}

TGI_ELSEWHERE = {
    "max_tokens": "max_new_tokens",
    "max_completion_tokens": "max_new_tokens",
    "max_length": "max_new_tokens",
    "stop_sequences": "stop",
    "ignore_eos": "ignore_eos_token",
    "truncate_prompt_tokens": "truncate",
    "logprobs": "top_n_tokens",
    "n": "best_of",
    "stream": "stream beside parameters",
}

SELECTORS_ELSEWHERE = dict.fromkeys(
    (
        "adapter_name",
        "adapter_names",
        "adapter_ids",
        "lora_adapter",
        "lora_adapters",
        "lora_id",
        "lora_int_id",
    ),
    "adapter_id",
) | {"loras": "lora", "lora_paths": "lora_path"}
