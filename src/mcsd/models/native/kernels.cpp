// Linear layers, decoder layers and draft heads, for the few tokens of a tree on a CPU with AVX-512 and
// VNNI. A weight is read once, in the order in which it lies in memory, for up to twelve rows: what a forward takes is
// then the time that memory takes. `mcsd.models.native` compiles and calls this; see there for what each struct holds.
//
// Weights come in blocks of 32 outputs, all inputs of a block one behind the other, outputs filled up with zeros:
//     bytes      [outputs / 32][inputs / 4][32][4] unsigned, moved by 128; inputs filled up to a multiple of 16
//     bfloat16   [outputs / 32][inputs][16][2], the pair being outputs i and i + 16 of the block
//     nibbles    [outputs / 32][inputs / 32] groups: in float16 the step and the least of each of 32 outputs, then
//                [8][16][4] bytes: the half bytes of outputs i and i + 16 at four inputs; inputs filled up to whole groups
// What a row gives does not depend on the other rows, to the last bit.

#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

extern "C" {

enum Kind : int64_t { BYTES, FINE_BYTES, BFLOAT16, NIBBLES };

struct Linear {
    const void* weight;
    const float* scale;  // of each output; bytes only
    const float* bias;   // or null
    int64_t inputs, outputs;
    Kind kind;
};

struct Norm {
    const float* weight;  // or null
    double eps;
};

struct Before {
    Norm norm;
    Linear into;         // queries, keys and values
    Norm queries, keys;  // of each head; eps is negative where there are none
    int64_t heads, shared, size;
};

struct Behind {
    Linear out;  // of the attention
    Norm norm;
    Linear into, down;  // gate and value; back
};

struct Layer {
    Before before;
    Behind behind;
    double scaling;
    int64_t window;  // positions that are seen, one's own included; 0 for all
};

// Layers one behind the other, and the norm behind the last.
struct Stack {
    const Layer* layers;
    int64_t count;
    Norm norm;
};

// A draft head: parts of the target's states to one state, this and an embedding to another, layers, logits.
struct Head {
    Linear fuse, join;
    Norm each;  // of the parts of both
    Stack stack;
    Linear output;
};

// Where the tokens of a forward stand, and what they see: rows of `length` tokens each, behind the `before` that each row
// has in flight already.
struct Place {
    void *keys, *values;  // of the first layer and the first row, [layers, rows, shared, slots, size]
    int64_t layer_stride, row_stride, head_stride;  // in numbers
    int64_t rows, before, length;
    const int64_t* lengths;  // of each row: slots, and positions, that are committed
    const int64_t* offsets;  // [before + length], positions behind those
    const bool* sight;       // [length, before + length], which of those in flight are seen
    int64_t positions;       // of which there are no more
    void *cosines, *sines;   // [positions, size]
};
}

namespace {

constexpr int64_t LANES = 16, BLOCK = 32;
constexpr int64_t GROUP = 32, GROUP_SIZE = 4 * BLOCK + GROUP * BLOCK / 2;  // inputs with a step of their own; bytes
constexpr int MOST = 12;              // rows of a tile: all of its sums are in registers
constexpr int64_t TOGETHER = 240;     // rows that go through a half of a layer together
constexpr int ZERO = 128, LARGEST = 127;
constexpr float FINER = 254;          // steps of a state's second byte to one of its first
constexpr int64_t AHEAD = 2048;       // bytes that are asked of memory before they are needed
constexpr float TAKEN_AWAY = -1e30f;  // scores of what may not be seen are below this

int64_t up(int64_t count, int64_t step) { return (count + step - 1) / step * step; }

__mmask16 lanes(int64_t left) { return left >= LANES ? 0xffff : (1u << left) - 1; }

// ---- numbers in float32 or bfloat16 ----

template <bool HALF>
__m512 load_as(const void* data, int64_t at, __mmask16 mask) {
    if (!HALF) return _mm512_maskz_loadu_ps(mask, static_cast<const float*>(data) + at);
    __m256i bits = _mm256_maskz_loadu_epi16(mask, static_cast<const uint16_t*>(data) + at);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

// Rounded to bfloat16: to the nearest, ties to even; what is no number stays none.
__m512 halved(__m512 value) {
    const __m512i bits = _mm512_castps_si512(value);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i up = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __m512i rounded = _mm512_and_si512(up, _mm512_set1_epi32(0xffff0000));
    const __mmask16 none = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
    return _mm512_castsi512_ps(_mm512_mask_set1_epi32(rounded, none, 0x7fc00000));
}

struct Numbers {
    void* data;
    bool half;

    __m512 load(int64_t at, __mmask16 mask) const {
        return half ? load_as<true>(data, at, mask) : load_as<false>(data, at, mask);
    }

    void store(int64_t at, __mmask16 mask, __m512 value) const {
        if (!half) return _mm512_mask_storeu_ps(static_cast<float*>(data) + at, mask, value);
        const __m256i bits = _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_castps_si512(halved(value)), 16));
        _mm256_mask_storeu_epi16(static_cast<uint16_t*>(data) + at, mask, bits);
    }

    Numbers from(int64_t at) const { return {static_cast<char*>(data) + at * (half ? 2 : 4), half}; }
};

void copy(Numbers from, Numbers to, int64_t count) {
    for (int64_t i = 0; i < count; i += LANES) to.store(i, lanes(count - i), from.load(i, lanes(count - i)));
}

// ---- tiles: R rows times one block of weights ----

