//! Adapters in the pool: one PEFT directory, loaded as often as distinct adapters are wanted.

use std::fmt::Write;
use std::fs;
use std::path::Path;
use std::sync::Arc;

use loraserve_adapters::{FactorDtype, Limits, StorageDtype, check, load};

use crate::model::{Model, NUM_LAYERS, base_shape, random};

pub const RANK: usize = 16;

const LIMITS: Limits = Limits {
    dtype: StorageDtype::BFloat16,
    factors: FactorDtype::Storage,
    max_lora_rank: RANK,
};

/// A model with `count` adapters in slots 0.. after its first `num_pages` pages, which are for tokens.
pub fn model_with_adapters(num_pages: usize, count: usize, factors: FactorDtype) -> Model {
    let limits = Limits { factors, ..LIMITS };
    let directory = tempfile::tempdir().expect("a temporary directory can be made");
    write_adapter(directory.path()).expect("the adapter can be written");
    let shape = base_shape();
    let receipt = check(directory.path(), &shape, limits).expect("the adapter fits the base model");
    let extent = receipt.nbytes.div_ceil(Model::page_nbytes());
    let mut model = Model::new(num_pages + count * extent);
    for slot in 0..count {
        let first_page = num_pages + slot * extent;
        let bytes = model.pages_mut(first_page, extent);
        let layout = load(directory.path(), &shape, limits, &receipt.hash, bytes);
        let layout = layout.expect("the adapter is as it was checked");
        let bound = model
            .context
            .set_adapter(slot, first_page, Arc::new(layout));
        bound.expect("the extent lies in the pool");
    }
    model
}

/// Rank 16 on all seven projections of every layer, in bfloat16.
fn write_adapter(directory: &Path) -> std::io::Result<()> {
    let (mut header, mut num_values) = (String::new(), 0);
    for layer in 0..NUM_LAYERS {
        for (path, module) in &base_shape().modules {
            let shapes = [
                ("A", RANK, module.in_features),
                ("B", module.out_features, RANK),
            ];
            for (matrix, rows, columns) in shapes {
                let (start, end) = (2 * num_values, 2 * (num_values + rows * columns));
                num_values += rows * columns;
                let name =
                    format!("base_model.model.model.layers.{layer}.{path}.lora_{matrix}.weight");
                let comma = if header.is_empty() { "{" } else { "," };
                write!(
                    header,
                    r#"{comma}"{name}": {{"dtype": "BF16", "shape": [{rows}, {columns}], "data_offsets": [{start}, {end}]}}"#
                )
                .expect("a string takes all");
            }
        }
    }
    header.push('}');
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend(header.as_bytes());
    file.extend(
        random(num_values)
            .iter()
            .flat_map(|value| value.0.to_le_bytes()),
    );
    fs::write(directory.join("adapter_model.safetensors"), file)?;
    let config = format!(
        r#"{{"peft_type": "LORA", "r": {RANK}, "lora_alpha": 32,
            "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]}}"#
    );
    fs::write(directory.join("adapter_config.json"), config)
}
