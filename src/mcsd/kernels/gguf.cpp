// Matrix products with the tensors of GGUF files as they are in the file; see gguf.h. `mcsd.cpu.gguf_linear` calls the
// entry.

#include "gguf.h"

#include <utility>

#include "gguf_types.h"

namespace mcsd {
namespace {

constexpr int MAX_ACTIVATION = 16383;  // of a quantized activation: a chunk's sums of products fit into 32 bits
constexpr float MIN_ABSMAX = 1e-30f;   // of a smaller one the inverse of the scale would be infinite
constexpr int64_t TASK = LANES;        // outputs that a thread takes at once
constexpr int MAX_TOKENS = 8;          // of a tile: sums and weights are in registers
constexpr int64_t PREFETCH = 1024;     // bytes ahead

// A token's quantized activations: int16 values, slice by slice in the order of `SliceValues`, then the scales of the
// chunks and the sums of the groups, in float32.
struct ActivationLayout {
    int64_t chunks, scales, sums, bytes;

    explicit ActivationLayout(int64_t in_features)
        : chunks(ceil_div(in_features, GGUF_CHUNK)),
          scales(chunks * GGUF_CHUNK * 2),
          sums(scales + chunks * 4),
          bytes(round_up(sums + chunks * GGUF_GROUPS * 4, 64)) {}
};

// The largest magnitude of a chunk, at least `MIN_ABSMAX`; NaN if any of x is NaN.
float chunk_absmax(const float* x) {
    const __m256 sign = _mm256_set1_ps(-0.0f);
    __m256 largest = _mm256_set1_ps(MIN_ABSMAX), nan = _mm256_setzero_ps();
    for (int64_t k = 0; k < GGUF_CHUNK; k += 8) {
        const __m256 part = _mm256_loadu_ps(x + k);
        largest = _mm256_max_ps(largest, _mm256_andnot_ps(sign, part));
        nan = _mm256_or_ps(nan, _mm256_cmp_ps(part, part, _CMP_UNORD_Q));
    }
    float values[8];
    _mm256_storeu_ps(values, largest);
    return _mm256_movemask_ps(nan) ? QUIET_NAN : *std::max_element(values, values + 8);
}

// Quantizes a chunk of activations.
void quantize_chunk(const float* x, char* values, float& scale, float* sums) {
    const float absmax = chunk_absmax(x);
    scale = absmax * (1.0f / MAX_ACTIVATION);
    const __m256 factor = _mm256_set1_ps(MAX_ACTIVATION / absmax);
    const __m256i even_then_odd = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15));
    for (int64_t group = 0; group < GGUF_GROUPS; group++) {
        __m256i total = _mm256_setzero_si256();
        for (int64_t i = 0; i < 2; i++, x += 16) {
            const __m256i first = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x), factor));
            const __m256i second = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + 8), factor));
            total = _mm256_add_epi32(total, _mm256_add_epi32(first, second));
            const __m256i in_order = _mm256_permute4x64_epi64(_mm256_packs_epi32(first, second), 0xd8);
            const __m256i sorted = _mm256_permute4x64_epi64(_mm256_shuffle_epi8(in_order, even_then_odd), 0xd8);
            char* lane = values + group / BYTE_LANES * SLICE_BYTES + group % BYTE_LANES * 16;
            char* even = lane + 2 * i * sizeof(Bytes);
            _mm_store_si128(reinterpret_cast<__m128i*>(even), _mm256_castsi256_si128(sorted));
            _mm_store_si128(reinterpret_cast<__m128i*>(even + sizeof(Bytes)), _mm256_extracti128_si256(sorted, 1));
        }
        alignas(32) int32_t totals[8];
        _mm256_store_si256(reinterpret_cast<__m256i*>(totals), total);
        sums[group] = 0;
        for (const int32_t part : totals) sums[group] += part;
        sums[group] *= scale;
    }
}

void quantize_token(const ActivationLayout& layout, const float* x, int64_t in_features, char* row) {
    for (int64_t c = 0; c < layout.chunks; c++, x += GGUF_CHUNK, in_features -= GGUF_CHUNK) {
        float last[GGUF_CHUNK] = {};
        if (in_features < GGUF_CHUNK) std::memcpy(last, x, in_features * sizeof(float));
        quantize_chunk(
            in_features < GGUF_CHUNK ? last : x, row + c * GGUF_CHUNK * 2,
            reinterpret_cast<float*>(row + layout.scales)[c],
            reinterpret_cast<float*>(row + layout.sums) + c * GGUF_GROUPS);
    }
}

