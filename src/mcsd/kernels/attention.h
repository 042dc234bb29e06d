// Attention of tokens in flight: to the committed columns of their sequence's KV cache, and to each other by a mask.

#pragma once

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

// Transposes 16 x 16 words.
inline void transpose(__m512i (&rows)[LANES]) {
    __m512i parts[LANES];
    for (int i = 0; i < LANES; i += 2) {
        parts[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
        parts[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
    }
    for (int i = 0; i < LANES; i += 4)
        for (int j = 0; j < 2; j++) {
            rows[i + 2 * j] = _mm512_unpacklo_epi64(parts[i + j], parts[i + 2 + j]);
            rows[i + 2 * j + 1] = _mm512_unpackhi_epi64(parts[i + j], parts[i + 2 + j]);
        }
    for (int j = 0; j < 4; j++) {
        const __m512i even[] = {
            _mm512_shuffle_i32x4(rows[j], rows[j + 4], 0x88), _mm512_shuffle_i32x4(rows[j + 8], rows[j + 12], 0x88)};
        const __m512i odd[] = {
            _mm512_shuffle_i32x4(rows[j], rows[j + 4], 0xdd), _mm512_shuffle_i32x4(rows[j + 8], rows[j + 12], 0xdd)};
        rows[j] = _mm512_shuffle_i32x4(even[0], even[1], 0x88);
        rows[j + 4] = _mm512_shuffle_i32x4(odd[0], odd[1], 0x88);
        rows[j + 8] = _mm512_shuffle_i32x4(even[0], even[1], 0xdd);
        rows[j + 12] = _mm512_shuffle_i32x4(odd[0], odd[1], 0xdd);
    }
}

// Up to 16 keys [count, head_size] as float [head_size][16].
template <bool BF16>
void transpose_keys(const void* keys, int64_t count, int64_t head_size, float* out) {
    const int64_t words = BF16 ? head_size / 2 : head_size;
    for (int64_t first = 0; first < words; first += LANES) {
        __m512i rows[LANES];
        for (int64_t i = 0; i < LANES; i++)
            rows[i] = _mm512_maskz_loadu_epi32(
                i < count ? lane_mask(words - first) : 0, static_cast<const int32_t*>(keys) + i * words + first);
        transpose(rows);
        for (int64_t i = 0; i < std::min(LANES, words - first); i++) {
            if (!BF16) {
                _mm512_storeu_si512(out + (first + i) * LANES, rows[i]);
                continue;
            }
            __m512 lower, upper;
            unpack_bf16(rows[i], lower, upper);
            _mm512_storeu_ps(out + 2 * (first + i) * LANES, lower);
            _mm512_storeu_ps(out + (2 * (first + i) + 1) * LANES, upper);
        }
    }
}

// Scores of Q queries, scaling * q k, in 16 columns from `column` on. Masked ones are the lowest float.
template <int Q>
void qk(const Query* queries, const float* keys, int64_t column, int64_t columns, int64_t head_size, float scaling) {
    __m512 sums[Q][2];
#pragma GCC unroll 6
    for (int q = 0; q < Q; q++) sums[q][0] = sums[q][1] = _mm512_setzero_ps();
    for (int64_t i = 0; i < head_size; i += 2)
#pragma GCC unroll 2
        for (int j = 0; j < 2; j++) {
            const __m512 key = _mm512_loadu_ps(keys + (i + j) * LANES);
#pragma GCC unroll 6
            for (int q = 0; q < Q; q++)
                sums[q][j] = _mm512_fmadd_ps(_mm512_set1_ps(queries[q].vector[i + j]), key, sums[q][j]);
        }
#pragma GCC unroll 6
    for (int q = 0; q < Q; q++) {
        const Query& query = queries[q];
        const int64_t committed_left = query.committed - column;
        const __mmask16 committed = ~lane_mask(query.begin - column) & lane_mask(committed_left);
        const __mmask16 others = ~lane_mask(committed_left) & lane_mask(columns - column);
        const __m128i mask = _mm_maskz_loadu_epi8(others, query.mask + column - query.committed);
        const __mmask16 visible = committed | _mm_test_epi8_mask(mask, mask);
        const __m512 scores = _mm512_mul_ps(_mm512_add_ps(sums[q][0], sums[q][1]), _mm512_set1_ps(scaling));
        const __m512 lowest = _mm512_set1_ps(std::numeric_limits<float>::lowest());
        _mm512_storeu_ps(query.weights + column, _mm512_mask_mov_ps(lowest, visible, scores));
    }
}

// In-place softmax numerators, in whole vectors; masked entries become 0. Returns 1 / sum, or NaN if a score is NaN or
// +infinity.
inline float softmax(float* weights, int64_t columns) {
    const __m512 masked = _mm512_set1_ps(MASKED_BELOW);
    const __m512 infinity = _mm512_set1_ps(std::numeric_limits<float>::infinity());
    __m512 largest = masked, total = _mm512_setzero_ps();
    __mmask16 not_finite = 0;
    for (int64_t column = 0; column < columns; column += LANES) {
        const __m512 score = _mm512_loadu_ps(weights + column);
        not_finite |= _mm512_cmp_ps_mask(score, infinity, _CMP_NLT_UQ);
        largest = _mm512_max_ps(largest, score);
    }
    const __m512 max = _mm512_set1_ps(_mm512_reduce_max_ps(largest));
    for (int64_t column = 0; column < columns; column += LANES) {
        const __m512 score = _mm512_loadu_ps(weights + column);
        const __mmask16 visible = _mm512_cmp_ps_mask(score, masked, _CMP_NLE_UQ);
        const __m512 weight = _mm512_maskz_mov_ps(visible, exp_ps(_mm512_sub_ps(score, max)));
        _mm512_storeu_ps(weights + column, weight);
        total = _mm512_add_ps(total, weight);
    }
    return not_finite ? QUIET_NAN : 1 / _mm512_reduce_add_ps(total);
}

// Softmax-weighted sums of the values [columns, head_size], for Q queries.
template <bool BF16, int Q>
void weighted_sum(const Query* queries, const void* values, int64_t columns, int64_t head_size) {
    constexpr int PARTS = 4;
    for (int64_t i = 0; i < head_size; i += PARTS * LANES) {
        __mmask16 masks[PARTS];
        __m512 sums[Q][PARTS];
#pragma GCC unroll 4
        for (int j = 0; j < PARTS; j++) masks[j] = lane_mask(head_size - i - j * LANES);
#pragma GCC unroll 6
        for (int q = 0; q < Q; q++)
#pragma GCC unroll 4
            for (int j = 0; j < PARTS; j++) sums[q][j] = _mm512_setzero_ps();
        for (int64_t first = 0; first < columns; first += LANES) {
            // Columns that are masked for all queries may hold NaN.
            uint32_t visible = 0;
#pragma GCC unroll 6
            for (int q = 0; q < Q; q++) {
                const __m512i weights = _mm512_loadu_si512(queries[q].weights + first);
                visible |= _mm512_test_epi32_mask(weights, weights);
            }
            for (; visible; visible &= visible - 1) {
                const int64_t column = first + __builtin_ctz(visible);
                __m512 value[PARTS];
#pragma GCC unroll 4
                for (int j = 0; j < PARTS; j++)
                    value[j] = load<BF16>(values, column * head_size + i + j * LANES, masks[j]);
#pragma GCC unroll 6
                for (int q = 0; q < Q; q++) {
                    const __m512 weight = _mm512_set1_ps(queries[q].weights[column]);
#pragma GCC unroll 4
                    for (int j = 0; j < PARTS; j++) sums[q][j] = _mm512_fmadd_ps(weight, value[j], sums[q][j]);
                }
            }
        }
#pragma GCC unroll 6
        for (int q = 0; q < Q; q++) {
            const __m512 inverse_sum = _mm512_set1_ps(queries[q].inverse_sum);
#pragma GCC unroll 4
            for (int j = 0; j < PARTS; j++)
                _mm512_mask_storeu_ps(queries[q].out + i + j * LANES, masks[j], _mm512_mul_ps(sums[q][j], inverse_sum));
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
    for (int64_t q = 0; q < count; q++) queries[q].inverse_sum = softmax(queries[q].weights, columns);
    for (int64_t q = 0; q < count; q += QUERY_TILE)
        WEIGHTED_SUM[std::min(QUERY_TILE, count - q)](queries + q, values.data, columns, head_size);
}

}  // namespace
}  // namespace mcsd
