"""Variables of this server and of other launchers: each counts, is noted, or is refused."""

from typing import Any

import pytest
from loraserve.settings.environment import read_environment, variable_names
from loraserve.settings.errors import ConfigError
from loraserve.settings.foreign import FOREIGN_SETTINGS, TGI_AND_LORAX
from loraserve.settings.keys import api_keys
from loraserve.settings.load import load_settings
from loraserve.settings.schema import ServeSettings

# Every argument with a variable of text-generation-launcher (3.3) and lorax-launcher (0.12).
LAUNCHER_ARGUMENTS = """
    adapter_cycle_time_s adapter_id adapter_memory_fraction adapter_source api_key backend
    chunked_prefill compile compile_batch_size compile_max_batch_size compile_max_rank
    cors_allow_credentials cors_allow_header cors_allow_method cors_allow_origin cors_expose_header
    cuda_graphs cuda_memory_fraction default_adapter_source disable_custom_kernels
    disable_grammar_support disable_sgmv download_only dtype eager eager_prefill embedding_dim
    enable_prefill_logprobs graceful_termination_timeout hostname huggingface_hub_cache json_output
    kv_cache_dtype lora_adapters master_addr master_port max_active_adapters max_batch_prefill_tokens
    max_batch_size max_batch_total_tokens max_best_of max_client_batch_size max_concurrent_requests
    max_input_length max_input_tokens max_stop_sequences max_top_n_tokens max_total_tokens
    max_waiting_tokens memory_wiggle_room merge_adapter_weights model_id ngrok ngrok_authtoken
    ngrok_edge num_shard otlp_endpoint otlp_service_name payload_limit port predibase_api_token
    prefix_caching preloaded_adapter_ids preloaded_adapter_source prometheus_port quantize revision
    rope_factor rope_scaling shard_uds_path sharded source speculate speculation_max_batch_size
    speculative_tokens tokenizer_config_path trust_remote_code usage_stats validation_workers
    waiting_served_ratio watermark_delta watermark_gamma weights_cache_override
""".split()  # noqa: SIM905
READ_BY_THE_HUB = {"huggingface_hub_cache"}


def settings_of(environ: dict[str, str]) -> ServeSettings:
    return load_settings({"model": "m"}, environ).settings


def test_every_variable_of_tgi_and_lorax_is_known() -> None:
    own = {name for field in ServeSettings.model_fields for name in variable_names(field)}
    foreign = {setting.variable for setting in TGI_AND_LORAX if setting.is_variable}
    unknown = {name for name in LAUNCHER_ARGUMENTS if name.upper() not in own | foreign}
    assert unknown == READ_BY_THE_HUB


