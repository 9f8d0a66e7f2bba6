// Logits to tokens: two launches for all rows of a step, whatever each row asks for.
//
//   scan_logits   per 4096 logits: is a NaN among them, maximum, Σ exp, first k; then the logits changed
//                 (repetition, presence and frequency penalties, bias, bans) and their maximum
//   draw_tokens   per row: those merged; greedy rows are done. Others go over the row, which by now is in L2:
//                 for what top_k, top_p, min_p and typical_p leave (sampling_select.cuh), and for the draw
//
// A token's weight is round(2^30 · exp((x - max) / temperature)). Sums are of integers: no order of threads,
// no split and no neighbour in the batch changes a row's token, and the CPU draws the same one.
//
// Grid    scan_logits: ⌈vocab / 4096⌉, num_rows       draw_tokens: num_rows
// Block   256 threads, 16 logits each                 1024 threads, four logits each at a time
// Shared  16 KiB                                      29 KiB
#include "sampling.cuh"
#include "sampling_select.cuh"

constexpr int SCAN_THREADS = 256;
constexpr int SPLIT_LEN = 4096;
constexpr int NUM_ROUNDS = SPLIT_LEN / (4 * SCAN_THREADS);

// The step's lists of tokens: ids of all rows that were seen, then those counted, biased and banned.
struct Lists {
    const int* ids;
    const float* amounts;  // counts, then biases
    float* saved;          // beside ids: the logit before this list changed it, where logprobs are asked for
    unsigned num_seen, num_counted, num_biased;
};

struct Scan {
    float4 values[SPLIT_LEN / 4];
    u64 firsts[SCAN_THREADS / 32];
    float sums[SCAN_THREADS / 32];
};

// The smallest over the block; every thread gets it.
__device__ u64 first_of_block(Scan& scan, u64 position) {
    for (int offset = 16; offset > 0; offset /= 2) {
        position = min_of(position, __shfl_xor_sync(ALL_LANES, position, offset));
    }
    __syncthreads();
    if (threadIdx.x % 32 == 0) {
        scan.firsts[threadIdx.x / 32] = position;
    }
    __syncthreads();
    for (int warp = 0; warp < SCAN_THREADS / 32; ++warp) {
        position = min_of(position, scan.firsts[warp]);
    }
    return position;
}

// The sum over the block, in one order.
__device__ float sum_of_block(Scan& scan, float value) {
    for (int offset = 16; offset > 0; offset /= 2) {
        value += __shfl_xor_sync(ALL_LANES, value, offset);
    }
    if (threadIdx.x % 32 == 0) {
        scan.sums[threadIdx.x / 32] = value;
    }
    __syncthreads();
    float sum = 0;
    for (int warp = 0; warp < SCAN_THREADS / 32; ++warp) {
        sum += scan.sums[warp];
    }
    return sum;
}

// A thread's logits: four from id `first_id(r)` on for each round r. They lie in shared memory, so that nothing
// here has to be unrolled to stay in registers.
struct Own {
    float4* values;  // of the split
    int start, len;  // of the split, of the row

    __device__ int first_id(int round) const {
        return start + 4 * (round * SCAN_THREADS + threadIdx.x);
    }
    __device__ float4& at(int round) const {
        return values[round * SCAN_THREADS + threadIdx.x];
    }
    template <class Visit>
    __device__ void for_each(Visit visit) const {
#pragma unroll 1
        for (int round = 0; round < NUM_ROUNDS; ++round) {
            const int id = first_id(round);
            const float4 v = at(round);
            const float own[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                if (id + i < len) {
                    visit(own[i], id + i);
                }
            }
        }
    }
    // The first position after another.
    __device__ u64 first_after(u64 taken) const {
        u64 first = NO_POSITION;
        for_each([&](float value, int id) {
            const u64 position = position_of(order_key(value), id);
            first = position > taken ? min_of(first, position) : first;
        });
        return first;
    }
    __device__ u64 first() const {
        u64 first = NO_POSITION;
        for_each([&](float value, int id) { first = min_of(first, position_of(order_key(value), id)); });
        return first;
    }
};