template <int R>
void byte_tile(const void* weight, const void* states, int64_t inputs, void* out) {
    auto w = static_cast<const uint8_t*>(weight);
    auto x = static_cast<const int8_t*>(states);
    __m512i sums[R][2];
#pragma GCC unroll 12
    for (int r = 0; r < R; r++) sums[r][0] = sums[r][1] = _mm512_setzero_si512();
    for (int64_t k = 0; k < inputs; k += 4, w += 128) {
        __m512i first = _mm512_loadu_si512(w), second = _mm512_loadu_si512(w + 64);
        _mm_prefetch(reinterpret_cast<const char*>(w) + AHEAD, _MM_HINT_T0);
        _mm_prefetch(reinterpret_cast<const char*>(w) + AHEAD + 64, _MM_HINT_T0);
#pragma GCC unroll 12
        for (int r = 0; r < R; r++) {
            int32_t four;
            std::memcpy(&four, x + r * inputs + k, 4);
            __m512i state = _mm512_set1_epi32(four);
            sums[r][0] = _mm512_dpbusd_epi32(sums[r][0], first, state);
            sums[r][1] = _mm512_dpbusd_epi32(sums[r][1], second, state);
        }
    }
#pragma GCC unroll 12
    for (int r = 0; r < R; r++) {
        _mm512_storeu_si512(static_cast<int32_t*>(out) + r * BLOCK, sums[r][0]);
        _mm512_storeu_si512(static_cast<int32_t*>(out) + r * BLOCK + LANES, sums[r][1]);
    }
}

template <int R>
void half_tile(const void* weight, const void* states, int64_t inputs, void* out) {
    auto w = static_cast<const uint16_t*>(weight);
    auto x = static_cast<const float*>(states);
    const __m512i high = _mm512_set1_epi32(0xffff0000);
    __m512 sums[R][2];
#pragma GCC unroll 12
    for (int r = 0; r < R; r++) sums[r][0] = sums[r][1] = _mm512_setzero_ps();
    for (int64_t k = 0; k < inputs; k++, w += BLOCK) {
        __m512i pair = _mm512_loadu_si512(w);
        _mm_prefetch(reinterpret_cast<const char*>(w) + AHEAD, _MM_HINT_T0);
        __m512 first = _mm512_castsi512_ps(_mm512_slli_epi32(pair, 16));
        __m512 second = _mm512_castsi512_ps(_mm512_and_si512(pair, high));
#pragma GCC unroll 12
        for (int r = 0; r < R; r++) {
            __m512 state = _mm512_set1_ps(x[r * inputs + k]);
            sums[r][0] = _mm512_fmadd_ps(first, state, sums[r][0]);
            sums[r][1] = _mm512_fmadd_ps(second, state, sums[r][1]);
        }
    }
#pragma GCC unroll 12
    for (int r = 0; r < R; r++) {
        _mm512_storeu_ps(static_cast<float*>(out) + r * BLOCK, sums[r][0]);
        _mm512_storeu_ps(static_cast<float*>(out) + r * BLOCK + LANES, sums[r][1]);
    }
}

// A row of states is its codes and then, in float, the sum of each group's.
template <int R>
void nibble_tile(const void* weight, const void* states, int64_t inputs, void* out) {
    auto w = static_cast<const uint8_t*>(weight);
    auto x = static_cast<const int8_t*>(states);
    const int64_t stride = inputs + inputs / GROUP * 4;
    const __m512i low = _mm512_set1_epi8(15);
    __m512 totals[R][2];
#pragma GCC unroll 6
    for (int r = 0; r < R; r++) totals[r][0] = totals[r][1] = _mm512_setzero_ps();
    for (int64_t k = 0; k < inputs; k += GROUP, w += GROUP_SIZE) {
        __m512 numbers[4];  // the steps of the outputs, and their least
#pragma GCC unroll 10
        for (int64_t line = 0; line < GROUP_SIZE; line += 64)
            _mm_prefetch(reinterpret_cast<const char*>(w) + AHEAD + line, _MM_HINT_T0);
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++)
            numbers[i] = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(w) + i));
        __m512i sums[R][2];
#pragma GCC unroll 6
        for (int r = 0; r < R; r++) sums[r][0] = sums[r][1] = _mm512_setzero_si512();
#pragma GCC unroll 8
        for (int four = 0; four < GROUP / 4; four++) {
            const __m512i both = _mm512_loadu_si512(w + 4 * BLOCK + 64 * four);
            const __m512i first = _mm512_and_si512(both, low);
            const __m512i second = _mm512_and_si512(_mm512_srli_epi16(both, 4), low);
#pragma GCC unroll 6
            for (int r = 0; r < R; r++) {
                int32_t codes;
                std::memcpy(&codes, x + r * stride + k + 4 * four, 4);
                const __m512i state = _mm512_set1_epi32(codes);
                sums[r][0] = _mm512_dpbusd_epi32(sums[r][0], first, state);
                sums[r][1] = _mm512_dpbusd_epi32(sums[r][1], second, state);
            }
        }
#pragma GCC unroll 6
        for (int r = 0; r < R; r++) {
            float all;
            std::memcpy(&all, x + r * stride + inputs + k / GROUP * 4, 4);
#pragma GCC unroll 2
            for (int half = 0; half < 2; half++) {
                totals[r][half] = _mm512_fmadd_ps(numbers[half], _mm512_cvtepi32_ps(sums[r][half]), totals[r][half]);
                totals[r][half] = _mm512_fmadd_ps(numbers[2 + half], _mm512_set1_ps(all), totals[r][half]);
            }
        }
    }
#pragma GCC unroll 6
    for (int r = 0; r < R; r++) {
        _mm512_storeu_ps(static_cast<float*>(out) + r * BLOCK, totals[r][0]);
        _mm512_storeu_ps(static_cast<float*>(out) + r * BLOCK + LANES, totals[r][1]);
    }
}

