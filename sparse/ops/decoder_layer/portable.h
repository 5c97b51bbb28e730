// Products of panels with packed weights and attention to a chunk of positions in fp32, vectorised by the compiler.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "team.h"
#include "types.h"

namespace decoder_layer {

constexpr float kNothing = -std::numeric_limits<float>::infinity();

struct Strip {
  const void *keys, *values;  // of the first position; keys of one channel lie together, values of one position
  int64_t position, count;    // first position and number of valid ones
  int64_t skip;               // so many at the front are not seen
};

// Which positions the rows of a segment see.
struct Sight {
  const Segment* segment;
  int64_t groups;

  // Bits of the positions of a strip that a row (query heads of a token stand together) sees.
  uint32_t bits(const Strip& strip, int64_t row) const {
    const uint32_t present = (1u << strip.count) - (1u << strip.skip);
    const int64_t own = strip.position + strip.count - segment->start;  // end of the strip among the step's tokens
    if (own <= 0) return present;
    uint32_t seen = 0;
    const int64_t token = row / groups, drafted = segment->before + segment->count, last = segment->before + token;
    for (int64_t i = 0; i < strip.count; i++) {
      const int64_t other = strip.position + i - segment->start;
      const bool sees = other < 0 || (segment->visible ? segment->visible[token * drafted + other] : other <= last);
      seen |= static_cast<uint32_t>(sees) << i;
    }
    return seen & present;
  }
};

// Lines of the strips that come next, fetched a few at a time while others are computed: in the order of their memory
// where the strips are a whole page, else strip by strip.
class Fetcher {
 public:
  Fetcher(const Strip* strips, int64_t number, int64_t head_dim, int64_t size, int64_t steps)
      : strips_(strips), row_(kPage * size), key_lines_(head_dim), lines_(key_lines_ + kStrip * head_dim * size / 64) {
    const auto* last = number ? static_cast<const char*>(strips[number - 1].keys) : nullptr;
    if (number == kChunk && last == static_cast<const char*>(strips[0].keys) + (kChunk - 1) * kStrip * size) {
      row_ = 64;
      key_lines_ = kPage * head_dim * size / 64;
      lines_ = 2 * key_lines_;
      number = 1;
    }
    left_ = number * lines_;
    portion_ = std::min<int64_t>(kMost, (left_ + steps - 1) / std::max<int64_t>(steps, 1));
  }

  // One of `steps` portions.
  void step() {
    for (int64_t i = std::min(portion_, left_); i > 0; i--, left_--) {
      const bool key = line_ < key_lines_;
      const auto* from = static_cast<const char*>(key ? strips_->keys : strips_->values);
      __builtin_prefetch(from + (key ? line_ * row_ : (line_ - key_lines_) * 64), 0, 2);
      if (++line_ == lines_) line_ = 0, strips_++;
    }
  }

 private:
  static constexpr int64_t kMost = 6;  // lines at a time; more of them wait for each other

  const Strip* strips_;
  int64_t row_, key_lines_, lines_, left_ = 0, portion_ = 0, line_ = 0;
};

struct Portable {
  using Scalar = float;
  static void begin(int64_t /* rows */) {}
  static void end() {}

  // Calls store(row, group, low, high) with the sixteen and sixteen outputs of every row and group in from .. to.
  template <typename Store>
  static void multiply(const Matrix& m, Range groups, const float* panel, int64_t stride, int64_t rows, Store&& store) {
    for (int64_t group = groups.from; group < groups.to; group++) {
      const float* weights = static_cast<const float*>(m.weights) + group * m.inputs * 32;
      int64_t row = 0;
      for (; row + 8 <= rows; row += 8) some<8>(m, weights, group, panel, stride, row, store);
      for (; row + 4 <= rows; row += 4) some<4>(m, weights, group, panel, stride, row, store);
      for (; row + 2 <= rows; row += 2) some<2>(m, weights, group, panel, stride, row, store);
      for (; row < rows; row++) some<1>(m, weights, group, panel, stride, row, store);
    }
  }

  // Attention of rows [count, head_dim] to the strips: row by row the maximum of the scores, the sum of their
  // exponentials from there, and the values weighted by these. A row's arithmetic does not depend on the others.
  static void attend(const Strip* strips, int64_t number, const float* queries, int64_t count, int64_t head_dim,
                     const Sight& sight, const Strip*, int64_t, float* scratch, float* top, float* sum, float* out) {
    int64_t row = 0;
    for (; row + kRows <= count; row += kRows)
      attend_rows<kRows>(strips, number, queries, head_dim, sight, row, scratch, top, sum, out);
    for (; row < count; row++) attend_rows<1>(strips, number, queries, head_dim, sight, row, scratch, top, sum, out);
  }

  static int64_t scratch(int64_t) { return kRows * kWidth; }

  static void widen(const float* from, int64_t count, float* to) { std::copy_n(from, count, to); }
  static void narrow(const float* from, int64_t count, float* to) { std::copy_n(from, count, to); }
  static float weight_of(float difference) { return std::exp(difference); }

  // silu(gate) * up of sixteen channels.
  static void gate(const float* gates, const float* ups, float* out) {
    for (int64_t i = 0; i < 16; i++) out[i] = gates[i] / (1.0f + std::exp(-gates[i])) * ups[i];
  }

