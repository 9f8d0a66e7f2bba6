//! A recorded forward pass and its run over one step.

use std::ptr::NonNull;
use std::sync::{Mutex, PoisonError};

use loraserve_adapters::StorageDtype;

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
    /// Of each activation, whether it is float32 whatever the storage dtype.
    is_wide: Vec<bool>,
    workspace: Mutex<AlignedBytes>,
}

/// Where a run stops for a sum over ranks.
#[derive(Clone, Copy, Debug)]
pub struct PartialSum {
    /// This rank's part: `len` f32 from `address` on, good until the program runs on.
    pub address: usize,
    pub len: usize,
    /// The op to go on with.
    pub next_op: usize,
}

/// Where a step's activations are.
#[derive(Clone, Copy)]
struct Buffers<'a, E> {
    base: *mut E,
    placement: &'a Placement,
    is_wide: &'a [bool],
    num_tokens: usize,
}

impl<E: Element> Buffers<'_, E> {
    /// One of `O`, which is f32 where it is wide and else `E`.
    ///
    /// # Safety
    /// No other slice of this activation is in use.
    unsafe fn get<'a, O: Element>(&self, activation: Activation) -> &'a mut [O] {
        let is_wide = self.is_wide(activation);
        let dtype = if is_wide {
            StorageDtype::Float32
        } else {
            E::DTYPE
        };
        assert!(dtype == O::DTYPE, "an activation is read as it was made");
        let offset = self.placement.offset(activation.index) * self.num_tokens;
        // SAFETY: the workspace holds `num_columns` columns of `num_tokens` elements, two for each of a wide
        // activation, and placement keeps activations of one op apart.
        unsafe {
            let first = self.base.add(offset).cast();
            std::slice::from_raw_parts_mut(first, activation.width * self.num_tokens)
        }
    }

    fn is_wide(&self, activation: Activation) -> bool {
        self.is_wide[activation.index]
    }
}

