// Matrix products with packed weights, by AVX-512 VNNI; see gemm.h. `mcsd.cpu.native_linear` calls the entry.

#include "gemm_tiles.h"
#include "quantize.h"

namespace mcsd {
namespace {

constexpr int64_t SHARING_ROWS = 4 * MAX_TILE_ROWS;  // that share a slice of weights while it is in the L1 cache

// Rows of activations times one block of weights, to sums [rows][32].
void gemm_block(const WeightLayout& layout, const char* weight, const char* activations, int64_t rows, void* sums) {
    std::memset(sums, 0, rows * BLOCK * 4);
    const int64_t tiles = ceil_div(rows, layout.max_tile_rows), tile_rows = ceil_div(rows, tiles);
    const int64_t inputs = tiles == 1 ? layout.own_slice : layout.shared_slice;
    const char* block_end = weight + layout.block_bytes;
    for (int64_t begin = 0; begin < layout.in_features; begin += inputs, weight += layout.slice_bytes) {
        const int64_t end = std::min(begin + inputs, layout.in_features);
        for (int64_t first = 0; first < rows; first += tile_rows) {
            // A tile that is alone prefetches all that comes next. Of several the first and the second prefetch half of
            // the next slice each.
            const int64_t tile = first / tile_rows, stride = tiles == 1 ? 128 : tile < 2 ? 64 : 0;
            const char* next_slice = std::min(weight + layout.slice_bytes, block_end);
            const char* prefetch =
                tiles == 1 ? weight + PREFETCH : tile ? next_slice + layout.slice_bytes / 2 : next_slice;
            layout.tiles[std::min(tile_rows, rows - first)](
                {weight, activations + first * layout.activation_bytes, layout.activation_bytes, layout.in_features,
                 begin, end, static_cast<float*>(sums) + first * BLOCK, prefetch, stride});
        }
    }
}

// Sixteen outputs of a token, from its `sums` of a block.
__m512 dequantize(
    const Linear& linear, const QuantizedActivations& activations, const int32_t* sums, int64_t token, int64_t output,
    __mmask16 mask) {
    if (linear.format == BFP16) return _mm512_loadu_ps(sums);
    const __m512 scale = _mm512_set1_ps(activations.scales.data()[token]);
    if (linear.format == W4A8) return _mm512_mul_ps(_mm512_loadu_ps(sums), scale);
    const bool residual = linear.format == W8A16;
    auto product = [&](int64_t row, const int32_t* row_sums) {
        const __m512i zero_sum = _mm512_set1_epi32(activations.zero_sums.data()[row]);
        return _mm512_cvtepi32_ps(_mm512_sub_epi32(_mm512_loadu_si512(row_sums), zero_sum));
    };
    __m512 out = product(token << residual, sums);
    if (residual) out = _mm512_fmadd_ps(product(2 * token + 1, sums + BLOCK), _mm512_set1_ps(1 / RESIDUAL_STEPS), out);
    out = _mm512_mul_ps(out, _mm512_maskz_loadu_ps(mask, linear.scale + output));
    return _mm512_mul_ps(out, scale);
}

}  // namespace

void reserve_packed(const Linear& linear, int64_t tokens, QuantizedActivations& activations) {
    const WeightLayout layout(linear);
    activations.values.reserve(layout.rows_per_token * tokens * layout.activation_bytes);
    activations.zero_sums.reserve(2 * tokens);
    activations.scales.reserve(tokens);
}

void packed_gemm(
    const Linear& linear, const float* x, int64_t tokens, QuantizedActivations& activations, FloatView out,
    bool accumulate) {
    const WeightLayout layout(linear);
    const int64_t rows_per_token = layout.rows_per_token, out_features = linear.out_features;
    const int64_t max_rows = tokens * rows_per_token > SHARING_ROWS ? layout.max_tile_rows : SHARING_ROWS;
    const int64_t max_tokens = max_rows / rows_per_token;
#pragma omp for schedule(static)
    for (int64_t token = 0; token < tokens; token++)
        quantize(linear, x + token * linear.in_features, token, activations);
#pragma omp for schedule(guided)
    for (int64_t block = 0; block < out_features; block += BLOCK) {
        alignas(64) int32_t sums[SHARING_ROWS * BLOCK];
        const char* weight = static_cast<const char*>(linear.weight) + block / BLOCK * layout.block_bytes;
        for (int64_t first = 0; first < tokens; first += max_tokens) {
            const int64_t count = std::min(max_tokens, tokens - first);
            const int8_t* values = activations.values.data() + first * rows_per_token * layout.activation_bytes;
            gemm_block(layout, weight, reinterpret_cast<const char*>(values), count * rows_per_token, sums);
            for (int64_t i = 0; i < count; i++)
                for (int64_t output = block; output < std::min(block + BLOCK, out_features); output += LANES) {
                    const __mmask16 mask = lane_mask(out_features - output);
                    const int32_t* own = sums + i * rows_per_token * BLOCK + output - block;
                    const int64_t index = (first + i) * out_features + output;
                    __m512 value = dequantize(linear, activations, own, first + i, output, mask);
                    if (linear.bias) value = _mm512_add_ps(value, _mm512_maskz_loadu_ps(mask, linear.bias + output));
                    if (accumulate) value = _mm512_add_ps(value, out.load(index, mask));
                    out.store(index, mask, value);
                }
        }
    }
}

}  // namespace mcsd

using namespace mcsd;

extern "C" {

// Packs bf16 weights [out_features, in_features] in the layout of BFP16; `out` is zeros.
void pack_bfp16(void* weight, int64_t out_features, int64_t in_features, void* out, int threads) {
    const WeightLayout layout({nullptr, nullptr, nullptr, in_features, out_features, BFP16});
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t block = 0; block < out_features; block += BLOCK) {
        char* group = static_cast<char*>(out) + block / BLOCK * layout.block_bytes;
        for (int64_t begin = 0; begin < in_features; begin += BFP_GROUP, group += layout.slice_bytes)
            for (int64_t output = block; output < std::min(block + BLOCK, out_features); output++) {
                const int64_t i = output - block, count = std::min(BFP_GROUP, in_features - begin);
                const FloatView weights{static_cast<uint16_t*>(weight) + output * in_features + begin, true};
                const float scale = quantize_bfp16_weights(weights, count, group + BFP_SCALES + 4 * i);
                // bf16 is the upper half of float32.
                std::memcpy(group + i % LANES * 4 + i / LANES * 2, reinterpret_cast<const char*>(&scale) + 2, 2);
            }
    }
}
}
