//! Panels of sixteen output features, as the products of bytes read them.
//!
//! ```text
//! panel    quants, scales, minimums where the format has them; each padded to 64 bytes
//! 8 bits   [K / 4 packs][16 columns][4]
//! 4 bits   [K / 8 pairs of packs][16 columns][4]      the earlier pack in the lower halves
//! scales, minimums: float16 [K / group][16 columns]   times the run's `unit`, a power of two
//! ```

use std::ops::Range;

use half::f16;

use crate::KernelError;
use crate::cpu::memory::{Arena, ArenaBytes};
use crate::cpu::simd::{LANES, PACK};
use crate::cpu::threads::{Shareable, ThreadPool};
use crate::error::check_length;
use crate::quantized::{QuantBits, QuantFormat, QuantizedWeight};

/// Where the exponent of a run's largest scale goes, below float16's largest.
const TOP_EXPONENT: i32 = 14;
/// Bounds of what scales are multiplied by, far within f32.
const MAX_SHIFT: i32 = 100;

/// The panels of one weight, which may be made of several with formats of their own.
pub struct QuantizedPanels {
    runs: Vec<PanelRun>,
    bytes: ArenaBytes,
}

/// Neighbouring panels of one format.
pub struct PanelRun {
    pub panels: Range<usize>,
    pub format: QuantFormat,
    pub num_groups: usize,
    /// What scales and minimums are multiplied by.
    pub unit: f32,
    /// Of the first panel.
    address: usize,
    quants_nbytes: usize,
    scales_nbytes: usize,
}

impl PanelRun {
    pub fn panel_nbytes(&self) -> usize {
        let mins_nbytes = if self.format.has_mins {
            self.scales_nbytes
        } else {
            0
        };
        self.quants_nbytes + self.scales_nbytes + mins_nbytes
    }

    /// Quants of panel `panel` of the weight.
    pub fn quants(&self, panel: usize) -> *const u8 {
        let index = panel - self.panels.start;
        (self.address + index * self.panel_nbytes()) as *const u8
    }

    /// Its scales.
    pub fn scales(&self, panel: usize) -> *const u16 {
        self.quants(panel).wrapping_add(self.quants_nbytes).cast()
    }

    /// Its minimums, where the format has them.
    pub fn mins(&self, panel: usize) -> *const u16 {
        let scales = self.scales(panel).cast::<u8>();
        scales.wrapping_add(self.scales_nbytes).cast()
    }

    /// Bytes of quants that a group has in a panel.
    fn group_nbytes(&self) -> usize {
        match self.format.bits {
            QuantBits::Four => self.format.group * LANES / 2,
            QuantBits::Eight => self.format.group * LANES,
        }
    }

    /// The weight at a column of `panel` and at `k`.
    ///
    /// # Safety
    /// The panel is the run's, `column < 16`, and k is below K.
    unsafe fn weight(&self, panel: usize, column: usize, k: usize) -> f32 {
        let (pack, i) = (k / PACK, k % PACK);
        let at = (k / self.format.group) * LANES + column;
        // SAFETY: the panel is as the file's first lines say.
        unsafe {
            let widened = |values: *const u16| f16::from_bits(*values.add(at)).to_f32();
            let q = match self.format.bits {
                QuantBits::Four => {
                    let byte = *self
                        .quants(panel)
                        .add((pack / 2 * LANES + column) * PACK + i);
                    i32::from(byte >> (pack % 2 * 4) & 15)
                }
                QuantBits::Eight => {
                    let byte = *self.quants(panel).add((pack * LANES + column) * PACK + i);
                    i32::from(byte.cast_signed())
                }
            };
            let scaled = widened(self.scales(panel)) * (q - self.format.zero()) as f32;
            let min = if self.format.has_mins {
                widened(self.mins(panel))
            } else {
                0.0
            };
            (scaled + min) * self.unit
        }
    }
}

impl QuantizedPanels {
    /// Packs `parts`, whose rows follow one another and whose K is the same; neighbours of one format share panels,
    /// others begin with panels of their own.
    pub fn pack(
        pool: &ThreadPool,
        arena: &Arena,
        parts: &[&QuantizedWeight],
    ) -> Result<Self, KernelError> {
        let in_features = parts.first().map_or(0, |part| part.in_features());
        for part in parts {
            check_length("a part's in_features", part.in_features(), in_features)?;
        }
        let by_format: Vec<_> = parts.chunk_by(|a, b| a.format() == b.format()).collect();
        let mut runs: Vec<PanelRun> = Vec::with_capacity(by_format.len());
        for (index, parts) in by_format.iter().enumerate() {
            let num_rows: usize = parts.iter().map(|part| part.out_features()).sum();
            if index + 1 < by_format.len() {
                let rest = num_rows % LANES;
                check_length("rows modulo 16 before another format", rest, 0)?;
            }
            let first = runs.last().map_or(0, |run| run.panels.end);
            let panels = first..first + num_rows.div_ceil(LANES);
            runs.push(layout(parts, panels, in_features));
        }
        let nbytes = |run: &PanelRun| run.panels.len() * run.panel_nbytes();
        let bytes = arena.take(runs.iter().map(nbytes).sum());
        let mut address = bytes.as_ptr::<u8>() as usize;
        for (run, parts) in runs.iter_mut().zip(&by_format) {
            run.address = address;
            address += nbytes(run);
            fill(pool, run, parts);
        }
        Ok(Self { runs, bytes })
    }

