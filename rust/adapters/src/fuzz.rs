//! Doors for the fuzz targets to what is not public.

use crate::error::Result;
use crate::pattern::PatternMap;
use crate::shape::BaseShape;
use crate::tensor_name::{Half, TensorName};

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

/// (layer, path inside it, "A" or "B") of a tensor's name.
pub fn bind_name(name: &str, shape: &BaseShape) -> Option<(usize, String, &'static str)> {
    let bound = TensorName::parse(name, shape).ok()?;
    let half = match bound.half {
        Half::A => "A",
        Half::B => "B",
    };
    Some((bound.layer, bound.path, half))
}
