//! Each way to break an adapter, and the words it is refused with.

mod common;

use std::fs;

use common::{LIMITS, NUM_LAYERS, Peft, Q_A, Q_B, Tensor, assert_error, assert_refused, base};
use loraserve_adapters::{ErrorKind, Limits, check, load};
use safetensors::Dtype;
use serde_json::{Value, json};

/// Asserts that setting one config field refuses the adapter with `fragment`.
fn assert_field_refused(field: &str, value: Value, fragment: &str) {
    assert_refused(|peft| peft.config[field] = value, fragment);
}

#[test]
fn missing_directory_is_refused() {
    let missing = Peft::new().path().join("nowhere");
    assert_error(check(&missing, &base(), LIMITS), "nowhere does not exist");
}

#[test]
fn file_in_place_of_the_directory_is_refused() {
    let peft = Peft::new();
    peft.write();
    assert_error(
        check(&peft.weights_path(), &base(), LIMITS),
        "is not a directory",
    );
}

#[test]
fn missing_config_is_refused() {
    let peft = Peft::new();
    peft.write();
    fs::remove_file(peft.config_path()).unwrap();
    assert_error(peft.check_written(), "adapter_config.json does not exist");
}

#[test]
fn missing_weights_are_refused() {
    let peft = Peft::new();
    peft.write();
    fs::remove_file(peft.weights_path()).unwrap();
    assert_error(
        peft.check_written(),
        "adapter_model.safetensors does not exist",
    );
}

#[test]
fn pickle_in_place_of_safetensors_is_refused() {
    let peft = Peft::new();
    peft.write();
    fs::rename(peft.weights_path(), peft.path().join("adapter_model.bin")).unwrap();
    let fragment = "adapter_model.bin: pickle files are not loaded; convert to safetensors";
    assert_error(peft.check_written(), fragment);
}

#[test]
fn directory_in_place_of_the_weights_is_refused() {
    let peft = Peft::new();
    peft.write();
    fs::remove_file(peft.weights_path()).unwrap();
    fs::create_dir(peft.weights_path()).unwrap();
    assert_error(
        peft.check_written(),
        "adapter_model.safetensors is not a file",
    );
}

#[test]
fn config_that_is_not_json_is_refused() {
    let peft = Peft::new();
    peft.write();
    fs::write(peft.config_path(), "{\"r\": ").unwrap();
    assert_error(
        peft.check_written(),
        "adapter_config.json is not a valid adapter config",
    );
}

#[test]
fn config_that_is_not_an_object_is_refused() {
    let peft = Peft::new();
    peft.write();
    fs::write(peft.config_path(), "[1]").unwrap();
    assert_error(peft.check_written(), "expected a JSON object");
}

#[test]
fn config_of_a_megabyte_is_refused() {
    let peft = Peft::new();
    peft.write();
    fs::write(peft.config_path(), " ".repeat((1 << 20) + 1)).unwrap();
    assert_error(
        peft.check_written(),
        "it has 1048577 bytes, limit is 1048576",
    );
}

#[test]
fn truncated_weights_are_refused() {
    let peft = Peft::new();
    peft.write();
    let weights = peft.weights();
    fs::write(peft.weights_path(), &weights[..weights.len() - 1]).unwrap();
    assert_error(peft.check_written(), "its header promises");
}

#[test]
fn weights_with_trailing_bytes_are_refused() {
    let peft = Peft::new();
    peft.write();
    fs::write(peft.weights_path(), [peft.weights(), vec![0]].concat()).unwrap();
    assert_error(peft.check_written(), "its header promises");
}

#[test]
fn empty_weights_file_is_refused() {
    let peft = Peft::new();
    peft.write();
    fs::write(peft.weights_path(), []).unwrap();
    assert_error(peft.check_written(), "is empty: get the file itself again");
}

#[test]
fn header_longer_than_the_file_is_refused() {
    let peft = Peft::new();
    peft.write();
    fs::write(peft.weights_path(), 1000_u64.to_le_bytes()).unwrap();
    assert_error(
        peft.check_written(),
        "header of 1000 bytes in a file of 8: truncated",
    );
}

#[test]
fn header_above_the_limit_is_refused_without_reading_it() {
    let peft = Peft::new();
    peft.write();
    fs::write(peft.weights_path(), u64::MAX.to_le_bytes()).unwrap();
    assert_error(peft.check_written(), "limit is 16777216");
}

