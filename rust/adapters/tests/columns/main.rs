//! `DoRA`, `lora_bias` and trained biases: what of them reaches an extent.

#![allow(clippy::float_cmp)] // sums of small integers are exact

#[path = "../common/mod.rs"]
mod common;
mod refusals;

use std::ops::Range;

use common::{LIMITS, MODULES, NUM_LAYERS, Peft, Tensor, assert_error};
use loraserve_adapters::{
    AdapterLayout, BaseLinears, BaseModel, BaseShape, Delta, ErrorKind, Limits, ModuleLayout,
    ModuleShape, Pace, Place, Receipt, Registered, Result, SHIFT_NBYTES, StorageDtype, check,
    load_paced,
};
use serde_json::json;

const Q: &str = "base_model.model.model.layers.0.self_attn.q_proj";
const K: &str = "base_model.model.model.layers.0.self_attn.k_proj";

/// Every linear has a bias, but `o_proj`.
fn biased() -> BaseShape {
    let modules = MODULES
        .iter()
        .map(|&(path, group, in_features, out_features, out_offset)| {
            let has_bias = group != 1;
            let module = ModuleShape {
                group,
                in_features,
                out_features,
                out_offset,
                has_bias,
            };
            (path.to_string(), module)
        });
    BaseShape::new(NUM_LAYERS, modules).unwrap()
}

fn registered(receipt: &Receipt) -> Registered<'_> {
    Registered {
        hash: &receipt.hash,
        rows: None,
    }
}

fn on(linears: Option<&dyn BaseLinears>) -> BaseModel<'_> {
    BaseModel {
        linears,
        weights: None,
    }
}

/// W[row, k] and the bias of a pretended model.
struct Base;

fn weight(layer: usize, group: usize, row: usize, k: usize) -> f32 {
    ((layer * 7 + group * 5 + row * 3 + k) % 9) as f32 - 4.0
}

fn bias(row: usize) -> f32 {
    row as f32 - 5.0
}

impl BaseLinears for Base {
    fn row_norms(&self, delta: &Delta<'_>) -> std::result::Result<Vec<f32>, String> {
        assert!(delta.rows.len() <= 5);
        let in_features = delta.at.len() / delta.rank;
        let rows = delta.rows.clone().zip(delta.b.chunks(delta.rank));
        let norm = |(row, b): (usize, &[f32])| {
            let squares = delta.at.chunks(delta.rank).enumerate().map(|(k, a)| {
                let sum: f32 = a.iter().zip(b).map(|(a, b)| a * b).sum();
                (weight(delta.layer, delta.group, row, k) + sum).powi(2)
            });
            assert_eq!(squares.len(), in_features);
            squares.sum::<f32>().sqrt()
        };
        Ok(rows.map(norm).collect())
    }

    fn rows_per_call(&self, _: usize, _: usize) -> usize {
        5
    }

    fn bias(
        &self,
        _: usize,
        _: usize,
        rows: Range<usize>,
    ) -> std::result::Result<Vec<f32>, String> {
        Ok(rows.map(bias).collect())
    }
}

fn vector(len: usize, value: impl Fn(usize) -> f32) -> Tensor {
    Tensor::f32(&[len], value)
}

fn dora() -> Peft {
    let mut peft = Peft::new();
    peft.config["use_dora"] = json!(true);
    for layer in 0..NUM_LAYERS {
        for (path, len) in [("q_proj", 16), ("v_proj", 8)] {
            let name = format!(
                "base_model.model.model.layers.{layer}.self_attn.{path}.lora_magnitude_vector"
            );
            peft.set(&name, vector(len, |i| 1.0 + i as f32));
        }
    }
    peft
}

fn with_lora_bias() -> Peft {
    let mut peft = Peft::new();
    peft.config["lora_bias"] = json!(true);
    for layer in 0..NUM_LAYERS {
        for (path, len) in [("q_proj", 16), ("v_proj", 8)] {
            let name =
                format!("base_model.model.model.layers.{layer}.self_attn.{path}.lora_B.bias");
            peft.set(&name, vector(len, |i| i as f32));
        }
    }
    peft
}

fn with_bias(kind: &str, name: &str, len: usize) -> Peft {
    let mut peft = Peft::new();
    peft.config["bias"] = json!(kind);
    peft.set(name, vector(len, |i| 2.0 * i as f32));
    peft
}

fn check_biased(peft: &Peft) -> Result<Receipt> {
    peft.write();
    check(peft.path(), &biased(), LIMITS)
}

fn load_biased(peft: &Peft, dtype: StorageDtype) -> (AdapterLayout, Vec<u8>) {
    peft.write();
    let limits = Limits { dtype, ..LIMITS };
    let receipt = check(peft.path(), &biased(), limits).unwrap();
    let mut extent = vec![0xAB; receipt.nbytes];
    let (shape, pace) = (biased(), Pace::default());
    let layout = load_paced(
        Place::Directory(peft.path()),
        &shape,
        limits,
        registered(&receipt),
        &mut extent,
        on(Some(&Base)),
        &pace,
    );
    (layout.unwrap(), extent)
}

/// Of the first panel of a module.
fn gains(extent: &[u8], module: &ModuleLayout) -> Vec<f32> {
    let offset = module.columns.unwrap().offset;
    assert_eq!(offset % 64, 0);
    let bytes = extent[offset..].as_chunks().0.iter().take(16);
    bytes.map(|value| f32::from_le_bytes(*value)).collect()
}

fn shifts(extent: &[u8], module: &ModuleLayout) -> Vec<f32> {
    let mut further = module.clone();
    further.columns.as_mut().unwrap().offset += SHIFT_NBYTES;
    gains(extent, &further)
}

