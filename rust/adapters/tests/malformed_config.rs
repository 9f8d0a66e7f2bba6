//! Each field of `adapter_config.json` that can't be served, and the words it is refused with.

mod common;

use common::{Peft, assert_field_refused, assert_refused};
use serde_json::{Value, json};

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
        ("bias", json!("some")),
        ("bias", json!(true)),
        ("fan_in_fan_out", json!(true)),
        ("modules_to_save", json!(["lm_head", "qa_outputs"])),
        ("layer_replication", json!([[0, 1]])),
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
fn invocation_tokens_that_are_none_are_refused() {
    let field = "alora_invocation_tokens";
    assert_field_refused(
        field,
        json!("<|run|>"),
        "expected an integer or a list of integers",
    );
    assert_field_refused(
        field,
        json!([1.5]),
        "expected an integer or a list of integers",
    );
    assert_field_refused(field, json!([7, -1]), "has -1, which is no token id");
    assert_field_refused(
        field,
        json!([1_u64 << 40]),
        "has 1099511627776, which is no token id",
    );
    assert_field_refused(
        field,
        json!(vec![7; 1025]),
        "has 1025 tokens, limit is 1024",
    );
}

#[test]
fn what_peft_can_not_combine_is_refused() {
    assert_refused(
        |peft| {
            peft.config["use_dora"] = json!(true);
            peft.config["lora_bias"] = json!(true);
        },
        "field 'lora_bias' is true in adapter_config.json: PEFT knows no lora_bias with use_dora",
    );
}

#[test]
fn invocation_tokens_are_part_of_what_an_adapter_is() {
    let receipt_with = |tokens: Value| {
        let mut peft = Peft::new();
        peft.config["alora_invocation_tokens"] = tokens;
        peft.check().unwrap()
    };
    let plain = receipt_with(Value::Null);
    assert_eq!(receipt_with(json!([])).hash, plain.hash);
    let (invoked, other) = (receipt_with(json!([7, 8])), receipt_with(json!([7, 9])));
    assert_eq!(invoked.invocation_tokens, [7, 8]);
    assert_eq!(
        invoked.notes,
        ["aLoRA: acts from the last place in the prompt where tokens 7, 8 are"]
    );
    assert!(invoked.hash != plain.hash && invoked.hash != other.hash);
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
    let field = "init_lora_weights";
    for name in ["pissa", "pissa_niter_16", "OLoRA", "olora", "corda"] {
        let fragment = "save it with model.save_pretrained(DIRECTORY, path_initial_model_for_weight_conversion=";
        assert_field_refused(field, json!(name), fragment);
    }
    assert_field_refused(
        field,
        json!("loftq"),
        ".merge_and_unload().save_pretrained(",
    );
    assert_refused(
        |peft| {
            peft.config[field] = json!("pissa");
            peft.config["use_rslora"] = json!(true);
            peft.config["alpha_pattern"] = json!({"q_proj": 4});
        },
        ".merge_and_unload().save_pretrained(",
    );
    for value in [json!("EVA"), json!("telepathy"), json!(3), json!(["eva"])] {
        assert_field_refused(field, value, "which is no initialisation known here");
    }
}

#[test]
fn an_initialisation_that_peft_loads_onto_the_unaltered_base_is_served_so_and_told() {
    let mut peft = Peft::new();
    let plain = peft.check().unwrap();
    peft.config["init_lora_weights"] = json!("lora_ga");
    let receipt = peft.check().unwrap();
    assert_eq!(receipt.hash, plain.hash);
    assert!(
        receipt.notes[0].starts_with("init_lora_weights: trained as \"lora_ga\" against altered")
    );
}

#[test]
fn initialisations_that_keep_the_base_are_accepted() {
    for value in [
        json!(true),
        json!(false),
        json!("gaussian"),
        json!("Gaussian"),
        json!("mica"),
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
        ("use_dora", json!(1)),
        ("lora_bias", json!("all")),
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
