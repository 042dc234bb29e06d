// The inner loops of linear layers: tiles of R rows of activations times a slice of a block of weights. Formats and
// layouts are in gemm.h.

#pragma once

#include "gemm.h"

namespace mcsd {
namespace {

constexpr int64_t BLOCK = 32;       // outputs of a block of weights
constexpr int64_t BFP_GROUP = 128;  // inputs that share a scale in BFP16
constexpr int64_t BFP_SCALES = 2 * BLOCK;       // bytes of the scales of a block's group
constexpr int64_t BFP_PAIR_STRIDE = 4 * BLOCK;  // bytes of a block's values for two inputs
constexpr int64_t INT4_GROUP = 32;              // inputs that share a scale and a minimum in W4A8
constexpr int64_t INT4_GROUP_BYTES = 4 * BLOCK + INT4_GROUP * BLOCK / 2;
constexpr int64_t INT8_SLICE = 256;  // inputs of a slice of W8A8 and W8A16: as many bytes as a BFP16 group
constexpr int MAX_TILE_ROWS = 12;    // with these all sums are in registers
constexpr int64_t PREFETCH = 4096;   // bytes ahead

// A slice is a block's inputs from `begin` to `end`.
struct Slice {
    const void* weight;
    const void* activations;   // of the first row, from its first input on
    int64_t activation_bytes;  // of a row
    int64_t in_features;       // padded
    int64_t begin, end;
    void* sums;                // [R][32] in int32 (W8A8, W8A16) or float, which the products are added to
    const char* prefetch;      // the first of the 64-byte lines to prefetch, two in each iteration: here and at
    int64_t prefetch_stride;   // `prefetch_stride - 64` further; then it moves on by `prefetch_stride`
};

// In assembler, because GCC 12 copies the accumulator for the intrinsics, which takes as long as the products.
inline __m512i dot_int8(__m512i sum, __m512i unsigned_bytes, __m512i bytes) {
    asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(unsigned_bytes), "v"(bytes));
    return sum;
}

inline __m512i dot_int16(__m512i sum, __m512i first, __m512i second) {
    asm("vpdpwssd %2, %1, %0" : "+v"(sum) : "v"(first), "v"(second));
    return sum;
}

typedef __m512i DotProduct(__m512i sum, __m512i weights, __m512i activations);

// Adds the products of `lines` x 128 bytes of weights and, of each row, `lines` x 4 bytes of activations.
template <DotProduct DOT, int R>
[[gnu::always_inline]] inline void dot_lines(
    const Slice& slice, const char* w, const char* x, int64_t lines, __m512i (&sums)[R][2]) {
    const char* next = slice.prefetch;
    const int64_t stride = slice.prefetch_stride;
    for (; lines > 0; lines--, w += 128, x += 4, next += stride) {
        const __m512i first = _mm512_loadu_si512(w), second = _mm512_loadu_si512(w + 64);
        _mm_prefetch(next, _MM_HINT_T0);
        _mm_prefetch(next + stride - 64, _MM_HINT_T0);
#pragma GCC unroll 12
        for (int r = 0; r < R; r++) {
            int32_t four_bytes;
            std::memcpy(&four_bytes, x + r * slice.activation_bytes, 4);
            const __m512i activation = _mm512_set1_epi32(four_bytes);
            sums[r][0] = DOT(sums[r][0], first, activation);
            sums[r][1] = DOT(sums[r][1], second, activation);
        }
    }
}

template <int R>
void tile_int8(const Slice& slice) {
    auto w = static_cast<const char*>(slice.weight), x = static_cast<const char*>(slice.activations) + slice.begin;
    auto out = static_cast<int32_t*>(slice.sums);
    __m512i sums[R][2];
#pragma GCC unroll 12
    for (int r = 0; r < R; r++)
        for (int half = 0; half < 2; half++) sums[r][half] = _mm512_loadu_si512(out + r * BLOCK + half * LANES);
    dot_lines<dot_int8>(slice, w, x, (slice.end - slice.begin) / 4, sums);
#pragma GCC unroll 12
    for (int r = 0; r < R; r++)
        for (int half = 0; half < 2; half++) _mm512_storeu_si512(out + r * BLOCK + half * LANES, sums[r][half]);
}

// A row of activations: quantized values, then the scales of the groups, in float. A slice is a group.
template <int R>
void tile_bfp16(const Slice& slice) {
    auto w = static_cast<const char*>(slice.weight), x = static_cast<const char*>(slice.activations);
    auto out = static_cast<float*>(slice.sums);
    __m512i sums[R][2];
#pragma GCC unroll 12
    for (int r = 0; r < R; r++) sums[r][0] = sums[r][1] = _mm512_setzero_si512();
    dot_lines<dot_int16>(slice, w + BFP_SCALES, x + 2 * slice.begin, (slice.end - slice.begin) / 2, sums);
    __m512 weight_scales[2];
    unpack_bf16(_mm512_loadu_si512(w), weight_scales[0], weight_scales[1]);
    auto scales = x + 2 * slice.in_features + slice.begin / BFP_GROUP * 4;
#pragma GCC unroll 12
    for (int r = 0; r < R; r++, out += BLOCK) {
        float scale;
        std::memcpy(&scale, scales + r * slice.activation_bytes, 4);
        for (int half = 0; half < 2; half++) {
            const __m512 product_scale = _mm512_mul_ps(weight_scales[half], _mm512_set1_ps(scale));
            const __m512 sum = _mm512_cvtepi32_ps(sums[r][half]), total = _mm512_loadu_ps(out + half * LANES);
            _mm512_storeu_ps(out + half * LANES, _mm512_fmadd_ps(product_scale, sum, total));
        }
    }
}

// A group's products of 4-bit weights.
template <int R>
[[gnu::always_inline]] inline void dot_int4_group(
    const Slice& slice, const uint8_t* w, const int8_t* x, __m512i (&sums)[R][2]) {
    const __m512i low = _mm512_set1_epi8(15);
#pragma GCC unroll 6
    for (int r = 0; r < R; r++) sums[r][0] = sums[r][1] = _mm512_setzero_si512();
#pragma GCC unroll 8
    for (int i = 0; i < INT4_GROUP / 4; i++) {
        const __m512i both = _mm512_loadu_si512(w + 64 * i);
        const __m512i first = _mm512_and_si512(both, low);
        const __m512i second = _mm512_and_si512(_mm512_srli_epi16(both, 4), low);
#pragma GCC unroll 6
        for (int r = 0; r < R; r++) {
            int32_t four_bytes;
            std::memcpy(&four_bytes, x + r * slice.activation_bytes + 4 * i, 4);
            const __m512i activation = _mm512_set1_epi32(four_bytes);
            sums[r][0] = dot_int8(sums[r][0], first, activation);
            sums[r][1] = dot_int8(sums[r][1], second, activation);
        }
    }
}

// A row of activations: quantized values, then the sums of the groups, in float. A slice is all inputs.
template <int R>
void tile_int4(const Slice& slice) {
    auto w = static_cast<const uint8_t*>(slice.weight);
    auto x = static_cast<const int8_t*>(slice.activations);
    auto out = static_cast<float*>(slice.sums);
    __m512 totals[R][2];
#pragma GCC unroll 6
    for (int r = 0; r < R; r++)
        for (int half = 0; half < 2; half++) totals[r][half] = _mm512_loadu_ps(out + r * BLOCK + half * LANES);
    for (int64_t k = 0; k < slice.in_features; k += INT4_GROUP, w += INT4_GROUP_BYTES) {
        __m512 scales_and_minimums[4];
#pragma GCC unroll 10
        for (int64_t line = 0; line < INT4_GROUP_BYTES; line += 64)
            _mm_prefetch(reinterpret_cast<const char*>(w) + PREFETCH + line, _MM_HINT_T0);
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++)
            scales_and_minimums[i] = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(w) + i));
        __m512i sums[R][2];
        dot_int4_group(slice, w + 4 * BLOCK, x + k, sums);
