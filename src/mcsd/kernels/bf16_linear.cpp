// Linear layers for the few tokens of a draft tree whose bf16 weights stay where they are, [out_features, in_features]
// in memory order: out = activations x weight^T + bias. Sums are in float32. A token's result does not depend on the
// other tokens of the batch, to the last bit. `mcsd.kernels.bf16_linear` calls the entry.

#include "simd.h"

namespace mcsd {
namespace {

constexpr int64_t PAIR_LANES = 2 * LANES;             // bf16 of a vector
constexpr int64_t TILE_TOKENS = 6, TILE_OUTPUTS = 4;  // with these all sums are in registers
constexpr int64_t PREFETCH_ROWS = TILE_OUTPUTS;       // ahead: the weights of the next tile

// Adds the products of 32 pairs of bf16 to 16 sums; `NATIVE`: by AVX-512 BF16.
template <bool NATIVE>
[[gnu::always_inline]] inline __m512 dot_bf16(__m512 sum, __m512i weights, __m512i activations) {
    if (NATIVE) {
        asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(weights), "v"(activations));
        return sum;
    }
    __m512 lower_weights, upper_weights, lower, upper;
    unpack_bf16(weights, lower_weights, upper_weights);
    unpack_bf16(activations, lower, upper);
    return _mm512_fmadd_ps(upper_weights, upper, _mm512_fmadd_ps(lower_weights, lower, sum));
}

struct UnpackedLinear {
    const uint16_t *weight, *bias, *activations;  // bias may be null
    uint16_t* out;
    int64_t in_features, out_features;
};

// The totals of four vectors.
inline __m128 add_lanes(__m512 a, __m512 b, __m512 c, __m512 d) {
    const __m512 ac = _mm512_add_ps(_mm512_unpacklo_ps(a, c), _mm512_unpackhi_ps(a, c));
    const __m512 bd = _mm512_add_ps(_mm512_unpacklo_ps(b, d), _mm512_unpackhi_ps(b, d));
    const __m512 all = _mm512_add_ps(_mm512_unpacklo_ps(ac, bd), _mm512_unpackhi_ps(ac, bd));
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
    return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

// T tokens times four outputs.
template <bool NATIVE, int T>
void tile(const UnpackedLinear& linear, int64_t token, int64_t output) {
    const int64_t in_features = linear.in_features, last = linear.out_features - 1;
    const uint16_t *x = linear.activations + token * in_features, *w[TILE_OUTPUTS];
    for (int o = 0; o < TILE_OUTPUTS; o++) w[o] = linear.weight + std::min(output + o, last) * in_features;
    __m512 sums[T][TILE_OUTPUTS];
#pragma GCC unroll 6
    for (int t = 0; t < T; t++)
#pragma GCC unroll 4
        for (int o = 0; o < TILE_OUTPUTS; o++) sums[t][o] = _mm512_setzero_ps();
    auto add = [&](int64_t k, __mmask32 mask) [[gnu::always_inline]] {
        __m512i weights[TILE_OUTPUTS];
#pragma GCC unroll 4
        for (int o = 0; o < TILE_OUTPUTS; o++) {
            weights[o] = _mm512_maskz_loadu_epi16(mask, w[o] + k);
            _mm_prefetch(w[o] + k + PREFETCH_ROWS * in_features, _MM_HINT_T0);
        }
#pragma GCC unroll 6
        for (int t = 0; t < T; t++) {
            const __m512i activations = _mm512_maskz_loadu_epi16(mask, x + t * in_features + k);
#pragma GCC unroll 4
            for (int o = 0; o < TILE_OUTPUTS; o++)
                sums[t][o] = dot_bf16<NATIVE>(sums[t][o], weights[o], activations);
        }
    };
    const int64_t whole = in_features / PAIR_LANES * PAIR_LANES;
    for (int64_t k = 0; k < whole; k += PAIR_LANES) add(k, ~__mmask32{0});
    if (whole < in_features) add(whole, (__mmask32{1} << (in_features - whole)) - 1);
    const __mmask16 mask = lane_mask(std::min<int64_t>(linear.out_features - output, TILE_OUTPUTS));
    const __m512 bias = linear.bias ? load<true>(linear.bias, output, mask) : _mm512_setzero_ps();
#pragma GCC unroll 6
    for (int t = 0; t < T; t++) {
        const __m128 total = add_lanes(sums[t][0], sums[t][1], sums[t][2], sums[t][3]);
        const FloatView out{linear.out, true};
        out.store((token + t) * linear.out_features + output, mask, _mm512_add_ps(_mm512_castps128_ps512(total), bias));
    }
}

typedef void (*Tile)(const UnpackedLinear&, int64_t token, int64_t output);

template <bool NATIVE>
const Tile TILES[] = {nullptr, tile<NATIVE, 1>, tile<NATIVE, 2>, tile<NATIVE, 3>, tile<NATIVE, 4>, tile<NATIVE, 5>,
                      tile<NATIVE, 6>};

}  // namespace
}  // namespace mcsd

using namespace mcsd;

extern "C" {

// Activations [tokens, in_features] to out [tokens, out_features], all in bf16.
void bf16_linear(
    void* weight, void* bias, void* activations, void* out, int64_t in_features, int64_t out_features, int64_t tokens,
    int threads) {
    const UnpackedLinear linear{
        static_cast<uint16_t*>(weight), static_cast<uint16_t*>(bias), static_cast<uint16_t*>(activations),
        static_cast<uint16_t*>(out), in_features, out_features};
    const Tile* by_tokens = __builtin_cpu_supports("avx512bf16") ? TILES<true> : TILES<false>;
    const int64_t tiles = ceil_div(tokens, TILE_TOKENS), tile_tokens = ceil_div(tokens, tiles);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t output = 0; output < out_features; output += TILE_OUTPUTS)
        for (int64_t token = 0; token < tokens; token += tile_tokens)
            by_tokens[std::min(tile_tokens, tokens - token)](linear, token, output);
}
}