typedef void (*Tile)(const void* weight, const void* states, int64_t inputs, void* out);

#define TILES(tile) \
    {nullptr, tile<1>, tile<2>, tile<3>, tile<4>, tile<5>, tile<6>, tile<7>, tile<8>, tile<9>, tile<10>, tile<11>, tile<12>}
const Tile BYTE_TILES[] = TILES(byte_tile), HALF_TILES[] = TILES(half_tile);
const Tile NIBBLE_TILES[] = {
    nullptr, nibble_tile<1>, nibble_tile<2>, nibble_tile<3>, nibble_tile<4>, nibble_tile<5>, nibble_tile<6>};

// How a weight lies in memory, and the states that go with it.
struct Form {
    int64_t inputs;      // filled up
    int64_t block_size;  // bytes of 32 outputs' weights
    int64_t row_size;    // bytes of a row of states
    int together;        // rows of a tile
    int each;            // of them belong to the same states
    const Tile* tiles;

    explicit Form(const Linear& linear) {
        const bool nibbles = linear.kind == NIBBLES, halves = linear.kind == BFLOAT16;
        inputs = halves ? linear.inputs : up(linear.inputs, nibbles ? GROUP : LANES);
        block_size = nibbles ? inputs / GROUP * GROUP_SIZE : BLOCK * inputs * (halves ? 2 : 1);
        row_size = nibbles ? inputs + inputs / GROUP * 4 : inputs * (halves ? 4 : 1);
        together = nibbles ? 6 : MOST;
        each = linear.kind == FINE_BYTES ? 2 : 1;
        tiles = nibbles ? NIBBLE_TILES : halves ? HALF_TILES : BYTE_TILES;
    }
};

// ---- products; every thread of a team calls these alike ----

// Memory that grows and is kept from call to call.
template <typename T>
struct Buffer {
    std::vector<T> kept;
    void fit(int64_t count) {
        if (static_cast<int64_t>(kept.size()) < count) kept.resize(count);
    }
    T* data() { return kept.data(); }
};

// A product's states as bytes: a row of codes for each row of states, or two, the second finer.
struct Codes {
    Buffer<int8_t> codes;
    Buffer<int32_t> sums;  // of a row's codes, times what weights are moved by
    Buffer<float> step;    // of a row's first byte

    void fit(const Linear& linear, int64_t rows) {
        if (linear.kind == BFLOAT16) return;
        const Form form(linear);
        codes.fit(form.each * rows * form.row_size);
        sums.fit(2 * rows);
        step.fit(rows);
    }

    void round(const Linear& linear, const float* x, int64_t row) {
        const Form form(linear);
        const int64_t inputs = linear.inputs, width = form.row_size;
        const int fine = linear.kind == FINE_BYTES;
        __m512 largest = _mm512_set1_ps(1e-30f);
        __mmask16 none = 0;
        for (int64_t k = 0; k < inputs; k += LANES) {
            __m512 part = _mm512_maskz_loadu_ps(lanes(inputs - k), x + k);
            largest = _mm512_max_ps(largest, _mm512_abs_ps(part));
            none |= _mm512_cmp_ps_mask(part, part, _CMP_UNORD_Q);
        }
        const float most = none ? std::numeric_limits<float>::quiet_NaN() : _mm512_reduce_max_ps(largest);
        step.data()[row] = most * (1.0f / LARGEST);
        const __m512 factor = _mm512_set1_ps(LARGEST / most), zero = _mm512_set1_ps(ZERO + 0.5f);
        const __m512 finer = _mm512_set1_ps(FINER), finer_zero = _mm512_set1_ps(ZERO + 0.5f - FINER / 2);
        __m512i total = _mm512_setzero_si512(), finer_total = total;
        int8_t* to = codes.data() + (row << fine) * width;
        for (int64_t k = 0; k < inputs; k += LANES) {
            // Rounded by cutting off, half a step further up; no code is below zero then.
            __m512 steps = _mm512_fmadd_ps(_mm512_maskz_loadu_ps(lanes(inputs - k), x + k), factor, zero);
            __m512i code = _mm512_cvttps_epi32(steps), moved = _mm512_sub_epi32(code, _mm512_set1_epi32(ZERO));
            total = _mm512_add_epi32(total, moved);
            _mm_storeu_si128(reinterpret_cast<__m128i*>(to + k), _mm512_cvtepi32_epi8(moved));
            if (!fine) continue;
            __m512 rest = _mm512_fmadd_ps(_mm512_sub_ps(steps, _mm512_cvtepi32_ps(code)), finer, finer_zero);
            moved = _mm512_sub_epi32(_mm512_cvttps_epi32(rest), _mm512_set1_epi32(ZERO));
            finer_total = _mm512_add_epi32(finer_total, moved);
            _mm_storeu_si128(reinterpret_cast<__m128i*>(to + width + k), _mm512_cvtepi32_epi8(moved));
        }
        if (linear.kind == NIBBLES) {
            for (int64_t k = up(inputs, LANES); k < form.inputs; k++) to[k] = 0;
            for (int64_t k = 0; k < form.inputs; k += GROUP) {
                const __m256i group = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(to + k));
                const float sum = _mm512_reduce_add_epi32(_mm512_add_epi32(
                    _mm512_cvtepi8_epi32(_mm256_castsi256_si128(group)),
                    _mm512_cvtepi8_epi32(_mm256_extracti128_si256(group, 1))));
                std::memcpy(to + form.inputs + k / GROUP * 4, &sum, 4);
            }
            return;
        }
        sums.data()[row << fine] = ZERO * _mm512_reduce_add_epi32(total);
        if (fine) sums.data()[2 * row + 1] = ZERO * _mm512_reduce_add_epi32(finer_total);
    }

    // Sixteen outputs of a row, made of its sums `part` in one block.
    __m512 value(const Linear& linear, const int32_t* part, int64_t row, int64_t output, __mmask16 mask) const {
        if (linear.kind == BFLOAT16) return _mm512_loadu_ps(part);
        if (linear.kind == NIBBLES) return _mm512_mul_ps(_mm512_loadu_ps(part), _mm512_set1_ps(step.kept[row]));
        const bool fine = linear.kind == FINE_BYTES;
        auto exact = [&](int64_t codes_row, const int32_t* sum) {
            return _mm512_cvtepi32_ps(_mm512_sub_epi32(_mm512_loadu_si512(sum), _mm512_set1_epi32(sums.kept[codes_row])));
        };
        __m512 out = exact(row << fine, part);
        if (fine) out = _mm512_fmadd_ps(exact(2 * row + 1, part + BLOCK), _mm512_set1_ps(1 / FINER), out);
        out = _mm512_mul_ps(out, _mm512_maskz_loadu_ps(mask, linear.scale + output));
        return _mm512_mul_ps(out, _mm512_set1_ps(step.kept[row]));
    }
};

