// Matrix products with the tensors of GGUF files as they are in the file; see gguf.h. `mcsd.cpu.gguf_linear` calls the
// entry.

#include "gguf.h"

#include <cmath>
#include <utility>

#include "gguf_types.h"
#include "simd.h"

namespace mcsd {
namespace {

constexpr int MAX_ACTIVATION = 127;   // of a quantized activation
constexpr float MIN_ABSMAX = 1e-30f;  // of a smaller one the inverse of the scale would be infinite
constexpr int64_t PANEL = 64;         // tokens that are multiplied with a block of rows before the next block
constexpr int64_t PREFETCH = 2048;    // words ahead
constexpr int MAX_TOKENS = VECTOR_ROWS / 2;  // of a tile: their sums are in registers

// A chunk of a token's activations. `sums` are those of groups, scaled; `zero_sums` are those of half groups times the
// zero point of Q6_K, which its products have too much.
struct ActivationChunk {
    int8_t values[CHUNK];
    float scales[CHUNK / GROUP], sums[CHUNK / GROUP];
    int32_t zero_sums[2 * CHUNK / GROUP];
};

int64_t chunks_of(int64_t in_features) { return ceil_div(in_features, CHUNK); }

// The largest magnitude of a group, at least `MIN_ABSMAX`; NaN if any of x is NaN.
float group_absmax(const float* x) {
    const __m256 sign = _mm256_set1_ps(-0.0f);
    __m256 largest = _mm256_set1_ps(MIN_ABSMAX), nan = _mm256_setzero_ps();
    for (int64_t k = 0; k < GROUP; k += 8) {
        const __m256 part = _mm256_loadu_ps(x + k);
        largest = _mm256_max_ps(largest, _mm256_andnot_ps(sign, part));
        nan = _mm256_or_ps(nan, _mm256_cmp_ps(part, part, _CMP_UNORD_Q));
    }
    float values[8];
    _mm256_storeu_ps(values, largest);
    return _mm256_movemask_ps(nan) ? QUIET_NAN : *std::max_element(values, values + 8);
}

void quantize_chunk(const float* x, ActivationChunk& out) {
    for (int64_t group = 0; group < CHUNK / GROUP; group++, x += GROUP) {
        const float absmax = group_absmax(x), scale = absmax * (1.0f / MAX_ACTIVATION);
        const __m256 factor = _mm256_set1_ps(MAX_ACTIVATION / absmax);
        __m256i parts[4];
        for (int i = 0; i < 4; i++) parts[i] = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + 8 * i), factor));
        const __m256i first = _mm256_packs_epi32(parts[0], parts[1]), second = _mm256_packs_epi32(parts[2], parts[3]);
        const __m256i in_order = _mm256_permutevar8x32_epi32(
            _mm256_packs_epi16(first, second), _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
        int8_t* values = out.values + group * GROUP;
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(values), in_order);
        int32_t halves[2] = {};
        for (int64_t k = 0; k < GROUP; k++) halves[2 * k / GROUP] += values[k];
        out.scales[group] = scale;
        out.sums[group] = scale * (halves[0] + halves[1]);
        for (int64_t half = 0; half < 2; half++) out.zero_sums[2 * group + half] = -Q6KBlocks::ZERO_POINT * halves[half];
    }
}

void quantize_token(const float* x, int64_t in_features, ActivationChunk* out) {
    for (; in_features > 0; in_features -= CHUNK, x += CHUNK, out++) {
        float last[CHUNK] = {};
        if (in_features < CHUNK) std::memcpy(last, x, in_features * sizeof(float));
        quantize_chunk(in_features < CHUNK ? last : x, *out);
    }
}