// The first k positions of the split, in order.
__device__ void write_top(Scan& scan, const Own& own, u64 own_first, int k, u64* top) {
    for (int i = 0; i < k; ++i) {
        const u64 taken = first_of_block(scan, own_first);
        if (own_first == taken && taken != NO_POSITION) {
            own_first = own.first_after(taken);
        }
        if (threadIdx.x == 0) {
            top[i] = taken;
        }
    }
}

// Applies `change(logit, index in the list)` to what lies in the split; ids of one list are distinct.
template <class Change>
__device__ void change_listed(float* values, int start, const int* ids, const unsigned (&range)[2],
                              float* saved, Change change) {
    for (unsigned i = range[0] + threadIdx.x; i < range[1]; i += SCAN_THREADS) {
        const unsigned place = ids[i] - start;
        if (place < SPLIT_LEN) {
            if (saved != nullptr) {
                saved[i] = values[place];
            }
            values[place] = change(values[place], i);
        }
    }
    __syncthreads();
}

__device__ void change_logits(Scan& scan, const Own& own, const RowParams& row, const Lists& lists) {
    float* const values = reinterpret_cast<float*>(scan.values);
    const bool is_saved = row.num_logprobs >= 0;
    const int* ids = lists.ids;
    float* saved = is_saved ? lists.saved : nullptr;
    const auto next_list = [&](unsigned len) {
        ids += len;
        saved = is_saved ? saved + len : nullptr;
    };
    change_listed(values, own.start, ids, row.seen, saved, [&](float x, unsigned) {
        return x > 0 ? __fdiv_rn(x, row.repetition_penalty) : __fmul_rn(x, row.repetition_penalty);
    });
    next_list(lists.num_seen);
    const float* const counts = lists.amounts;
    change_listed(values, own.start, ids, row.counted, saved, [&](float x, unsigned i) {
        const float penalty = __fmul_rn(row.frequency_penalty, counts[i]);
        return __fsub_rn(x, __fadd_rn(row.presence_penalty, penalty));
    });
    next_list(lists.num_counted);
    const float* const biases = counts + lists.num_counted;
    change_listed(values, own.start, ids, row.biased, saved,
                  [&](float x, unsigned i) { return __fadd_rn(x, biases[i]); });
    next_list(lists.num_biased);
    for (unsigned i = row.banned[0] + threadIdx.x; i < row.banned[1]; i += SCAN_THREADS) {
        const unsigned place = ids[i] - own.start;
        if (place < SPLIT_LEN) {
            atomicExch(values + place, -infinity());  // a token may be banned twice
        }
    }
    __syncthreads();
}

// What the mask of allowed tokens leaves of four logits from `id` on; `id` is a multiple of four.
__device__ float4 masked(float4 x, const unsigned* mask, int id) {
    const unsigned bits = mask[id / 32] >> id % 32;
    return make_float4(bits & 1 ? x.x : -infinity(), bits & 2 ? x.y : -infinity(),
                       bits & 4 ? x.z : -infinity(), bits & 8 ? x.w : -infinity());
}