// x [rows, inputs] to out [rows, outputs], or onto what is there. Each thread has made the rows of x that a static schedule
// gives it; it need not have waited for the others.
void multiply(const Linear& linear, const float* x, int64_t rows, Codes& codes, Numbers out, bool onto) {
    const Form form(linear);
    const int64_t step = form.together / form.each;
    const bool coded = linear.kind != BFLOAT16;
    const auto* states = coded ? reinterpret_cast<const char*>(codes.codes.data()) : reinterpret_cast<const char*>(x);
    if (coded) {
#pragma omp for schedule(static)
        for (int64_t row = 0; row < rows; row++) codes.round(linear, x + row * linear.inputs, row);
    } else {
#pragma omp barrier
    }
#pragma omp for schedule(dynamic)
    for (int64_t output = 0; output < linear.outputs; output += BLOCK) {
        alignas(64) int32_t part[MOST * BLOCK];
        const char* weight = static_cast<const char*>(linear.weight) + output / BLOCK * form.block_size;
        for (int64_t first = 0; first < rows; first += step) {
            const int64_t now = std::min(step, rows - first);
            form.tiles[now * form.each](weight, states + first * form.each * form.row_size, form.inputs, part);
            for (int64_t row = 0; row < now; row++)
                for (int64_t at = output; at < std::min(output + BLOCK, linear.outputs); at += LANES) {
                    const __mmask16 mask = lanes(linear.outputs - at);
                    const int32_t* sums = part + row * form.each * BLOCK + at - output;
                    const int64_t place = (first + row) * linear.outputs + at;
                    __m512 value = codes.value(linear, sums, first + row, at, mask);
                    if (linear.bias) value = _mm512_add_ps(value, _mm512_maskz_loadu_ps(mask, linear.bias + at));
                    if (onto) value = _mm512_add_ps(value, out.load(place, mask));
                    out.store(place, mask, value);
                }
        }
    }
}

// ---- what stands between products, a row at a time ----

// Root-mean-square norm (Zhang and Sennrich 2019).
void normalize(const Norm& norm, const float* x, int64_t count, float* out) {
    __m512 squares = _mm512_setzero_ps();
    for (int64_t i = 0; i < count; i += LANES) {
        __m512 part = _mm512_maskz_loadu_ps(lanes(count - i), x + i);
        squares = _mm512_fmadd_ps(part, part, squares);
    }
    const float mean = _mm512_reduce_add_ps(squares) / count;
    const __m512 factor = _mm512_set1_ps(1 / __builtin_sqrtf(mean + static_cast<float>(norm.eps)));
    for (int64_t i = 0; i < count; i += LANES) {
        const __mmask16 mask = lanes(count - i);
        __m512 part = _mm512_mul_ps(_mm512_maskz_loadu_ps(mask, x + i), factor);
        if (norm.weight) part = _mm512_mul_ps(part, _mm512_maskz_loadu_ps(mask, norm.weight + i));
        _mm512_mask_storeu_ps(out + i, mask, part);
    }
}

__m512 exponential(__m512 x) {
    x = _mm512_min_ps(_mm512_max_ps(x, _mm512_set1_ps(-87.0f)), _mm512_set1_ps(88.0f));
    const __m512 twos = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 0);
    __m512 rest = _mm512_fnmadd_ps(twos, _mm512_set1_ps(0.693145752f), x);
    rest = _mm512_fnmadd_ps(twos, _mm512_set1_ps(1.42860677e-6f), rest);
    __m512 out = _mm512_set1_ps(1.0f / 720);
    for (float factor : {1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f})
        out = _mm512_fmadd_ps(out, rest, _mm512_set1_ps(factor));
    return _mm512_scalef_ps(out, twos);
}

// SiLU of the first half of a row, times its second half.
void gate(const float* x, int64_t count, float* out) {
    const __m512 one = _mm512_set1_ps(1);
    for (int64_t i = 0; i < count; i += LANES) {
        const __mmask16 mask = lanes(count - i);
        const __m512 gates = _mm512_maskz_loadu_ps(mask, x + i);
        const __m512 below = _mm512_add_ps(one, exponential(_mm512_sub_ps(_mm512_setzero_ps(), gates)));
        const __m512 values = _mm512_maskz_loadu_ps(mask, x + count + i);
        _mm512_mask_storeu_ps(out + i, mask, _mm512_mul_ps(_mm512_div_ps(gates, below), values));
    }
}

