// Linear layers, decoder layers and draft heads, for the few tokens of a tree on a CPU with AVX-512 and
// VNNI. A weight is read once, in the order in which it lies in memory: what a forward takes is then the time that memory
// takes. `mcsd.models.native` calls this.
//
// Weights come in blocks of 32 outputs, all inputs of a block one behind the other, outputs filled up with zeros:
//     bytes      [outputs / 32][inputs / 4][32][4] unsigned, moved by 128; inputs filled up to a multiple of 16
//     shorts     [outputs / 32][inputs / 128] stretches, the last shorter: steps, bfloat16 [16][2], the pair being
//                outputs i and i + 16 of the block; codes [64][32][2]; inputs filled up to a multiple of 16
//     nibbles    [outputs / 32][inputs / 32] groups: in float16 the step and the least of each of 32 outputs, then
//                [8][16][4] bytes: the half bytes of outputs i and i + 16 at four inputs; inputs filled up to whole groups
// What a row gives does not depend on the other rows, to the last bit.

#include "numbers.h"

extern "C" {

enum Kind : int64_t { BYTES, FINE_BYTES, SHORTS, NIBBLES };

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

constexpr int64_t BLOCK = 32;
constexpr int64_t GROUP = 32, GROUP_SIZE = 4 * BLOCK + GROUP * BLOCK / 2;  // inputs with a step of their own; bytes
constexpr int64_t STRETCH = 128, STEPS = 2 * BLOCK;  // inputs of shorts with a step of their own; bytes of their steps
constexpr int64_t LONG_STRETCH = 256;                // inputs of bytes that are as much memory
constexpr int64_t PAIR_STRIDE = 4 * BLOCK;           // bytes of two inputs' shorts for a block
constexpr int MOST = 12;              // rows of a tile: all of its sums are in registers
constexpr int64_t SHARING = 4 * MOST;  // rows that share a stretch of weights, while the processor's nearest cache has it
constexpr int64_t TOGETHER = 240;     // rows that go through a half of a layer together
constexpr int ZERO = 128, LARGEST = 127;
// Codes of a stretch of shorts: a state's largest, and the most that a weight's may add up to; products fit into 32 bits.
constexpr int LARGEST_SHORT = 16383, MOST_SHORTS = 131000;
constexpr float FINER = 254;          // steps of a state's second byte to one of its first
constexpr int64_t AHEAD = 4096;       // bytes that are asked of memory before they are needed
constexpr float TAKEN_AWAY = -1e30f;  // scores of what may not be seen are below this

int64_t up(int64_t count, int64_t step) { return (count + step - 1) / step * step; }

void copy(Numbers from, Numbers to, int64_t count) {
    for (int64_t i = 0; i < count; i += LANES) to.store(i, lanes(count - i), from.load(i, lanes(count - i)));
}

// ---- tiles: R rows times a stretch of a block of weights ----

struct Stretch {
    const void* weight;
    const void* states;    // of the first row, from its first input on
    int64_t size;          // bytes of a row of states
    int64_t inputs, from, to;
    void* sums;            // [R][32] integers or, where the weights have several steps, float; what is summed is added
    const char* next;      // what is to be asked of memory meanwhile: 64 bytes, and 64 behind `step - 64`, each time
    int64_t step;          // further each time
};

// GCC (12) copies the sum for the intrinsics of these, which takes as long as they themselves.
__m512i add_products_of_bytes(__m512i sum, __m512i unsigned_bytes, __m512i bytes) {
    asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(unsigned_bytes), "v"(bytes));
    return sum;
}

__m512i add_products_of_shorts(__m512i sum, __m512i first, __m512i second) {
    asm("vpdpwssd %2, %1, %0" : "+v"(sum) : "v"(first), "v"(second));
    return sum;
}

void ask(const char*& next, int64_t step) {
    _mm_prefetch(next, _MM_HINT_T0);
    _mm_prefetch(next + step - 64, _MM_HINT_T0);
    next += step;
}

typedef __m512i Add(__m512i sum, __m512i weights, __m512i states);

