// Vectors of bytes and 16-bit integers in lanes of 128 bits: four lanes with AVX-512, two with AVX2.

#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace mcsd {
namespace {

#ifdef __AVX512BW__

typedef __m512i Bytes;
typedef __m512 LaneSums;  // four float32 of each lane
constexpr int BYTE_LANES = 4;

inline Bytes set_bytes(int value) { return _mm512_set1_epi8(static_cast<char>(value)); }
inline Bytes set_shorts(int value) { return _mm512_set1_epi16(static_cast<short>(value)); }
inline Bytes set_long(int64_t value) { return _mm512_set1_epi64(value); }
inline Bytes repeat(__m128i lane) { return _mm512_broadcast_i32x4(lane); }
inline Bytes shift_words_right(Bytes words, Bytes counts) { return _mm512_srlv_epi32(words, counts); }
inline Bytes shuffle_bytes(Bytes bytes, Bytes indices) { return _mm512_shuffle_epi8(bytes, indices); }
inline Bytes add_bytes(Bytes a, Bytes b) { return _mm512_add_epi8(a, b); }
inline Bytes subtract_shorts(Bytes a, Bytes b) { return _mm512_sub_epi16(a, b); }
inline Bytes multiply_shorts(Bytes a, Bytes b) { return _mm512_mullo_epi16(a, b); }
template <int N>
inline Bytes shift_shorts_left(Bytes shorts) { return _mm512_slli_epi16(shorts, N); }
template <int N>
inline Bytes shift_shorts_right(Bytes shorts) { return _mm512_srli_epi16(shorts, N); }
template <int N>
inline Bytes shift_signed_shorts_right(Bytes shorts) { return _mm512_srai_epi16(shorts, N); }

// Bytes of `value` where all bits of `tested` are set in `bits`, zeros elsewhere. One bit of each byte is tested.
inline Bytes where_bit(Bytes bits, Bytes tested, int value) {
    return _mm512_maskz_mov_epi8(_mm512_test_epi8_mask(bits, tested), set_bytes(value));
}

// Adds the products of pairs of 16-bit integers to 32-bit sums. In assembler, because GCC 12 computes the products of
// several calls first and stores them for want of registers.
inline Bytes dot_shorts(Bytes sums, Bytes shorts, const char* others) {
    asm("vpdpwssd %2, %1, %0" : "+v"(sums) : "v"(shorts), "m"(*reinterpret_cast<const __m512i*>(others)));
    return sums;
}

inline Bytes no_sums() { return _mm512_setzero_si512(); }
inline LaneSums zero_lanes() { return _mm512_setzero_ps(); }
inline LaneSums set_lanes(float value) { return _mm512_set1_ps(value); }
inline LaneSums to_float(Bytes sums) { return _mm512_cvtepi32_ps(sums); }
inline LaneSums multiply(LaneSums a, LaneSums b) { return _mm512_mul_ps(a, b); }
inline LaneSums multiply_add(LaneSums a, LaneSums b, LaneSums c) { return _mm512_fmadd_ps(a, b, c); }
inline float total(LaneSums sums) { return _mm512_reduce_add_ps(sums); }

// Eight products, in the first lanes, are subtracted.
inline LaneSums subtract_products(__m256 a, __m256 b, LaneSums from) {
    return _mm512_sub_ps(from, _mm512_zextps256_ps512(_mm256_mul_ps(a, b)));
}

// Lane b has four times the float numbered `first` + b.
inline LaneSums spread(__m256 values, int first) {
    const __m512i lanes = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
    const __m512i indices = _mm512_add_epi32(lanes, _mm512_set1_epi32(first));
    return _mm512_permutexvar_ps(indices, _mm512_castps256_ps512(values));
}

// Lane b has 16 bytes from b times a stride on.
inline Bytes load_lanes(const uint8_t* bytes, int64_t stride) {
    auto load = [&](int64_t lane) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes + lane * stride)); };
    const __m256i lower = _mm256_inserti128_si256(_mm256_castsi128_si256(load(0)), load(1), 1);
    const __m256i upper = _mm256_inserti128_si256(_mm256_castsi128_si256(load(2)), load(3), 1);
    return _mm512_inserti64x4(_mm512_castsi256_si512(lower), upper, 1);
}

