//! `adapter_config.json`: what it says about the arithmetic, or why it can't be served.

use std::path::Path;

use serde_json::Value;

use crate::alpha::StoredAlpha;
use crate::error::{Error, Result};
use crate::fields::Fields;
use crate::initialisation;
use crate::pattern::PatternMap;
use crate::target::Targets;
use crate::tensor_name::{CLASSIFIERS, TokenModule, names_norms};

/// PEFT's defaults for fields left out.
const DEFAULT_RANK: usize = 8;
const DEFAULT_ALPHA: f64 = 8.0;

/// Tokens of an invocation, which is a few words.
const MAX_INVOCATION_TOKENS: usize = 1024;

/// Which of the base's biases were trained.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum TrainedBias {
    None,
    /// Those of the modules that are targeted.
    LoraOnly,
    All,
}

impl TrainedBias {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::LoraOnly => "lora_only",
            Self::All => "all",
        }
    }
}

/// The parts of the config that decide what the adapter computes.
#[expect(clippy::struct_excessive_bools, reason = "as many as PEFT has")]
pub(crate) struct Config {
    pub(crate) base_model: Option<String>,
    /// PEFT's name of what it was trained for.
    pub(crate) task_type: Option<String>,
    pub(crate) targets: Targets,
    /// `modules_to_save`: names of modules, or ends of their paths.
    pub(crate) saved_modules: Vec<String>,
    /// `ensure_weight_tying`
    pub(crate) ensures_tying: bool,
    /// `trainable_token_indices` of the embedding and of the head, each once.
    pub(crate) token_indices: [Option<Vec<u32>>; 2],
    pub(crate) notes: Vec<String>,
    pub(crate) use_dora: bool,
    pub(crate) lora_bias: bool,
    pub(crate) bias: TrainedBias,
    rank: usize,
    rank_pattern: PatternMap<usize>,
    /// `None` where the config does not say.
    alpha: Option<f64>,
    alpha_pattern: PatternMap<f64>,
    use_rslora: bool,
    /// Tokens of a prompt from whose last occurrence on the adapter acts; empty, it acts on all.
    pub(crate) invocation_tokens: Vec<i32>,
}

impl Config {
    /// Parses the text of `path`.
    pub(crate) fn parse(path: &Path, text: &str) -> Result<Self> {
        let syntax = |reason: String| Error::ConfigSyntax {
            path: path.into(),
            reason,
        };
        match serde_json::from_str(text).map_err(|error| syntax(error.to_string()))? {
            Value::Object(fields) => Self::new(&Fields::new(fields)),
            _ => Err(syntax("expected a JSON object".into())),
        }
    }

    fn new(fields: &Fields) -> Result<Self> {
        check_type(fields)?;
        fields.refuse_unsupported()?;
        let note = initialisation::check(fields)?;
        let (use_dora, lora_bias) = (fields.flag("use_dora")?, fields.flag("lora_bias")?);
        if use_dora && lora_bias {
            return Err(fields.unsupported("lora_bias"));
        }
        let rank_pattern = fields.ranks_by_pattern("rank_pattern")?;
        let alpha_pattern = fields.numbers_by_pattern("alpha_pattern")?;
        Ok(Self {
            base_model: fields.string("base_model_name_or_path").map(String::from),
            task_type: fields.string("task_type").map(String::from),
            targets: Targets::new(fields)?,
            saved_modules: saved_modules(fields)?,
            ensures_tying: fields.flag("ensure_weight_tying")?,
            token_indices: token_indices(fields)?,
            notes: note.into_iter().collect(),
            use_dora,
            lora_bias,
            bias: trained_bias(fields)?,
            rank: fields.rank("r", DEFAULT_RANK)?,
            rank_pattern: PatternMap::new("rank_pattern", rank_pattern)?,
            alpha: fields.number("lora_alpha")?,
            alpha_pattern: PatternMap::new("alpha_pattern", alpha_pattern)?,
            use_rslora: fields.flag("use_rslora")?,
            invocation_tokens: invocation_tokens(fields)?,
        })
    }

    /// Rank of the module at `key` (`model.layers.0.self_attn.q_proj`).
    pub(crate) fn rank(&self, key: &str) -> Result<usize> {
        Ok(self.rank_pattern.get(key)?.unwrap_or(self.rank))
    }

    /// Whether it says how modules are scaled.
    pub(crate) fn has_alpha(&self) -> bool {
        self.alpha.is_some()
    }

