// Halves of decoder layers for the few rows of a step, as many in one call as follow each other: attention and
// feed-forward (METHOD sections 1 and 2). Weights are packed; all threads go through the stages together.

#include <optional>

#include "sparse_half.h"

namespace decoder_layer {
namespace {

enum Part { kProject = 1, kMix = 2 };

// The attention half in the order of its stages.
template <typename B>
struct AttentionHalf {
  using Scalar = typename B::Scalar;
  const Attention& a;
  const Job& job;
  const Segment* segments;
  const int64_t number, tokens;
  Scalar* hidden;
  const int64_t inputs, stride, width;  // of the projections; of panels of their inputs and of mixed values
  const int64_t scratch_size;
  Scalar *normed, *mixed;
  float *projected, *scratch, *tops, *sums, *parts, *scores;
  std::vector<int64_t> owner, first_part, first_score, strips_before{0};
  std::vector<Piece> pieces;

  AttentionHalf(const Job& todo, int64_t rows, void* states, int threads)
      : a(*todo.attention), job(todo), segments(todo.segments), number(todo.number), tokens(rows), hidden(static_cast<Scalar*>(states)),
        inputs(a.qkv->inputs), stride(padded(inputs, kStep)), width(padded(a.heads * a.head_dim, kStep)),
        scratch_size(std::max<int64_t>({2 * stride, 4 * a.head_dim, padded(B::scratch(a.head_dim), 64)})) {
    Arena& arena = Arena::fresh();
    normed = panel_of<B>(arena, tokens, inputs);
    mixed = panel_of<B>(arena, tokens, a.heads * a.head_dim);
    projected = arena.take<float>(tokens * a.qkv->outputs);
    scratch = arena.take<float>(threads * scratch_size);
    int64_t part = 0, score = 0;
    const int64_t groups = a.heads / a.kv_heads;
    for (int64_t s = 0; s < number; s++) owner.insert(owner.end(), segments[s].count, s);
    if (!(job.parts & kMix)) return;
    for (int64_t s = 0; s < number; s++) {
      const Strips<Scalar> strips(segments[s], a, job.block_size);
      first_score.push_back(score);
      if (segments[s].summary) score += a.kv_heads * 2 * segments[s].whole;
      for (int64_t head = 0; head < a.kv_heads; head++) {
        first_part.push_back(part);
        for (int64_t chunk = 0; chunk < strips.chunks(head); chunk++) {
          pieces.push_back({s, head, chunk});
          strips_before.push_back(strips_before.back() + std::min(kChunk, strips.number(head) - chunk * kChunk));
        }
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
    float* own = scratch + thread * scratch_size;
    const auto* beside = static_cast<const Scalar*>(job.beside);
    if (beside) prepare<B>(beside, a.beside_norm, a.eps, a.hidden, rows, normed, stride, own);
    prepare<B>(hidden, a.norm, a.eps, a.hidden, rows, normed, stride, own, beside ? a.hidden : 0);
    team.wait();
    const Matrix& m = *a.qkv;
    B::begin(tokens);
    B::multiply(m, share(m.groups, thread, team), normed, stride, tokens,
                [&](int64_t row, int64_t group, const float* low, const float* high) {
                  both_columns(m, group, low, high, [&](int64_t column, auto count, float* values) {
                    std::copy_n(values, count, projected + row * m.outputs + column);
                  });
                });
    B::end();
    team.wait();
    for (int64_t token = rows.from; token < rows.to; token++)
      place_token<B>(a, segments[owner[token]], token, projected + token * m.outputs, own);
    team.wait();
  }

  void select(int thread, Team& team) {
    for (int64_t s = 0, piece = 0; s < number; s++) {
      const Segment& segment = segments[s];
      if (!segment.summary) continue;
      for (int64_t head = 0; head < a.kv_heads; head++)
        for (int64_t from = 0; from < segment.whole; from += kScored)
          if (piece++ % team.size == thread)
            BlockScores<B>(a, job, segment, head).fill({from, std::min(from + kScored, segment.whole)}, scores_of(s, head));
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
    const int64_t all = strips_before.back();
    const auto bound = [&](int64_t part) {
      const auto from = std::lower_bound(strips_before.begin(), strips_before.end(), all * part / team.size);
      return from - strips_before.begin();
    };
    Strip two[2][kChunk];
    int64_t shaped = 0, count = 0, coming = 0;
    const int64_t end = bound(thread + 1);
    for (int64_t next = bound(thread); next < end; next++) {
      const Piece& piece = pieces[next];
      const Segment& segment = segments[piece.segment];
      const int64_t rows = segment.count * groups, index = piece.segment * a.kv_heads + piece.head;
      if (shaped != rows) B::begin(rows);
      Strip *own = two[next % 2], *following = two[1 - next % 2];
      count = shaped ? coming : fill(piece, own);
      coming = next + 1 < end ? fill(pieces[next + 1], following) : 0;
      shaped = rows;
      const int64_t part = first_part[index] + piece.chunk * rows;
      const auto* queries = static_cast<const Scalar*>(segment.queries) + piece.head * padded(rows, kTileRows) * a.head_dim;
      B::attend(own, count, queries, rows, a.head_dim, Sight{&segment, groups}, following, coming,
                scratch + thread * scratch_size, tops + part, sums + part, parts + part * a.head_dim);
    }
    if (shaped) B::end();
    team.wait();
    const Range units = share(tokens * a.heads, thread, team);
    for (int64_t unit = units.from; unit < units.to; unit++) {
      const int64_t token = unit / a.heads, head = unit % a.heads;
      const Segment& segment = segments[owner[token]];
      const int64_t rows = segment.count * groups, index = owner[token] * a.kv_heads + head / groups;
      const int64_t part = first_part[index], row = (token - segment.first) * groups + head % groups;
      const int64_t chunks = Strips<Scalar>(segment, a, job.block_size).chunks(head / groups);
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
  int64_t fill(const Piece& piece, Strip* out) const {
    return Strips<Scalar>(segments[piece.segment], a, job.block_size).fill(piece.head, piece.chunk, out);
  }

  float* scores_of(int64_t s, int64_t head) { return scores + first_score[s] + head * 2 * segments[s].whole; }
};

template <typename B>
void attention_half(AttentionHalf<B>& half, int parts, Laps& laps, int thread, Team& team) {
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
}

// The feed-forward half in the order of its stages.
template <typename B>
struct FeedForwardHalf {
  using Scalar = typename B::Scalar;
  const FeedForward& f;
  const int64_t tokens, stride, width;
  Scalar *hidden, *normed, *gated;
  float* scratch;

  FeedForwardHalf(const FeedForward& layer, int64_t rows, void* states, int threads)
      : f(layer), tokens(rows), stride(padded(f.gate_up->inputs, kStep)), width(padded(f.down->inputs, kStep)),
        hidden(static_cast<Scalar*>(states)) {
    Arena& arena = Arena::fresh();
    normed = panel_of<B>(arena, tokens, f.gate_up->inputs);
    gated = panel_of<B>(arena, tokens, f.down->inputs);
    scratch = arena.take<float>(threads * 2 * stride);
  }

  void run(int thread, Team& team) {
    float* own = scratch + thread * 2 * stride;
    prepare<B>(hidden, f.norm, f.eps, f.gate_up->inputs, share(tokens, thread, team), normed, stride, own);
    team.wait();
    const Matrix& m = *f.gate_up;
    B::begin(tokens);
    B::multiply(m, share(m.groups, thread, team), normed, stride, tokens,
                [&](int64_t row, int64_t group, const float* low, const float* high) {
                  alignas(64) float gates[16], ups[16];
                  for (int64_t i = 0; i < 16; i++) {
                    gates[i] = low[i] + (m.bias ? m.bias[group * 16 + i] : 0.0f);
                    ups[i] = high[i] + (m.bias ? m.bias[m.pair + group * 16 + i] : 0.0f);
                  }
                  B::gate(gates, ups, gates);
                  B::narrow(gates, std::integral_constant<int64_t, 16>{}, gated + row * width + group * 16);
                });
    team.wait();
    add_product<B>(*f.down, share(f.down->groups, thread, team), gated, width, tokens, hidden);
    B::end();
    team.wait();
  }
};

// All jobs one after the other; the threads stay together.
template <typename B>
void run_jobs(const Job* jobs, int64_t number, int64_t tokens, void* hidden, double* seconds) {
  Laps laps(seconds);
  std::optional<AttentionHalf<B>> attention;
  std::optional<FeedForwardHalf<B>> feed_forward;
  std::optional<SparseFeedForwardHalf<B>> sparse;
  std::atomic<bool> failed{false};
  together([&](int thread, Team& team) {
    for (const Job* job = jobs; job < jobs + number; job++) {
      if (thread == 0) {
        try {
          if (job->attention)
            attention.emplace(*job, tokens, hidden, team.size);
          else if (job->sparse)
            sparse.emplace(*job, tokens, hidden, team.size);
          else
            feed_forward.emplace(*job->feed_forward, tokens, hidden, team.size);
        } catch (const std::bad_alloc&) {
          failed = true;
        }
      }
      team.wait();
      if (failed) return;
      if (job->attention) {
        attention_half(*attention, job->parts, laps, thread, team);
        continue;
      }
      if (job->sparse)
        sparse->run(thread, team);
      else
        feed_forward->run(thread, team);
      if (thread == 0) laps.lap(kFeedForward);
    }
  });
  if (failed) throw std::bad_alloc();
}

template <typename B>
void linear(const Matrix& m, const void* norm, float eps, const void* rows, int64_t tokens, void* out) {
  using Scalar = typename B::Scalar;
  const int64_t stride = padded(m.inputs, kStep);
  Arena& arena = Arena::fresh();
  Scalar* panel = panel_of<B>(arena, tokens, m.inputs);
  float* scratch = arena.take<float>(at::get_num_threads() * 2 * stride);
  together([&](int thread, Team& team) {
    prepare<B>(static_cast<const Scalar*>(rows), norm, eps, m.inputs, share(tokens, thread, team), panel, stride,
               scratch + thread * 2 * stride);
    team.wait();
    B::begin(tokens);
    B::multiply(m, share(m.groups, thread, team), panel, stride, tokens,
                [&](int64_t row, int64_t group, const float* low, const float* high) {
                  both_columns(m, group, low, high, [&](int64_t column, auto count, float* values) {
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

// Each job in turn changes hidden [tokens, hidden]: attention to hidden + output(attention(norm(hidden))), feed-forward
// to hidden + down(silu(gate(x)) * up(x)) with x = norm(hidden).
extern "C" int decoder_layer_run(int format, const Job* jobs, int64_t number, int64_t tokens, void* hidden,
                                 double* seconds) {
  return with_kernels(
      format, [&](auto kernels) { run_jobs<decltype(kernels)>(jobs, number, tokens, hidden, seconds); });
}

// out [tokens, outputs] = rows [tokens, inputs] * weights, the rows normed first unless norm is null.
extern "C" int decoder_layer_linear(int format, const Matrix* matrix, const void* norm, float eps, const void* rows,
                                    int64_t tokens, void* out) {
  return with_kernels(
      format, [&](auto kernels) { linear<decltype(kernels)>(*matrix, norm, eps, rows, tokens, out); });
}
