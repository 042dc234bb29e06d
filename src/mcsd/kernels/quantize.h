// Quantization of activations, token by token, and of bf16 weights to BFP16. The formats are in gemm.h.

#pragma once

#include "gemm_tiles.h"

namespace mcsd {
namespace {

constexpr int ZERO_POINT = 128, MAX_INT8 = 127;  // of W8A8 and W8A16 weights, and of all values of 8 bits
constexpr float RESIDUAL_STEPS = 254;            // of the second int8 of W8A16 in one of the first
// A group of BFP16: the largest value of an activation, and the largest sum of the values of a weight. The sum of their
// products fits into 32 bits.
constexpr int MAX_BFP_ACTIVATION = 16383, MAX_BFP_WEIGHT_SUM = 131000;
constexpr float MIN_ABSMAX = 1e-30f;  // of a smaller one the inverse of the scale would be infinite

// The largest magnitude of x, at least `MIN_ABSMAX`; NaN if any of x is NaN.
inline float absmax(const float* x, int64_t count) {
    __m512 largest = _mm512_set1_ps(MIN_ABSMAX);
    __mmask16 nan = 0;
    for (int64_t k = 0; k < count; k += LANES) {
        const __m512 part = _mm512_maskz_loadu_ps(lane_mask(count - k), x + k);
        largest = _mm512_max_ps(largest, _mm512_abs_ps(part));
        nan |= nan_mask(part);
    }
    return nan ? QUIET_NAN : _mm512_reduce_max_ps(largest);
}

// Stores steps + `ZERO_POINT`, cut off to integers, without that offset, as int8; adds them to `sum`.
inline __m512i store_int8(__m512 steps, int8_t* out, __m512i& sum) {
    const __m512i shifted = _mm512_cvttps_epi32(steps);
    const __m512i values = _mm512_sub_epi32(shifted, _mm512_set1_epi32(ZERO_POINT));
    sum = _mm512_add_epi32(sum, values);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm512_cvtepi32_epi8(values));
    return shifted;
}

// int8 values and a scale; in W8A16 the residuals are a second row. `sums` gets 128 times the sum of each row.
inline void quantize_int8(
    const WeightLayout& layout, const float* x, int64_t in_features, int8_t* out, float& scale, int32_t* sums) {
    const bool residual = layout.rows_per_token == 2;
    const float largest = absmax(x, in_features);
    scale = largest * (1.0f / MAX_INT8);
    // Half a step is added and the rest cut off, which rounds to the nearest, as nothing is negative then.
    const __m512 factor = _mm512_set1_ps(MAX_INT8 / largest), offset = _mm512_set1_ps(ZERO_POINT + 0.5f);
    const __m512 residual_factor = _mm512_set1_ps(RESIDUAL_STEPS);
    const __m512 residual_offset = _mm512_set1_ps(ZERO_POINT + 0.5f - RESIDUAL_STEPS / 2);
    __m512i sum = _mm512_setzero_si512(), residual_sum = sum;
    for (int64_t k = 0; k < in_features; k += LANES) {
        const __m512 part = _mm512_maskz_loadu_ps(lane_mask(in_features - k), x + k);
        const __m512 steps = _mm512_fmadd_ps(part, factor, offset);
        const __m512i value = store_int8(steps, out + k, sum);
        if (!residual) continue;
        const __m512 error = _mm512_sub_ps(steps, _mm512_cvtepi32_ps(value));
        const __m512 residual_steps = _mm512_fmadd_ps(error, residual_factor, residual_offset);
        store_int8(residual_steps, out + layout.activation_bytes + k, residual_sum);
    }
    sums[0] = ZERO_POINT * _mm512_reduce_add_epi32(sum);
    if (residual) sums[1] = ZERO_POINT * _mm512_reduce_add_epi32(residual_sum);
}

// The sums of each group of quantized values, in float behind them.
inline void append_group_sums(const WeightLayout& layout, int64_t in_features, int8_t* values) {
    for (int64_t k = round_up(in_features, LANES); k < layout.in_features; k++) values[k] = 0;
    for (int64_t k = 0; k < layout.in_features; k += INT4_GROUP) {
        const __m256i group = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(values + k));
        const __m512i lower = _mm512_cvtepi8_epi32(_mm256_castsi256_si128(group));
        const __m512i upper = _mm512_cvtepi8_epi32(_mm256_extracti128_si256(group, 1));
        const float sum = _mm512_reduce_add_epi32(_mm512_add_epi32(lower, upper));
        std::memcpy(values + layout.in_features + k / INT4_GROUP * 4, &sum, 4);
    }
}