// The rows of a tensor. A row is its whole chunks and, of types with small blocks, the rest of its blocks.
struct Rows {
    int64_t row_bytes, whole_chunks;
};

// Products of a row of weights and T tokens, to out[t * TASK].
template <class Blocks, int T>
void multiply_row(
    const uint8_t* w, const Rows& rows, const ActivationLayout& layout, const char* activations, float* out) {
    constexpr int64_t CHUNK_BYTES = GGUF_CHUNK / Blocks::BLOCK * Blocks::BLOCK_BYTES;
    const uint8_t* end = w + rows.row_bytes;
    LaneSums totals[T];
#pragma GCC unroll 8
    for (int t = 0; t < T; t++) totals[t] = zero_lanes();
    for (int64_t c = 0; c < layout.chunks; c++, w += CHUNK_BYTES) {
        alignas(64) uint8_t rest[CHUNK_BYTES];
        const uint8_t* chunk = w;
        if (Blocks::BLOCK < GGUF_CHUNK && c == rows.whole_chunks) {
            std::memset(rest, 0, CHUNK_BYTES);
            std::memcpy(rest, w, end - w);
            chunk = rest;
        }
#pragma GCC unroll 5
        for (int64_t line = 0; line < CHUNK_BYTES; line += 64)
            _mm_prefetch(reinterpret_cast<const char*>(w) + PREFETCH + line, _MM_HINT_T0);
        ChunkHeader header;
        Blocks::read_header(chunk, header);
        Bytes sums[T];
        LaneSums chunk_totals[T];
#pragma GCC unroll 4
        for (int slice = 0; slice < GGUF_SLICES; slice++) {
            SliceValues values;
            Blocks::unpack(chunk, header, slice, values);
            const LaneSums scales = spread(header.scales, slice * BYTE_LANES);
#pragma GCC unroll 8
            for (int t = 0; t < T; t++) {
                const char* own = activations + t * layout.bytes + c * GGUF_CHUNK * 2 + slice * SLICE_BYTES;
                if (slice == 0 || !Blocks::ONE_SCALE) sums[t] = no_sums();
#pragma GCC unroll 4
                for (int v = 0; v < SLICE_VECTORS; v++)
                    sums[t] = dot_shorts(sums[t], values[v], own + v * sizeof(Bytes));
                if (Blocks::ONE_SCALE) continue;
                const LaneSums sum = to_float(sums[t]);
                chunk_totals[t] = slice ? multiply_add(sum, scales, chunk_totals[t]) : multiply(sum, scales);
            }
        }
#pragma GCC unroll 8
        for (int t = 0; t < T; t++) {
            const char* row = activations + t * layout.bytes;
            float scale;
            std::memcpy(&scale, row + layout.scales + 4 * c, 4);
            if (Blocks::ONE_SCALE) chunk_totals[t] = multiply(to_float(sums[t]), spread(header.scales, 0));
            totals[t] = multiply_add(chunk_totals[t], set_lanes(scale), totals[t]);
            if (Blocks::HAS_MINIMUM) {
                auto group_sums = reinterpret_cast<const float*>(row + layout.sums) + GGUF_GROUPS * c;
                totals[t] = subtract_products(header.minimums, _mm256_loadu_ps(group_sums), totals[t]);
            }
        }
    }
#pragma GCC unroll 8
    for (int t = 0; t < T; t++) out[t * TASK] = total(totals[t]);
}

// Weights of a row in float32.
template <class Blocks>
void dequantize_row(const uint8_t* w, const Rows& rows, int64_t in_features, float* out) {
    constexpr int64_t CHUNK_BYTES = GGUF_CHUNK / Blocks::BLOCK * Blocks::BLOCK_BYTES;
    const uint8_t* end = w + rows.row_bytes;
    for (int64_t first = 0; first < in_features; first += GGUF_CHUNK, w += CHUNK_BYTES) {
        alignas(64) uint8_t chunk[CHUNK_BYTES] = {};
        std::memcpy(chunk, w, std::min<int64_t>(CHUNK_BYTES, end - w));
        ChunkHeader header;
        header.minimums = _mm256_setzero_ps();
        Blocks::read_header(chunk, header);
        float scales[GGUF_GROUPS], minimums[GGUF_GROUPS];
        _mm256_storeu_ps(scales, header.scales);
        _mm256_storeu_ps(minimums, header.minimums);
        for (int slice = 0; slice < GGUF_SLICES; slice++) {
            SliceValues vectors;
            Blocks::unpack(chunk, header, slice, vectors);
            int16_t values[SLICE_VECTORS][BYTE_LANES][8];
            std::memcpy(values, vectors, sizeof values);
            for (int64_t lane = 0; lane < BYTE_LANES; lane++) {
                const int64_t group = slice * BYTE_LANES + lane, begin = first + group * GGUF_GROUP;
                for (int64_t k = 0; k < std::min(GGUF_GROUP, in_features - begin); k++) {
                    const int16_t value = values[k / 16 * 2 + k % 2][lane][k % 16 / 2];
                    out[begin + k] = scales[group] * value - minimums[group];
                }
            }
        }
    }
}