    pub fn runs(&self) -> &[PanelRun] {
        &self.runs
    }

    pub fn nbytes(&self) -> usize {
        self.bytes.nbytes()
    }

    /// Where the panels begin.
    pub fn address(&self) -> usize {
        self.bytes.as_ptr::<u8>() as usize
    }

    /// Bytes of the largest panel.
    pub fn panel_nbytes(&self) -> usize {
        let sizes = self.runs.iter().map(PanelRun::panel_nbytes);
        sizes.max().expect("a weight has panels")
    }

    /// The weights at k = 0, 1, … of row `index`, as they are multiplied.
    pub fn row(&self, index: usize, in_features: usize) -> impl Iterator<Item = f32> + '_ {
        let (panel, column) = (index / LANES, index % LANES);
        let run = self.runs.iter().find(|run| run.panels.contains(&panel));
        let run = run.expect("the row is the weight's, as whoever calls has checked");
        // SAFETY: panel, column and k are the run's.
        (0..in_features).map(move |k| unsafe { run.weight(panel, column, k) })
    }

    /// Panel `index` as f32 [K][16 columns], as it is multiplied.
    pub fn widened(&self, index: usize, in_features: usize) -> Vec<f32> {
        let mut panel = vec![0.0; in_features * LANES];
        for column in 0..LANES {
            let weights = self.row(index * LANES + column, in_features);
            for (lanes, weight) in panel.chunks_exact_mut(LANES).zip(weights) {
                lanes[column] = weight;
            }
        }
        panel
    }
}

/// A run without its address.
fn layout(parts: &[&QuantizedWeight], panels: Range<usize>, in_features: usize) -> PanelRun {
    let format = parts[0].format();
    let num_groups = in_features / format.group;
    let mut run = PanelRun {
        panels,
        format,
        num_groups,
        unit: unit(parts),
        address: 0,
        quants_nbytes: 0,
        scales_nbytes: (num_groups * LANES * size_of::<f16>()).next_multiple_of(64),
    };
    run.quants_nbytes = (num_groups * run.group_nbytes()).next_multiple_of(64);
    run
}

/// The power of two that the parts' scales are float16 multiples of, as exactly as those can be.
fn unit(parts: &[&QuantizedWeight]) -> f32 {
    let rows = parts
        .iter()
        .flat_map(|part| (0..part.out_features()).map(move |row| (part, row)));
    let values = rows.flat_map(|(part, row)| part.scales(row).iter().chain(part.mins(row)));
    let largest = values.fold(0.0_f32, |largest, value| largest.max(value.abs()));
    if largest == 0.0 {
        return 1.0;
    }
    let exponent = (largest.log2().floor() as i32 - TOP_EXPONENT).clamp(-MAX_SHIFT, MAX_SHIFT);
    (exponent as f32).exp2()
}

/// Writes the panels of a run, which are zeroed.
fn fill(pool: &ThreadPool, run: &PanelRun, parts: &[&QuantizedWeight]) {
    let rows: Vec<_> = parts
        .iter()
        .flat_map(|part| (0..part.out_features()).map(move |row| (*part, row)))
        .collect();
    let rows = &rows[..];
    let base = Shareable::from_ptr(run.address as *mut u8);
    pool.run(run.panels.len(), &|index| {
        let panel_rows = &rows[index * LANES..rows.len().min((index + 1) * LANES)];
        // SAFETY: each task writes its own panel, which the arena made this long.
        let panel = unsafe {
            let first = base.get().add(index * run.panel_nbytes());
            std::slice::from_raw_parts_mut(first, run.panel_nbytes())
        };
        let (quants, groups) = panel.split_at_mut(run.quants_nbytes);
        let (scales, mins) = groups.split_at_mut(run.scales_nbytes);
        for (column, (part, row)) in panel_rows.iter().enumerate() {
            fill_quants(run.format.bits, part.quants(*row), column, quants);
            fill_scales(run.unit, part.scales(*row), column, scales);
            fill_scales(run.unit, part.mins(*row), column, mins);
        }
    });
}

fn fill_quants(bits: QuantBits, row: &[u8], column: usize, quants: &mut [u8]) {
    for (k, &q) in row.iter().enumerate() {
        let (pack, i) = (k / PACK, k % PACK);
        match bits {
            QuantBits::Eight => quants[(pack * LANES + column) * PACK + i] = q,
            QuantBits::Four => {
                quants[(pack / 2 * LANES + column) * PACK + i] |= q << (pack % 2 * 4);
            }
        }
    }
}

fn fill_scales(unit: f32, row: &[f32], column: usize, scales: &mut [u8]) {
    for (group, scale) in row.iter().enumerate() {
        let at = (group * LANES + column) * size_of::<f16>();
        let bytes = f16::from_f32(scale / unit).to_le_bytes();
        scales[at..at + bytes.len()].copy_from_slice(&bytes);
    }
}