// Adds the products of a chunk and T tokens, whose chunks are `stride` apart, to their totals.
template <class Blocks, int T>
void multiply_chunk(
    PackedChunk w, int64_t groups, const GroupScales& scales, const ActivationChunk* chunks, int64_t stride,
    float (*totals)[ROWS]) {
    constexpr int PARTS = GROUP / Blocks::SCALED, WORDS = Blocks::SCALED / 4, ADDED = ADDED_WORDS<Blocks::MAX_VALUE>;
    RowFloats own[T];
#pragma GCC unroll 8
    for (int t = 0; t < T; t++) own[t] = load_row_floats(totals[t]);
    for (int64_t four = 0; 4 * four < groups; four++)
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) {
            const int64_t group = 4 * four + i;
            if (group >= groups) break;
            RowFloats scaled[T];
#pragma GCC unroll 2
            for (int part = 0; part < PARTS; part++) {
                RowWords sums[T];
#pragma GCC unroll 8
                for (int t = 0; t < T; t++)
                    sums[t] = set_row_words(Blocks::ZERO_POINT ? chunks[t * stride].zero_sums[2 * group + part] : 0);
#pragma GCC unroll 8
                for (int word = 0; word < WORDS; word += ADDED) {
                    RowWords values[ADDED];
#pragma GCC unroll 8
                    for (int k = 0; k < ADDED; k++)
                        values[k] = Blocks::unpack(w, groups, four, i, part * WORDS + word + k);
#pragma GCC unroll 8
                    for (int t = 0; t < T; t++)
                        add_products<Blocks::MAX_VALUE>(
                            sums[t], values, chunks[t * stride].values + group * GROUP + part * Blocks::SCALED + 4 * word);
                }
                const RowFloats scale = load_row_floats(scales.scales[group * PARTS + part]);
#pragma GCC unroll 8
                for (int t = 0; t < T; t++) {
                    const RowFloats sum = to_floats(sums[t]);
                    scaled[t] = part ? multiply_add(sum, scale, scaled[t]) : multiply(sum, scale);
                }
            }
#pragma GCC unroll 8
            for (int t = 0; t < T; t++) {
                const ActivationChunk& chunk = chunks[t * stride];
                own[t] = multiply_add(scaled[t], set_row_floats(chunk.scales[group]), own[t]);
                if (!Blocks::ZERO_POINT)
                    own[t] = subtract_product(
                        own[t], load_row_floats(scales.minimums[group]), set_row_floats(chunk.sums[group]));
            }
        }
#pragma GCC unroll 8
    for (int t = 0; t < T; t++) store(totals[t], own[t]);
}

// Groups of 32 inputs in a chunk.
int64_t groups_of(int64_t in_features, int64_t chunk) { return std::min(CHUNK, in_features - chunk * CHUNK) / GROUP; }

// Words of a row.
template <class Blocks>
int64_t row_words(int64_t in_features) {
    const int64_t whole = in_features / CHUNK, rest = in_features % CHUNK / GROUP;
    return whole * Blocks::words(CHUNK / GROUP) + (rest ? Blocks::words(rest) : 0);
}

// Packs up to `ROWS` rows of a file.
template <class Blocks>
void pack_rows(const uint8_t* (&rows)[ROWS], int64_t in_features, uint32_t* out) {
    for (int64_t chunk = 0; chunk < chunks_of(in_features); chunk++) {
        const int64_t groups = groups_of(in_features, chunk), words = Blocks::words(groups);
        for (int64_t row = 0; row < ROWS && rows[row]; row++) {
            uint32_t own[MAX_WORDS] = {};
            Blocks::pack(rows[row] + chunk * (CHUNK / Blocks::BLOCK) * Blocks::BLOCK_BYTES, groups, own);
            for (int64_t i = 0; i < words; i++) out[i * ROWS + row] = own[i];
        }
        out += words * ROWS;
    }
}

// Into the L2 cache: the L1 cache has no room for more than activations and what is multiplied.
void prefetch(const uint32_t* w, int64_t words) {
    for (int64_t i = 0; i < words; i += 16) _mm_prefetch(reinterpret_cast<const char*>(w + i), _MM_HINT_T1);
}

// Products of `ROWS` rows and tokens, to sums [tokens][ROWS].
template <class Blocks, int... T>
void multiply_rows(
    const uint32_t* w, int64_t in_features, const ActivationChunk* activations, int64_t tokens, float (*sums)[ROWS],
    std::integer_sequence<int, T...>) {
    constexpr decltype(&multiply_chunk<Blocks, 1>) MULTIPLY[] = {multiply_chunk<Blocks, T + 1>...};
    const int64_t tiles = ceil_div(tokens, MAX_TOKENS), tile_tokens = ceil_div(tokens, tiles);
    const int64_t chunks = chunks_of(in_features);
    std::memset(sums, 0, tokens * sizeof(*sums));
    for (int64_t chunk = 0; chunk < chunks; chunk++) {
        const int64_t groups = groups_of(in_features, chunk);
        const int64_t words = Blocks::words(groups) * ROWS;
        prefetch(w + PREFETCH, words);
        for (int64_t row = 0; row < ROWS; row += VECTOR_ROWS) {
            auto part = reinterpret_cast<PackedChunk>(w + row);
            GroupScales scales;
            Blocks::unpack_scales(part, groups, scales);
            for (int64_t token = 0; token < tokens; token += tile_tokens)
                MULTIPLY[std::min(tile_tokens, tokens - token) - 1](
                    part, groups, scales, activations + token * chunks + chunk, chunks,
                    reinterpret_cast<float(*)[ROWS]>(sums[token] + row));
        }
        w += words;
    }
}

