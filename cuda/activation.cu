// SiLU of the gate times up.
//
//   out[r, i] = silu(gate_up[r, i]) · gate_up[r, intermediate + i]        silu(g) = g / (1 + e⁻ᵍ)
//
// Grid    num_rows, ⌈intermediate / 8 / 256⌉
// Block   256 threads, a 16-byte vector each
// Shared  none
#include "storage.cuh"

constexpr int NUM_THREADS = 256;

__device__ float silu(float gate) {
    return gate / (1.0f + __expf(-gate));
}

// gate_up [num_rows, 2, num_vectors], out [num_rows, num_vectors].
extern "C" __global__ void __launch_bounds__(NUM_THREADS)
    silu_mul(const Pairs* __restrict__ gate_up, Pairs* __restrict__ out, unsigned num_vectors) {
    const unsigned i = blockIdx.y * NUM_THREADS + threadIdx.x;
    if (i >= num_vectors) {
        return;
    }
    const size_t row = blockIdx.x;
    const Pairs gate = gate_up[2 * row * num_vectors + i];
    const Pairs up = gate_up[(2 * row + 1) * num_vectors + i];
    Pairs y;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
        float2 g = unpack(gate.pair[j]), u = unpack(up.pair[j]);
        y.pair[j] = pack(silu(g.x) * u.x, silu(g.y) * u.y);
    }
    out[row * num_vectors + i] = y;
}
