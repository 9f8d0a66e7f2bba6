//! A model's forward pass, recorded once and run for every step, without a call from outside between
//! its ops.
//!
//! Activations are [T, width] and share one workspace: those that are needed at the same time lie
//! side by side in it, see `placement`.

use std::sync::{Arc, Mutex, PoisonError};

use super::activation::silu_mul;
use super::context::CpuContext;
use super::element::Element;
use super::gemm::is_gateable;
use super::linear::PackedLinear;
use super::memory::AlignedBytes;
use super::norm::rms_norm;
use super::rope::HeadTransform;
use super::step::Step;
use crate::KernelError;
use crate::error::check_length;

mod placement;

use placement::Placement;

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
    Embedding {
        table: Arc<PackedLinear>,
        out: Activation,
    },
    /// residual += x first, if there is one.
    Norm {
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
        out: Activation,
    },
    /// silu(gate)·up of a linear whose output nothing else takes.
    GatedLinear {
        x: Activation,
        linear: Arc<PackedLinear>,
        layer: usize,
        group: usize,
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
    /// Of the sampled rows, which are gathered to `rows`.
    Logits {
        hidden: Activation,
        lm_head: Arc<PackedLinear>,
        rows: Activation,
    },
}

/// Notes a model's ops in their order. Widths are checked here, layers and positions when ops run.
#[derive(Default)]
pub struct Recording {
    ops: Vec<Op>,
    widths: Vec<usize>,
}

impl Recording {
    pub fn embedding(&mut self, table: Arc<PackedLinear>) -> Activation {
        let out = self.activation(table.in_features());
        self.ops.push(Op::Embedding { table, out });
        out
    }

    /// `weight`: [width] of the storage dtype.
    pub fn norm(
        &mut self,
        x: Activation,
        residual: Option<Activation>,
        weight: Constant,
        eps: f32,
    ) -> Result<Activation, KernelError> {
        self.check(x)?;
        check_length("norm weight", weight.len, x.width)?;
        if let Some(residual) = residual {
            self.check(residual)?;
            check_length("residual's features", residual.width, x.width)?;
            if residual.index == x.index {
                let message = "a norm's x can't be its residual too";
                return Err(KernelError::Invalid(message.into()));
            }
        }
        let out = self.activation(x.width);
        self.ops.push(Op::Norm {
            x,
            residual,
            weight,
            eps,
            out,
        });
        Ok(out)
    }

    pub fn lora_linear(
        &mut self,
        x: Activation,
        linear: Arc<PackedLinear>,
        layer: usize,
        group: usize,
    ) -> Result<Activation, KernelError> {
        self.check(x)?;
        check_length("x's features", x.width, linear.in_features())?;
        let out = self.activation(linear.out_features());
        self.ops.push(Op::Linear {
            x,
            linear,
            layer,
            group,
            out,
        });
        Ok(out)
    }

    /// `cos_sin`: f32 [positions, D]; `q_norm`, `k_norm`: [D] of the storage dtype.
    pub fn rope_and_cache(
        &mut self,
        qkv: Activation,
        layer: usize,
        cos_sin: Constant,
        q_norm: Option<Constant>,
        k_norm: Option<Constant>,
        eps: f32,
    ) -> Result<(), KernelError> {
        self.check(qkv)?;
        self.ops.push(Op::RopeAndCache {
            qkv,
            layer,
            cos_sin,
            q_norm,
            k_norm,
            eps,
        });
        Ok(())
    }

    /// `width`: query heads times their dimension.
    pub fn attention(
        &mut self,
        qkv: Activation,
        layer: usize,
        width: usize,
    ) -> Result<Activation, KernelError> {
        self.check(qkv)?;
        let out = self.activation(width);
        self.ops.push(Op::Attention { qkv, layer, out });
        Ok(out)
    }