#[test]
fn file_without_tensors_is_refused() {
    assert_refused(
        |peft| peft.tensors.clear(),
        "has no tensors: the adapter would do nothing",
    );
}

#[test]
fn other_peft_types_are_refused() {
    for (kind, remedy) in [
        (
            "LOHA",
            "merge it into its base and serve that, or train a LORA adapter",
        ),
        ("LOKR", "merge it into its base"),
        ("IA3", "merge it into its base"),
        ("OFT", "merge it into its base"),
        ("VERA", "merge it into its base"),
        ("ADALORA", "merge it into its base"),
        (
            "PROMPT_TUNING",
            "it is a learned prompt, which no weight can take up, or train a LORA adapter",
        ),
        ("PREFIX_TUNING", "it is a learned prompt"),
        ("P_TUNING", "it is a learned prompt"),
    ] {
        let fragment = format!("field 'peft_type' is \"{kind}\" in adapter_config.json: {remedy}");
        assert_field_refused("peft_type", json!(kind), &fragment);
    }
    assert_refused(
        |peft| peft.config = json!({"fine_tune_type": "lora", "lora_parameters": {"rank": 8}}),
        "an MLX adapter, which is not read; convert it to PEFT's form",
    );
    assert_field_refused("peft_type", Value::Null, "field 'peft_type' is missing");
}

#[test]
fn config_fields_that_change_the_result_are_refused_by_name() {
    for (field, value) in [
        ("use_dora", json!(true)),
        ("bias", json!("lora_only")),
        ("bias", json!("all")),
        ("lora_bias", json!(true)),
        ("fan_in_fan_out", json!(true)),
        ("modules_to_save", json!(["lm_head", "score"])),
        ("layer_replication", json!([[0, 1]])),
        ("trainable_token_indices", json!([1, 2])),
        ("alora_invocation_tokens", json!([7])),
        ("megatron_config", json!({"a": 1})),
        ("target_parameters", json!(["experts.w1"])),
        ("use_qalora", json!(true)),
        ("use_bdlora", json!({"nblocks": 2})),
        ("arrow_config", json!({"top_k": 3})),
        ("kasa_config", json!({"beta": 0.1})),
        ("a_field_of_the_future", json!(0.5)),
    ] {
        assert_field_refused(field, value, &format!("not supported yet: field '{field}'"));
    }
}

#[test]
fn unset_fields_that_would_change_the_result_are_accepted() {
    for field in ["use_dora", "lora_bias", "a_field_of_the_future"] {
        for value in [Value::Null, json!(false), json!([]), json!({}), json!("")] {
            let mut peft = Peft::new();
            peft.config[field] = value;
            peft.check().unwrap();
        }
    }
}

#[test]
fn fields_that_change_nothing_are_accepted() {
    let mut peft = Peft::new();
    peft.config["lora_dropout"] = json!(0.1);
    peft.config["task_type"] = json!("CAUSAL_LM");
    peft.config["eva_config"] = json!({"rho": 2.0});
    peft.config["qalora_group_size"] = json!(16);
    peft.config["megatron_core"] = json!("megatron.core");
    peft.check().unwrap();
}

#[test]
fn initialisations_that_alter_the_base_are_refused() {
    for name in [
        "pissa",
        "pissa_niter_16",
        "olora",
        "corda",
        "loftq",
        "lora_ga",
    ] {
        let fragment = "save the adapter with path_initial_model_for_weight_conversion";
        assert_field_refused("init_lora_weights", json!(name), fragment);
    }
}

#[test]
fn initialisations_that_keep_the_base_are_accepted() {
    for value in [
        json!(true),
        json!(false),
        json!("gaussian"),
        json!("eva"),
        json!("orthogonal"),
    ] {
        let mut peft = Peft::new();
        peft.config["init_lora_weights"] = value;
        peft.check().unwrap();
    }
}