def test_no_name_has_two_meanings() -> None:
    flags = [
        flag for setting in FOREIGN_SETTINGS if setting.is_flag for flag in (setting.flag, *setting.short)
    ]
    assert len(flags) == len(set(flags))
    variables = [setting.variable for setting in FOREIGN_SETTINGS if setting.is_variable]
    assert len(variables) == len(set(variables))


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({"PORT": "80"}, {"http_port": 80}),
        ({"SPECULATE": "3"}, {"speculate": "ngram"}),
        ({"SPECULATE": "0"}, {"speculate": "off"}),
        ({"SPECULATE": "ngram"}, {"speculate": "ngram"}),
        ({"HOSTNAME": "0.0.0.0"}, {"host": "0.0.0.0"}),
        ({"HOSTNAME": "::"}, {"host": "::"}),
        ({"HOSTNAME": "3f2a9b1c"}, {"host": "127.0.0.1"}),
        ({"HOSTNAME": "::", "LORASERVE_HOST": "::1"}, {"host": "::1"}),
        ({"MAX_TOTAL_TOKENS": "512"}, {"max_model_len": 512}),
        ({"MAX_INPUT_TOKENS": "500"}, {"max_input_tokens": 500}),
        ({"MAX_INPUT_LENGTH": "500"}, {"max_input_tokens": 500}),
        ({"MAX_BATCH_PREFILL_TOKENS": "64"}, {"max_prefill_tokens": 64}),
        ({"MAX_BATCH_SIZE": "4"}, {"max_num_seqs": 4}),
        ({"MAX_CONCURRENT_REQUESTS": "9"}, {"max_concurrent_requests": 9}),
        ({"MAX_BEST_OF": "3"}, {"max_best_of": 3}),
        ({"MAX_STOP_SEQUENCES": "3"}, {"max_stop_sequences": 3}),
        ({"MAX_TOP_N_TOKENS": "3"}, {"max_top_n_tokens": 3}),
        ({"MAX_CLIENT_BATCH_SIZE": "3"}, {"max_client_batch_size": 3}),
        ({"PAYLOAD_LIMIT": "1000"}, {"max_body_size": 1000}),
        ({"GRACEFUL_TERMINATION_TIMEOUT": "90"}, {"drain_seconds": 90.0}),
        ({"CORS_ALLOW_ORIGIN": "https://a.example"}, {"cors_origin": ("https://a.example",)}),
        ({"LORASERVE_CORS_ORIGIN": '["https://a", "*"]'}, {"cors_origin": ("https://a", "*")}),
        ({"DTYPE": "float16"}, {"dtype": "float16"}),
        ({"REVISION": "v1"}, {"revision": "v1"}),
        ({"PREFIX_CACHING": "0"}, {"prefix_caching": False}),
        ({"PREFIX_CACHING": "true"}, {"prefix_caching": True}),
        ({"CUDA_MEMORY_FRACTION": "0.75"}, {"gpu_memory_utilization": 0.75}),
        ({"CUDA_GRAPHS": "0"}, {"cuda_graphs": False}),
        ({"CUDA_GRAPHS": "1,2,4"}, {"cuda_graphs": True}),
        ({"JSON_OUTPUT": "true"}, {"log_format": "json"}),
        ({"JSON_OUTPUT": "false"}, {"log_format": "text"}),
        ({"LOG_FORMAT": "JSON"}, {"log_format": "json"}),
        ({"LOG_LEVEL": "WARN"}, {"log_level": "warning"}),
        ({"LOG_LEVEL": "info,text_generation_router=debug"}, {"log_level": "info"}),
        ({"LOG_LEVEL": "info", "LORASERVE_LOG_LEVEL": "error"}, {"log_level": "error"}),
        ({"OTLP_ENDPOINT": "http://x"}, {"otlp_endpoint": "http://x"}),
        ({"NUM_SHARD": "2"}, {"tensor_parallel_size": 2}),
        ({"NUM_SHARD": "1", "SHARDED": "false", "USAGE_STATS": "off", "NGROK": "false"}, {}),
        ({"MERGE_ADAPTER_WEIGHTS": "0", "DISABLE_GRAMMAR_SUPPORT": "", "SOURCE": "hub"}, {}),
    ],
)
def test_a_variable_means_what_it_means_there(environ: dict[str, str], expected: dict[str, Any]) -> None:
    loaded = load_settings({"model": "m"}, environ)
    assert {name: getattr(loaded.settings, name) for name in expected} == expected
    assert not any("no effect" in note for note in loaded.notes)


@pytest.mark.parametrize("variable", ["API_KEY", "VLLM_API_KEY", "LORASERVE_API_KEY"])
def test_a_key_is_a_key_whoever_names_it(variable: str) -> None:
    """A server that passed over it would be open to everybody."""
    settings = settings_of({variable: "secret"})
    assert [key.secret for key in api_keys(settings)] == ["secret"]


def test_adapters_of_all_variables_are_served() -> None:
    environ = {"LORA_ADAPTERS": "a=/a", "PRELOADED_ADAPTER_IDS": "org/b@v1"}
    adapters = settings_of(environ).adapters
    assert {name: str(adapter.adapter_source()) for name, adapter in adapters.items()} == {
        "a": "/a",
        "org-b": "org/b@v1",
    }
    assert [adapter.warm for adapter in adapters.values()] == [False, True]