// Lines of weights, 128 bytes each, times four bytes of each row's states, onto sums that stay in registers.
template <Add ADD, int R>
[[gnu::always_inline]] inline void add_lines(
    const Stretch& stretch, const char* w, const char* x, int64_t lines, __m512i (&sums)[R][2]) {
    const char* next = stretch.next;
    for (; lines > 0; lines--, w += 128, x += 4) {
        const __m512i first = _mm512_loadu_si512(w), second = _mm512_loadu_si512(w + 64);
        ask(next, stretch.step);
#pragma GCC unroll 12
        for (int r = 0; r < R; r++) {
            int32_t four;
            std::memcpy(&four, x + r * stretch.size, 4);
            const __m512i state = _mm512_set1_epi32(four);
            sums[r][0] = ADD(sums[r][0], first, state);
            sums[r][1] = ADD(sums[r][1], second, state);
        }
    }
}

template <int R>
void byte_tile(const Stretch& stretch) {
    auto w = static_cast<const char*>(stretch.weight), x = static_cast<const char*>(stretch.states) + stretch.from;
    auto to = static_cast<int32_t*>(stretch.sums);
    __m512i sums[R][2];
#pragma GCC unroll 12
    for (int r = 0; r < R; r++)
        for (int half = 0; half < 2; half++) sums[r][half] = _mm512_loadu_si512(to + r * BLOCK + half * LANES);
    add_lines<add_products_of_bytes>(stretch, w, x, (stretch.to - stretch.from) / 4, sums);
#pragma GCC unroll 12
    for (int r = 0; r < R; r++)
        for (int half = 0; half < 2; half++) _mm512_storeu_si512(to + r * BLOCK + half * LANES, sums[r][half]);
}

// A row of states is its codes and then, in float, the step of each stretch.
template <int R>
void short_tile(const Stretch& stretch) {
    auto w = static_cast<const char*>(stretch.weight), x = static_cast<const char*>(stretch.states);
    auto to = static_cast<float*>(stretch.sums);
    __m512i sums[R][2];
#pragma GCC unroll 12
    for (int r = 0; r < R; r++) sums[r][0] = sums[r][1] = _mm512_setzero_si512();
    add_lines<add_products_of_shorts>(stretch, w + STEPS, x + 2 * stretch.from, (stretch.to - stretch.from) / 2, sums);
    __m512 steps[2];
    parted(_mm512_loadu_si512(w), steps[0], steps[1]);
    auto states = x + 2 * stretch.inputs + stretch.from / STRETCH * 4;
#pragma GCC unroll 12
    for (int r = 0; r < R; r++, to += BLOCK) {
        float step;
        std::memcpy(&step, states + r * stretch.size, 4);
        for (int half = 0; half < 2; half++) {
            const __m512 each = _mm512_mul_ps(steps[half], _mm512_set1_ps(step));
            const __m512 sum = _mm512_cvtepi32_ps(sums[r][half]), before = _mm512_loadu_ps(to + half * LANES);
            _mm512_storeu_ps(to + half * LANES, _mm512_fmadd_ps(each, sum, before));
        }
    }
}

// A row of states is its codes and then, in float, the sum of each group's. A stretch is all inputs.
template <int R>
void nibble_tile(const Stretch& stretch) {
    auto w = static_cast<const uint8_t*>(stretch.weight);
    auto x = static_cast<const int8_t*>(stretch.states);
    auto to = static_cast<float*>(stretch.sums);
    const __m512i low = _mm512_set1_epi8(15);
    __m512 totals[R][2];
#pragma GCC unroll 6
    for (int r = 0; r < R; r++)
        for (int half = 0; half < 2; half++) totals[r][half] = _mm512_loadu_ps(to + r * BLOCK + half * LANES);
    for (int64_t k = 0; k < stretch.inputs; k += GROUP, w += GROUP_SIZE) {
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
                std::memcpy(&codes, x + r * stretch.size + k + 4 * four, 4);
                const __m512i state = _mm512_set1_epi32(codes);
                sums[r][0] = add_products_of_bytes(sums[r][0], first, state);
                sums[r][1] = add_products_of_bytes(sums[r][1], second, state);
            }
        }
