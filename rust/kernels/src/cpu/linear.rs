//! A dense weight packed once for the GEMM kernel.
//!
//! ```text
//! bf16  [N/16 panels][K/2 packs][16 columns][2]      N and K padded with zeros
//! f32   [N/16 panels][K packs  ][16 columns]         either way a pack of a panel is 64 bytes
//! ```

use loraserve_adapters::StorageDtype;

use super::element::{Bf16, Element};
use super::memory::{Arena, ArenaBytes};
use super::simd::LANES;
use super::threads::{Shareable, ThreadPool};
use crate::KernelError;
use crate::error::{check_length, check_product};

/// W [out, in] in panels of 16 output features, with an optional bias.
pub struct PackedLinear {
    dtype: StorageDtype,
    in_features: usize,
    out_features: usize,
    panels: PanelBytes,
    /// Padded to whole panels.
    bias: Option<Vec<f32>>,
}

/// Where panels lie.
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
        Self {
            dtype,
            in_features,
            out_features,
            panels: PanelBytes::Elsewhere(address, num_elements * dtype.size()),
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
        let bias = bias.map(|bias| {
            let mut padded = bias.to_vec();
            padded.resize(num_panels * LANES, 0.0);
            padded
        });
        Ok(Self {
            dtype: E::DTYPE,
            in_features,
            out_features,
            panels: PanelBytes::Arena(panels),
            bias,
        })
    }

    pub fn dtype(&self) -> StorageDtype {
        self.dtype
    }

    pub fn in_features(&self) -> usize {
        self.in_features
    }

    pub fn out_features(&self) -> usize {
        self.out_features
    }

    pub fn nbytes(&self) -> usize {
        match &self.panels {
            PanelBytes::Arena(bytes) => bytes.nbytes(),
            PanelBytes::Elsewhere(_, nbytes) => *nbytes,
        }
    }

    /// Where the packed weights begin.
    pub(super) fn address(&self) -> usize {
        match &self.panels {
            PanelBytes::Arena(bytes) => bytes.as_ptr::<u8>() as usize,
            PanelBytes::Elsewhere(address, _) => *address,
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
            self.dtype == E::DTYPE,
            "packed weight has the kernel's dtype"
        );
        self.address() as *const E
    }

    /// Elements from one panel to the next.
    pub(super) fn panel_len<E: Element>(&self) -> usize {
        self.in_features.div_ceil(E::PACK) * E::PACK * LANES
    }

    /// Row `index` of W as it was before packing, into `row` [in].
    pub(super) fn unpack_row<E: Element>(&self, index: usize, row: &mut [E]) {
        let panel = index / LANES * self.panel_len::<E>();
        for (k, value) in row.iter_mut().enumerate() {
            let offset = panel + (k / E::PACK * LANES + index % LANES) * E::PACK + k % E::PACK;
            // SAFETY: index < out_features, as whoever calls has checked, and k < in_features.
            *value = unsafe { *self.panels::<E>().add(offset) };
        }
    }
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
pub fn embedding<E: Element>(
    pool: &ThreadPool,
    table: &PackedLinear,
    token_ids: &[i32],
    own: &[usize],
    out: &mut [E],
) -> Result<(), KernelError> {
    let hidden = table.in_features;
    check_length("embedding output", out.len(), token_ids.len() * hidden)?;
    let limit = table.out_features as i64;
    let has_own = |place: usize| own.binary_search(&place).is_ok();
    for (place, &id) in token_ids.iter().enumerate() {
        if id < 0 || i64::from(id) >= limit && !has_own(place) {
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
        table.unpack_row(token_ids[place] as usize, row);
    });
    Ok(())
}

/// Checks that the layout of `Bf16` is that of a u16, which the packing relies on.
const _: () = assert!(size_of::<Bf16>() == 2 && align_of::<Bf16>() == 2);
