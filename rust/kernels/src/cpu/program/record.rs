//! A forward pass being recorded.

use std::sync::Arc;

use super::{Activation, Constant, Op, Program};
use crate::KernelError;
use crate::cpu::gemm::Epilogue;
use crate::cpu::linear::PackedLinear;
use crate::error::check_length;

/// Notes a model's ops in their order. Widths are checked here, layers and positions when ops run.
#[derive(Default)]
pub struct Recording {
    ops: Vec<Op>,
    widths: Vec<usize>,
    /// Whether it is float32 whatever the storage dtype.
    is_wide: Vec<bool>,
}

impl Recording {
    /// `rows`: [T, width] of the storage dtype, as many as a step has tokens.
    pub fn input(&mut self, rows: Constant, width: usize) -> Activation {
        let out = self.activation(width);
        self.ops.push(Op::Input { rows, out });
        out
    }

    pub fn embedding(&mut self, table: Arc<PackedLinear>) -> Activation {
        let out = self.activation(table.in_features());
        self.is_wide[out.index] = true;
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
        self.check_made(x)?;
        check_length("norm weight", weight.len, x.width)?;
        if let Some(residual) = residual {
            self.check_made(residual)?;
            check_length("residual's features", residual.width, x.width)?;
            if residual.index == x.index {
                let message = "a norm's x can't be its residual too";
                return Err(KernelError::Invalid(message.into()));
            }
            if self.is_wide[residual.index] && self.ops.last().is_some_and(|op| op.makes(x)) {
                self.is_wide[x.index] = true;
            }
        }
        let out = self.activation(x.width);
        let norms = self.ops.iter().filter(|op| matches!(op, Op::Norm { .. }));
        self.ops.push(Op::Norm {
            index: norms.count(),
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
            epilogue: Epilogue::Store,
            out,
        });
        Ok(out)
    }

    /// `x`, which is the table's or what a linear has just made, is a part of a sum over ranks; it becomes float32.
    pub fn all_reduce(&mut self, x: Activation) -> Result<(), KernelError> {
        self.check_made(x)?;
        if self.ops.last().is_some_and(|op| op.makes(x)) {
            self.is_wide[x.index] = true;
        }
        if !self.is_wide[x.index] {
            let message = "only an embedding and what a linear has just made are summed over ranks";
            return Err(KernelError::Invalid(message.into()));
        }
        self.ops.push(Op::AllReduce { x });
        Ok(())
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
        if self.ops.last_mut().is_some_and(|op| op.gate(gate_up, out)) {
            // Nobody else can take it any more.
            self.widths[gate_up.index] = 0;
        } else {
            self.ops.push(Op::SiluMul { gate_up, out });
        }
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
        self.ops.push(Op::Logits {
            hidden,
            lm_head,
            rows,
        });
        Ok(Program::new(self.ops, &self.widths, self.is_wide))
    }

    /// Ends the program: its result is `x`, [T, width] of the storage dtype.
    pub fn output(mut self, x: Activation) -> Result<Program, KernelError> {
        self.check_made(x)?;
        self.ops.push(Op::Output { x });
        Ok(Program::new(self.ops, &self.widths, self.is_wide))
    }

    /// Refuses an activation of another recording, and one that is not of the storage dtype.
    fn check(&self, activation: Activation) -> Result<(), KernelError> {
        self.check_made(activation)?;
        if self.is_wide[activation.index] {
            let message = "activation is float32, only norms take it";
            return Err(KernelError::Invalid(message.into()));
        }
        Ok(())
    }

    /// Refuses an activation of another recording.
    fn check_made(&self, activation: Activation) -> Result<(), KernelError> {
        if self.widths.get(activation.index) == Some(&activation.width) {
            return Ok(());
        }
        let message = "activation was recorded elsewhere, or an op has taken it";
        Err(KernelError::Invalid(message.into()))
    }

    fn activation(&mut self, width: usize) -> Activation {
        self.widths.push(width);
        self.is_wide.push(false);
        Activation {
            index: self.widths.len() - 1,
            width,
        }
    }
}