// logits [rows, len] change in place. partials [rows, splits], top [rows, splits, MAX_LOGPROBS],
// masks [masks, ⌈len / 32⌉] with a bit for each token that may come.
extern "C" __global__ void __launch_bounds__(SCAN_THREADS)
    scan_logits(float* logits, unsigned len, const RowParams* __restrict__ params,
                const int* __restrict__ ids, const float* __restrict__ amounts, float* saved,
                unsigned num_seen, unsigned num_counted, unsigned num_biased,
                const unsigned* __restrict__ masks, Partial* partials, u64* top) {
    __shared__ Scan scan;
    const RowParams& row = params[blockIdx.y];
    float* const x = logits + static_cast<size_t>(blockIdx.y) * len;
    const size_t split = static_cast<size_t>(blockIdx.y) * gridDim.x + blockIdx.x;
    const Own own = {scan.values, static_cast<int>(blockIdx.x * SPLIT_LEN), static_cast<int>(len)};
    float4 loaded[NUM_ROUNDS];
#pragma unroll
    for (int round = 0; round < NUM_ROUNDS; ++round) {
        loaded[round] = load_logits(x, len, own.first_id(round));
    }
#pragma unroll
    for (int round = 0; round < NUM_ROUNDS; ++round) {
        own.at(round) = loaded[round];
    }
    bool has_nan = false;
    own.for_each([&](float value, int) { has_nan |= isnan(value); });
    has_nan = __syncthreads_or(has_nan);
    u64 own_first = own.first(), first = first_of_block(scan, own_first);
    Partial partial = {first, has_nan ? __int_as_float(0x7fffffff) : logit_of(first), 0.0f, x[own.start],
                       0.0f};
    if (row.num_logprobs >= 0) {
        float sum = 0;
        own.for_each([&](float value, int) { sum += expf(value - partial.raw_max); });
        sum = sum_of_block(scan, sum);
        partial.raw_sum = partial.raw_max == -infinity() ? 0.0f : sum;
        write_top(scan, own, own_first, row.num_logprobs, top + split * MAX_LOGPROBS);
    }
    if (row.changes_logits()) {
        __syncthreads();
        change_logits(scan, own, row, {ids, amounts, saved, num_seen, num_counted, num_biased});
        const unsigned* const mask = masks + static_cast<size_t>(max(row.mask, 0)) * ((len + 31) / 32);
#pragma unroll 1
        for (int round = 0; round < NUM_ROUNDS; ++round) {
            const int id = own.first_id(round);
            if (row.mask >= 0 && id < own.len) {
                own.at(round) = masked(own.at(round), mask, id);
            }
            if (len % 4 == 0 && id < own.len) {
                reinterpret_cast<float4*>(x)[id / 4] = own.at(round);
            }
        }
        if (len % 4 != 0) {
            own.for_each([&](float value, int id) { x[id] = value; });
        }
        partial.first = first_of_block(scan, own.first());
    }
    if (threadIdx.x == 0) {
        partials[split] = partial;
    }
}

// A row's partials merged.
struct Merged {
    u64 first;
    float max, sum;  // of the logits as they came
};

// By the first warp; the sum in one order.
__device__ Merged merge(const Partial* partials, int num_splits) {
    const int lane = threadIdx.x % 32;
    Merged all = {NO_POSITION, -infinity(), 0.0f};
    bool has_nan = false;
    for (int split = lane; split < num_splits; split += 32) {
        all.first = min_of(all.first, partials[split].first);
        all.max = fmaxf(all.max, partials[split].raw_max);
        has_nan |= isnan(partials[split].raw_max);
    }
    for (int offset = 16; offset > 0; offset /= 2) {
        all.first = min_of(all.first, __shfl_xor_sync(ALL_LANES, all.first, offset));
        all.max = fmaxf(all.max, __shfl_xor_sync(ALL_LANES, all.max, offset));
    }
    if (__any_sync(ALL_LANES, has_nan)) {
        all.max = __int_as_float(0x7fffffff);
    }
    for (int split = lane; split < num_splits; split += 32) {
        all.sum += partials[split].raw_sum * expf(partials[split].raw_max - all.max);
    }
    for (int offset = 16; offset > 0; offset /= 2) {
        all.sum += __shfl_xor_sync(ALL_LANES, all.sum, offset);
    }
    return all;
}

// The first k of all splits, by the first warp. top [splits, MAX_LOGPROBS], each split's in order.
__device__ void write_top_logprobs(const u64* top, int num_splits, int k, float max, float log_sum,
                                   Logprobs& out) {
    const auto first_after = [&](u64 taken, bool is_any) {
        u64 first = NO_POSITION;
        for (int split = threadIdx.x; split < num_splits; split += 32) {
            for (int i = 0; i < k; ++i) {
                const u64 position = top[split * MAX_LOGPROBS + i];
                if (is_any || position > taken) {
                    first = min_of(first, position);
                    break;
                }
            }
        }
        return first;
    };
    u64 own = first_after(0, true);
    for (int i = 0; i < k; ++i) {
        u64 taken = own;
        for (int offset = 16; offset > 0; offset /= 2) {
            taken = min_of(taken, __shfl_xor_sync(ALL_LANES, taken, offset));
        }
        if (own == taken && taken != NO_POSITION) {
            own = first_after(taken, false);
        }
        if (threadIdx.x == 0) {
            out.top_ids[i] = static_cast<int>(taken);  // -1 behind the last token
            out.top[i] = logit_of(taken) - max - log_sum;
        }
    }
}

