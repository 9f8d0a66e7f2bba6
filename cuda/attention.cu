// Paged causal attention with grouped query heads: any number of query rows a sequence, over any context.
//
//   out[t, h] = Σ_k softmax_k(q[t, h]·K[k, h / G] / √D) · V[k, h / G]      k ≤ position of t
//
// G heads share a kv head. Rows come in tiles of 16, keys in splits of 256 (attention_plan.cuh), of which
// each of 4 warps takes every fourth block:
//
//   split   s = q·Kᵀ, max = max s, p = 2^(s − max), sum = Σ p, o = p·V       warps added in their order
//   row     splits merged in their order, out = o / sum
//
// Splits lie at fixed keys, so a row's bits depend on its own q, K and V only. One block takes a tile's
// splits one after another, or as many blocks take one each and the last to finish merges them: both round
// alike.
//
// K and V fragments come straight from global memory, 16 bytes a lane. With lane = 4·g + t:
//   q·Kᵀ    K[key g][32c + 8t ..+8] is b of two mmas: its pairs 0 and 1, then 2 and 3; q is loaded alike
//   p·V     V[keys 2t, 2t + 1, 2t + 8, 2t + 9][64e + 8g ..+8] is b of eight: mma j has columns 64e + 8n + j
//
// Grid    any: blocks loop over (unit, kv head)
// Block   128 threads
// Shared  `Shared`, 21 to 27 KiB, and two ints per sequence for `Plan`
//
// -DHEAD_DIM: a multiple of 8 up to 256.
#include "storage.cuh"
#include "attention_plan.cuh"
#include "attention_state.cuh"

constexpr int NUM_WARPS = 4;
constexpr int NUM_THREADS = 32 * NUM_WARPS;
constexpr int BLOCK_SIZE = 16;
constexpr int WARP_BLOCKS = SPLIT_KEYS / BLOCK_SIZE / NUM_WARPS;
constexpr int K_STEPS = (HEAD_DIM + 31) / 32;
constexpr int O_PITCH = 64 + 8;  // floats; keeps neighbouring rows of `Shared::o` on banks of their own
static_assert(HEAD_DIM % 8 == 0 && HEAD_DIM <= 256, "head_dim must be a multiple of 8 up to 256");

// The tile at hand, for one kv head.
struct Tile {
    const Storage* k;  // the head's block in page 0
    const Storage* v;
    unsigned long long page_len;
    const int* block_table;
    int num_rows, num_keys;      // keys: of the last row
    int first_row, keys_before;  // row r of the sequence sees keys_before + r / group_size keys
    int first_query, first_head, group_size;

    // Where a row's head begins in q or out.
    __device__ size_t offset(int row, int heads_of_token) const {
        const size_t query = first_query + (first_row + row) / group_size;
        return (query * heads_of_token + first_head + (first_row + row) % group_size) * HEAD_DIM;
    }
    __device__ int keys_of_row(int row) const {
        return keys_before + (first_row + row) / group_size;
    }
};

struct Shared {
    Pairs q[K_STEPS][2][32];                 // as lanes take it: row g, then row g + 8
    float o[NUM_WARPS][TILE_ROWS][O_PITCH];  // 64 columns of every warp, see `swizzled`
    float max[NUM_WARPS][TILE_ROWS], sum[NUM_WARPS][TILE_ROWS];
    Unit unit;
    Tile tile;
    bool is_last;
};

// 16 bytes that don't change during the kernel, or zeros.
__device__ Pairs load_if(bool is_valid, const Storage* address) {
    Pairs v;
    asm("{ .reg .pred p; setp.ne.u32 p, %5, 0; mov.b32 %0, 0; mov.b32 %1, 0; mov.b32 %2, 0; mov.b32 %3, 0;\n"
        "@p ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4]; }"
        : "=&r"(v.pair[0]), "=&r"(v.pair[1]), "=&r"(v.pair[2]), "=&r"(v.pair[3])
        : "l"(address), "r"(static_cast<unsigned>(is_valid)));
    return v;
}

// Where 4 columns of a row of `Shared::o` lie: lanes t and t + 2 store at once, 8 of these apart.
__device__ int swizzled(int chunk) {
    return 4 * (chunk ^ (chunk >> 3 & 1));
}

// Value j of two keys as a pair.
__device__ unsigned key_pair(const Pairs& first, const Pairs& second, int j) {
    return __byte_perm(first.pair[j / 2], second.pair[j / 2], j % 2 == 0 ? 0x5410 : 0x7632);
}

