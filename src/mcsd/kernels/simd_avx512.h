// The vectors of simd.h in AVX-512. The compiler itself has + - * / of `Floats`.

#pragma once

#include <immintrin.h>

#include <cstdint>

namespace mcsd {

typedef __m512 Floats;   // 16 float32
typedef __m512i Words;   // 16 int32
typedef __mmask16 Mask;  // a bit for each lane

constexpr int REGISTERS = 32;  // `Floats` that fit into them

inline Floats set(float value) { return _mm512_set1_ps(value); }
inline Words set_words(int32_t value) { return _mm512_set1_epi32(value); }

// Bits as they are.
inline Words as_words(Floats value) { return _mm512_castps_si512(value); }
inline Floats as_floats(Words words) { return _mm512_castsi512_ps(words); }

// Lanes out of the mask are 0 and their memory is not read.
inline Floats load(const float* data) { return _mm512_loadu_ps(data); }
inline Floats load(const float* data, Mask mask) { return _mm512_maskz_loadu_ps(mask, data); }
inline Words load_words(const int32_t* data, Mask mask) { return _mm512_maskz_loadu_epi32(mask, data); }
inline Floats load_bf16(const uint16_t* data, Mask mask) {
    return as_floats(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, data)), 16));
}

// Memory of lanes out of the mask is not written.
inline void store(float* out, Floats value) { _mm512_storeu_ps(out, value); }
inline void store(float* out, Words words) { _mm512_storeu_si512(out, words); }
inline void store(float* out, Mask mask, Floats value) { _mm512_mask_storeu_ps(out, mask, value); }
// The upper half of each word.
inline void store_upper(uint16_t* out, Mask mask, Words words) {
    _mm256_mask_storeu_epi16(out, mask, _mm512_cvtepi32_epi16(_mm512_srli_epi32(words, 16)));
}

inline Words bit_and(Words a, Words b) { return _mm512_and_si512(a, b); }
inline Words add(Words a, Words b) { return _mm512_add_epi32(a, b); }
template <int BITS>
inline Words shift_left(Words words) {
    return _mm512_slli_epi32(words, BITS);
}
template <int BITS>
inline Words shift_right(Words words) {
    return _mm512_srli_epi32(words, BITS);
}

// a * b + c and c - a * b.
inline Floats fmadd(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
inline Floats fnmadd(Floats a, Floats b, Floats c) { return _mm512_fnmadd_ps(a, b, c); }

// b if either is NaN.
inline Floats max(Floats a, Floats b) { return _mm512_max_ps(a, b); }
inline Floats min(Floats a, Floats b) { return _mm512_min_ps(a, b); }

// To the nearest integer, ties to even.
inline Floats round(Floats value) { return _mm512_roundscale_ps(value, 0); }

// value * 2^exponent, for integers from -126 to 127.
inline Floats scale_by_two(Floats value, Floats exponent) { return _mm512_scalef_ps(value, exponent); }

inline float reduce_add(Floats value) { return _mm512_reduce_add_ps(value); }
inline float reduce_max(Floats value) { return _mm512_reduce_max_ps(value); }

// Comparisons.
inline Mask nan_mask(Floats value) { return _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q); }
inline Mask at_least(Floats a, Floats b) { return _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ); }
inline Mask at_least_or_nan(Floats a, Floats b) { return _mm512_cmp_ps_mask(a, b, _CMP_NLT_UQ); }
inline Mask above_or_nan(Floats a, Floats b) { return _mm512_cmp_ps_mask(a, b, _CMP_NLE_UQ); }
inline Mask nonzero(Words words) { return _mm512_test_epi32_mask(words, words); }

// Bytes in the mask that are not 0; other bytes are not read.
inline Mask nonzero_bytes(const uint8_t* data, Mask mask) {
    const __m128i bytes = _mm_maskz_loadu_epi8(mask, data);
    return _mm_test_epi8_mask(bytes, bytes);
}

// a in the lanes of the mask, b in the others.
inline Floats select(Mask mask, Floats a, Floats b) { return _mm512_mask_mov_ps(b, mask, a); }
inline Words select(Mask mask, int32_t a, Words b) { return _mm512_mask_set1_epi32(b, mask, a); }

// Transposes 16 x 16 words.
inline void transpose(Words (&rows)[16]) {
    Words parts[16];
    for (int i = 0; i < 16; i += 2) {
        parts[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
        parts[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)
        for (int j = 0; j < 2; j++) {
            rows[i + 2 * j] = _mm512_unpacklo_epi64(parts[i + j], parts[i + 2 + j]);
            rows[i + 2 * j + 1] = _mm512_unpackhi_epi64(parts[i + j], parts[i + 2 + j]);
        }
    for (int j = 0; j < 4; j++) {
        const Words even[] = {
            _mm512_shuffle_i32x4(rows[j], rows[j + 4], 0x88), _mm512_shuffle_i32x4(rows[j + 8], rows[j + 12], 0x88)};
        const Words odd[] = {
            _mm512_shuffle_i32x4(rows[j], rows[j + 4], 0xdd), _mm512_shuffle_i32x4(rows[j + 8], rows[j + 12], 0xdd)};
        rows[j] = _mm512_shuffle_i32x4(even[0], even[1], 0x88);
        rows[j + 4] = _mm512_shuffle_i32x4(odd[0], odd[1], 0x88);
        rows[j + 8] = _mm512_shuffle_i32x4(even[0], even[1], 0xdd);
        rows[j + 12] = _mm512_shuffle_i32x4(odd[0], odd[1], 0xdd);
    }
}

}  // namespace mcsd
