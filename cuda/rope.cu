// Rotary embedding of q and k in place, and K and V to their pages.
//
//   x = round(x / √(mean(x²) + eps) · norm)                       per head of q and k, where there is a norm
//   (x₁, x₂) → (x₁·cos − x₂·sin, x₂·cos + x₁·sin)                 x₁, x₂: halves of the head
//   page(slot)[K, V][kv_head][slot % 16] = k, v                   slot -1: the row is padding and left alone
//
// A lane holds VALUES of x₁ and their partners of x₂; HEAD_LANES lanes hold a head.
// Grid    num_tokens, ⌈(num_heads + 2 · num_kv_heads) · HEAD_LANES / 128⌉
// Block   128 threads
// Shared  none
//
// -DHEAD_DIM: a multiple of 8 up to 256.
#include "storage.cuh"

constexpr int NUM_THREADS = 128;
constexpr int BLOCK_SIZE = 16;
constexpr int HALF = HEAD_DIM / 2;
constexpr int VALUES = HALF % 8 == 0 ? 8 : 4;
constexpr int NUM_PAIRS = VALUES / 2;

constexpr int power_of_two_from(int n) {
    return n <= 1 ? 1 : 2 * power_of_two_from((n + 1) / 2);
}
// A power of two, so that the head sums by shuffles; lanes past the half idle.
constexpr int HEAD_LANES = power_of_two_from(HALF / VALUES);
static_assert(HEAD_DIM % 8 == 0 && HEAD_DIM <= 256, "head_dim must be a multiple of 8 up to 256");

// What a lane moves at once: 16 bytes, or 8 where halves don't begin on 16.
struct alignas(4 * NUM_PAIRS) Vector {
    unsigned pair[NUM_PAIRS];
};

struct Head {
    Vector first, second;
};

__device__ float sum_of_squares(const Vector& v) {
    float sum = 0;
#pragma unroll
    for (int i = 0; i < NUM_PAIRS; ++i) {
        float2 x = unpack(v.pair[i]);
        sum += x.x * x.x + x.y * x.y;
    }
    return sum;
}

__device__ Vector scaled(Vector v, float scale, const Storage* weight) {
    const Vector w = *reinterpret_cast<const Vector*>(weight);
#pragma unroll
    for (int i = 0; i < NUM_PAIRS; ++i) {
        float2 x = unpack(v.pair[i]), y = unpack(w.pair[i]);
        v.pair[i] = pack(x.x * scale * y.x, x.y * scale * y.y);
    }
    return v;
}

// The mean over the head; all lanes of a warp call it, those that idle with zeros.
__device__ float mean_square(const Head& x) {
    float sum = sum_of_squares(x.first) + sum_of_squares(x.second);
#pragma unroll
    for (int offset = HEAD_LANES / 2; offset > 0; offset /= 2) {
        sum += __shfl_xor_sync(0xffffffffu, sum, offset);
    }
    return sum / HEAD_DIM;
}

// cos_sin: the lane's first cosine; its sines lie HALF behind.
__device__ Head rotated(Head x, const float* cos_sin) {
#pragma unroll
    for (int i = 0; i < NUM_PAIRS; i += 2) {
        const float4 cos4 = *reinterpret_cast<const float4*>(cos_sin + 2 * i);
        const float4 sin4 = *reinterpret_cast<const float4*>(cos_sin + HALF + 2 * i);
        const float2 cos[2] = {{cos4.x, cos4.y}, {cos4.z, cos4.w}},
                     sin[2] = {{sin4.x, sin4.y}, {sin4.z, sin4.w}};
#pragma unroll
        for (int j = 0; j < 2; ++j) {
            float2 a = unpack(x.first.pair[i + j]), b = unpack(x.second.pair[i + j]);
            x.first.pair[i + j] = pack(a.x * cos[j].x - b.x * sin[j].x, a.y * cos[j].y - b.y * sin[j].y);
            x.second.pair[i + j] = pack(b.x * cos[j].x + a.x * sin[j].x, b.y * cos[j].y + a.y * sin[j].y);
        }
    }
    return x;
}

// qkv [num_tokens, num_heads + 2 · num_kv_heads, HEAD_DIM]; cos_sin [positions, cosines then sines of HALF
// angles]; layer: K of kv head 0 of the layer in page 0; V of the layer follows its K; page_len in values.
extern "C" __global__ void __launch_bounds__(NUM_THREADS)
    rope_and_cache(Storage* qkv, Storage* layer, unsigned long long page_len,
                   const float* __restrict__ cos_sin, const Storage* __restrict__ q_norm,
                   const Storage* __restrict__ k_norm, const int* __restrict__ positions,
                   const int* __restrict__ slot_mapping, int num_heads, int num_kv_heads, float eps) {
    const int slot = slot_mapping[blockIdx.x];
    if (slot < 0) {
        return;
    }
    const int num_rows = num_heads + 2 * num_kv_heads;
    const int thread = blockIdx.y * NUM_THREADS + threadIdx.x;
    const int head = thread / HEAD_LANES, begin = thread % HEAD_LANES * VALUES;
    const bool is_active = head < num_rows && begin < HALF;
    Storage* row = qkv + (static_cast<size_t>(blockIdx.x) * num_rows + head) * HEAD_DIM + begin;

    Head x = {};
    if (is_active) {
        x.first = *reinterpret_cast<const Vector*>(row);
        x.second = *reinterpret_cast<const Vector*>(row + HALF);
    }
    const float scale = 1.0f / sqrtf(mean_square(x) + eps);
    if (!is_active) {
        return;
    }
    if (head < num_heads + num_kv_heads) {
        if (const Storage* norm = head < num_heads ? q_norm : k_norm) {
            x.first = scaled(x.first, scale, norm + begin);
            x.second = scaled(x.second, scale, norm + HALF + begin);
        }
        x = rotated(x, cos_sin + static_cast<size_t>(positions[blockIdx.x]) * HEAD_DIM + begin);
        *reinterpret_cast<Vector*>(row) = x.first;
        *reinterpret_cast<Vector*>(row + HALF) = x.second;
    }
    if (head >= num_heads) {
        // Heads of K, then of V: in qkv and in the page alike.
        Storage* block = layer + slot / BLOCK_SIZE * page_len;
        block += ((head - num_heads) * BLOCK_SIZE + slot % BLOCK_SIZE) * HEAD_DIM + begin;
        *reinterpret_cast<Vector*>(block) = x.first;
        *reinterpret_cast<Vector*>(block + HALF) = x.second;
    }
}
