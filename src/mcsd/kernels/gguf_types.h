// The tensor types of GGUF files that the kernels read as they are, and how a slice of a row is unpacked. A row is its
// blocks, one after the other, as ggml writes them (ggml-common.h):
//     Q4_0, Q5_0, Q8_0   32 weights: scale * (value - offset)
//     Q4_1, Q5_1         32 weights: scale * value + minimum
//     Q4_K, Q5_K         256 weights in groups of 32: scale * group scale (6 bits) * value - minimum * (6 bits)
//     Q6_K               256 weights in groups of 16: scale * group scale (8 bits) * (value - 32)
// Scales and minimums are float16.

#pragma once

#include "byte_lanes.h"
#include "simd.h"

namespace mcsd {

// Numbers of ggml_type.
enum GgufType : int64_t { Q4_0 = 2, Q4_1 = 3, Q5_0 = 6, Q5_1 = 7, Q8_0 = 8, Q4_K = 12, Q5_K = 13, Q6_K = 14 };

namespace {

constexpr int64_t GGUF_CHUNK = 256;  // weights of a row that are unpacked together
constexpr int64_t GGUF_GROUP = 32;   // weights that share a minimum
constexpr int GGUF_GROUPS = GGUF_CHUNK / GGUF_GROUP;
constexpr int GGUF_SLICES = GGUF_GROUPS / BYTE_LANES;  // of a chunk: as many groups as a vector has lanes
constexpr int SLICE_VECTORS = 4;
constexpr int64_t SLICE_BYTES = SLICE_VECTORS * sizeof(Bytes);

// Vector 2 i + p of a slice holds, in lane b and there at k from 0 to 7, input 16 i + 2 k + p of group b, in 16 bits. So
// a lane's products are of one group, and even and odd inputs are the lower and upper bytes of 16 bits.
typedef Bytes SliceValues[SLICE_VECTORS];

// Scales and minimums of a chunk: a weight is scale * value - minimum.
struct ChunkHeader {
    __m256 scales, minimums;     // of the groups
    Bytes multipliers;           // of Q4_K and Q5_K int16, of Q6_K int8: the group scales, in each lane
};

inline uint32_t load_word(const uint8_t* bytes) {
    uint32_t word;
    std::memcpy(&word, bytes, 4);
    return word;
}

inline float load_half(const uint8_t* bytes) {
    uint16_t half;
    std::memcpy(&half, bytes, 2);
    return _cvtsh_ss(half);
}

// Splits unsigned bytes into even and odd inputs.
inline void split(Bytes bytes, Bytes& even, Bytes& odd) {
    even = bytes & set_shorts(0xff);
    odd = shift_shorts_right<8>(bytes);
}

// Types with blocks of 32 weights: float16 scale, float16 minimum if any, fifth bits if any, values.
template <int64_t TYPE>
struct SmallBlocks {
    static constexpr bool HAS_MINIMUM = TYPE == Q4_1 || TYPE == Q5_1, FIVE = TYPE == Q5_0 || TYPE == Q5_1;
    static constexpr bool ONE_SCALE = false;
    static constexpr int64_t BLOCK = 32, VALUES = (HAS_MINIMUM ? 4 : 2) + (FIVE ? 4 : 0);
    static constexpr int64_t BLOCK_BYTES = VALUES + (TYPE == Q8_0 ? 32 : 16);
    static constexpr int OFFSET = TYPE == Q4_0 ? 8 : TYPE == Q5_0 ? 16 : 0;

    // The float16 at an offset of each block.
    static __m256 load_halves(const uint8_t* w, int64_t offset) {
        alignas(16) uint16_t halves[GGUF_GROUPS];
        for (int block = 0; block < GGUF_GROUPS; block++)
            std::memcpy(halves + block, w + block * BLOCK_BYTES + offset, 2);
        return _mm256_cvtph_ps(_mm_load_si128(reinterpret_cast<const __m128i*>(halves)));
    }

