// Decoder layers of the Llama kind, decoders and draft heads, as the ctypes mirror describes them, and the workspace of
// their forwards. `tokens` in shapes are those of all sequences, one sequence after the other.

#pragma once

#include "attention.h"
#include "gemm.h"

namespace mcsd {

struct RMSNorm {
    const float* weight;  // or null
    double eps;           // negative: there is no norm
};

// The part of a layer up to the attention.
struct PreAttention {
    RMSNorm input_norm;
    Linear qkv_proj;
    RMSNorm q_norm, k_norm;  // of each head
    int64_t heads, kv_heads, head_size;
};

// The part of a layer after the attention.
struct PostAttention {
    Linear o_proj;
    RMSNorm norm;
    Linear gate_up_proj, down_proj;
};

struct DecoderLayer {
    PreAttention pre_attention;
    PostAttention post_attention;
    double scaling;
    int64_t sliding_window;  // positions that a token attends to, its own included; 0 for all
    bool skips_first;        // whether tokens after the first one of a text do not attend to it
};

struct Decoder {
    const DecoderLayer* layers;
    int64_t num_layers;
    RMSNorm norm;

    int64_t hidden_size() const { return layers[0].post_attention.o_proj.out_features; }
};

// A draft head (EAGLE, Li et al. 2024). It projects features of the target to a hidden state, and that and a token's
// embedding, the pair, to the input of its decoder. The decoder's outputs are the head's own hidden states; they give the
// logits. A linear layer without a weight is absent.
struct HeadWeights {
    RMSNorm feature_norm;  // of each part of the features, with a weight for each number of all parts
    int64_t feature_parts;
    Linear feature_proj;
    RMSNorm state_norm, embedding_norm;  // of the pair
    bool embedding_first;                // in the pair
    Linear input_proj;     // without it the first layer's attention reads the pair; its residual is the hidden state
    bool normed_residual;  // whether that residual is normalized
    Decoder decoder;
    RMSNorm output_norm;
    Linear lm_head;
};

namespace {

// Memory for intermediate results, of the thread that calls an entry.
struct Workspace {
    QuantizedActivations activations;
    Buffer<float> hidden;       // [tokens, hidden_size], the residual stream
    Buffer<float> wide;         // outputs of qkv_proj and gate_up_proj, inputs of o_proj and feature_proj
    Buffer<float> narrow;       // inputs of qkv_proj, gate_up_proj, down_proj and lm_head
    Buffer<float> qkv;          // [tokens, (heads + 2 kv_heads) head_size]
    Buffer<float> attended;     // [tokens, heads head_size]
    Buffer<float> pairs;        // [tokens, 2 hidden_size], of a draft head
    Buffer<int64_t> positions;  // [tokens]
    Buffer<uint8_t> mask;       // [tokens, earlier + length], of a layer

    void reserve(const PreAttention& layer, int64_t tokens) {
        activations.reserve(layer.qkv_proj, tokens);
        narrow.reserve(tokens * layer.qkv_proj.in_features);
        wide.reserve(tokens * layer.qkv_proj.out_features);
    }

    void reserve(const PostAttention& layer, int64_t tokens) {
        for (const Linear* linear : {&layer.o_proj, &layer.gate_up_proj, &layer.down_proj})
            activations.reserve(*linear, tokens);
        hidden.reserve(tokens * layer.o_proj.out_features);
        wide.reserve(tokens * std::max(layer.gate_up_proj.out_features, layer.o_proj.in_features));
        narrow.reserve(tokens * std::max(layer.down_proj.in_features, layer.o_proj.out_features));
    }

    void reserve(const Decoder& decoder, const AttentionMetadata& metadata) {
        const int64_t tokens = metadata.sequences * metadata.length;
        positions.reserve(tokens);
        mask.reserve(tokens * (metadata.earlier + metadata.length));
        for (int64_t i = 0; i < decoder.num_layers; i++) {
            const PreAttention& layer = decoder.layers[i].pre_attention;
            reserve(layer, tokens);
            reserve(decoder.layers[i].post_attention, tokens);
            qkv.reserve(tokens * layer.qkv_proj.out_features);
            attended.reserve(tokens * layer.heads * layer.head_size);
        }
    }

    void reserve(const HeadWeights& head, const AttentionMetadata& metadata) {
        const int64_t tokens = metadata.sequences * metadata.length;
        for (const Linear* linear : {&head.feature_proj, &head.input_proj, &head.lm_head})
            if (linear->weight) activations.reserve(*linear, tokens);
        reserve(head.decoder, metadata);
        wide.reserve(tokens * head.feature_proj.in_features);
        pairs.reserve(tokens * 2 * head.decoder.hidden_size());
    }
};

inline Workspace& workspace_of_thread() {
    static thread_local Workspace workspace;
    return workspace;
}

}  // namespace
}  // namespace mcsd
