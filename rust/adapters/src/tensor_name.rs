//! PEFT's names of tensors: which part of which module in which layer, and the modules beside the layers.

use std::collections::BTreeMap;

use crate::error::{Error, Result};
use crate::shape::BaseShape;
use crate::weights::Source;

/// What a tensor is of its module.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Part {
    /// `lora_A` [rank, in].
    A,
    /// `lora_B` [out, rank].
    B,
    /// `lora_B`'s bias [out], `lora_bias`.
    BBias,
    /// `DoRA`'s magnitude [out].
    Magnitude,
    /// The base's bias, trained [out], under its name in a targeted module.
    WrappedBias,
    /// The same of a module that is not targeted.
    Bias,
}

/// A tensor of a module that exists in the base model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct TensorName {
    pub(crate) layer: usize,
    /// Path inside the layer, `self_attn.q_proj`.
    pub(crate) path: String,
    pub(crate) part: Part,
}

const PREFIX: &str = "base_model.model.model.layers.";
const EXPECTED: &str = "names look like base_model.model.model.layers.0.<module>.lora_A.weight";

/// Ends of names; one that ends another comes after it.
const SUFFIXES: &[(&str, Part)] = &[
    (".lora_A.weight", Part::A),
    (".lora_B.weight", Part::B),
    (".lora_B.bias", Part::BBias),
    (".lora_magnitude_vector", Part::Magnitude),
    (".lora_magnitude_vector.weight", Part::Magnitude),
    (".base_layer.bias", Part::WrappedBias),
    (".bias", Part::Bias),
];

/// A module of the base with a row for each token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum TokenModule {
    Embedding,
    Head,
}

impl TokenModule {
    pub(crate) const BOTH: [Self; 2] = [Self::Embedding, Self::Head];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Embedding => "embed_tokens",
            Self::Head => "lm_head",
        }
    }

    /// The one that the last part of a path names.
    pub(crate) fn of(path: &str) -> Option<Self> {
        let last = path.rsplit('.').next().unwrap_or(path);
        Self::BOTH.into_iter().find(|module| module.name() == last)
    }

    /// PEFT's name of it in a file.
    pub(crate) fn path(self) -> &'static str {
        match self {
            Self::Embedding => "base_model.model.model.embed_tokens",
            Self::Head => "base_model.model.lm_head",
        }
    }
}

/// Modules beside the layers that PEFT saves with a sequence classifier.
pub(crate) const CLASSIFIERS: [&str; 2] = ["score", "classifier"];

/// Last parts of the paths of norms: before attention, before the MLP, after all layers.
pub(crate) const BEFORE_ATTENTION: &str = "input_layernorm";
pub(crate) const BEFORE_MLP: &str = "post_attention_layernorm";
pub(crate) const AFTER_LAYERS: &str = "norm";

/// Whether an entry of `modules_to_save` names norms, as PEFT matches it: by the end of a path.
pub(crate) fn names_norms(entry: &str) -> bool {
    let last = entry.rsplit('.').next().unwrap_or(entry);
    let known = [BEFORE_ATTENTION, BEFORE_MLP, AFTER_LAYERS];
    !last.is_empty() && known.iter().any(|name| name.ends_with(last))
}

/// Parts of names that only tensors of unsupported features have, most telling first.
const UNSUPPORTED: &[(&str, &str)] = &[
    (
        "token_adapter",
        "trained tokens of another module than embed_tokens and lm_head: train without them",
    ),
    (
        "lora_embedding_",
        "LoRA on another embedding than embed_tokens: train without it",
    ),
    (
        "lm_head.lora_",
        "DoRA or lora_bias on lm_head: train without lm_head in target_modules, or without them",
    ),
    (
        "embed_tokens.lora_",
        "DoRA on embed_tokens: train without embed_tokens in target_modules, or without it",
    ),
    (
        "unembed_tokens.lora_",
        "LoRA on lm_head: train without lm_head in target_modules",
    ),
    (
        "modules_to_save",
        "a whole module, modules_to_save: train without it",
    ),
    (
        ".base_layer.weight",
        "a weight of the base model itself: save only the adapter, with PeftModel.save_pretrained",
    ),
];

/// Parts of names that other tools write, and what to do.
const MISNAMED: &[(&str, &str)] = &[
    (
        "base_model.model.base_model.model.",
        "it was trained over another adapter: merge that one into the base first",
    ),
    (
        ".lora_down.",
        "kohya's or diffusers' names: convert it to PEFT's",
    ),
    (
        ".lora_up.",
        "kohya's or diffusers' names: convert it to PEFT's",
    ),
    (
        ".lora_a",
        "MLX's or torchtune's names: convert it to PEFT's",
    ),
    (
        ".lora_b",
        "MLX's or torchtune's names: convert it to PEFT's",
    ),
    ("vision", "it was trained on a model for images"),
    ("visual", "it was trained on a model for images"),
];

/// The module path PEFT's patterns are matched against.
pub(crate) fn module_key(layer: usize, path: &str) -> String {
    format!("model.layers.{layer}.{path}")
}

/// Refuses a file for the most telling of its unsupported tensors.
pub(crate) fn refuse_unsupported(tensors: &BTreeMap<String, Source>) -> Result<()> {
    for (part, feature) in UNSUPPORTED {
        let found = tensors.iter().find(|(name, _)| name.contains(part));
        if let Some((_, source)) = found {
            return Err(Error::UnsupportedTensor {
                tensor: source.name.clone(),
                feature,
            });
        }
    }
    Ok(())
}

impl TensorName {
    /// Binds a tensor by PEFT's name for it to a module of the base, or refuses it by the name `tensor` that it
    /// has in the file.
    pub(crate) fn parse(name: &str, tensor: &str, shape: &BaseShape) -> Result<Self> {
        let (module, part) = split_part(name).ok_or_else(|| refuse_unpaired_name(tensor))?;
        let unbound = |reason: String| Error::Unbound {
            tensor: tensor.into(),
            reason,
        };
        let is_bias = matches!(part, Part::Bias | Part::WrappedBias);
        let place = split_layer(module);
        let place = place.filter(|(_, path)| !is_bias || shape.modules.contains_key(*path));
        let (layer, path) = place.ok_or_else(|| {
            if is_bias {
                refuse_unpaired_name(tensor)
            } else {
                unbound(expected_name(tensor))
            }
        })?;
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
            part,
        })
    }
}

fn split_part(name: &str) -> Option<(&str, Part)> {
    let split = |(suffix, part): &(&str, Part)| Some((name.strip_suffix(suffix)?, *part));
    SUFFIXES.iter().find_map(split)
}

/// Without `lora_` in its name a tensor replaces one of the base model's own.
fn refuse_unpaired_name(tensor: &str) -> Error {
    if !tensor.to_ascii_lowercase().contains("lora") {
        let feature = "a weight of the base model itself, trained in full or as modules_to_save or bias: \
                       train without it, or serve the whole fine-tuned model as the base";
        return Error::UnsupportedTensor {
            tensor: tensor.into(),
            feature,
        };
    }
    Error::Unbound {
        tensor: tensor.into(),
        reason: expected_name(tensor),
    }
}

/// What is wrong with a name, and what names look like.
fn expected_name(tensor: &str) -> String {
    let misnamed = MISNAMED.iter().find(|(part, _)| tensor.contains(part));
    match misnamed {
        Some((_, what)) => format!("{what}; {EXPECTED}"),
        None => EXPECTED.into(),
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