    /// Where a linear has just made `gate_up`, both become one op, and `gate_up` is gone.
    pub fn silu_mul(&mut self, gate_up: Activation) -> Result<Activation, KernelError> {
        self.check(gate_up)?;
        let width = gate_up.width / 2;
        check_length("gate_up's features", gate_up.width, 2 * width)?;
        let out = self.activation(width);
        let op = match self.ops.pop_if(|op| op.makes_gateable(gate_up)) {
            Some(Op::Linear {
                x,
                linear,
                layer,
                group,
                ..
            }) => {
                // Nobody else can take it any more.
                self.widths[gate_up.index] = 0;
                Op::GatedLinear {
                    x,
                    linear,
                    layer,
                    group,
                    out,
                }
            }
            _ => Op::SiluMul { gate_up, out },
        };
        self.ops.push(op);
        Ok(out)
    }

    /// Ends the program: its result is float32 [L, vocabulary].
    pub fn logits(
        mut self,
        hidden: Activation,
        lm_head: Arc<PackedLinear>,
    ) -> Result<Program, KernelError> {
        self.check(hidden)?;
        check_length("hidden's features", hidden.width, lm_head.in_features())?;
        let rows = self.activation(hidden.width);
        let vocab_size = lm_head.out_features();
        self.ops.push(Op::Logits {
            hidden,
            lm_head,
            rows,
        });
        Ok(Program {
            placement: Placement::new(&self.widths, self.ops.iter().map(Op::activations)),
            ops: self.ops,
            vocab_size,
            workspace: Mutex::new(AlignedBytes::zeroed(0)),
        })
    }

    /// Refuses an activation of another recording.
    fn check(&self, activation: Activation) -> Result<(), KernelError> {
        if self.widths.get(activation.index) == Some(&activation.width) {
            return Ok(());
        }
        let message = "activation was recorded elsewhere, or an op has taken it";
        Err(KernelError::Invalid(message.into()))
    }

    fn activation(&mut self, width: usize) -> Activation {
        self.widths.push(width);
        Activation {
            index: self.widths.len() - 1,
            width,
        }
    }
}

impl Op {
    /// Address and bytes of the weights that threads begin with, each with its share.
    fn first_weights(&self) -> Option<(usize, usize)> {
        match self {
            Op::Linear { linear, .. } => Some((linear.address(), linear.nbytes())),
            // Of gate; up follows.
            Op::GatedLinear { linear, .. } => Some((linear.address(), linear.nbytes() / 2)),
            Op::Logits { lm_head, .. } => Some((lm_head.address(), lm_head.nbytes())),
            _ => None,
        }
    }

    /// Whether it is a linear that makes `gate_up` and can take silu(gate)·up upon itself.
    fn makes_gateable(&self, gate_up: Activation) -> bool {
        match self {
            Op::Linear { linear, out, .. } => out.index == gate_up.index && is_gateable(linear),
            _ => false,
        }
    }

    /// Indices of what it reads or writes.
    fn activations(&self) -> Vec<usize> {
        let (some, other) = match self {
            Op::Embedding { out, .. } => ([Some(*out), None], None),
            Op::Norm {
                x, residual, out, ..
            } => ([Some(*x), Some(*out)], *residual),
            Op::Linear { x, out, .. } | Op::GatedLinear { x, out, .. } => {
                ([Some(*x), Some(*out)], None)
            }
            Op::RopeAndCache { qkv, .. } => ([Some(*qkv), None], None),
            Op::Attention { qkv, out, .. } => ([Some(*qkv), Some(*out)], None),
            Op::SiluMul { gate_up, out } => ([Some(*gate_up), Some(*out)], None),
            Op::Logits { hidden, rows, .. } => ([Some(*hidden), Some(*rows)], None),
        };
        let all = some.into_iter().chain([other]).flatten();
        all.map(|activation| activation.index).collect()
    }
}

/// A recorded forward pass. One step runs at a time; others wait.
pub struct Program {
    ops: Vec<Op>,
    placement: Placement,
    vocab_size: usize,
    workspace: Mutex<AlignedBytes>,
}

/// Where a step's activations are.
#[derive(Clone, Copy)]
struct Room<'a, E> {
    base: *mut E,
    placement: &'a Placement,
    num_tokens: usize,
}

impl<E: Element> Room<'_, E> {
    /// # Safety
    /// No other slice of this activation is in use.
    unsafe fn get<'a>(&self, activation: Activation) -> &'a mut [E] {
        let offset = self.placement.offset(activation.index) * self.num_tokens;
        // SAFETY: the workspace holds `num_columns` columns of `num_tokens` elements, and placement
        // keeps activations of one op apart.
        unsafe {
            let first = self.base.add(offset);
            std::slice::from_raw_parts_mut(first, activation.width * self.num_tokens)
        }
    }
}

