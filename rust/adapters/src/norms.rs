//! Norms of the layers and the last one, trained in full and in place of the base's.

use std::collections::BTreeMap;

use crate::bind::check_vector;
use crate::config::Config;
use crate::error::{Error, Result};
use crate::shape::BaseShape;
use crate::tensor_name::{AFTER_LAYERS, BEFORE_ATTENTION, BEFORE_MLP};
use crate::weights::Source;

/// One norm's weight.
#[derive(Debug)]
pub(crate) struct Norm {
    /// In the order they run: two a layer, then the last.
    pub(crate) index: usize,
    pub(crate) source: Source,
}

/// Takes them out of a file's tensors, in their order.
pub(crate) fn take_norms(
    tensors: &mut BTreeMap<String, Source>,
    config: &Config,
    shape: &BaseShape,
) -> Result<Vec<Norm>> {
    let hidden = shape
        .group(0)
        .first()
        .map_or(0, |(_, module)| module.in_features);
    let of_layer = |layer: usize| {
        [BEFORE_ATTENTION, BEFORE_MLP].map(|name| format!("model.layers.{layer}.{name}"))
    };
    let paths = (0..shape.num_layers).flat_map(of_layer);
    let paths = paths.chain([format!("model.{AFTER_LAYERS}")]);
    let mut norms = Vec::new();
    for (index, path) in paths.enumerate() {
        let Some(source) = tensors.remove(&format!("base_model.model.{path}.weight")) else {
            let mut saved = config.saved_modules.iter();
            match saved.find(|entry| path.ends_with(entry.as_str())) {
                Some(entry) => {
                    let reason =
                        format!("lists {entry:?}, and the weight of {path} is not in the file");
                    return Err(Error::field("modules_to_save", reason));
                }
                None => continue,
            }
        };
        check_vector(&source, hidden)?;
        norms.push(Norm { index, source });
    }
    match norms.first() {
        Some(norm) if !config.invocation_tokens.is_empty() => Err(Error::field(
            "alora_invocation_tokens",
            format!(
                "can't be used with norms of the adapter's own ({}), which act before an invocation too",
                norm.source.name
            ),
        )),
        _ => Ok(norms),
    }
}