#[test]
fn a_gain_is_the_magnitude_over_the_length_of_base_and_delta() {
    for dtype in [StorageDtype::Float32, StorageDtype::BFloat16] {
        let (layout, extent) = load_biased(&dora(), dtype);
        let group = layout.group(1, 0).unwrap();
        let v = &group.modules[1];
        let values = gains(&extent, v);
        let shifts = shifts(&extent, v);
        // v's columns 24 … 32 are the second half of a panel; the first is k's.
        assert_eq!((&values[..8], &shifts[..8]), (&[1.0; 8][..], &[0.0; 8][..]));
        for column in 0..8 {
            let squares = (0..16).map(|k| {
                let delta: f32 = (0..4)
                    .map(|r| {
                        let a = ((r * 16 + k) % 13) as f32 - 6.0;
                        let b = ((column * 4 + r) % 11) as f32 - 5.0;
                        2.0 * b * a
                    })
                    .sum();
                (weight(1, 0, 24 + column, k) + delta).powi(2)
            });
            let gain = (1.0 + column as f32) / squares.sum::<f32>().sqrt();
            assert_eq!(values[8 + column], gain, "column {column}");
            let base_bias = bias(24 + column);
            assert_eq!(shifts[8 + column], base_bias - gain * base_bias);
        }
    }
}

#[test]
fn without_biases_in_the_base_a_gain_has_no_shift() {
    let peft = dora();
    let receipt = peft.check().unwrap();
    let mut extent = vec![0; receipt.nbytes];
    let (shape, pace) = (common::base(), Pace::default());
    let layout = load_paced(
        Place::Directory(peft.path()),
        &shape,
        LIMITS,
        registered(&receipt),
        &mut extent,
        on(Some(&Base)),
        &pace,
    );
    let layout = layout.unwrap();
    let modules = layout.present().flat_map(|(_, _, group)| &group.modules);
    assert!(modules.into_iter().all(|m| {
        m.columns
            .is_some_and(|columns| columns.has_gain && !columns.has_shift)
    }));
}

#[test]
fn the_bias_of_b_is_scaled() {
    let (layout, extent) = load_biased(&with_lora_bias(), StorageDtype::BFloat16);
    let q = &layout.group(0, 0).unwrap().modules[0];
    assert!(!q.columns.unwrap().has_gain);
    let shifts = shifts(&extent, q);
    assert_eq!(shifts, (0..16).map(|i| 2.0 * i as f32).collect::<Vec<_>>());
}

#[test]
fn a_trained_bias_takes_the_place_of_the_bases() {
    let peft = with_bias("all", &format!("{K}.bias"), 8);
    let (layout, extent) = load_biased(&peft, StorageDtype::Float32);
    let group = layout.group(0, 0).unwrap();
    let ranks: Vec<_> = group
        .modules
        .iter()
        .map(|m| (m.rank_offset, m.rank))
        .collect();
    assert_eq!(ranks, [(0, 8), (8, 0), (8, 8)]);
    let k = &group.modules[1];
    let shifts = shifts(&extent, k);
    let expected = (0..8)
        .map(|i| 2.0 * i as f32 - bias(16 + i))
        .chain([0.0; 8]);
    assert_eq!(shifts, expected.collect::<Vec<_>>());
}

#[test]
fn a_module_may_have_nothing_but_a_trained_bias() {
    let name = "base_model.model.model.layers.1.mlp.down_proj.bias";
    let (layout, extent) = load_biased(&with_bias("all", name, 16), StorageDtype::Float32);
    let group = layout.group(1, 3).unwrap();
    assert_eq!((group.rank, group.modules.len()), (0, 1));
    assert_eq!(shifts(&extent, &group.modules[0])[..2], [5.0, 6.0]);
}

#[test]
fn receipts_note_them_and_say_what_can_not_be_summed() {
    let receipt = check_biased(&dora()).unwrap();
    assert_eq!(receipt.notes, ["DoRA on 4 modules"]);
    assert_eq!(receipt.tensors, 12);
    assert!(receipt.alone.unwrap().contains("use_dora"));
    let receipt = check_biased(&with_lora_bias()).unwrap();
    assert_eq!(receipt.notes, ["lora_bias on 4 modules"]);
    assert_eq!(receipt.alone, None);
    let receipt =
        check_biased(&with_bias("lora_only", &format!("{Q}.base_layer.bias"), 16)).unwrap();
    assert_eq!(
        receipt.notes,
        ["trained biases in place of the base's on 1 modules"]
    );
    assert!(receipt.alone.unwrap().contains("(bias)"));
    assert_eq!(receipt.modules, ["q_proj", "v_proj"]);
}

#[test]
fn hashes_tell_magnitudes_and_biases_apart() {
    let mut hashes = Vec::new();
    for make in [dora, with_lora_bias, || {
        with_bias("all", &format!("{K}.bias"), 8)
    }] {
        hashes.push(check_biased(&make()).unwrap().hash);
        let mut changed = make();
        let name = changed
            .tensors
            .keys()
            .find(|name| !name.contains("weight"))
            .unwrap()
            .clone();
        changed.tensors.get_mut(&name).unwrap().bytes[3] ^= 1;
        hashes.push(check_biased(&changed).unwrap().hash);
    }
    hashes.push(check_biased(&Peft::new()).unwrap().hash);
    let mut distinct = hashes.clone();
    distinct.sort();
    distinct.dedup();
    assert_eq!(distinct.len(), hashes.len());
}

#[test]
fn an_unset_bias_field_changes_nothing() {
    let mut all = Peft::new();
    all.config["bias"] = json!("all");
    let (all, plain) = (
        check_biased(&all).unwrap(),
        check_biased(&Peft::new()).unwrap(),
    );
    assert_eq!((all.hash, all.alone), (plain.hash, None));
}
