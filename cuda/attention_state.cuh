// What attention knows of a tile's rows so far: a maximum, a sum and o, merged from split to split.
//
//   max' = max(max, m), sum' = sum·2^(max − max') + s·2^(m − max'), o alike       m, s, o of the next split
//
// Every merge rounds alike, whether its split was this block's or comes from another's through memory.
#pragma once

constexpr int V_STEPS = (HEAD_DIM + 63) / 64;
constexpr float NEVER = -3.402823466e38f;  // the score of a key that a row does not see

// What a thread keeps of the rows thread / 16 and thread / 16 + 8: columns 64e + 4·(thread % 16) ..+4 of o.
struct State {
    float max[2] = {NEVER, NEVER}, sum[2] = {0, 0};
    float o[V_STEPS][2][4] = {};
};

struct Factors {
    float kept, added;
};

__device__ int row_of_thread(int half) {
    return threadIdx.x / 16 + 8 * half;
}

__device__ int column_of_thread(int e) {
    return 64 * e + threadIdx.x % 16 * 4;
}

// 2^(x − max), 0 where there was no key.
__device__ float weight_of(float x, float max) {
    const float exponent = x - (max == NEVER ? 0.0f : max);
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(exponent));
    return y;
}

// Adds keys with `max` and `sum` to a row of the state; its o must follow by `merge_o`.
__device__ Factors merge_sum(State& state, int half, float max, float sum) {
    const float merged = fmaxf(state.max[half], max);
    const Factors factors = {weight_of(state.max[half], merged), weight_of(max, merged)};
    state.max[half] = merged;
    state.sum[half] = __fmaf_rn(sum, factors.added, __fmul_rn(state.sum[half], factors.kept));
    return factors;
}

__device__ void merge_o(float (&o)[4], Factors factors, float4 added) {
    o[0] = __fmaf_rn(added.x, factors.added, __fmul_rn(o[0], factors.kept));
    o[1] = __fmaf_rn(added.y, factors.added, __fmul_rn(o[1], factors.kept));
    o[2] = __fmaf_rn(added.z, factors.added, __fmul_rn(o[2], factors.kept));
    o[3] = __fmaf_rn(added.w, factors.added, __fmul_rn(o[3], factors.kept));
}

// Results of splits, until the last block merges them.
struct Partials {
    float* o;            // [rows, num_kv_heads, HEAD_DIM]
    float2* max_sum;     // [rows, num_kv_heads]
    unsigned* arrivals;  // [rows, num_kv_heads], zero between launches; a tile counts in its first row
    int num_kv_heads, kv_head;

    __device__ size_t index(int row) const {
        return static_cast<size_t>(row) * num_kv_heads + kv_head;
    }
};

// `first_row`: where the unit's rows begin in `partials`.
__device__ void store_partial(const Partials& partials, int first_row, int num_rows, const State& state) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int row = row_of_thread(half);
        if (row < num_rows) {
            const size_t index = partials.index(first_row + row);
            if (threadIdx.x % 16 == 0) {
                partials.max_sum[index] = make_float2(state.max[half], state.sum[half]);
            }
#pragma unroll
            for (int e = 0; e < V_STEPS; ++e) {
                const float (&o)[4] = state.o[e][half];
                if (column_of_thread(e) < HEAD_DIM) {
                    *reinterpret_cast<float4*>(partials.o + index * HEAD_DIM + column_of_thread(e)) =
                        make_float4(o[0], o[1], o[2], o[3]);
                }
            }
        }
    }
}

__device__ void merge_partial(const Partials& partials, int first_row, int num_rows, State& state) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int row = row_of_thread(half);
        if (row < num_rows) {
            const size_t index = partials.index(first_row + row);
            const float2 max_sum = __ldcg(partials.max_sum + index);
            const Factors factors = merge_sum(state, half, max_sum.x, max_sum.y);
#pragma unroll
            for (int e = 0; e < V_STEPS; ++e) {
                if (column_of_thread(e) < HEAD_DIM) {
                    const float* o = partials.o + index * HEAD_DIM + column_of_thread(e);
                    merge_o(state.o[e][half], factors, __ldcg(reinterpret_cast<const float4*>(o)));
                }
            }
        }
    }
}
