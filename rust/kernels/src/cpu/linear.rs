//! A weight packed once for the GEMM kernel: dense, or quantised (`quantized/panels.rs`).
//!
//! ```text
//! bf16  [N/16 panels][K/2 packs][16 columns][2]      N and K padded with zeros
//! f32   [N/16 panels][K packs  ][16 columns]         either way a pack of a panel is 64 bytes
//! ```

use loraserve_adapters::StorageDtype;

use super::element::{Bf16, Element};
use super::memory::{Arena, ArenaBytes};
use super::quantized::QuantizedPanels;
use super::simd::LANES;
use super::step::TokenRange;
use super::threads::{Shareable, ThreadPool};
use crate::KernelError;
use crate::error::{check_length, check_product};
use crate::quantized::QuantizedWeight;

/// W [out, in] in panels of 16 output features, with an optional bias.
pub struct PackedLinear {
    in_features: usize,
    out_features: usize,
    panels: Panels,
    /// Padded to whole panels.
    bias: Option<Vec<f32>>,
}

enum Panels {
    Dense(StorageDtype, PanelBytes),
    Quantized(QuantizedPanels),
}

/// Where dense panels lie.
enum PanelBytes {
    Arena(ArenaBytes),
    /// Address and bytes of what somebody else keeps.
    Elsewhere(usize, usize),
}

impl PackedLinear {
    /// The weight whose panels lie at `address`, without a bias.
    ///
    /// # Safety
    /// Whole panels of this shape, and what kernels may read beyond, are there as long as this is used.
    pub(super) unsafe fn at(
        address: usize,
        dtype: StorageDtype,
        in_features: usize,
        out_features: usize,
    ) -> Self {
        let num_elements =
            out_features.next_multiple_of(LANES) * in_features.next_multiple_of(dtype.pack());
        let panels = PanelBytes::Elsewhere(address, num_elements * dtype.size());
        Self {
            in_features,
            out_features,
            panels: Panels::Dense(dtype, panels),
            bias: None,
        }
    }

    /// Packs row-major `weight` [out, in].
    pub fn pack<E: Element>(
        pool: &ThreadPool,
        arena: &Arena,
        weight: &[E],
        bias: Option<&[f32]>,
        in_features: usize,
        out_features: usize,
    ) -> Result<Self, KernelError> {
        if in_features == 0 || out_features == 0 {
            let message = format!("weight is {out_features}x{in_features}, both must be positive");
            return Err(KernelError::Invalid(message));
        }
        let num_weights = check_product("weight", &[in_features, out_features])?;
        check_length("weight", weight.len(), num_weights)?;
        if let Some(bias) = bias {
            check_length("bias", bias.len(), out_features)?;
        }
        let num_panels = out_features.div_ceil(LANES);
        let panel_len = in_features.div_ceil(E::PACK) * E::PACK * LANES;
        let mut panels = arena.take(num_panels * panel_len * size_of::<E>());
        let dst = panels.as_mut_ptr::<E>();
        // SAFETY: the buffer was just made this long, zeroed, and zeros are valid elements.
        let dst = unsafe { std::slice::from_raw_parts_mut(dst, num_panels * panel_len) };
        let shared = Shareable::new(dst);
        pool.run(num_panels, &|panel| {
            // SAFETY: each task writes its own panel.
            let dst = unsafe {
                std::slice::from_raw_parts_mut(shared.get().add(panel * panel_len), panel_len)
            };
            pack_panel(&weight[panel * LANES * in_features..], in_features, dst);
        });
        Ok(Self {
            in_features,
            out_features,
            panels: Panels::Dense(E::DTYPE, PanelBytes::Arena(panels)),
            bias: bias.map(padded),
        })
    }

    /// Packs the rows of `parts`, one after another; see `QuantizedPanels::pack`.
    pub fn pack_quantized(
        pool: &ThreadPool,
        arena: &Arena,
        parts: &[&QuantizedWeight],
        bias: Option<&[f32]>,
    ) -> Result<Self, KernelError> {
        let Some(first) = parts.first() else {
            return Err(KernelError::Invalid("weight has no parts".into()));
        };
        let out_features = parts.iter().map(|part| part.out_features()).sum();
        if let Some(bias) = bias {
            check_length("bias", bias.len(), out_features)?;
        }
        Ok(Self {
            in_features: first.in_features(),
            out_features,
            panels: Panels::Quantized(QuantizedPanels::pack(pool, arena, parts)?),
            bias: bias.map(padded),
        })
    }

    /// What dense panels hold.
    pub(super) fn dense_dtype(&self) -> Option<StorageDtype> {
        match &self.panels {
            Panels::Dense(dtype, _) => Some(*dtype),
            Panels::Quantized(_) => None,
        }
    }

    /// The panels, where they are quantised.
    pub(super) fn quantized(&self) -> Option<&QuantizedPanels> {
        match &self.panels {
            Panels::Quantized(panels) => Some(panels),
            Panels::Dense(..) => None,
        }
    }

    pub fn in_features(&self) -> usize {
        self.in_features
    }

    pub fn out_features(&self) -> usize {
        self.out_features
    }