#pragma GCC unroll 6
        for (int r = 0; r < R; r++) {
            float all;
            std::memcpy(&all, x + r * stretch.size + stretch.inputs + k / GROUP * 4, 4);
#pragma GCC unroll 2
            for (int half = 0; half < 2; half++) {
                totals[r][half] = _mm512_fmadd_ps(numbers[half], _mm512_cvtepi32_ps(sums[r][half]), totals[r][half]);
                totals[r][half] = _mm512_fmadd_ps(numbers[2 + half], _mm512_set1_ps(all), totals[r][half]);
            }
        }
    }
#pragma GCC unroll 6
    for (int r = 0; r < R; r++)
        for (int half = 0; half < 2; half++) _mm512_storeu_ps(to + r * BLOCK + half * LANES, totals[r][half]);
}

typedef void (*Tile)(const Stretch&);

#define TILES(tile) \
    {nullptr, tile<1>, tile<2>, tile<3>, tile<4>, tile<5>, tile<6>, tile<7>, tile<8>, tile<9>, tile<10>, tile<11>, tile<12>}
const Tile BYTE_TILES[] = TILES(byte_tile), SHORT_TILES[] = TILES(short_tile);
const Tile NIBBLE_TILES[] = {
    nullptr, nibble_tile<1>, nibble_tile<2>, nibble_tile<3>, nibble_tile<4>, nibble_tile<5>, nibble_tile<6>};

// How a weight lies in memory, and the states that go with it.
struct Form {
    int64_t inputs;        // filled up
    int64_t alone;         // inputs of a stretch for a tile that shares no weights
    int64_t stretch;       // inputs of a stretch for tiles that do
    int64_t stretch_size;  // bytes of their weights for 32 outputs
    int64_t block_size;    // bytes of 32 outputs' weights
    int64_t row_size;      // bytes of a row of states
    int most;              // rows of a tile
    int each;              // rows of the same states
    const Tile* tiles;

    explicit Form(const Linear& linear) : inputs(up(linear.inputs, LANES)), most(MOST), each(1) {
        if (linear.kind == SHORTS) {
            const int64_t stretches = up(inputs, STRETCH) / STRETCH;
            alone = stretch = STRETCH;
            stretch_size = STEPS + STRETCH * BLOCK * 2;
            block_size = stretches * STEPS + inputs * BLOCK * 2;
            row_size = 2 * inputs + 4 * stretches;
            tiles = SHORT_TILES;
        } else if (linear.kind == NIBBLES) {
            inputs = alone = stretch = up(linear.inputs, GROUP);
            stretch_size = block_size = inputs / GROUP * GROUP_SIZE;
            row_size = inputs + inputs / GROUP * 4;
            most = MOST / 2;
            tiles = NIBBLE_TILES;
        } else {
            alone = inputs;
            stretch = LONG_STRETCH;
            stretch_size = LONG_STRETCH * BLOCK;
            block_size = BLOCK * inputs;
            row_size = inputs;
            each = linear.kind == FINE_BYTES ? 2 : 1;
            tiles = BYTE_TILES;
        }
    }
};

// Rows of states times one block of weights, to sums [rows][32].
void multiply_block(const Form& form, const char* weight, const char* states, int64_t rows, void* sums) {
    std::memset(sums, 0, rows * BLOCK * 4);
    const int64_t tiles = (rows + form.most - 1) / form.most, most = (rows + tiles - 1) / tiles;
    const int64_t stretch = tiles == 1 ? form.alone : form.stretch;
    const char* end = weight + form.block_size;
    for (int64_t from = 0; from < form.inputs; from += stretch, weight += form.stretch_size) {
        const int64_t to = std::min(from + stretch, form.inputs);
        for (int64_t first = 0; first < rows; first += most) {
            // One tile asks for all that comes next; of several the first and the second for half of the next stretch.
            const int64_t tile = first / most, step = tiles == 1 ? 128 : tile < 2 ? 64 : 0;
            const char* behind = std::min(weight + form.stretch_size, end);
            const char* next = tiles == 1 ? weight + AHEAD : tile ? behind + form.stretch_size / 2 : behind;
            form.tiles[std::min(most, rows - first)](
                {weight, states + first * form.row_size, form.row_size, form.inputs, from, to,
                 static_cast<float*>(sums) + first * BLOCK, next, step});
        }
    }
}

