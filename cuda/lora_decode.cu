// LoRA of decoding rows, one launch per fused projection: shrink and expand.
//
//   s[row, rank] = weight · scale · Σ_k x[row, k] · A[rank, k]        f32, rounded to storage (fp16: in units)
//   y[row, n]    = gain · (y[row, n] + Σ_rank s[row, rank] · B[n, rank]) + weight · shift
//
// Grid    capacity_items · num_splits blocks shrink, then capacity_items · num_chunks blocks expand;
//         num_splits = ⌈in_features / 512⌉, num_chunks = ⌈out_features / 512⌉
// Block   256 threads, 8 warps
// Shared  19 KiB: the item's group; sums of 8 warps, or a tile of s
//
// An item is up to 64 rows of one adapter, so that each weight crosses the memory bus once for all of them.
//
// Shrink: warp w of split i keeps columns 512·i + 64·w … + 64 of x in registers and goes over the ranks. The
// block adds its warps' sums in their order; the block that comes last adds the splits, in the chains of lora.cuh.
// A row's bits depend on in_features and rank only.
//
// Expand: warp w of chunk i has columns 512·i + 64·w … + 64 of y. It asks for its weights before it waits for
// s, so that they travel meanwhile. Waiting can't deadlock as long as blocks start in the order of their
// indices, as CUB's scans assume too: shrink blocks come first and never wait.

#ifndef __CUDACC_RTC__  // NVRTC knows assert by itself
#include <assert.h>
#endif

#include "lora.cuh"

constexpr int WARPS = 8;
constexpr int THREADS = 32 * WARPS;

// Shrink: columns of x of a warp and of a block; tensor cores take 32 at a time.
constexpr int WARP_K = 64;
constexpr int K_STEPS = WARP_K / K_STEP;
constexpr int BLOCK_K = WARPS * WARP_K;
// Expand: columns of y.
constexpr int COLUMN_TILES = 2;
constexpr int WARP_COLUMNS = COLUMN_TILES * TILE_COLUMNS;
constexpr int BLOCK_COLUMNS = WARPS * WARP_COLUMNS;
constexpr int BLOCK_PANELS = BLOCK_COLUMNS / PANEL_WIDTH;

struct SharedMemory {
    Work work;
    ItemState* state;  // the item's, for thread 0
    unsigned part;     // the block's split of x or chunk of y
    bool is_last;
#ifdef STORAGE_F16
    float s_units[MAX_ITEM_ROWS][MAX_MODULES];
#endif
    union {
        // Rows padded by 16 bytes: neighbouring rows' 16-byte parts lie in different banks.
        alignas(16) float sums[WARPS][TILE_ROWS][TILE_COLUMNS + 4];
        Pairs s[MAX_ITEM_ROWS][K_STEP / 8];
    };
};

// With k in steps of 32, lane (g, t) has k 8·t … 8·t + 8 of row g: its pairs 2·half and 2·half + 1 are
// fragments.
__device__ __forceinline__ void mma_step(float (&c)[4][4], const Pairs& row_g, const Pairs& row_g8,
                                         const Pairs (&w)[4]) {
#pragma unroll
    for (int half = 0; half < 4; half += 2) {
        const unsigned a[4] = {row_g.pair[half], row_g8.pair[half], row_g.pair[half + 1],
                               row_g8.pair[half + 1]};
        mma_16x32x16(c, a, w[half], w[half + 1]);
    }
}

// Columns k … k + 64 of x, zero where there are none.
__device__ __forceinline__ void load_x(Pairs (&x)[MAX_ROW_TILES][K_STEPS][2], const LoraArgs& args,
                                       const WorkItem& item, const Lane& lane, unsigned k) {
#pragma unroll
    for (int tile = 0; tile < MAX_ROW_TILES; ++tile) {
#pragma unroll
        for (int step = 0; step < K_STEPS; ++step) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const unsigned row = tile * TILE_ROWS + half * 8 + lane.g;
                const unsigned column = k + step * K_STEP;
                x[tile][step][half] = Pairs{};
                if (row < item.num_rows && column < args.in_features) {
                    const size_t at = static_cast<size_t>(item.first_row + row) * args.in_features;
                    x[tile][step][half] = load_streamed(args.x + at + column + 8 * lane.t);
                }
            }
        }
    }
}

