// Halves of a decoder layer for the few rows of a step, in one call each: attention and feed-forward (METHOD sections 1
// and 2). Weights are packed; all threads go through the stages together.

#include "stages.h"

namespace decoder_layer {
namespace {

constexpr int64_t kScored = 64;  // blocks scored at once

// The attention half in the order of its stages.
template <typename B>
struct AttentionHalf {
  using Scalar = typename B::Scalar;
  const Attention& a;
  const Segment* segments;
  const int64_t number, tokens;
  Scalar* hidden;
  const int64_t stride, width;  // of panels of hidden states and of mixed values
  const int64_t scratch_size;
  Scalar *normed, *mixed;
  float *projected, *scratch, *tops, *sums, *parts, *scores;
  std::vector<int64_t> owner, first_piece, first_part, first_score;
  std::vector<Piece> pieces;

  AttentionHalf(const Attention& attention, const Segment* all, int64_t count, int64_t rows, void* states)
      : a(attention), segments(all), number(count), tokens(rows), hidden(static_cast<Scalar*>(states)),
        stride(padded(a.hidden, kStep)), width(padded(a.heads * a.head_dim, kStep)),
        scratch_size(std::max<int64_t>({2 * stride, 4 * a.head_dim, padded(B::scratch(a.head_dim), 64)})) {
    Arena& arena = Arena::fresh();
    normed = panel_of<B>(arena, tokens, stride);
    mixed = panel_of<B>(arena, tokens, width);
    projected = arena.take<float>(tokens * a.qkv->outputs);
    scratch = arena.take<float>(at::get_num_threads() * scratch_size);
    int64_t part = 0, score = 0;
    const int64_t groups = a.heads / a.kv_heads;
    for (int64_t s = 0; s < number; s++) {
      owner.insert(owner.end(), segments[s].count, s);
      const Strips<Scalar> strips(segments[s], a);
      first_score.push_back(score);
      if (segments[s].summary) score += a.kv_heads * 2 * segments[s].whole;
      for (int64_t head = 0; head < a.kv_heads; head++) {
        first_piece.push_back(static_cast<int64_t>(pieces.size()));
        first_part.push_back(part);
        for (int64_t chunk = 0; chunk < strips.chunks(head); chunk++) pieces.push_back({s, head, chunk});
        part += strips.chunks(head) * segments[s].count * groups;
      }
    }
    tops = arena.take<float>(part);
    sums = arena.take<float>(part);
    parts = arena.take<float>(part * a.head_dim);
    scores = arena.take<float>(score);
  }

  void project(int thread, Team& team) {
    const Range rows = share(tokens, thread, team);
    prepare<B>(hidden, a.norm, a.eps, a.hidden, rows, normed, stride, scratch + thread * scratch_size);
    team.wait();
    const Matrix& m = *a.qkv;
    B::begin(tokens);
    B::multiply(m, share(m.groups, thread, team), normed, stride, tokens,
                [&](int64_t row, int64_t group, const float* low, const float* high) {
                  both_columns(m, group, low, high, [&](int64_t column, int64_t count, float* values) {
                    std::copy_n(values, count, projected + row * m.outputs + column);
                  });
                });
    B::end();
    team.wait();
    for (int64_t token = rows.from; token < rows.to; token++)
      place_token<B>(a, segments[owner[token]], token, projected + token * m.outputs, scratch + thread * scratch_size);
    team.wait();
  }

  void select(int thread, Team& team) {
    for (int64_t s = 0, piece = 0; s < number; s++) {
      const Segment& segment = segments[s];
      if (!segment.summary) continue;
      for (int64_t head = 0; head < a.kv_heads; head++)
        for (int64_t from = 0; from < segment.whole; from += kScored)
          if (piece++ % team.size == thread)
            score_blocks<B>(a, segment, head, {from, std::min(from + kScored, segment.whole)}, scores_of(s, head));
    }
    team.wait();
    for (int64_t s = 0, piece = 0; s < number; s++) {
      const Segment& segment = segments[s];
      for (int64_t head = 0; head < a.kv_heads && segment.summary; head++)
        if (piece++ % team.size == thread)
          choose_blocks(scores_of(s, head), segment.whole, segment.chosen, scores_of(s, head) + segment.whole,
                        segment.blocks + head * segment.chosen);
    }
    team.wait();
  }