@pytest.mark.parametrize(
    ("environ", "error"),
    [
        ({"PORT": "http"}, "PORT: .*got 'http'"),
        ({"PORT": "99999"}, "PORT: .*got '99999'"),
        ({"QUANTIZE": "eetq"}, "QUANTIZE: quantization is 'eetq', it must be one of auto, none, int8"),
        ({"NUM_SHARD": "many"}, "NUM_SHARD"),
        ({"SHARDED": "maybe"}, "SHARDED is 'maybe'"),
        ({"KV_CACHE_DTYPE": "fp8_e5m2"}, "KV_CACHE_DTYPE is"),
        ({"ROPE_SCALING": "dynamic"}, "ROPE_SCALING is 'dynamic': write it into the model's config.json"),
        ({"ROPE_FACTOR": "2"}, "ROPE_FACTOR is '2': write it into"),
        ({"ADAPTER_ID": "org/a"}, "ADAPTER_ID is 'org/a': no adapter applies to all requests"),
        ({"MERGE_ADAPTER_WEIGHTS": "true"}, "MERGE_ADAPTER_WEIGHTS is 'true'"),
        ({"ADAPTER_SOURCE": "s3"}, "ADAPTER_SOURCE: .*write .name. once"),
        ({"WEIGHTS_CACHE_OVERRIDE": "/w"}, "WEIGHTS_CACHE_OVERRIDE is '/w': give the directory as MODEL"),
        ({"TOKENIZER_CONFIG_PATH": "/t"}, "TOKENIZER_CONFIG_PATH is '/t'"),
        ({"DISABLE_GRAMMAR_SUPPORT": "1"}, "DISABLE_GRAMMAR_SUPPORT is 'true'"),
        ({"NGROK": "true"}, "NGROK is 'true'"),
        ({"DOWNLOAD_ONLY": "true"}, "DOWNLOAD_ONLY is 'true'"),
        ({"DTYPE": "int8"}, "DTYPE: .*got 'int8'"),
        ({"LOG_LEVEL": "loud"}, "LOG_LEVEL: .*got 'loud'"),
        (
            {"LORASERVE_HTTP_PROT": "1"},
            "'LORASERVE_HTTP_PROT' is no setting, did you mean LORASERVE_HTTP_PORT?",
        ),
        (
            {"LORASERVE_PORT": "1"},
            "'LORASERVE_PORT' is no setting, did you mean LORASERVE_HTTP_PORT",
        ),
        ({"LORASERVE_ADMINKEY": "x"}, "did you mean LORASERVE_ADMIN_KEY?"),
        ({"LORASERVE_XYZZY": "x", "LORASERVE_MODLE": "y"}, "LORASERVE_MODLE.*LORASERVE_XYZZY"),
        ({"LORASERVE_KEYS": "x"}, "LORASERVE_KEYS"),
    ],
)
def test_what_is_not_so_here_is_refused_by_name(environ: dict[str, str], error: str) -> None:
    with pytest.raises(ConfigError, match=error):
        settings_of(environ)


@pytest.mark.parametrize(
    "environ",
    [
        {"LORASERVE_CPU_ISA": "avx2", "LORASERVE_CACHE_DIR": "/c", "LORASERVE_SCHEMATHESIS_CASES": "9"},
        {"LORASERVE_TEST_CUDA_EMULATOR": "/e", "LORASERVE_TEST_NVRTC": "/n", "LORASERVE_BENCH_JSON": "/b"},
        {
            "LORASERVE_SERVICE_HOST": "10.0.0.1",
            "LORASERVE_SERVICE_PORT": "80",
            "LORASERVE_PORT": "tcp://10.0.0.1:80",
        },
        {"LORASERVE_PORT_80_TCP": "tcp://10.0.0.1:80", "LORASERVE_PORT_80_TCP_ADDR": "10.0.0.1"},
        {"LORASERVE_HTTP_PORT": "tcp://10.0.0.1:80", "LORASERVE_HTTP_SERVICE_PORT_WEB": "80"},
    ],
)
def test_variables_of_the_kernels_of_tests_and_of_kubernetes_are_left_alone(environ: dict[str, str]) -> None:
    assert settings_of(environ) == settings_of({})


def test_a_variable_that_holds_a_key_may_be_called_anything() -> None:
    keys = [{"name": "a", "secret_env": "LORASERVE_SALES"}]
    assert load_settings({"model": "m", "keys": keys}, {"LORASERVE_SALES": "s"})


@pytest.mark.parametrize("setting", [s for s in FOREIGN_SETTINGS if s.accepted is None and s.is_variable])
def test_what_has_no_effect_is_noted(setting: Any) -> None:
    value = "true" if setting.metavar == "" else "7"
    found, notes = read_environment({setting.variable: value})
    assert found == {}
    assert notes == [f"{setting.variable} has no effect here: {setting.text}"]


def test_which_variables_count_is_told_but_not_what_they_hold() -> None:
    loaded = load_settings({"model": "m"}, {"PORT": "80", "API_KEY": "hush"})
    assert loaded.variables == ("API_KEY", "PORT")
