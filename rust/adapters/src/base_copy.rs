//! Copies of the base model's embeddings that PEFT saves beside an adapter: left out where they say what the
//! base says, refused where they do not.

use std::collections::BTreeMap;

use blake3::Hasher;
use safetensors::Dtype;
use safetensors::tensor::TensorInfo;

use crate::config::Config;
use crate::error::{Error, Result};
use crate::layout::StorageDtype;
use crate::matrix::store;
use crate::pace::Bursts;
use crate::tensor_name::BASE_COPIES;
use crate::weights::{Source, Weights};

/// Bytes of a copy read at a time: a burst.
const PIECE_NBYTES: usize = 512 << 10;

/// A weight of the base model as it is stored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoredWeight {
    /// Rows, columns.
    pub shape: [usize; 2],
    /// `digest` of its bytes in the storage dtype.
    pub digest: String,
}

/// The base model's own weights that an adapter may carry copies of.
pub trait BaseWeights: Sync {
    /// The weight of `embed_tokens` or `lm_head`, or in words why it can't be had.
    fn stored(&self, module: &str) -> std::result::Result<StoredWeight, String>;
}

/// BLAKE3 of a weight's bytes, in hex.
pub fn digest(bytes: &[u8]) -> String {
    blake3::hash(bytes).to_hex().to_string()
}

/// A tensor that may be a copy.
pub(crate) struct BaseCopy {
    pub(crate) module: &'static str,
    source: Source,
}

/// Takes the possible copies out of a file's tensors.
pub(crate) fn take_copies(
    tensors: &mut BTreeMap<String, Source>,
    config: &Config,
) -> Result<Vec<BaseCopy>> {
    let mut copies = Vec::new();
    for (name, module) in BASE_COPIES {
        if let Some(source) = tensors.remove(*name) {
            copies.push(BaseCopy { module, source });
        }
    }
    let is_there = |path: &&String| copies.iter().any(|copy| path.ends_with(copy.module));
    match config.saved_modules.iter().find(|path| !is_there(path)) {
        Some(path) => Err(Error::field(
            "modules_to_save",
            format!("lists {path:?}, whose weight is not in the file under PEFT's name"),
        )),
        None => Ok(copies),
    }
}

impl BaseCopy {
    /// Compares with the base, both as they are stored.
    pub(crate) fn check(
        &self,
        weights: &mut Weights,
        storage: StorageDtype,
        base: Option<&dyn BaseWeights>,
        bursts: &mut Bursts<'_>,
    ) -> Result<()> {
        let base =
            base.ok_or_else(|| self.unchecked("the base's weights are not at hand".into()))?;
        let stored = base
            .stored(self.module)
            .map_err(|reason| self.unchecked(reason))?;
        self.check_shape(stored.shape)?;
        if self.digest(weights, storage, bursts)? != stored.digest {
            return Err(self.differs(format!("its values differ in {}", storage.name())));
        }
        Ok(())
    }

    fn check_shape(&self, [rows, columns]: [usize; 2]) -> Result<()> {
        let (dtype, shape) = (self.source.info.dtype, &self.source.info.shape);
        if !matches!(dtype, Dtype::F32 | Dtype::F16 | Dtype::BF16) {
            return Err(self.differs(format!("its dtype is {dtype}")));
        }
        match shape[..] {
            [own_rows, own_columns] if (own_rows, own_columns) == (rows, columns) => Ok(()),
            [own_rows, own_columns] if own_columns == columns => Err(self.differs(format!(
                "it has {own_rows} rows, the base {rows}, as when tokens are added for training"
            ))),
            _ => Err(self.differs(format!(
                "its shape is {shape:?}, the base's [{rows}, {columns}]"
            ))),
        }
    }

    fn digest(
        &self,
        weights: &mut Weights,
        storage: StorageDtype,
        bursts: &mut Bursts<'_>,
    ) -> Result<String> {
        let (mut hasher, mut buffer, mut stored) = (Hasher::new(), Vec::new(), Vec::new());
        for piece in self.pieces() {
            let bytes = weights.read(&piece, &mut buffer)?;
            store(piece.info.dtype, bytes, storage, &mut stored);
            hasher.update(&stored);
            bursts.advance(bytes.len());
        }
        Ok(hasher.finalize().to_hex().to_string())
    }

    /// The tensor's bytes, a piece at a time; a piece ends between elements.
    fn pieces(&self) -> impl Iterator<Item = Source> + use<'_> {
        let info = &self.source.info;
        let (start, end) = info.data_offsets;
        (start..end).step_by(PIECE_NBYTES).map(move |start| Source {
            info: TensorInfo {
                data_offsets: (start, end.min(start + PIECE_NBYTES)),
                ..info.clone()
            },
            ..self.source.clone()
        })
    }

    fn differs(&self, difference: String) -> Error {
        Error::CopyDiffers {
            tensor: self.source.name.clone(),
            module: self.module,
            difference,
        }
    }

    fn unchecked(&self, reason: String) -> Error {
        Error::CopyUnchecked {
            tensor: self.source.name.clone(),
            module: self.module,
            reason,
        }
    }
}