// ---- products; every thread of a team calls these alike ----

// The largest of some numbers, or at least what has steps that are numbers; no number if one is none.
float largest(const float* x, int64_t count) {
    __m512 most = _mm512_set1_ps(1e-30f);
    __mmask16 none = 0;
    for (int64_t k = 0; k < count; k += LANES) {
        const __m512 part = _mm512_maskz_loadu_ps(lanes(count - k), x + k);
        most = _mm512_max_ps(most, _mm512_abs_ps(part));
        none |= _mm512_cmp_ps_mask(part, part, _CMP_UNORD_Q);
    }
    return none ? std::numeric_limits<float>::quiet_NaN() : _mm512_reduce_max_ps(most);
}

// A product's states as integers: a row of codes for each row of states, or two, the second finer.
struct Codes {
    Buffer<int8_t> codes;
    Buffer<int32_t> sums;  // of a row's codes, times what weights are moved by
    Buffer<float> step;    // of a row's first byte; of bytes and nibbles

    void fit(const Linear& linear, int64_t rows) {
        const Form form(linear);
        codes.fit(form.each * rows * form.row_size);
        sums.fit(2 * rows);
        step.fit(rows);
    }

    void round(const Linear& linear, const float* x, int64_t row) {
        const Form form(linear);
        if (linear.kind == SHORTS) return round_to_shorts(form, x, linear.inputs, row);
        const int64_t inputs = linear.inputs, width = form.row_size;
        const int fine = linear.kind == FINE_BYTES;
        const float most = largest(x, inputs);
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

    void round_to_shorts(const Form& form, const float* x, int64_t inputs, int64_t row) {
        auto to = reinterpret_cast<int16_t*>(codes.data() + row * form.row_size);
        for (int64_t from = 0; from < inputs; from += STRETCH) {
            const int64_t end = std::min(from + STRETCH, inputs);
            const float most = largest(x + from, end - from), step = most * (1.0f / LARGEST_SHORT);
            const __m512 factor = _mm512_set1_ps(LARGEST_SHORT / most);
            for (int64_t k = from; k < end; k += LANES) {
                const __m512 steps = _mm512_mul_ps(_mm512_maskz_loadu_ps(lanes(end - k), x + k), factor);
                const __m256i code = _mm512_cvtsepi32_epi16(_mm512_cvtps_epi32(steps));
                _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + k), code);
            }
            std::memcpy(to + form.inputs + from / STRETCH * 2, &step, 4);
        }
    }

    // Sixteen outputs of a row, made of its sums `part` in one block.
    __m512 value(const Linear& linear, const int32_t* part, int64_t row, int64_t output, __mmask16 mask) const {
        if (linear.kind == SHORTS) return _mm512_loadu_ps(part);
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
    const int64_t most = (rows * form.each > SHARING ? form.most : SHARING) / form.each;
#pragma omp for schedule(static)
    for (int64_t row = 0; row < rows; row++) codes.round(linear, x + row * linear.inputs, row);
#pragma omp for schedule(guided)
    for (int64_t output = 0; output < linear.outputs; output += BLOCK) {
        alignas(64) int32_t part[SHARING * BLOCK];
        const char* weight = static_cast<const char*>(linear.weight) + output / BLOCK * form.block_size;
        for (int64_t first = 0; first < rows; first += most) {
            const int64_t now = std::min(most, rows - first);
            const auto* states = reinterpret_cast<const char*>(codes.codes.data()) + first * form.each * form.row_size;
            multiply_block(form, weight, states, now * form.each, part);
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

constexpr int MANY = 24, FEW = 6;  // the most queries that look at the same keys together; those whose sums are in registers

// A query [size], what it sees, and where what it sees of the values goes: columns `from` to `committed`, and of the others
// those of which the byte is not 0.
struct Query {
    const float* vector;
    float* out;
    int64_t from, committed;
    const uint8_t* others;
    float* weights;  // [columns]
    float factor;    // that makes weights sum up to one
};

// Rows of sixteen words to columns.
void transpose(__m512i (&rows)[LANES]) {
    __m512i parts[LANES];
    for (int i = 0; i < LANES; i += 2) {
        parts[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
        parts[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
    }
    for (int i = 0; i < LANES; i += 4)
        for (int j = 0; j < 2; j++) {
            rows[i + 2 * j] = _mm512_unpacklo_epi64(parts[i + j], parts[i + 2 + j]);
            rows[i + 2 * j + 1] = _mm512_unpackhi_epi64(parts[i + j], parts[i + 2 + j]);
        }
    for (int j = 0; j < 4; j++) {
        const __m512i even[] = {
            _mm512_shuffle_i32x4(rows[j], rows[j + 4], 0x88), _mm512_shuffle_i32x4(rows[j + 8], rows[j + 12], 0x88)};
        const __m512i odd[] = {
            _mm512_shuffle_i32x4(rows[j], rows[j + 4], 0xdd), _mm512_shuffle_i32x4(rows[j + 8], rows[j + 12], 0xdd)};
        rows[j] = _mm512_shuffle_i32x4(even[0], even[1], 0x88);
        rows[j + 4] = _mm512_shuffle_i32x4(odd[0], odd[1], 0x88);
        rows[j + 8] = _mm512_shuffle_i32x4(even[0], even[1], 0xdd);
        rows[j + 12] = _mm512_shuffle_i32x4(odd[0], odd[1], 0xdd);
    }
}

// Up to sixteen keys [count, size] as float [size][16].
template <bool HALF>
void spread(const void* keys, int64_t count, int64_t size, float* out) {
    const int64_t words = HALF ? size / 2 : size;
    for (int64_t first = 0; first < words; first += LANES) {
        __m512i rows[LANES];
        for (int64_t i = 0; i < LANES; i++)
            rows[i] = _mm512_maskz_loadu_epi32(
                i < count ? lanes(words - first) : 0, static_cast<const int32_t*>(keys) + i * words + first);
        transpose(rows);
        for (int64_t i = 0; i < std::min(LANES, words - first); i++) {
            if (!HALF) {
                _mm512_storeu_si512(out + (first + i) * LANES, rows[i]);
                continue;
            }
            __m512 lower, upper;
            parted(rows[i], lower, upper);
            _mm512_storeu_ps(out + 2 * (first + i) * LANES, lower);
            _mm512_storeu_ps(out + (2 * (first + i) + 1) * LANES, upper);
        }
    }
}

// Scores of Q queries for sixteen columns, `column` and those behind it; the lowest for what is not seen.
template <int Q>
void score(const Query* queries, const float* keys, int64_t column, int64_t columns, int64_t size, float scaling) {
    __m512 sums[Q][2];
#pragma GCC unroll 6
    for (int q = 0; q < Q; q++) sums[q][0] = sums[q][1] = _mm512_setzero_ps();
    for (int64_t i = 0; i < size; i += 2)
#pragma GCC unroll 2
        for (int j = 0; j < 2; j++) {
            const __m512 keyed = _mm512_loadu_ps(keys + (i + j) * LANES);
#pragma GCC unroll 6
            for (int q = 0; q < Q; q++)
                sums[q][j] = _mm512_fmadd_ps(_mm512_set1_ps(queries[q].vector[i + j]), keyed, sums[q][j]);
        }
#pragma GCC unroll 6
    for (int q = 0; q < Q; q++) {
        const Query& query = queries[q];
        __mmask16 seen = ~lanes(query.from - column) & lanes(query.committed - column);
        const __mmask16 others = ~lanes(query.committed - column) & lanes(columns - column);
        const __m128i sight = _mm_maskz_loadu_epi8(others, query.others + column - query.committed);
        seen |= _mm_test_epi8_mask(sight, sight);
        const __m512 found = _mm512_mul_ps(_mm512_add_ps(sums[q][0], sums[q][1]), _mm512_set1_ps(scaling));
        const __m512 lowest = _mm512_set1_ps(std::numeric_limits<float>::lowest());
        _mm512_storeu_ps(query.weights + column, _mm512_mask_mov_ps(lowest, seen, found));
    }
}

// Scores to weights, 0 for those that are taken away, whole vectors of them; returns one by their sum, or no number if a score
// is none.
float soften(float* weights, int64_t columns) {
    const __m512 away = _mm512_set1_ps(TAKEN_AWAY), endless = _mm512_set1_ps(std::numeric_limits<float>::infinity());
    __m512 highest = away, total = _mm512_setzero_ps();
    __mmask16 broken = 0;
    for (int64_t column = 0; column < columns; column += LANES) {
        const __m512 score = _mm512_loadu_ps(weights + column);
        broken |= _mm512_cmp_ps_mask(score, endless, _CMP_NLT_UQ);  // or no number
        highest = _mm512_max_ps(highest, score);
    }
    const __m512 most = _mm512_set1_ps(_mm512_reduce_max_ps(highest));
    for (int64_t column = 0; column < columns; column += LANES) {
        const __m512 score = _mm512_loadu_ps(weights + column);
        const __mmask16 seen = _mm512_cmp_ps_mask(score, away, _CMP_NLE_UQ);
        const __m512 weight = _mm512_maskz_mov_ps(seen, exponential(_mm512_sub_ps(score, most)));
        _mm512_storeu_ps(weights + column, weight);
        total = _mm512_add_ps(total, weight);
    }
    return broken ? std::numeric_limits<float>::quiet_NaN() : 1 / _mm512_reduce_add_ps(total);
}

// The sums [size] of values [columns, size], each times its weight, and all times a factor, for Q queries.
template <bool HALF, int Q>
void weigh(const Query* queries, const void* values, int64_t columns, int64_t size) {
    constexpr int PARTS = 4;
    for (int64_t i = 0; i < size; i += PARTS * LANES) {
        __mmask16 some[PARTS];
        __m512 sums[Q][PARTS];
#pragma GCC unroll 4
        for (int j = 0; j < PARTS; j++) some[j] = lanes(size - i - j * LANES);
#pragma GCC unroll 6
        for (int q = 0; q < Q; q++)
#pragma GCC unroll 4
            for (int j = 0; j < PARTS; j++) sums[q][j] = _mm512_setzero_ps();
        for (int64_t first = 0; first < columns; first += LANES) {
            // What nobody may see may be no number.
            uint32_t seen = 0;
#pragma GCC unroll 6
            for (int q = 0; q < Q; q++) {
                const __m512i weights = _mm512_loadu_si512(queries[q].weights + first);
                seen |= _mm512_test_epi32_mask(weights, weights);
            }
            for (; seen; seen &= seen - 1) {
                const int64_t column = first + __builtin_ctz(seen);
                __m512 value[PARTS];
#pragma GCC unroll 4
                for (int j = 0; j < PARTS; j++) value[j] = load_as<HALF>(values, column * size + i + j * LANES, some[j]);
#pragma GCC unroll 6
                for (int q = 0; q < Q; q++) {
                    const __m512 weight = _mm512_set1_ps(queries[q].weights[column]);
#pragma GCC unroll 4
                    for (int j = 0; j < PARTS; j++) sums[q][j] = _mm512_fmadd_ps(weight, value[j], sums[q][j]);
                }
            }
        }
#pragma GCC unroll 6
        for (int q = 0; q < Q; q++)
#pragma GCC unroll 4
            for (int j = 0; j < PARTS; j++)
                _mm512_mask_storeu_ps(
                    queries[q].out + i + j * LANES, some[j], _mm512_mul_ps(sums[q][j], _mm512_set1_ps(queries[q].factor)));
    }
}

// What queries see of keys and values [columns, size].
template <bool HALF>
void attend(Query* queries, int count, Numbers keys, Numbers values, int64_t columns, int64_t size, float scaling) {
    static constexpr decltype(&score<1>) SCORE[] = {nullptr, score<1>, score<2>, score<3>, score<4>, score<5>, score<6>};
    static constexpr decltype(&weigh<HALF, 1>) WEIGH[] = {
        nullptr, weigh<HALF, 1>, weigh<HALF, 2>, weigh<HALF, 3>, weigh<HALF, 4>, weigh<HALF, 5>, weigh<HALF, 6>};
    static thread_local Buffer<float> buffer;
    const int64_t room = up(columns, LANES);
    buffer.fit(size * LANES + count * room);
    for (int q = 0; q < count; q++) queries[q].weights = buffer.data() + size * LANES + q * room;
    for (int64_t column = 0; column < columns; column += LANES) {
        spread<HALF>(keys.from(column * size).data, std::min(LANES, columns - column), size, buffer.data());
        for (int q = 0; q < count; q += FEW)
            SCORE[std::min(FEW, count - q)](queries + q, buffer.data(), column, columns, size, scaling);
    }
    for (int q = 0; q < count; q++) queries[q].factor = soften(queries[q].weights, columns);
    for (int q = 0; q < count; q += FEW) WEIGH[std::min(FEW, count - q)](queries + q, values.data, columns, size);
}

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
    // As few groups of queries as give every thread some.
    const int64_t share = place.rows * shared * each * place.length / (2 * omp_get_num_threads());
    const int64_t many = std::min<int64_t>(MANY, std::max<int64_t>(FEW, up(share, FEW)));
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
            for (int64_t first = 0; first < each * place.length; first += many) {
                const int now = std::min(many, each * place.length - first);
                const int64_t at = row * place.row_stride + head * place.head_stride, committed = place.lengths[row];
                Query queries[MANY];
                for (int q = 0; q < now; q++) {
                    const int64_t token = row * place.length + (first + q) / each;
                    const int64_t query = head * each + (first + q) % each;
                    const int64_t from = layer.window ? positions[token] + 1 - layer.window : 0;
                    queries[q] = {
                        turned + token * width + query * size, seen + (token * heads + query) * size, from, committed,
                        sight + token * known, nullptr, 0};
                }
                attend<HALF>(
                    queries, now, keys.from(at), values.from(at), committed + known, size,
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

// A stretch of an output's weights to codes, `PAIR_STRIDE` bytes from pair to pair, and their step. This is a power of two, so
// only what is small beside the rest of its stretch is rounded.
float shorten(Numbers weights, int64_t count, char* codes) {
    __m512 total = _mm512_setzero_ps(), most = total;
    for (int64_t k = 0; k < count; k += LANES) {
        const __m512 part = _mm512_abs_ps(weights.load(k, lanes(count - k)));
        total = _mm512_add_ps(total, part);
        most = _mm512_max_ps(most, part);
    }
    const float least = std::max(_mm512_reduce_add_ps(total) / MOST_SHORTS, _mm512_reduce_max_ps(most) / INT16_MAX);
    if (!(least < std::numeric_limits<float>::infinity())) return std::numeric_limits<float>::quiet_NaN();
    const __m512 twos = _mm512_getexp_ps(_mm512_set1_ps(std::max(least, 1e-30f)));
    const __m512 step = _mm512_scalef_ps(_mm512_set1_ps(2), twos), factor = _mm512_div_ps(_mm512_set1_ps(1), step);
    const __m256i places = _mm256_mullo_epi32(_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), _mm256_set1_epi32(PAIR_STRIDE));
    for (int64_t k = 0; k < count; k += LANES) {
        const __m512 steps = _mm512_mul_ps(weights.load(k, lanes(count - k)), factor);
        const __m256i pairs = _mm512_cvtsepi32_epi16(_mm512_cvtps_epi32(steps));
        _mm256_i32scatter_epi32(codes + k / 2 * PAIR_STRIDE, places, pairs, 1);
    }
    return _mm512_cvtss_f32(step);
}

}  // namespace

extern "C" {

// Weights in bfloat16 [outputs, inputs] as shorts; `out` is zeros.
void shorts(void* weight, int64_t outputs, int64_t inputs, void* out, int threads) {
    const Form form({nullptr, nullptr, nullptr, inputs, outputs, SHORTS});
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t first = 0; first < outputs; first += BLOCK) {
        char* to = static_cast<char*>(out) + first / BLOCK * form.block_size;
        for (int64_t from = 0; from < inputs; from += STRETCH, to += form.stretch_size)
            for (int64_t output = first; output < std::min(first + BLOCK, outputs); output++) {
                const int64_t place = output - first, count = std::min(STRETCH, inputs - from);
                const Numbers weights{static_cast<uint16_t*>(weight) + output * inputs + from, true};
                const float step = shorten(weights, count, to + STEPS + 4 * place);
                std::memcpy(to + place % LANES * 4 + place / LANES * 2, reinterpret_cast<const char*>(&step) + 2, 2);
            }
    }
}

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
