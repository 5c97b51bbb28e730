// The feed-forward half of a layer whose channels are chosen (METHOD section 3), in the order of its stages.
#pragma once

#include <optional>

#include "../sparse_ffn/native_bf16.h"
#include "../sparse_ffn/native_choice.h"
#include "stages.h"

namespace decoder_layer {

template <typename B>
struct ChosenChannels;

template <>
struct ChosenChannels<Portable> {
  using Kernel = sparse_ffn::Portable<float>;
  using Number = float;
};

#ifdef WITH_TILES
template <>
struct ChosenChannels<Tiled> {
  using Kernel = sparse_ffn::Tiles;
  using Number = native::BFloat16;
};
#endif

template <typename B>
struct SparseFeedForwardHalf {
  using Scalar = typename B::Scalar;
  using Kernel = typename ChosenChannels<B>::Kernel;
  using Number = typename ChosenChannels<B>::Number;
  const SparseFeedForward& f;
  const Job& job;
  const int64_t tokens, stride, summed;  // rows; values from one row of the panel, and of sums, to the next
  Scalar *hidden, *normed, *rows, *activations, *outputs;
  float *scratch, *sums;
  std::vector<uint32_t> magnitudes;
  sparse_ffn::Problem problem{};
  std::optional<Kernel> kernel;

  SparseFeedForwardHalf(const Job& todo, int64_t count, void* states, int threads)
      : f(*todo.sparse), job(todo), tokens(count), stride(padded(f.hidden, kStep)),
        summed(padded(f.hidden, sparse_ffn::kLanes)), hidden(static_cast<Scalar*>(states)), magnitudes(f.width) {
    Arena& arena = Arena::fresh();
    normed = panel_of<B>(arena, tokens, f.hidden);
    rows = arena.take<Scalar>(tokens * f.hidden);
    activations = arena.take<Scalar>(tokens * f.width);
    outputs = arena.take<Scalar>(tokens * f.hidden);
    scratch = arena.take<float>(threads * 2 * stride);
    sums = arena.take<float>(threads * tokens * summed);
    int64_t* index = job.chosen + 1;
    problem = {rows, activations, f.channels, index, tokens, f.hidden, f.width, 0, 2 * f.hidden};
  }

  void run(int thread, Team& team) {
    const Range own = share(tokens, thread, team);
    prepare<B>(hidden, f.norm, f.eps, f.hidden, own, normed, stride, scratch + thread * 2 * stride);
    for (int64_t row = own.from; row < own.to; row++) std::copy_n(normed + row * stride, f.hidden, rows + row * f.hidden);
    team.wait();
    gates(thread, team);
    team.wait();
    if (thread == 0) choose();
    team.wait();
    sum(thread, team);
    team.wait();
    for (int64_t row = own.from; row < own.to; row++) finish(row, team.size);
    team.wait();
  }

 private:
  void gates(int thread, Team& team) {
    B::begin(tokens);
    const Matrix& m = *f.gate;
    B::multiply(m, share(m.groups, thread, team), normed, stride, tokens,
                [&](int64_t row, int64_t group, const float* low, const float* high) {
                  both_columns(m, group, low, high, [&](int64_t column, auto count, float* values) {
                    alignas(64) float ones[16], gated[16] = {};
                    std::fill_n(ones, 16, 1.0f);
                    std::copy_n(values, count, gated);
                    B::gate(gated, ones, gated);
                    B::narrow(gated, count, activations + row * f.width + column);
                  });
                });
    B::end();
  }

  void choose() {
    const auto* own = reinterpret_cast<const Number*>(activations);
    sparse_ffn::magnitudes(own, job.survival, job.ranked, f.width, magnitudes.data());
    problem.chosen =
        sparse_ffn::choose(magnitudes.data(), f.width, job.keep, sparse_ffn::order(job.threshold), job.chosen + 1);
    job.chosen[0] = problem.chosen;
    kernel.emplace(problem);
    kernel->target = outputs;
  }

  void sum(int thread, Team& team) {
    float* own = sums + thread * tokens * summed;
    std::fill_n(own, tokens * summed, 0.0f);
    const Range part = share(problem.chosen, thread, team);
    for (int64_t from = part.from; from < part.to; from += Kernel::kBlock)
      kernel->block(from, std::min(from + Kernel::kBlock, part.to), part.to, own, summed);
  }

  void finish(int64_t row, int threads) {
    float* total = sums + row * summed;
    for (int64_t other = 1; other < threads; other++)
      for (int64_t i = 0; i < summed; i++) total[i] += sums[(other * tokens + row) * summed + i];
    kernel->store(total, row);
    float before[16], added[16];
    for (int64_t from = 0; from < f.hidden; from += 16) {
      const int64_t count = std::min<int64_t>(16, f.hidden - from);
      Scalar* to = hidden + row * f.hidden + from;
      B::widen(to, count, before);
      B::widen(outputs + row * f.hidden + from, count, added);
      for (int64_t i = 0; i < count; i++) before[i] += added[i];
      B::narrow(before, count, to);
    }
  }
};

}  // namespace decoder_layer
