// What top_k, top_p, min_p and typical_p leave of a row, and the draw from it, by one block.
//
// Nothing is sorted. A cut is the position (key, id) of the last token that stays: a histogram over 2048
// buckets of the order says in which of them the count or the mass reaches its limit; the tokens of that
// bucket, listed if they are few, are told apart by 11, 11 and 10 bits of their keys; equal ones by their ids.
#pragma once
#include "sampling.cuh"

constexpr int NUM_THREADS = 1024;
constexpr int NUM_WARPS = NUM_THREADS / 32;
constexpr int TILE_LEN = 4 * NUM_THREADS;
constexpr int MAX_TILES = 80;
constexpr int SEGMENTS_PER_THREAD = (MAX_TILES * NUM_WARPS + NUM_THREADS - 1) / NUM_THREADS;
constexpr int NUM_BUCKETS = 2048;
constexpr int MAX_LISTED = 1024;
constexpr float LEAST_Y = -22.0f;  // below, weights are 0

struct Histogram {
    unsigned count[NUM_BUCKETS], mass_low[NUM_BUCKETS], mass_high[NUM_BUCKETS];
};

// Where a histogram's count or mass reaches a limit.
struct Crossing {
    int bucket;      // -1: nowhere
    unsigned count;  // in the bucket
    u64 before;      // count or mass of the buckets before it
};

struct Shared {
    union {
        Histogram histogram;
        u64 segments[MAX_TILES * NUM_WARPS];  // sums of 128 neighbours each
    };
    int listed[MAX_LISTED];
    unsigned num_listed;
    u64 warp_sums[NUM_WARPS];
    Crossing crossing;
    int segment;
    u64 segment_target;
    unsigned found;
};

struct Row {
    const float* x;
    int len;
    float max, temperature;

    // (x - max) / temperature, or -∞ for what has no weight.
    __device__ float scaled(float value) const {
        const float d = __fsub_rn(value, max);
        return d < -23.01f * temperature ? -infinity() : __fdiv_rn(d, temperature);
    }
    // visit(logit, id), four neighbours a thread at a time; the next four are on their way meanwhile.
    template <class Visit>
    __device__ void for_each(Visit visit) const {
        float4 next = load_logits(x, len, 4 * threadIdx.x);
#pragma unroll 1
        for (int id = 4 * threadIdx.x; id < len; id += TILE_LEN) {
            const float4 v = next;
            next = load_logits(x, len, id + TILE_LEN);
            visit(v.x, id);
            visit(v.y, id + 1);
            visit(v.z, id + 2);
            visit(v.w, id + 3);
        }
    }
};

// A token on its way into a histogram.
struct Candidate {
    int bucket;    // coarse order
    unsigned key;  // order within a bucket
    unsigned weight;
};

struct Sums {
    u64 before, total;  // of the threads before this one, of all
};

__device__ Sums block_scan(Shared& shared, u64 value) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    u64 sum = value;
    for (int offset = 1; offset < 32; offset *= 2) {
        const u64 other = __shfl_up_sync(ALL_LANES, sum, offset);
        sum += lane >= offset ? other : 0;
    }
    __syncthreads();
    if (lane == 31) {
        shared.warp_sums[warp] = sum;
    }
    __syncthreads();
    Sums sums = {sum - value, 0};
    for (int other = 0; other < NUM_WARPS; ++other) {
        sums.before += other < warp ? shared.warp_sums[other] : 0;
        sums.total += shared.warp_sums[other];
    }
    return sums;
}

// The sum over a warp of values up to 2^32.
__device__ u64 warp_sum(u64 value) {
    const unsigned low = __reduce_add_sync(ALL_LANES, static_cast<unsigned>(value) & 0xffffffu);
    const unsigned high = __reduce_add_sync(ALL_LANES, static_cast<unsigned>(value >> 24));
    return (static_cast<u64>(high) << 24) + low;
}

// The first id at which the running sum of amount(logit, id) passes target(sum of all); 0 if none does.
template <class Amount, class Target>
__device__ int first_passing(Shared& shared, const Row& row, Amount amount, Target target_of) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int num_tiles = (row.len + TILE_LEN - 1) / TILE_LEN;
    __syncthreads();
    if (threadIdx.x == 0) {
        shared.segment = shared.segment_target = shared.found = 0;
    }
    for (int tile = 0; tile < num_tiles; ++tile) {
        const int id = tile * TILE_LEN + 4 * threadIdx.x;
        const float4 v = load_logits(row.x, row.len, id);
        const u64 sum = static_cast<u64>(amount(v.x, id)) + amount(v.y, id + 1) + amount(v.z, id + 2) +
                        amount(v.w, id + 3);
        const u64 segment = warp_sum(sum);
        if (lane == 0) {
            shared.segments[tile * NUM_WARPS + warp] = segment;
        }
    }
    __syncthreads();
    u64 segments[SEGMENTS_PER_THREAD], sum = 0;