// Ranks first_rank … first_rank + 32 of A at columns k … k + 64, zero where there are none.
__device__ __forceinline__ void load_a(Pairs (&a)[K_STEPS][4], const Group& group, const Lane& lane,
                                       unsigned in_features, unsigned first_rank, unsigned k) {
    const unsigned panel_rank = first_rank + lane.panel * PANEL_WIDTH;
    const unsigned width = panel_rank < group.rank ? min(group.rank - panel_rank, PANEL_WIDTH) : 0;
    const char* panel = group.a + static_cast<size_t>(panel_rank) * in_features * sizeof(Storage);
#pragma unroll
    for (int step = 0; step < K_STEPS; ++step) {
        const unsigned pair = (k + step * K_STEP) / 2 + 4 * lane.t;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            a[step][i] = Pairs{};
            if (lane.column < width && k + step * K_STEP < in_features) {
                a[step][i] = load_streamed(panel + ((pair + i) * width + lane.column) * 4);
            }
        }
    }
}

// Adds the warps' c of one tile and writes it as partial sums of this split.
__device__ __forceinline__ void sum_warps(SharedMemory& shared, const LoraArgs& args, const Lane& lane,
                                          const float (&c)[4][4], unsigned tile_row, unsigned first_rank) {
    const unsigned warp = threadIdx.x / 32;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        float* sums = shared.sums[warp][lane.g + i / 2 * 8] + 8 * lane.t + i % 2 * 4;
        store_shared(sums, to_pairs(make_float4(c[0][i], c[1][i], c[2][i], c[3][i])));
    }
    __syncthreads();
    const unsigned row = threadIdx.x / 8;
    const unsigned column = threadIdx.x % 8 * 4;
    if (row < TILE_ROWS && tile_row + row < shared.work.item.num_rows &&
        first_rank + column < shared.work.group.rank) {
        float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll
        for (int other = 0; other < WARPS; ++other) {
            sum = add(sum, load_shared(&shared.sums[other][row][column]));
        }
        const size_t at =
            static_cast<size_t>(shared.part) * args.max_rows + shared.work.item.first_row + tile_row + row;
        store_global(args.partial_sums + at * args.rank_stride + first_rank + column, to_pairs(sum));
    }
    __syncthreads();
}

__device__ __forceinline__ unsigned num_splits(const LoraArgs& args) {
    return (args.in_features + BLOCK_K - 1) / BLOCK_K;
}

// threadIdx.x, read anew rather than kept: registers are scarce.
__device__ __forceinline__ unsigned thread_index() {
    unsigned index;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(index));
    return index;
}

// The warp's first column of x.
__device__ __forceinline__ unsigned first_k(const SharedMemory& shared) {
    return shared.part * BLOCK_K + thread_index() / 32 * WARP_K;
}

// Block item · num_splits + split.
__device__ __forceinline__ void shrink(SharedMemory& shared, const LoraArgs& args) {
    const Work& work = shared.work;
    const Lane lane;
    Pairs x[MAX_ROW_TILES][K_STEPS][2];
    Pairs a[K_STEPS][4];
    const unsigned k = first_k(shared);
    load_a(a, work.group, lane, args.in_features, 0, k);
    load_x(x, args, work.item, lane, k);
    for (unsigned first_rank = 0; first_rank < work.group.rank; first_rank += TILE_COLUMNS) {
#pragma unroll
        for (int tile = 0; tile < MAX_ROW_TILES; ++tile) {
            if (tile * TILE_ROWS < work.item.num_rows) {
                float c[4][4] = {};
#pragma unroll
                for (int step = 0; step < K_STEPS; ++step) {
                    mma_step(c, x[tile][step][0], x[tile][step][1], a[step]);
                }
                if ((tile + 1) * TILE_ROWS >= work.item.num_rows) {
                    load_a(a, work.group, lane, args.in_features, first_rank + TILE_COLUMNS, first_k(shared));
                }
                sum_warps(shared, args, lane, c, tile * TILE_ROWS, first_rank);
            }
        }
    }
    if (is_last_split(shared.state, num_splits(args), shared.is_last)) {
        sum_splits(args, work, num_splits(args));
        __syncthreads();
        if (threadIdx.x == 0) {
            __threadfence();
            atomicExch(&shared.state->is_ready, 1);
        }
    }
}