template <class Blocks>
void multiply_rows(
    const uint32_t* w, int64_t in_features, const ActivationChunk* activations, int64_t tokens, float (*sums)[ROWS]) {
    multiply_rows<Blocks>(w, in_features, activations, tokens, sums, std::make_integer_sequence<int, MAX_TOKENS>());
}

// One of `ROWS` rows in float32.
template <class Blocks>
void unpack_row(const uint32_t* w, int64_t in_features, int64_t row, float* out) {
    const int64_t first = row / VECTOR_ROWS * VECTOR_ROWS, lane = row % VECTOR_ROWS;
    for (int64_t chunk = 0; chunk < chunks_of(in_features); chunk++) {
        const int64_t groups = groups_of(in_features, chunk);
        auto part = reinterpret_cast<PackedChunk>(w + first);
        GroupScales scales;
        Blocks::unpack_scales(part, groups, scales);
        for (int64_t k = 0; k < groups * GROUP; k++) {
            const int64_t group = k / GROUP, scaled = k / Blocks::SCALED;
            alignas(64) uint32_t words[VECTOR_ROWS];
            store(words, Blocks::unpack(part, groups, group / 4, group % 4, k % GROUP / 4));
            const auto byte = static_cast<uint8_t>(words[lane] >> k % 4 * 8);
            const float value = SIGNED_BYTES && Blocks::MAX_VALUE == 255 ? static_cast<int8_t>(byte) : byte;
            const float scale = scales.scales[scaled][lane];
            *out++ = Blocks::ZERO_POINT ? scale * (value - Blocks::ZERO_POINT)
                                        : std::fma(scale, value, -scales.minimums[group][lane]);
        }
        w += Blocks::words(groups) * ROWS;
    }
}

// Rounds a group of weights to a block of Q4_0, as ggml does: the weight of the largest magnitude becomes -8.
void round_to_q4_0(const float* weights, uint8_t* block) {
    const float largest = *std::max_element(
        weights, weights + GROUP, [](float a, float b) { return std::fabs(a) < std::fabs(b); });
    const float scale = largest / -8, factor = scale ? 1 / scale : 0;
    const uint16_t half = _cvtss_sh(scale, _MM_FROUND_TO_NEAREST_INT);
    std::memcpy(block, &half, 2);
    for (int64_t k = 0; k < GROUP / 2; k++) {
        auto value = [&](int64_t i) { return std::min(static_cast<int>(weights[i] * factor + 8.5f), 15); };
        block[2 + k] = static_cast<uint8_t>(value(k) | value(k + GROUP / 2) << 4);
    }
}

// The kernels for tensors of one type.
struct TypeKernels {
    int64_t block, block_bytes;
    int64_t (*row_words)(int64_t in_features);
    void (*pack)(const uint8_t* (&rows)[ROWS], int64_t in_features, uint32_t* out);
    void (*multiply)(const uint32_t*, int64_t in_features, const ActivationChunk*, int64_t tokens, float (*)[ROWS]);
    void (*unpack)(const uint32_t*, int64_t in_features, int64_t row, float* out);

    // Words of `ROWS` packed rows.
    int64_t block_words(int64_t in_features) const { return row_words(in_features) * ROWS; }
};

template <class Blocks>
constexpr TypeKernels KERNELS = {
    Blocks::BLOCK, Blocks::BLOCK_BYTES, row_words<Blocks>, pack_rows<Blocks>, multiply_rows<Blocks>, unpack_row<Blocks>};

const TypeKernels& kernels_of_type(int64_t type) {
    switch (type) {
        case Q4_0: return KERNELS<SmallBlocks<Q4_0>>;
        case Q4_1: return KERNELS<SmallBlocks<Q4_1>>;
        case Q5_0: return KERNELS<SmallBlocks<Q5_0>>;
        case Q5_1: return KERNELS<SmallBlocks<Q5_1>>;
        case Q8_0: return KERNELS<SmallBlocks<Q8_0>>;
        case Q4_K: return KERNELS<KBlocks<false>>;
        case Q5_K: return KERNELS<KBlocks<true>>;
        default: return KERNELS<Q6KBlocks>;
    }
}

// The row of the file that holds an output. Files of Llama have the rows of a head, whose size is `rope_size`, in the
// order of rotated pairs: 0, size / 2, 1, size / 2 + 1, ...
int64_t row_of(int64_t output, int64_t rope_size) {
    if (!rope_size) return output;
    const int64_t own = output % rope_size, half = rope_size / 2;
    return output - own + own % half * 2 + own / half;
}

}  // namespace

int64_t gguf_activation_bytes(int64_t in_features) { return chunks_of(in_features) * sizeof(ActivationChunk); }

