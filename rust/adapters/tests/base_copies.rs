//! Copies of the base's embeddings in an adapter's file: left out, or refused where they differ.

mod common;

use std::path::Path;

use common::{LIMITS, Peft, Tensor, assert_error, base};
use half::bf16;
use loraserve_adapters::{
    BaseWeights, Limits, Pace, Place, Receipt, Result, StorageDtype, StoredWeight, check_paced,
    digest, load,
};
use safetensors::Dtype;
use serde_json::json;

const EMBED: &str = "base_model.model.model.embed_tokens.weight";
const HEAD: &str = "base_model.model.lm_head.weight";
/// More than the bytes compared at a time.
const SHAPE: [usize; 2] = [40_000, 16];

fn value(index: usize) -> f32 {
    (index % 251) as f32 / 64.0 - 1.0
}

/// A base whose embeddings hold `value`, stored as `dtype`.
struct Base(StorageDtype);

impl BaseWeights for Base {
    fn stored(&self, _module: &str) -> std::result::Result<StoredWeight, String> {
        let values = (0..SHAPE[0] * SHAPE[1]).map(value);
        let bytes: Vec<u8> = match self.0 {
            StorageDtype::Float32 => values.flat_map(f32::to_le_bytes).collect(),
            _ => values
                .flat_map(|value| bf16::from_f32(value).to_le_bytes())
                .collect(),
        };
        Ok(StoredWeight {
            shape: SHAPE,
            digest: digest(&bytes),
        })
    }
}

fn check(path: &Path, dtype: StorageDtype) -> Result<Receipt> {
    let limits = Limits { dtype, ..LIMITS };
    check_paced(
        Place::Directory(path),
        &base(),
        limits,
        Some(&Base(dtype)),
        &Pace::default(),
    )
}

fn with_copies(names: &[&str]) -> Peft {
    let mut peft = Peft::new();
    for name in names {
        peft.set(name, Tensor::f32(&SHAPE, value));
    }
    peft.write();
    peft
}

#[test]
fn copies_of_the_base_cost_nothing_and_change_nothing() {
    let plain = with_copies(&[]);
    let plain = check(plain.path(), StorageDtype::Float32).unwrap();
    let peft = with_copies(&[EMBED, HEAD]);
    let receipt = check(peft.path(), StorageDtype::Float32).unwrap();
    assert_eq!(receipt.base_copies, ["embed_tokens", "lm_head"]);
    let same = Receipt {
        base_copies: vec![],
        directory: plain.directory.clone(),
        ..receipt.clone()
    };
    assert_eq!(same, plain);
    let mut extent = vec![1; receipt.nbytes];
    load(peft.path(), &base(), LIMITS, &receipt.hash, &mut extent).unwrap();
}

#[test]
fn copies_are_compared_as_they_are_stored() {
    let mut peft = Peft::new();
    let bytes = |value: f32| bf16::from_f32(value).to_le_bytes();
    let bytes = (0..SHAPE[0] * SHAPE[1])
        .flat_map(|index| bytes(value(index)))
        .collect();
    peft.set(
        HEAD,
        Tensor {
            dtype: Dtype::BF16,
            shape: SHAPE.to_vec(),
            bytes,
        },
    );
    peft.write();
    check(peft.path(), StorageDtype::BFloat16).unwrap();
    let peft = with_copies(&[HEAD]);
    check(peft.path(), StorageDtype::BFloat16).unwrap();
}

#[test]
fn a_copy_that_differs_is_refused() {
    let last = SHAPE[0] * SHAPE[1] - 1;
    let nudged = |index| if index == last { 7.5 } else { value(index) };
    for (tensor, fragment) in [
        (
            Tensor::f32(&SHAPE, nudged),
            "its values differ in float32. Trained embeddings are not",
        ),
        (
            Tensor::f32(&[40_002, 16], value),
            "it has 40002 rows, the base 40000, as when tokens are added",
        ),
        (
            Tensor::f32(&[40_000, 8], value),
            "its shape is [40000, 8], the base's [40000, 16]",
        ),
        (
            Tensor {
                dtype: Dtype::I8,
                shape: vec![40_000, 16],
                bytes: vec![0; 640_000],
            },
            "its dtype is I8",
        ),
    ] {
        let mut peft = Peft::new();
        peft.set(HEAD, tensor);
        peft.write();
        let refused = check(peft.path(), StorageDtype::Float32);
        assert_error(
            refused,
            &format!("tensor {HEAD} is no copy of the base's own lm_head: {fragment}"),
        );
    }
}

#[test]
fn without_the_bases_weights_no_copy_is_taken() {
    let peft = with_copies(&[HEAD]);
    assert_error(peft.check_written(), "the base's weights are not at hand");
}

#[test]
fn modules_to_save_may_list_copies_that_are_there() {
    let mut peft = Peft::new();
    peft.config["modules_to_save"] = json!(["model.embed_tokens", "lm_head"]);
    peft.set(EMBED, Tensor::f32(&SHAPE, value));
    peft.write();
    let refused = check(peft.path(), StorageDtype::Float32);
    assert_error(
        refused,
        "field 'modules_to_save' lists \"lm_head\", whose weight is not in the file",
    );
    peft.set(HEAD, Tensor::f32(&SHAPE, value));
    peft.write();
    check(peft.path(), StorageDtype::Float32).unwrap();
}
