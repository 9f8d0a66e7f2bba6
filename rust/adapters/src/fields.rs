//! Typed access to the fields of `adapter_config.json`; every error names the field.

use serde_json::{Map, Value};

use crate::error::{Error, Result};

/// Longest value quoted in an error, in characters.
const QUOTE_CHARS: usize = 60;

/// Fields that never change what a loaded adapter computes.
const HARMLESS: &[&str] = &[
    "auto_mapping",
    "base_model_name_or_path",
    "corda_config", // read only by the initialisation, see `init_lora_weights`
    "eva_config",   // as corda_config
    "inference_mode",
    "loftq_config",   // as corda_config
    "lora_dropout",   // training only
    "lora_ga_config", // as corda_config
    "megatron_core",  // a module name, used only with megatron_config
    "peft_version",
    "qalora_group_size", // used only with use_qalora
    "revision",
    "runtime_config",
    "unsloth_fixed",
];

/// What to do about fields that are refused.
const REMEDIES: &[(&str, &str)] = &[
    ("bias", "expected \"none\", \"all\" or \"lora_only\""),
    (
        "lora_bias",
        "PEFT knows no lora_bias with use_dora, set the one that it was trained with",
    ),
    (
        "layer_replication",
        "merge the adapter into its base and serve that",
    ),
    (
        "modules_to_save",
        "only embed_tokens, lm_head, norms, score and classifier may be listed: train without others, or \
         merge the adapter into its base and serve that",
    ),
    ("target_parameters", "name linear layers in target_modules"),
];

/// PEFT's types that are learned prompts: nothing a weight could take up.
const PROMPT_TYPES: &[&str] = &[
    "ADAPTION_PROMPT",
    "CARTRIDGE",
    "CPT",
    "MULTITASK_PROMPT_TUNING",
    "P_TUNING",
    "PREFIX_TUNING",
    "PROMPT_TUNING",
];

/// Fields this crate interprets.
const READ: &[&str] = &[
    "alora_invocation_tokens",
    "alpha_pattern",
    "bias",
    "ensure_weight_tying",
    "exclude_modules",
    "init_lora_weights",
    "layers_pattern",
    "layers_to_transform",
    "lora_alpha",
    "lora_bias",
    "modules_to_save",
    "peft_type",
    "r",
    "rank_pattern",
    "target_modules",
    "task_type",
    "trainable_token_indices",
    "use_dora",
    "use_rslora",
];

/// The object in `adapter_config.json`, in file order.
pub(crate) struct Fields(Map<String, Value>);

impl Fields {
    pub(crate) fn new(fields: Map<String, Value>) -> Self {
        Self(fields)
    }

    /// Refuses every field that has a value and is neither read nor harmless.
    pub(crate) fn refuse_unsupported(&self) -> Result<()> {
        let unsupported = self.0.iter().find(|(field, value)| {
            let known = HARMLESS.contains(&field.as_str()) || READ.contains(&field.as_str());
            !known && !is_unset(value)
        });
        match unsupported {
            Some((field, _)) => Err(self.unsupported(field)),
            None => Ok(()),
        }
    }

    pub(crate) fn unsupported(&self, field: &str) -> Error {
        Error::UnsupportedField {
            field: field.into(),
            value: quote(self.0.get(field)),
            remedy: self.remedy(field),
        }
    }

    fn remedy(&self, field: &str) -> String {
        if field == "peft_type" {
            let is_prompt = self
                .string(field)
                .is_some_and(|kind| PROMPT_TYPES.contains(&kind));
            let why = if is_prompt {
                "it is a learned prompt, which no weight can take up"
            } else {
                "merge it into its base and serve that"
            };
            return format!(": {why}, or train a LORA adapter");
        }
        let found = REMEDIES.iter().find(|(name, _)| *name == field);
        found.map_or_else(String::new, |(_, remedy)| format!(": {remedy}"))
    }

    pub(crate) fn has(&self, field: &str) -> bool {
        self.0.contains_key(field)
    }

