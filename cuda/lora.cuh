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
    Storage* y = nullptr;         // in the item's first row; null: no module has the panel
    const float* gain = nullptr;  // of the lane's first column; its shift is a panel's width further
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
                gain = module.columns == nullptr ? nullptr
                                                 : module.columns + in_module * 2 * PANEL_WIDTH + column;
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

    // y = gain · (values + c) + weight · shift
    __device__ __forceinline__ void add_and_store(const Pairs (&values)[2], const float (&c)[4][4],
                                                  unsigned tile, const float& weight) const {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const unsigned row = tile * TILE_ROWS + half * 8 + g;
            if (has_row(row)) {
                store_global(y + static_cast<size_t>(row) * row_stride, add(values[half], c, half, weight));
            }
        }
    }

private:
    // half 0: c's row g, 1: its row g + 8
    __device__ __forceinline__ Pairs add(const Pairs& values, const float (&c)[4][4], int half,
                                         const float& weight) const {
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
                const float* shift = gain + PANEL_WIDTH;
                pair.x = gain[2 * i] * pair.x + weight * shift[2 * i];
                pair.y = gain[2 * i + 1] * pair.y + weight * shift[2 * i + 1];
            }
            sum.pair[i] = pack(pair.x, pair.y);
        }
        return sum;
    }
};

// What 1 in c stands for: the units of s of the item's rows, for the module whose panel the lane has. `s_units`:
// [num_rows][MAX_MODULES] of the item.
struct OutputUnits {
#ifdef STORAGE_F16
    const float* of_rows;
    unsigned num_rows;
    unsigned g;

    __device__ OutputUnits(const Work& work, const Lane& lane, unsigned first_panel, const float* s_units)
        : num_rows(work.item.num_rows), g(lane.g) {
        const unsigned panel = first_panel + lane.t / 2;
        unsigned module = 0;
        while (module + 1 < work.group.num_modules && panel >= work.group.modules[module + 1].first_panel) {
            ++module;
        }
        of_rows = s_units + module;
    }

    // c of a row tile, in units, becomes c.
    __device__ __forceinline__ void apply(float (&c)[4][4], unsigned tile) const {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const unsigned row = tile * TILE_ROWS + half * 8 + g;
            const float unit = row < num_rows ? of_rows[row * MAX_MODULES] : 1.0f;
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                c[j][2 * half] *= unit;
                c[j][2 * half + 1] *= unit;
            }
        }
    }
#else
    __device__ OutputUnits(const Work&, const Lane&, unsigned, const float*) {}
    __device__ __forceinline__ void apply(float (&)[4][4], unsigned) const {}
#endif
};

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

