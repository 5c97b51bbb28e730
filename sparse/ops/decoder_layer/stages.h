// The stages of half a layer, each shared out among the threads of a team.
#pragma once

#include "tiled.h"

namespace decoder_layer {

constexpr int64_t kScored = 256;  // blocks scored at once
constexpr int64_t kAtOnce = 4;    // by so many vectors
constexpr int64_t kLargestHead = 512;

enum Stage { kLinear, kSelect, kAttend, kFeedForward };

// Rows of a tensor in a panel with rows of `stride` values, from `column` on: normed unless norm is null.
template <typename B>
void prepare(const typename B::Scalar* rows, const void* norm, float eps, int64_t width, Range range,
             typename B::Scalar* panel, int64_t stride, float* scratch, int64_t column = 0) {
  using Scalar = typename B::Scalar;
  for (int64_t row = range.from; row < range.to; row++) {
    const Scalar* from = rows + row * width;
    Scalar* to = panel + row * stride + column;
    if (norm) {
      float *values = scratch, *weights = scratch + width;
      B::widen(from, width, values);
      B::widen(static_cast<const Scalar*>(norm), width, weights);
      float parts[16] = {};
      for (int64_t i = 0; i < width / 16 * 16; i += 16)
        for (int64_t j = 0; j < 16; j++) parts[j] += values[i + j] * values[i + j];
      for (int64_t i = width / 16 * 16; i < width; i++) parts[0] += values[i] * values[i];
      float total = 0;
      for (const float part : parts) total += part;
      const float factor = 1.0f / std::sqrt(total / width + eps);
      for (int64_t i = 0; i < width; i++) values[i] = values[i] * factor * weights[i];
      B::narrow(values, width, to);
    } else {
      std::copy_n(from, width, to);
    }
  }
}

// The panel of `tokens` rows of `width` values; rows up to a whole tile exist, all that is not filled later is zero.
template <typename B>
typename B::Scalar* panel_of(Arena& arena, int64_t tokens, int64_t width) {
  const int64_t stride = padded(width, kStep);
  auto* panel = arena.take<typename B::Scalar>(padded(tokens, kTileRows) * stride);
  std::fill_n(panel + tokens * stride, (padded(tokens, kTileRows) - tokens) * stride, typename B::Scalar{});
  for (int64_t row = 0; row < tokens && width < stride; row++)
    std::fill(panel + row * stride + width, panel + (row + 1) * stride, typename B::Scalar{});
  return panel;
}

// One half of a group's outputs plus bias: columns from `column`, as many as there are. Whole halves, nearly all, have
// their number in its type.
template <typename Take>
void columns_of(const Matrix& m, int64_t column, const float* sums, Take&& take) {
  alignas(64) float values[16];
  const int64_t count = m.outputs - column;
  if (count >= 16) {
    for (int64_t i = 0; i < 16; i++) values[i] = sums[i] + (m.bias ? m.bias[column + i] : 0.0f);
    take(column, std::integral_constant<int64_t, 16>{}, values);
  } else if (count > 0) {
    for (int64_t i = 0; i < count; i++) values[i] = sums[i] + (m.bias ? m.bias[column + i] : 0.0f);
    take(column, count, values);
  }
}

template <typename Take>
void both_columns(const Matrix& m, int64_t group, const float* low, const float* high, Take&& take) {
  columns_of(m, group * m.stride, low, take);
  columns_of(m, group * m.stride + m.pair, high, take);
}

// out += panel * weights, rounded once; out is [tokens, outputs].
template <typename B>
void add_product(const Matrix& m, Range groups, const typename B::Scalar* panel, int64_t stride, int64_t tokens,
                 typename B::Scalar* out) {
  B::multiply(m, groups, panel, stride, tokens, [&](int64_t row, int64_t group, const float* low, const float* high) {
    both_columns(m, group, low, high, [&](int64_t column, auto count, float* values) {
      typename B::Scalar* to = out + row * m.outputs + column;
      float old[16];
      B::widen(to, count, old);
      for (int64_t i = 0; i < count; i++) values[i] += old[i];
      B::narrow(values, count, to);
    });
  });
}

// The pieces of work of attention: a chunk of strips of one KV head of one segment.
struct Piece {
  int64_t segment, head, chunk;
};

// Where the strips of a piece lie.
template <typename Scalar>
struct Strips {
  const Segment& segment;
  const Attention& layer;
  int64_t length, per_block;

