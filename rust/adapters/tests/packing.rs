//! Random adapters packed and read back from their extents; receipts and identities.

#![allow(clippy::float_cmp)] // rounding is exact: packed values must be equal, bit for bit

mod common;

use std::collections::BTreeMap;

use common::{HIDDEN, MODULES, NUM_LAYERS, Peft, Tensor, base, tensor_name};
use half::{bf16, f16};
use loraserve_adapters::{
    AdapterLayout, BLOCK_ALIGN, Limits, ModuleLayout, RANK_MULTIPLE, StorageDtype, check, load,
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

/// What a value must read back as after file and storage have rounded it.
fn rounded(plan: &Plan, value: f32) -> f32 {
    let stored = match plan.source {
        Dtype::F16 => f16::from_f32(value).to_f32(),
        Dtype::BF16 => bf16::from_f32(value).to_f32(),
        _ => value,
    };
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
        let size = self.dtype.size();
        let start = block + index * size;
        self.seen[start..start + size].iter_mut().for_each(|seen| {
            assert!(!*seen, "two elements share a byte");
            *seen = true;
        });
        let bytes = &self.bytes[start..start + size];
        match self.dtype {
            StorageDtype::Float32 => f32::from_le_bytes(bytes.try_into().unwrap()),
            StorageDtype::BFloat16 => bf16::from_le_bytes(bytes.try_into().unwrap()).to_f32(),
            StorageDtype::Float16 => f16::from_le_bytes(bytes.try_into().unwrap()).to_f32(),
        }
    }
}

fn load_into_stale_memory(plan: &Plan) -> (AdapterLayout, Extent) {
    let peft = write(plan);
    let limits = Limits {
        dtype: plan.storage,
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
        let (layout, mut extent) = load_into_stale_memory(&plan);
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
