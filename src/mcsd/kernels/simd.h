// Vectors of sixteen float32, loaded from and stored as float32 or bfloat16 (bf16): the base of all kernels.

#pragma once

#include <omp.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <new>
#include <vector>

#ifdef __AVX512F__
#include "simd_avx512.h"
#else
#include "simd_avx2.h"
#endif

namespace mcsd {

constexpr int64_t LANES = 16;
constexpr float QUIET_NAN = std::numeric_limits<float>::quiet_NaN();

// A mask of the first `left` lanes, all of them if there are more.
inline Mask lane_mask(int64_t left) { return left >= LANES ? 0xffff : left <= 0 ? 0 : (1u << left) - 1; }

inline int64_t ceil_div(int64_t count, int64_t size) { return (count + size - 1) / size; }

inline int64_t round_up(int64_t count, int64_t multiple) { return ceil_div(count, multiple) * multiple; }

template <bool BF16>
inline Floats load(const void* data, int64_t index, Mask mask) {
    if (BF16) return load_bf16(static_cast<const uint16_t*>(data) + index, mask);
    return load(static_cast<const float*>(data) + index, mask);
}

// Rounds to bf16, to the nearest, ties to even; NaN stays NaN.
inline Floats round_to_bf16(Floats value) {
    const Words bits = as_words(value), odd = bit_and(shift_right<16>(bits), set_words(1));
    const Words up = add(bits, add(odd, set_words(0x7fff)));
    return as_floats(select(nan_mask(value), 0x7fc00000, bit_and(up, set_words(0xffff0000))));
}

// Unpacks pairs of bf16: the lower and the upper half of each 32-bit word.
inline void unpack_bf16(Words pairs, Floats& lower, Floats& upper) {
    lower = as_floats(shift_left<16>(pairs));
    upper = as_floats(bit_and(pairs, set_words(0xffff0000)));
}

// An array of float32 or bf16, read and written as float32.
struct FloatView {
    void* data;
    bool is_bf16;

    Floats load(int64_t index, Mask mask) const {
        return is_bf16 ? mcsd::load<true>(data, index, mask) : mcsd::load<false>(data, index, mask);
    }

    void store(int64_t index, Mask mask, Floats value) const {
        if (!is_bf16) return mcsd::store(static_cast<float*>(data) + index, mask, value);
        store_upper(static_cast<uint16_t*>(data) + index, mask, as_words(round_to_bf16(value)));
    }

    // The array from an index on.
    FloatView at(int64_t index) const { return {static_cast<char*>(data) + index * (is_bf16 ? 2 : 4), is_bf16}; }
};

inline void copy(FloatView from, FloatView to, int64_t count) {
    for (int64_t i = 0; i < count; i += LANES) to.store(i, lane_mask(count - i), from.load(i, lane_mask(count - i)));
}

// exp(x), to about 1e-7 of itself for x from -87 to 88; beyond these bounds their own value. NaN becomes a number.
inline Floats exp_ps(Floats x) {
    x = min(max(x, set(-87)), set(88));
    const Floats twos = round(x * set(1.44269504f));
    Floats rest = fnmadd(twos, set(0.693145752f), x);
    rest = fnmadd(twos, set(1.42860677e-6f), rest);
    Floats out = set(1.0f / 720);
    for (float factor : {1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) out = fmadd(out, rest, set(factor));
    return scale_by_two(out, twos);
}

// Memory that begins at a cache line.
template <typename T>
struct AlignedAllocator {
    typedef T value_type;
    T* allocate(size_t count) { return static_cast<T*>(operator new(count * sizeof(T), std::align_val_t{64})); }
    void deallocate(T* data, size_t) { operator delete(data, std::align_val_t{64}); }
    bool operator==(AlignedAllocator) const { return true; }
    bool operator!=(AlignedAllocator) const { return false; }
};

// Memory that grows when needed and is kept from call to call.
template <typename T>
struct Buffer {
    std::vector<T, AlignedAllocator<T>> values;

    void reserve(int64_t count) {
        if (static_cast<int64_t>(values.size()) < count) values.resize(count);
    }
    T* data() { return values.data(); }
    const T* data() const { return values.data(); }
};

}  // namespace mcsd