// Words of lane b: word(b).
template <typename Word>
[[gnu::always_inline]] inline Bytes for_lanes(Word word) {
    return _mm512_setr_epi32(
        word(0), word(0), word(0), word(0), word(1), word(1), word(1), word(1), word(2), word(2), word(2), word(2),
        word(3), word(3), word(3), word(3));
}

#else

typedef __m256i Bytes;
typedef __m256 LaneSums;
constexpr int BYTE_LANES = 2;

inline Bytes set_bytes(int value) { return _mm256_set1_epi8(static_cast<char>(value)); }
inline Bytes set_shorts(int value) { return _mm256_set1_epi16(static_cast<short>(value)); }
inline Bytes set_long(int64_t value) { return _mm256_set1_epi64x(value); }
inline Bytes repeat(__m128i lane) { return _mm256_broadcastsi128_si256(lane); }
inline Bytes shift_words_right(Bytes words, Bytes counts) { return _mm256_srlv_epi32(words, counts); }
inline Bytes shuffle_bytes(Bytes bytes, Bytes indices) { return _mm256_shuffle_epi8(bytes, indices); }
inline Bytes add_bytes(Bytes a, Bytes b) { return _mm256_add_epi8(a, b); }
inline Bytes subtract_shorts(Bytes a, Bytes b) { return _mm256_sub_epi16(a, b); }
inline Bytes multiply_shorts(Bytes a, Bytes b) { return _mm256_mullo_epi16(a, b); }
template <int N>
inline Bytes shift_shorts_left(Bytes shorts) { return _mm256_slli_epi16(shorts, N); }
template <int N>
inline Bytes shift_shorts_right(Bytes shorts) { return _mm256_srli_epi16(shorts, N); }
template <int N>
inline Bytes shift_signed_shorts_right(Bytes shorts) { return _mm256_srai_epi16(shorts, N); }

inline Bytes where_bit(Bytes bits, Bytes tested, int value) {
    const Bytes set = _mm256_cmpeq_epi8(_mm256_and_si256(bits, tested), tested);
    return _mm256_and_si256(set, set_bytes(value));
}

inline Bytes dot_shorts(Bytes sums, Bytes shorts, const char* others) {
#ifdef __AVXVNNI__
    asm("%{vex%} vpdpwssd %2, %1, %0" : "+x"(sums) : "x"(shorts), "m"(*reinterpret_cast<const __m256i*>(others)));
#else
    Bytes products;
    asm("vpmaddwd %3, %2, %1\n\tvpaddd %1, %0, %0"
        : "+x"(sums), "=&x"(products)
        : "x"(shorts), "m"(*reinterpret_cast<const __m256i*>(others)));
#endif
    return sums;
}

inline Bytes no_sums() { return _mm256_setzero_si256(); }
inline LaneSums zero_lanes() { return _mm256_setzero_ps(); }
inline LaneSums set_lanes(float value) { return _mm256_set1_ps(value); }
inline LaneSums to_float(Bytes sums) { return _mm256_cvtepi32_ps(sums); }
inline LaneSums multiply(LaneSums a, LaneSums b) { return _mm256_mul_ps(a, b); }
inline LaneSums multiply_add(LaneSums a, LaneSums b, LaneSums c) { return _mm256_fmadd_ps(a, b, c); }

inline float total(LaneSums sums) {
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(sums), _mm256_extractf128_ps(sums, 1));
    four = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
}

inline LaneSums subtract_products(__m256 a, __m256 b, LaneSums from) { return _mm256_fnmadd_ps(a, b, from); }

inline LaneSums spread(__m256 values, int first) {
    const __m256i lanes = _mm256_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1);
    return _mm256_permutevar8x32_ps(values, _mm256_add_epi32(lanes, _mm256_set1_epi32(first)));
}

inline Bytes load_lanes(const uint8_t* bytes, int64_t stride) {
    return _mm256_loadu2_m128i(
        reinterpret_cast<const __m128i*>(bytes + stride), reinterpret_cast<const __m128i*>(bytes));
}

template <typename Word>
[[gnu::always_inline]] inline Bytes for_lanes(Word word) {
    return _mm256_setr_epi32(word(0), word(0), word(0), word(0), word(1), word(1), word(1), word(1));
}

#endif

// Sixteen bytes in each lane.
inline Bytes repeat(const uint8_t* bytes) { return repeat(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes))); }

}  // namespace
}  // namespace mcsd