  Strips(const Segment& s, const Attention& l, int64_t block_size)
      : segment(s), layer(l), length(s.start + s.before + s.count), per_block(block_size / kStrip) {}

  int64_t kept(int64_t head) const { return segment.kept ? segment.kept[head] : segment.chosen; }
  int64_t from_blocks(int64_t head) const { return segment.blocks ? kept(head) * per_block : 0; }
  int64_t first() const { return segment.blocks ? segment.tail : 0; }

  // Strips of a chunk; returns how many.
  int64_t fill(int64_t head, int64_t chunk, Strip* out) const {
    const int64_t from = chunk * kChunk, count = std::min(kChunk, number(head) - from);
    for (int64_t i = 0; i < count; i++) out[i] = at(head, from + i);
    return count;
  }

  int64_t number(int64_t head) const { return from_blocks(head) + padded(length, kStrip) / kStrip - first() / kStrip; }
  int64_t chunks(int64_t head) const { return padded(number(head), kChunk) / kChunk; }

  // Strip n of a head: those of the chosen blocks, then everything from the tail on.
  Strip at(int64_t head, int64_t n) const {
    const int64_t chosen = from_blocks(head);
    const int64_t position =
        n < chosen ? (segment.blocks[head * segment.chosen + n / per_block] * per_block + n % per_block) * kStrip
                   : (first() / kStrip + n - chosen) * kStrip;
    const int64_t page = position / kPage, inside = position % kPage;
    const int64_t base = (page * layer.kv_heads + head) * kPage * layer.head_dim;
    return {static_cast<const Scalar*>(segment.keys) + base + inside,
            static_cast<const Scalar*>(segment.values) + base + inside * layer.head_dim, position,
            std::min<int64_t>(kStrip, length - position),
            n < chosen ? 0 : std::max<int64_t>(0, first() - position)};
  }
};

// Rotates one token's projections, scales its queries, and stores its keys and values in the cache.
template <typename B>
void place_token(const Attention& a, const Segment& segment, int64_t token, const float* projected, float* scratch) {
  using Scalar = typename B::Scalar;
  const int64_t d = a.head_dim, half = d / 2, groups = a.heads / a.kv_heads;
  const int64_t inside = token - segment.first;
  const int64_t place = segment.start + segment.before + inside;
  const int64_t page = place / kPage, slot = place % kPage;
  const int64_t padded_rows = padded(segment.count * groups, kTileRows);
  float *cosines = scratch, *sines = cosines + d, *norms = sines + d, *rotated = norms + d;
  Scalar rounded[512];
  B::widen(static_cast<const Scalar*>(a.cos) + segment.positions[inside] * d, d, cosines);
  B::widen(static_cast<const Scalar*>(a.sin) + segment.positions[inside] * d, d, sines);
  for (int64_t head = 0; head < a.heads + 2 * a.kv_heads; head++) {
    const float* values = projected + head * d;
    const int64_t kv = head < a.heads ? head / groups : (head - a.heads) % a.kv_heads;
    const int64_t base = (page * a.kv_heads + kv) * kPage * d;
    if (head >= a.heads + a.kv_heads) {
      B::narrow(values, d, static_cast<Scalar*>(segment.values) + base + slot * d);
      continue;
    }
    const bool query = head < a.heads;
    float factor = query ? a.scale : 1.0f;
    const void* norm = query ? a.query_norm : a.key_norm;
    if (norm) {
      B::widen(static_cast<const Scalar*>(norm), d, norms);
      float total = 0;
      for (int64_t i = 0; i < d; i++) total += values[i] * values[i];
      factor /= std::sqrt(total / d + a.eps);
    } else {
      std::fill_n(norms, d, 1.0f);
    }
    for (int64_t i = 0; i < d; i++) {
      const int64_t other = i < half ? i + half : i - half;
      rotated[i] = factor * (values[i] * norms[i] * cosines[i] + values[other] * norms[other] * sines[i]);
    }
    if (query) {
      const int64_t row = inside * groups + head % groups;
      B::narrow(rotated, d, static_cast<Scalar*>(segment.queries) + (kv * padded_rows + row) * d);
    } else {
      B::narrow(rotated, d, rounded);
      Scalar* to = static_cast<Scalar*>(segment.keys) + base + slot;
      for (int64_t i = 0; i < d; i++) to[i * kPage] = rounded[i];
    }
  }
}

// sums[v][block] += vectors[v] . summary[:, block] for the blocks of a range, up to kAtOnce vectors of d values.
template <typename B>
void add_products(const typename B::Scalar* summary, int64_t stride, Range range, const float (*vectors)[kLargestHead],
                  int64_t number, int64_t d, float (*sums)[kScored]) {
  const int64_t count = range.to - range.from;
  float values[kScored];
  for (int64_t i = 0; i < d; i++) {
    B::widen(summary + i * stride + range.from, count, values);
    for (int64_t v = 0; v < number; v++) {
      const float factor = vectors[v][i];
      for (int64_t block = 0; block < count; block++) sums[v][block] += factor * values[block];
    }
  }
}

// The scores of one KV head's blocks, a range at a time: Job says how.
template <typename B>
class BlockScores {
  using Scalar = typename B::Scalar;

