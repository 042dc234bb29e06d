// Distributions over a large vocabulary. `mcsd.kernels.distributions` calls this. What a row gives does not depend on the
// other rows, nor on how many threads there are.

#include "numbers.h"

#include <cmath>
#include <functional>
#include <tuple>
#include <utility>

namespace {

constexpr int64_t PIECE = 4096;  // numbers that a thread looks at together
constexpr int64_t PART = 64;     // numbers of which the largest is known

// Numbers `from` to `to` of a row.
struct Piece {
    Numbers numbers;
    int64_t row, from, to;

    Piece(void* data, bool half, int64_t size, int64_t piece) {
        const int64_t each = (size + PIECE - 1) / PIECE;
        row = piece / each;
        numbers = Numbers{data, half}.from(row * size);
        from = piece % each * PIECE;
        to = std::min(from + PIECE, size);
    }
};

// Sixteen numbers after the other, by what takes where they stand and which of the lanes they fill.
template <typename Take>
void each_sixteen(int64_t from, int64_t to, Take take) {
    for (; from + LANES <= to; from += LANES) take(from, __mmask16(0xffff));
    if (from < to) take(from, lanes(to - from));
}

constexpr float NONE = std::numeric_limits<float>::quiet_NaN();

// The largest of some numbers; no number if one is none.
template <bool HALF>
float largest_of(const void* numbers, int64_t from, int64_t to) {
    __m512 most = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
    __mmask16 none = 0;
    each_sixteen(from, to, [&](int64_t at, __mmask16 mask) {
        const __m512 some = load_as<HALF>(numbers, at, mask);
        none |= _mm512_cmp_ps_mask(some, some, _CMP_UNORD_Q);
        most = _mm512_mask_max_ps(most, mask, most, some);
    });
    return none ? NONE : _mm512_reduce_max_ps(most);
}

float largest_of(const Piece& piece, int64_t from, int64_t to) {
    return piece.numbers.half ? largest_of<true>(piece.numbers.data, from, to)
                              : largest_of<false>(piece.numbers.data, from, to);
}

// exp(factor * (x - top)) of numbers, and their sum; where the top is no finite number the sum is none.
template <bool HALF>
float powers_of(const void* numbers, int64_t from, int64_t to, float top, float factor, float* out) {
    const __m512 most = _mm512_set1_ps(top), scale = _mm512_set1_ps(factor), least = _mm512_set1_ps(-87);
    __m512 total = _mm512_setzero_ps();
    each_sixteen(from, to, [&](int64_t at, __mmask16 mask) {
        const __m512 power = _mm512_mul_ps(_mm512_sub_ps(load_as<HALF>(numbers, at, mask), most), scale);
        // What is less than that is 0.
        const __mmask16 some = mask & _mm512_cmp_ps_mask(power, least, _CMP_GE_OQ);
        const __m512 value = _mm512_maskz_mov_ps(some, exponential(power));
        total = _mm512_add_ps(total, value);
        _mm512_mask_storeu_ps(out + at, mask, value);
    });
    return std::isfinite(top) ? _mm512_reduce_add_ps(total) : NONE;
}

// What `largest_of` gives, of what it has given for parts.
float largest_of_all(const float* parts, int64_t count) {
    float most = parts[0];
    for (int64_t i = 1; i < count; i++) most = parts[i] > most || parts[i] != parts[i] ? parts[i] : most;
    return most;
}

// What `largest` gives for a row, of which `tops` are the largest of each part.
void find_largest(const Numbers& row, int64_t size, const float* tops, int64_t count, float* values, int64_t* places) {
    typedef std::pair<float, int64_t> Found;
    static thread_local std::vector<float> order;
    static thread_local std::vector<Found> found;
    const int64_t parts = (size + PART - 1) / PART;
    found.clear();
    if (std::isnan(largest_of_all(tops, parts))) {
        for (int64_t i = 0; i < count; i++) found.push_back({NONE, i});
    } else {
        // The largest of so many parts are no less than this.
        order.assign(tops, tops + parts);
        std::nth_element(order.begin(), order.begin() + count - 1, order.end(), std::greater<float>());
        const float least = order[count - 1];
        for (int64_t part = 0; part < parts; part++) {
            if (tops[part] < least) continue;
            each_sixteen(part * PART, std::min((part + 1) * PART, size), [&](int64_t at, __mmask16 mask) {
                const __m512 some = row.load(at, mask);
                alignas(64) float sixteen[LANES];
                _mm512_store_ps(sixteen, some);
                unsigned seen = _mm512_mask_cmp_ps_mask(mask, some, _mm512_set1_ps(least), _CMP_GE_OQ);
                for (; seen; seen &= seen - 1) found.push_back({sixteen[__builtin_ctz(seen)], at + __builtin_ctz(seen)});
            });
        }
        const auto before = [](const Found& one, const Found& other) {
            return one.first != other.first ? one.first > other.first : one.second < other.second;
        };
        std::partial_sort(found.begin(), found.begin() + count, found.end(), before);
    }
    for (int64_t i = 0; i < count; i++) std::tie(values[i], places[i]) = found[i];
}

}  // namespace

