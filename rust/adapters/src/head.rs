//! A head to classify with that was trained with the adapter, and is saved in its file.
//!
//! ```text
//! logits [labels] = weight [labels, hidden] · hidden states of a token + bias [labels]
//! ```

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::bind::{check_dtype, check_vector};
use crate::config::Config;
use crate::content::ContentHash;
use crate::error::{Error, Result};
use crate::matrix::finite_values;
use crate::shape::BaseShape;
use crate::tensor_name::CLASSIFIERS;
use crate::weights::{Source, Weights};

const MAX_LABELS: usize = 1 << 16;
/// Of its weight in float32, as it is kept.
const MAX_NBYTES: usize = 64 << 20;

/// What a `TaskType` of PEFT reads a head named like these by: of one token each, not of a text.
const TASKS_OF_TOKENS: [&str; 2] = ["TOKEN_CLS", "QUESTION_ANS"];

/// Where a head lies in the file; its shapes are checked.
pub(crate) struct HeadSource {
    module: &'static str,
    weight: Source,
    bias: Option<Source>,
}

/// A head: float32, little-endian, row by row.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Head {
    /// `score` or `classifier`.
    pub module: &'static str,
    pub num_labels: usize,
    pub num_features: usize,
    /// `[num_labels, num_features]`
    pub weight: Arc<[u8]>,
    /// `[num_labels]`
    pub bias: Option<Arc<[u8]>>,
}

impl Head {
    /// Bytes of it in memory.
    pub fn nbytes(&self) -> usize {
        self.weight.len() + self.bias.as_ref().map_or(0, |bias| bias.len())
    }
}

/// Takes it out of a file's tensors.
pub(crate) fn take_head(
    tensors: &mut BTreeMap<String, Source>,
    config: &Config,
    shape: &BaseShape,
) -> Result<Option<HeadSource>> {
    let mut found: Option<HeadSource> = None;
    for module in CLASSIFIERS {
        let mut take = |part| tensors.remove(&format!("base_model.model.{module}.{part}"));
        let (weight, bias) = (take("weight"), take("bias"));
        let Some(weight) = weight else {
            match bias {
                Some(bias) => return Err(refuse(&bias, "its weight is not in the file")),
                None => continue,
            }
        };
        if let Some(first) = &found {
            let reason = format!("the file has {} too", first.weight.name);
            return Err(refuse(&weight, reason));
        }
        found = Some(HeadSource {
            module,
            weight,
            bias,
        });
    }
    let listed = config.saved_modules.iter();
    let listed = listed
        .map(String::as_str)
        .find(|path| CLASSIFIERS.contains(path));
    match (&found, listed) {
        (Some(head), _) => head.check(config, shape)?,
        (None, Some(module)) => {
            let reason = format!("lists {module:?}, whose weight is not in the file");
            return Err(Error::field("modules_to_save", reason));
        }
        (None, None) => {}
    }
    Ok(found)
}

impl HeadSource {
    fn check(&self, config: &Config, shape: &BaseShape) -> Result<()> {
        let weight = &self.weight;
        if let Some(task) = TASKS_OF_TOKENS
            .into_iter()
            .find(|task| config.task_type.as_deref() == Some(task))
        {
            let reason = format!("task_type is {task}, served are heads of whole texts, SEQ_CLS");
            return Err(refuse(weight, reason));
        }
        check_dtype(weight)?;
        let [num_labels, num_features] = weight.info.shape[..] else {
            let reason = format!(
                "its shape is {:?}, expected two dimensions",
                weight.info.shape
            );
            return Err(refuse(weight, reason));
        };
        let group = shape.group(0);
        let hidden = group.first().map_or(0, |(_, module)| module.in_features);
        if num_features != hidden {
            let reason = format!("it reads {num_features} features, the model has {hidden}");
            return Err(refuse(weight, reason));
        }
        if !(1..=MAX_LABELS).contains(&num_labels) {
            let reason = format!("it has {num_labels} labels, served are from 1 to {MAX_LABELS}");
            return Err(refuse(weight, reason));
        }
        let nbytes = num_labels * num_features * size_of::<f32>();
        if nbytes > MAX_NBYTES {
            let reason = format!("it takes {nbytes} bytes in float32, the limit is {MAX_NBYTES}");
            return Err(refuse(weight, reason));
        }
        match &self.bias {
            Some(bias) => check_vector(bias, num_labels),
            None => Ok(()),
        }
    }

    /// Tensors of the file that it is.
    pub(crate) fn num_tensors(&self) -> usize {
        1 + usize::from(self.bias.is_some())
    }

    /// Reads, checks and hashes it.
    pub(crate) fn read(&self, weights: &mut Weights, hash: &mut ContentHash) -> Result<Head> {
        let mut buffer = Vec::new();
        let mut values = |what: &str, source: &Source| {
            let bytes = weights.read(source, &mut buffer)?;
            hash.vector(what, source, bytes);
            let values = finite_values(source, bytes)?;
            let bytes = values.into_iter().flat_map(f32::to_le_bytes);
            Ok(bytes.collect::<Arc<[u8]>>())
        };
        let weight = values("weight of the head to classify with", &self.weight)?;
        let bias = self.bias.as_ref();
        let bias = bias.map(|bias| values("bias of the head to classify with", bias));
        Ok(Head {
            module: self.module,
            num_labels: self.weight.info.shape[0],
            num_features: self.weight.info.shape[1],
            weight,
            bias: bias.transpose()?,
        })
    }
}

fn refuse(source: &Source, reason: impl Into<String>) -> Error {
    Error::Head {
        tensor: source.name.clone(),
        reason: reason.into(),
    }
}
