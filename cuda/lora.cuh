// What the LoRA kernels share: their argument, fragments of panels, and the sum of s over splits of K.
#pragma once

#include "adapter_table.cuh"
#include "storage.cuh"

constexpr int MAX_ITEM_ROWS = 64;
// A warp multiplies [16, 32] · [32, 32] at a time: 32 columns are two panels.
constexpr int TILE_ROWS = 16;
constexpr int TILE_COLUMNS = 32;
constexpr int K_STEP = 32;
constexpr int MAX_ROW_TILES = MAX_ITEM_ROWS / TILE_ROWS;

// Progress of one work item; all zero between launches.
struct alignas(16) ItemState {
    unsigned num_shrunk;  // splits whose partial sums are written
    unsigned is_ready;    // s is written
    unsigned num_expanded;
    unsigned pad;
};

// `rust/kernels/src/cuda/lora.rs` mirrors it. T rows; s and its partial sums are scratch.
struct LoraArgs {
    const Group* groups;  // of this layer and projection: slot i's at groups[i · slot_stride]
    const int* num_items;
    const WorkItem* items;
    ItemState* states;    // [item]
    float* partial_sums;  // [split][max_rows][rank_stride]
    Storage* s;           // [max_rows][rank_stride]
    float* s_units;       // [max_rows][MAX_MODULES], fp16 only: what 1 in s stands for
    const Storage* x;     // [T, in_features]
    Storage* y;           // [T, out_features]
    unsigned slot_stride;
    unsigned capacity_items;
    unsigned in_features;
    unsigned out_features;
    unsigned max_rows;
    unsigned rank_stride;
};

static_assert(sizeof(LoraArgs) == 96, "mirrored by Rust");

struct Work {
    WorkItem item;
    Group group;
};

// Reads a block's item and its adapter's group with few loads. False: there is nothing to do.
__device__ __forceinline__ bool read_work(const LoraArgs& args, unsigned index, Work& work) {
    const unsigned part = threadIdx.x;
    const bool is_reader = part < sizeof(Group) / 16;
    // Before the count is known, so that both are under way together; lists have room for all blocks.
    const Pairs item = is_reader ? load_streamed(args.items + index) : Pairs{};
    if (index >= *args.num_items) {
        return false;
    }
    if (part == 0) {
        store_shared(&work.item, item);
    }
    if (is_reader) {
        const size_t slot = item.pair[2];  // the third field of WorkItem
        const Pairs* group = reinterpret_cast<const Pairs*>(args.groups + slot * args.slot_stride);
        store_shared(reinterpret_cast<Pairs*>(&work.group) + part, load_streamed(group + part));
    }
    __syncthreads();
    return work.group.num_modules > 0;
}

__device__ __forceinline__ Pairs to_pairs(float4 v) {
    return Pairs{__float_as_uint(v.x), __float_as_uint(v.y), __float_as_uint(v.z), __float_as_uint(v.w)};
}

__device__ __forceinline__ float4 add(float4 sum, const Pairs& v) {
    return make_float4(sum.x + __uint_as_float(v.pair[0]), sum.y + __uint_as_float(v.pair[1]),
                       sum.z + __uint_as_float(v.pair[2]), sum.w + __uint_as_float(v.pair[3]));
}

// Columns of a panel pair at hand: lane 4·g + t loads column 4·g + j (j = 0…3) of a pair of k with 16 bytes,
// and as column g of tile j these are fragments b of mma_16x8x16. In c, the same lane then has over j the
// columns 8·t … 8·t + 8 of its rows g and g + 8.
struct Lane {
    unsigned g = threadIdx.x % 32 / 4;
    unsigned t = threadIdx.x % 4;
    unsigned panel = g / 4;       // of the two
    unsigned column = g % 4 * 4;  // first of the four in its panel
};

// c [16, 32] += a [16, 16] · w [16, 32], w as the pairs of k that fragments b0 and b1 ask for.
__device__ __forceinline__ void mma_16x32x16(float (&c)[4][4], const unsigned (&a)[4], const Pairs& w0,
                                             const Pairs& w1) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
        mma_16x8x16(c[j], a, w0.pair[j], w1.pair[j]);
    }
}

// 32 ranks of a module that has columns in a block's panels; a sum of y goes over them in turn.
struct RankStep {
    unsigned module;
    unsigned rank;

    __device__ static RankStep first(const Group& group, unsigned first_panel, unsigned num_panels) {
        RankStep step{0, 0};
        step.skip_absent(group, first_panel, num_panels);
        return step;
    }

    __device__ bool is_end(const Group& group) const {
        return module == group.num_modules;
    }

