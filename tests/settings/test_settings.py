"""Settings of a server: their layers, their files, Baseten's block, keys, and what is wrong with them."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from loraserve.errors import LoraserveError
from loraserve.settings.entries import AdapterSettings, ApiKey
from loraserve.settings.errors import ConfigError
from loraserve.settings.keys import api_keys, fair_by, prefix_cache_scope
from loraserve.settings.load import load_settings
from loraserve.settings.schema import ServeSettings

FULL = """
model: ./models/llama
served_model_name: [llama, default]
adapters:
  sql: adapters/sql
  chat:
    repo: org/chat
    revision: main
    warm: true
    pin: true
    weight: 2
    manifest: {description: talks, stop: ["\\n"]}
  gone: {path: ../elsewhere}
http_port: 9000
grpc_port: off
keys:
  - name: sales
    secret_env: SALES_KEY
    adapters: ["sql*"]
    requests_per_minute: 60
    max_concurrent: 4
    tokens_per_minute: 5000
    weight: 0.5
  - {name: root, secret_file: root.key, admin: true}
adapter_root: adapters
tls_certificate: tls/server.pem
tls_key: /etc/tls/server.key
"""


def write(folder: Path, text: str, name: str = "loraserve.yaml") -> Path:
    file = folder / name
    file.write_text(text)
    return file


def settings_of(text: str, folder: Path, **environ: str) -> ServeSettings:
    return load_settings({}, environ, write(folder, text)).settings


def test_a_file_says_everything_and_its_paths_are_relative_to_it(tmp_path: Path) -> None:
    (tmp_path / "adapters/sql").mkdir(parents=True)
    settings = settings_of(FULL, tmp_path)
    assert settings.model == str(tmp_path / "models/llama")
    assert settings.served_names == ("llama", "default")
    assert (settings.http_port, settings.grpc_port) == (9000, None)
    assert settings.adapters["sql"].path == str(tmp_path / "adapters/sql")
    assert settings.adapters["gone"].path == str(tmp_path / "../elsewhere")
    assert settings.adapters["chat"] == AdapterSettings(
        repo="org/chat",
        revision="main",
        warm=True,
        pin=True,
        weight=2.0,
        manifest={"description": "talks", "stop": ["\n"]},
    )
    assert settings.adapter_root == (str(tmp_path / "adapters"),)
    assert settings.tls_certificate == tmp_path / "tls/server.pem"
    assert settings.tls_key == Path("/etc/tls/server.key")


@pytest.mark.parametrize(
    ("file", "environ", "flags", "expected"),
    [
        ("", {}, {}, 1024),
        ("max_waiting: 1", {}, {}, 1),
        ("max_waiting: 1", {"LORASERVE_MAX_WAITING": "2"}, {}, 2),
        ("max_waiting: 1", {"LORASERVE_MAX_WAITING": "2"}, {"max_waiting": 3}, 3),
        ("max_waiting: 1", {"LORASERVE_MAX_WAITING": ""}, {}, 1),
    ],
)
def test_flags_win_over_variables_over_the_file(
    tmp_path: Path, file: str, environ: dict[str, str], flags: dict[str, Any], expected: int
) -> None:
    path = write(tmp_path, f"model: m\n{file}")
    assert load_settings(flags, environ, path).settings.max_waiting == expected


def test_adapters_of_all_layers_are_served_together(tmp_path: Path) -> None:
    path = write(tmp_path, "model: m\nadapters: {a: /file/a, b: /file/b, c: /file/c}")
    environ = {"LORA_ADAPTERS": "b=/env/b,d=org/d@main", "LORASERVE_CONFIG": str(path)}
    settings = load_settings({"adapters": {"c": "/flag/c"}}, environ).settings
    assert {name: str(adapter.adapter_source()) for name, adapter in settings.adapters.items()} == {
        "a": "/file/a",
        "b": "/env/b",
        "c": "/flag/c",
        "d": "org/d@main",
    }


def test_names_of_the_model_have_commas_or_flags_between() -> None:
    for given in ("a, b", ["a,b"], ["a", "b"], ("a", "b,")):
        settings = load_settings({"model": "m", "served_model_name": given}, {}).settings
        assert settings.served_model_name == ("a", "b")


def test_every_setting_can_be_a_variable() -> None:
    values = {
        "model": "m",
        "adapters": "a=/x",
        "merge": "a",
        "served_model_name": "one, two",
        "http_port": "off",
        "grpc_port": "0",
        "prefix_caching": "false",
        "gpu_memory_utilization": "0.7",
        "cuda_graphs": "no",
        "open_metrics": "yes",
        "trust_request_chat_template": "no",
        "threads": "3",
        "tensor_parallel_size": "2",
        "memory": "1GiB",
        "drain_seconds": "1.5",
        "dtype": "float32",
        "quantization": "int8",
        "adapter_dtype": "int8",
        "adapter_source": "s3://bucket/{name}",
        "device": "cpu",
        "speculate": "ngram",
        "fair_by": "off",
        "tool_parser": "hermes",
        "reasoning_parser": "none",
        "on_adapter_error": "skip",
        "log_level": "debug",
        "log_format": "json",
        "host": "::1",
        "api_key": "k1",
        "admin_key": "k2",
        "tls_certificate": "c",
        "tls_key": "k",
        "tls_client_ca": "a",
        "hub_repo": "org/*,other/*",
        "cors_origin": "https://a.example,http://localhost:3000",
        "prefix_cache_scope": "key",
    }
    numbers = {
        name: "7" for name, field in ServeSettings.model_fields.items() if field.json_schema_extra is not None
    } | values
    environ = {f"LORASERVE_{name.upper()}": value for name, value in numbers.items()}
    settings = load_settings({}, environ).settings
    assert settings.served_model_name == ("one", "two")
    assert (settings.http_port, settings.grpc_port) == (None, 0)
    assert (settings.prefix_caching, settings.open_metrics, settings.threads) == (False, True, 3)
    assert settings.hub_repo == ("org/*", "other/*")
    given = set(settings.model_fields_set)
    assert given == set(ServeSettings.model_fields) - {"keys"}


WRONG_FILES = [
    ("", "expected settings as `name: value`"),
    ("- a", "expected settings"),
    ("1: 2", "expected settings"),
    ("model: [", "is not YAML"),
    ("model: !!python/object/apply:os.system [true]", "is not YAML"),
    ("model: m\nmodel: n", "'model' is given twice"),
    ("model: m\nadapters: {a: /x, a: /y}", "'a' is given twice"),
    ("http_port: 1", "model is missing"),
    ("model: m\nhttp_prot: 1", "http_prot is no setting, did you mean http_port?"),
    ("model: m\nhttp_port: 70000", "http_port: .*less than or equal to 65535, got 70000"),
    ("model: m\nhttp_port: -1", "http_port: .*got -1"),
    ("model: m\nhttp_port: many", "http_port: .*got 'many'"),
    ("model: m\nhttp_port: off\ngrpc_port: off", "both off, serve at least one API"),
    ("model: m\nhttp_port: yes", "http_port: give a number, not yes"),
    ("model: m\ngrpc_port: on", "grpc_port: give a number, not yes"),
    ("model: m\nhttp_port: 8000.5", "http_port: give an integer, not 8000.5"),
    ("model: m\nhttp_port: 8000.0", "http_port: give an integer, not 8000.0"),
    ("model: m\nmemory: yes", "memory: give a number, not yes"),
    ("model: m\nmemory: 1.5", "memory: give an integer, not 1.5"),
    ("model: m\nthreads: no", "threads: give a number, not no"),
    ("model: m\nthreads: 1000000", "threads: .*less than or equal to 1024, got 1000000"),
    ("model: m\nmax_num_seqs: 100000000", "max_num_seqs: .*less than or equal to 65536"),
    ("model: m\nmax_batched_tokens: 99999999", "max_batched_tokens: .*less than or equal to 1048576"),
    ("model: m\nmax_prefill_tokens: 99999999", "max_prefill_tokens: .*less than or equal to 1048576"),
    ("model: m\nmax_waiting: 99999999999", "max_waiting: .*less than or equal to 2147483647"),
    ("model: m\nmax_model_len: 99999999999", "max_model_len: .*less than or equal to 2147483647"),
    ("model: m\nmax_best_of: 129", "max_best_of: .*less than or equal to 128"),
    ("model: m\nmax_stop_sequences: 17", "max_stop_sequences: .*less than or equal to 16"),
    ("model: m\nmax_top_n_tokens: 21", "max_top_n_tokens: .*less than or equal to 20"),
    ("model: m\ndrain_seconds: 1.0e+30", "drain_seconds: .*less than or equal to"),
    ("model: m\ndrain_seconds: yes", "drain_seconds: give a number, not yes"),
    ("model: m\nprefix_caching: 1", "prefix_caching: give yes or no, not 1"),
    ("model: m\nadapters: {a: {path: x, pin: 2}}", "adapters.a.pin: give yes or no, not 2"),
    ("model: m\nkeys: [{name: a, secret: s, admin: 1}]", "keys.0.admin: give yes or no, not 1"),
    ("model: m\nkeys: [{name: a, secret: s, max_concurrent: on}]", "max_concurrent: give a number"),
    ("model: m\nkeys: [{name: a, secret: s, requests_per_minute: on}]", "per_minute: give a number"),
    ("model: m\ndtype: int4", "dtype: .*got 'int4'"),
    ("model: m\ndrain_seconds: .nan", "drain_seconds"),
    ("model: m\ndrain_seconds: -1", "drain_seconds"),
    ("model: m\nrequest_timeout_seconds: 0", "request_timeout_seconds"),
    ("model: m\ncors_origin: app.example", "cors_origin: 'app.example' is no origin, write it as https://"),
    ("model: m\ncors_origin: https://app.example/", "cors_origin: .* is no origin"),
    ("model: m\ncors_origin: [https://a.example, null]", "cors_origin"),
    ("model: m\nadapters: [a]", "adapters"),
    ("model: m\nadapters: {a/b: /x}", "'a/b' is not allowed"),
    ("model: m\nadapters: {a: {}}", "adapters.a: give exactly one of path, repo and url"),
    ("model: m\nadapters: {a: {path: x, repo: y}}", "give exactly one of path, repo and url"),
    ("model: m\nadapters: {a: {path: x, revision: y}}", "neither a revision"),
    ("model: m\nadapters: {a: {repo: x, source: S3}}", "adapters.a.source"),
    ("model: m\nadapters: {a: {repo: x, rank: 3}}", "adapters.a.rank is no setting"),
    ("model: m\nserved_model_name: a\nadapters: {a: /x}", "'a' is the base model's already"),
    ("model: m\nadapters: {m: /x}", "'m' is the base model's already"),
    ("model: m\nadapters: {'m:x': /x}", "'m:x' means adapter 'x' of base model 'm' already"),
    ("model: org/m\nadapters: {org-m: /x}", "'org-m' is the base model's already"),
    ("model: m\nserved_model_name: [a, a]", "the base model is named 'a' twice"),
    ("model: m\nserved_model_name: [a, '']", "a name of the base model is empty"),
    ("model: m\nserved_model_name: [a, 'a:x']", "'a:x' means adapter 'x' of base model 'a' already"),
    ("model: m\ntls_key: k", "give both tls_certificate and tls_key"),
    ("model: m\ntls_client_ca: k", "tls_client_ca needs"),
    ("model: m\nkeys: [{secret: s}]", "keys.0.name is missing"),
    ("model: m\nkeys: [{name: a}]", "give exactly one of secret, secret_env and secret_file"),
    ("model: m\nkeys: [{name: a, secret: s, secret_env: S}]", "give exactly one"),
    ("model: m\nkeys: [{name: a, secret: s, requests_per_minute: 0}]", "requests_per_minute"),
    ("model: m\nkeys: [{name: a, secret: s, tokens_per_minute: 0}]", "tokens_per_minute"),
    ("model: m\nkeys: [{name: a, secret: s, weight: 0}]", "weight"),
    ("model: m\nadapters: {a: {path: p, weight: 21}}", "weight"),
    ("model: m\nfair_by: tenant", "fair_by"),
    ("model: m\nkeys: [{name: a, secret: s, max_concurrent: 0}]", "max_concurrent"),
    ("model: m\nkeys: [{name: a, secret: s, admn: true}]", "admn is no setting"),
]


@pytest.mark.parametrize(("text", "error"), WRONG_FILES)
def test_a_wrong_file_is_one_error_that_names_file_and_key(tmp_path: Path, text: str, error: str) -> None:
    with pytest.raises(ConfigError, match=error) as caught:
        settings_of(text, tmp_path)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named() -> None:
    with pytest.raises(ConfigError, match=r"/no/such.yaml can't be read: No such file"):
        load_settings({}, {}, Path("/no/such.yaml"))


@pytest.mark.parametrize(
    ("flags", "environ", "error"),
    [
        ({"model": "m", "http_port": 70000}, {}, "^--http-port: .*got 70000"),
        ({"model": "m"}, {"LORASERVE_MAX_WAITING": "x"}, "^LORASERVE_MAX_WAITING: .*got 'x'"),
        ({}, {"MODEL_ID": "m", "LORASERVE_DTYPE": "int4"}, "^LORASERVE_DTYPE: "),
        ({"model": "m"}, {"LORA_ADAPTERS": "a=b=c"}, "'a=b=c' is not id"),
    ],
)
def test_an_error_names_the_flag_or_the_variable(
    flags: dict[str, Any], environ: dict[str, str], error: str
) -> None:
    with pytest.raises(LoraserveError, match=error):
        load_settings(flags, environ)


BASETEN = """
model_name: Qwen
resources: {accelerator: L4}
trt_llm:
  build:
    base_model: decoder
    checkpoint_repository: {source: HF, repo: Qwen/Qwen2.5-Coder-1.5B, revision: v1}
    max_seq_len: 4096
    plugin_configuration: {paged_kv_cache: true}
    lora_adapters:
      lora1: {repo: org/one, revision: abc, source: HF}
      lora2: {repo: org/two}
    lora_configuration: {max_lora_rank: 16, lora_target_modules: [attn_q]}
  runtime: {served_model_name: Qwen2.5-Coder-base, enable_chunked_context: true}
