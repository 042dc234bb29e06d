// The vectors of simd.h in AVX2 and FMA, each in two registers.

#pragma once

#include <immintrin.h>

#include <cstdint>

namespace mcsd {

// 16 float32.
struct Floats {
    __m256 low, high;
};

// 16 int32.
struct Words {
    __m256i low, high;
};

typedef uint16_t Mask;  // a bit for each lane

constexpr int REGISTERS = 8;  // `Floats` that fit into them
constexpr Mask ALL_LANES = 0xffff;

// All bits of the lanes of a mask.
inline Words lanes_of(Mask mask) {
    const __m256i bits = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    const __m256i low = _mm256_and_si256(_mm256_set1_epi32(mask), bits);
    const __m256i high = _mm256_and_si256(_mm256_set1_epi32(mask >> 8), bits);
    return {_mm256_cmpeq_epi32(low, bits), _mm256_cmpeq_epi32(high, bits)};
}

// The mask of lanes whose upper bit is set.
inline Mask mask_of(__m256 low, __m256 high) { return _mm256_movemask_ps(low) | _mm256_movemask_ps(high) << 8; }

inline Floats set(float value) { return {_mm256_set1_ps(value), _mm256_set1_ps(value)}; }
inline Words set_words(int32_t value) { return {_mm256_set1_epi32(value), _mm256_set1_epi32(value)}; }

// Bits as they are.
inline Words as_words(Floats value) { return {_mm256_castps_si256(value.low), _mm256_castps_si256(value.high)}; }
inline Floats as_floats(Words words) { return {_mm256_castsi256_ps(words.low), _mm256_castsi256_ps(words.high)}; }

inline Floats operator+(Floats a, Floats b) { return {_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)}; }
inline Floats operator-(Floats a, Floats b) { return {_mm256_sub_ps(a.low, b.low), _mm256_sub_ps(a.high, b.high)}; }
inline Floats operator*(Floats a, Floats b) { return {_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)}; }
inline Floats operator/(Floats a, Floats b) { return {_mm256_div_ps(a.low, b.low), _mm256_div_ps(a.high, b.high)}; }
inline Words bit_and(Words a, Words b) { return {_mm256_and_si256(a.low, b.low), _mm256_and_si256(a.high, b.high)}; }
inline Words add(Words a, Words b) { return {_mm256_add_epi32(a.low, b.low), _mm256_add_epi32(a.high, b.high)}; }
template <int BITS>
inline Words shift_left(Words words) {
    return {_mm256_slli_epi32(words.low, BITS), _mm256_slli_epi32(words.high, BITS)};
}
template <int BITS>
inline Words shift_right(Words words) {
    return {_mm256_srli_epi32(words.low, BITS), _mm256_srli_epi32(words.high, BITS)};
}

// Lanes out of the mask are 0 and their memory is not read.
inline Floats load(const float* data) { return {_mm256_loadu_ps(data), _mm256_loadu_ps(data + 8)}; }
inline Floats load(const float* data, Mask mask) {
    if (mask == ALL_LANES) return load(data);
    const Words lanes = lanes_of(mask);
    return {_mm256_maskload_ps(data, lanes.low), _mm256_maskload_ps(data + 8, lanes.high)};
}
inline Words load_words(const int32_t* data, Mask mask) {
    const auto words = reinterpret_cast<const __m256i*>(data);
    if (mask == ALL_LANES) return {_mm256_loadu_si256(words), _mm256_loadu_si256(words + 1)};
    const Words lanes = lanes_of(mask);
    return {_mm256_maskload_epi32(data, lanes.low), _mm256_maskload_epi32(data + 8, lanes.high)};
}
inline Floats load_bf16(const uint16_t* data) {
    const auto halves = reinterpret_cast<const __m128i*>(data);
    const Words words = {
        _mm256_cvtepu16_epi32(_mm_loadu_si128(halves)), _mm256_cvtepu16_epi32(_mm_loadu_si128(halves + 1))};
    return as_floats(shift_left<16>(words));
}
inline Floats load_bf16(const uint16_t* data, Mask mask) {
    if (mask == ALL_LANES) return load_bf16(data);
    uint16_t part[16] = {};
    for (unsigned left = mask; left; left &= left - 1) part[__builtin_ctz(left)] = data[__builtin_ctz(left)];
    return load_bf16(part);
}

// Memory of lanes out of the mask is not written.
inline void store(float* out, Floats value) {
    _mm256_storeu_ps(out, value.low);
    _mm256_storeu_ps(out + 8, value.high);
}
inline void store(float* out, Words words) { store(out, as_floats(words)); }
inline void store(float* out, Mask mask, Floats value) {
    if (mask == ALL_LANES) return store(out, value);
    const Words lanes = lanes_of(mask);
    _mm256_maskstore_ps(out, lanes.low, value.low);
    _mm256_maskstore_ps(out + 8, lanes.high, value.high);
}
// The upper half of each word.
inline void store_upper(uint16_t* out, Mask mask, Words words) {
    const Words upper = shift_right<16>(words);
    const __m256i mixed = _mm256_packus_epi32(upper.low, upper.high);  // lanes 0-3, 8-11, 4-7, 12-15
    const __m256i halves = _mm256_permute4x64_epi64(mixed, 0xd8);
    if (mask == ALL_LANES) return _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), halves);
    uint16_t part[16];
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(part), halves);
    for (unsigned left = mask; left; left &= left - 1) out[__builtin_ctz(left)] = part[__builtin_ctz(left)];
}

// a * b + c and c - a * b.
inline Floats fmadd(Floats a, Floats b, Floats c) {
    return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
}
inline Floats fnmadd(Floats a, Floats b, Floats c) {
    return {_mm256_fnmadd_ps(a.low, b.low, c.low), _mm256_fnmadd_ps(a.high, b.high, c.high)};
}