// First key of the warp's block i of a split.
__device__ int first_key(int split, int i) {
    return split * SPLIT_KEYS + (i * NUM_WARPS + threadIdx.x / 32) * BLOCK_SIZE;
}

// Pages of the warp's blocks of a split, 0 for those past the tile's keys.
struct Pages {
    int of[WARP_BLOCKS];
};

__device__ Pages pages_of(const Tile& tile, int split) {
    Pages pages;
#pragma unroll
    for (int i = 0; i < WARP_BLOCKS; ++i) {
        const int key = first_key(split, i);
        pages.of[i] = key < tile.num_keys ? tile.block_table[key / BLOCK_SIZE] : 0;
    }
    return pages;
}

// s [block][8 keys][c of an mma] = q·Kᵀ of the warp's blocks.
__device__ void multiply_k(const Shared& shared, int split, const Pages& pages,
                           float (&s)[WARP_BLOCKS][2][4]) {
    const Tile& tile = shared.tile;
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
#pragma unroll 2
    for (int c = 0; c < K_STEPS; ++c) {
        const int column = 32 * c + 8 * t;
        Pairs k[WARP_BLOCKS][2];
#pragma unroll
        for (int i = 0; i < WARP_BLOCKS; ++i) {
            const Storage* block = tile.k + pages.of[i] * tile.page_len;
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                const int token = 8 * j + g;
                const bool is_valid = first_key(split, i) + token < tile.num_keys && column < HEAD_DIM;
                k[i][j] = load_if(is_valid, block + token * HEAD_DIM + column);
            }
        }
        const Pairs top = shared.q[c][0][lane], bottom = shared.q[c][1][lane];
#pragma unroll
        for (int n = 0; n < 4; n += 2) {
            const unsigned a[4] = {top.pair[n], bottom.pair[n], top.pair[n + 1], bottom.pair[n + 1]};
#pragma unroll
            for (int i = 0; i < WARP_BLOCKS; ++i) {
                mma_16x8x16(s[i][0], a, k[i][0].pair[n], k[i][0].pair[n + 1]);
                mma_16x8x16(s[i][1], a, k[i][1].pair[n], k[i][1].pair[n + 1]);
            }
        }
    }
}

__device__ float max_of_warps(const Shared& shared, int row) {
    float max = NEVER;
#pragma unroll
    for (int warp = 0; warp < NUM_WARPS; ++warp) {
        max = fmaxf(max, shared.max[warp][row]);
    }
    return max;
}

__device__ float sum_of_warps(const Shared& shared, int row) {
    float sum = 0;
#pragma unroll
    for (int warp = 0; warp < NUM_WARPS; ++warp) {
        sum += shared.sum[warp][row];
    }
    return sum;
}

// s -> p, as fragments a of p·V; the warp's sums go to `shared`. Every warp uses the split's maxima.
__device__ void softmax(Shared& shared, int split, float scale_log2, float (&s)[WARP_BLOCKS][2][4],
                        unsigned (&p)[WARP_BLOCKS][4]) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int row = g + 8 * half, num_keys = shared.tile.keys_of_row(row);
        float max = NEVER;
#pragma unroll
        for (int n = 0; n < 4 * WARP_BLOCKS; ++n) {
            float& score = s[n / 4][n / 2 % 2][2 * half + n % 2];
            const int key = first_key(split, n / 4) + n / 2 % 2 * 8 + 2 * t + n % 2;
            score = key < num_keys ? score * scale_log2 : NEVER;
            max = fmaxf(max, score);
        }
        max = fmaxf(max, __shfl_xor_sync(0xffffffffu, max, 1));
        max = fmaxf(max, __shfl_xor_sync(0xffffffffu, max, 2));
        if (t == 0) {
            shared.max[warp][row] = max;
        }
    }
    __syncthreads();
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int row = g + 8 * half;
        const float max = max_of_warps(shared, row);
        float sum = 0;
#pragma unroll
        for (int n = 0; n < 2 * WARP_BLOCKS; ++n) {
            const float* pair = s[n / 2][n % 2] + 2 * half;
            const float first = weight_of(pair[0], max), second = weight_of(pair[1], max);
            sum += first + second;
            p[n / 2][n % 2 * 2 + half] = pack(first, second);
        }
        sum += __shfl_xor_sync(0xffffffffu, sum, 1);
        sum += __shfl_xor_sync(0xffffffffu, sum, 2);
        if (t == 0) {
            shared.sum[warp][row] = sum;
        }
    }
}

