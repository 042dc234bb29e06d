// Softmax and top-k of logits over a large vocabulary. `mcsd.kernels.distributions` calls the entries. A row's result
// does not depend on the other rows or the number of threads, to the last bit.

#include "simd.h"

#include <cmath>
#include <functional>
#include <tuple>
#include <utility>

namespace mcsd {
namespace {

constexpr int64_t SPAN = 4096;  // logits that a thread reads together
constexpr int64_t CHUNK = 64;   // logits whose maximum top-k keeps; a divisor of SPAN

// Logits `begin` to `end` of a row.
struct Span {
    FloatView logits;  // of the row
    int64_t row, begin, end;

    Span(void* data, bool bf16, int64_t size, int64_t number) {
        const int64_t spans = ceil_div(size, SPAN);
        row = number / spans;
        logits = FloatView{data, bf16}.at(row * size);
        begin = number % spans * SPAN;
        end = std::min(begin + SPAN, size);
    }
};

// Calls function(index, mask) for each vector from `begin` to `end`.
template <typename Function>
void for_each_vector(int64_t begin, int64_t end, Function function) {
    for (; begin + LANES <= end; begin += LANES) function(begin, lane_mask(LANES));
    if (begin < end) function(begin, lane_mask(end - begin));
}

// The maximum, or NaN if any is NaN.
template <bool BF16>
float max_of(const void* logits, int64_t begin, int64_t end) {
    Floats largest = set(-std::numeric_limits<float>::infinity());
    Mask nan = 0;
    for_each_vector(begin, end, [&](int64_t index, Mask mask) {
        const Floats part = load<BF16>(logits, index, mask);
        nan |= nan_mask(part);
        largest = select(mask, max(largest, part), largest);
    });
    return nan ? QUIET_NAN : reduce_max(largest);
}

float max_of(const Span& span, int64_t begin, int64_t end) {
    return (span.logits.is_bf16 ? max_of<true> : max_of<false>)(span.logits.data, begin, end);
}

// The maximum of maxima, or NaN if any is NaN.
float max_of_all(const float* maxima, int64_t count) {
    float largest = maxima[0];
    for (int64_t i = 1; i < count; i++) largest = maxima[i] > largest || maxima[i] != maxima[i] ? maxima[i] : largest;
    return largest;
}

// Softmax numerators exp(factor * (x - max)), 0 below exp(-87). Returns their sum, or NaN if the maximum is not finite.
template <bool BF16>
float exponentials(const void* logits, int64_t begin, int64_t end, float max, float factor, float* out) {
    const Floats largest = set(max), factors = set(factor), smallest = set(-87);
    Floats total = set(0);
    for_each_vector(begin, end, [&](int64_t index, Mask mask) {
        const Floats power = (load<BF16>(logits, index, mask) - largest) * factors;
        const Mask in_range = mask & at_least(power, smallest);
        const Floats value = select(in_range, exp_ps(power), set(0));
        total = total + value;
        store(out + index, mask, value);
    });
    return std::isfinite(max) ? reduce_add(total) : QUIET_NAN;
}

void scale(float* values, int64_t begin, int64_t end, float factor) {
    const Floats factors = set(factor);
    for_each_vector(begin, end, [&](int64_t index, Mask mask) {
        store(values + index, mask, load(values + index, mask) * factors);
    });
}

typedef std::pair<float, int64_t> Candidate;  // logit and token

// Collects the logits of a row that are at least `threshold`. Only chunks whose maximum is have any, so only those are
// searched.
void collect(
    const FloatView& row, int64_t size, const float* chunk_maxima, float threshold,
    std::vector<Candidate>& candidates) {
    for (int64_t chunk = 0; chunk * CHUNK < size; chunk++) {
        if (chunk_maxima[chunk] < threshold) continue;
        for_each_vector(chunk * CHUNK, std::min((chunk + 1) * CHUNK, size), [&](int64_t index, Mask mask) {
            const Floats part = row.load(index, mask);
            alignas(64) float values[LANES];
            store(values, part);
            unsigned found = mask & at_least(part, set(threshold));
            for (; found; found &= found - 1) {
                const int lane = __builtin_ctz(found);
                candidates.push_back({values[lane], index + lane});
            }
        });
    }
}

// Top-k of a row with the maxima of its chunks; see the entry `top_k`.
void top_k_of_row(
    const FloatView& row, int64_t size, const float* chunk_maxima, int64_t k, float* values, int64_t* tokens) {
    static thread_local std::vector<float> sorted;
    static thread_local std::vector<Candidate> candidates;
    const int64_t chunks = ceil_div(size, CHUNK);
    candidates.clear();
    if (std::isnan(max_of_all(chunk_maxima, chunks))) {
        for (int64_t i = 0; i < k; i++) candidates.push_back({QUIET_NAN, i});
    } else {
        // The k largest logits are no less than the k-th largest maximum of a chunk.
        sorted.assign(chunk_maxima, chunk_maxima + chunks);
        std::nth_element(sorted.begin(), sorted.begin() + k - 1, sorted.end(), std::greater<float>());
        collect(row, size, chunk_maxima, sorted[k - 1], candidates);
        const auto precedes = [](const Candidate& one, const Candidate& other) {
            return one.first != other.first ? one.first > other.first : one.second < other.second;
        };
        std::partial_sort(candidates.begin(), candidates.begin() + k, candidates.end(), precedes);
    }
    for (int64_t i = 0; i < k; i++) std::tie(values[i], tokens[i]) = candidates[i];
}

}  // namespace
}  // namespace mcsd