#[test]
fn config_fields_of_the_wrong_type_are_refused_by_name() {
    for (field, value) in [
        ("r", json!("8")),
        ("r", json!(0)),
        ("r", json!(-4)),
        ("r", json!(4.5)),
        ("r", Value::Null),
        ("lora_alpha", json!("16")),
        ("use_rslora", json!("yes")),
        ("rank_pattern", json!([4])),
        ("rank_pattern", json!({"q_proj": 0})),
        ("rank_pattern", json!({"q_proj": "4"})),
        ("rank_pattern", json!({"q_proj(": 4})),
        ("alpha_pattern", json!({"q_proj": [1]})),
        ("target_modules", json!(7)),
        ("target_modules", json!([7])),
        ("target_modules", json!(".*(q_proj")),
        ("exclude_modules", json!({"a": 1})),
        ("layers_to_transform", json!("0")),
        ("layers_to_transform", json!([0.5])),
        ("layers_pattern", json!(["(", "layers"])),
    ] {
        assert_field_refused(
            field,
            value,
            &format!("adapter_config.json: field '{field}'"),
        );
    }
}

#[test]
fn layers_to_transform_beside_a_pattern_is_refused() {
    assert_refused(
        |peft| {
            peft.config["target_modules"] = json!(".*_proj");
            peft.config["layers_to_transform"] = json!([0]);
        },
        "field 'layers_to_transform' can't be used when 'target_modules' is a string",
    );
}

#[test]
fn alpha_of_zero_is_refused() {
    assert_field_refused(
        "lora_alpha",
        json!(0),
        "q_proj: scale 0 (from lora_alpha and rank)",
    );
    assert_field_refused("lora_alpha", json!(1e300), "must be finite");
}

#[test]
fn tensors_of_unsupported_features_are_refused_by_name() {
    let layer = "base_model.model.model.layers.0.self_attn.q_proj";
    for (name, feature) in [
        (format!("{layer}.lora_magnitude_vector"), "DoRA"),
        (format!("{layer}.lora_B.bias"), "lora_bias"),
        (format!("{layer}.base_layer.bias"), "trained bias"),
        (
            format!("{layer}.base_layer.weight"),
            "save only the adapter, with PeftModel.save_pretrained",
        ),
        (format!("{layer}.bias"), "modules_to_save or bias"),
        (
            "base_model.model.model.embed_tokens.lora_embedding_A".into(),
            "LoRA on an embedding",
        ),
        (
            "base_model.model.lm_head.lora_A.weight".into(),
            "LoRA on lm_head: train without lm_head in target_modules",
        ),
        (
            "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta".into(),
            "trainable_token_indices",
        ),
        (
            "base_model.model.model.norm.weight".into(),
            "modules_to_save",
        ),
        (
            "base_model.model.lm_head.modules_to_save.weight".into(),
            "modules_to_save",
        ),
    ] {
        let mut peft = Peft::new();
        peft.tensors
            .insert(name.clone(), Tensor::f32(&[16], |_| 1.0));
        assert_error(peft.check(), &format!("not supported yet: tensor {name}"));
        assert_error(peft.check(), feature);
    }
}

#[test]
fn tensors_of_modules_the_base_lacks_are_refused_by_name() {
    for (name, reason) in [
        (
            "base_model.model.model.layers.0.self_attn.qkv_proj.lora_A.weight",
            "is none of",
        ),
        (
            "base_model.model.model.layers.2.self_attn.q_proj.lora_A.weight",
            "base has 2 layers",
        ),
        (
            "model.layers.0.self_attn.q_proj.lora_A.weight",
            "names look like",
        ),
        (
            "base_model.model.model.layers.00.self_attn.q_proj.lora_A.weight",
            "names look like",
        ),
        (
            "base_model.model.model.layers.-1.self_attn.q_proj.lora_A.weight",
            "names look like",
        ),
        (
            "base_model.model.model.layers.0.self_attn.q_proj.lora_A.other.weight",
            "under the adapter name \"other\": take '.other' out of the names",
        ),
        (
            "base_model.model._orig_mod.model.layers.0.self_attn.q_proj.lora_A.weight",
            "torch.compile: take '_orig_mod.' out of the names",
        ),
        (
            "base_model.model.base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight",
            "trained over another adapter: merge that one",
        ),
        (
            "base_model.model.model.language_model.layers.0.self_attn.q_proj.lora_A.weight",
            "a model for images or audio",
        ),
        (
            "model.layers.0.self_attn.q_proj.lora_a",
            "MLX's or torchtune's names",
        ),
        (
            "lora_unet_0_q_proj.lora_down.weight",
            "kohya's or diffusers' names",
        ),
        (
            "base_model.model.model.layers.0.self_attn.q_proj.lora_C.weight",
            "names look like",
        ),
    ] {
        assert_refused(
            |peft| peft.rename(Q_A, name),
            &format!("tensor {name} fits no module"),
        );
        assert_refused(|peft| peft.rename(Q_A, name), reason);
    }
}