  void attend(int thread, Team& team) {
    const int64_t groups = a.heads / a.kv_heads;
    int64_t shaped = 0;
    for (int64_t next = team.next(); next < static_cast<int64_t>(pieces.size()); next = team.next()) {
      const Piece& piece = pieces[next];
      const Segment& segment = segments[piece.segment];
      const int64_t rows = segment.count * groups, index = piece.segment * a.kv_heads + piece.head;
      if (shaped != rows) B::begin(rows);
      shaped = rows;
      const Strips<Scalar> strips(segment, a);
      Strip own[kChunk];
      const int64_t from = piece.chunk * kChunk, count = std::min(kChunk, strips.number(piece.head) - from);
      for (int64_t i = 0; i < count; i++) own[i] = strips.at(piece.head, from + i);
      const int64_t part = first_part[index] + piece.chunk * rows;
      const auto* queries = static_cast<const Scalar*>(segment.queries) + piece.head * padded(rows, kTileRows) * a.head_dim;
      B::attend(own, count, queries, rows, a.head_dim, a.page, Sight{&segment, groups}, scratch + thread * scratch_size,
                tops + part, sums + part, parts + part * a.head_dim);
    }
    if (shaped) B::end();
    team.wait();
    const Range units = share(tokens * a.heads, thread, team);
    for (int64_t unit = units.from; unit < units.to; unit++) {
      const int64_t token = unit / a.heads, head = unit % a.heads;
      const Segment& segment = segments[owner[token]];
      const int64_t rows = segment.count * groups, index = owner[token] * a.kv_heads + head / groups;
      const int64_t part = first_part[index], row = (token - segment.first) * groups + head % groups;
      const int64_t chunks = Strips<Scalar>(segment, a).chunks(head / groups);
      merge<B>(tops + part, sums + part, parts + part * a.head_dim, chunks, rows, row, a.head_dim,
               mixed + token * width + head * a.head_dim);
    }
    team.wait();
  }

  void output(int thread, Team& team) {
    B::begin(tokens);
    add_product<B>(*a.output, share(a.output->groups, thread, team), mixed, width, tokens, hidden);
    B::end();
    team.wait();
  }

  bool selects() const {
    return std::any_of(segments, segments + number, [](const Segment& segment) { return segment.summary; });
  }