    static void read_header(const uint8_t* w, ChunkHeader& header) {
        header.scales = load_halves(w, 0);
        if (HAS_MINIMUM) header.minimums = _mm256_sub_ps(_mm256_setzero_ps(), load_halves(w, 2));
    }

    [[gnu::always_inline]] static void unpack(const uint8_t* w, const ChunkHeader&, int slice, SliceValues& out) {
        w += slice * BYTE_LANES * BLOCK_BYTES;
        if (TYPE == Q8_0) {
#pragma GCC unroll 2
            for (int i = 0; i < 2; i++) {
                const Bytes bytes = load_lanes(w + VALUES + 16 * i, BLOCK_BYTES);
                out[2 * i] = shift_signed_shorts_right<8>(shift_shorts_left<8>(bytes));
                out[2 * i + 1] = shift_signed_shorts_right<8>(bytes);
            }
            return;
        }
        const Bytes pairs = load_lanes(w + VALUES, BLOCK_BYTES), low = set_bytes(15);
        Bytes bytes[] = {pairs & low, shift_shorts_right<4>(pairs) & low};
        if (FIVE) {
            const Bytes bits = for_lanes([&](int lane) { return load_word(w + lane * BLOCK_BYTES + VALUES - 4); });
            const Bytes tested = set_long(0x8040201008040201);
            const Bytes first = repeat(_mm_setr_epi8(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1));
#pragma GCC unroll 2
            for (int i = 0; i < 2; i++) {
                const Bytes own = shuffle_bytes(bits, add_bytes(first, set_bytes(2 * i)));
                bytes[i] |= where_bit(own, tested, 16);
            }
        }
#pragma GCC unroll 2
        for (int i = 0; i < 2; i++) split(bytes[i], out[2 * i], out[2 * i + 1]);
        if (OFFSET)
#pragma GCC unroll 4
            for (Bytes& values : out) values = subtract_shorts(values, set_shorts(OFFSET));
    }
};

// Q4_K and Q5_K: float16 scale and minimum, 12 bytes of group scales and minimums, fifth bits if any, values.
template <bool FIVE>
struct KBlocks {
    static constexpr bool HAS_MINIMUM = true, ONE_SCALE = true;
    static constexpr int64_t BLOCK = 256, BLOCK_BYTES = FIVE ? 176 : 144, VALUES = BLOCK_BYTES - 128;

    static void read_header(const uint8_t* w, ChunkHeader& header) {
        const uint32_t a = load_word(w + 4), b = load_word(w + 8), c = load_word(w + 12);
        constexpr uint32_t SIX = 0x3f3f3f3f, FOUR = 0x0f0f0f0f, UPPER_TWO = 0x30303030;
        const __m128i scales = _mm_setr_epi32(a & SIX, (c & FOUR) | (a >> 2 & UPPER_TWO), 0, 0);
        const __m128i minimums = _mm_setr_epi32(b & SIX, (c >> 4 & FOUR) | (b >> 2 & UPPER_TWO), 0, 0);
        header.scales = _mm256_set1_ps(load_half(w));
        header.minimums = _mm256_mul_ps(
            _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(minimums)), _mm256_set1_ps(load_half(w + 2)));
        header.multipliers = repeat(_mm_cvtepu8_epi16(scales));
    }