__device__ void load_v(const Tile& tile, int split, const Pages& pages, int e, Pairs (&v)[WARP_BLOCKS][4]) {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int column = 64 * e + 8 * g;
#pragma unroll
    for (int i = 0; i < WARP_BLOCKS; ++i) {
        const Storage* block = tile.v + pages.of[i] * tile.page_len;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const int token = j / 2 * 8 + 2 * t + j % 2;
            const bool is_valid = first_key(split, i) + token < tile.num_keys && column < HEAD_DIM;
            v[i][j] = load_if(is_valid, block + token * HEAD_DIM + column);
        }
    }
}

// 64 columns of p·V over the warp's blocks, to `shared`.
__device__ void multiply_v(Shared& shared, const unsigned (&p)[WARP_BLOCKS][4],
                           const Pairs (&v)[WARP_BLOCKS][4]) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    float o[8][4] = {};
#pragma unroll
    for (int i = 0; i < WARP_BLOCKS; ++i) {
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            mma_16x8x16(o[j], p[i], key_pair(v[i][0], v[i][1], j), key_pair(v[i][2], v[i][3], j));
        }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int row = g + 8 * half;
        if (row < shared.tile.num_rows) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int j = i % 2 * 4, n = 2 * half + i / 2;
                *reinterpret_cast<float4*>(shared.o[warp][row] + swizzled(4 * t + i)) =
                    make_float4(o[j][n], o[j + 1][n], o[j + 2][n], o[j + 3][n]);
            }
        }
    }
}

__device__ float4 o_of_warps(const Shared& shared, int row) {
    float4 o = {0, 0, 0, 0};
#pragma unroll
    for (int warp = 0; warp < NUM_WARPS; ++warp) {
        const float4 x = *reinterpret_cast<const float4*>(shared.o[warp][row] + swizzled(threadIdx.x % 16));
        o = make_float4(o.x + x.x, o.y + x.y, o.z + x.z, o.w + x.w);
    }
    return o;
}

__device__ void attend_split(Shared& shared, int split, float scale_log2, State& state) {
    const Pages pages = pages_of(shared.tile, split);
    float s[WARP_BLOCKS][2][4] = {};
    unsigned p[WARP_BLOCKS][4];
    Pairs v[WARP_BLOCKS][4];
    multiply_k(shared, split, pages, s);
    load_v(shared.tile, split, pages, 0, v);
    softmax(shared, split, scale_log2, s, p);
    Factors factors[2];
#pragma unroll
    for (int e = 0; e < V_STEPS; ++e) {
        multiply_v(shared, p, v);
        if (e + 1 < V_STEPS) {
            load_v(shared.tile, split, pages, e + 1, v);
        }
        __syncthreads();
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int row = row_of_thread(half);
            if (row < shared.tile.num_rows) {
                if (e == 0) {
                    factors[half] =
                        merge_sum(state, half, max_of_warps(shared, row), sum_of_warps(shared, row));
                }
                merge_o(state.o[e][half], factors[half], o_of_warps(shared, row));
            }
        }
        __syncthreads();
    }
}

// Counts the calling block among `num_blocks`; true in the last, which then sees what the others wrote.
__device__ bool arrives_last(Shared& shared, unsigned* arrivals, unsigned num_blocks) {
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
        shared.is_last = atomicAdd(arrivals, 1) + 1 == num_blocks;
        if (shared.is_last) {
            *arrivals = 0;
        }
        __threadfence();
    }
    __syncthreads();
    return shared.is_last;
}

// Stores the split's state; in the last of the tile's splits to finish, merges them all and returns true.
__device__ bool merges_splits(Shared& shared, const Partials& partials, State& state) {
    const Unit& unit = shared.unit;
    const int num_rows = shared.tile.num_rows;
    store_partial(partials, unit.first_partial + unit.first_split * unit.partial_rows, num_rows, state);
    if (!arrives_last(shared, partials.arrivals + partials.index(unit.first_partial), unit.num_splits)) {
        return false;
    }
    state = State();
    for (int split = 0; split < unit.num_splits; ++split) {
        merge_partial(partials, unit.first_partial + split * unit.partial_rows, num_rows, state);
    }
    return true;
}

