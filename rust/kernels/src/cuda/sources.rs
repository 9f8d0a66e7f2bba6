//! The kernel sources, part of the binary.

/// One translation unit of `cuda/`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Source {
    LoraDecode,
    LoraPrefill,
    Norm,
    Activation,
    Rope,
    Attention,
    Sampling,
}

impl Source {
    pub const ALL: [Self; 7] = [
        Self::LoraDecode,
        Self::LoraPrefill,
        Self::Norm,
        Self::Activation,
        Self::Rope,
        Self::Attention,
        Self::Sampling,
    ];

    /// Its file in `cuda/`.
    pub fn file(self) -> &'static str {
        match self {
            Self::LoraDecode => "lora_decode.cu",
            Self::LoraPrefill => "lora_prefill.cu",
            Self::Norm => "norm.cu",
            Self::Activation => "activation.cu",
            Self::Rope => "rope.cu",
            Self::Attention => "attention.cu",
            Self::Sampling => "sampling.cu",
        }
    }

    /// Whether it is compiled for one head dimension.
    pub fn takes_head_dim(self) -> bool {
        matches!(self, Self::Rope | Self::Attention)
    }

    pub fn text(self) -> &'static str {
        match self {
            Self::LoraDecode => include_str!("../../../../cuda/lora_decode.cu"),
            Self::LoraPrefill => include_str!("../../../../cuda/lora_prefill.cu"),
            Self::Norm => include_str!("../../../../cuda/norm.cu"),
            Self::Activation => include_str!("../../../../cuda/activation.cu"),
            Self::Rope => include_str!("../../../../cuda/rope.cu"),
            Self::Attention => include_str!("../../../../cuda/attention.cu"),
            Self::Sampling => include_str!("../../../../cuda/sampling.cu"),
        }
    }
}

/// (name in `#include`, text) of what sources may include.
pub(super) const HEADERS: [(&str, &str); 7] = [
    ("storage.cuh", include_str!("../../../../cuda/storage.cuh")),
    (
        "adapter_table.cuh",
        include_str!("../../../../cuda/adapter_table.cuh"),
    ),
    (
        "attention_plan.cuh",
        include_str!("../../../../cuda/attention_plan.cuh"),
    ),
    (
        "attention_state.cuh",
        include_str!("../../../../cuda/attention_state.cuh"),
    ),
    ("lora.cuh", include_str!("../../../../cuda/lora.cuh")),
    (
        "sampling.cuh",
        include_str!("../../../../cuda/sampling.cuh"),
    ),
    (
        "sampling_select.cuh",
        include_str!("../../../../cuda/sampling_select.cuh"),
    ),
];