    [[gnu::always_inline]] static void unpack(const uint8_t* w, const ChunkHeader& header, int slice, SliceValues& out) {
        const int group = slice * BYTE_LANES;
        // Group g has the lower or, if g is odd, upper four bits of 32 bytes.
        const Bytes shifts = for_lanes([](int lane) { return lane % 2 * 4; });
        const Bytes tested = for_lanes([&](int lane) { return 0x01010101u << (group + lane); });
        const Bytes multipliers = shuffle_bytes(
            header.multipliers, for_lanes([&](int lane) { return 0x01000100 + (group + lane) * 0x02020202; }));
#pragma GCC unroll 2
        for (int i = 0; i < 2; i++) {
            const Bytes pairs = load_group_pairs(w + VALUES + 16 * group + 16 * i);
            Bytes bytes = shift_words_right(pairs, shifts) & set_bytes(15);
            if (FIVE) bytes |= where_bit(repeat(w + 16 + 16 * i), tested, 16);
            split(bytes, out[2 * i], out[2 * i + 1]);
        }
#pragma GCC unroll 4
        for (Bytes& values : out) values = multiply_shorts(values, multipliers);
    }

    // Sixteen bytes in two lanes each, from each 32 bytes.
    static Bytes load_group_pairs(const uint8_t* bytes) {
#ifdef __AVX512BW__
        const Bytes lanes = _mm512_castsi256_si512(_mm256_loadu2_m128i(
            reinterpret_cast<const __m128i*>(bytes + 32), reinterpret_cast<const __m128i*>(bytes)));
        return _mm512_permutexvar_epi64(_mm512_setr_epi64(0, 1, 0, 1, 2, 3, 2, 3), lanes);
#else
        return repeat(bytes);
#endif
    }
};

// Q6_K: lower four bits, upper two bits, int8 group scales, float16 scale.
struct Q6KBlocks {
    static constexpr bool HAS_MINIMUM = false, ONE_SCALE = true;
    static constexpr int64_t BLOCK = 256, BLOCK_BYTES = 210, UPPER = 128, SCALES = 192;

    static void read_header(const uint8_t* w, ChunkHeader& header) {
        header.scales = _mm256_set1_ps(load_half(w + 208));
        header.multipliers = repeat(w + SCALES);
    }

    [[gnu::always_inline]] static void unpack(const uint8_t* w, const ChunkHeader& header, int slice, SliceValues& out) {
        const int group = slice * BYTE_LANES;
        // Each half of a chunk has 64 bytes: of groups 0 and 1 the lower, of groups 2 and 3 the upper four bits. The
        // upper bits of the four groups are in 32 bytes.
        const Bytes shifts = for_lanes([&](int lane) { return (group + lane) / 2 % 2 * 4; });
        const Bytes upper_shifts = for_lanes([&](int lane) { return (group + lane) % 4 * 2; });
#pragma GCC unroll 2
        for (int i = 0; i < 2; i++) {
            const Bytes pairs = load_pairs(w + group / 4 * 64 + 16 * i);
            const Bytes bits = shift_words_right(repeat(w + UPPER + group / 4 * 32 + 16 * i), upper_shifts);
            const Bytes lower = shift_words_right(pairs, shifts) & set_bytes(15);
            const Bytes upper = shift_shorts_left<4>(bits) & set_bytes(0x30);
            // A group scale is moved to the upper byte, and then down with its sign.
            const Bytes indices = for_lanes([&](int lane) { return 0x00800080 + (2 * (group + lane) + i) * 0x01000100; });
            const Bytes multipliers = shift_signed_shorts_right<8>(shuffle_bytes(header.multipliers, indices));
            Bytes parts[2];
            split(lower | upper, parts[0], parts[1]);
#pragma GCC unroll 2
            for (int p = 0; p < 2; p++)
                out[2 * i + p] = multiply_shorts(subtract_shorts(parts[p], set_shorts(32)), multipliers);
        }
    }

    // Sixteen bytes each of two groups, once or twice.
    static Bytes load_pairs(const uint8_t* bytes) {
        const __m256i lanes = _mm256_loadu2_m128i(
            reinterpret_cast<const __m128i*>(bytes + 32), reinterpret_cast<const __m128i*>(bytes));
#ifdef __AVX512BW__
        return _mm512_broadcast_i64x4(lanes);
#else
        return lanes;
#endif
    }
};

}  // namespace
}  // namespace mcsd
