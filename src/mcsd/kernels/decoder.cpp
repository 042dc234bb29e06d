// Forwards of decoder layers, decoders and draft heads. `mcsd.cpu.native_decoder` and `mcsd.cpu.native_draft_head` call
// the entries. Every thread of a team calls the functions that take a `Workspace`.

#include "decoder.h"

namespace mcsd {
namespace {

constexpr int64_t CHUNK = 240;  // tokens that go through half a layer together

// Root-mean-square norm (Zhang and Sennrich 2019); a copy if there is no norm. `out` may be `x`.
void rms_norm(const RMSNorm& norm, const float* x, int64_t size, float* out) {
    if (norm.eps < 0) {
        if (out != x) std::memcpy(out, x, size * sizeof(float));
        return;
    }
    Floats squares = set(0);
    for (int64_t i = 0; i < size; i += LANES) {
        const Floats part = load(x + i, lane_mask(size - i));
        squares = fmadd(part, part, squares);
    }
    const float mean = reduce_add(squares) / size;
    const Floats factor = set(1 / __builtin_sqrtf(mean + static_cast<float>(norm.eps)));
    for (int64_t i = 0; i < size; i += LANES) {
        const Mask mask = lane_mask(size - i);
        Floats part = load(x + i, mask) * factor;
        if (norm.weight) part = part * load(norm.weight + i, mask);
        store(out + i, mask, part);
    }
}

// Norms each of some parts of x by itself.
void rms_norm_parts(RMSNorm norm, FloatView x, int64_t parts, int64_t size, float* out) {
    for (int64_t part = 0; part < parts; part++, out += size) {
        copy(x.at(part * size), {out, false}, size);
        rms_norm(norm, out, size, out);
        if (norm.weight) norm.weight += size;
    }
}

// SwiGLU (Shazeer 2020): silu(gate) * up of [gate, up], `size` each.
void swiglu(const float* gate_up, int64_t size, float* out) {
    const Floats one = set(1);
    for (int64_t i = 0; i < size; i += LANES) {
        const Mask mask = lane_mask(size - i);
        const Floats gate = load(gate_up + i, mask);
        const Floats up = load(gate_up + size + i, mask);
        const Floats divisor = one + exp_ps(set(0) - gate);
        store(out + i, mask, gate / divisor * up);
    }
}

// Rotary position embedding (RoPE, Su et al. 2021) of a head; the first half of the sines is negative.
void apply_rope(const float* x, int64_t head_size, FloatView cosines, FloatView sines, FloatView out) {
    const int64_t half = head_size / 2;
    for (int64_t start : {int64_t{0}, half})
        for (int64_t i = 0; i < half; i += LANES) {
            const Mask mask = lane_mask(half - i);
            const Floats other = load(x + half - start + i, mask);
            const Floats own = load(x + start + i, mask);
            const Floats rotated = other * sines.load(start + i, mask);
            out.store(start + i, mask, fmadd(own, cosines.load(start + i, mask), rotated));
        }
}

// Cosines and sines [positions, head_size] with each token's position, or [tokens, head_size] without positions.
struct Rope {
    FloatView cosines, sines;
    const int64_t* positions;
};

// The input of a layer [tokens, qkv_proj.in_features] to queries, keys and values [tokens, (heads + 2 kv_heads)
// head_size], after RoPE.
void qkv_with_rope(
    const PreAttention& layer, FloatView input, const Rope& rope, int64_t tokens, Workspace& workspace, FloatView out) {
    const int64_t in_features = layer.qkv_proj.in_features, out_features = layer.qkv_proj.out_features;
    const int64_t size = layer.head_size;
    float *x = workspace.narrow.data(), *qkv = workspace.wide.data();
#pragma omp for schedule(static) nowait
    for (int64_t token = 0; token < tokens; token++)
        rms_norm_parts(layer.input_norm, input.at(token * in_features), 1, in_features, x + token * in_features);
    gemm(layer.qkv_proj, x, tokens, workspace.activations, {qkv, false}, false);
#pragma omp for schedule(static)
    for (int64_t token = 0; token < tokens; token++) {
        const int64_t angle = (rope.positions ? rope.positions[token] : token) * size;
        for (int64_t head = 0; head < layer.heads + 2 * layer.kv_heads; head++) {
            float* own = qkv + token * out_features + head * size;
            const FloatView to = out.at(token * out_features + head * size);
            if (head >= layer.heads + layer.kv_heads) {
                copy({own, false}, to, size);
                continue;
            }
            rms_norm(head < layer.heads ? layer.q_norm : layer.k_norm, own, size, own);
            apply_rope(own, size, rope.cosines.at(angle), rope.sines.at(angle), to);
        }
    }
}

// Adds the output projection of `attended` [tokens, heads head_size], and then the MLP, to hidden states
// [tokens, hidden_size]. `out` may be `hidden`.
void o_proj_and_mlp(
    const PostAttention& layer, FloatView hidden, FloatView attended, int64_t tokens, Workspace& workspace,
    FloatView out) {
    const int64_t size = layer.o_proj.out_features, heads_size = layer.o_proj.in_features;
    const int64_t inner = layer.down_proj.in_features;
    float *x = workspace.hidden.data(), *wide = workspace.wide.data(), *narrow = workspace.narrow.data();
    QuantizedActivations& activations = workspace.activations;
#pragma omp for schedule(static) nowait
    for (int64_t token = 0; token < tokens; token++) {
        copy(hidden.at(token * size), {x + token * size, false}, size);
        copy(attended.at(token * heads_size), {wide + token * heads_size, false}, heads_size);
    }
    gemm(layer.o_proj, wide, tokens, activations, {x, false}, true);
#pragma omp for schedule(static) nowait
    for (int64_t token = 0; token < tokens; token++)
        rms_norm(layer.norm, x + token * size, size, narrow + token * size);
    gemm(layer.gate_up_proj, narrow, tokens, activations, {wide, false}, false);
#pragma omp for schedule(static) nowait
    for (int64_t token = 0; token < tokens; token++) swiglu(wide + token * 2 * inner, inner, narrow + token * inner);
    gemm(layer.down_proj, narrow, tokens, activations, {x, false}, true);
#pragma omp for schedule(static)
    for (int64_t token = 0; token < tokens; token++) copy({x + token * size, false}, out.at(token * size), size);
}

// The first committed column that a token attends to.
int64_t first_column(const DecoderLayer& layer, int64_t position) {
    const int64_t first = layer.skips_first && position > 0;
    return layer.sliding_window ? std::max(first, position + 1 - layer.sliding_window) : first;
}

// Writes the workspace's keys and values into the KV cache, and the layer's mask of tokens in flight into the
// workspace.
void store_kv_and_mask(
    const DecoderLayer& layer, const AttentionMetadata& metadata, FloatView keys, FloatView values,
    Workspace& workspace) {
    const int64_t heads = layer.pre_attention.heads, kv_heads = layer.pre_attention.kv_heads;
    const int64_t size = layer.pre_attention.head_size, width = layer.pre_attention.qkv_proj.out_features;
    const int64_t length = metadata.length, others = metadata.earlier + length;
    float* qkv = workspace.qkv.data();
    const int64_t* positions = workspace.positions.data();
    uint8_t* mask = workspace.mask.data();
#pragma omp for schedule(static)
    for (int64_t token = 0; token < metadata.sequences * length; token++) {
        const int64_t sequence = token / length, own = token % length;
        const int64_t slot = metadata.lengths[sequence] + metadata.earlier + own;
        for (int64_t head = 0; head < kv_heads; head++) {
            const int64_t index = sequence * metadata.sequence_stride + head * metadata.head_stride + slot * size;
            float* key = qkv + token * width + (heads + head) * size;
            copy({key, false}, keys.at(index), size);
            copy({key + kv_heads * size, false}, values.at(index), size);
        }
        for (int64_t other = 0; other < others; other++) {
            const int64_t distance = positions[token] - position_of(metadata, sequence, other);
            mask[token * others + other] =
                metadata.mask[own * others + other] && (!layer.sliding_window || distance < layer.sliding_window);
        }
        // Nothing is committed: the first token of the text is in flight.
        if (metadata.lengths[sequence] == 0 && first_column(layer, positions[token]) > 0) mask[token * others] = false;
    }
}

// Attention of layer `number`, from the workspace's `qkv` to its `attended`. Keys and values go into the KV cache
// first.
template <bool BF16>
void self_attention(
    const DecoderLayer& layer, int64_t number, const AttentionMetadata& metadata, Workspace& workspace) {
    const int64_t heads = layer.pre_attention.heads, kv_heads = layer.pre_attention.kv_heads;
    const int64_t size = layer.pre_attention.head_size, width = layer.pre_attention.qkv_proj.out_features;
    const int64_t group = heads / kv_heads, length = metadata.length, others = metadata.earlier + length;
    const int64_t offset = number * metadata.layer_stride;
    const FloatView keys = FloatView{metadata.keys, BF16}.at(offset);
    const FloatView values = FloatView{metadata.values, BF16}.at(offset);
    const int64_t* positions = workspace.positions.data();
    float *qkv = workspace.qkv.data(), *attended = workspace.attended.data();
    const uint8_t* mask = workspace.mask.data();
    store_kv_and_mask(layer, metadata, keys, values, workspace);
    // Many queries together, but few enough that every thread gets some.
    const int64_t share = metadata.sequences * kv_heads * group * length / (2 * omp_get_num_threads());
    const int64_t together = std::min(MAX_QUERIES, std::max(QUERY_TILE, round_up(share, QUERY_TILE)));
#pragma omp for schedule(dynamic) collapse(3)
    for (int64_t sequence = 0; sequence < metadata.sequences; sequence++)
        for (int64_t head = 0; head < kv_heads; head++)
            for (int64_t first = 0; first < group * length; first += together) {
                const int64_t count = std::min(together, group * length - first);
                const int64_t index = sequence * metadata.sequence_stride + head * metadata.head_stride;
                const int64_t committed = metadata.lengths[sequence];
                Query queries[MAX_QUERIES];
                for (int64_t q = 0; q < count; q++) {
                    const int64_t token = sequence * length + (first + q) / group;
                    const int64_t query_head = head * group + (first + q) % group;
                    queries[q] = {
                        qkv + token * width + query_head * size,
                        attended + (token * heads + query_head) * size,
                        first_column(layer, positions[token]),
                        committed,
                        mask + token * others,
                        nullptr,
                        0};
                }
                attention<BF16>(
                    queries, count, keys.at(index), values.at(index), committed + others, size,
                    static_cast<float>(layer.scaling));
            }
}

// Runs the workspace's `hidden` through all layers and the last norm, to `out` [tokens, hidden_size] and, in float32,
// the workspace's `narrow`. `input` is what the attention of the first layer reads, `hidden` or something wider. Writes
// the hidden states after each layer to `all_hidden` [layers, tokens, hidden_size], unless its data is null.
void run_layers(
    const Decoder& decoder, FloatView input, const AttentionMetadata& metadata, bool bf16, Workspace& workspace,
    FloatView all_hidden, FloatView out) {
    const int64_t tokens = metadata.sequences * metadata.length, size = decoder.hidden_size();
    float *x = workspace.hidden.data(), *normed = workspace.narrow.data();
    const FloatView hidden{x, false}, qkv{workspace.qkv.data(), false}, attended{workspace.attended.data(), false};
    const Rope rope{{metadata.cosines, bf16}, {metadata.sines, bf16}, workspace.positions.data()};
    for (int64_t i = 0; i < decoder.num_layers; i++) {
        const DecoderLayer& layer = decoder.layers[i];
        qkv_with_rope(layer.pre_attention, i ? hidden : input, rope, tokens, workspace, qkv);
        if (bf16)
            self_attention<true>(layer, i, metadata, workspace);
        else
            self_attention<false>(layer, i, metadata, workspace);
        o_proj_and_mlp(layer.post_attention, hidden, attended, tokens, workspace, hidden);
#pragma omp for schedule(static) nowait
        for (int64_t token = 0; token < tokens; token++) {
            // bf16 hidden states are rounded after a layer, as they are when layers are called one by one.
            for (int64_t k = token * size; bf16 && k < (token + 1) * size; k += LANES) {
                const Mask mask = lane_mask((token + 1) * size - k);
                hidden.store(k, mask, round_to_bf16(hidden.load(k, mask)));
            }
            if (all_hidden.data) copy(hidden.at(token * size), all_hidden.at((i * tokens + token) * size), size);
        }
    }
#pragma omp for schedule(static)
    for (int64_t token = 0; token < tokens; token++) {
        rms_norm(decoder.norm, x + token * size, size, normed + token * size);
        copy({normed + token * size, false}, out.at(token * size), size);
    }
}

// The thread's workspace, made large enough for a decoder or a draft head, with the tokens' positions.
template <typename Model>
Workspace& workspace_for(const Model& model, const AttentionMetadata& metadata) {
    Workspace& workspace = workspace_of_thread();
    workspace.reserve(model, metadata);
    for (int64_t token = 0; token < metadata.sequences * metadata.length; token++)
        workspace.positions.data()[token] =
            position_of(metadata, token / metadata.length, metadata.earlier + token % metadata.length);
    return workspace;
}

}  // namespace
}  // namespace mcsd

