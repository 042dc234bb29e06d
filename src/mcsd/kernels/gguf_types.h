// The tensor types of GGUF files, how their rows are packed for the kernels, and how the kernels unpack them. In the file
// a row is its blocks, one after the other, as ggml writes them (ggml-common.h):
//     Q4_0, Q5_0, Q8_0   32 weights: scale * (value - offset)
//     Q4_1, Q5_1         32 weights: scale * value + minimum
//     Q4_K, Q5_K         256 weights in groups of 32: scale * group scale (6 bits) * value - minimum * (6 bits)
//     Q6_K               256 weights in groups of 16: scale * group scale (8 bits) * (value - 32)
// Scales and minimums are float16. Packed, the chunks of 256 inputs of 16 rows are next to each other, word by word: a
// word of each row. No bit is added or lost.

#pragma once

#include <algorithm>

#include "row_words.h"

namespace mcsd {

// Numbers of ggml_type.
enum GgufType : int64_t { Q4_0 = 2, Q4_1 = 3, Q5_0 = 6, Q5_1 = 7, Q8_0 = 8, Q4_K = 12, Q5_K = 13, Q6_K = 14 };

namespace {

constexpr int64_t ROWS = 16;       // of a packed block
constexpr int64_t CHUNK = 256;     // inputs that are packed together; of small blocks the last chunk may have fewer
constexpr int64_t GROUP = 32;      // inputs that share a minimum, and a scale of activations
constexpr int64_t MAX_WORDS = 72;  // of a row's chunk

// A chunk of packed rows, or of the second half of them.
typedef const uint32_t (*PackedChunk)[ROWS];

// A weight is scale * value - minimum or, of Q6_K, scale * (value - zero point). `SCALED` inputs share a scale: groups or,
// in Q6_K, half groups.
struct GroupScales {
    alignas(64) float scales[2 * CHUNK / GROUP][VECTOR_ROWS];
    float minimums[CHUNK / GROUP][VECTOR_ROWS];
};

inline RowWords lower_four_bits(RowWords words) { return words & set_row_words(0x0f0f0f0f); }

// Moves bits within bytes: those that are chosen by a mask are from one byte.
inline RowWords move_bits(RowWords words, int from, int to, uint32_t mask) {
    const RowWords left = shift_words_left(words, std::max(to - from, 0));
    return shift_words_right(left, std::max(from - to, 0)) & set_row_words(mask);
}

// Types with blocks of 32 weights: float16 scale, float16 minimum if any, fifth bits if any, values.
// Packed: scales and minimums, each of two blocks in a word; fifth bits, that of input 4 i + b in bit i of byte b; values.
template <int64_t TYPE>
struct SmallBlocks {
    static constexpr bool OWN_MINIMUM = TYPE == Q4_1 || TYPE == Q5_1, FIVE = TYPE == Q5_0 || TYPE == Q5_1;
    static constexpr int64_t BLOCK = 32, SCALED = 32, VALUES = (OWN_MINIMUM ? 4 : 2) + (FIVE ? 4 : 0);
    static constexpr int64_t VALUE_WORDS = TYPE == Q8_0 ? 8 : 4, BLOCK_BYTES = VALUES + 4 * VALUE_WORDS;
    static constexpr int MAX_VALUE = TYPE == Q8_0 ? 255 : FIVE ? 31 : 15;
    static constexpr int ZERO_POINT = 0, OFFSET = TYPE == Q8_0 && SIGNED_BYTES ? 0 : (MAX_VALUE + 1) / 2;

    static int64_t half_words(int64_t groups) { return (groups + 1) / 2; }
    static int64_t fifth_at(int64_t groups) { return half_words(groups) * (OWN_MINIMUM ? 2 : 1); }
    static int64_t values_at(int64_t groups) { return fifth_at(groups) + (FIVE ? groups : 0); }
    static int64_t words(int64_t groups) { return values_at(groups) + groups * VALUE_WORDS; }

    static void pack(const uint8_t* row, int64_t groups, uint32_t* out) {
        for (int64_t group = 0; group < groups; group++, row += BLOCK_BYTES) {
            uint16_t halves[2];
            std::memcpy(halves, row, OWN_MINIMUM ? 4 : 2);
            out[group / 2] |= uint32_t{halves[0]} << group % 2 * 16;
            if (OWN_MINIMUM) out[half_words(groups) + group / 2] |= uint32_t{halves[1]} << group % 2 * 16;
            if (FIVE) {
                uint32_t bits;
                std::memcpy(&bits, row + VALUES - 4, 4);
                for (int k = 0; k < 32; k++) out[fifth_at(groups) + group] |= (bits >> k & 1) << (k % 4 * 8 + k / 4);
            }
            uint32_t* values = out + values_at(groups) + group * VALUE_WORDS;
            std::memcpy(values, row + VALUES, 4 * VALUE_WORDS);
            if (TYPE == Q8_0 && !SIGNED_BYTES)
                for (int64_t i = 0; i < VALUE_WORDS; i++) values[i] ^= 0x80808080;
        }
    }

