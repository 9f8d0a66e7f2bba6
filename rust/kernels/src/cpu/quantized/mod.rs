//! Quantised weights in panels, and rows quantised to meet them.
//!
//! ```text
//! x[m, k] ≈ x_scale[m, k / 32] · a[m, k]            a in −127..=127, x_scale = max |x| / 127
//! y[m, n] = Σ over groups g of K, in their order, in f32:
//!           x_scale[m, g] · scale[n, g] · Σ a·(q − zero)     the inner sum in integers, exact
//!         + x_scale[m, g] · min[n, g] · Σ a
//! ```
//! A row's sums run in one order, whatever else is in the batch.

mod panels;
mod rows;

pub(super) use self::panels::{PanelRun, QuantizedPanels};
pub(super) use self::rows::{QuantizedRows, RowBytes, RowGroup};
