//! Random adapters packed and read back from their extents; receipts and identities.

#![allow(clippy::float_cmp)] // rounding is exact: packed values must be equal, bit for bit

mod common;

use std::collections::BTreeMap;

use common::{HIDDEN, LIMITS, MODULES, NUM_LAYERS, Peft, Tensor, base, tensor_name};
use half::{bf16, f16};
use loraserve_adapters::{
    AdapterLayout, BLOCK_ALIGN, FactorDtype, Limits, ModuleLayout, RANK_MULTIPLE, StorageDtype,
    check, load,
};
use proptest::prelude::*;
use safetensors::Dtype;
use serde_json::json;

const STALE: u8 = 0xAB;

/// A random adapter: a rank for each adapted (layer, path), and how it is stored.
#[derive(Clone, Debug)]
struct Plan {
    ranks: BTreeMap<(usize, &'static str), usize>,
    source: Dtype,
    storage: StorageDtype,
    seed: u64,
}

fn plans() -> impl Strategy<Value = Plan> {
    let sites: Vec<_> = (0..NUM_LAYERS)
        .flat_map(|layer| MODULES.iter().map(move |m| (layer, m.0)))
        .collect();
    let count = sites.len();
    let ranks =
        proptest::collection::btree_map(proptest::sample::select(sites), 1..=20_usize, 1..=count);
    let source = prop_oneof![Just(Dtype::F32), Just(Dtype::F16), Just(Dtype::BF16)];
    let storage = prop_oneof![
        Just(StorageDtype::Float32),
        Just(StorageDtype::BFloat16),
        Just(StorageDtype::Float16)
    ];
    (ranks, source, storage, any::<u64>()).prop_map(|(ranks, source, storage, seed)| Plan {
        ranks,
        source,
        storage,
        seed,
    })
}

/// A value for (tensor, element) that is dense in the mantissa.
fn value(seed: u64, tensor: u64, index: usize) -> f32 {
    let mixed = (seed ^ (tensor << 32) ^ index as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    (mixed >> 40) as f32 / (1 << 23) as f32 - 1.0
}

fn encode(dtype: Dtype, value: f32) -> Vec<u8> {
    match dtype {
        Dtype::F32 => value.to_le_bytes().to_vec(),
        Dtype::F16 => f16::from_f32(value).to_le_bytes().to_vec(),
        Dtype::BF16 => bf16::from_f32(value).to_le_bytes().to_vec(),
        other => unreachable!("no plan has {other}"),
    }
}

/// A value as the file has it.
fn stored(plan: &Plan, value: f32) -> f32 {
    match plan.source {
        Dtype::F16 => f16::from_f32(value).to_f32(),
        Dtype::BF16 => bf16::from_f32(value).to_f32(),
        _ => value,
    }
}

/// What a value must read back as after file and storage have rounded it.
fn rounded(plan: &Plan, value: f32) -> f32 {
    let stored = stored(plan, value);
    match plan.storage {
        StorageDtype::Float32 => stored,
        StorageDtype::BFloat16 => bf16::from_f32(stored).to_f32(),
        StorageDtype::Float16 => f16::from_f32(stored).to_f32(),
    }
}

fn random_tensor(plan: &Plan, id: u64, shape: [usize; 2]) -> Tensor {
    let values = (0..shape[0] * shape[1]).map(|index| value(plan.seed, id, index));
    let bytes = values
        .flat_map(|value| encode(plan.source, value))
        .collect();
    Tensor {
        dtype: plan.source,
        shape: shape.to_vec(),
        bytes,
    }
}

fn write(plan: &Plan) -> Peft {
    let paths: Vec<_> = plan
        .ranks
        .keys()
        .map(|(l, path)| format!("model.layers.{l}.{path}"))
        .collect();
    let ranks: serde_json::Map<_, _> = paths
        .iter()
        .cloned()
        .zip(plan.ranks.values().map(|rank| json!(rank)))
        .collect();
    let mut peft = Peft::empty(json!({
        "peft_type": "LORA", "r": 99, "rank_pattern": ranks, "lora_alpha": 3, "target_modules": paths,
    }));
    for (id, ((layer, path), rank)) in plan.ranks.iter().enumerate() {
        let module = MODULES.iter().find(|module| module.0 == *path).unwrap();
        let a = random_tensor(plan, 2 * id as u64, [*rank, module.2]);
        let b = random_tensor(plan, 2 * id as u64 + 1, [module.3, *rank]);
        peft.tensors.insert(tensor_name(*layer, path, "A"), a);
        peft.tensors.insert(tensor_name(*layer, path, "B"), b);
    }
    peft.write();
    peft
}

/// Reads elements back and marks their bytes as seen.
struct Extent {
    bytes: Vec<u8>,
    seen: Vec<bool>,
    dtype: StorageDtype,
}

impl Extent {
    fn take(&mut self, block: usize, index: usize) -> f32 {
        let (dtype, size) = (self.dtype, self.dtype.size());
        let bytes = self.take_bytes(block + index * size, size);
        match dtype {
            StorageDtype::Float32 => f32::from_le_bytes(bytes.try_into().unwrap()),
            StorageDtype::BFloat16 => bf16::from_le_bytes(bytes.try_into().unwrap()).to_f32(),
            StorageDtype::Float16 => f16::from_le_bytes(bytes.try_into().unwrap()).to_f32(),
        }
    }

    fn take_bytes(&mut self, start: usize, size: usize) -> &[u8] {
        self.seen[start..start + size].iter_mut().for_each(|seen| {
            assert!(!*seen, "two elements share a byte");
            *seen = true;
        });
        &self.bytes[start..start + size]
    }
}

fn load_into_stale_memory(plan: &Plan, factors: FactorDtype) -> (AdapterLayout, Extent) {
    let peft = write(plan);
    let limits = Limits {
        dtype: plan.storage,
        factors,
        max_lora_rank: 20,
    };
    let receipt = check(peft.path(), &base(), limits).unwrap();
    let mut bytes = vec![STALE; receipt.nbytes + 100];
    let layout = load(peft.path(), &base(), limits, &receipt.hash, &mut bytes).unwrap();
    assert_eq!(layout.nbytes, receipt.nbytes);
    let seen = vec![false; bytes.len()];
    (
        layout,
        Extent {
            bytes,
            seen,
            dtype: plan.storage,
        },
    )
}

/// Where element (row, k) of a matrix [rows, columns] lies in panels of 16 rows, the last of 8 or 16.
fn panel_index(dtype: StorageDtype, rows: usize, columns: usize, row: usize, k: usize) -> usize {
    let pack = if dtype == StorageDtype::Float32 { 1 } else { 2 };
    let before = row / 16 * 16;
    let width = if rows - before >= 16 { 16 } else { 8 };
    let padded = columns.div_ceil(pack) * pack;
    before * padded + (k / pack * width + row - before) * pack + k % pack
}

fn group_of(path: &str) -> usize {
    MODULES.iter().find(|module| module.0 == path).unwrap().1
}

/// Finds a module's A block and place by its group and the first column of its output.
fn place<'a>(layout: &'a AdapterLayout, layer: usize, path: &str) -> (usize, &'a ModuleLayout) {
    let module = MODULES.iter().find(|module| module.0 == path).unwrap();
    let group = layout.group(layer, module.1).expect("the group is present");
    assert_eq!(group.in_features, module.2);
    assert_eq!(
        group.rank,
        group
            .modules
            .iter()
            .map(|module| module.rank)
            .sum::<usize>()
    );
    assert_eq!(group.a_offset % BLOCK_ALIGN, 0);
    let place = group
        .modules
        .iter()
        .find(|place| place.out_offset == module.4)
        .unwrap();
    assert_eq!(
        (place.out_features, place.b_offset % BLOCK_ALIGN),
        (module.3, 0)
    );
    (group.a_offset, place)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn packed_adapter_reads_back_equal_and_the_rest_is_zero(plan in plans()) {
        let (layout, mut extent) = load_into_stale_memory(&plan, FactorDtype::Storage);
        for (id, ((layer, path), rank)) in plan.ranks.iter().enumerate() {
            let (a_offset, place) = place(&layout, *layer, path);
            prop_assert_eq!(place.rank, rank.next_multiple_of(RANK_MULTIPLE));
            prop_assert_eq!(place.scale, (3.0 / *rank as f64) as f32);
            let in_features = if *path == "mlp.down_proj" { 24 } else { HIDDEN };
            for index in 0..rank * in_features {
                let (row, k) = (place.rank_offset + index / in_features, index % in_features);
                let rows = layout.group(*layer, group_of(path)).unwrap().rank;
                let packed = extent.take(a_offset, panel_index(plan.storage, rows, in_features, row, k));
                prop_assert_eq!(packed, rounded(&plan, value(plan.seed, 2 * id as u64, index)));
            }
            for index in 0..place.out_features * rank {
                let (out, r) = (index / rank, index % rank);
                let row = place.out_offset % 16 + out;
                let rows = (place.out_offset % 16 + place.out_features).next_multiple_of(16);
                let packed = extent.take(place.b_offset, panel_index(plan.storage, rows, place.rank, row, r));
                prop_assert_eq!(packed, rounded(&plan, value(plan.seed, 2 * id as u64 + 1, index)));
            }
        }
        let padding = extent.bytes.iter().zip(&extent.seen).filter(|(_, seen)| !**seen);
        prop_assert!(padding.into_iter().all(|(byte, _)| *byte == 0));
        let modules: usize = layout.present().map(|(_, _, group)| group.modules.len()).sum();
        prop_assert_eq!(modules, plan.ranks.len());
    }

    #[test]
    fn an_int8_adapter_reads_back_as_the_nearest_quants_and_the_rest_is_zero(plan in plans()) {
        let (layout, mut extent) = load_into_stale_memory(&plan, FactorDtype::Int8);
        for (id, ((layer, path), rank)) in plan.ranks.iter().enumerate() {
            let (a_offset, place) = place(&layout, *layer, path);
            let group = layout.group(*layer, group_of(path)).unwrap();
            let k = group.in_features;
            let values = |tensor: u64, count: usize| -> Vec<f32> {
                (0..count).map(|index| stored(&plan, value(plan.seed, tensor, index))).collect()
            };
            let a = values(2 * id as u64, rank * k);
            let b = values(2 * id as u64 + 1, place.out_features * rank);
            let scale = |values: &mut dyn Iterator<Item = f32>| {
                values.fold(0.0, |largest: f32, value| largest.max(value.abs())) / 127.0
            };
            for r in 0..*rank {
                let row = &a[r * k..(r + 1) * k];
                let column = || b.iter().skip(r).step_by(*rank).copied();
                let (a_scale, b_scale) = (scale(&mut row.iter().copied()), scale(&mut column()));
                for (index, value) in row.iter().enumerate() {
                    let at = panel_index(StorageDtype::Float32, group.rank, k, place.rank_offset + r, index);
                    let packed = extent.take_bytes(a_offset + at, 1)[0].cast_signed();
                    prop_assert_eq!(f32::from(packed), (value / a_scale).round_ties_even());
                }
                for (out, value) in column().enumerate() {
                    let first = place.out_offset % 16;
                    let rows = (first + place.out_features).next_multiple_of(16);
                    let at = panel_index(StorageDtype::Float32, rows, place.rank, first + out, r);
                    let packed = extent.take_bytes(place.b_offset + at, 1)[0].cast_signed();
                    prop_assert_eq!(f32::from(packed), (value / b_scale).round_ties_even());
                }
                let at = group.scales_offset.unwrap() + 4 * (place.rank_offset + r);
                let packed = extent.take_bytes(at, 4).try_into().unwrap();
                prop_assert_eq!(f32::from_le_bytes(packed), a_scale * b_scale);
            }
        }
        let padding = extent.bytes.iter().zip(&extent.seen).filter(|(_, seen)| !**seen);
        prop_assert!(padding.into_iter().all(|(byte, _)| *byte == 0));
    }
}

#[test]
fn receipt_tells_what_was_applied() {
    let mut peft = Peft::new();
    peft.add_module(1, "mlp.down_proj", 12);
    peft.config["target_modules"] = json!(["q_proj", "v_proj", "layers.1.mlp.down_proj"]);
    peft.config["rank_pattern"] = json!({"down_proj": 12});
    let receipt = peft.check().unwrap();
    assert_eq!(receipt.tensors, 10);
    assert_eq!(receipt.modules, ["q_proj", "v_proj", "down_proj"]);
    assert_eq!(receipt.layers, [0, 1]);
    assert_eq!(
        (receipt.ranks.as_slice(), receipt.rank()),
        ([4, 12].as_slice(), 12)
    );
    assert_eq!(receipt.base_model.as_deref(), Some("some/base"));
    assert_eq!(
        receipt.base_check,
        "all 5 adapted modules match the base's shapes, in 2 of 2 layers"
    );
    // v's 8 columns are half a panel of the fused output.
    let per_layer = 16 * HIDDEN + 8 * 16 + 8 * 16;
    let zeros = 1024;
    assert_eq!(
        receipt.nbytes,
        4 * (2 * per_layer + 16 * 24 + 16 * 16) + zeros
    );
}

#[test]
fn hash_ignores_names_paths_and_harmless_fields() {
    let plain = Peft::new();
    let mut renamed = Peft::new();
    for name in plain.tensors.keys() {
        renamed.rename(name, &name.replace(".weight", ".default.weight"));
    }
    renamed.config["lora_dropout"] = json!(0.5);
    renamed.config["base_model_name_or_path"] = json!("elsewhere");
    assert_eq!(plain.check().unwrap().hash, renamed.check().unwrap().hash);
}

#[test]
fn hash_changes_with_values_scale_and_dtype() {
    let plain = Peft::new().check().unwrap().hash;
    let mut value = Peft::new();
    value.tensors.get_mut(common::Q_A).unwrap().bytes[0] ^= 1;
    let mut scale = Peft::new();
    scale.config["alpha_pattern"] = json!({"layers.1.self_attn.v_proj": 9});
    let mut dtype = Peft::new();
    for tensor in dtype.tensors.values_mut() {
        let values = tensor
            .bytes
            .as_chunks()
            .0
            .iter()
            .map(|bytes| f32::from_le_bytes(*bytes));
        tensor.bytes = values
            .flat_map(|value| bf16::from_f32(value).to_le_bytes())
            .collect();
        tensor.dtype = Dtype::BF16;
    }
    for changed in [value, scale, dtype] {
        assert_ne!(changed.check().unwrap().hash, plain);
    }
}

#[test]
fn an_adapter_in_int8_is_the_same_adapter_in_a_quarter_of_the_bytes() {
    let peft = Peft::new();
    peft.write();
    let limits = Limits {
        factors: FactorDtype::Int8,
        ..LIMITS
    };
    let [exact, int8] = [LIMITS, limits].map(|limits| check(peft.path(), &base(), limits).unwrap());
    assert_eq!(int8.hash, exact.hash);
    // Each group of 16 ranks has as many scales.
    assert!(int8.nbytes - 1024 <= (exact.nbytes - 1024) / 4 + NUM_LAYERS * 64);
}

#[test]
fn ranks_of_zeros_and_of_denormal_values_are_zeros_in_int8() {
    let mut peft = Peft::new();
    let names: Vec<_> = peft.tensors.keys().cloned().collect();
    for (index, name) in names.into_iter().enumerate() {
        let tensor = peft.tensors.get_mut(&name).unwrap();
        let value = if index % 2 == 0 {
            0.0
        } else {
            f32::from_bits(3)
        };
        tensor.bytes = tensor
            .bytes
            .as_chunks::<4>()
            .0
            .iter()
            .flat_map(|_| value.to_le_bytes())
            .collect();
    }
    peft.write();
    let limits = Limits {
        factors: FactorDtype::Int8,
        ..LIMITS
    };
    let receipt = check(peft.path(), &base(), limits).unwrap();
    let mut extent = vec![STALE; receipt.nbytes];
    load(peft.path(), &base(), limits, &receipt.hash, &mut extent).unwrap();
    assert!(extent.iter().all(|byte| *byte == 0));
}