// A sum over splits is that of eight chains, in pairs:
//   chain j = Σ split j, j + 8, …        ((0 + 1) + (2 + 3)) + ((4 + 5) + (6 + 7))
// One thread adds them all, or eight lanes take one each: the order, and so the bits, are the same.
constexpr int CHAINS = 8;

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

    // weight · scale · Σ over splits of the partial sums: LANES neighbouring lanes call it and get it.
    template <int LANES>
    __device__ __forceinline__ float4 sum(const LoraArgs& args, const Work& work, unsigned num_splits) const {
        constexpr int OWN =
            CHAINS / LANES;  // chains of a lane, of which ROUNDS splits each are under way at once
        constexpr int ROUNDS = LANES == 1 ? 1 : 4;
        const unsigned first_chain = threadIdx.x % LANES * OWN;
        const size_t split_stride = static_cast<size_t>(args.max_rows) * args.rank_stride;
        float4 chains[OWN] = {};
        for (unsigned first = first_chain; first < num_splits; first += ROUNDS * CHAINS) {
            Pairs parts[ROUNDS * OWN];
#pragma unroll
            for (int i = 0; i < ROUNDS * OWN; ++i) {
                const unsigned split = first + i / OWN * CHAINS + i % OWN;
                parts[i] = Pairs{};
                if (split < num_splits) {
                    parts[i] = load_global(args.partial_sums + split * split_stride + at);
                }
            }
#pragma unroll
            for (int i = 0; i < ROUNDS * OWN; ++i) {
                chains[i % OWN] = add(chains[i % OWN], parts[i]);
            }
        }
#pragma unroll
        for (int width = 1; width < OWN; width *= 2) {
#pragma unroll
            for (int i = 0; i < OWN; i += 2 * width) {
                chains[i] = add(chains[i], to_pairs(chains[i + width]));
            }
        }
#pragma unroll
        for (int width = 1; width < LANES; width *= 2) {
            chains[0] = add(chains[0], of_other_lane<LANES>(chains[0], width));
        }
        return scaled(chains[0], work.item.weight * work.group.modules[module].scale);
    }

    __device__ __forceinline__ void store(const LoraArgs& args, float4 s) const {
        *reinterpret_cast<uint2*>(args.s + at) = make_uint2(pack(s.x, s.y), pack(s.z, s.w));
    }

    // Of the lane `distance` away among LANES.
    template <int LANES>
    __device__ static __forceinline__ Pairs of_other_lane(float4 v, int distance) {
        const unsigned lanes = ((1U << LANES) - 1) << (threadIdx.x % 32 / LANES * LANES);
        return to_pairs(
            make_float4(__shfl_xor_sync(lanes, v.x, distance), __shfl_xor_sync(lanes, v.y, distance),
                        __shfl_xor_sync(lanes, v.z, distance), __shfl_xor_sync(lanes, v.w, distance)));
    }

    __device__ static __forceinline__ float4 scaled(float4 v, float scale) {
        return make_float4(scale * v.x, scale * v.y, scale * v.z, scale * v.w);
    }
};

// Calls take(quad, s) once for each quad of an item.
template <int LANES, class Take>
__device__ __forceinline__ void sum_quads(const LoraArgs& args, const Work& work, unsigned num_splits,
                                          Take take) {
    const unsigned num_quads = work.item.num_rows * (work.group.rank / 4);
    for (unsigned i = threadIdx.x / LANES; i < num_quads; i += blockDim.x / LANES) {
        const RankQuad quad(args, work, i);
        const float4 s = quad.sum<LANES>(args, work, num_splits);
        if (threadIdx.x % LANES == 0) {
            take(quad, s);
        }
    }
}

// Many splits of few quads, as down has them of few rows, take a thread four times as long as eight lanes.
template <class Take>
__device__ __forceinline__ void sum_all_quads(const LoraArgs& args, const Work& work, unsigned num_splits,
                                              Take take) {
    const unsigned num_quads = work.item.num_rows * (work.group.rank / 4);
    if (num_splits > CHAINS && num_quads * CHAINS <= 2 * blockDim.x) {
        sum_quads<CHAINS>(args, work, num_splits, take);
    } else {
        sum_quads<1>(args, work, num_splits, take);
    }
}

#ifdef STORAGE_BF16

// s [row, rank] of an item from its partial sums.
__device__ __forceinline__ void sum_splits(const LoraArgs& args, const Work& work, unsigned num_splits) {
    sum_all_quads(args, work, num_splits, [&](const RankQuad& quad, float4 s) { quad.store(args, s); });
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
    sum_all_quads(args, work, num_splits, [&](const RankQuad& quad, float4 sum) {
        const Pairs s = to_pairs(sum);
        const unsigned low = max(s.pair[0] & 0x7fffffffu, s.pair[1] & 0x7fffffffu);
        const unsigned high = max(s.pair[2] & 0x7fffffffu, s.pair[3] & 0x7fffffffu);
        atomicMax(&largest[quad.row][quad.module], max(low, high));
        store_global(args.partial_sums + quad.at, s);  // in place of the first split's, which was read here
    });
    __syncthreads();
    const unsigned num_quads = work.item.num_rows * (work.group.rank / 4);
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
