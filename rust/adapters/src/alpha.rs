//! Alphas that a file gives as tensors, a number a module, in place of the config's `lora_alpha`.

use std::collections::BTreeMap;

use half::{bf16, f16};
use safetensors::Dtype;

use crate::error::{Error, Result};
use crate::weights::{Source, Weights};

/// A tensor that says a module's alpha.
#[derive(Debug)]
pub(crate) struct StoredAlpha {
    pub(crate) tensor: String,
    pub(crate) alpha: f64,
}

/// Of modules, by PEFT's name of them.
pub(crate) type Alphas = BTreeMap<String, StoredAlpha>;

/// Reads them all.
pub(crate) fn read_alphas(
    weights: &mut Weights,
    sources: BTreeMap<String, Source>,
) -> Result<Alphas> {
    let mut buffer = Vec::new();
    let mut alphas = Alphas::new();
    for (module, source) in sources {
        if !matches!(source.info.shape[..], [] | [1]) {
            let reason = format!("its shape is {:?}, expected one number", source.info.shape);
            return Err(bad(source, reason));
        }
        let bytes = weights.read(&source, &mut buffer)?;
        let Some(alpha) = number(source.info.dtype, bytes) else {
            let reason = format!("its dtype is {}, expected a float", source.info.dtype);
            return Err(bad(source, reason));
        };
        let tensor = source.name;
        alphas.insert(module, StoredAlpha { tensor, alpha });
    }
    Ok(alphas)
}

/// That of a module without other tensors, if there is one.
pub(crate) fn refuse_unused(alphas: Alphas) -> Result<()> {
    match alphas.into_values().next() {
        Some(StoredAlpha { tensor, .. }) => Err(Error::Alpha {
            tensor,
            reason: "its module has no other tensors".into(),
        }),
        None => Ok(()),
    }
}

fn bad(source: Source, reason: String) -> Error {
    Error::Alpha {
        tensor: source.name,
        reason,
    }
}

fn number(dtype: Dtype, bytes: &[u8]) -> Option<f64> {
    Some(match dtype {
        Dtype::F64 => f64::from_le_bytes(bytes.try_into().ok()?),
        Dtype::F32 => f32::from_le_bytes(bytes.try_into().ok()?).into(),
        Dtype::F16 => f16::from_le_bytes(bytes.try_into().ok()?).into(),
        Dtype::BF16 => bf16::from_le_bytes(bytes.try_into().ok()?).into(),
        _ => return None,
    })
}
