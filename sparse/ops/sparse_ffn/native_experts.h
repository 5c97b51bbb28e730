// Mixture-of-experts layers of few rows: routing under a budget on the union, and many small experts side by side.
#pragma once

#include <algorithm>
#include <numeric>
#include <vector>

#include "native_bf16.h"

namespace sparse_ffn {

// Routes every row to its `top_k` most probable experts; with `limit` below the number of experts only among the
// `limit` experts of the largest summed weight (equal ones by number), the n-th row counting survival^n, so that an
// expert outside is replaced by the row's next best. Weights: 1 (unit), or probabilities scaled to the sum of the row's
// own top_k, that sum being 1 where `normalise`. counts: pairs wanted and kept, substituted pairs, distinct experts
// wanted and run.
struct Router {
  const float* probabilities;  // [count, experts]
  int64_t count, experts, top_k, limit;
  bool normalise, unit;
  float survival;

  void best(int64_t row, const std::vector<bool>& allowed, std::vector<int64_t>& out) const {
    const float* own = probabilities + row * experts;
    out.clear();
    for (int64_t e = 0; e < experts; e++)
      if (allowed[e]) out.push_back(e);
    const auto kept = std::min<int64_t>(top_k, out.size());
    std::partial_sort(out.begin(), out.begin() + kept, out.end(), [&](int64_t a, int64_t b) {
      return own[a] > own[b] || (own[a] == own[b] && a < b);
    });
    out.resize(kept);
  }

  void run(float* combine, int64_t* counts) const {
    std::vector<bool> allowed(experts, true);
    std::vector<std::vector<int64_t>> wanted(count);
    std::vector<float> sums(count), scores(experts, -1.0f);
    float weight = 1.0f;
    for (int64_t row = 0; row < count; row++, weight *= survival) {
      const float* own = probabilities + row * experts;
      best(row, allowed, wanted[row]);
      for (const int64_t e : wanted[row]) sums[row] += own[e];
      for (const int64_t e : wanted[row])
        scores[e] = std::max(scores[e], 0.0f) + own[e] / (normalise ? sums[row] : 1.0f) * weight;
    }
    if (limit < experts) {
      std::vector<int64_t> order(experts);
      std::iota(order.begin(), order.end(), 0);
      std::partial_sort(order.begin(), order.begin() + limit, order.end(), [&](int64_t a, int64_t b) {
        return scores[a] > scores[b] || (scores[a] == scores[b] && a < b);
      });
      std::fill(allowed.begin(), allowed.end(), false);
      for (int64_t place = 0; place < limit; place++) allowed[order[place]] = scores[order[place]] >= 0;
    }
    std::fill_n(combine, count * experts, 0.0f);
    std::fill_n(counts, 5, 0);
    std::vector<bool> ran(experts, false);
    std::vector<int64_t> chosen;
    for (int64_t row = 0; row < count; row++) {
      const float* own = probabilities + row * experts;
      if (limit < experts) best(row, allowed, chosen);
      else chosen = wanted[row];
      float total = 0;
      for (const int64_t e : chosen) total += own[e];
      for (const int64_t e : chosen) {
        combine[row * experts + e] = unit ? 1.0f : own[e] * ((normalise ? 1.0f : sums[row]) / total);
        counts[2] += std::find(wanted[row].begin(), wanted[row].end(), e) == wanted[row].end();
        ran[e] = true;
      }
      counts[0] += wanted[row].size();
      counts[1] += chosen.size();
    }
    counts[3] = std::count_if(scores.begin(), scores.end(), [](float score) { return score >= 0; });
    counts[4] = std::count(ran.begin(), ran.end(), true);
  }
};

}  // namespace sparse_ffn

// probabilities and combine are [count, experts] in fp32, counts [5]. Returns 0, or 3 without memory.
extern "C" int sparse_moe_route(const float* probabilities, int64_t count, int64_t experts, int64_t top_k,
                                int64_t limit, int normalise, int unit, float survival, float* combine,
                                int64_t* counts) {
  try {
    sparse_ffn::Router{probabilities, count, experts, top_k, limit, normalise != 0, unit != 0, survival}.run(combine,
                                                                                                          counts);
    return 0;
  } catch (const std::bad_alloc&) {
    return 3;
  }
}

// Experts of equal width side by side, the shared one last: channels is [width, 3 * hidden], gate, up and down of each.
// combine is [count, experts], zero where an expert does not run for a row; experts whose column is zero are not read.
// bfloat16 with tile registers only. Returns as sparse_ffn_run.
extern "C" int sparse_moe_run(const void* rows, const float* combine, const void* channels, int64_t count,
                              int64_t hidden, int64_t width, int64_t experts, int64_t expert_width, void* out) {
#ifdef WITH_TILES
  using namespace sparse_ffn;
  if (!tiles_granted()) return 2;
  try {
    std::vector<float> scales((experts + 1) * count, 1.0f);
    std::vector<int64_t> index;
    index.reserve(width);
    for (int64_t expert = 0; expert < experts; expert++) {
      bool runs = false;
      for (int64_t row = 0; row < count; row++) {
        scales[expert * count + row] = combine[row * experts + expert];
        runs |= combine[row * experts + expert] != 0;
      }
      for (int64_t at = 0; runs && at < expert_width; at++) index.push_back(expert * expert_width + at);
    }
    for (int64_t at = experts * expert_width; at < width; at++) index.push_back(at);
    Problem problem{rows, nullptr, channels, index.data(), count, hidden, width, static_cast<int64_t>(index.size())};
    problem.stride = 3 * hidden;
    problem.scales = scales.data();
    problem.experts = experts;
    problem.expert_width = expert_width;
    return run<GatedTiles>(problem, out);
  } catch (const std::bad_alloc&) {
    return 3;
  }
#else
  return 2;
#endif
}
