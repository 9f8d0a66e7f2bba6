// RMSNorm of rows, optionally after adding to a residual.
//
//   residual[r] = round(residual[r] + x[r])         in place; the sum then stands for x
//   out[r]      = x[r] / √(mean(x[r]²) + eps) · weight
//
// Grid    num_rows
// Block   a thread per 16-byte vector of a row, at most 1024, which take up to four each
// Shared  a float per warp
#include "storage.cuh"

constexpr int MAX_ROUNDS = 4;
constexpr int MAX_WARPS = 32;

__device__ Pairs add(Pairs a, Pairs b) {
    Pairs sum;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        float2 x = unpack(a.pair[i]), y = unpack(b.pair[i]);
        sum.pair[i] = pack(x.x + y.x, x.y + y.y);
    }
    return sum;
}

__device__ float sum_of_squares(Pairs v) {
    float sum = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        float2 x = unpack(v.pair[i]);
        sum += x.x * x.x + x.y * x.y;
    }
    return sum;
}

__device__ Pairs scaled(Pairs v, float scale, Pairs weight) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        float2 x = unpack(v.pair[i]), w = unpack(weight.pair[i]);
        v.pair[i] = pack(x.x * scale * w.x, x.y * scale * w.y);
    }
    return v;
}

// The sum over the block, in one order; every thread gets it.
__device__ float block_sum(float value) {
    __shared__ float warp_sums[MAX_WARPS];
    for (int offset = 16; offset > 0; offset /= 2) {
        value += __shfl_xor_sync(0xffffffffu, value, offset);
    }
    if (threadIdx.x % 32 == 0) {
        warp_sums[threadIdx.x / 32] = value;
    }
    __syncthreads();
    float sum = 0;
    for (unsigned warp = 0; warp < blockDim.x / 32; ++warp) {
        sum += warp_sums[warp];
    }
    return sum;
}

// x, out [num_rows, num_vectors], residual the same or null; out may be x.
extern "C" __global__ void __launch_bounds__(1024)
    rms_norm(const Pairs* x, Pairs* residual, const Pairs* __restrict__ weight, Pairs* out,
             unsigned num_vectors, float eps) {
    const size_t row = static_cast<size_t>(blockIdx.x) * num_vectors;
    Pairs kept[MAX_ROUNDS];
    float sum = 0;
#pragma unroll
    for (int round = 0; round < MAX_ROUNDS; ++round) {
        const unsigned i = round * blockDim.x + threadIdx.x;
        if (i < num_vectors) {
            kept[round] = x[row + i];
            if (residual != nullptr) {
                kept[round] = add(kept[round], residual[row + i]);
                residual[row + i] = kept[round];
            }
            sum += sum_of_squares(kept[round]);
        }
    }
    const float num_features = 8.0f * num_vectors;
    const float scale = 1.0f / sqrtf(block_sum(sum) / num_features + eps);
#pragma unroll
    for (int round = 0; round < MAX_ROUNDS; ++round) {
        const unsigned i = round * blockDim.x + threadIdx.x;
        if (i < num_vectors) {
            out[row + i] = scaled(kept[round], scale, weight[i]);
        }
    }
}
