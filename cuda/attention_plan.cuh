// The units of work that paged attention cuts a step into; the host has planned them (attention_plan.rs).
//
//   row     query r / G, head r % G of the G heads that share a kv head
//   tile    16 rows of one sequence: the M of an mma
//   split   256 keys at fixed positions
//   unit    a tile, or one split of a tile where `Partials` has room for its results
#pragma once

constexpr int TILE_ROWS = 16;
constexpr int SPLIT_KEYS = 256;

// The query rows of a sequence, for one kv head.
struct Sequence {
    int first_query, num_queries, context_len, group_size;

    __device__ int num_rows() const {
        return num_queries * group_size;
    }
    __device__ int num_tiles() const {
        return (num_rows() + TILE_ROWS - 1) / TILE_ROWS;
    }
    __device__ int rows_of_tile(int tile) const {
        return min(num_rows() - tile * TILE_ROWS, TILE_ROWS);
    }
    __device__ int keys_of_tile(int tile) const {
        const int last_row = tile * TILE_ROWS + rows_of_tile(tile) - 1;
        return context_len - num_queries + last_row / group_size + 1;
    }
    // At least one: rows of padding see no key, and get zeros.
    __device__ int splits_of_tile(int tile) const {
        return max((keys_of_tile(tile) + SPLIT_KEYS - 1) / SPLIT_KEYS, 1);
    }
    __device__ int num_splits() const {
        return splits_of_tile(num_tiles() - 1);
    }
    // Rows in `Partials` of a split of any tile.
    __device__ int rows_of_split() const {
        return min(num_rows(), TILE_ROWS);
    }
};

struct Batch {
    const int* query_indptr;  // [num_seqs + 1]
    const int* context_lens;  // [num_seqs]
    int num_seqs, group_size;

    __device__ Sequence sequence(int i) const {
        return {query_indptr[i], query_indptr[i + 1] - query_indptr[i], context_lens[i], group_size};
    }
};

// [num_seqs] each, in shared memory.
struct Plan {
    const int* unit_ends;       // units of this and all earlier sequences
    const int* first_partials;  // the sequence's first row in `Partials`, -1 where its units are whole tiles
};

struct Unit {
    int sequence, tile;
    int first_split,
        end_split;  // may lie past `num_splits`, those with keys: later tiles of a sequence see more
    int num_splits;
    int first_partial,
        partial_rows;  // rows of the tile in `Partials`: the first (-1 for a whole tile), and per split
};

// The plan in global memory, copied to `memory`: two ints per sequence. For all threads of a block.
__device__ Plan load_plan(const int* unit_ends, const int* first_partials, int num_seqs, int* memory) {
    for (int i = threadIdx.x; i < num_seqs; i += blockDim.x) {
        memory[i] = unit_ends[i];
        memory[num_seqs + i] = first_partials[i];
    }
    __syncthreads();
    return {memory, memory + num_seqs};
}

__device__ int find_sequence(const Plan& plan, int num_seqs, int unit) {
    int first = 0, last = num_seqs - 1;
    while (first < last) {
        const int middle = (first + last) / 2;
        if (plan.unit_ends[middle] > unit) {
            last = middle;
        } else {
            first = middle + 1;
        }
    }
    return first;
}

__device__ Unit find_unit(const Batch& batch, const Plan& plan, int index) {
    const int i = find_sequence(plan, batch.num_seqs, index);
    const Sequence seq = batch.sequence(i);
    const int unit = index - (i > 0 ? plan.unit_ends[i - 1] : 0);
    if (plan.first_partials[i] < 0) {
        const int num_splits = seq.splits_of_tile(unit);
        return {i, unit, 0, num_splits, num_splits, -1, 0};
    }
    const int units_of_tile = seq.num_splits(), partial_rows = seq.rows_of_split();
    const int tile = unit / units_of_tile, split = unit % units_of_tile;
    const int first_partial = plan.first_partials[i] + tile * units_of_tile * partial_rows;
    return {i, tile, split, split + 1, seq.splits_of_tile(tile), first_partial, partial_rows};
}