// The step's ranks of B for the two panels from `panel` on, zero where there are none.
__device__ __forceinline__ void load_b(Pairs (&b)[4], const Group& group, const Lane& lane, RankStep step,
                                       unsigned panel) {
    const Module& module = group.modules[min(step.module, MAX_MODULES - 1)];
    const unsigned in_module = panel + lane.panel - module.first_panel;
    const bool is_there =
        !step.is_end(group) && in_module < module.num_panels && step.rank + 8 * lane.t < module.rank;
    const char* pairs = module.b +
                        static_cast<size_t>(in_module) * module.rank * PANEL_WIDTH * sizeof(Storage) +
                        ((step.rank / 2 + 4 * lane.t) * PANEL_WIDTH + lane.column) * 4;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        b[i] = Pairs{};
        if (is_there) {
            b[i] = load_streamed(pairs + i * PANEL_WIDTH * 4);
        }
    }
}

// The step's ranks of s for all rows, zero where there are none.
__device__ __forceinline__ void stage_s(SharedMemory& shared, const LoraArgs& args, RankStep step) {
    const Module& module = shared.work.group.modules[step.module];
    const unsigned row = threadIdx.x / 4;
    const unsigned rank = step.rank + threadIdx.x % 4 * 8;
    Pairs s{};
    if (row < shared.work.item.num_rows && rank < module.rank) {
        const size_t at = static_cast<size_t>(shared.work.item.first_row + row) * args.rank_stride;
        s = load_global(args.s + at + module.rank_offset + rank);
    }
    __syncthreads();
    store_shared(&shared.s[row][threadIdx.x % 4], s);
    __syncthreads();
}

// The units of s of all rows; there once the first step's s is.
__device__ __forceinline__ const float* stage_s_units(SharedMemory& shared, const LoraArgs& args) {
#ifdef STORAGE_F16
    const unsigned i = threadIdx.x;
    if (i < shared.work.item.num_rows * MAX_MODULES) {
        const size_t at = static_cast<size_t>(shared.work.item.first_row) * MAX_MODULES + i;
        shared.s_units[i / MAX_MODULES][i % MAX_MODULES] = load_global_float(args.s_units + at);
    }
    return shared.s_units[0];
#else
    return nullptr;
#endif
}

// Looks at a flag after which the blocks waited for will never run: seconds. Better a dead context than a hung GPU.
constexpr unsigned MAX_LOOKS = 1U << 24;

// Only looks; not inlined, so that its loop and its message take no registers from the caller's loads under way.
__device__ __noinline__ void look_until_ready(const ItemState* state) {
    for (unsigned looks = 0; looks < MAX_LOOKS; ++looks) {
        unsigned is_ready;
        asm volatile("ld.acquire.gpu.global.u32 %0, [%1];"
                     : "=r"(is_ready)
                     : "l"(&state->is_ready)
                     : "memory");
        if (is_ready != 0) {
            return;
        }
    }
    assert(!"lora_decode waited for the shrink of its item in vain");
}

__device__ __forceinline__ void wait_until_ready(const SharedMemory& shared) {
    if (threadIdx.x == 0) {
        look_until_ready(shared.state);
        __threadfence();
    }
    __syncthreads();
}