http_port: 80
"""


def test_basetens_block_says_the_same_as_settings(tmp_path: Path) -> None:
    loaded = load_settings({}, {}, write(tmp_path, BASETEN))
    settings = loaded.settings
    assert (settings.model, settings.revision) == ("Qwen/Qwen2.5-Coder-1.5B", "v1")
    assert settings.served_names == ("Qwen2.5-Coder-base",)
    assert (settings.max_lora_rank, settings.max_model_len, settings.http_port) == (16, 4096, 80)
    sources = {name: str(adapter.adapter_source()) for name, adapter in settings.adapters.items()}
    assert sources == {"lora1": "org/one@abc", "lora2": "org/two"}
    assert loaded.notes == (
        "trt_llm.build.plugin_configuration has no effect here",
        "trt_llm.runtime.enable_chunked_context has no effect here",
        "model_name has no effect here",
        "resources has no effect here",
    )


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("trt_llm: 3", "trt_llm: "),
        ("trt_llm: {}", "build is missing"),
        ("trt_llm: {build: {lora_adapters: {a: {}}}}", "build.lora_adapters.a.repo is missing"),
        (
            "trt_llm: {build: {lora_adapters: {a: {repo: x, source: S3}}}}",
            "lora_adapters.a.source is 'S3', only HF is supported",
        ),
        ("trt_llm: {build: {quantization_type: fp8}}", "quantization_type is 'fp8'"),
        ("trt_llm: {build: {lora_adapters: {a b: {repo: x}}}}\nmodel: m", "'a b' is not allowed"),
        ("trt_llm: {build: {}}", "model is missing"),
        (
            "trt_llm: {build: {lora_adaptors: {}}}",
            "build.lora_adaptors is no setting, did you mean lora_adapters",
        ),
        (
            "trt_llm: {build: {checkpoint_repository: {repo: x, revison: y}}}",
            "revison is no setting, did you",
        ),
        ("trt_llm: {build: {lora_adapters: {a: {repo: x, reviison: y}}}}", "a.reviison is no setting"),
        ("trt_llm: {build: {lora_configuration: {max_rank: 8}}}", "did you mean max_lora_rank"),
        ("trt_llm: {build: {}}\nmodel: m\nmemroy: 1GiB", "memroy is no setting, did you mean memory"),
    ],
)
def test_a_block_that_asks_for_more_is_refused(tmp_path: Path, text: str, error: str) -> None:
    with pytest.raises(ConfigError, match=error):
        settings_of(text, tmp_path)


def test_keys_come_from_files_variables_and_flags(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SALES_KEY", "secret-1")
    (tmp_path / "root.key").write_text("secret-2\n")
    keys_file = write(
        tmp_path,
        "keys:\n- {name: lab, secret_file: lab.key, adapters: 'a,b', base_model: false}",
        "keys.yaml",
    )
    (tmp_path / "lab.key").write_text("secret-3")
    environ = {
        "LORASERVE_KEYS_FILE": str(keys_file),
        "LORASERVE_API_KEY": "secret-4",
        "LORASERVE_ADMIN_KEY": "secret-5",
    }
    settings = settings_of(FULL, tmp_path, **environ)
    assert api_keys(settings) == [
        ApiKey(
            name="sales",
            secret="secret-1",
            adapters=("sql*",),
            requests_per_minute=60,
            max_concurrent=4,
            tokens_per_minute=5000,
            weight=0.5,
        ),
        ApiKey(name="root", secret="secret-2", is_admin=True),
        ApiKey(name="lab", secret="secret-3", adapters=("a", "b"), base_model=False),
        ApiKey(name="api_key", secret="secret-4"),
        ApiKey(name="admin_key", secret="secret-5", is_admin=True),
    ]
    assert "secret-" not in repr(settings)


@pytest.mark.parametrize(
    ("keys", "error"),
    [
        ("[{name: a, secret_env: NO_SUCH_VARIABLE}]", "the variable NO_SUCH_VARIABLE is not set"),
        ("[{name: a, secret_file: none}]", "none can't be read"),
        ("[{name: a, secret: ''}]", "one or more visible ASCII characters"),
        ("[{name: a, secret: hush hush}]", "one or more visible ASCII characters"),
        ("[{name: a, secret: hüsh}]", "one or more visible ASCII characters"),
        ("[{name: a, secret: hush1}, {name: a, secret: hush2}]", "two keys are named 'a'"),
        ("[{name: a, secret: hush}, {name: b, secret: hush}]", "'a' and 'b' have the same secret"),
        ("{a: hush}", "keys"),
        ("[{name: a, secret: [hush]}]", "secret"),
    ],
)
def test_wrong_keys_are_errors_that_do_not_tell_them(tmp_path: Path, keys: str, error: str) -> None:
    path = write(tmp_path, keys, "keys.yaml")
    with pytest.raises(ConfigError, match=error) as caught:
        api_keys(load_settings({"model": "m", "keys_file": path}, {}).settings)
    assert "hush" not in str(caught.value)


@pytest.mark.parametrize(
    ("values", "scope"),
    [
        ({}, "shared"),
        ({"prefix_cache_scope": "shared"}, "shared"),
        ({"api_key": "k"}, "key"),
        ({"admin_key": "k"}, "key"),
        ({"api_key": "k", "prefix_cache_scope": "key"}, "key"),
        ({"api_key": "k", "prefix_cache_scope": "shared"}, "shared"),
    ],
)
def test_cached_prompts_are_a_keys_own_unless_they_are_said_to_be_shared(
    values: dict[str, Any], scope: str
) -> None:
    settings = load_settings({"model": "m", **values}, {}).settings
    assert prefix_cache_scope(settings, api_keys(settings)) == scope


def test_cached_prompts_of_each_key_without_keys_are_an_error() -> None:
    settings = load_settings({"model": "m", "prefix_cache_scope": "key"}, {}).settings
    with pytest.raises(ConfigError, match="prefix_cache_scope is key, but no keys are configured"):
        prefix_cache_scope(settings, api_keys(settings))


def test_the_engine_is_told_what_the_base_model_is_called() -> None:
    from loraserve.server.assembly import engine_config  # noqa: PLC0415 (imports grpc)

    for names, expected in (("", ("m",)), ("one, two", ("one", "two"))):
        settings = load_settings({"model": "m", "served_model_name": names}, {}).settings
        assert engine_config(settings).base_names == expected


def test_settings_of_the_engine_are_those_of_its_config() -> None:
    """A setting whose default differs from the engine's own would surprise."""
    from loraserve.config import EngineConfig  # noqa: PLC0415

    defaults = {field.name: field.default for field in dataclasses.fields(EngineConfig)}
    shared = defaults.keys() & ServeSettings.model_fields.keys() - {"model", "adapters"}
    assert {name: ServeSettings.model_fields[name].default for name in shared} == {
        name: defaults[name] for name in shared
    }
    assert len(shared) >= 9


@pytest.mark.parametrize(
    ("text", "has_keys", "by"),
    [
        ("", True, "key"),
        ("", False, "adapter"),
        ("fair_by: key+adapter", True, "key+adapter"),
        ("fair_by: adapter", True, "adapter"),
        ("fair_by: off", True, "off"),
        ("fair_by: 'off'", False, "off"),
    ],
)
def test_keys_have_equal_shares_and_adapters_where_there_are_none(
    tmp_path: Path, text: str, has_keys: bool, by: str
) -> None:
    keys = [ApiKey(name="a", secret="s")] if has_keys else []
    assert fair_by(settings_of(f"model: m\n{text}", tmp_path), keys) == by


@pytest.mark.parametrize("by", ["key", "key+adapter"])
def test_without_keys_none_can_have_a_share(tmp_path: Path, by: str) -> None:
    with pytest.raises(ConfigError, match=f"fair_by is {by.replace('+', '.')}, but no keys"):
        fair_by(settings_of(f"model: m\nfair_by: {by}", tmp_path), [])