// A head turned by its position (Su et al. 2021); the first half of the sines is negative.
void turn(const float* x, int64_t size, Numbers cosines, Numbers sines, Numbers out) {
    const int64_t middle = size / 2;
    for (int64_t start : {int64_t{0}, middle})
        for (int64_t i = 0; i < middle; i += LANES) {
            const __mmask16 mask = lanes(middle - i);
            const __m512 other = _mm512_maskz_loadu_ps(mask, x + middle - start + i);
            const __m512 own = _mm512_maskz_loadu_ps(mask, x + start + i);
            const __m512 turned = _mm512_mul_ps(other, sines.load(start + i, mask));
            out.store(start + i, mask, _mm512_fmadd_ps(own, cosines.load(start + i, mask), turned));
        }
}

// ---- attention ----

constexpr int FEW = 4;  // queries that look at the same keys together, and columns at a time

// What a token sees: columns `from` to `committed`, and of the others those of which the byte is not 0.
struct Sight {
    int64_t from, committed;
    const uint8_t* others;
};

// Some queries that look at the same keys, and where what they see goes.
struct Queries {
    const float* vectors[FEW];
    Sight sights[FEW];
    float *weights[FEW], *out[FEW];
};

// The sums of four vectors.
__m128 sums_of(__m512 a, __m512 b, __m512 c, __m512 d) {
    const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
    const __m512d low = _mm512_unpacklo_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
    const __m512d high = _mm512_unpackhi_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
    const __m512 all = _mm512_add_ps(_mm512_castpd_ps(low), _mm512_castpd_ps(high));
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
    return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

// Scores of Q queries [size] for keys [columns, size], added to what is in their weights.
template <bool HALF, int Q>
void score(const Queries& queries, const void* keys, int64_t columns, int64_t size, float scaling) {
    for (int64_t column = 0; column < columns; column += FEW) {
        int64_t key[FEW];
        for (int j = 0; j < FEW; j++) key[j] = std::min(column + j, columns - 1) * size;
        __m512 sums[Q][FEW];
#pragma GCC unroll 4
        for (int q = 0; q < Q; q++)
#pragma GCC unroll 4
            for (int j = 0; j < FEW; j++) sums[q][j] = _mm512_setzero_ps();
        for (int64_t i = 0; i < size; i += LANES) {
            const __mmask16 some = lanes(size - i);
            __m512 part[Q];
#pragma GCC unroll 4
            for (int q = 0; q < Q; q++) part[q] = _mm512_maskz_loadu_ps(some, queries.vectors[q] + i);
#pragma GCC unroll 4
            for (int j = 0; j < FEW; j++) {
                const __m512 keyed = load_as<HALF>(keys, key[j] + i, some);
#pragma GCC unroll 4
                for (int q = 0; q < Q; q++) sums[q][j] = _mm512_fmadd_ps(part[q], keyed, sums[q][j]);
            }
        }
#pragma GCC unroll 4
        for (int q = 0; q < Q; q++) {
            float* to = queries.weights[q] + column;
            const __m128 found = sums_of(sums[q][0], sums[q][1], sums[q][2], sums[q][3]);
            _mm_storeu_ps(to, _mm_fmadd_ps(found, _mm_set1_ps(scaling), _mm_loadu_ps(to)));
        }
    }
}

// Scores to weights, of which those do not count that are taken away; returns one by their sum, or no number if a score is none.
float soften(float* weights, int64_t columns) {
    const __m512 away = _mm512_set1_ps(TAKEN_AWAY), endless = _mm512_set1_ps(std::numeric_limits<float>::infinity());
    __m512 highest = away, total = _mm512_setzero_ps();
    __mmask16 broken = 0;
    for (int64_t column = 0; column < columns; column += LANES) {
        const __mmask16 there = lanes(columns - column);
        const __m512 score = _mm512_maskz_loadu_ps(there, weights + column);
        broken |= _mm512_mask_cmp_ps_mask(there, score, endless, _CMP_NLT_UQ);  // or no number
        highest = _mm512_mask_max_ps(highest, there, highest, score);
    }
    if (broken) return std::numeric_limits<float>::quiet_NaN();
    const __m512 most = _mm512_set1_ps(_mm512_reduce_max_ps(highest));
    for (int64_t column = 0; column < columns; column += LANES) {
        const __mmask16 there = lanes(columns - column);
        const __m512 score = _mm512_maskz_loadu_ps(there, weights + column);
        const __mmask16 seen = _mm512_mask_cmp_ps_mask(there, score, away, _CMP_NLE_UQ);
        const __m512 weight = _mm512_maskz_mov_ps(seen, exponential(_mm512_sub_ps(score, most)));
        _mm512_mask_storeu_ps(weights + column, there, weight);
        total = _mm512_add_ps(total, weight);
    }
    return 1 / _mm512_reduce_add_ps(total);
}

// The sums [size] of values [columns, size], each times its weight, and all times a factor, for Q queries.
template <bool HALF, int Q>
void weigh(const Queries& queries, const float* factors, const void* values, int64_t columns, int64_t size) {
    for (int64_t i = 0; i < size; i += FEW * LANES) {
        __mmask16 some[FEW];
        __m512 sums[Q][FEW];
#pragma GCC unroll 4
        for (int j = 0; j < FEW; j++) some[j] = lanes(std::max<int64_t>(0, size - i - j * LANES));
#pragma GCC unroll 4
        for (int q = 0; q < Q; q++)
#pragma GCC unroll 4
            for (int j = 0; j < FEW; j++) sums[q][j] = _mm512_setzero_ps();
        for (int64_t column = 0; column < columns; column++) {
            bool seen = false;
            for (int q = 0; q < Q; q++) seen |= queries.weights[q][column] != 0;
            if (!seen) continue;  // What nobody may see may be no number either.
            __m512 value[FEW];
#pragma GCC unroll 4
            for (int j = 0; j < FEW; j++) value[j] = load_as<HALF>(values, column * size + i + j * LANES, some[j]);
#pragma GCC unroll 4
            for (int q = 0; q < Q; q++) {
                const __m512 weight = _mm512_set1_ps(queries.weights[q][column]);
#pragma GCC unroll 4
                for (int j = 0; j < FEW; j++) sums[q][j] = _mm512_fmadd_ps(weight, value[j], sums[q][j]);
            }
        }
#pragma GCC unroll 4
        for (int q = 0; q < Q; q++)
#pragma GCC unroll 4
            for (int j = 0; j < FEW; j++)
                _mm512_mask_storeu_ps(
                    queries.out[q] + i + j * LANES, some[j], _mm512_mul_ps(sums[q][j], _mm512_set1_ps(factors[q])));
    }
}

// What Q queries see of keys and values [columns, size].
template <bool HALF, int Q>
void attend(Queries queries, const void* keys, const void* values, int64_t columns, int64_t size, float scaling) {
    static thread_local Buffer<float> buffer;
    const int64_t room = up(columns, FEW);
    buffer.fit(Q * room);
    float factors[Q];
    for (int q = 0; q < Q; q++) {
        const Sight& sight = queries.sights[q];
        float* weights = queries.weights[q] = buffer.data() + q * room;
        for (int64_t i = 0; i < columns; i++) {
            const bool seen = i < sight.committed ? i >= sight.from : sight.others[i - sight.committed];
            weights[i] = seen ? 0 : std::numeric_limits<float>::lowest();
        }
    }
    score<HALF, Q>(queries, keys, columns, size, scaling);
    for (int q = 0; q < Q; q++) factors[q] = soften(queries.weights[q], columns);
    weigh<HALF, Q>(queries, factors, values, columns, size);
}

typedef void (*Attend)(Queries, const void* keys, const void* values, int64_t columns, int64_t size, float scaling);
const Attend ATTEND[2][FEW + 1] = {
    {nullptr, attend<false, 1>, attend<false, 2>, attend<false, 3>, attend<false, 4>},
    {nullptr, attend<true, 1>, attend<true, 2>, attend<true, 3>, attend<true, 4>},
};

// Where a token in flight stands. A tree may hang over the end of the context; what stands there is never emitted.
int64_t place_of(const Place& place, int64_t row, int64_t token) {
    return std::min(place.lengths[row] + place.offsets[token], place.positions - 1);
}

// ---- parts of a layer; every thread of a team calls these alike ----

// Room for what lies between products, of the thread that calls the kernels.
struct Room {
    Codes codes;
    Buffer<float> sum, wide, narrow, turned, seen, pairs;
    Buffer<int64_t> positions;  // of tokens
    Buffer<uint8_t> sight;      // [tokens, before + length], of a layer

    void fit(const Before& layer, int64_t rows) {
        codes.fit(layer.into, rows);
        narrow.fit(rows * layer.into.inputs);
        wide.fit(rows * layer.into.outputs);
    }

    void fit(const Behind& layer, int64_t rows) {
        for (const Linear* linear : {&layer.out, &layer.into, &layer.down}) codes.fit(*linear, rows);
        sum.fit(rows * layer.out.outputs);
        wide.fit(rows * std::max(layer.into.outputs, layer.out.inputs));
        narrow.fit(rows * std::max(layer.down.inputs, layer.out.outputs));
    }

    void fit(const Stack& stack, const Place& place) {
        const int64_t rows = place.rows * place.length;
        positions.fit(rows);
        sight.fit(rows * (place.before + place.length));
        for (int64_t token = 0; token < rows; token++)
            positions.data()[token] = place_of(place, token / place.length, place.before + token % place.length);
        for (int64_t i = 0; i < stack.count; i++) {
            const Before& before = stack.layers[i].before;
            fit(before, rows);
            fit(stack.layers[i].behind, rows);
            turned.fit(rows * before.into.outputs);
            seen.fit(rows * before.heads * before.size);
        }
    }

    void fit(const Head& head, const Place& place) {
        const int64_t rows = place.rows * place.length;
        for (const Linear* linear : {&head.fuse, &head.join, &head.output}) codes.fit(*linear, rows);
        fit(head.stack, place);
        wide.fit(rows * head.fuse.inputs);
        pairs.fit(rows * head.join.inputs);
    }
};

Room& of_this_thread() {
    static thread_local Room room;
    return room;
}

// Cosines and sines [positions, size], and the position of each token; or one a token.
struct Angles {
    Numbers cosines, sines;
    const int64_t* positions;
};

// Queries, keys and values [rows, (heads + 2 shared) size], turned.
void heads_of(const Before& layer, Numbers states, const Angles& angles, int64_t rows, Room& room, Numbers out) {
    const int64_t inputs = layer.into.inputs, outputs = layer.into.outputs, size = layer.size;
    float *x = room.narrow.data(), *all = room.wide.data();
#pragma omp for schedule(static) nowait
    for (int64_t row = 0; row < rows; row++) {
        copy(states.from(row * inputs), {x + row * inputs, false}, inputs);
        normalize(layer.norm, x + row * inputs, inputs, x + row * inputs);
    }
    multiply(layer.into, x, rows, room.codes, {all, false}, false);
#pragma omp for schedule(static)
    for (int64_t row = 0; row < rows; row++) {
        const int64_t angle = (angles.positions ? angles.positions[row] : row) * size;
        for (int64_t head = 0; head < layer.heads + 2 * layer.shared; head++) {
            float* own = all + row * outputs + head * size;
            const Numbers to = out.from(row * outputs + head * size);
            if (head >= layer.heads + layer.shared) {
                copy({own, false}, to, size);
                continue;
            }
            const Norm& norm = head < layer.heads ? layer.queries : layer.keys;
            if (norm.eps >= 0) normalize(norm, own, size, own);
            turn(own, size, angles.cosines.from(angle), angles.sines.from(angle), to);
        }
    }
}

// The layer's output [rows, outputs], of its states and of what its attention has seen [rows, inputs of layer.out].
void rest_of(const Behind& layer, Numbers states, Numbers seen, int64_t rows, Room& room, Numbers out) {
    const int64_t size = layer.out.outputs, attended = layer.out.inputs, inner = layer.down.inputs;
    float *x = room.sum.data(), *wide = room.wide.data(), *narrow = room.narrow.data();
#pragma omp for schedule(static) nowait
    for (int64_t row = 0; row < rows; row++) {
        copy(states.from(row * size), {x + row * size, false}, size);
        copy(seen.from(row * attended), {wide + row * attended, false}, attended);
    }
    multiply(layer.out, wide, rows, room.codes, {x, false}, true);
#pragma omp for schedule(static) nowait
    for (int64_t row = 0; row < rows; row++) normalize(layer.norm, x + row * size, size, narrow + row * size);
    multiply(layer.into, narrow, rows, room.codes, {wide, false}, false);
#pragma omp for schedule(static) nowait
    for (int64_t row = 0; row < rows; row++) gate(wide + row * 2 * inner, inner, narrow + row * inner);
    multiply(layer.down, narrow, rows, room.codes, {x, false}, true);
#pragma omp for schedule(static)
    for (int64_t row = 0; row < rows; row++) copy({x + row * size, false}, out.from(row * size), size);
}

// What a layer's queries see. Queries, keys and values [tokens, (heads + 2 shared) size] are turned; keys and values go into
// the cache.
template <bool HALF>
void see(const Layer& layer, int64_t number, const Place& place, Room& room) {
    const Before& before = layer.before;
    const int64_t tokens = place.rows * place.length, heads = before.heads, shared = before.shared, size = before.size;
    const int64_t each = heads / shared, width = before.into.outputs, start = number * place.layer_stride;
    const int64_t known = place.before + place.length;
    const Numbers keys = Numbers{place.keys, HALF}.from(start), values = Numbers{place.values, HALF}.from(start);
    const int64_t* positions = room.positions.data();
    float *turned = room.turned.data(), *seen = room.seen.data();
    uint8_t* sight = room.sight.data();
#pragma omp for schedule(static)
    for (int64_t token = 0; token < tokens; token++) {
        const int64_t row = token / place.length, own = token % place.length;
        for (int64_t head = 0; head < shared; head++) {
            const int64_t slot = place.lengths[row] + place.before + own;
            const int64_t at = row * place.row_stride + head * place.head_stride + slot * size;
            float* key = turned + token * width + (heads + head) * size;
            copy({key, false}, keys.from(at), size);
            copy({key + shared * size, false}, values.from(at), size);
        }
        for (int64_t other = 0; other < known; other++) {
            const int64_t back = positions[token] - place_of(place, row, other);
            sight[token * known + other] = place.sight[own * known + other] && (!layer.window || back < layer.window);
        }
    }
#pragma omp for schedule(dynamic) collapse(3)
    for (int64_t row = 0; row < place.rows; row++)
        for (int64_t head = 0; head < shared; head++)
            for (int64_t first = 0; first < each * place.length; first += FEW) {
                const int64_t now = std::min<int64_t>(FEW, each * place.length - first);
                const int64_t at = row * place.row_stride + head * place.head_stride, committed = place.lengths[row];
                Queries queries;
                for (int64_t q = 0; q < now; q++) {
                    const int64_t token = row * place.length + (first + q) / each;
                    const int64_t query = head * each + (first + q) % each;
                    const int64_t from = layer.window ? positions[token] + 1 - layer.window : 0;
                    queries.vectors[q] = turned + token * width + query * size;
                    queries.sights[q] = {from, committed, sight + token * known};
                    queries.out[q] = seen + (token * heads + query) * size;
                }
                ATTEND[HALF][now](
                    queries, keys.from(at).data, values.from(at).data, committed + known, size,
                    static_cast<float>(layer.scaling));
            }
}

// The normed states [tokens, width] behind the last layer, of those in room.sum. Where it is given, `every` gets what each
// layer gives, [layers, tokens, width].
void run(const Stack& stack, const Place& place, bool half, Room& room, Numbers every, Numbers out) {
    const int64_t tokens = place.rows * place.length, width = stack.layers[0].before.into.inputs;
    float *x = room.sum.data(), *normed = room.narrow.data();
    const Numbers states{x, false}, turned{room.turned.data(), false}, seen{room.seen.data(), false};
    const Angles angles{{place.cosines, half}, {place.sines, half}, room.positions.data()};
    for (int64_t i = 0; i < stack.count; i++) {
        heads_of(stack.layers[i].before, states, angles, tokens, room, turned);
        half ? see<true>(stack.layers[i], i, place, room) : see<false>(stack.layers[i], i, place, room);
        rest_of(stack.layers[i].behind, states, seen, tokens, room, states);
#pragma omp for schedule(static) nowait
        for (int64_t row = 0; row < tokens; row++) {
            // A layer's states are as narrow as those of a layer that is called by itself.
            for (int64_t at = row * width; half && at < (row + 1) * width; at += LANES) {
                const __mmask16 mask = lanes((row + 1) * width - at);
                states.store(at, mask, halved(states.load(at, mask)));
            }
            if (every.data) copy(states.from(row * width), every.from((i * tokens + row) * width), width);
        }
    }
#pragma omp for schedule(static)
    for (int64_t row = 0; row < tokens; row++) {
        normalize(stack.norm, x + row * width, width, normed + row * width);
        copy({normed + row * width, false}, out.from(row * width), width);
    }
}

// Parts of the same size, one behind the other, each normed.
void normalize_each(const Norm& norm, Numbers x, int64_t parts, int64_t size, float* out) {
    for (int64_t part = 0; part < parts; part++) {
        float* own = out + part * size;
        copy(x.from(part * size), {own, false}, size);
        normalize(norm, own, size, own);
    }
}

}  // namespace

