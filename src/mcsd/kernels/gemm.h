// Linear layers for the few tokens of a draft tree: out = activations x weight^T + bias, in integers with AVX-512 VNNI.
// At this batch size the time is that of reading the weight from memory, so a weight is read once, in memory order.
// A token's result does not depend on the other tokens of the batch, to the last bit.
//
// Formats. Integer products are added up exactly, in 32 bits; results are scaled in float32.
//     W8A8    weight = scale * int8, a scale for each output; activations = scale * int8, a scale for each token
//     W8A16   as W8A8; the rounding error of the activations is a second int8, in 1/254 of the first one's scale
//     BFP16   block floating point: weight and activations = scale * int16, a scale for each group of 128 inputs
//     W4A8    weight = minimum + scale * uint4, both for each group of 32 inputs; activations as in W8A8
//     GGUF    tensors of a GGUF file as they are; see gguf.h
//
// Layouts. A weight is split into blocks of 32 outputs, padded with zeros. A block holds all its inputs, in order:
//     W8A8, W8A16   [inputs / 4][32][4] uint8, each the quantized value + 128; inputs padded to a multiple of 16
//     BFP16         groups of 128 inputs, the last shorter: scales, bf16 [16][2], a pair being outputs i and i + 16;
//                   quantized values, int16 [64][32][2]; inputs padded to a multiple of 16
//     W4A8          groups of 32 inputs: scales and minimums, float16 [2][32]; quantized values, uint8 [8][16][4], each
//                   byte holding outputs i (low) and i + 16 (high); inputs padded to whole groups

#pragma once

#include "simd.h"

namespace mcsd {

enum WeightFormat : int64_t { W8A8, W8A16, BFP16, W4A8, GGUF };

struct Linear {
    const void* weight;
    const float* scale;  // [out_features]; of W8A8 and W8A16
    const float* bias;   // [out_features], or null
    int64_t in_features, out_features;
    WeightFormat format;
};

// The activations of a linear layer as integers. A token has one row of quantized values; in W8A16 it has two.
struct QuantizedActivations {
    Buffer<int8_t> values;      // [rows], each of `WeightLayout::activation_bytes`
    Buffer<int32_t> zero_sums;  // [rows], 128 times the sum of a row: what the weights' zero point adds to each product
    Buffer<float> scales;       // [tokens], of the first row; not of BFP16

    void reserve(const Linear& linear, int64_t tokens);
};

// x [tokens, in_features] to out [tokens, out_features], which it adds to if it shall `accumulate`.
// Every thread of a team calls it. A thread needs only those rows of x that a static schedule gives it.
void gemm(
    const Linear& linear, const float* x, int64_t tokens, QuantizedActivations& activations, FloatView out,
    bool accumulate);

// The same with packed weights, in every format but GGUF. Only for AVX-512 VNNI.
void packed_gemm(
    const Linear& linear, const float* x, int64_t tokens, QuantizedActivations& activations, FloatView out,
    bool accumulate);
void reserve_packed(const Linear& linear, int64_t tokens, QuantizedActivations& activations);

}  // namespace mcsd
