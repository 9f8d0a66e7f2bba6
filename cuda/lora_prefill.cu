// LoRA of prompts' rows, two launches per fused projection.
//
//   lora_prefill_shrink   s[row, rank] = weight · scale · Σ_k x[row, k] · A[rank, k]  (f32, then storage)
//   lora_prefill_expand   y[row, n]    = gain · (y[row, n] + Σ_rank s[row, rank] · B[n, rank]) + weight · shift
//
// Grid    shrink: capacity_items · num_splits; a split has max(256, in_features / 4) columns, a multiple of 32
//         expand: capacity_items · ⌈out_features / 128⌉
// Block   128 threads, 4 warps
// Shared  shrink: 33 KiB, 4 stages; expand: 25 KiB, 2 stages
//
// An item is up to 64 rows of one adapter. Warp w of shrink has its rows 16·w … 16·w + 16 and 64 ranks at a
// time, warp w of expand 32 columns and all rows. Operands come through a ring of stages by cp.async, each 32
// deep along the summed dimension. The block that comes last adds the splits in their order: a row's bits
// depend on in_features and rank only.

#include "lora.cuh"

constexpr int WARPS = 4;
constexpr int THREADS = 32 * WARPS;
constexpr int VECTORS = K_STEP / 8;     // of 16 bytes, in 32 values of a row
constexpr int PAIRS = K_STEP / 2;       // of k
constexpr int QUADS = PANEL_WIDTH / 4;  // of columns of a panel; 16 bytes of one pair of k

constexpr int SHRINK_STAGES = 4;
constexpr int SHRINK_PANELS = 4;
constexpr int SHRINK_RANKS = SHRINK_PANELS * PANEL_WIDTH;
constexpr int EXPAND_STAGES = 2;
constexpr int EXPAND_PANELS = 2 * WARPS;

// Rows of x or s and panels of A or B, 32 deep. Neither the copies nor the fragments' loads of a quarter warp
// have two vectors in the same banks, because of how the vectors of a row and the quads of a pair are
// permuted.
template <int NUM_PANELS>
struct Stage {
    Pairs rows[MAX_ITEM_ROWS][VECTORS];
    Pairs panels[NUM_PANELS][PAIRS][QUADS];

    __device__ __forceinline__ Pairs* row_vector(unsigned row, unsigned vector) {
        return &rows[row][vector ^ (row / 2 % VECTORS)];
    }

    __device__ __forceinline__ Pairs* panel_vector(unsigned panel, unsigned pair, unsigned quad) {
        return &panels[panel][pair][quad ^ (pair & 2)];
    }

    // Fragments a of rows tile · 16 … + 16: k 0 … 16 and 16 … 32.
    __device__ __forceinline__ void load_rows(unsigned (&a)[2][4], unsigned tile) {
        const unsigned row = tile * TILE_ROWS + threadIdx.x % 16;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const Pairs* vector = row_vector(row, 2 * half + threadIdx.x % 32 / 16);
            asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                         : "=r"(a[half][0]), "=r"(a[half][1]), "=r"(a[half][2]), "=r"(a[half][3])
                         : "r"(shared_address(vector))
                         : "memory");
        }
    }

    // Fragments b of two panels: of k 0 … 16 in w[0] and w[1], of k 16 … 32 in w[2] and w[3].
    __device__ __forceinline__ void load_panels(Pairs (&w)[4], unsigned panel_pair, const Lane& lane) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            w[i] = load_shared(panel_vector(2 * panel_pair + lane.panel, lane.t + 4 * i, lane.column / 4));
        }
    }
};

// c [16, 32] += a [16, 32] · w [32, 32]
__device__ __forceinline__ void mma_stage(float (&c)[4][4], const unsigned (&a)[2][4], const Pairs (&w)[4]) {
    mma_16x32x16(c, a[0], w[0], w[1]);
    mma_16x32x16(c, a[1], w[2], w[3]);
}

// Starts a copy of 16 bytes; of zeros where `is_there` is false.
__device__ __forceinline__ void copy_async(Pairs* shared, const void* global, bool is_there) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global),
                 "r"(is_there ? 16 : 0)
                 : "memory");
}

__device__ __forceinline__ void commit_copies() {
    asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits for this thread's copies but the last NUM_PENDING groups of them.
template <int NUM_PENDING>
__device__ __forceinline__ void wait_for_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(NUM_PENDING) : "memory");
}

using ShrinkStage = Stage<SHRINK_PANELS>;

