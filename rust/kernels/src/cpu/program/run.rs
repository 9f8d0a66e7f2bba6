//! A recorded forward pass and its run over one step.

use std::ptr::NonNull;
use std::sync::{Mutex, PoisonError};

use super::placement::Placement;
use super::{Activation, Op};
use crate::KernelError;
use crate::cpu::activation::silu_mul;
use crate::cpu::context::CpuContext;
use crate::cpu::element::Element;
use crate::cpu::memory::AlignedBytes;
use crate::cpu::norm::rms_norm;
use crate::cpu::rope::HeadTransform;
use crate::cpu::step::CpuStep;
use crate::error::check_length;

/// A recorded forward pass. One step runs at a time; others wait.
pub struct Program {
    /// The last one makes the result.
    ops: Vec<Op>,
    placement: Placement,
    workspace: Mutex<AlignedBytes>,
}

/// Where a step's activations are.
#[derive(Clone, Copy)]
struct Buffers<'a, E> {
    base: *mut E,
    placement: &'a Placement,
    num_tokens: usize,
}

impl<E: Element> Buffers<'_, E> {
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
    /// `widths` are of all activations of the ops.
    pub(super) fn new(ops: Vec<Op>, widths: &[usize]) -> Self {
        Self {
            placement: Placement::new(widths, ops.iter().map(Op::activations)),
            ops,
            workspace: Mutex::new(AlignedBytes::zeroed(0)),
        }
    }

    /// Says what the next op with a weight reads; after the last one that is the next step's first.
    fn prefetch_after(&self, index: usize, context: &CpuContext) {
        let mut following = self.ops[index + 1..].iter().chain(&self.ops);
        if let Some((address, nbytes)) = following.find_map(Op::first_weights) {
            context.pool.prefetch(address, nbytes);
        }
    }

    /// Runs all ops for `step` and writes the result: float32 [L, vocabulary], or [T, width] of `E`.
    ///
    /// # Safety
    /// `E` is the context's dtype, and the result is writable and nobody else's meanwhile.
    pub unsafe fn run<E: Element>(
        &self,
        context: &CpuContext,
        step: &CpuStep,
        result: NonNull<u8>,
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
        let buffers = Buffers {
            base: workspace.as_mut_ptr::<E>(),
            placement: &self.placement,
            num_tokens: step.num_tokens(),
        };
        for (index, op) in self.ops.iter().enumerate() {
            if op.first_weights().is_some() {
                self.prefetch_after(index, context);
            }
            // SAFETY: this op's activations are the only ones in use.
            unsafe { run_op(op, buffers, context, step, result)? }
        }
        Ok(())
    }
}

/// # Safety
/// No activation of the buffers is in use elsewhere; `E` is the type of the op's constants; the result is
/// as `Program::run` says.
unsafe fn run_op<E: Element>(
    op: &Op,
    buffers: Buffers<'_, E>,
    context: &CpuContext,
    step: &CpuStep,
    result: NonNull<u8>,
) -> Result<(), KernelError> {
    // SAFETY: an op's activations differ from each other, so their slices don't overlap; constants
    // are what `Constant::new` was promised.
    unsafe {
        match op {
            Op::Input { rows, out } => {
                let (rows, out) = (rows.get(), buffers.get(*out));
                check_length("input", rows.len(), out.len())?;
                out.copy_from_slice(rows);
                Ok(())
            }
            Op::Embedding { table, out } => context.embedding(step, table, buffers.get(*out)),
            Op::Norm {
                index,
                x,
                residual,
                weight,
                eps,
                out,
            } => {
                let mut residual = residual.map(|residual| buffers.get(residual));
                let (x, out) = (buffers.get(*x), buffers.get(*out));
                rms_norm(
                    &context.pool,
                    context.isa,
                    x,
                    residual.as_deref_mut(),
                    weight.get(),
                    *eps,
                    out,
                )?;
                let sum = residual.as_deref().unwrap_or(x);
                context.own_norms(step, *index, sum, *eps, out)
            }
            Op::Linear {
                x,
                linear,
                layer,
                group,
                epilogue,
                out,
            } => {
                let (x, out) = (buffers.get(*x), buffers.get(*out));
                context.lora_linear(step, x, linear, *layer, *group, *epilogue, out)
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
                context.rope_and_cache(step, *layer, transform, buffers.get(*qkv))
            }
            Op::Attention { qkv, layer, out } => {
                context.attention(step, *layer, buffers.get(*qkv), buffers.get(*out))
            }
            Op::SiluMul { gate_up, out } => {
                let (gate_up, y) = (buffers.get(*gate_up), buffers.get(*out));
                silu_mul(&context.pool, context.isa, gate_up, out.width, y)
            }
            Op::Logits {
                hidden,
                lm_head,
                rows,
            } => {
                let rows = &mut buffers.get(*rows)[..step.num_logits() * rows.width];
                let len = step.num_logits() * step.num_columns(lm_head.out_features());
                let logits = std::slice::from_raw_parts_mut(result.cast().as_ptr(), len);
                context.logits(step, buffers.get(*hidden), lm_head, rows, logits)
            }
            Op::Output { x } => {
                let x = buffers.get(*x);
                std::ptr::copy_nonoverlapping(x.as_ptr(), result.cast().as_ptr(), x.len());
                Ok(())
            }
        }
    }
}