impl Program {
    pub fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    /// Says what the next op with a weight reads; after the last one that is the next step's first.
    fn fetch_after(&self, index: usize, context: &CpuContext) {
        let mut following = self.ops[index + 1..].iter().chain(&self.ops);
        if let Some((address, nbytes)) = following.find_map(Op::first_weights) {
            context.pool.fetch_ahead(address, nbytes);
        }
    }

    /// Runs all ops for `step`; `logits` is [L, vocabulary]. `E` is the context's dtype.
    pub fn run<E: Element>(
        &self,
        context: &CpuContext,
        step: &Step,
        logits: &mut [f32],
    ) -> Result<(), KernelError> {
        let mut workspace = self
            .workspace
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let needed = self.placement.num_columns() * step.num_tokens() * size_of::<E>();
        if workspace.nbytes() < needed {
            // Gone first, so that the two never stand side by side; a quarter more, so that steps that
            // grow don't each allocate.
            *workspace = AlignedBytes::zeroed(0);
            *workspace = AlignedBytes::zeroed(needed + needed / 4);
        }
        let room = Room {
            base: workspace.as_mut_ptr::<E>(),
            placement: &self.placement,
            num_tokens: step.num_tokens(),
        };
        for (index, op) in self.ops.iter().enumerate() {
            if op.first_weights().is_some() {
                self.fetch_after(index, context);
            }
            // SAFETY: this op's activations are the only ones in use.
            unsafe { run_op(op, room, context, step, logits)? }
        }
        Ok(())
    }
}

/// # Safety
/// No activation of the room is in use elsewhere; `E` is the type of the op's constants.
unsafe fn run_op<E: Element>(
    op: &Op,
    room: Room<'_, E>,
    context: &CpuContext,
    step: &Step,
    logits: &mut [f32],
) -> Result<(), KernelError> {
    // SAFETY: an op's activations differ from each other, so their slices don't overlap; constants
    // are what `Constant::new` was promised.
    unsafe {
        match op {
            Op::Embedding { table, out } => context.embedding(step, table, room.get(*out)),
            Op::Norm {
                x,
                residual,
                weight,
                eps,
                out,
            } => {
                let residual = residual.map(|residual| room.get(residual));
                let (x, out) = (room.get(*x), room.get(*out));
                rms_norm(
                    &context.pool,
                    context.isa,
                    x,
                    residual,
                    weight.get(),
                    *eps,
                    out,
                )
            }
            Op::Linear {
                x,
                linear,
                layer,
                group,
                out,
            } => context.lora_linear(step, room.get(*x), linear, *layer, *group, room.get(*out)),
            Op::GatedLinear {
                x,
                linear,
                layer,
                group,
                out,
            } => {
                let (x, out) = (room.get(*x), room.get(*out));
                context.gated_lora_linear(step, x, linear, *layer, *group, out)
            }
            Op::RopeAndCache {
                qkv,
                layer,
                cos_sin,
                q_norm,
                k_norm,
                eps,
            } => {
                let transform = HeadTransform {
                    cos_sin: cos_sin.get(),
                    q_norm: q_norm.as_ref().map(|norm| norm.get()),
                    k_norm: k_norm.as_ref().map(|norm| norm.get()),
                    eps: *eps,
                };
                context.rope_and_cache(step, *layer, transform, room.get(*qkv))
            }
            Op::Attention { qkv, layer, out } => {
                context.attention(step, *layer, room.get(*qkv), room.get(*out))
            }
            Op::SiluMul { gate_up, out } => {
                let (gate_up, y) = (room.get(*gate_up), room.get(*out));
                silu_mul(&context.pool, context.isa, gate_up, out.width, y)
            }
            Op::Logits {
                hidden,
                lm_head,
                rows,
            } => {
                let rows = &mut room.get(*rows)[..step.num_logits() * rows.width];
                context.logits(step, room.get(*hidden), lm_head, rows, logits)
            }
        }
    }
}
