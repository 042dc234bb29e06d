// Vectors of 32-bit words, one of each row of a matrix: 16 rows with AVX-512, 8 with AVX2.

#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace mcsd {
namespace {

#ifdef __AVX512BW__

typedef __m512i RowWords;
typedef __m512 RowFloats;
constexpr int64_t VECTOR_ROWS = 16;

inline RowWords set_row_words(uint32_t word) { return _mm512_set1_epi32(static_cast<int32_t>(word)); }
inline RowWords load_row_words(const void* data) { return _mm512_load_si512(data); }
inline void store(void* out, RowWords words) { _mm512_store_si512(out, words); }
inline RowWords shift_words_left(RowWords words, int count) { return _mm512_slli_epi32(words, count); }
inline RowWords shift_words_right(RowWords words, int count) { return _mm512_srli_epi32(words, count); }
inline RowWords shift_signed_words_right(RowWords words, int count) { return _mm512_srai_epi32(words, count); }

inline RowFloats set_row_floats(float value) { return _mm512_set1_ps(value); }
inline RowFloats load_row_floats(const float* data) { return _mm512_load_ps(data); }
inline void store(float* out, RowFloats values) { _mm512_store_ps(out, values); }
inline RowFloats to_floats(RowWords words) { return _mm512_cvtepi32_ps(words); }
inline RowFloats multiply(RowFloats a, RowFloats b) { return _mm512_mul_ps(a, b); }
inline RowFloats multiply_add(RowFloats a, RowFloats b, RowFloats c) { return _mm512_fmadd_ps(a, b, c); }
inline RowFloats subtract_product(RowFloats from, RowFloats a, RowFloats b) { return _mm512_fnmadd_ps(a, b, from); }

// Float16 in the lower half of each word.
inline RowFloats halves_to_floats(RowWords words) { return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(words)); }

constexpr bool SIGNED_BYTES = false;

// Words of values up to a maximum whose products are added up in 16 bits.
template <int MAX_VALUE>
constexpr int ADDED_WORDS = 1;

// Adds the products of four bytes. In assembler, because GCC 12 loads the activations apart from the products.
template <int MAX_VALUE>
[[gnu::always_inline]] inline void add_products(RowWords& sums, const RowWords (&values)[1], const int8_t* activations) {
    asm("vpdpbusd %2%{1to16%}, %1, %0"
        : "+v"(sums)
        : "v"(values[0]), "m"(*reinterpret_cast<const int32_t*>(activations)));
}

#else

typedef __m256i RowWords;
typedef __m256 RowFloats;
constexpr int64_t VECTOR_ROWS = 8;

inline RowWords set_row_words(uint32_t word) { return _mm256_set1_epi32(static_cast<int32_t>(word)); }
inline RowWords load_row_words(const void* data) { return _mm256_load_si256(static_cast<const __m256i*>(data)); }
inline void store(void* out, RowWords words) { _mm256_store_si256(static_cast<__m256i*>(out), words); }
inline RowWords shift_words_left(RowWords words, int count) { return _mm256_slli_epi32(words, count); }
inline RowWords shift_words_right(RowWords words, int count) { return _mm256_srli_epi32(words, count); }
inline RowWords shift_signed_words_right(RowWords words, int count) { return _mm256_srai_epi32(words, count); }

inline RowFloats set_row_floats(float value) { return _mm256_set1_ps(value); }
inline RowFloats load_row_floats(const float* data) { return _mm256_load_ps(data); }
inline void store(float* out, RowFloats values) { _mm256_store_ps(out, values); }
inline RowFloats to_floats(RowWords words) { return _mm256_cvtepi32_ps(words); }
inline RowFloats multiply(RowFloats a, RowFloats b) { return _mm256_mul_ps(a, b); }
inline RowFloats multiply_add(RowFloats a, RowFloats b, RowFloats c) { return _mm256_fmadd_ps(a, b, c); }
inline RowFloats subtract_product(RowFloats from, RowFloats a, RowFloats b) { return _mm256_fnmadd_ps(a, b, from); }

inline RowFloats halves_to_floats(RowWords words) {
    const __m256i lower = _mm256_and_si256(words, _mm256_set1_epi32(0xffff));
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(lower, lower), 0x08);
    return _mm256_cvtph_ps(_mm256_castsi256_si128(packed));
}

#ifdef __AVXVNNI__

constexpr bool SIGNED_BYTES = false;

template <int MAX_VALUE>
constexpr int ADDED_WORDS = 1;

template <int MAX_VALUE>
inline void add_products(RowWords& sums, const RowWords (&values)[1], const int8_t* activations) {
    int32_t word;
    std::memcpy(&word, activations, 4);
    sums = _mm256_dpbusd_avx_epi32(sums, values[0], _mm256_set1_epi32(word));
}

#else

// Products of activations and bytes over 128 overflow 16 bits.
constexpr bool SIGNED_BYTES = true;

template <int MAX_VALUE>
constexpr int ADDED_WORDS = MAX_VALUE <= 15 ? 8 : MAX_VALUE <= 31 ? 4 : MAX_VALUE <= 63 ? 2 : 1;

template <int MAX_VALUE>
[[gnu::always_inline]] inline void add_products(
    RowWords& sums, const RowWords (&values)[ADDED_WORDS<MAX_VALUE>], const int8_t* activations) {
    __m256i shorts = _mm256_setzero_si256();
#pragma GCC unroll 8
    for (int i = 0; i < ADDED_WORDS<MAX_VALUE>; i++) {
        int32_t word;
        std::memcpy(&word, activations + 4 * i, 4);
        __m256i others = _mm256_set1_epi32(word), bytes = values[i];
        if (MAX_VALUE > 63) {
            others = _mm256_sign_epi8(others, bytes);
            bytes = _mm256_abs_epi8(bytes);
        }
        shorts = _mm256_add_epi16(shorts, _mm256_maddubs_epi16(bytes, others));
    }
    sums = _mm256_add_epi32(sums, _mm256_madd_epi16(shorts, _mm256_set1_epi16(1)));
}

#endif
#endif

}  // namespace
}  // namespace mcsd
