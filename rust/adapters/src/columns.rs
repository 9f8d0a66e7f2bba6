//! Gain and shift of a module's output columns, from what the adapter trained and the base has.
//!
//! ```text
//! y      = gain ⊙ (W·x + base_bias + Σ_waves weight·scale·B·(A·x)) + weight·shift
//! DoRA   gain = m / ‖W + scale·B·A‖ per row of W
//! shift  = (trained bias, or base_bias) - gain·base_bias + scale·(bias of B)
//! ```

use crate::base_linears::{BaseLinears, Delta};
use crate::bind::Binding;
use crate::error::{Error, Result};
use crate::factor::Pair;
use crate::matrix::Matrix;
use crate::pace::Bursts;
use crate::shape::ModuleShape;

/// Products of a row norm that take as long as reading a byte.
const PRODUCTS_PER_BYTE: usize = 8;

/// What one module's tensors hold, checked.
pub(crate) struct Tensors<'a> {
    /// A and B.
    pub(crate) factors: Option<(Matrix<'a>, Matrix<'a>)>,
    /// [out] each.
    pub(crate) b_bias: Option<Vec<f32>>,
    pub(crate) magnitude: Option<Vec<f32>>,
    pub(crate) bias: Option<Vec<f32>>,
}

/// [out] each; absent ones are 1 and 0.
pub(crate) struct Columns {
    pub(crate) gain: Option<Vec<f32>>,
    pub(crate) shift: Option<Vec<f32>>,
}

/// Whether a module of the base has a shift under this adapter.
pub(crate) fn has_shift(binding: &Binding, module: &ModuleShape) -> bool {
    let is_bias_scaled = binding.magnitude.is_some() && module.has_bias;
    binding.b_bias.is_some() || binding.bias.is_some() || is_bias_scaled
}

impl Columns {
    /// Asks `base` where the adapter's own tensors don't say all.
    pub(crate) fn of(
        binding: &Binding,
        tensors: &Tensors<'_>,
        factors: Option<&Pair<'_>>,
        module: &ModuleShape,
        base: Option<&dyn BaseLinears>,
        bursts: &mut Bursts<'_>,
    ) -> Result<Self> {
        let base = || {
            base.ok_or_else(|| Error::NoBase {
                reason: "no model is loaded".into(),
            })
        };
        let gain = match &tensors.magnitude {
            Some(magnitude) => {
                let factors = factors.expect("a module with a magnitude has A and B");
                let norms = row_norms(binding, factors, module, base()?, bursts)?;
                Some(gains(binding, magnitude, &norms)?)
            }
            None => None,
        };
        if !has_shift(binding, module) {
            return Ok(Self { gain, shift: None });
        }
        let mut shift = vec![0.0; module.out_features];
        if gain.is_some() || tensors.bias.is_some() {
            let rows = module.out_offset..module.out_offset + module.out_features;
            let bias = base()?.bias(binding.layer, module.group, rows);
            let bias = bias.map_err(|reason| Error::NoBase { reason })?;
            let trained = tensors.bias.as_ref().unwrap_or(&bias);
            for (column, shift) in shift.iter_mut().enumerate() {
                let gain = gain.as_ref().map_or(1.0, |gain| gain[column]);
                *shift = trained[column] - gain * bias[column];
            }
        }
        for (shift, b_bias) in shift.iter_mut().zip(tensors.b_bias.iter().flatten()) {
            *shift += binding.scale * b_bias;
        }
        let shift = Some(shift);
        Ok(Self { gain, shift })
    }
}

fn row_norms(
    binding: &Binding,
    factors: &Pair<'_>,
    module: &ModuleShape,
    base: &dyn BaseLinears,
    bursts: &mut Bursts<'_>,
) -> Result<Vec<f32>> {
    let (rank, in_features) = (binding.rank, module.in_features);
    let at = transposed(&factors.a.values(), in_features);
    let mut b = factors.b.values();
    for value in &mut b {
        *value *= binding.scale;
    }
    let rows_per_call = base.rows_per_call(in_features, rank).max(1);
    let mut norms = Vec::with_capacity(module.out_features);
    for b in b.chunks(rows_per_call * rank) {
        let first = module.out_offset + norms.len();
        let rows = first..first + b.len() / rank;
        let num_products = rows.len() * in_features * rank;
        let delta = Delta {
            layer: binding.layer,
            group: module.group,
            rows,
            rank,
            at: &at,
            b,
        };
        let some = base.row_norms(&delta);
        norms.extend(some.map_err(|reason| Error::NoBase { reason })?);
        bursts.advance(num_products / PRODUCTS_PER_BYTE);
    }
    Ok(norms)
}

fn transposed(matrix: &[f32], columns: usize) -> Vec<f32> {
    let rows = matrix.chunks_exact(columns);
    (0..columns)
        .flat_map(|column| rows.clone().map(move |row| row[column]))
        .collect()
}

fn gains(binding: &Binding, magnitude: &[f32], norms: &[f32]) -> Result<Vec<f32>> {
    let pairs = magnitude.iter().zip(norms);
    let gains: Vec<f32> = pairs.map(|(magnitude, norm)| magnitude / norm).collect();
    match gains.iter().position(|gain| !gain.is_finite()) {
        Some(index) => {
            let source = binding.magnitude.as_ref();
            let source = source.expect("a module with a magnitude has its tensor");
            Err(Error::Gain {
                tensor: source.name.clone(),
                index,
                magnitude: magnitude[index],
                norm: norms[index],
            })
        }
        None => Ok(gains),
    }
}