#pragma unroll
    for (int i = 0; i < SEGMENTS_PER_THREAD; ++i) {
        const int segment = threadIdx.x * SEGMENTS_PER_THREAD + i;
        segments[i] = segment < num_tiles * NUM_WARPS ? shared.segments[segment] : 0;
        sum += segments[i];
    }
    const Sums sums = block_scan(shared, sum);
    const u64 target = target_of(sums.total);
    u64 before = sums.before;
#pragma unroll
    for (int i = 0; i < SEGMENTS_PER_THREAD; ++i) {
        if (before <= target && target < before + segments[i]) {
            shared.segment = threadIdx.x * SEGMENTS_PER_THREAD + i;
            shared.segment_target = target - before;
        }
        before += segments[i];
    }
    __syncthreads();
    if (warp == 0) {
        const int id = shared.segment * 128 + 4 * lane;
        const float4 v = load_logits(row.x, row.len, id);
        const unsigned amounts[4] = {amount(v.x, id), amount(v.y, id + 1), amount(v.z, id + 2),
                                     amount(v.w, id + 3)};
        u64 own = static_cast<u64>(amounts[0]) + amounts[1] + amounts[2] + amounts[3], running = own;
        for (int offset = 1; offset < 32; offset *= 2) {
            const u64 other = __shfl_up_sync(ALL_LANES, running, offset);
            running += lane >= offset ? other : 0;
        }
        running -= own;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            if (running <= shared.segment_target && shared.segment_target < running + amounts[i]) {
                shared.found = id + i;
            }
            running += amounts[i];
        }
    }
    __syncthreads();
    return shared.found;
}

__device__ void clear(Histogram& histogram) {
    __syncthreads();
    for (int bucket = threadIdx.x; bucket < NUM_BUCKETS; bucket += NUM_THREADS) {
        histogram.count[bucket] = histogram.mass_low[bucket] = histogram.mass_high[bucket] = 0;
    }
    __syncthreads();
}

__device__ void add(Histogram& histogram, int bucket, unsigned weight) {
    atomicAdd(histogram.count + bucket, 1);
    const unsigned low = atomicAdd(histogram.mass_low + bucket, weight);
    if (low + weight < low) {
        atomicAdd(histogram.mass_high + bucket, 1);
    }
}

// The first bucket up to whose end the count, or the mass, is `limit` or more. Every thread gets it.
__device__ Crossing cross(Shared& shared, bool by_count, u64 limit) {
    __syncthreads();
    const Histogram& histogram = shared.histogram;
    unsigned count[2];
    u64 amount[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const int bucket = 2 * threadIdx.x + i;
        count[i] = histogram.count[bucket];
        const u64 mass = static_cast<u64>(histogram.mass_high[bucket]) << 32 | histogram.mass_low[bucket];
        amount[i] = by_count ? count[i] : mass;
    }
    u64 before = block_scan(shared, amount[0] + amount[1]).before;
    if (threadIdx.x == 0) {
        shared.crossing.bucket = -1;
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        if (before < limit && limit <= before + amount[i]) {
            shared.crossing = {static_cast<int>(2 * threadIdx.x + i), count[i], before};
        }
        before += amount[i];
    }
    __syncthreads();
    return shared.crossing;
}

// What stays of a row.
struct Kept {
    u64 last = NO_POSITION;  // by logit
    unsigned min_weight = 1;
    int mean = 0;                    // of y · 2^16
    u64 last_typical = NO_POSITION;  // by distance from the mean

    // y · 2^16's distance from the mean.
    __device__ unsigned distance(float y) const {
        return abs(scaled_exponent(y) - mean);
    }
    // A token's weight, 0 if it doesn't stay.
    __device__ unsigned weight(float x, int id, float y) const {
        const unsigned w = weight_of(y);
        const bool stays = w >= min_weight && position_of(order_key(x), id) <= last &&
                           (last_typical == NO_POSITION || position_of(distance(y), id) <= last_typical);
        return stays ? w : 0;
    }
};

enum Stage { TOP_K, TOP_P, TYPICAL_P };

// A row, what stays of it so far, and the order of the stage that is next.
struct Selection {
    Row row;
    Kept kept;
    int stage;

    __device__ unsigned weight(float x, int id) const {
        return kept.weight(x, id, row.scaled(x));
    }
    // Whether a token takes part, and as what.
    __device__ bool is_candidate(float x, int id, Candidate& candidate) const {
        const float y = row.scaled(x);
        candidate.weight = kept.weight(x, id, y);
        if (stage == TYPICAL_P) {
            candidate.key = kept.distance(y);
            candidate.bucket = candidate.key >> 10;
            return candidate.weight > 0;
        }
        candidate.key = order_key(x);
        candidate.bucket = __fmul_rn(-y, (NUM_BUCKETS - 1) / -LEAST_Y);
        return y >= LEAST_Y;
    }
};