    static void unpack_scales(PackedChunk w, int64_t groups, GroupScales& out) {
        for (int64_t group = 0; group < groups; group++) {
            const int shift = group % 2 * 16;
            const RowFloats scale = halves_to_floats(shift_words_right(load_row_words(w[group / 2]), shift));
            store(out.scales[group], scale);
            if (OWN_MINIMUM) {
                const RowWords halves = load_row_words(w[half_words(groups) + group / 2]);
                const RowFloats minimum = halves_to_floats(shift_words_right(halves, shift));
                store(out.minimums[group], multiply(minimum, set_row_floats(-1)));
            } else {
                store(out.minimums[group], multiply(scale, set_row_floats(OFFSET)));
            }
        }
    }

    // Inputs 4 i to 4 i + 3 of group 4 `four` + `one`, each a byte.
    [[gnu::always_inline]] static RowWords unpack(PackedChunk w, int64_t groups, int64_t four, int one, int i) {
        const int64_t group = 4 * four + one;
        const RowWords words = load_row_words(w[values_at(groups) + group * VALUE_WORDS + i % VALUE_WORDS]);
        if (TYPE == Q8_0) return words;
        const RowWords lower = lower_four_bits(i < 4 ? words : shift_words_right(words, 4));
        if (!FIVE) return lower;
        return lower | move_bits(load_row_words(w[fifth_at(groups) + group]), i, 4, 0x10101010);
    }
};

// Q4_K and Q5_K: float16 scale and minimum, 12 bytes of group scales and minimums, fifth bits if any, values. The same
// packed.
template <bool FIVE>
struct KBlocks {
    static constexpr int64_t BLOCK = 256, SCALED = 32, BLOCK_BYTES = FIVE ? 176 : 144, FIFTH = 4, VALUES = FIVE ? 12 : 4;
    static constexpr int MAX_VALUE = FIVE ? 31 : 15, ZERO_POINT = 0;

    static int64_t words(int64_t) { return BLOCK_BYTES / 4; }

    static void pack(const uint8_t* row, int64_t, uint32_t* out) { std::memcpy(out, row, BLOCK_BYTES); }

    static void unpack_scales(PackedChunk w, int64_t, GroupScales& out) {
        const RowWords halves = load_row_words(w[0]), a = load_row_words(w[1]), b = load_row_words(w[2]);
        const RowWords c = load_row_words(w[3]), six = set_row_words(0x3f3f3f3f);
        const RowFloats scale = halves_to_floats(halves), minimum = halves_to_floats(shift_words_right(halves, 16));
        // Four groups in a word, the first in its lowest byte.
        const RowWords scales[] = {a & six, lower_four_bits(c) | move_bits(a, 6, 4, 0x30303030)};
        const RowWords minimums[] = {
            b & six, lower_four_bits(shift_words_right(c, 4)) | move_bits(b, 6, 4, 0x30303030)};
#pragma GCC unroll 8
        for (int group = 0; group < 8; group++) {
            auto of_group = [&](RowWords words) {
                return to_floats(shift_words_right(words, group % 4 * 8) & set_row_words(0xff));
            };
            store(out.scales[group], multiply(scale, of_group(scales[group / 4])));
            store(out.minimums[group], multiply(minimum, of_group(minimums[group / 4])));
        }
    }

    // Two groups have the lower and the upper four bits of 32 bytes.
    [[gnu::always_inline]] static RowWords unpack(PackedChunk w, int64_t, int64_t four, int one, int i) {
        const RowWords pairs = load_row_words(w[VALUES + 16 * four + one / 2 * 8 + i]);
        const RowWords lower = lower_four_bits(shift_words_right(pairs, one % 2 * 4));
        if (!FIVE) return lower;
        const RowWords fifth = shift_words_right(load_row_words(w[FIFTH + i]), 4 * four);
        return lower | move_bits(fifth, one, 4, 0x10101010);
    }
};

// Q6_K: lower four bits, upper two bits, int8 group scales, float16 scale. The same packed.
struct Q6KBlocks {
    static constexpr int64_t BLOCK = 256, SCALED = 16, BLOCK_BYTES = 210, UPPER = 32, SCALES = 48, SCALE = 52;
    static constexpr int MAX_VALUE = 63, ZERO_POINT = 32;

    static int64_t words(int64_t) { return SCALE + 1; }

    static void pack(const uint8_t* row, int64_t, uint32_t* out) { std::memcpy(out, row, BLOCK_BYTES); }

    static void unpack_scales(PackedChunk w, int64_t, GroupScales& out) {
        const RowFloats scale = halves_to_floats(load_row_words(w[SCALE]));
#pragma GCC unroll 16
        for (int group = 0; group < 16; group++) {
            const RowWords top = shift_words_left(load_row_words(w[SCALES + group / 4]), 24 - group % 4 * 8);
            store(out.scales[group], multiply(scale, to_floats(shift_signed_words_right(top, 24))));
        }
    }

    // Half a chunk has the lower bits of 128 weights in 64 bytes, first the lower and then the upper four of each, and
    // the upper bits in 32 bytes, two of each 32 weights.
    [[gnu::always_inline]] static RowWords unpack(PackedChunk w, int64_t, int64_t half, int quarter, int i) {
        const RowWords pairs = load_row_words(w[16 * half + quarter % 2 * 8 + i]);
        const RowWords upper = move_bits(load_row_words(w[UPPER + 8 * half + i]), 2 * quarter, 4, 0x30303030);
        return lower_four_bits(shift_words_right(pairs, quarter / 2 * 4)) | upper;
    }
};

}  // namespace
}  // namespace mcsd