extern "C" {

// states [rows, inputs] to out [rows, outputs]; both in float32, or both in bfloat16 (half).
void product(const Linear* linear, void* states, bool half, int64_t rows, void* out, int threads) {
    const int64_t inputs = linear->inputs, most = std::min(rows, TOGETHER);
    const Numbers from{states, half}, to{out, half};
    Room& room = of_this_thread();
    room.codes.fit(*linear, most);
    room.narrow.fit(most * inputs);
    float* x = room.narrow.data();
#pragma omp parallel num_threads(threads)
    for (int64_t first = 0; first < rows; first += TOGETHER) {
        const int64_t now = std::min(TOGETHER, rows - first);
#pragma omp for schedule(static) nowait
        for (int64_t row = 0; row < now; row++)
            copy(from.from((first + row) * inputs), {x + row * inputs, false}, inputs);
        multiply(*linear, x, now, room.codes, to.from(first * linear->outputs), false);
    }
}

// Queries, keys and values [rows, (heads + 2 shared) size] of a layer's states [rows, inputs], turned by cosines and sines
// [rows, size].
void before(const Before* layer, void* states, void* cosines, void* sines, bool half, int64_t rows, void* out, int threads) {
    Room& room = of_this_thread();
    room.fit(*layer, std::min(rows, TOGETHER));
    const Numbers from{states, half}, to{out, half}, cosine{cosines, half}, sine{sines, half};
#pragma omp parallel num_threads(threads)
    for (int64_t first = 0; first < rows; first += TOGETHER)
        heads_of(
            *layer, from.from(first * layer->into.inputs),
            {cosine.from(first * layer->size), sine.from(first * layer->size), nullptr}, std::min(TOGETHER, rows - first),
            room, to.from(first * layer->into.outputs));
}

// A layer's output [rows, outputs], of its states and of what its attention has seen [rows, inputs of layer->out].
void behind(const Behind* layer, void* states, void* seen, bool half, int64_t rows, void* out, int threads) {
    Room& room = of_this_thread();
    room.fit(*layer, std::min(rows, TOGETHER));
    const Numbers from{states, half}, attention{seen, half}, to{out, half};
    const int64_t size = layer->out.outputs;
#pragma omp parallel num_threads(threads)
    for (int64_t first = 0; first < rows; first += TOGETHER)
        rest_of(
            *layer, from.from(first * size), attention.from(first * layer->out.inputs), std::min(TOGETHER, rows - first),
            room, to.from(first * size));
}

// States [tokens, width] through all layers, see `run`.
void stack(const Stack* stack, void* states, bool half, const Place* place, void* every, void* out, int threads) {
    const int64_t tokens = place->rows * place->length, width = stack->layers[0].before.into.inputs;
    const Numbers from{states, half};
    Room& room = of_this_thread();
    room.fit(*stack, *place);
    float* x = room.sum.data();
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
        for (int64_t row = 0; row < tokens; row++)
            copy(from.from(row * width), {x + row * width, false}, width);
        run(*stack, *place, half, room, {every, half}, {out, half});
    }
}

