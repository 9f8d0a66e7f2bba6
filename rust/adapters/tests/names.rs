//! Names that trainers leave: read as PEFT's where only one reading is possible, and said in the receipt.

mod common;

use common::{Peft, Q_A, Q_B, Tensor, assert_error};
use safetensors::Dtype;
use serde_json::{Value, json};

const PLAIN: &str = "base_model.model.model.layers.";

type Rename = Box<dyn Fn(&str) -> String>;

/// `Peft::new`, its names changed.
fn renamed(rename: impl Fn(&str) -> String) -> Peft {
    let mut peft = Peft::new();
    let tensors = std::mem::take(&mut peft.tensors).into_iter();
    peft.tensors = tensors
        .map(|(name, tensor)| (rename(&name), tensor))
        .collect();
    peft
}

/// `Peft::new`, the beginning of its names changed.
fn rooted(root: &str) -> Peft {
    renamed(|name| name.replace(PLAIN, &format!("{root}layers.")))
}

fn alpha(value: f32) -> Tensor {
    Tensor::f32(&[], |_| value)
}

fn assert_served_as_plain(peft: &Peft, notes: &[&str]) {
    let plain = Peft::new().check().expect("the plain adapter is served");
    let receipt = peft.check().expect("the adapter is served");
    assert_eq!(receipt.hash, plain.hash);
    assert_eq!(receipt.notes, notes);
    assert!(plain.notes.is_empty());
}

#[test]
fn wrappers_are_taken_out_of_names() {
    let cases: &[(&str, &[&str])] = &[
        (
            "_orig_mod.base_model.model.model.",
            &["names: '_orig_mod.' taken out of 8 names"],
        ),
        (
            "base_model.model._orig_mod.model.",
            &["names: '_orig_mod.' taken out of 8 names"],
        ),
        (
            "module.base_model.model.model.",
            &["names: 'module.' taken out of 8 names"],
        ),
        (
            "_fsdp_wrapped_module.base_model.model.model._fsdp_wrapped_module.",
            &["names: '_fsdp_wrapped_module.' taken out of 16 names"],
        ),
        ("model.", &["names: 'base_model.model.' put before 8 names"]),
        (
            "_orig_mod.model.",
            &[
                "names: '_orig_mod.' taken out of 8 names",
                "names: 'base_model.model.' put before 8 names",
            ],
        ),
    ];
    for (root, notes) in cases {
        assert_served_as_plain(&rooted(root), notes);
    }
    let inside = |name: &str| name.replace("self_attn.", "_fsdp_wrapped_module.self_attn.");
    let inside = renamed(inside);
    assert_served_as_plain(
        &inside,
        &["names: '_fsdp_wrapped_module.' taken out of 8 names"],
    );
}

#[test]
fn language_models_inside_others_are_found() {
    for root in [
        "model.language_model.",
        "language_model.model.",
        "language_model.",
        "",
    ] {
        let peft = rooted(&format!("base_model.model.{root}"));
        let note = format!("names: '{root}layers.' read as 'model.layers.'");
        assert_served_as_plain(&peft, &[&note]);
    }
}

#[test]
fn an_adapters_own_name_is_taken_out() {
    let named = renamed(|name| name.replace(".weight", ".mine.weight"));
    assert_served_as_plain(
        &named,
        &["names: saved under the adapter name \"mine\", which is taken out"],
    );
    assert_served_as_plain(
        &renamed(|name| name.replace(".weight", ".default.weight")),
        &[],
    );
    let partly =
        renamed(|name| name.replace("q_proj.lora_A.weight", "q_proj.lora_A.default.weight"));
    assert_served_as_plain(&partly, &[]);
}

#[test]
fn names_that_leave_a_choice_are_refused() {
    let cases: Vec<(Rename, &str)> = vec![
        (
            Box::new(|name| match name {
                Q_A | Q_B => name.replace(".weight", ".a.weight"),
                name => name.replace(".weight", ".b.weight"),
            }),
            "are of two adapters, in one file",
        ),
        (
            Box::new(|name| match name {
                Q_A | Q_B => name.replace(".weight", ".a.weight"),
                name => name.into(),
            }),
            "are of two adapters, in one file",
        ),
        (
            Box::new(|name| name.replace("layers.1", "language_model.layers.1")),
            "are of two models, in one file",
        ),
        (
            Box::new(|name| name.replace("base_model.model.model.layers.1", "model.layers.1")),
            "are with and without 'base_model.model.', in one file",
        ),
    ];
    for (rename, fragment) in cases {
        assert_error(renamed(rename).check(), fragment);
    }
    for twin in [
        Q_A.replace("lora_A.weight", "lora_A.default.weight"),
        Q_A.replace("layers.0", "_orig_mod.layers.0"),
        Q_A.replace("lora_A", "lora_down"),
    ] {
        let mut peft = Peft::new();
        peft.set(&twin, Tensor::f32(&[4, 16], |_| 1.0));
        assert_error(peft.check(), &format!("{twin} "));
        assert_error(peft.check(), "are the same one");
    }
}