// x of the item's rows and A of 64 ranks at columns k … k + 32.
__device__ __forceinline__ void copy_shrink_stage(ShrinkStage& stage, const LoraArgs& args, const Work& work,
                                                  unsigned first_rank, unsigned k) {
    for (unsigned i = threadIdx.x; i < MAX_ITEM_ROWS * VECTORS; i += THREADS) {
        const unsigned row = i / VECTORS;
        const unsigned vector = i % VECTORS;
        const bool is_there = row < work.item.num_rows;
        const size_t at = static_cast<size_t>(work.item.first_row + (is_there ? row : 0)) * args.in_features;
        copy_async(stage.row_vector(row, vector), args.x + at + k + 8 * vector, is_there);
    }
    for (unsigned i = threadIdx.x; i < SHRINK_PANELS * PAIRS * QUADS; i += THREADS) {
        const unsigned panel = i / (PAIRS * QUADS);
        const unsigned pair = i / QUADS % PAIRS;
        const unsigned quad = i % QUADS;
        const unsigned rank = first_rank + panel * PANEL_WIDTH;
        const unsigned width = rank < work.group.rank ? min(work.group.rank - rank, PANEL_WIDTH) : 0;
        const bool is_there = quad * 4 < width;
        const size_t at = static_cast<size_t>(rank) * args.in_features * sizeof(Storage) +
                          static_cast<size_t>((k / 2 + pair) * width + quad * 4) * 4;
        copy_async(stage.panel_vector(panel, pair, quad), work.group.a + (is_there ? at : 0), is_there);
    }
}

// Partial sums of the split k_begin … k_end for the warp's 16 rows and 64 ranks.
__device__ __forceinline__ void shrink_ranks(float (&c)[SHRINK_PANELS / 2][4][4],
                                             ShrinkStage (&stages)[SHRINK_STAGES], const LoraArgs& args,
                                             const Work& work, unsigned first_rank, unsigned k_begin,
                                             unsigned k_end) {
    const Lane lane;
    const unsigned num_steps = (k_end - k_begin) / K_STEP;
    __syncthreads();
    for (unsigned step = 0; step < SHRINK_STAGES - 1; ++step) {
        if (step < num_steps) {
            copy_shrink_stage(stages[step], args, work, first_rank, k_begin + step * K_STEP);
        }
        commit_copies();
    }
    for (unsigned step = 0; step < num_steps; ++step) {
        wait_for_copies<SHRINK_STAGES - 2>();
        __syncthreads();
        const unsigned ahead = step + SHRINK_STAGES - 1;
        if (ahead < num_steps) {
            copy_shrink_stage(stages[ahead % SHRINK_STAGES], args, work, first_rank,
                              k_begin + ahead * K_STEP);
        }
        commit_copies();
        ShrinkStage& stage = stages[step % SHRINK_STAGES];
        unsigned x[2][4];
        stage.load_rows(x, threadIdx.x / 32);
#pragma unroll
        for (int pair = 0; pair < SHRINK_PANELS / 2; ++pair) {
            if (first_rank + pair * TILE_COLUMNS < work.group.rank) {
                Pairs a[4];
                stage.load_panels(a, pair, lane);
                mma_stage(c[pair], x, a);
            }
        }
    }
}

