//! Each way for the tensors to be wrong, and the words they are refused with.

mod common;

use common::{
    LIMITS, Peft, Q_A, Q_B, Tensor, assert_error, assert_field_refused, assert_refused, base,
};
use loraserve_adapters::{Limits, check};
use safetensors::Dtype;
use serde_json::{Value, json};

#[test]
fn tensors_of_unsupported_features_are_refused_by_name() {
    let layer = "base_model.model.model.layers.0.self_attn.q_proj";
    for (name, feature) in [
        (
            format!("{layer}.base_layer.weight"),
            "save only the adapter, with PeftModel.save_pretrained",
        ),
        (
            "base_model.model.model.norm.bias".into(),
            "modules_to_save or bias",
        ),
        (
            "base_model.model.lm_head.bias".into(),
            "modules_to_save or bias",
        ),
        (
            "base_model.model.model.embed_tokens.lora_magnitude_vector".into(),
            "DoRA on embed_tokens",
        ),
        (
            "base_model.model.lm_head.lora_B.bias".into(),
            "DoRA or lora_bias on lm_head: train without lm_head in target_modules",
        ),
        (
            "base_model.model.model.norm.token_adapter.trainable_tokens_delta".into(),
            "trained tokens of another module",
        ),
        (
            "base_model.model.model.layers.0.self_attn.q_norm.weight".into(),
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
            "base_model.model.model.layers.00.self_attn.q_proj.lora_A.weight",
            "names look like",
        ),
        (
            "base_model.model.model.layers.-1.self_attn.q_proj.lora_A.weight",
            "names look like",
        ),
        (
            "base_model.model.base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight",
            "trained over another adapter: merge that one",
        ),
        (
            "base_model.model.model.visual.layers.0.self_attn.q_proj.lora_A.weight",
            "a model for images",
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