    /// alpha/r, or alpha/√r for rsLoRA, of the module at `key`; an alpha among the tensors may not contradict.
    pub(crate) fn scale(
        &self,
        key: &str,
        rank: usize,
        stored: Option<&StoredAlpha>,
    ) -> Result<f32> {
        let configured = self.alpha_pattern.get(key)?.or(self.alpha);
        let alpha = match (stored, configured) {
            (Some(stored), Some(configured)) if stored.alpha.total_cmp(&configured).is_ne() => {
                return Err(Error::AlphaConfig {
                    tensor: stored.tensor.clone(),
                    alpha: stored.alpha,
                    configured,
                });
            }
            (Some(stored), _) => stored.alpha,
            (None, configured) => configured.unwrap_or(DEFAULT_ALPHA),
        };
        let rank = rank as f64;
        let scale = alpha / if self.use_rslora { rank.sqrt() } else { rank };
        let rounded = scale as f32;
        if rounded == 0.0 || !rounded.is_finite() {
            return Err(Error::Scale {
                module: key.into(),
                scale,
            });
        }
        Ok(rounded)
    }
}

fn check_type(fields: &Fields) -> Result<()> {
    match fields.string("peft_type") {
        Some("LORA") => {}
        Some(_) => return Err(fields.unsupported("peft_type")),
        None if fields.has("lora_parameters") => {
            let reason = "is missing and 'lora_parameters' is there: an MLX adapter, which is not read; \
                          convert it to PEFT's form";
            return Err(Error::field("peft_type", reason));
        }
        None => return Err(Error::field("peft_type", "is missing, expected \"LORA\"")),
    }
    Ok(())
}

fn trained_bias(fields: &Fields) -> Result<TrainedBias> {
    use TrainedBias::{All, LoraOnly, None};
    let kinds = [None, LoraOnly, All];
    match fields.value("bias") {
        Option::None => Ok(None),
        Some(value) => {
            let named = |kind: &TrainedBias| value.as_str() == Some(kind.name());
            let kind = kinds.into_iter().find(named);
            kind.ok_or_else(|| fields.unsupported("bias"))
        }
    }
}

/// Embedding, heads and norms may be listed, other modules may not.
fn saved_modules(fields: &Fields) -> Result<Vec<String>> {
    let field = "modules_to_save";
    let listed = fields.strings(field)?;
    let is_served = |path: &&str| {
        TokenModule::of(path).is_some() || names_norms(path) || CLASSIFIERS.contains(path)
    };
    if !listed.iter().all(is_served) {
        return Err(fields.unsupported(field));
    }
    Ok(listed.into_iter().map(String::from).collect())
}

/// A list is of the embedding's; an object names modules.
fn token_indices(fields: &Fields) -> Result<[Option<Vec<u32>>; 2]> {
    let field = "trainable_token_indices";
    let mut indices = [None, None];
    match fields.value(field) {
        None => {}
        Some(Value::Object(modules)) => {
            for (path, tokens) in modules {
                let module = TokenModule::of(path).ok_or_else(|| {
                    let reason = format!("names {path:?}, expected embed_tokens or lm_head");
                    Error::field(field, reason)
                })?;
                let tokens = Some(token_ids(field, tokens)?);
                if indices[module as usize].replace(tokens).is_some() {
                    return Err(Error::field(
                        field,
                        format!("names {} twice", module.name()),
                    ));
                }
            }
        }
        Some(tokens) => {
            indices[TokenModule::Embedding as usize] = Some(Some(token_ids(field, tokens)?));
        }
    }
    Ok(indices.map(Option::flatten))
}

/// Each once.
fn token_ids(field: &str, value: &Value) -> Result<Vec<u32>> {
    let wrong = || {
        Error::field(
            field,
            "expected a list of token ids, or such lists by module",
        )
    };
    let id = |value: &Value| {
        let id = value.as_u64().and_then(|id| u32::try_from(id).ok());
        id.filter(|id| i32::try_from(*id).is_ok()).ok_or_else(wrong)
    };
    let ids = value.as_array().ok_or_else(wrong)?;
    let ids = ids.iter().map(id).collect::<Result<Vec<u32>>>()?;
    let mut sorted = ids.clone();
    sorted.sort_unstable();
    match sorted.windows(2).find(|pair| pair[0] == pair[1]) {
        Some(pair) => Err(Error::field(
            field,
            format!("lists token {} twice", pair[0]),
        )),
        None => Ok(ids),
    }
}

fn invocation_tokens(fields: &Fields) -> Result<Vec<i32>> {
    let field = "alora_invocation_tokens";
    if fields.value(field).is_none() {
        return Ok(Vec::new()); // as PEFT takes an empty list
    }
    if fields.flag("use_dora")? {
        return Err(Error::field(
            field,
            "can't be used with use_dora, nor does PEFT",
        ));
    }
    let tokens = fields.integers(field)?;
    if tokens.len() > MAX_INVOCATION_TOKENS {
        let reason = format!(
            "has {} tokens, limit is {MAX_INVOCATION_TOKENS}",
            tokens.len()
        );
        return Err(Error::field(field, reason));
    }
    let token_id = |token: i64| {
        let id = i32::try_from(token).ok().filter(|id| *id >= 0);
        id.ok_or_else(|| Error::field(field, format!("has {token}, which is no token id")))
    };
    tokens.into_iter().map(token_id).collect()
}
