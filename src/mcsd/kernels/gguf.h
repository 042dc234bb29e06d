// Linear layers whose weights are those of a GGUF file, bit by bit, in the order in which the kernels read them; see
// gguf_types.h. Activations are int8 with a scale for each 32 inputs; integer products are added up exactly, in 32 bits,
// and scaled in float32. A token's result does not depend on the other tokens of the batch, to the last bit.

#pragma once

#include "gemm.h"

namespace mcsd {

// A packed tensor of a file. A linear layer of format `GGUF` has an array of these for its weight, whose outputs are one
// after the other.
struct GgufTensor {
    const uint32_t* weight;
    int64_t out_features;
    int64_t type;  // see gguf_types.h
};

// Bytes of a token's quantized activations.
int64_t gguf_activation_bytes(int64_t in_features);

// See `gemm`.
void gguf_gemm(
    const Linear& linear, const float* x, int64_t tokens, int8_t* activations, FloatView out, bool accumulate);

}  // namespace mcsd
