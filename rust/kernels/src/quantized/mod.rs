//! A quantised weight as all files' are brought to the kernels: W [N, K] in groups of columns that share a scale.
//!
//! ```text
//! w[n, k] = scale[n, k / group] · (q[n, k] − zero) + min[n, k / group]
//!
//! 4 bits: q in 0..=15, zero = 8 without mins and 0 with them
//! 8 bits: q in −128..=127, zero = 0
//! ```

mod fill;
pub mod ggml;
pub mod make;

use crate::KernelError;
use crate::error::{check_length, check_product};

/// Columns that share a scale, at most: larger groups of a file repeat theirs.
pub const MAX_GROUP: usize = 32;
/// The largest weight of 4 bits.
const MAX_NIBBLE: u8 = 15;

/// How a weight is quantised.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct QuantFormat {
    pub bits: QuantBits,
    /// Columns that share a scale: 16 or 32.
    pub group: usize,
    /// Whether groups have a minimum, too.
    pub has_mins: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum QuantBits {
    Four,
    Eight,
}

impl QuantFormat {
    /// What a value of `q` stands above, before scaling.
    pub fn zero(self) -> i32 {
        match self.bits {
            QuantBits::Four if !self.has_mins => 8,
            QuantBits::Four | QuantBits::Eight => 0,
        }
    }

    /// Refuses a weight [out, in] that is empty or has columns beside whole groups.
    fn check_shape(self, in_features: usize, out_features: usize) -> Result<(), KernelError> {
        if in_features == 0 || out_features == 0 {
            let message = format!("weight is {out_features}x{in_features}, both must be positive");
            return Err(KernelError::Invalid(message));
        }
        if !matches!(self.group, 16 | MAX_GROUP) || !in_features.is_multiple_of(self.group) {
            let message = format!(
                "quantised weight has {in_features} columns in groups of {}, expected whole groups of 16 or 32",
                self.group
            );
            return Err(KernelError::Invalid(message));
        }
        Ok(())
    }
}

/// A weight [N, K], one byte a value; packing makes it as small as it is.
#[derive(Clone, Debug, PartialEq)]
pub struct QuantizedWeight {
    format: QuantFormat,
    in_features: usize,
    out_features: usize,
    /// [N, K]; of 8 bits, the bytes of an i8.
    quants: Vec<u8>,
    /// [N, K / group]
    scales: Vec<f32>,
    /// [N, K / group], or nothing.
    mins: Vec<f32>,
}

impl QuantizedWeight {
    /// Refuses lengths and values that `format` does not have, and scales that are not finite; `mins` is empty where
    /// it has none.
    pub fn new(
        format: QuantFormat,
        in_features: usize,
        out_features: usize,
        quants: Vec<u8>,
        scales: Vec<f32>,
        mins: Vec<f32>,
    ) -> Result<Self, KernelError> {
        format.check_shape(in_features, out_features)?;
        let num_weights = check_product("weight", &[in_features, out_features])?;
        let num_groups = num_weights / format.group;
        check_length("quantised values", quants.len(), num_weights)?;
        check_length("scales", scales.len(), num_groups)?;
        let num_mins = if format.has_mins { num_groups } else { 0 };
        check_length("minimums", mins.len(), num_mins)?;
        if format.bits == QuantBits::Four && quants.iter().any(|&q| q > MAX_NIBBLE) {
            let message = "quantised weight of 4 bits has a value above 15";
            return Err(KernelError::Invalid(message.into()));
        }
        if !scales.iter().chain(&mins).all(|value| value.is_finite()) {
            let message = "quantised weight has a scale that is not finite";
            return Err(KernelError::Invalid(message.into()));
        }
        Ok(Self {
            format,
            in_features,
            out_features,
            quants,
            scales,
            mins,
        })
    }

    pub fn format(&self) -> QuantFormat {
        self.format
    }

    pub fn in_features(&self) -> usize {
        self.in_features
    }

    pub fn out_features(&self) -> usize {
        self.out_features
    }

    /// Values of row `index` [K], as bytes.
    pub fn quants(&self, index: usize) -> &[u8] {
        &self.quants[index * self.in_features..][..self.in_features]
    }

    /// Scales of row `index` [K / group].
    pub fn scales(&self, index: usize) -> &[f32] {
        let num_groups = self.in_features / self.format.group;
        &self.scales[index * num_groups..][..num_groups]
    }

    /// Minimums of row `index` [K / group], or nothing.
    pub fn mins(&self, index: usize) -> &[f32] {
        if !self.format.has_mins {
            return &[];
        }
        let num_groups = self.in_features / self.format.group;
        &self.mins[index * num_groups..][..num_groups]
    }

    /// Row `index` as the weights it stands for, into `row` [K].
    pub fn dequantize(&self, index: usize, row: &mut [f32]) {
        let (format, mins) = (self.format, self.mins(index));
        let groups = row.chunks_exact_mut(format.group);
        let quants = self.quants(index).chunks_exact(format.group);
        for (group, (values, quants)) in groups.zip(quants).enumerate() {
            let scale = self.scales(index)[group];
            let min = mins.get(group).copied().unwrap_or(0.0);
            for (value, &q) in values.iter_mut().zip(quants) {
                let q = match format.bits {
                    QuantBits::Four => i32::from(q),
                    QuantBits::Eight => i32::from(q.cast_signed()),
                };
                *value = scale * (q - format.zero()) as f32 + min;
            }
        }
    }
}