    __device__ RankStep next(const Group& group, unsigned first_panel, unsigned num_panels) const {
        RankStep step{module, rank + K_STEP};
        if (step.rank >= group.modules[module].rank) {
            step = RankStep{module + 1, 0};
            step.skip_absent(group, first_panel, num_panels);
        }
        return step;
    }

    __device__ bool operator!=(const RankStep& other) const {
        return module != other.module || rank != other.rank;
    }

private:
    __device__ void skip_absent(const Group& group, unsigned first_panel, unsigned num_panels) {
        while (module < group.num_modules) {
            const Module& at = group.modules[module];
            if (at.first_panel < first_panel + num_panels && first_panel < at.first_panel + at.num_panels) {
                return;
            }
            ++module;
        }
    }
};

// The lane's eight columns of y in two panels, over the item's rows: its part of c as Lane says.
struct OutputTile {
    Storage* y = nullptr;  // in the item's first row; null: no module has the panel
    const float* gain = nullptr;
    unsigned row_stride;
    unsigned num_rows;
    unsigned g;

    __device__ OutputTile(const LoraArgs& args, const Work& work, const Lane& lane, unsigned first_panel)
        : row_stride(args.out_features), num_rows(work.item.num_rows), g(lane.g) {
        const unsigned panel = first_panel + lane.t / 2;
        const unsigned column = lane.t % 2 * 8;
        for (unsigned i = 0; i < work.group.num_modules; ++i) {
            const Module& module = work.group.modules[i];
            const unsigned in_module = panel - module.first_panel;
            if (in_module < module.num_panels) {
                const size_t row = static_cast<size_t>(work.item.first_row) * row_stride;
                y = args.y + row + panel * PANEL_WIDTH + column;
                gain = module.gain == nullptr ? nullptr : module.gain + in_module * PANEL_WIDTH + column;
            }
        }
    }

    __device__ __forceinline__ bool has_row(unsigned row) const {
        return y != nullptr && row < num_rows;
    }

    // Rows g and g + 8 of a row tile.
    __device__ __forceinline__ void load(Pairs (&values)[2], unsigned tile) const {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const unsigned row = tile * TILE_ROWS + half * 8 + g;
            if (has_row(row)) {
                values[half] = load_global(y + static_cast<size_t>(row) * row_stride);
            }
        }
    }

    // y = gain · (values + c)
    __device__ __forceinline__ void add_and_store(const Pairs (&values)[2], const float (&c)[4][4],
                                                  unsigned tile) const {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const unsigned row = tile * TILE_ROWS + half * 8 + g;
            if (has_row(row)) {
                store_global(y + static_cast<size_t>(row) * row_stride, add(values[half], c, half));
            }
        }
    }

private:
    // half 0: c's row g, 1: its row g + 8
    __device__ __forceinline__ Pairs add(const Pairs& values, const float (&c)[4][4], int half) const {
        Pairs sum;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            // Columns 2·i and 2·i + 1 of eight.
            const int j = 2 * i % 4;
            const int column = 2 * half + i / 2;
            float2 pair = unpack(values.pair[i]);
            pair.x += c[j][column];
            pair.y += c[j + 1][column];
            if (gain != nullptr) {
                pair.x *= gain[2 * i];
                pair.y *= gain[2 * i + 1];
            }
            sum.pair[i] = pack(pair.x, pair.y);
        }
        return sum;
    }
};

// c in units of s becomes c: the lane's rows of each times the unit of the row and of the module whose panel the
// lane has. `s_units`: [num_rows][MAX_MODULES] of the item.
template <int ROW_TILES>
__device__ __forceinline__ void apply_s_units(float (&c)[ROW_TILES][4][4], const Work& work, const Lane& lane,
                                              unsigned first_panel, const float* s_units) {
#ifdef STORAGE_F16
    const unsigned panel = first_panel + lane.t / 2;
    unsigned module = 0;
    while (module + 1 < work.group.num_modules && panel >= work.group.modules[module + 1].first_panel) {
        ++module;
    }
#pragma unroll
    for (int i = 0; i < 2 * ROW_TILES; ++i) {
        const int tile = i / 2;
        const int half = i % 2;
        const unsigned row = tile * TILE_ROWS + half * 8 + lane.g;
        const float unit = row < work.item.num_rows ? s_units[row * MAX_MODULES + module] : 1.0f;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            c[tile][j][2 * half] *= unit;
            c[tile][j][2 * half + 1] *= unit;
        }
    }
#endif
}

// Whether this block is the last of `num_splits` to have written partial sums of its item, which are then
// visible to it. `is_last` is shared memory.
__device__ __forceinline__ bool is_last_split(ItemState* state, unsigned num_splits, bool& is_last) {
    __syncthreads();
    if (threadIdx.x == 0) {
        __threadfence();
        is_last = atomicAdd(&state->num_shrunk, 1) == num_splits - 1;
        __threadfence();
    }
    __syncthreads();
    return is_last;
}