__device__ void load_q(Shared& shared, const Storage* qkv, int heads_of_token) {
    for (int i = threadIdx.x; i < K_STEPS * 64; i += NUM_THREADS) {
        const int c = i / 64, half = i / 32 % 2, lane = i % 32;
        const int row = lane / 4 + 8 * half, column = 32 * c + 8 * (lane % 4);
        const bool is_valid = row < shared.tile.num_rows && column < HEAD_DIM;
        shared.q[c][half][lane] = load_if(is_valid, qkv + shared.tile.offset(row, heads_of_token) + column);
    }
    __syncthreads();
}

__device__ void store_out(const Tile& tile, Storage* out, int heads_of_token, const State& state) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int row = row_of_thread(half);
        if (row < tile.num_rows) {
            const float scale = state.sum[half] == 0 ? 0.0f : 1.0f / state.sum[half];
            Storage* to = out + tile.offset(row, heads_of_token);
#pragma unroll
            for (int e = 0; e < V_STEPS; ++e) {
                const float (&o)[4] = state.o[e][half];
                if (column_of_thread(e) < HEAD_DIM) {
                    *reinterpret_cast<uint2*>(to + column_of_thread(e)) =
                        make_uint2(pack(o[0] * scale, o[1] * scale), pack(o[2] * scale, o[3] * scale));
                }
            }
        }
    }
}

// qkv [num_tokens, num_heads + 2 · num_kv_heads, HEAD_DIM], of which q is read; layer: K of kv head 0 of the
// layer in page 0, followed by its V; page_len in values; out [num_tokens, num_heads, HEAD_DIM]; scale_log2:
// log2(e) / √D.
extern "C" __global__ void __launch_bounds__(NUM_THREADS, HEAD_DIM <= 64 ? 3 : 2)
    paged_attention(const Storage* __restrict__ qkv, const Storage* __restrict__ layer,
                    unsigned long long page_len, const int* __restrict__ query_indptr,
                    const int* __restrict__ context_lens, const int* __restrict__ block_table,
                    const int* __restrict__ block_table_indptr, const int* __restrict__ unit_ends,
                    const int* __restrict__ first_partials, Storage* __restrict__ out, float* partial_o,
                    float2* partial_max_sum, unsigned* arrivals, int num_seqs, int num_heads,
                    int num_kv_heads, float scale_log2) {
    __shared__ Shared shared;
    extern __shared__ int plan_memory[];
    const Batch batch = {query_indptr, context_lens, num_seqs, num_heads / num_kv_heads};
    const Plan plan = load_plan(unit_ends, first_partials, num_seqs, plan_memory);
    const int num_items = plan.unit_ends[num_seqs - 1] * num_kv_heads;

    for (int item = blockIdx.x; item < num_items; item += gridDim.x) {
        const int kv_head = item % num_kv_heads;
        if (threadIdx.x == 0) {
            shared.unit = find_unit(batch, plan, item / num_kv_heads);
            const Sequence seq = batch.sequence(shared.unit.sequence);
            const size_t block_len = BLOCK_SIZE * HEAD_DIM;
            shared.tile.k = layer + kv_head * block_len;
            shared.tile.v = layer + (num_kv_heads + kv_head) * block_len;
            shared.tile.page_len = page_len;
            shared.tile.block_table = block_table + block_table_indptr[shared.unit.sequence];
            shared.tile.num_rows = seq.rows_of_tile(shared.unit.tile);
            shared.tile.num_keys = seq.keys_of_tile(shared.unit.tile);
            shared.tile.first_row = shared.unit.tile * TILE_ROWS;
            shared.tile.keys_before = seq.context_len - seq.num_queries + 1;
            shared.tile.first_query = seq.first_query;
            shared.tile.first_head = kv_head * seq.group_size;
            shared.tile.group_size = seq.group_size;
        }
        __syncthreads();
        const Unit& unit = shared.unit;
        if (unit.first_split < unit.num_splits) {
            load_q(shared, qkv, num_heads + 2 * num_kv_heads);
            State state;
            for (int split = unit.first_split; split < unit.end_split; ++split) {
                attend_split(shared, split, scale_log2, state);
            }
            const Partials partials = {partial_o, partial_max_sum, arrivals, num_kv_heads, kv_head};
            if (unit.first_partial < 0 || merges_splits(shared, partials, state)) {
                store_out(shared.tile, out, num_heads, state);
            }
        }
        __syncthreads();  // `shared` is free for the next
    }
}
