// Attention of tokens in flight: to the committed columns of their sequence's KV cache, and to each other by a mask.

#pragma once

#include <algorithm>

#include "simd.h"

namespace mcsd {

// The tokens of a forward and the KV cache: `length` tokens of each sequence, after the `earlier` tokens of earlier
// forwards, which are in the cache but not committed.
struct AttentionMetadata {
    void *keys, *values;  // from the first layer and sequence on, [layers, sequences, kv_heads, slots, head_size]
    int64_t layer_stride, sequence_stride, head_stride;  // in elements
    int64_t sequences, earlier, length;
    const int64_t* lengths;  // [sequences], committed slots, which are also positions
    const int64_t* offsets;  // [earlier + length], positions after the committed ones
    const bool* mask;        // [length, earlier + length], which in-flight tokens a token attends to
    int64_t positions;       // of the model; tokens beyond them get the last one, and are never emitted
    void *cosines, *sines;   // [positions, head_size], of RoPE
};

namespace {

constexpr int64_t MAX_QUERIES = 24;     // that attend to the same keys together
constexpr int64_t QUERY_TILE = 6;       // queries whose sums are all in registers
constexpr float MASKED_BELOW = -1e30f;  // scores of masked columns are below this

// Sums of a query in a tile: of scores, in which even and odd elements may be apart, and of values.
constexpr int SCORE_SUMS = REGISTERS >= 32 ? 2 : 1, VALUE_SUMS = REGISTERS >= 32 ? 4 : 1;

// The position of a token in flight, those of earlier forwards first.
inline int64_t position_of(const AttentionMetadata& metadata, int64_t sequence, int64_t token) {
    return std::min(metadata.lengths[sequence] + metadata.offsets[token], metadata.positions - 1);
}

// A query. It attends to the columns from `begin` to `committed`, and then to those whose byte in `mask` is not 0.
struct Query {
    const float* vector;  // [head_size]
    float* out;           // [head_size]
    int64_t begin, committed;
    const uint8_t* mask;
    float* weights;     // [columns], at first the scores
    float inverse_sum;  // of the weights
};

// Up to 16 keys [count, head_size] as float [head_size][16].
template <bool BF16>
void transpose_keys(const void* keys, int64_t count, int64_t head_size, float* out) {
    const int64_t words = BF16 ? head_size / 2 : head_size;
    for (int64_t first = 0; first < words; first += LANES) {
        Words rows[LANES];
        for (int64_t i = 0; i < LANES; i++) {
            const int32_t* row = static_cast<const int32_t*>(keys) + i * words + first;
            rows[i] = load_words(row, i < count ? lane_mask(words - first) : 0);
        }
        transpose(rows);
        for (int64_t i = 0; i < std::min(LANES, words - first); i++) {
            if (!BF16) {
                store(out + (first + i) * LANES, rows[i]);
                continue;
            }
            Floats lower, upper;
            unpack_bf16(rows[i], lower, upper);
            store(out + 2 * (first + i) * LANES, lower);
            store(out + (2 * (first + i) + 1) * LANES, upper);
        }
    }
}

// Scores of Q queries, scaling * q k, in 16 columns from `column` on. Masked ones are the lowest float.
template <int Q>
void qk(const Query* queries, const float* keys, int64_t column, int64_t columns, int64_t head_size, float scaling) {
    Floats sums[Q][SCORE_SUMS];
#pragma GCC unroll 6
    for (int q = 0; q < Q; q++) {
        sums[q][SCORE_SUMS - 1] = set(0);
        sums[q][0] = set(0);
    }
    for (int64_t i = 0; i < head_size; i += SCORE_SUMS)
#pragma GCC unroll 2
        for (int j = 0; j < SCORE_SUMS; j++) {
            const Floats key = load(keys + (i + j) * LANES);
#pragma GCC unroll 6
            for (int q = 0; q < Q; q++) sums[q][j] = fmadd(set(queries[q].vector[i + j]), key, sums[q][j]);
        }
#pragma GCC unroll 6
    for (int q = 0; q < Q; q++) {
        const Query& query = queries[q];
        const int64_t committed_left = query.committed - column;
        const Mask committed = ~lane_mask(query.begin - column) & lane_mask(committed_left);
        const Mask others = ~lane_mask(committed_left) & lane_mask(columns - column);
        const Mask visible = committed | nonzero_bytes(query.mask + column - query.committed, others);
        Floats sum = sums[q][0];
        if constexpr (SCORE_SUMS == 2) sum = sum + sums[q][1];
        const Floats scores = sum * set(scaling);
        const Floats lowest = set(std::numeric_limits<float>::lowest());
        store(query.weights + column, select(visible, scores, lowest));
    }
}

// In-place softmax numerators, in whole vectors; masked entries become 0. Returns 1 / sum, or NaN if a score is NaN or
// +infinity. The sum depends on the order of the visible columns only, as if they followed each other: a token has the same
// last bits in a tree as after its path was committed.
inline float softmax(const Query& query, int64_t columns) {
    float* weights = query.weights;
    const Floats masked = set(MASKED_BELOW);
    const Floats infinity = set(std::numeric_limits<float>::infinity());
    Floats largest = masked, total = set(0);
    Mask not_finite = 0;
    for (int64_t column = 0; column < columns; column += LANES) {
        const Floats score = load(weights + column);
        not_finite |= at_least_or_nan(score, infinity);
        largest = max(largest, score);
    }
    const Floats highest = set(reduce_max(largest));
    const int64_t whole = std::min(query.committed, columns) / LANES * LANES;
    for (int64_t column = 0; column < columns; column += LANES) {
        const Floats score = load(weights + column);
        const Mask visible = above_or_nan(score, masked);
        const Floats weight = select(visible, exp_ps(score - highest), set(0));
        store(weights + column, weight);
        if (column < whole) total = total + weight;
    }
    float lanes[LANES] = {};
    int64_t filled = 0;
    for (int64_t column = whole; column < columns; column++) {
        if (column >= query.committed && !query.mask[column - query.committed]) continue;
        lanes[filled++] = weights[column];
        if (filled == LANES) {
            total = total + load(lanes);
            std::fill(lanes, lanes + LANES, 0.0f);
            filled = 0;
        }
    }
    total = total + load(lanes);
    return not_finite ? QUIET_NAN : 1 / reduce_add(total);
}

// Softmax-weighted sums of the values [columns, head_size], for Q queries.
template <bool BF16, int Q>
void weighted_sum(const Query* queries, const void* values, int64_t columns, int64_t head_size) {
    for (int64_t i = 0; i < head_size; i += VALUE_SUMS * LANES) {
        Mask masks[VALUE_SUMS];
        Floats sums[Q][VALUE_SUMS];
#pragma GCC unroll 4
        for (int j = 0; j < VALUE_SUMS; j++) masks[j] = lane_mask(head_size - i - j * LANES);
#pragma GCC unroll 6
        for (int q = 0; q < Q; q++)
#pragma GCC unroll 4
            for (int j = 0; j < VALUE_SUMS; j++) sums[q][j] = set(0);
        for (int64_t first = 0; first < columns; first += LANES) {
            // Columns that are masked for all queries may hold NaN.
            uint32_t visible = 0;
#pragma GCC unroll 6
            for (int q = 0; q < Q; q++) visible |= nonzero(as_words(load(queries[q].weights + first)));
            for (; visible; visible &= visible - 1) {
                const int64_t column = first + __builtin_ctz(visible);
                Floats value[VALUE_SUMS];
#pragma GCC unroll 4
                for (int j = 0; j < VALUE_SUMS; j++)
                    value[j] = load<BF16>(values, column * head_size + i + j * LANES, masks[j]);
#pragma GCC unroll 6
                for (int q = 0; q < Q; q++) {
                    const Floats weight = set(queries[q].weights[column]);
#pragma GCC unroll 4
                    for (int j = 0; j < VALUE_SUMS; j++) sums[q][j] = fmadd(weight, value[j], sums[q][j]);
                }
            }
        }
#pragma GCC unroll 6
        for (int q = 0; q < Q; q++) {
            const Floats inverse_sum = set(queries[q].inverse_sum);
#pragma GCC unroll 4
            for (int j = 0; j < VALUE_SUMS; j++)
                store(queries[q].out + i + j * LANES, masks[j], sums[q][j] * inverse_sum);
        }
    }
}

// Attention of up to `MAX_QUERIES` queries to keys and values [columns, head_size] of one head.
template <bool BF16>
void attention(
    Query* queries, int64_t count, FloatView keys, FloatView values, int64_t columns, int64_t head_size,
    float scaling) {
    static constexpr decltype(&qk<1>) QK[] = {nullptr, qk<1>, qk<2>, qk<3>, qk<4>, qk<5>, qk<6>};
    static constexpr decltype(&weighted_sum<BF16, 1>) WEIGHTED_SUM[] = {
        nullptr,
        weighted_sum<BF16, 1>,
        weighted_sum<BF16, 2>,
        weighted_sum<BF16, 3>,
        weighted_sum<BF16, 4>,
        weighted_sum<BF16, 5>,
        weighted_sum<BF16, 6>};
    static thread_local Buffer<float> buffer;
    const int64_t padded = round_up(columns, LANES);
    buffer.reserve(head_size * LANES + count * padded);
    float* transposed = buffer.data();
    for (int64_t q = 0; q < count; q++) queries[q].weights = transposed + head_size * LANES + q * padded;
    for (int64_t column = 0; column < columns; column += LANES) {
        const void* some_keys = keys.at(column * head_size).data;
        transpose_keys<BF16>(some_keys, std::min(LANES, columns - column), head_size, transposed);
        for (int64_t q = 0; q < count; q += QUERY_TILE)
            QK[std::min(QUERY_TILE, count - q)](queries + q, transposed, column, columns, head_size, scaling);
    }
    for (int64_t q = 0; q < count; q++) queries[q].inverse_sum = softmax(queries[q], columns);
    for (int64_t q = 0; q < count; q += QUERY_TILE)
        WEIGHTED_SUM[std::min(QUERY_TILE, count - q)](queries + q, values.data, columns, head_size);
}

}  // namespace
}  // namespace mcsd