// The kernels for tensors of one type.
struct TypeKernels {
    int64_t block, block_bytes;
    void (*dequantize)(const uint8_t*, const Rows&, int64_t, float*);
    void (*multiply[MAX_TOKENS + 1])(const uint8_t*, const Rows&, const ActivationLayout&, const char*, float*);

    Rows rows(int64_t in_features) const {
        return {in_features / block * block_bytes, in_features / GGUF_CHUNK};
    }
};

template <class Blocks, int... T>
constexpr TypeKernels kernels_of(std::integer_sequence<int, T...>) {
    return {Blocks::BLOCK, Blocks::BLOCK_BYTES, dequantize_row<Blocks>, {nullptr, multiply_row<Blocks, T + 1>...}};
}

template <class Blocks>
constexpr TypeKernels KERNELS = kernels_of<Blocks>(std::make_integer_sequence<int, MAX_TOKENS>());

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

// The row of the file that holds an output; see `GgufTensor`.
int64_t row_of(const GgufTensor& tensor, int64_t output) {
    const int64_t size = tensor.rope_size;
    if (!size) return output;
    const int64_t own = output % size;
    return output - own + own % (size / 2) * 2 + own / (size / 2);
}

}  // namespace

int64_t gguf_activation_bytes(int64_t in_features) { return ActivationLayout(in_features).bytes; }

void gguf_gemm(
    const Linear& linear, const float* x, int64_t tokens, int8_t* activations, FloatView out, bool accumulate) {
    const ActivationLayout layout(linear.in_features);
    char* quantized = reinterpret_cast<char*>(activations);
#pragma omp for schedule(static)
    for (int64_t token = 0; token < tokens; token++)
        quantize_token(layout, x + token * linear.in_features, linear.in_features, quantized + token * layout.bytes);
    const int64_t tiles = ceil_div(tokens, MAX_TOKENS), tile_tokens = ceil_div(tokens, tiles);
    int64_t start = 0;  // of the tensor, in the outputs
    for (auto tensor = static_cast<const GgufTensor*>(linear.weight); start < linear.out_features; tensor++) {
        const TypeKernels& kernels = kernels_of_type(tensor->type);
        const Rows rows = kernels.rows(linear.in_features);
#pragma omp for schedule(guided) nowait
        for (int64_t first = 0; first < tensor->out_features; first += TASK) {
            const int64_t count = std::min(TASK, tensor->out_features - first), output = start + first;
            for (int64_t token = 0; token < tokens; token += tile_tokens) {
                const int64_t own = std::min(tile_tokens, tokens - token);
                float sums[MAX_TOKENS * TASK] = {};
                for (int64_t i = 0; i < count; i++)
                    kernels.multiply[own](
                        tensor->weight + row_of(*tensor, first + i) * rows.row_bytes, rows, layout,
                        quantized + token * layout.bytes, sums + i);
                const Mask mask = lane_mask(count);
                for (int64_t t = 0; t < own; t++) {
                    const int64_t index = (token + t) * linear.out_features + output;
                    Floats value = load(sums + t * TASK, mask);
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

// Rows of a tensor by their indices, in float32 [count, in_features].
void gguf_rows(
    void* weight, int64_t type, int64_t in_features, int64_t* indices, int64_t count, float* out, int threads) {
    const TypeKernels& kernels = kernels_of_type(type);
    const Rows rows = kernels.rows(in_features);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t i = 0; i < count; i++)
        kernels.dequantize(
            static_cast<uint8_t*>(weight) + indices[i] * rows.row_bytes, rows, in_features, out + i * in_features);
}
}