// Lists the candidates of a bucket.
__device__ void list_bucket(Shared& shared, const Selection& selection, int bucket) {
    if (threadIdx.x == 0) {
        shared.num_listed = 0;
    }
    __syncthreads();
    selection.row.for_each([&](float x, int id) {
        Candidate candidate;
        if (selection.is_candidate(x, id, candidate) && candidate.bucket == bucket) {
            shared.listed[atomicAdd(&shared.num_listed, 1)] = id;
        }
    });
    __syncthreads();
}

// Position of the last token that stays, if tokens in the order of the stage stay until their count (top_k), or
// their mass, has reached `limit`, at least 1.
__device__ u64 cut(Shared& shared, const Selection& selection, u64 limit) {
    const bool by_count = selection.stage == TOP_K;
    const Row& row = selection.row;
    Histogram& histogram = shared.histogram;
    clear(histogram);
    row.for_each([&](float x, int id) {
        Candidate candidate;
        if (selection.is_candidate(x, id, candidate)) {
            add(histogram, candidate.bucket, candidate.weight);
        }
    });
    Crossing at = cross(shared, by_count, limit);
    if (at.bucket < 0) {
        return NO_POSITION;
    }
    const int bucket = at.bucket;
    const bool is_listed = at.count <= MAX_LISTED;
    if (is_listed) {
        list_bucket(shared, selection, bucket);
    }
    limit -= at.before;
    unsigned key = 0;  // its upper bits, as many as are known
#pragma unroll 1
    for (int digit = 0; digit < 3; ++digit) {
        const int shift = digit == 0 ? 21 : digit == 1 ? 10 : 0, width = digit == 2 ? 10 : 11;
        const auto add_digit = [&](float x, int id) {
            Candidate candidate;
            if (selection.is_candidate(x, id, candidate) && candidate.bucket == bucket &&
                static_cast<u64>(candidate.key) >> (shift + width) == key) {
                add(histogram, candidate.key >> shift & ((1 << width) - 1), candidate.weight);
            }
        };
        clear(histogram);
        if (is_listed) {
            if (threadIdx.x < shared.num_listed) {
                const int id = shared.listed[threadIdx.x];
                add_digit(row.x[id], id);
            }
        } else {
            row.for_each(add_digit);
        }
        at = cross(shared, by_count, limit);
        limit -= at.before;
        key = key << width | at.bucket;
    }
    if (at.count == 1 || (by_count && limit == at.count)) {
        return position_of(key, ~0u);
    }
    const auto amount = [&](float x, int id) -> unsigned {
        Candidate candidate;
        const bool is_tie = selection.is_candidate(x, id, candidate) && candidate.key == key;
        return !is_tie ? 0 : by_count ? 1 : candidate.weight;
    };
    return position_of(key, first_passing(shared, row, amount, [&](u64) { return limit - 1; }));
}

// The least integer that is not below a limit: integers below the limit are those below it.
__device__ u64 ceiling(double limit) {
    return __double2ull_ru(limit);
}

// The mass of what stays, and the mean of y · 2^16 over it, rounded down.
__device__ u64 total(Shared& shared, const Selection& selection, int& mean) {
    u64 mass = 0, moment = 0;  // the moment negated
    selection.row.for_each([&](float x, int id) {
        const float y = selection.row.scaled(x);
        const unsigned w = selection.kept.weight(x, id, y);
        if (w > 0) {
            mass += w;
            moment += static_cast<u64>(w) * static_cast<unsigned>(-scaled_exponent(y));
        }
    });
    mass = block_scan(shared, mass).total;
    moment = block_scan(shared, moment).total;
    mean = -static_cast<int>((moment + mass - 1) / mass);
    return mass;
}

// The token that `params.bits` draw; the row's maximum is finite.
__device__ int draw(Shared& shared, const Row& row, const RowParams& params) {
    Selection selection = {row, {}, TOP_K};
    Kept& kept = selection.kept;
#pragma unroll 1
    for (int stage = TOP_K; stage <= TYPICAL_P; ++stage) {
        if (stage == TYPICAL_P && params.min_p > 0) {
            const u64 least = ceiling(__dmul_rn(params.min_p, MAX_WEIGHT));
            kept.min_weight = least;
        }
        const double share = stage == TOP_P ? params.top_p : params.typical_p;
        if (stage == TOP_K ? params.top_k == 0 : share >= 1) {
            continue;
        }
        selection.stage = stage;
        u64 limit = params.top_k;
        if (stage != TOP_K) {
            const u64 mass = total(shared, selection, kept.mean);
            limit = ceiling(__dmul_rn(share, static_cast<double>(mass)));
        }
        const u64 last = cut(shared, selection, limit);
        (stage == TYPICAL_P ? kept.last_typical : kept.last) =
            min_of(last, stage == TYPICAL_P ? last : kept.last);
    }
    const auto weight = [&](float x, int id) { return selection.weight(x, id); };
    return first_passing(shared, row, weight, [&](u64 mass) { return __umul64hi(params.bits, mass); });
}