using namespace mcsd;

// Tensors that are not described otherwise are in bf16 or, without `bf16`, in float32.
extern "C" {

// Hidden states [tokens, hidden_size] to queries, keys and values [tokens, (heads + 2 kv_heads) head_size], after RoPE
// with cosines and sines [tokens, head_size].
void pre_attention(
    const PreAttention* layer, void* hidden, void* cosines, void* sines, bool bf16, int64_t tokens, void* out,
    int threads) {
    Workspace& workspace = workspace_of_thread();
    workspace.reserve(*layer, std::min(tokens, CHUNK));
    const FloatView from{hidden, bf16}, to{out, bf16}, cosine{cosines, bf16}, sine{sines, bf16};
#pragma omp parallel num_threads(threads)
    for (int64_t first = 0; first < tokens; first += CHUNK) {
        const Rope rope{cosine.at(first * layer->head_size), sine.at(first * layer->head_size), nullptr};
        qkv_with_rope(
            *layer, from.at(first * layer->qkv_proj.in_features), rope, std::min(CHUNK, tokens - first), workspace,
            to.at(first * layer->qkv_proj.out_features));
    }
}

// Hidden states before a layer [tokens, hidden_size] and its attention's output [tokens, heads head_size] to the hidden
// states after it.
void post_attention(
    const PostAttention* layer, void* hidden, void* attended, bool bf16, int64_t tokens, void* out, int threads) {
    Workspace& workspace = workspace_of_thread();
    workspace.reserve(*layer, std::min(tokens, CHUNK));
    const FloatView from{hidden, bf16}, heads{attended, bf16}, to{out, bf16};
    const int64_t size = layer->o_proj.out_features;
#pragma omp parallel num_threads(threads)
    for (int64_t first = 0; first < tokens; first += CHUNK)
        o_proj_and_mlp(
            *layer, from.at(first * size), heads.at(first * layer->o_proj.in_features), std::min(CHUNK, tokens - first),
            workspace, to.at(first * size));
}

// Runs hidden states [tokens, hidden_size] through all layers and the last norm. `all_hidden` [layers, tokens,
// hidden_size] gets the hidden states after each layer; it may be null.
void decoder(
    const Decoder* decoder, void* hidden, bool bf16, const AttentionMetadata* metadata, void* all_hidden, void* out,
    int threads) {
    const int64_t tokens = metadata->sequences * metadata->length, size = decoder->hidden_size();
    const FloatView from{hidden, bf16};
    Workspace& workspace = workspace_for(*decoder, *metadata);
    float* x = workspace.hidden.data();
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
        for (int64_t token = 0; token < tokens; token++)
            copy(from.at(token * size), {x + token * size, false}, size);
        run_layers(*decoder, {x, false}, *metadata, bf16, workspace, {all_hidden, bf16}, {out, bf16});
    }
}