// Four ranks of a row of an item.
struct RankQuad {
    unsigned row;  // of the item
    unsigned rank;
    unsigned module;
    size_t at;  // in s and in a split's partial sums

    __device__ RankQuad(const LoraArgs& args, const Work& work, unsigned index) : module(0) {
        const unsigned quads_per_row = work.group.rank / 4;
        row = index / quads_per_row;
        rank = index % quads_per_row * 4;
        at = (work.item.first_row + row) * static_cast<size_t>(args.rank_stride) + rank;
        while (module + 1 < work.group.num_modules && rank >= work.group.modules[module + 1].rank_offset) {
            ++module;
        }
    }

    // weight · scale · Σ over splits, in their order, of the partial sums
    __device__ __forceinline__ float4 sum(const LoraArgs& args, const Work& work, unsigned num_splits) const {
        const size_t split_stride = static_cast<size_t>(args.max_rows) * args.rank_stride;
        float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll 8
        for (unsigned split = 0; split < num_splits; ++split) {
            sum = add(sum, load_global(args.partial_sums + split * split_stride + at));
        }
        return scaled(sum, work.item.weight * work.group.modules[module].scale);
    }

    __device__ __forceinline__ void store(const LoraArgs& args, float4 s) const {
        *reinterpret_cast<uint2*>(args.s + at) = make_uint2(pack(s.x, s.y), pack(s.z, s.w));
    }

    __device__ static __forceinline__ float4 scaled(float4 v, float scale) {
        return make_float4(scale * v.x, scale * v.y, scale * v.z, scale * v.w);
    }
};

#ifdef STORAGE_BF16

// s [row, rank] of an item from its partial sums.
__device__ __forceinline__ void sum_splits(const LoraArgs& args, const Work& work, unsigned num_splits) {
    for (unsigned i = threadIdx.x; i < work.item.num_rows * (work.group.rank / 4); i += blockDim.x) {
        const RankQuad quad(args, work, i);
        quad.store(args, quad.sum(args, work, num_splits));
    }
}

#else

// A power of two by which a row's s of one module is divided: its largest value then lies in 2^14 … 2^15, where
// fp16 ends at 65504 and is exact to eleven bits down to 2^-14. `largest` has the bits of a float.
struct Unit {
    float value;
    float inverse;

    __device__ explicit Unit(unsigned largest) : value(1.0f), inverse(1.0f) {
        const unsigned exponent = max(largest >> 23, 15);  // so that both are normal numbers
        if (largest != 0 && exponent < 255) {              // zeros, infinities and NaN stay what they are
            value = __uint_as_float((exponent - 14) << 23);
            inverse = __uint_as_float((268 - exponent) << 23);
        }
    }
};

// s [row, rank] of an item from its partial sums, in units of its row and module.
__device__ __forceinline__ void sum_splits(const LoraArgs& args, const Work& work, unsigned num_splits) {
    __shared__ unsigned largest[MAX_ITEM_ROWS][MAX_MODULES];  // bits of |s|, which sort as the floats do
    for (unsigned i = threadIdx.x; i < MAX_ITEM_ROWS * MAX_MODULES; i += blockDim.x) {
        (&largest[0][0])[i] = 0;
    }
    __syncthreads();
    const unsigned num_quads = work.item.num_rows * (work.group.rank / 4);
    for (unsigned i = threadIdx.x; i < num_quads; i += blockDim.x) {
        const RankQuad quad(args, work, i);
        const Pairs s = to_pairs(quad.sum(args, work, num_splits));
        const unsigned low = max(s.pair[0] & 0x7fffffffu, s.pair[1] & 0x7fffffffu);
        const unsigned high = max(s.pair[2] & 0x7fffffffu, s.pair[3] & 0x7fffffffu);
        atomicMax(&largest[quad.row][quad.module], max(low, high));
        store_global(args.partial_sums + quad.at, s);  // in place of the first split's, for this thread
    }
    __syncthreads();
    for (unsigned i = threadIdx.x; i < num_quads; i += blockDim.x) {
        const RankQuad quad(args, work, i);
        const Unit unit(largest[quad.row][quad.module]);
        const float4 s = add(make_float4(0.0f, 0.0f, 0.0f, 0.0f), load_global(args.partial_sums + quad.at));
        quad.store(args, RankQuad::scaled(s, unit.inverse));
        if (quad.rank == work.group.modules[quad.module].rank_offset) {
            const size_t row = work.item.first_row + quad.row;
            args.s_units[row * MAX_MODULES + quad.module] = unit.value;
        }
    }
}

#endif