// b if either is NaN.
inline Floats max(Floats a, Floats b) { return {_mm256_max_ps(a.low, b.low), _mm256_max_ps(a.high, b.high)}; }
inline Floats min(Floats a, Floats b) { return {_mm256_min_ps(a.low, b.low), _mm256_min_ps(a.high, b.high)}; }

// To the nearest integer, ties to even.
inline Floats round(Floats value) {
    constexpr int NEAREST = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    return {_mm256_round_ps(value.low, NEAREST), _mm256_round_ps(value.high, NEAREST)};
}

// value * 2^exponent, for integers from -126 to 127.
inline Floats scale_by_two(Floats value, Floats exponent) {
    const Words integers = {_mm256_cvtps_epi32(exponent.low), _mm256_cvtps_epi32(exponent.high)};
    return value * as_floats(shift_left<23>(add(integers, set_words(127))));
}

// In the order of the additions of `_mm512_reduce_add_ps`.
inline float reduce_add(Floats value) {
    const __m256 half = _mm256_add_ps(value.high, value.low);
    const __m128 quarter = _mm_add_ps(_mm256_extractf128_ps(half, 1), _mm256_castps256_ps128(half));
    const __m128 pair = _mm_add_ps(quarter, _mm_movehl_ps(quarter, quarter));
    return _mm_cvtss_f32(_mm_add_ss(pair, _mm_movehdup_ps(pair)));
}
inline float reduce_max(Floats value) {
    const __m256 half = _mm256_max_ps(value.high, value.low);
    const __m128 quarter = _mm_max_ps(_mm256_extractf128_ps(half, 1), _mm256_castps256_ps128(half));
    const __m128 pair = _mm_max_ps(quarter, _mm_movehl_ps(quarter, quarter));
    return _mm_cvtss_f32(_mm_max_ss(pair, _mm_movehdup_ps(pair)));
}

// Comparisons.
template <int PREDICATE>
inline Mask compare(Floats a, Floats b) {
    return mask_of(_mm256_cmp_ps(a.low, b.low, PREDICATE), _mm256_cmp_ps(a.high, b.high, PREDICATE));
}
inline Mask nan_mask(Floats value) { return compare<_CMP_UNORD_Q>(value, value); }
inline Mask at_least(Floats a, Floats b) { return compare<_CMP_GE_OQ>(a, b); }
inline Mask at_least_or_nan(Floats a, Floats b) { return compare<_CMP_NLT_UQ>(a, b); }
inline Mask above_or_nan(Floats a, Floats b) { return compare<_CMP_NLE_UQ>(a, b); }
inline Mask nonzero(Words words) {
    const __m256i low = _mm256_cmpeq_epi32(words.low, _mm256_setzero_si256());
    const __m256i high = _mm256_cmpeq_epi32(words.high, _mm256_setzero_si256());
    return ~mask_of(_mm256_castsi256_ps(low), _mm256_castsi256_ps(high));
}

// Bytes in the mask that are not 0; other bytes are not read.
inline Mask nonzero_bytes(const uint8_t* data, Mask mask) {
    if (mask == ALL_LANES) {
        const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(data));
        return ~_mm_movemask_epi8(_mm_cmpeq_epi8(bytes, _mm_setzero_si128()));
    }
    Mask found = 0;
    for (unsigned left = mask; left; left &= left - 1) {
        const int lane = __builtin_ctz(left);
        found |= (data[lane] != 0) << lane;
    }
    return found;
}

// a in the lanes of the mask, b in the others.
inline Floats select(Mask mask, Floats a, Floats b) {
    const Floats lanes = as_floats(lanes_of(mask));
    return {_mm256_blendv_ps(b.low, a.low, lanes.low), _mm256_blendv_ps(b.high, a.high, lanes.high)};
}
inline Words select(Mask mask, int32_t a, Words b) {
    return as_words(select(mask, as_floats(set_words(a)), as_floats(b)));
}

// Transposes 8 x 8 words.
inline void transpose(__m256i (&rows)[8]) {
    __m256i parts[8];
    for (int i = 0; i < 8; i += 2) {
        parts[i] = _mm256_unpacklo_epi32(rows[i], rows[i + 1]);
        parts[i + 1] = _mm256_unpackhi_epi32(rows[i], rows[i + 1]);
    }
    for (int i = 0; i < 8; i += 4)
        for (int j = 0; j < 2; j++) {
            rows[i + 2 * j] = _mm256_unpacklo_epi64(parts[i + j], parts[i + 2 + j]);
            rows[i + 2 * j + 1] = _mm256_unpackhi_epi64(parts[i + j], parts[i + 2 + j]);
        }
    for (int j = 0; j < 4; j++) {
        const __m256i first = rows[j];
        rows[j] = _mm256_permute2x128_si256(first, rows[j + 4], 0x20);
        rows[j + 4] = _mm256_permute2x128_si256(first, rows[j + 4], 0x31);
    }
}

// Transposes 16 x 16 words.
inline void transpose(Words (&rows)[16]) {
    __m256i low[2][8], high[2][8];  // of the first eight rows and of the others
    for (int i = 0; i < 16; i++) {
        low[i / 8][i % 8] = rows[i].low;
        high[i / 8][i % 8] = rows[i].high;
    }
    for (int part = 0; part < 2; part++) {
        transpose(low[part]);
        transpose(high[part]);
    }
    for (int i = 0; i < 8; i++) {
        rows[i] = {low[0][i], low[1][i]};
        rows[i + 8] = {high[0][i], high[1][i]};
    }
}

}  // namespace mcsd