__device__ __forceinline__ void store_partial_sums(const float (&c)[SHRINK_PANELS / 2][4][4],
                                                   const LoraArgs& args, const Work& work, unsigned split,
                                                   unsigned first_rank) {
    const Lane lane;
#pragma unroll
    for (int i = 0; i < 2 * SHRINK_PANELS; ++i) {
        const int pair = i / 4;
        const int column = i % 4;
        const unsigned row = threadIdx.x / 32 * TILE_ROWS + lane.g + column / 2 * 8;
        const unsigned rank = first_rank + pair * TILE_COLUMNS + 8 * lane.t + column % 2 * 4;
        if (row < work.item.num_rows && rank < work.group.rank) {
            const size_t at = static_cast<size_t>(split) * args.max_rows + work.item.first_row + row;
            store_global(args.partial_sums + at * args.rank_stride + rank,
                         to_pairs(make_float4(c[pair][0][column], c[pair][1][column], c[pair][2][column],
                                              c[pair][3][column])));
        }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 4) lora_prefill_shrink(const LoraArgs args) {
    __shared__ ShrinkStage stages[SHRINK_STAGES];
    __shared__ Work work;
    __shared__ bool is_last;
    const unsigned split_k = max(256, (args.in_features / 4 + K_STEP - 1) / K_STEP * K_STEP);
    const unsigned num_splits = (args.in_features + split_k - 1) / split_k;
    const unsigned index = blockIdx.x / num_splits;
    const unsigned split = blockIdx.x % num_splits;
    if (!read_work(args, index, work)) {
        return;
    }
    const unsigned k_begin = split * split_k;
    const unsigned k_end = min(k_begin + split_k, args.in_features);
    for (unsigned first_rank = 0; first_rank < work.group.rank; first_rank += SHRINK_RANKS) {
        float c[SHRINK_PANELS / 2][4][4] = {};
        shrink_ranks(c, stages, args, work, first_rank, k_begin, k_end);
        store_partial_sums(c, args, work, split, first_rank);
    }
    if (is_last_split(args.states + index, num_splits, is_last)) {
        sum_splits(args, work, num_splits);
        if (threadIdx.x == 0) {
            args.states[index].num_shrunk = 0;
        }
    }
}

using ExpandStage = Stage<EXPAND_PANELS>;

// s of the item's rows and B of the block's panels at the step's ranks.
__device__ __forceinline__ void copy_expand_stage(ExpandStage& stage, const LoraArgs& args, const Work& work,
                                                  unsigned first_panel, RankStep step) {
    const Module& module = work.group.modules[step.module];
    for (unsigned i = threadIdx.x; i < MAX_ITEM_ROWS * VECTORS; i += THREADS) {
        const unsigned row = i / VECTORS;
        const unsigned rank = step.rank + i % VECTORS * 8;
        const bool is_there = row < work.item.num_rows && rank < module.rank;
        const size_t at = static_cast<size_t>(work.item.first_row + row) * args.rank_stride;
        copy_async(stage.row_vector(row, i % VECTORS),
                   args.s + (is_there ? at + module.rank_offset + rank : 0), is_there);
    }
    for (unsigned i = threadIdx.x; i < EXPAND_PANELS * PAIRS * QUADS; i += THREADS) {
        const unsigned panel = i / (PAIRS * QUADS);
        const unsigned pair = i / QUADS % PAIRS;
        const unsigned in_module = first_panel + panel - module.first_panel;
        const bool is_there = in_module < module.num_panels && step.rank + 2 * pair < module.rank;
        const size_t at = static_cast<size_t>(in_module) * module.rank * PANEL_WIDTH * sizeof(Storage) +
                          ((step.rank / 2 + pair) * PANEL_WIDTH + i % QUADS * 4) * 4;
        copy_async(stage.panel_vector(panel, pair, i % QUADS), module.b + (is_there ? at : 0), is_there);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 3) lora_prefill_expand(const LoraArgs args) {
    __shared__ ExpandStage stages[EXPAND_STAGES];
    __shared__ Work work;
    const unsigned num_panels = args.out_features / PANEL_WIDTH;
    const unsigned num_chunks = (num_panels + EXPAND_PANELS - 1) / EXPAND_PANELS;
    const unsigned first_panel = blockIdx.x % num_chunks * EXPAND_PANELS;
    if (!read_work(args, blockIdx.x / num_chunks, work)) {
        return;
    }
    RankStep step = RankStep::first(work.group, first_panel, EXPAND_PANELS);
    if (step.is_end(work.group)) {
        return;
    }
    copy_expand_stage(stages[0], args, work, first_panel, step);
    commit_copies();
    const Lane lane;
    const unsigned warp = threadIdx.x / 32;
    const OutputTile output(args, work, lane, first_panel + 2 * warp);
    Pairs y[MAX_ROW_TILES][2];
#pragma unroll
    for (int tile = 0; tile < MAX_ROW_TILES; ++tile) {
        output.load(y[tile], tile);
    }
    float c[MAX_ROW_TILES][4][4] = {};
    for (unsigned i = 0; !step.is_end(work.group); ++i) {
        step = step.next(work.group, first_panel, EXPAND_PANELS);
        if (!step.is_end(work.group)) {
            copy_expand_stage(stages[(i + 1) % EXPAND_STAGES], args, work, first_panel, step);
        }
        commit_copies();
        wait_for_copies<1>();
        __syncthreads();
        ExpandStage& stage = stages[i % EXPAND_STAGES];
        Pairs b[4];
        stage.load_panels(b, warp, lane);
#pragma unroll
        for (int tile = 0; tile < MAX_ROW_TILES; ++tile) {
            unsigned s[2][4];
            stage.load_rows(s, tile);
            mma_stage(c[tile], s, b);
        }
        __syncthreads();
    }
    const OutputUnits units(work, lane, first_panel + 2 * warp,
                            args.s_units + static_cast<size_t>(work.item.first_row) * MAX_MODULES);
#pragma unroll
    for (int tile = 0; tile < MAX_ROW_TILES; ++tile) {
        units.apply(c[tile], tile);
        output.add_and_store(y[tile], c[tile], tile, work.item.weight);
    }
}