 private:
  // Sixteen numbers, which the compiler cuts to the registers that there are.
  typedef float Lanes __attribute__((vector_size(4 * kStrip)));
  typedef int32_t Wholes __attribute__((vector_size(4 * kStrip)));
  typedef float Loose __attribute__((vector_size(4 * kStrip), aligned(4), may_alias));

  static constexpr int64_t kRows = 4;                 // rows that share the loads of keys and values
  static constexpr int64_t kWidth = kChunk * kStrip;  // from one row of weights to the next

  template <int R>
  static void attend_rows(const Strip* strips, int64_t number, const float* queries, int64_t head_dim,
                          const Sight& sight, int64_t row, float* weights, float* top, float* sum, float* out) {
    queries += row * head_dim;
    Lanes highest[R];
    for (int r = 0; r < R; r++) highest[r] = Lanes{} + kNothing;
    for (int64_t s = 0; s < number; s++) {
      Lanes scores[R] = {};
      const auto* keys = static_cast<const float*>(strips[s].keys);
      for (int64_t d = 0; d < head_dim; d++) {
        const Lanes key = load(keys + d * kPage);
        for (int r = 0; r < R; r++) scores[r] += queries[r * head_dim + d] * key;
      }
      for (int r = 0; r < R; r++) {
        float* own = weights + r * kWidth + s * kStrip;
        store(own, scores[r]);
        const uint32_t seen = sight.bits(strips[s], row + r);
        for (int64_t i = 0; i < kStrip && seen != 0xffff; i++) own[i] = seen >> i & 1 ? own[i] : kNothing;
        const Lanes told = load(own);
        highest[r] = told > highest[r] ? told : highest[r];
      }
    }
    for (int r = 0; r < R; r++) {
      float most = kNothing;
      for (int64_t i = 0; i < kStrip; i++) most = std::max(most, highest[r][i]);
      top[row + r] = most;
      sum[row + r] = weigh(weights + r * kWidth, number, most);
    }
    int64_t from = 0;
    for (; from + kStrip <= head_dim; from += kStrip)
      mix<R, true>(strips, number, head_dim, from, weights, out + row * head_dim);
    if (from < head_dim) mix<R, false>(strips, number, head_dim, from, weights, out + row * head_dim);
  }

  // Scores to their exponentials from the highest one; the sum of these. What is not seen weighs nothing.
  static float weigh(float* scores, int64_t number, float highest) {
    Lanes lanes = {};
    for (int64_t s = 0; s < number; s++, scores += kStrip) {
      const Lanes score = load(scores);
      const Lanes weight = score == kNothing ? Lanes{} : exponential(score - highest);
      store(scores, weight);
      lanes += weight;
    }
    float total = 0;
    for (int64_t i = 0; i < kStrip; i++) total += lanes[i];
    return total;
  }

  // Weighted sums of sixteen channels of the values, or of those left over; positions that no row sees are not read.
  template <int R, bool kWhole>
  static void mix(const Strip* strips, int64_t number, int64_t head_dim, int64_t from, const float* weights,
                  float* out) {
    const int64_t width = kWhole ? kStrip : head_dim - from;
    Lanes sums[R] = {};
    for (int64_t s = 0; s < number; s++) {
      const auto* values = static_cast<const float*>(strips[s].values) + from;
      for (int64_t i = 0; i < strips[s].count; i++, values += head_dim) {
        const float* own = weights + s * kStrip + i;
        bool seen = false;
        for (int r = 0; r < R; r++) seen |= own[r * kWidth] != 0;
        if (!seen) continue;
        Lanes value = {};
        std::copy_n(values, width, reinterpret_cast<float*>(&value));
        for (int r = 0; r < R; r++) sums[r] += own[r * kWidth] * value;
      }
    }
    for (int r = 0; r < R; r++) std::copy_n(reinterpret_cast<const float*>(&sums[r]), width, out + r * head_dim + from);
  }

  // exp(x) for x <= 0 with a relative error of about 1e-7: a power of two times the exponential of what is left, at
  // most ln(2) / 2 away from zero, by its Taylor series.
  static Lanes exponential(Lanes x) {
    const Lanes least = Lanes{} - 87.0f;
    x = x < least ? least : x;  // what is not a number stays so
    const Lanes n = (x * 1.44269504f + 12582912.0f) - 12582912.0f;  // 1.5 * 2^23: the sum is a whole number
    const Lanes rest = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    Lanes series = Lanes{} + 1.0f / 5040;
    for (const float next : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f})
      series = series * rest + next;
    return series * reinterpret_cast<Lanes>((__builtin_convertvector(n, Wholes) + 127) << 23);
  }

  static Lanes load(const float* from) { return *reinterpret_cast<const Loose*>(from); }
  static void store(float* to, Lanes value) { *reinterpret_cast<Loose*>(to) = value; }

  template <int R, typename Store>
  static void some(const Matrix& m, const float* weights, int64_t group, const float* panel, int64_t stride,
                   int64_t row, Store&& keep) {
    Lanes low[R] = {}, high[R] = {};
    panel += row * stride;
    for (int64_t k = 0; k < m.inputs; k++) {
      const Lanes one = load(weights + k * 32), two = load(weights + k * 32 + 16);
      for (int r = 0; r < R; r++) {
        low[r] += panel[r * stride + k] * one;
        high[r] += panel[r * stride + k] * two;
      }
    }
    for (int r = 0; r < R; r++) {
      float sums[32];
      store(sums, low[r]);
      store(sums + 16, high[r]);
      keep(row + r, group, sums, sums + 16);
    }
  }
};

}  // namespace decoder_layer