void gguf_gemm(
    const Linear& linear, const float* x, int64_t tokens, int8_t* activations, FloatView out, bool accumulate) {
    const int64_t chunks = chunks_of(linear.in_features);
    auto quantized = reinterpret_cast<ActivationChunk*>(activations);
#pragma omp for schedule(static)
    for (int64_t token = 0; token < tokens; token++)
        quantize_token(x + token * linear.in_features, linear.in_features, quantized + token * chunks);
    int64_t start = 0;  // of the tensor, in the outputs
    for (auto tensor = static_cast<const GgufTensor*>(linear.weight); start < linear.out_features; tensor++) {
        const TypeKernels& kernels = kernels_of_type(tensor->type);
        const int64_t block_words = kernels.block_words(linear.in_features);
#pragma omp for schedule(guided) nowait
        for (int64_t first = 0; first < tensor->out_features; first += ROWS) {
            const Mask mask = lane_mask(tensor->out_features - first);
            const int64_t output = start + first;
            for (int64_t start_token = 0; start_token < tokens; start_token += PANEL) {
                const int64_t own = std::min(PANEL, tokens - start_token);
                alignas(64) float sums[PANEL][ROWS];
                kernels.multiply(
                    tensor->weight + first / ROWS * block_words, linear.in_features, quantized + start_token * chunks,
                    own, sums);
                for (int64_t t = 0; t < own; t++) {
                    const int64_t index = (start_token + t) * linear.out_features + output;
                    Floats value = load(sums[t], mask);
                    if (linear.bias) value = value + load(linear.bias + output, mask);
                    if (accumulate) value = value + out.load(index, mask);
                    out.store(index, mask, value);
                }
            }
        }
        start += tensor->out_features;
    }
#pragma omp barrier
}

}  // namespace mcsd

using namespace mcsd;

extern "C" {

// The number of 32-bit words that `ROWS` packed rows have.
void gguf_block_words(int64_t type, int64_t in_features, int64_t* out, int) {
    *out = kernels_of_type(type).block_words(in_features);
}

// Packs the rows of a tensor as a file has them, to blocks of `gguf_block_words`. Missing rows of the last block stay as
// they are in `out`.
void gguf_pack(
    uint8_t* weight, int64_t type, int64_t out_features, int64_t in_features, int64_t rope_size, uint32_t* out,
    int threads) {
    const TypeKernels& kernels = kernels_of_type(type);
    const int64_t row_bytes = in_features / kernels.block * kernels.block_bytes;
    const int64_t block_words = kernels.block_words(in_features);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t first = 0; first < out_features; first += ROWS) {
        const uint8_t* rows[ROWS] = {};
        for (int64_t i = 0; i < std::min(ROWS, out_features - first); i++)
            rows[i] = weight + row_of(first + i, rope_size) * row_bytes;
        kernels.pack(rows, in_features, out + first / ROWS * block_words);
    }
}

// Rounds a packed tensor to Q4_0, to `rounded`.
void gguf_round(
    uint32_t* packed, int64_t type, int64_t out_features, int64_t in_features, uint32_t* rounded, int threads) {
    typedef SmallBlocks<Q4_0> Rounded;
    const TypeKernels& kernels = kernels_of_type(type);
    const int64_t block_words = kernels.block_words(in_features);
    const int64_t rounded_words = KERNELS<Rounded>.block_words(in_features);
    const int64_t row_bytes = in_features / Rounded::BLOCK * Rounded::BLOCK_BYTES;
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> weights(in_features);
        std::vector<uint8_t> bytes(ROWS * row_bytes);
#pragma omp for schedule(static)
        for (int64_t block = 0; block < ceil_div(out_features, ROWS); block++) {
            const uint8_t* rows[ROWS] = {};
            for (int64_t i = 0; i < std::min(ROWS, out_features - block * ROWS); i++) {
                kernels.unpack(packed + block * block_words, in_features, i, weights.data());
                uint8_t* row = bytes.data() + i * row_bytes;
                for (int64_t group = 0; group < in_features / GROUP; group++)
                    round_to_q4_0(weights.data() + group * GROUP, row + group * Rounded::BLOCK_BYTES);
                rows[i] = row;
            }
            pack_rows<Rounded>(rows, in_features, rounded + block * rounded_words);
        }
    }
}

// Rows of a packed tensor by their indices, in float32 [count, in_features].
void gguf_rows(
    uint32_t* packed, int64_t type, int64_t in_features, int64_t* indices, int64_t count, float* out, int threads) {
    const TypeKernels& kernels = kernels_of_type(type);
    const int64_t block_words = kernels.block_words(in_features);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t i = 0; i < count; i++)
        kernels.unpack(
            packed + indices[i] / ROWS * block_words, in_features, indices[i] % ROWS, out + i * in_features);
}
}