impl Program {
    /// `widths` are of all activations of the ops, as is `is_wide`.
    pub(super) fn new(ops: Vec<Op>, widths: &[usize], is_wide: Vec<bool>) -> Self {
        // Room for float32 beside the smallest storage dtype.
        let columns = widths.iter().zip(&is_wide);
        let columns: Vec<_> = columns
            .map(|(width, wide)| width << usize::from(*wide))
            .collect();
        Self {
            placement: Placement::new(&columns, ops.iter().map(Op::activations)),
            is_wide,
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

    /// Runs the ops for `step` from `first_op` on, up to the next sum over ranks, if there is one; all of them write the result: float32 [L, vocabulary] and beside it `hidden`, the rows that
    /// the step gives out, [H, width] of `E`; or [T, width] of `E`, where an activation is the output.
    ///
    /// # Safety
    /// `E` is the context's dtype, and both are writable and nobody else's meanwhile.
    pub unsafe fn run<E: Element>(
        &self,
        context: &CpuContext,
        step: &CpuStep,
        result: NonNull<u8>,
        hidden: NonNull<u8>,
        first_op: usize,
    ) -> Result<Option<PartialSum>, KernelError> {
        let mut workspace = self
            .workspace
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let needed = self.placement.num_columns() * step.num_tokens() * size_of::<E>();
        if workspace.nbytes() < needed {
            if first_op > 0 {
                let message = "a program goes on with the step that it began";
                return Err(KernelError::Invalid(message.into()));
            }
            // Gone first, so that the two never stand side by side; a quarter more, so that steps that
            // grow don't each allocate.
            *workspace = AlignedBytes::zeroed(0);
            *workspace = AlignedBytes::zeroed(needed + needed / 4);
        }
        let buffers = Buffers {
            base: workspace.as_mut_ptr::<E>(),
            placement: &self.placement,
            is_wide: &self.is_wide,
            num_tokens: step.num_tokens(),
        };
        for (index, op) in self.ops.iter().enumerate().skip(first_op) {
            if let Op::AllReduce { x } = op {
                // SAFETY: no op of this program runs.
                let part: &mut [f32] = unsafe { buffers.get(*x) };
                return Ok(Some(PartialSum {
                    address: part.as_mut_ptr() as usize,
                    len: part.len(),
                    next_op: index + 1,
                }));
            }
            if op.first_weights().is_some() {
                self.prefetch_after(index, context);
            }
            // SAFETY: this op's activations are the only ones in use.
            unsafe { run_op(op, buffers, context, step, (result, hidden))? }
        }
        Ok(None)
    }

    /// Logits of the rows `first..first + count` of those that a step gave out, of which `rows` has the hidden
    /// states, [count, width] of `E`: float32 [count, the step's columns].
    ///
    /// # Safety
    /// `E` is the context's dtype, the rows live meanwhile, and the result is writable and nobody else's.
    pub unsafe fn logits_of_hidden<E: Element>(
        &self,
        context: &CpuContext,
        step: &CpuStep,
        (first, count): (usize, usize),
        rows: NonNull<u8>,
        result: NonNull<u8>,
    ) -> Result<(), KernelError> {
        let Some(Op::Logits { lm_head, .. }) = self.ops.last() else {
            let message = "the program ends with an activation, it has no logits";
            return Err(KernelError::Invalid(message.into()));
        };
        let indices = &step.arrays.hidden_indices;
        let end = first.checked_add(count).filter(|end| *end <= indices.len());
        let Some(end) = end else {
            let message = format!("rows {first} + {count} of {} given out", indices.len());
            return Err(KernelError::Invalid(message));
        };
        let num_columns = step.num_columns(lm_head.out_features());
        // SAFETY: the caller's contract; the sizes are those promised.
        unsafe {
            let rows = std::slice::from_raw_parts(
                rows.cast::<E>().as_ptr(),
                count * lm_head.in_features(),
            );
            let logits =
                std::slice::from_raw_parts_mut(result.cast().as_ptr(), count * num_columns);
            context.logits(step, &indices[first..end], rows, lm_head, logits)
        }
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
    (result, given_out): (NonNull<u8>, NonNull<u8>),
) -> Result<(), KernelError> {
    // SAFETY: an op's activations differ from each other, so their slices don't overlap; constants
    // are what `Constant::new` was promised.
    unsafe {
        match op {
            Op::Input { rows, out } => {
                let (rows, out): (&[E], &mut [E]) = (rows.get(), buffers.get(*out));
                check_length("input", rows.len(), out.len())?;
                out.copy_from_slice(rows);
                Ok(())
            }
            Op::Embedding { table, out } => {
                context.embedding::<E, f32>(step, table, buffers.get(*out))
            }
            Op::Norm { x, residual, .. } => {
                match (buffers.is_wide(*x), residual.map(|r| buffers.is_wide(r))) {
                    (false, Some(true)) => run_norm::<E, E, f32>(op, buffers, context, step),
                    (true, Some(true)) => run_norm::<E, f32, f32>(op, buffers, context, step),
                    (true, _) => run_norm::<E, f32, E>(op, buffers, context, step),
                    (false, _) => run_norm::<E, E, E>(op, buffers, context, step),
                }
            }
            Op::Linear {
                x,
                linear,
                layer,
                group,
                epilogue,
                out,
            } => {
                let x: &mut [E] = buffers.get(*x);
                let (layer, group, epilogue) = (*layer, *group, *epilogue);
                if buffers.is_wide(*out) {
                    let out: &mut [f32] = buffers.get(*out);
                    return context.lora_linear(step, x, linear, layer, group, epilogue, out);
                }
                let out: &mut [E] = buffers.get(*out);
                context.lora_linear(step, x, linear, layer, group, epilogue, out)
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
                context.rope_and_cache::<E>(step, *layer, transform, buffers.get(*qkv))
            }
            Op::Attention { qkv, layer, out } => {
                context.attention::<E>(step, *layer, buffers.get(*qkv), buffers.get(*out))
            }
            Op::SiluMul { gate_up, out } => {
                let (gate_up, y): (&mut [E], &mut [E]) = (buffers.get(*gate_up), buffers.get(*out));
                silu_mul(&context.pool, context.isa, gate_up, out.width, y)
            }
            Op::Logits {
                hidden,
                lm_head,
                rows,
            } => {
                let (width, sampled) = (hidden.width, &step.arrays.logits_indices);
                let hidden = (&*buffers.get::<E>(*hidden), width);
                let len = step.num_hidden() * width;
                let given_out = std::slice::from_raw_parts_mut(given_out.cast().as_ptr(), len);
                context.gather(step, &step.arrays.hidden_indices, hidden, given_out)?;
                let rows = &mut buffers.get::<E>(*rows)[..sampled.len() * width];
                context.gather(step, sampled, hidden, rows)?;
                let len = sampled.len() * step.num_columns(lm_head.out_features());
                let logits = std::slice::from_raw_parts_mut(result.cast().as_ptr(), len);
                context.logits(step, sampled, rows, lm_head, logits)
            }
            Op::AllReduce { .. } => unreachable!("a run stops before it"),
            Op::Output { x } => {
                let result: *mut E = result.cast().as_ptr();
                if buffers.is_wide(*x) {
                    for (index, value) in buffers.get::<f32>(*x).iter().enumerate() {
                        result.add(index).write(E::from_f32(*value));
                    }
                    return Ok(());
                }
                let x = buffers.get::<E>(*x);
                std::ptr::copy_nonoverlapping(x.as_ptr(), result, x.len());
                Ok(())
            }
        }
    }
}

/// A norm of x in `X` and of a residual in `R`.
///
/// # Safety
/// As of `run_op`.
unsafe fn run_norm<E: Element, X: Element, R: Element>(
    op: &Op,
    buffers: Buffers<'_, E>,
    context: &CpuContext,
    step: &CpuStep,
) -> Result<(), KernelError> {
    let Op::Norm {
        index,
        x,
        residual,
        weight,
        eps,
        out,
    } = op
    else {
        unreachable!("only norms come here");
    };
    // SAFETY: the caller's contract.
    unsafe {
        let (pool, isa) = (&context.pool, context.isa);
        let (x, out): (&mut [X], &mut [E]) = (buffers.get(*x), buffers.get(*out));
        let Some(residual) = residual else {
            rms_norm(pool, isa, x, None::<&mut [R]>, weight.get(), *eps, out)?;
            return context.own_norms(step, *index, x, *eps, out);
        };
        let residual: &mut [R] = buffers.get(*residual);
        rms_norm(pool, isa, x, Some(&mut *residual), weight.get(), *eps, out)?;
        context.own_norms(step, *index, residual, *eps, out)
    }
}
