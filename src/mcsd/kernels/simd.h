// Vectors of sixteen float32, loaded from and stored as float32 or bfloat16 (bf16): the base of all kernels.

#pragma once

#include <immintrin.h>
#include <omp.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

namespace mcsd {

constexpr int64_t LANES = 16;
constexpr float QUIET_NAN = std::numeric_limits<float>::quiet_NaN();

// A mask of the first `left` lanes, all of them if there are more.
inline __mmask16 lane_mask(int64_t left) { return left >= LANES ? 0xffff : left <= 0 ? 0 : (1u << left) - 1; }

inline __mmask16 nan_mask(__m512 value) { return _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q); }

inline int64_t ceil_div(int64_t count, int64_t size) { return (count + size - 1) / size; }

inline int64_t round_up(int64_t count, int64_t multiple) { return ceil_div(count, multiple) * multiple; }

template <bool BF16>
inline __m512 load(const void* data, int64_t index, __mmask16 mask) {
    if (!BF16) return _mm512_maskz_loadu_ps(mask, static_cast<const float*>(data) + index);
    const __m256i bits = _mm256_maskz_loadu_epi16(mask, static_cast<const uint16_t*>(data) + index);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

// Rounds to bf16, to the nearest, ties to even; NaN stays NaN.
inline __m512 round_to_bf16(__m512 value) {
    const __m512i bits = _mm512_castps_si512(value);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i up = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __m512i rounded = _mm512_and_si512(up, _mm512_set1_epi32(0xffff0000));
    return _mm512_castsi512_ps(_mm512_mask_set1_epi32(rounded, nan_mask(value), 0x7fc00000));
}

// Unpacks pairs of bf16: the lower and the upper half of each 32-bit word.
inline void unpack_bf16(__m512i pairs, __m512& lower, __m512& upper) {
    lower = _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
    upper = _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(0xffff0000)));
}

// An array of float32 or bf16, read and written as float32.
struct FloatView {
    void* data;
    bool is_bf16;

    __m512 load(int64_t index, __mmask16 mask) const {
        return is_bf16 ? mcsd::load<true>(data, index, mask) : mcsd::load<false>(data, index, mask);
    }

    void store(int64_t index, __mmask16 mask, __m512 value) const {
        if (!is_bf16) return _mm512_mask_storeu_ps(static_cast<float*>(data) + index, mask, value);
        const __m512i bits = _mm512_srli_epi32(_mm512_castps_si512(round_to_bf16(value)), 16);
        _mm256_mask_storeu_epi16(static_cast<uint16_t*>(data) + index, mask, _mm512_cvtepi32_epi16(bits));
    }

    // The array from an index on.
    FloatView at(int64_t index) const { return {static_cast<char*>(data) + index * (is_bf16 ? 2 : 4), is_bf16}; }
};

inline void copy(FloatView from, FloatView to, int64_t count) {
    for (int64_t i = 0; i < count; i += LANES) to.store(i, lane_mask(count - i), from.load(i, lane_mask(count - i)));
}

// exp(x), to about 1e-7 of itself for x from -87 to 88; beyond these bounds their own value. NaN becomes a number.
inline __m512 exp_ps(__m512 x) {
    x = _mm512_min_ps(_mm512_max_ps(x, _mm512_set1_ps(-87.0f)), _mm512_set1_ps(88.0f));
    const __m512 twos = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 0);
    __m512 rest = _mm512_fnmadd_ps(twos, _mm512_set1_ps(0.693145752f), x);
    rest = _mm512_fnmadd_ps(twos, _mm512_set1_ps(1.42860677e-6f), rest);
    __m512 out = _mm512_set1_ps(1.0f / 720);
    for (float factor : {1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f})
        out = _mm512_fmadd_ps(out, rest, _mm512_set1_ps(factor));
    return _mm512_scalef_ps(out, twos);
}

// Memory that grows when needed and is kept from call to call.
template <typename T>
struct Buffer {
    std::vector<T> values;

    void reserve(int64_t count) {
        if (static_cast<int64_t>(values.size()) < count) values.resize(count);
    }
    T* data() { return values.data(); }
    const T* data() const { return values.data(); }
};

}  // namespace mcsd
