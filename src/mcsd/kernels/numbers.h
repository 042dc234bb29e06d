// Sixteen numbers at a time, in float32 or bfloat16: what all kernels are made of.

#pragma once

#include <immintrin.h>
#include <omp.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

namespace {

constexpr int64_t LANES = 16;

__mmask16 lanes(int64_t left) { return left >= LANES ? 0xffff : left <= 0 ? 0 : (1u << left) - 1; }

template <bool HALF>
__m512 load_as(const void* data, int64_t at, __mmask16 mask) {
    if (!HALF) return _mm512_maskz_loadu_ps(mask, static_cast<const float*>(data) + at);
    __m256i bits = _mm256_maskz_loadu_epi16(mask, static_cast<const uint16_t*>(data) + at);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

// Rounded to bfloat16: to the nearest, ties to even; what is no number stays none.
__m512 halved(__m512 value) {
    const __m512i bits = _mm512_castps_si512(value);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i up = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __m512i rounded = _mm512_and_si512(up, _mm512_set1_epi32(0xffff0000));
    const __mmask16 none = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
    return _mm512_castsi512_ps(_mm512_mask_set1_epi32(rounded, none, 0x7fc00000));
}

// Pairs of bfloat16, one in the lower half of each word and one in the upper.
void parted(__m512i pairs, __m512& lower, __m512& upper) {
    lower = _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
    upper = _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(0xffff0000)));
}

struct Numbers {
    void* data;
    bool half;

    __m512 load(int64_t at, __mmask16 mask) const {
        return half ? load_as<true>(data, at, mask) : load_as<false>(data, at, mask);
    }

    void store(int64_t at, __mmask16 mask, __m512 value) const {
        if (!half) return _mm512_mask_storeu_ps(static_cast<float*>(data) + at, mask, value);
        const __m256i bits = _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_castps_si512(halved(value)), 16));
        _mm256_mask_storeu_epi16(static_cast<uint16_t*>(data) + at, mask, bits);
    }

    Numbers from(int64_t at) const { return {static_cast<char*>(data) + at * (half ? 2 : 4), half}; }
};

__m512 exponential(__m512 x) {
    x = _mm512_min_ps(_mm512_max_ps(x, _mm512_set1_ps(-87.0f)), _mm512_set1_ps(88.0f));
    const __m512 twos = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 0);
    __m512 rest = _mm512_fnmadd_ps(twos, _mm512_set1_ps(0.693145752f), x);
    rest = _mm512_fnmadd_ps(twos, _mm512_set1_ps(1.42860677e-6f), rest);
    __m512 out = _mm512_set1_ps(1.0f / 720);
    for (float factor : {1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f})
        out = _mm512_fmadd_ps(out, rest, _mm512_set1_ps(factor));
    return _mm512_scalef_ps(out, twos);
}

// Memory that grows and is kept from call to call.
template <typename T>
struct Buffer {
    std::vector<T> kept;
    void fit(int64_t count) {
        if (static_cast<int64_t>(kept.size()) < count) kept.resize(count);
    }
    T* data() { return kept.data(); }
};

}  // namespace