    pub fn nbytes(&self) -> usize {
        match &self.panels {
            Panels::Dense(_, PanelBytes::Arena(bytes)) => bytes.nbytes(),
            Panels::Dense(_, PanelBytes::Elsewhere(_, nbytes)) => *nbytes,
            Panels::Quantized(panels) => panels.nbytes(),
        }
    }

    /// Where the packed weights begin.
    pub(super) fn address(&self) -> usize {
        match &self.panels {
            Panels::Dense(_, PanelBytes::Arena(bytes)) => bytes.as_ptr::<u8>() as usize,
            Panels::Dense(_, PanelBytes::Elsewhere(address, _)) => *address,
            Panels::Quantized(panels) => panels.address(),
        }
    }

    /// Bytes of a panel, the largest where they differ.
    pub(super) fn panel_nbytes(&self) -> usize {
        match &self.panels {
            Panels::Dense(dtype, _) => {
                self.in_features.next_multiple_of(dtype.pack()) * LANES * dtype.size()
            }
            Panels::Quantized(panels) => panels.panel_nbytes(),
        }
    }

    pub(super) fn num_panels(&self) -> usize {
        self.out_features.div_ceil(LANES)
    }

    pub(super) fn bias(&self) -> Option<&[f32]> {
        self.bias.as_deref()
    }

    pub(super) fn panels<E: Element>(&self) -> *const E {
        assert!(
            matches!(self.panels, Panels::Dense(dtype, _) if dtype == E::DTYPE),
            "packed weight has the kernel's dtype"
        );
        self.address() as *const E
    }

    /// Where dense panel `index` begins.
    pub(super) fn panel<E: Element>(&self, index: usize) -> *const E {
        self.panels::<E>()
            .wrapping_add(index * self.panel_len::<E>())
    }

    /// Elements from one panel to the next.
    pub(super) fn panel_len<E: Element>(&self) -> usize {
        self.in_features.div_ceil(E::PACK) * E::PACK * LANES
    }

    /// Row `index` of W, of `E` where it is dense, as it was before packing or as it is multiplied, into `row` [in].
    pub(super) fn unpack_row<E: Element, O: Element>(&self, index: usize, row: &mut [O]) {
        if let Some(panels) = self.quantized() {
            for (value, weight) in row.iter_mut().zip(panels.row(index, self.in_features)) {
                *value = O::from_f32(weight);
            }
            return;
        }
        let panel = index / LANES * self.panel_len::<E>();
        for (k, value) in row.iter_mut().enumerate() {
            let offset = panel + (k / E::PACK * LANES + index % LANES) * E::PACK + k % E::PACK;
            // SAFETY: index < out_features, as whoever calls has checked, and k < in_features.
            let weight = unsafe { *self.panels::<E>().add(offset) };
            *value = O::from_f32(weight.to_f32());
        }
    }
}

/// Padded to whole panels.
fn padded(bias: &[f32]) -> Vec<f32> {
    let mut padded = bias.to_vec();
    padded.resize(bias.len().next_multiple_of(LANES), 0.0);
    padded
}

fn pack_panel<E: Element>(rows: &[E], in_features: usize, dst: &mut [E]) {
    for (column, row) in rows.chunks_exact(in_features).take(LANES).enumerate() {
        for (pack, values) in row.chunks(E::PACK).enumerate() {
            let start = (pack * LANES + column) * E::PACK;
            dst[start..start + values.len()].copy_from_slice(values);
        }
    }
}

/// Rows `token_ids` of the table, [T, in], straight from the packed weight; `own` are the places, ascending, of
/// tokens that have another row, and which stay.
pub fn embedding<E: Element, O: Element>(
    pool: &ThreadPool,
    table: &PackedLinear,
    (token_ids, tokens): (&[i32], TokenRange),
    own: &[usize],
    out: &mut [O],
) -> Result<(), KernelError> {
    let hidden = table.in_features;
    check_length("embedding output", out.len(), token_ids.len() * hidden)?;
    let limit = table.out_features as i64;
    let has_own = |place: usize| own.binary_search(&place).is_ok();
    for (place, &id) in token_ids.iter().enumerate() {
        let is_elsewhere = if id < 0 {
            tokens.first > 0
        } else {
            !tokens.is_last
        };
        let is_here = (0..limit).contains(&i64::from(id)) || (id >= 0 && has_own(place));
        if !is_here && !is_elsewhere {
            crate::error::check_below("token id", id.into(), limit)?;
        }
    }
    let shared = Shareable::new(out);
    pool.run(token_ids.len(), &|place| {
        if has_own(place) {
            return;
        }
        // SAFETY: each task writes its own row.
        let row =
            unsafe { std::slice::from_raw_parts_mut(shared.get().add(place * hidden), hidden) };
        match usize::try_from(token_ids[place]) {
            Ok(id) if id < table.out_features => table.unpack_row::<E, O>(id, row),
            _ => row.fill(O::from_f32(0.0)),
        }
    });
    Ok(())
}

/// Checks that the layout of `Bf16` is that of a u16, which the packing relies on.
const _: () = assert!(size_of::<Bf16>() == 2 && align_of::<Bf16>() == 2);
