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
      for (; row + 4 <= rows; row += 4) some<4>(m, weights, group, panel, stride, row, store);
      for (; row < rows; row++) some<1>(m, weights, group, panel, stride, row, store);
    }
  }

  // Attention of rows [count, head_dim] to the strips: row by row the maximum of the scores, the sum of their
  // exponentials from there, and the values weighted by these.
  static void attend(const Strip* strips, int64_t number, const float* queries, int64_t count, int64_t head_dim,
                     const Sight& sight, const Strip*, int64_t, float* scratch, float* top, float* sum, float* out) {
    for (int64_t row = 0; row < count; row++) {
      const float* query = queries + row * head_dim;
      float* mixed = out + row * head_dim;
      std::fill_n(mixed, head_dim, 0.0f);
      float highest = kNothing, total = 0;
      for (int64_t s = 0; s < number; s++) {
        float scores[kStrip] = {};
        const auto* keys = static_cast<const float*>(strips[s].keys);
        for (int64_t d = 0; d < head_dim; d++)
          for (int64_t i = 0; i < kStrip; i++) scores[i] += query[d] * keys[d * kPage + i];
        const uint32_t seen = sight.bits(strips[s], row);
        for (int64_t i = 0; i < kStrip; i++) {
          scratch[s * kStrip + i] = seen >> i & 1 ? scores[i] : kNothing;
          highest = std::max(highest, scratch[s * kStrip + i]);
        }
      }
      for (int64_t s = 0; s < number && highest > kNothing; s++)
        for (int64_t i = 0; i < strips[s].count; i++) {
          if (scratch[s * kStrip + i] == kNothing) continue;
          const float weight = std::exp(scratch[s * kStrip + i] - highest);
          const float* values = static_cast<const float*>(strips[s].values) + i * head_dim;
          total += weight;
          for (int64_t d = 0; d < head_dim; d++) mixed[d] += weight * values[d];
        }
      top[row] = highest;
      sum[row] = total;
    }
  }

  static int64_t scratch(int64_t) { return kChunk * kStrip; }

  static void widen(const float* from, int64_t count, float* to) { std::copy_n(from, count, to); }
  static void narrow(const float* from, int64_t count, float* to) { std::copy_n(from, count, to); }
  static float weight_of(float difference) { return std::exp(difference); }

  // silu(gate) * up of sixteen channels.
  static void gate(const float* gates, const float* ups, float* out) {
    for (int64_t i = 0; i < 16; i++) out[i] = gates[i] / (1.0f + std::exp(-gates[i])) * ups[i];
  }

 private:
  template <int R, typename Store>
  static void some(const Matrix& m, const float* weights, int64_t group, const float* panel, int64_t stride, int64_t row,
                   Store&& store) {
    float sums[R][32] = {};
    for (int64_t k = 0; k < m.inputs; k++)
      for (int r = 0; r < R; r++) {
        const float x = panel[(row + r) * stride + k];
        for (int i = 0; i < 32; i++) sums[r][i] += x * weights[k * 32 + i];
      }
    for (int r = 0; r < R; r++) store(row + r, group, sums[r], sums[r] + 16);
  }
};

}  // namespace decoder_layer