// Runs a draft head, to its hidden states [tokens, hidden_size] and, unless `logits` is null, logits [tokens,
// vocabulary]. `hidden` are features of the target [tokens, features] or, with `own`, hidden states of the head
// [tokens, hidden_size]; `embeddings` are [tokens, hidden_size].
void draft_head(
    const HeadWeights* head, void* hidden, bool own, void* embeddings, bool bf16, const AttentionMetadata* metadata,
    void* out, void* logits, int threads) {
    const int64_t tokens = metadata->sequences * metadata->length, size = head->decoder.hidden_size();
    const int64_t features = head->feature_proj.in_features, parts = head->feature_parts;
    const bool projects_features = !own && head->feature_proj.weight, projects_inputs = head->input_proj.weight;
    const FloatView from{hidden, bf16}, embedded{embeddings, bf16};
    Workspace& workspace = workspace_for(*head, *metadata);
    float *wide = workspace.wide.data(), *x = workspace.hidden.data(), *pairs = workspace.pairs.data();
    float* normed = workspace.narrow.data();
    QuantizedActivations& activations = workspace.activations;
#pragma omp parallel num_threads(threads)
    {
        if (projects_features) {
#pragma omp for schedule(static) nowait
            for (int64_t token = 0; token < tokens; token++)
                rms_norm_parts(
                    head->feature_norm, from.at(token * features), parts, features / parts, wide + token * features);
            gemm(head->feature_proj, wide, tokens, activations, {x, false}, false);
        }
#pragma omp for schedule(static) nowait
        for (int64_t token = 0; token < tokens; token++) {
            float *state = x + token * size, *pair = pairs + 2 * token * size;
            float* normed_state = head->embedding_first ? pair + size : pair;
            float* embedding = head->embedding_first ? pair : pair + size;
            if (!projects_features) copy(from.at(token * size), {state, false}, size);
            rms_norm(head->state_norm, state, size, normed_state);
            rms_norm_parts(head->embedding_norm, embedded.at(token * size), 1, size, embedding);
            if (head->normed_residual) std::memcpy(state, normed_state, size * sizeof(float));
        }
        if (projects_inputs) gemm(head->input_proj, pairs, tokens, activations, {x, false}, false);
        run_layers(
            head->decoder, {projects_inputs ? x : pairs, false}, *metadata, bf16, workspace, {nullptr, bf16},
            {out, bf16});
        if (logits) {
#pragma omp for schedule(static) nowait
            for (int64_t token = 0; token < tokens; token++)
                rms_norm(head->output_norm, normed + token * size, size, normed + token * size);
            gemm(head->lm_head, normed, tokens, activations, {logits, bf16}, false);
        }
    }
}
}
