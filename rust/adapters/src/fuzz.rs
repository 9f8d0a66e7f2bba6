//! Doors for the fuzz targets to what is not public.

use std::collections::BTreeMap;

use safetensors::Dtype;
use safetensors::tensor::TensorInfo;

use crate::error::Result;
use crate::names::Names;
use crate::pattern::PatternMap;
use crate::shape::BaseShape;
use crate::tensor_name::{Part, TensorName};
use crate::weights::Source;

/// The index of the first pattern that matches each module path.
pub fn match_patterns<'a>(
    patterns: impl Iterator<Item = &'a str>,
    keys: impl Iterator<Item = &'a str>,
) -> Result<Vec<Option<usize>>> {
    let entries = patterns
        .enumerate()
        .map(|(index, pattern)| (pattern, index));
    let map = PatternMap::new("rank_pattern", entries)?;
    keys.map(|key| map.get(key)).collect()
}

/// (layer, path inside it, what PEFT's name has behind it) of a tensor's name.
pub fn bind_name(name: &str, shape: &BaseShape) -> Option<(usize, String, &'static str)> {
    let source = Source {
        name: name.into(),
        info: TensorInfo {
            dtype: Dtype::F32,
            shape: Vec::new(),
            data_offsets: (0, 0),
        },
        shard: 0,
    };
    let names = Names::read(BTreeMap::from([(name.into(), source)])).ok()?;
    let (canonical, _) = names.tensors.first_key_value()?;
    let bound = TensorName::parse(canonical, name, shape).ok()?;
    let rest = match bound.part {
        Part::A => "lora_A.weight",
        Part::B => "lora_B.weight",
        Part::BBias => "lora_B.bias",
        Part::Magnitude => "lora_magnitude_vector",
        Part::WrappedBias => "base_layer.bias",
        Part::Bias => "bias",
    };
    Some((bound.layer, bound.path, rest))
}