    /// The value, unless it is absent, null or empty.
    pub(crate) fn value(&self, field: &str) -> Option<&Value> {
        self.0.get(field).filter(|value| !is_unset(value))
    }

    pub(crate) fn string(&self, field: &str) -> Option<&str> {
        self.value(field).and_then(Value::as_str)
    }

    pub(crate) fn flag(&self, field: &str) -> Result<bool> {
        match self.value(field) {
            None => Ok(false),
            Some(Value::Bool(flag)) => Ok(*flag),
            Some(_) => Err(self.wrong(field, "true or false")),
        }
    }

    pub(crate) fn rank(&self, field: &str, default: usize) -> Result<usize> {
        self.0
            .get(field)
            .map_or(Ok(default), |value| rank_of(field, value))
    }

    pub(crate) fn number(&self, field: &str) -> Result<Option<f64>> {
        self.0
            .get(field)
            .map(|value| number_of(field, value))
            .transpose()
    }

    pub(crate) fn ranks_by_pattern(&self, field: &str) -> Result<Vec<(&str, usize)>> {
        self.by_pattern(field, rank_of)
    }

    pub(crate) fn numbers_by_pattern(&self, field: &str) -> Result<Vec<(&str, f64)>> {
        self.by_pattern(field, number_of)
    }

    /// A string or a list of strings, as a list.
    pub(crate) fn strings(&self, field: &str) -> Result<Vec<&str>> {
        let wrong = || self.wrong(field, "a string or a list of strings");
        match self.value(field) {
            None => Ok(Vec::new()),
            Some(Value::String(text)) => Ok(vec![text]),
            Some(Value::Array(items)) => items
                .iter()
                .map(|item| item.as_str().ok_or_else(wrong))
                .collect(),
            Some(_) => Err(wrong()),
        }
    }

    /// An integer or a list of integers, as a list.
    pub(crate) fn integers(&self, field: &str) -> Result<Vec<i64>> {
        let wrong = || self.wrong(field, "an integer or a list of integers");
        match self.0.get(field) {
            None | Some(Value::Null) => Ok(Vec::new()),
            Some(Value::Array(items)) => items
                .iter()
                .map(|item| item.as_i64().ok_or_else(wrong))
                .collect(),
            Some(value) => Ok(vec![value.as_i64().ok_or_else(wrong)?]),
        }
    }

    fn by_pattern<T>(
        &self,
        field: &str,
        convert: impl Fn(&str, &Value) -> Result<T>,
    ) -> Result<Vec<(&str, T)>> {
        match self.value(field) {
            None => Ok(Vec::new()),
            Some(Value::Object(entries)) => entries
                .iter()
                .map(|(pattern, value)| Ok((pattern.as_str(), convert(field, value)?)))
                .collect(),
            Some(_) => Err(self.wrong(field, "an object of patterns")),
        }
    }

    fn wrong(&self, field: &str, expected: &str) -> Error {
        Error::field(
            field,
            format!("is {}, expected {expected}", quote(self.0.get(field))),
        )
    }
}

fn rank_of(field: &str, value: &Value) -> Result<usize> {
    let rank = value.as_u64().and_then(|rank| usize::try_from(rank).ok());
    rank.filter(|rank| *rank > 0).ok_or_else(|| {
        Error::field(
            field,
            format!(
                "has rank {}, expected a positive integer",
                quote(Some(value))
            ),
        )
    })
}

fn number_of(field: &str, value: &Value) -> Result<f64> {
    value
        .as_f64()
        .filter(|number| number.is_finite())
        .ok_or_else(|| {
            Error::field(
                field,
                format!("has {}, expected a number", quote(Some(value))),
            )
        })
}

fn is_unset(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::String(text) => text.is_empty(),
        Value::Array(items) => items.is_empty(),
        Value::Object(entries) => entries.is_empty(),
        Value::Bool(true) | Value::Number(_) => false,
    }
}

fn quote(value: Option<&Value>) -> String {
    let text = value.map_or_else(|| "absent".into(), Value::to_string);
    match text.char_indices().nth(QUOTE_CHARS) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text,
    }
}