using namespace mcsd;

extern "C" {

// Softmax of factor * logits [rows, size], in float32. `factors` [rows] may be null for ones. A row whose maximum is
// not finite becomes NaN.
void softmax(void* logits, bool bf16, int64_t rows, int64_t size, const float* factors, float* out, int threads) {
    static thread_local Buffer<float> maxima_buffer;
    static thread_local Buffer<double> sums_buffer;
    const int64_t spans = ceil_div(size, SPAN);
    maxima_buffer.reserve(rows * spans);
    sums_buffer.reserve(rows * spans);
    float* maxima = maxima_buffer.data();
    double* sums = sums_buffer.data();
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
        for (int64_t i = 0; i < rows * spans; i++) {
            const Span span(logits, bf16, size, i);
            maxima[i] = max_of(span, span.begin, span.end);
        }
#pragma omp for schedule(static)
        for (int64_t i = 0; i < rows * spans; i++) {
            const Span span(logits, bf16, size, i);
            const float max = max_of_all(maxima + span.row * spans, spans), factor = factors ? factors[span.row] : 1;
            sums[i] = (bf16 ? exponentials<true> : exponentials<false>)(
                span.logits.data, span.begin, span.end, max, factor, out + span.row * size);
        }
#pragma omp for schedule(static)
        for (int64_t i = 0; i < rows * spans; i++) {
            const Span span(logits, bf16, size, i);
            double total = 0;
            for (int64_t other = 0; other < spans; other++) total += sums[span.row * spans + other];
            scale(out + span.row * size, span.begin, span.end, static_cast<float>(1 / total));
        }
    }
}

// The k largest logits of each row of [rows, size] in falling order, of equal ones the first, and their tokens, both
// [rows, k]. There must be at least k chunks. A row that holds NaN gives NaN and the first k tokens.
void top_k(
    void* logits, bool bf16, int64_t rows, int64_t size, int64_t k, float* values, int64_t* tokens, int threads) {
    static thread_local Buffer<float> maxima_buffer;
    const int64_t chunks = ceil_div(size, CHUNK), spans = ceil_div(size, SPAN);
    maxima_buffer.reserve(rows * chunks);
    float* maxima = maxima_buffer.data();
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
        for (int64_t i = 0; i < rows * spans; i++) {
            const Span span(logits, bf16, size, i);
            for (int64_t begin = span.begin; begin < span.end; begin += CHUNK)
                maxima[span.row * chunks + begin / CHUNK] = max_of(span, begin, std::min(begin + CHUNK, span.end));
        }
#pragma omp for schedule(static)
        for (int64_t row = 0; row < rows; row++)
            top_k_of_row(
                FloatView{logits, bf16}.at(row * size), size, maxima + row * chunks, k, values + row * k,
                tokens + row * k);
    }
}
}