 public:
  BlockScores(const Attention& attention, const Job& todo, const Segment& own, int64_t kv_head)
      : job(todo), segment(own), head(kv_head), d(attention.head_dim), groups(attention.heads / attention.kv_heads),
        queries(static_cast<const Scalar*>(own.queries) + kv_head * padded(own.count * groups, kTileRows) * d) {}

  // Sink and window blocks always win.
  void fill(Range range, float* scores) const {
    const int64_t count = range.to - range.from;
    float* out = scores + range.from;
    float best[kScored];
    if (job.score == kMean && !job.every_row && !job.reduce_max) {
      of_mean_query(range, out);
    } else {
      std::fill_n(out, count, job.reduce_max ? kNothing : 0.0f);
      for (int64_t group = 0; group < groups; group++) {
        of_group(group, range, best);
        for (int64_t block = 0; block < count; block++)
          out[block] = job.reduce_max ? std::max(out[block], best[block]) : out[block] + best[block] / groups;
      }
    }
    for (int64_t block = range.from; block < range.to; block++) {
      if (std::isnan(scores[block])) scores[block] = kNothing;
      if (block < segment.sinks || block >= segment.whole - segment.window)
        scores[block] = std::numeric_limits<float>::infinity();
    }
  }

 private:
  using Vectors = float[kAtOnce][kLargestHead];

  const Job& job;
  const Segment& segment;
  const int64_t head, d, groups;
  const Scalar* queries;

  // The query of a group that stands for all tokens: the first one's, or the sum of them by their shares.
  void query_of(int64_t group, float* out) const {
    B::widen(queries + group * d, d, out);
    if (!segment.shares) return;
    float other[kLargestHead];
    for (int64_t i = 0; i < d; i++) out[i] *= segment.shares[0];
    for (int64_t row = 1; row < segment.count; row++) {
      B::widen(queries + (row * groups + group) * d, d, other);
      for (int64_t i = 0; i < d; i++) out[i] += segment.shares[row] * other[i];
    }
  }

