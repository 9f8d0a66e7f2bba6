//! `init_lora_weights`: whether an adapter was trained against the base's weights as they are.

use serde_json::Value;

use crate::error::{Error, Result};
use crate::fields::Fields;

/// Kinds that leave the base as it is; PEFT takes the first two in any case.
const PLAIN: &[&str] = &["gaussian", "mica", "eva", "orthogonal"];
/// Trained against altered weights, and loaded by PEFT onto the unaltered ones.
const LOADED_AS_PLAIN: &str = "lora_ga";
/// Kinds that alter the base, which PEFT turns back when it saves.
const CONVERTED: &[&str] = &["pissa", "corda", "olora"];

const CONVERT: &str = "save it with model.save_pretrained(DIRECTORY, path_initial_model_for_weight_conversion=\
                       INITIAL), where INITIAL is the adapter as it was before training, saved with \
                       init_lora_weights=True";
const MERGE: &str = "serve what PeftModel.from_pretrained(BASE, ADAPTER).merge_and_unload().save_pretrained(\
                     DIRECTORY) writes, as the base";

/// A note about what was decided, or why the adapter can't be served.
pub(crate) fn check(fields: &Fields) -> Result<Option<String>> {
    let name = match fields.value("init_lora_weights") {
        None | Some(Value::Bool(_)) => return Ok(None),
        Some(Value::String(name)) => name.as_str(),
        Some(value) => return Err(unknown(&value.to_string())),
    };
    let kind = name.to_ascii_lowercase();
    if PLAIN.contains(&name) || PLAIN[..2].contains(&kind.as_str()) {
        return Ok(None);
    }
    if name == LOADED_AS_PLAIN {
        return Ok(Some(format!(
            "init_lora_weights: trained as {name:?} against altered base weights, applied to the unaltered ones as \
             PEFT applies it; unless it was converted: {CONVERT}"
        )));
    }
    let is_converted = CONVERTED
        .iter()
        .any(|converted| kind.starts_with(converted));
    let remedy = match (is_converted, name) {
        (true, _) if !is_convertible(fields) => MERGE,
        (true, _) => CONVERT,
        (false, "loftq") => MERGE,
        (false, _) => return Err(unknown(name)),
    };
    Err(Error::field(
        "init_lora_weights",
        format!("is {name:?}, which trains against altered base weights: {remedy}"),
    ))
}

/// PEFT does not convert scales of rsLoRA that differ between modules.
fn is_convertible(fields: &Fields) -> bool {
    let has_patterns = ["rank_pattern", "alpha_pattern"]
        .iter()
        .any(|field| fields.value(field).is_some());
    !(has_patterns && fields.value("use_rslora").is_some())
}

fn unknown(value: &str) -> Error {
    let reason = format!(
        "is {value:.60}, which is no initialisation known here: if it leaves the base's weights as they are, \
         set it to true"
    );
    Error::field("init_lora_weights", reason)
}