 private:
  float* scores_of(int64_t s, int64_t head) { return scores + first_score[s] + head * 2 * segments[s].whole; }
};

enum Part { kProject = 1, kMix = 2 };

template <typename B>
void attention_half(const Attention& a, const Segment* segments, int64_t number, int64_t tokens, void* hidden, int parts,
                    double* seconds) {
  AttentionHalf<B> half(a, segments, number, tokens, hidden);
  Laps laps(seconds);
  together([&](int thread, Team& team) {
    const auto lap = [&](Stage stage) {
      if (thread == 0) laps.lap(stage);
    };
    if (parts & kProject) half.project(thread, team);
    lap(kLinear);
    if (!(parts & kMix)) return;
    if (half.selects()) half.select(thread, team);
    lap(kSelect);
    half.attend(thread, team);
    lap(kAttend);
    half.output(thread, team);
    lap(kLinear);
  });
}

template <typename B>
void feed_forward_half(const Matrix& gate_up, const Matrix& down, const void* norm, float eps, int64_t tokens,
                       void* states, double* seconds) {
  using Scalar = typename B::Scalar;
  auto* hidden = static_cast<Scalar*>(states);
  const int64_t stride = padded(gate_up.inputs, kStep), width = padded(down.inputs, kStep);
  Arena& arena = Arena::fresh();
  Scalar *normed = panel_of<B>(arena, tokens, stride), *gated = panel_of<B>(arena, tokens, width);
  float* scratch = arena.take<float>(at::get_num_threads() * 2 * stride);
  Laps laps(seconds);
  together([&](int thread, Team& team) {
    prepare<B>(hidden, norm, eps, gate_up.inputs, share(tokens, thread, team), normed, stride, scratch + thread * 2 * stride);
    team.wait();
    B::begin(tokens);
    B::multiply(gate_up, share(gate_up.groups, thread, team), normed, stride, tokens,
                [&](int64_t row, int64_t group, const float* low, const float* high) {
                  float gates[16], ups[16], values[16];
                  for (int64_t i = 0; i < 16; i++) {
                    gates[i] = low[i] + (gate_up.bias ? gate_up.bias[group * 16 + i] : 0.0f);
                    ups[i] = high[i] + (gate_up.bias ? gate_up.bias[gate_up.pair + group * 16 + i] : 0.0f);
                  }
                  B::gate(gates, ups, values);
                  B::narrow(values, 16, gated + row * width + group * 16);
                });
    team.wait();
    add_product<B>(down, share(down.groups, thread, team), gated, width, tokens, hidden);
    B::end();
    team.wait();
    if (thread == 0) laps.lap(kFeedForward);
  });
}

template <typename B>
void linear(const Matrix& m, const void* norm, float eps, const void* rows, int64_t tokens, void* out) {
  using Scalar = typename B::Scalar;
  const int64_t stride = padded(m.inputs, kStep);
  Arena& arena = Arena::fresh();
  Scalar* panel = panel_of<B>(arena, tokens, stride);
  float* scratch = arena.take<float>(at::get_num_threads() * 2 * stride);
  together([&](int thread, Team& team) {
    prepare<B>(static_cast<const Scalar*>(rows), norm, eps, m.inputs, share(tokens, thread, team), panel, stride,
               scratch + thread * 2 * stride);
    team.wait();
    B::begin(tokens);
    B::multiply(m, share(m.groups, thread, team), panel, stride, tokens,
                [&](int64_t row, int64_t group, const float* low, const float* high) {
                  both_columns(m, group, low, high, [&](int64_t column, int64_t count, float* values) {
                    B::narrow(values, count, static_cast<Scalar*>(out) + row * m.outputs + column);
                  });
                });
    B::end();
    team.wait();
  });
}

// Runs call with the kernels for a number format: 0 fp32, 1 bfloat16 in tiles. Returns 0; 2 where they do not run; 3
// without memory.
template <typename Call>
int with_kernels(int format, Call&& call) {
  try {
    if (format == 0) {
      call(Portable{});
      return 0;
    }
#ifdef WITH_TILES
    if (format == 1 && native::tiles_granted()) {
      call(Tiled{});
      return 0;
    }
#endif
  } catch (const std::bad_alloc&) {
    return 3;
  }
  return 2;
}

}  // namespace
}  // namespace decoder_layer

using namespace decoder_layer;

// hidden [tokens, hidden] becomes hidden + output(attention(norm(hidden))). parts: 1 projects and stores keys and values
// and leaves the queries in the segments, 2 attends from there on, 3 does both.
extern "C" int decoder_layer_attention(int format, const Attention* layer, const Segment* segments, int64_t number,
                                       int64_t tokens, void* hidden, int parts, double* seconds) {
  return with_kernels(format, [&](auto kernels) {
    attention_half<decltype(kernels)>(*layer, segments, number, tokens, hidden, parts, seconds);
  });
}

// hidden becomes hidden + down(silu(gate(x)) * up(x)), x = norm(hidden); gate_up pairs each channel's gate with its up.
extern "C" int decoder_layer_feed_forward(int format, const Matrix* gate_up, const Matrix* down, const void* norm,
                                          float eps, int64_t tokens, void* hidden, double* seconds) {
  return with_kernels(format, [&](auto kernels) {
    feed_forward_half<decltype(kernels)>(*gate_up, *down, norm, eps, tokens, hidden, seconds);
  });
}

// out [tokens, outputs] = rows [tokens, inputs] * weights, the rows normed first unless norm is null.
extern "C" int decoder_layer_linear(int format, const Matrix* matrix, const void* norm, float eps, const void* rows,
                                    int64_t tokens, void* out) {
  return with_kernels(
      format, [&](auto kernels) { linear<decltype(kernels)>(*matrix, norm, eps, rows, tokens, out); });
}
