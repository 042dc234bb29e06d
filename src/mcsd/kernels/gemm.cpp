// Matrix products of linear layers; see gemm.h. `mcsd.cpu.native_linear` calls the entry.

#include "gemm.h"

#include "gguf.h"

namespace mcsd {

void QuantizedActivations::reserve(const Linear& linear, int64_t tokens) {
    if (linear.format == GGUF) return values.reserve(tokens * gguf_activation_bytes(linear.in_features));
#ifdef __AVX512VNNI__
    reserve_packed(linear, tokens, *this);
#endif
}

void gemm(
    const Linear& linear, const float* x, int64_t tokens, QuantizedActivations& activations, FloatView out,
    bool accumulate) {
    if (linear.format == GGUF) return gguf_gemm(linear, x, tokens, activations.values.data(), out, accumulate);
#ifdef __AVX512VNNI__
    packed_gemm(linear, x, tokens, activations, out, accumulate);
#endif
}

namespace {

constexpr int64_t CHUNK = 240;  // tokens that are multiplied together

}  // namespace
}  // namespace mcsd

using namespace mcsd;

extern "C" {

// Activations [tokens, in_features] to out [tokens, out_features]; both in float32 or both in bf16.
void linear(const Linear* linear, void* activations, bool bf16, int64_t tokens, void* out, int threads) {
    static thread_local QuantizedActivations quantized;
    static thread_local Buffer<float> buffer;
    const int64_t in_features = linear->in_features, max_tokens = std::min(tokens, CHUNK);
    const FloatView from{activations, bf16}, to{out, bf16};
    quantized.reserve(*linear, max_tokens);
    buffer.reserve(max_tokens * in_features);
    QuantizedActivations& shared = quantized;
    float* x = buffer.data();
#pragma omp parallel num_threads(threads)
    for (int64_t first = 0; first < tokens; first += CHUNK) {
        const int64_t count = std::min(CHUNK, tokens - first);
#pragma omp for schedule(static) nowait
        for (int64_t i = 0; i < count; i++)
            copy(from.at((first + i) * in_features), {x + i * in_features, false}, in_features);
        gemm(*linear, x, count, shared, to.at(first * linear->out_features), false);
    }
}
}