#[test]
fn patterns_are_matched_against_the_path_that_was_trained() {
    let rank_of_one = |root: &str, fields: Value| {
        let mut peft = rooted(&format!("base_model.model.{root}"));
        for (field, value) in fields.as_object().expect("an object") {
            peft.config[field] = value.clone();
        }
        peft.check()
    };
    let fields =
        json!({"target_modules": r"model\.language_model\.layers\.\d+\.self_attn\.[qv]_proj"});
    rank_of_one("model.language_model.", fields.clone()).unwrap();
    assert_error(
        rank_of_one("language_model.model.", fields),
        "does not target",
    );
    // Written for the plain model, and saved under other names.
    let fields = json!({"target_modules": r"model\.layers\.\d+\.self_attn\.[qv]_proj"});
    rank_of_one("model.language_model.", fields.clone()).unwrap();
    rank_of_one("_orig_mod.model.", fields).unwrap();
    let fields = json!({"target_modules": r"_orig_mod\.model\.layers\.\d+\.self_attn\.[qv]_proj"});
    rank_of_one("_orig_mod.model.", fields).unwrap();

    let scaled = |root: &str, pattern: &str| {
        rank_of_one(root, json!({"alpha_pattern": {pattern: 16}}))
            .unwrap()
            .hash
    };
    let plain = Peft::new().check().unwrap().hash;
    let anchored = "^model.language_model.layers.0.self_attn.q_proj";
    assert_ne!(scaled("model.language_model.", anchored), plain);
    assert_eq!(scaled("model.", anchored), plain);
    let unwrapped = "^model.layers.0.self_attn.q_proj";
    assert_eq!(scaled("model.language_model.", unwrapped), plain);
    assert_eq!(
        scaled("_orig_mod.model.", unwrapped),
        scaled("model.", unwrapped)
    );
}

#[test]
fn down_and_up_are_scaled_by_their_alphas() {
    let mut peft = renamed(|name| {
        name.replace("lora_A", "lora_down")
            .replace("lora_B", "lora_up")
    });
    let note = "names: lora_down and lora_up read as lora_A and lora_B in 8 names";
    assert_served_as_plain(&peft, &[note]);
    peft.config.as_object_mut().unwrap().remove("lora_alpha");
    assert_error(peft.check(), "field 'lora_alpha' is missing");
    for layer in 0..2 {
        for module in ["q_proj", "v_proj"] {
            peft.set(
                &format!("{PLAIN}{layer}.self_attn.{module}.alpha"),
                alpha(8.0),
            );
        }
    }
    assert_served_as_plain(&peft, &[note, "alpha: given by 4 tensors"]);
    let name = format!("{PLAIN}0.self_attn.q_proj.alpha");
    peft.set(&name, alpha(4.0));
    assert_ne!(
        peft.check().unwrap().hash,
        Peft::new().check().unwrap().hash
    );
    peft.config["lora_alpha"] = json!(8);
    assert_error(
        peft.check(),
        &format!("tensor {name} says alpha 4, adapter_config.json 8"),
    );
    peft.set(&name, Tensor::f32(&[2], |_| 8.0));
    assert_error(peft.check(), "its shape is [2], expected one number");
    let bytes = vec![0; 4];
    peft.set(
        &name,
        Tensor {
            dtype: Dtype::I32,
            shape: vec![],
            bytes,
        },
    );
    assert_error(peft.check(), "its dtype is I32, expected a float");
    peft.set(&name, alpha(f32::NAN));
    assert_error(peft.check(), "says alpha NaN");
    peft.config.as_object_mut().unwrap().remove("lora_alpha");
    assert_error(peft.check(), "must be finite and not 0");
    peft.set(&name, alpha(8.0));
    peft.set(&format!("{PLAIN}0.self_attn.o_proj.alpha"), alpha(8.0));
    assert_error(peft.check(), "its module has no other tensors");
}