// The token's logit as it came: where a list changed it, what the first of them saved.
__device__ float raw_logit(Shared& shared, const float* x, int token, const RowParams& row,
                           const Lists& lists) {
    __syncthreads();
    if (threadIdx.x == 0) {
        shared.found = ~0u;
    }
    __syncthreads();
    const auto search = [&](const unsigned (&range)[2], unsigned start) {
        for (unsigned i = start + range[0] + threadIdx.x; i < start + range[1]; i += NUM_THREADS) {
            if (lists.ids[i] == token) {
                atomicMin(&shared.found, i);
            }
        }
    };
    search(row.seen, 0);
    search(row.counted, lists.num_seen);
    search(row.biased, lists.num_seen + lists.num_counted);
    __syncthreads();
    return shared.found == ~0u ? x[token] : lists.saved[shared.found];
}

// tokens, is_finite [rows]; logprobs [rows], written where asked for. Others as in `scan_logits`.
extern "C" __global__ void __launch_bounds__(NUM_THREADS)
    draw_tokens(const float* logits, unsigned len, const RowParams* __restrict__ params,
                const int* __restrict__ ids, float* saved, unsigned num_seen, unsigned num_counted,
                const Partial* __restrict__ partials, const u64* __restrict__ top, unsigned num_splits,
                int* tokens, int* is_row_finite, Logprobs* logprobs) {
    __shared__ Shared shared;
    const RowParams& row = params[blockIdx.x];
    const float* const x = logits + static_cast<size_t>(blockIdx.x) * len;
    const size_t first_split = static_cast<size_t>(blockIdx.x) * num_splits;
    __shared__ Merged merged;
    if (threadIdx.x < 32) {
        const Merged all = merge(partials + first_split, num_splits);
        if (threadIdx.x == 0) {
            merged = all;
        }
    }
    __syncthreads();
    int token = 0;
    if (is_finite(merged.max)) {
        const float max = logit_of(merged.first);  // by now
        token = static_cast<int>(merged.first);
        if (row.temperature > 0 && is_finite(max)) {
            token = draw(shared, {x, static_cast<int>(len), max, row.temperature}, row);
        }
        if (row.num_logprobs >= 0) {
            Logprobs& out = logprobs[blockIdx.x];
            const float log_sum = logf(merged.sum);
            if (threadIdx.x < 32) {
                write_top_logprobs(top + first_split * MAX_LOGPROBS, num_splits, row.num_logprobs, merged.max,
                                   log_sum, out);
            }
            const Lists lists = {ids, nullptr, saved, num_seen, num_counted, 0};
            // Where no token is left the first is chosen, which no list may have saved.
            const float raw =
                max > -infinity() ? raw_logit(shared, x, token, row, lists) : partials[first_split].raw_start;
            if (threadIdx.x == 0) {
                out.chosen = raw - merged.max - log_sum;
            }
        }
    }
    if (threadIdx.x == 0) {
        tokens[blockIdx.x] = token;
        is_row_finite[blockIdx.x] = is_finite(merged.max);
    }
}

// Token ids -1 - j become entry j of the tokens sampled last.
extern "C" __global__ void __launch_bounds__(SCAN_THREADS)
    take_sampled(int* token_ids, unsigned num_tokens, const int* __restrict__ sampled) {
    const unsigned i = blockIdx.x * SCAN_THREADS + threadIdx.x;
    if (i < num_tokens && token_ids[i] < 0) {
        token_ids[i] = sampled[-1 - token_ids[i]];
    }
}
