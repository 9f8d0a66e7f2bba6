//! A model's forward pass, recorded once and run for every step, without a call from outside between
//! its ops.
//!
//! Activations are [T, width] and share one workspace: those that are needed at the same time lie
//! side by side in it, see `placement`. The residual, and what is added to it, are float32 whatever the storage
//! dtype: thirty layers of sums would be rounded to bfloat16 each time, and only norms read them.

mod placement;
mod record;
mod run;

use std::sync::Arc;

pub use self::record::Recording;
pub use self::run::{PartialSum, Program};
use super::gemm::Epilogue;
use super::linear::PackedLinear;

/// A tensor that outlives the program: an address and a number of elements.
#[derive(Clone, Copy)]
pub struct Constant {
    address: usize,
    len: usize,
}

impl Constant {
    /// # Safety
    /// `len` elements of the type the op takes live at `address` as long as the program, unchanged.
    pub unsafe fn new(address: usize, len: usize) -> Self {
        Self { address, len }
    }

    /// # Safety
    /// The elements are of type `T`, see `new`.
    unsafe fn get<T>(&self) -> &[T] {
        if self.len == 0 {
            return &[]; // an empty tensor has no address
        }
        // SAFETY: the caller of `new` guaranteed address and length, ours the type.
        unsafe { std::slice::from_raw_parts(self.address as *const T, self.len) }
    }
}

/// The result of an op: a name for [T, width].
#[derive(Clone, Copy)]
pub struct Activation {
    index: usize,
    width: usize,
}

impl Activation {
    pub fn width(&self) -> usize {
        self.width
    }
}

enum Op {
    /// Copies the rows of a tensor.
    Input { rows: Constant, out: Activation },
    Embedding {
        table: Arc<PackedLinear>,
        out: Activation,
    },
    /// residual += x first, if there is one.
    Norm {
        /// Among the norms, in the order they run.
        index: usize,
        x: Activation,
        residual: Option<Activation>,
        weight: Constant,
        eps: f32,
        out: Activation,
    },
    Linear {
        x: Activation,
        linear: Arc<PackedLinear>,
        layer: usize,
        group: usize,
        epilogue: Epilogue,
        out: Activation,
    },
    RopeAndCache {
        qkv: Activation,
        layer: usize,
        cos_sin: Constant,
        q_norm: Option<Constant>,
        k_norm: Option<Constant>,
        eps: f32,
    },
    Attention {
        qkv: Activation,
        layer: usize,
        out: Activation,
    },
    SiluMul {
        gate_up: Activation,
        out: Activation,
    },
    /// Waits until whoever runs the program has added what other ranks have of `x`, float32.
    AllReduce { x: Activation },
    /// Of the sampled rows, which are gathered to `rows`.
    Logits {
        hidden: Activation,
        lm_head: Arc<PackedLinear>,
        rows: Activation,
    },
    /// Copies `x` to the result.
    Output { x: Activation },
}

impl Op {
    /// Address and bytes of the weights that threads begin with, each with its share.
    fn first_weights(&self) -> Option<(usize, usize)> {
        match self {
            // Of gate where up follows.
            Op::Linear {
                linear, epilogue, ..
            } => Some((
                linear.address(),
                linear.nbytes() / epilogue.num_projections(),
            )),
            Op::Logits { lm_head, .. } => Some((lm_head.address(), lm_head.nbytes())),
            _ => None,
        }
    }

    /// Lets a linear that has just made `gate_up` store silu(gate)·up to `gated` instead; false where it
    /// can't, or is another op.
    fn gate(&mut self, gate_up: Activation, gated: Activation) -> bool {
        match self {
            Op::Linear {
                linear,
                epilogue,
                out,
                ..
            } if out.index == gate_up.index && Epilogue::SiluMul.check(linear).is_ok() => {
                *epilogue = Epilogue::SiluMul;
                *out = gated;
                true
            }
            _ => false,
        }
    }

    /// Whether it is the linear that has just made `x`.
    fn makes(&self, x: Activation) -> bool {
        matches!(self, Op::Linear { out, epilogue: Epilogue::Store, .. } if out.index == x.index)
    }

    /// Indices of what it reads or writes.
    fn activations(&self) -> Vec<usize> {
        let (some, other) = match self {
            Op::Input { out, .. } | Op::Embedding { out, .. } => ([Some(*out), None], None),
            Op::Norm {
                x, residual, out, ..
            } => ([Some(*x), Some(*out)], *residual),
            Op::Linear { x, out, .. } => ([Some(*x), Some(*out)], None),
            Op::RopeAndCache { qkv, .. } => ([Some(*qkv), None], None),
            Op::Attention { qkv, out, .. } => ([Some(*qkv), Some(*out)], None),
            Op::SiluMul { gate_up, out } => ([Some(*gate_up), Some(*out)], None),
            Op::Logits { hidden, rows, .. } => ([Some(*hidden), Some(*rows)], None),
            Op::AllReduce { x } | Op::Output { x } => ([Some(*x), None], None),
        };
        let all = some.into_iter().chain([other]).flatten();
        all.map(|activation| activation.index).collect()
    }
}