template <int ROW_TILES>
__device__ __forceinline__ void expand(SharedMemory& shared, const LoraArgs& args) {
    const Group& group = shared.work.group;
    const Lane lane;
    const unsigned block_panel = shared.part * BLOCK_PANELS;
    const RankStep first = RankStep::first(group, block_panel, BLOCK_PANELS);
    if (first.is_end(group)) {
        return;
    }
    const unsigned warp_panel = block_panel + threadIdx.x / 32 * (WARP_COLUMNS / PANEL_WIDTH);
    Pairs b[COLUMN_TILES][4];
#pragma unroll
    for (int tile = 0; tile < COLUMN_TILES; ++tile) {
        load_b(b[tile], group, lane, first, warp_panel + 2 * tile);
    }
    // Items of few rows leave registers for y, which then is under way as well.
    constexpr bool IS_Y_EARLY = ROW_TILES == 1;
    Pairs early_y[COLUMN_TILES][2];
    if (IS_Y_EARLY) {
#pragma unroll
        for (int tile = 0; tile < COLUMN_TILES; ++tile) {
            OutputTile(args, shared.work, lane, warp_panel + 2 * tile).load(early_y[tile], 0);
        }
    }
    wait_until_ready(shared);
    const float* s_units = stage_s_units(shared, args);
    stage_s(shared, args, first);
    RankStep staged = first;
#pragma unroll
    for (int tile = 0; tile < COLUMN_TILES; ++tile) {
        float c[ROW_TILES][4][4] = {};
        RankStep step = first;
        while (!step.is_end(group)) {
            if (step != staged) {
                stage_s(shared, args, step);
                staged = step;
            }
#pragma unroll
            for (int row_tile = 0; row_tile < ROW_TILES; ++row_tile) {
                if (row_tile * TILE_ROWS < shared.work.item.num_rows) {
                    const unsigned row = row_tile * TILE_ROWS + lane.g;
                    mma_step(c[row_tile], load_shared(&shared.s[row][lane.t]),
                             load_shared(&shared.s[row + 8][lane.t]), b[tile]);
                }
            }
            step = step.next(group, block_panel, BLOCK_PANELS);
            load_b(b[tile], group, lane, step, warp_panel + 2 * tile);
        }
        const OutputUnits units(shared.work, lane, warp_panel + 2 * tile, s_units);
        const OutputTile output(args, shared.work, lane, warp_panel + 2 * tile);
#pragma unroll
        for (int row_tile = 0; row_tile < ROW_TILES; ++row_tile) {
            if (!IS_Y_EARLY) {
                output.load(early_y[0], row_tile);
            }
            units.apply(c[row_tile], row_tile);
            output.add_and_store(early_y[IS_Y_EARLY ? tile : 0], c[row_tile], row_tile,
                                 shared.work.item.weight);
        }
    }
}

// The last expand block of an item leaves its state as the next launch wants it.
__device__ __forceinline__ void finish_expand(const SharedMemory& shared, unsigned num_chunks) {
    if (thread_index() == 0 && atomicAdd(&shared.state->num_expanded, 1) == num_chunks - 1) {
        *shared.state = ItemState{};
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 2) lora_decode(const LoraArgs args) {
    __shared__ SharedMemory shared;
    const unsigned num_chunks = (args.out_features + BLOCK_COLUMNS - 1) / BLOCK_COLUMNS;
    const unsigned num_shrink_blocks = args.capacity_items * num_splits(args);
    const bool is_shrink = blockIdx.x < num_shrink_blocks;
    const unsigned block = is_shrink ? blockIdx.x : blockIdx.x - num_shrink_blocks;
    const unsigned blocks_per_item = is_shrink ? num_splits(args) : num_chunks;
    const unsigned index = block / blocks_per_item;
    if (threadIdx.x == 0) {
        shared.state = args.states + index;
        shared.part = block % blocks_per_item;
    }
    if (!read_work(args, index, shared.work)) {
        return;
    }
    if (is_shrink) {
        shrink(shared, args);
        return;
    }
    if (shared.work.item.num_rows <= TILE_ROWS) {
        expand<1>(shared, args);
    } else {
        expand<MAX_ROW_TILES>(shared, args);
    }
    finish_expand(shared, num_chunks);
}