// A head's states [tokens, width] and, where they are wanted, logits [tokens, outputs]. What it reads are states of the
// target [tokens, parts * width] or its own [tokens, width], and embeddings [tokens, width].
void head(
    const Head* head, void* states, bool own, void* embeddings, bool half, const Place* place, void* out, void* logits,
    int threads) {
    const int64_t tokens = place->rows * place->length, width = head->join.outputs;
    const int64_t parts = head->fuse.inputs / width;
    const Numbers from{states, half}, embedded{embeddings, half};
    Room& room = of_this_thread();
    room.fit(*head, *place);
    float *wide = room.wide.data(), *x = room.sum.data(), *pairs = room.pairs.data();
#pragma omp parallel num_threads(threads)
    {
        if (!own) {
#pragma omp for schedule(static) nowait
            for (int64_t row = 0; row < tokens; row++)
                normalize_each(head->each, from.from(row * parts * width), parts, width, wide + row * parts * width);
            multiply(head->fuse, wide, tokens, room.codes, {x, false}, false);
        }
#pragma omp for schedule(static) nowait
        for (int64_t row = 0; row < tokens; row++) {
            const Numbers state = own ? from.from(row * width) : Numbers{x + row * width, false};
            normalize_each(head->each, state, 1, width, pairs + 2 * row * width);
            normalize_each(head->each, embedded.from(row * width), 1, width, pairs + (2 * row + 1) * width);
        }
        multiply(head->join, pairs, tokens, room.codes, {x, false}, false);
        run(head->stack, *place, half, room, {nullptr, half}, {out, half});
        if (logits) multiply(head->output, room.narrow.data(), tokens, room.codes, {logits, half}, false);
    }
}
}
