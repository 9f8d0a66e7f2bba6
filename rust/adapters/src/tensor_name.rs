//! Names of PEFT tensors: which half of which module in which layer.

use crate::error::{Error, Result};
use crate::shape::BaseShape;

/// `lora_A` [rank, in] or `lora_B` [out, rank].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Half {
    A,
    B,
}

/// A tensor of a module that exists in the base model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct TensorName {
    pub(crate) layer: usize,
    /// Path inside the layer, `self_attn.q_proj`.
    pub(crate) path: String,
    pub(crate) half: Half,
}

const PREFIX: &str = "base_model.model.model.layers.";
const EXPECTED: &str = "names look like base_model.model.model.layers.0.<module>.lora_A.weight";

const SUFFIXES: &[(&str, Half)] = &[
    (".lora_A.weight", Half::A),
    (".lora_A.default.weight", Half::A),
    (".lora_B.weight", Half::B),
    (".lora_B.default.weight", Half::B),
];

/// Parts of names that only tensors of unsupported features have, most telling first.
const UNSUPPORTED: &[(&str, &str)] = &[
    ("lora_magnitude_vector", "DoRA magnitude, use_dora"),
    ("lora_embedding_", "adapted embedding"),
    ("modules_to_save", "a whole module, modules_to_save"),
    ("token_adapter", "trained tokens, trainable_token_indices"),
    ("lora_B.bias", "lora_bias"),
    ("lora_B.default.bias", "lora_bias"),
    (".base_layer.bias", "trained bias, bias"),
];

/// The module path PEFT's patterns are matched against.
pub(crate) fn module_key(layer: usize, path: &str) -> String {
    format!("model.layers.{layer}.{path}")
}

impl TensorName {
    /// Binds a tensor's name to a module of the base, or refuses it.
    pub(crate) fn parse(tensor: &str, shape: &BaseShape) -> Result<Self> {
        if let Some((_, feature)) = UNSUPPORTED.iter().find(|(part, _)| tensor.contains(part)) {
            return Err(Error::UnsupportedTensor {
                tensor: tensor.into(),
                feature,
            });
        }
        let (module, half) = split_half(tensor)?;
        let unbound = |reason: String| Error::Unbound {
            tensor: tensor.into(),
            reason,
        };
        let (layer, path) = split_layer(module).ok_or_else(|| unbound(EXPECTED.into()))?;
        if layer >= shape.num_layers {
            return Err(unbound(format!(
                "layer {layer}, base has {} layers",
                shape.num_layers
            )));
        }
        if !shape.modules.contains_key(path) {
            return Err(unbound(format!("'{path}' is none of {}", listed(shape))));
        }
        Ok(Self {
            layer,
            path: path.into(),
            half,
        })
    }
}

fn split_half(tensor: &str) -> Result<(&str, Half)> {
    let split = |(suffix, half): &(&str, Half)| Some((tensor.strip_suffix(suffix)?, *half));
    SUFFIXES
        .iter()
        .find_map(split)
        .ok_or_else(|| refuse_unpaired_name(tensor))
}

/// Without `lora_` in its name a tensor replaces one of the base model's own.
fn refuse_unpaired_name(tensor: &str) -> Error {
    if !tensor.contains("lora_") {
        let feature = "a weight of the base model itself, modules_to_save or bias";
        return Error::UnsupportedTensor {
            tensor: tensor.into(),
            feature,
        };
    }
    Error::Unbound {
        tensor: tensor.into(),
        reason: EXPECTED.into(),
    }
}

/// `base_model.model.model.layers.3.self_attn.q_proj` → (3, `self_attn.q_proj`).
fn split_layer(module: &str) -> Option<(usize, &str)> {
    let (digits, path) = module.strip_prefix(PREFIX)?.split_once('.')?;
    let layer: usize = digits.parse().ok()?;
    (layer.to_string() == digits).then_some((layer, path))
}

fn listed(shape: &BaseShape) -> String {
    shape
        .modules
        .keys()
        .map(String::as_str)
        .collect::<Vec<_>>()
        .join(", ")
}