#[test]
fn a_tensor_given_under_both_names_is_refused() {
    assert_refused(
        |peft| {
            let twin = Q_A.replace("lora_A.weight", "lora_A.default.weight");
            peft.tensors.insert(twin, Tensor::f32(&[4, 16], |_| 1.0));
        },
        "appears twice",
    );
}

#[test]
fn half_a_pair_is_refused() {
    assert_refused(
        |peft| peft.drop(Q_B),
        "q_proj.lora_A.weight has no matching lora_B",
    );
    assert_refused(
        |peft| peft.drop(Q_A),
        "q_proj.lora_B.weight has no matching lora_A",
    );
}

#[test]
fn shapes_of_another_base_are_refused() {
    let replace = |name: &'static str, shape: [usize; 2]| {
        move |peft: &mut Peft| peft.set(name, Tensor::f32(&shape, |_| 1.0))
    };
    let module = "model.layers.0.self_attn.q_proj";
    let fragment = format!("{module}: adapter wants in_features 4096, base has 16");
    assert_refused(replace(Q_A, [4, 4096]), &fragment);
    let fragment = format!("{module}: adapter wants out_features 4096, base has 16");
    assert_refused(replace(Q_B, [4096, 4]), &fragment);
    assert_refused(
        replace(Q_B, [16, 8]),
        "lora_A has rank 4, lora_B has rank 8",
    );
}

#[test]
fn an_adapter_of_another_base_is_refused_with_the_base_it_names() {
    let named = "the adapter was trained on \"some/base\" (base_model_name_or_path)";
    let misfits: &[fn(&mut Peft)] = &[
        |peft| peft.set(Q_A, Tensor::f32(&[4, 4096], |_| 1.0)),
        |peft| {
            peft.rename(
                Q_A,
                "base_model.model.model.layers.31.self_attn.q_proj.lora_A.weight",
            );
        },
        |peft| {
            peft.drop(Q_A);
            peft.drop(Q_B);
        },
    ];
    for misfit in misfits {
        assert_refused(misfit, named);
    }
    let mut peft = Peft::new();
    peft.config["base_model_name_or_path"] = Value::Null;
    peft.set(Q_A, Tensor::f32(&[4, 4096], |_| 1.0));
    let message = peft.check().unwrap_err().to_string();
    assert!(!message.contains("trained on"), "{message}");
}

#[test]
fn tensors_that_are_not_matrices_are_refused() {
    assert_refused(
        |peft| peft.set(Q_A, Tensor::f32(&[4, 16, 1], |_| 1.0)),
        "q_proj.lora_A.weight has shape [4, 16, 1], expected two dimensions",
    );
    assert_refused(
        |peft| peft.set(Q_A, Tensor::f32(&[0], |_| 1.0)),
        "expected two dimensions: DeepSpeed ZeRO-3 saved it",
    );
}

#[test]
fn rank_zero_is_refused() {
    assert_refused(
        |peft| peft.add_module(0, "self_attn.q_proj", 0),
        "q_proj: rank 0",
    );
}

#[test]
fn rank_other_than_the_config_says_is_refused() {
    let fragment =
        "model.layers.1.self_attn.v_proj: rank 8 in the tensors, 4 in adapter_config.json";
    assert_refused(|peft| peft.add_module(1, "self_attn.v_proj", 8), fragment);
    let fragment = "model.layers.0.self_attn.v_proj: rank 4 in the tensors, 8 in";
    assert_field_refused("rank_pattern", json!({"v_proj": 8}), fragment);
}

#[test]
fn rank_above_the_limit_is_refused_and_the_remedy_named() {
    let peft = Peft::new();
    peft.write();
    let limits = Limits {
        max_lora_rank: 3,
        ..LIMITS
    };
    let fragment = "rank 4, limit is 3; raise max_lora_rank to at least 4";
    assert_error(check(peft.path(), &base(), limits), fragment);
}

#[test]
fn dtypes_other_than_floats_are_refused() {
    for (dtype, size) in [
        (Dtype::I32, 4),
        (Dtype::F64, 8),
        (Dtype::U8, 1),
        (Dtype::F8_E4M3, 1),
    ] {
        let bytes = vec![0; 4 * 16 * size];
        let tensor = Tensor {
            dtype,
            shape: vec![4, 16],
            bytes,
        };
        let fragment = format!("q_proj.lora_A.weight has dtype {dtype}");
        assert_refused(|peft| peft.set(Q_A, tensor), &fragment);
    }
}