#pragma GCC unroll 6
        for (int r = 0; r < R; r++) {
            float group_sum;
            std::memcpy(&group_sum, x + r * slice.activation_bytes + slice.in_features + k / INT4_GROUP * 4, 4);
#pragma GCC unroll 2
            for (int half = 0; half < 2; half++) {
                const __m512 scale = scales_and_minimums[half], minimum = scales_and_minimums[2 + half];
                totals[r][half] = _mm512_fmadd_ps(scale, _mm512_cvtepi32_ps(sums[r][half]), totals[r][half]);
                totals[r][half] = _mm512_fmadd_ps(minimum, _mm512_set1_ps(group_sum), totals[r][half]);
            }
        }
    }
#pragma GCC unroll 6
    for (int r = 0; r < R; r++)
        for (int half = 0; half < 2; half++) _mm512_storeu_ps(out + r * BLOCK + half * LANES, totals[r][half]);
}

typedef void (*Tile)(const Slice&);

// Tiles by their rows.
#define TILES_TO_6(tile) nullptr, tile<1>, tile<2>, tile<3>, tile<4>, tile<5>, tile<6>
#define TILES_TO_12(tile) TILES_TO_6(tile), tile<7>, tile<8>, tile<9>, tile<10>, tile<11>, tile<12>
const Tile INT8_TILES[] = {TILES_TO_12(tile_int8)}, BFP16_TILES[] = {TILES_TO_12(tile_bfp16)};
const Tile INT4_TILES[] = {TILES_TO_6(tile_int4)};

// The sizes of a weight's blocks and slices, and of the activations that go with it.
struct WeightLayout {
    int64_t in_features;       // padded
    int64_t block_bytes;       // of 32 outputs
    int64_t own_slice;         // inputs of a slice for a tile that is alone
    int64_t shared_slice;      // inputs of a slice for tiles that share weights
    int64_t slice_bytes;       // of 32 outputs' weights in such a slice
    int64_t activation_bytes;  // of a row
    int rows_per_token;
    int max_tile_rows;
    const Tile* tiles;

    explicit WeightLayout(const Linear& linear)
        : in_features(round_up(linear.in_features, LANES)), rows_per_token(1), max_tile_rows(MAX_TILE_ROWS) {
        if (linear.format == BFP16) {
            const int64_t groups = ceil_div(in_features, BFP_GROUP);
            own_slice = shared_slice = BFP_GROUP;
            slice_bytes = BFP_SCALES + BFP_GROUP * BLOCK * 2;
            block_bytes = groups * BFP_SCALES + in_features * BLOCK * 2;
            activation_bytes = 2 * in_features + 4 * groups;
            tiles = BFP16_TILES;
        } else if (linear.format == W4A8) {
            in_features = own_slice = shared_slice = round_up(linear.in_features, INT4_GROUP);
            slice_bytes = block_bytes = in_features / INT4_GROUP * INT4_GROUP_BYTES;
            activation_bytes = in_features + in_features / INT4_GROUP * 4;
            max_tile_rows = MAX_TILE_ROWS / 2;
            tiles = INT4_TILES;
        } else {
            own_slice = in_features;
            shared_slice = INT8_SLICE;
            slice_bytes = INT8_SLICE * BLOCK;
            block_bytes = BLOCK * in_features;
            activation_bytes = in_features;
            rows_per_token = linear.format == W8A16 ? 2 : 1;
            tiles = INT8_TILES;
        }
    }
};

}  // namespace
}  // namespace mcsd
