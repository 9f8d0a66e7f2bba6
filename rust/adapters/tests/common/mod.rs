//! Writes PEFT directories: a valid one to start from, and ways to break it.
#![allow(dead_code)] // each test binary uses its own part

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use loraserve_adapters::{
    BaseShape, FactorDtype, Limits, ModuleShape, Receipt, Result, StorageDtype,
};
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use serde_json::{Value, json};
use tempfile::TempDir;

pub const HIDDEN: usize = 16;
pub const NUM_LAYERS: usize = 2;
pub const LIMITS: Limits = Limits {
    dtype: StorageDtype::Float32,
    factors: FactorDtype::Storage,
    max_lora_rank: 64,
};

pub struct Tensor {
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    pub bytes: Vec<u8>,
}

/// A PEFT directory in the making.
pub struct Peft {
    pub directory: TempDir,
    pub config: Value,
    pub tensors: BTreeMap<String, Tensor>,
}

/// (path, group, `in_features`, `out_features`, `out_offset`): hidden 16, kv 8, intermediate 24.
pub const MODULES: &[(&str, usize, usize, usize, usize)] = &[
    ("self_attn.q_proj", 0, 16, 16, 0),
    ("self_attn.k_proj", 0, 16, 8, 16),
    ("self_attn.v_proj", 0, 16, 8, 24),
    ("self_attn.o_proj", 1, 16, 16, 0),
    ("mlp.gate_proj", 2, 16, 24, 0),
    ("mlp.up_proj", 2, 16, 24, 24),
    ("mlp.down_proj", 3, 24, 16, 0),
];

pub fn base() -> BaseShape {
    let modules = MODULES
        .iter()
        .map(|&(path, group, in_features, out_features, out_offset)| {
            (
                path.to_string(),
                ModuleShape {
                    group,
                    in_features,
                    out_features,
                    out_offset,
                    has_bias: false,
                },
            )
        });
    BaseShape::new(NUM_LAYERS, modules).expect("the shape is consistent")
}

pub fn tensor_name(layer: usize, path: &str, half: &str) -> String {
    format!("base_model.model.model.layers.{layer}.{path}.lora_{half}.weight")
}

pub const Q_A: &str = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight";
pub const Q_B: &str = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight";

impl Tensor {
    pub fn f32(shape: &[usize], value: impl Fn(usize) -> f32) -> Self {
        let bytes = (0..shape.iter().product())
            .flat_map(|i| value(i).to_le_bytes())
            .collect();
        Self {
            dtype: Dtype::F32,
            shape: shape.to_vec(),
            bytes,
        }
    }
}

impl Peft {
    /// Rank 4, alpha 8, `q_proj` and `v_proj` of both layers.
    pub fn new() -> Self {
        let mut peft = Self::empty(json!({
            "peft_type": "LORA", "r": 4, "lora_alpha": 8, "bias": "none",
            "base_model_name_or_path": "some/base", "target_modules": ["q_proj", "v_proj"],
            "use_dora": false, "rank_pattern": {}, "modules_to_save": null,
        }));
        for layer in 0..NUM_LAYERS {
            peft.add_module(layer, "self_attn.q_proj", 4);
            peft.add_module(layer, "self_attn.v_proj", 4);
        }
        peft
    }

    pub fn empty(config: Value) -> Self {
        let directory = TempDir::new().expect("a temporary directory can be made");
        Self {
            directory,
            config,
            tensors: BTreeMap::new(),
        }
    }

    pub fn add_module(&mut self, layer: usize, path: &str, rank: usize) {
        let module = MODULES
            .iter()
            .find(|module| module.0 == path)
            .expect("the path is known");
        let a = Tensor::f32(&[rank, module.2], |i| (i % 13) as f32 - 6.0);
        let b = Tensor::f32(&[module.3, rank], |i| (i % 11) as f32 - 5.0);
        self.tensors.insert(tensor_name(layer, path, "A"), a);
        self.tensors.insert(tensor_name(layer, path, "B"), b);
    }

    pub fn set(&mut self, name: &str, tensor: Tensor) {
        self.tensors.insert(name.into(), tensor);
    }

    pub fn drop(&mut self, name: &str) {
        self.tensors.remove(name).expect("the tensor exists");
    }

    pub fn rename(&mut self, from: &str, to: &str) {
        let tensor = self.tensors.remove(from).expect("the tensor exists");
        self.tensors.insert(to.into(), tensor);
    }

    pub fn path(&self) -> &Path {
        self.directory.path()
    }

    pub fn config_path(&self) -> PathBuf {
        self.path().join("adapter_config.json")
    }

    pub fn weights_path(&self) -> PathBuf {
        self.path().join("adapter_model.safetensors")
    }

    pub fn write(&self) {
        fs::write(self.config_path(), self.config.to_string()).expect("the config is written");
        fs::write(self.weights_path(), self.weights()).expect("the weights are written");
    }

    pub fn weights(&self) -> Vec<u8> {
        let views = self.tensors.iter().map(|(name, tensor)| {
            let view = TensorView::new(tensor.dtype, tensor.shape.clone(), &tensor.bytes);
            (name.as_str(), view.expect("bytes match the shape"))
        });
        safetensors::serialize(views, None).expect("tensors serialise")
    }

    /// Writes and checks.
    pub fn check(&self) -> Result<Receipt> {
        self.write();
        self.check_written()
    }

    pub fn check_written(&self) -> Result<Receipt> {
        loraserve_adapters::check(self.path(), &base(), LIMITS)
    }
}

/// Asserts that a valid adapter, once broken, is refused with `fragment` in the message.
pub fn assert_refused(break_it: impl FnOnce(&mut Peft), fragment: &str) {
    let mut peft = Peft::new();
    break_it(&mut peft);
    assert_error(peft.check(), fragment);
}

/// Asserts that setting one config field refuses the adapter with `fragment`.
pub fn assert_field_refused(field: &str, value: Value, fragment: &str) {
    assert_refused(|peft| peft.config[field] = value, fragment);
}

pub fn assert_error<T>(result: Result<T>, fragment: &str) {
    let message = result.err().expect("the adapter is refused").to_string();
    assert!(
        message.contains(fragment),
        "expected {fragment:?} in {message:?}"
    );
}