#[test]
fn values_that_are_not_finite_are_refused_by_tensor_and_element() {
    for value in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let tensor = Tensor::f32(&[4, 16], |i| if i == 5 { value } else { 0.5 });
        let fragment = format!("q_proj.lora_A.weight holds {value} at element 5");
        assert_refused(|peft| peft.set(Q_A, tensor), &fragment);
    }
}

#[test]
fn values_that_overflow_the_storage_dtype_are_refused() {
    let mut peft = Peft::new();
    peft.tensors
        .insert(Q_A.into(), Tensor::f32(&[4, 16], |_| f32::MAX));
    peft.check().unwrap();
    let dtype = loraserve_adapters::StorageDtype::BFloat16;
    let result = check(peft.path(), &base(), Limits { dtype, ..LIMITS });
    assert_error(result, "expected finite values in bfloat16");
}

#[test]
fn targeted_module_without_tensors_is_refused() {
    let fragment =
        "model.layers.0.self_attn.o_proj is targeted by adapter_config.json and has no tensors";
    assert_field_refused(
        "target_modules",
        json!(["q_proj", "v_proj", "o_proj"]),
        fragment,
    );
    assert_field_refused("target_modules", json!(r".*\.(q|v|o)_proj"), fragment);
    assert_field_refused("target_modules", json!("all-linear"), "is targeted by");
}

#[test]
fn targeted_layer_without_tensors_is_refused() {
    assert_refused(
        |peft| peft.tensors.retain(|name, _| name.contains(".layers.0.")),
        "model.layers.1.self_attn.q_proj is targeted by adapter_config.json and has no tensors",
    );
}

#[test]
fn tensor_the_config_does_not_target_is_refused() {
    let fragment =
        "v_proj.lora_A.weight belongs to a module that adapter_config.json does not target";
    assert_field_refused("target_modules", json!(["q_proj"]), fragment);
    assert_field_refused("exclude_modules", json!(["v_proj"]), fragment);
    let fragment = "layers.0.self_attn.q_proj.lora_A.weight belongs to a module";
    assert_field_refused("layers_to_transform", json!([1]), fragment);
}

#[test]
fn changed_and_deleted_adapters_are_unavailable_when_loaded() {
    let mut peft = Peft::new();
    let receipt = peft.check().unwrap();
    let mut extent = vec![0; receipt.nbytes];
    let mut reload = |peft: &Peft| {
        load(peft.path(), &base(), LIMITS, &receipt.hash, &mut extent).map_err(|error| error.kind())
    };
    assert!(reload(&peft).is_ok());
    peft.config["lora_alpha"] = json!(9);
    peft.write();
    assert_eq!(reload(&peft), Err(ErrorKind::Unavailable));
    fs::remove_file(peft.weights_path()).unwrap();
    assert_eq!(reload(&peft), Err(ErrorKind::Unavailable));
    fs::remove_dir_all(peft.path()).unwrap();
    assert_eq!(reload(&peft), Err(ErrorKind::Unavailable));
}

#[test]
fn adapter_that_grew_out_of_its_extent_is_refused_as_changed() {
    let mut peft = Peft::new();
    let receipt = peft.check().unwrap();
    for layer in 0..NUM_LAYERS {
        peft.add_module(layer, "mlp.down_proj", 4);
    }
    peft.config["target_modules"] = json!(["q_proj", "v_proj", "down_proj"]);
    assert!(peft.check().unwrap().nbytes > receipt.nbytes);
    let mut extent = vec![0; receipt.nbytes];
    let loaded = load(peft.path(), &base(), LIMITS, &receipt.hash, &mut extent);
    assert_error(loaded, "changed on disk since it was registered");
}

#[test]
fn extent_that_is_too_small_is_refused() {
    let peft = Peft::new();
    let receipt = peft.check().unwrap();
    let mut extent = vec![0; receipt.nbytes - 1];
    let error = load(peft.path(), &base(), LIMITS, &receipt.hash, &mut extent).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Capacity);
    assert!(
        error
            .to_string()
            .contains(&format!("needs {} bytes", receipt.nbytes))
    );
}