  // Mean keys times a vector are linear in it: one vector serves all query heads.
  void of_mean_query(Range range, float* out) const {
    Vectors total = {};
    float query[kLargestHead], sums[kAtOnce][kScored] = {};
    for (int64_t group = 0; group < groups; group++) {
      query_of(group, query);
      for (int64_t i = 0; i < d; i++) total[0][i] += query[i] / groups;
    }
    add_products<B>(summary(segment.summary), segment.summary_stride, range, total, 1, d, sums);
    std::copy_n(sums[0], range.to - range.from, out);
  }

  // Scores by one query head, the best of its rows where every row counts.
  void of_group(int64_t group, Range range, float* best) const {
    const int64_t count = range.to - range.from, rows = job.every_row ? segment.count : 1;
    std::fill_n(best, count, kNothing);
    Vectors vectors;
    for (int64_t first = 0; first < rows; first += kAtOnce) {
      const int64_t number = std::min(kAtOnce, rows - first);
      for (int64_t v = 0; v < number; v++) {
        if (job.every_row) B::widen(queries + ((first + v) * groups + group) * d, d, vectors[v]);
        else query_of(group, vectors[v]);
      }
      float sums[kAtOnce][kScored] = {};
      judge(vectors, number, range, sums);
      for (int64_t v = 0; v < number; v++)
        for (int64_t block = 0; block < count; block++) best[block] = std::max(best[block], sums[v][block]);
    }
  }

  void judge(const Vectors& vectors, int64_t number, Range range, float (*sums)[kScored]) const {
    const int64_t stride = segment.summary_stride;
    if (job.score == kMean) return add_products<B>(summary(segment.summary), stride, range, vectors, number, d, sums);
    Vectors with_first, with_second;
    for (int64_t v = 0; v < number; v++)
      for (int64_t i = 0; i < d; i++) {
        const float value = vectors[v][i];
        with_first[v][i] = job.score == kBound ? std::min(value, 0.0f) : value;
        with_second[v][i] = job.score == kBound ? std::max(value, 0.0f) : value * value / 2;
      }
    add_products<B>(summary(segment.summary), stride, range, with_first, number, d, sums);
    add_products<B>(summary(segment.second), stride, range, with_second, number, d, sums);
  }

  const Scalar* summary(const void* stored) const {
    return static_cast<const Scalar*>(stored) + head * d * segment.summary_stride;
  }
};

// The `chosen` blocks with the highest scores, ascending; of equal ones the first.
inline void choose_blocks(const float* scores, int64_t whole, int64_t chosen, float* sorted, int64_t* out) {
  std::copy_n(scores, whole, sorted);
  std::nth_element(sorted, sorted + chosen - 1, sorted + whole, std::greater<float>());
  const float least = sorted[chosen - 1];
  int64_t ties = chosen - std::count_if(sorted, sorted + chosen, [&](float score) { return score > least; });
  for (int64_t block = 0, found = 0; block < whole && found < chosen; block++) {
    const bool tied = scores[block] == least && ties > 0;
    ties -= tied;
    if (scores[block] > least || tied) out[found++] = block;
  }
}

// One query head of a token: its parts over all chunks, put together into the row that the output map reads.
template <typename B>
void merge(const float* tops, const float* sums, const float* parts, int64_t chunks, int64_t rows, int64_t row,
           int64_t head_dim, typename B::Scalar* out) {
  float highest = kNothing, total = 0, mixed[512] = {};
  for (int64_t c = 0; c < chunks; c++) highest = std::max(highest, tops[c * rows + row]);
  for (int64_t c = 0; c < chunks; c++) {
    const float weight = B::weight_of(tops[c * rows + row] - highest);
    const float* part = parts + (c * rows + row) * head_dim;
    total += weight * sums[c * rows + row];
    for (int64_t i = 0; i < head_dim; i++) mixed[i] += weight * part[i];
  }
  for (int64_t i = 0; i < head_dim; i++) mixed[i] /= total;
  B::narrow(mixed, head_dim, out);
}

}  // namespace decoder_layer
