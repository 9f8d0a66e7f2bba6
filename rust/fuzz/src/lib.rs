//! What every target is held to beside no panic: memory. Time is libFuzzer's to watch (`-timeout`).

use std::alloc::System;

use cap::Cap;
use loraserve_adapters::{BaseShape, ModuleShape};

/// Memory that one input may take; beyond, the allocator gives none, and the process aborts.
const LIMIT_NBYTES: usize = 100 << 20;

#[global_allocator]
static ALLOCATOR: Cap<System> = Cap::new(System, usize::MAX);

/// Runs one input within the limit.
pub fn bounded<T>(run: impl FnOnce() -> T) -> T {
    set_limit(ALLOCATOR.allocated() + LIMIT_NBYTES);
    let result = run();
    set_limit(usize::MAX);
    result
}

fn set_limit(nbytes: usize) {
    ALLOCATOR
        .set_limit(nbytes)
        .expect("invariant: a limit is above what is allocated");
}

/// The parts of an input, between bytes that no UTF-8 text has; text alone has one part.
pub fn parts(data: &[u8]) -> impl Iterator<Item = &[u8]> {
    data.split(|&byte| byte == 0xff)
}

/// Of a small Qwen2: hidden 16, kv 8, intermediate 24, two layers, biases of q, k and v.
///
/// # Panics
///
/// Never: the modules form a shape.
pub fn base() -> BaseShape {
    let modules = [
        ("self_attn.q_proj", 0, 16, 16, 0),
        ("self_attn.k_proj", 0, 16, 8, 16),
        ("self_attn.v_proj", 0, 16, 8, 24),
        ("self_attn.o_proj", 1, 16, 16, 0),
        ("mlp.gate_proj", 2, 16, 24, 0),
        ("mlp.up_proj", 2, 16, 24, 24),
        ("mlp.down_proj", 3, 24, 16, 0),
    ];
    let modules = modules.map(|(path, group, in_features, out_features, out_offset)| {
        let shape = ModuleShape {
            group,
            in_features,
            out_features,
            out_offset,
            has_bias: group == 0,
        };
        (path.to_string(), shape)
    });
    BaseShape::new(2, modules).expect("invariant: the modules form a shape")
}