extern "C" {

// exp(factor * (x - the row's largest)) of logits [rows, size], scaled to the sum 1. `factors` has one for each row, or is
// null for ones. A row whose largest is no finite number is none throughout.
void softmax(void* logits, bool half, int64_t rows, int64_t size, const float* factors, float* out, int threads) {
    static thread_local Buffer<float> tops;
    static thread_local Buffer<double> sums;
    const int64_t each = (size + PIECE - 1) / PIECE;
    tops.fit(rows * each);
    sums.fit(rows * each);
    float* most = tops.data();
    double* sum = sums.data();
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
        for (int64_t i = 0; i < rows * each; i++) {
            const Piece piece(logits, half, size, i);
            most[i] = largest_of(piece, piece.from, piece.to);
        }
#pragma omp for schedule(static)
        for (int64_t i = 0; i < rows * each; i++) {
            const Piece piece(logits, half, size, i);
            const float top = largest_of_all(most + piece.row * each, each), factor = factors ? factors[piece.row] : 1;
            sum[i] = (half ? powers_of<true> : powers_of<false>)(
                piece.numbers.data, piece.from, piece.to, top, factor, out + piece.row * size);
        }
#pragma omp for schedule(static)
        for (int64_t i = 0; i < rows * each; i++) {
            const Piece piece(logits, half, size, i);
            double total = 0;
            for (int64_t other = 0; other < each; other++) total += sum[piece.row * each + other];
            const __m512 scale = _mm512_set1_ps(static_cast<float>(1 / total));
            float* own = out + piece.row * size;
            each_sixteen(piece.from, piece.to, [&](int64_t at, __mmask16 mask) {
                _mm512_mask_storeu_ps(own + at, mask, _mm512_mul_ps(_mm512_maskz_loadu_ps(mask, own + at), scale));
            });
        }
    }
}

// The `count` largest of each row [rows, size] in falling order, [rows, count], and where they stand; of equal ones the
// first. There are as many parts at least. A row that holds what is no number gives none, and its first places.
void largest(void* logits, bool half, int64_t rows, int64_t size, int64_t count, float* values, int64_t* places, int threads) {
    static thread_local Buffer<float> tops;
    const int64_t parts = (size + PART - 1) / PART, each = (size + PIECE - 1) / PIECE;
    tops.fit(rows * parts);
    float* top = tops.data();
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
        for (int64_t i = 0; i < rows * each; i++) {
            const Piece piece(logits, half, size, i);
            for (int64_t from = piece.from; from < piece.to; from += PART)
                top[piece.row * parts + from / PART] = largest_of(piece, from, std::min(from + PART, piece.to));
        }
#pragma omp for schedule(static)
        for (int64_t row = 0; row < rows; row++)
            find_largest(
                Numbers{logits, half}.from(row * size), size, top + row * parts, count, values + row * count,
                places + row * count);
    }
}
}
