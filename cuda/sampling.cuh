// What sampling is defined by: a row's parameters, the order of its tokens and their weights.
//
// Weights are integers, so that their sums don't depend on who adds them in which order; f32 operations are
// single IEEE ones, never contracted. The CPU's sampler (rust/kernels/src/sampling) does the same, bit for bit.
#pragma once

using u64 = unsigned long long;

constexpr int MAX_LOGPROBS = 20;
constexpr unsigned ALL_LANES = 0xffffffffu;
constexpr double MAX_WEIGHT = 1 << 30;
constexpr u64 NO_POSITION = ~0ull;  // behind every token

// As `RowParams` of rust/kernels/src/sampling; ranges are start..end within the step's arrays.
struct RowParams {
    u64 bits;
    double top_p, min_p, typical_p;
    float temperature, repetition_penalty, presence_penalty, frequency_penalty;
    unsigned top_k;
    int mask, num_logprobs;  // -1: none
    unsigned seen[2], counted[2], biased[2], banned[2];
    unsigned unused;

    __device__ bool changes_logits() const {
        return mask >= 0 || seen[0] < seen[1] || counted[0] < counted[1] || biased[0] < biased[1] ||
               banned[0] < banned[1];
    }
};
static_assert(sizeof(RowParams) == 96, "RowParams must be as Rust has it");

// What one block of `scan_logits` found.
struct Partial {
    u64 first;                // position of its first token, logits changed
    float raw_max;            // of the logits as they came; NaN if one of them is
    float raw_sum;            // Σ exp(x - raw_max), where logprobs are asked for
    float raw_start, unused;  // the logit of its lowest id
};

// A row's logprobs, natural logarithms; as many of the top ones as were asked for and as there are tokens.
struct Logprobs {
    float chosen;
    int top_ids[MAX_LOGPROBS];
    float top[MAX_LOGPROBS];
};

__device__ __forceinline__ float infinity() {
    return __int_as_float(0x7f800000);
}

__device__ __forceinline__ bool is_finite(float x) {
    return fabsf(x) < infinity();
}

// Ascending where logits descend; -0 counts as +0.
__device__ __forceinline__ unsigned order_key(float x) {
    const unsigned bits = __float_as_uint(__fadd_rn(x, 0.0f));
    return bits >> 31 ? bits : ~bits & 0x7fffffffu;
}

__device__ __forceinline__ float logit_of_key(unsigned key) {
    return __uint_as_float(key >> 31 ? key : ~key & 0x7fffffffu);
}

// Ascending by key, then by id.
__device__ __forceinline__ u64 position_of(unsigned key, unsigned id) {
    return static_cast<u64>(key) << 32 | id;
}

__device__ __forceinline__ u64 min_of(u64 a, u64 b) {
    return a < b ? a : b;
}

// The logit a position was made of.
__device__ __forceinline__ float logit_of(u64 position) {
    return logit_of_key(static_cast<unsigned>(position >> 32));
}

// Four logits of a row of `len` from `id` on; beyond its end -∞.
__device__ __forceinline__ float4 load_logits(const float* row, int len, int id) {
    if (len % 4 == 0) {
        const float outside = -infinity();
        return id < len ? __ldcg(reinterpret_cast<const float4*>(row + id))
                        : make_float4(outside, outside, outside, outside);
    }
    float x[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        x[i] = id + i < len ? __ldcg(row + id + i) : -infinity();
    }
    return make_float4(x[0], x[1], x[2], x[3]);
}

// log2(e) in two parts, and 2^r for |r| ≤ 1/2 as 1 + r·(C0 + r·(C1 + …)).
constexpr float LOG2E = 0x1.715476p+0f, LOG2E_LOW = 0x1.4ae0c0p-26f;
__device__ constexpr float POW2[5] = {0x1.62e42ap-1f, 0x1.ebf9bcp-3f, 0x1.c6b752p-5f, 0x1.3cea88p-7f,
                                      0x1.5bba14p-10f};

// round(2^30 · e^y) for y ≤ 0, as an integer; 0 where y is below -23.
__device__ __forceinline__ unsigned weight_of(float y) {
    if (!(y >= -23.0f)) {
        return 0;
    }
    const float n = rintf(__fmul_rn(y, LOG2E));
    float r = __fmaf_rn(y, LOG2E, -n);
    r = __fmaf_rn(y, LOG2E_LOW, r);
    float p = POW2[4];
#pragma unroll
    for (int i = 3; i >= 0; --i) {
        p = __fmaf_rn(p, r, POW2[i]);
    }
    p = __fmaf_rn(p, r, 1.0f);
    const int exponent = 30 + __float2int_rn(n);
    return __float2int_rn(__int_as_float(__float_as_int(p) + (exponent << 23)));
}

// y · 2^16, rounded; -23 · 2^16 where y is lower.
__device__ __forceinline__ int scaled_exponent(float y) {
    return __float2int_rn(__fmul_rn(fmaxf(y, -23.0f), 65536.0f));
}