// int16 values, and behind them the scale of each group, in float.
inline void quantize_bfp16(const WeightLayout& layout, const float* x, int64_t in_features, int8_t* out) {
    auto values = reinterpret_cast<int16_t*>(out);
    for (int64_t begin = 0; begin < in_features; begin += BFP_GROUP) {
        const int64_t end = std::min(begin + BFP_GROUP, in_features);
        const float largest = absmax(x + begin, end - begin), scale = largest * (1.0f / MAX_BFP_ACTIVATION);
        const __m512 factor = _mm512_set1_ps(MAX_BFP_ACTIVATION / largest);
        for (int64_t k = begin; k < end; k += LANES) {
            const __m512 steps = _mm512_mul_ps(_mm512_maskz_loadu_ps(lane_mask(end - k), x + k), factor);
            const __m256i rounded = _mm512_cvtsepi32_epi16(_mm512_cvtps_epi32(steps));
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(values + k), rounded);
        }
        std::memcpy(values + layout.in_features + begin / BFP_GROUP * 2, &scale, 4);
    }
}

inline void quantize(const Linear& linear, const float* x, int64_t token, QuantizedActivations& activations) {
    const WeightLayout layout(linear);
    const int64_t row = token * layout.rows_per_token;
    int8_t* values = activations.values.data() + row * layout.activation_bytes;
    if (linear.format == BFP16) return quantize_bfp16(layout, x, linear.in_features, values);
    float& scale = activations.scales.data()[token];
    quantize_int8(layout, x, linear.in_features, values, scale, activations.zero_sums.data() + row);
    if (linear.format == W4A8) append_group_sums(layout, linear.in_features, values);
}

// Quantizes a group of one output's weights, to pairs of values `BFP_PAIR_STRIDE` bytes apart. Returns the scale, or
// NaN if a weight is not finite. The scale is a power of two, so only weights that are small in their group are
// rounded.
inline float quantize_bfp16_weights(FloatView weights, int64_t count, char* values) {
    __m512 total = _mm512_setzero_ps(), largest = total;
    for (int64_t k = 0; k < count; k += LANES) {
        const __m512 part = _mm512_abs_ps(weights.load(k, lane_mask(count - k)));
        total = _mm512_add_ps(total, part);
        largest = _mm512_max_ps(largest, part);
    }
    const float min_scale =
        std::max(_mm512_reduce_add_ps(total) / MAX_BFP_WEIGHT_SUM, _mm512_reduce_max_ps(largest) / INT16_MAX);
    if (!(min_scale < std::numeric_limits<float>::infinity())) return QUIET_NAN;
    const __m512 twos = _mm512_getexp_ps(_mm512_set1_ps(std::max(min_scale, 1e-30f)));
    const __m512 scale = _mm512_scalef_ps(_mm512_set1_ps(2), twos), factor = _mm512_div_ps(_mm512_set1_ps(1), scale);
    const __m256i indices =
        _mm256_mullo_epi32(_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), _mm256_set1_epi32(BFP_PAIR_STRIDE));
    for (int64_t k = 0; k < count; k += LANES) {
        const __m512 steps = _mm512_mul_ps(weights.load(k, lane_mask(count - k)), factor);
        const __m256i pairs = _mm512_cvtsepi32_epi16(_mm512_cvtps_epi32(steps));
        _mm256_i32scatter_epi32(values + k / 2 * BFP_PAIR_STRIDE, indices, pairs, 1);
    }
    return _mm512_cvtss_f32(scale);
}

}  // namespace
}  // namespace mcsd
