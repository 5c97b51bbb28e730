// What the FFN kernels share: the problem and the portable kernel.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>

#include "numbers.h"

namespace sparse_ffn {

using namespace native;

constexpr int64_t kLanes = 32;  // columns per step; rows of partial sums are padded to a multiple of it

struct Problem {
  const void* rows;         // [count, hidden]
  const void* activations;  // [count, width]
  const void* channels;     // [width, stride]; of each channel up and down stand in the last 2 * hidden places
  const int64_t* index;     // [chosen]
  int64_t count, hidden, width, chosen, stride;
  const float* scales = nullptr;  // gated: [experts, count] and ones [count] for the channels after the last expert's
  int64_t experts = 0, expert_width = 1;
};

// Any scalar type, vectorised by the compiler.
template <typename Scalar>
struct Portable {
  static constexpr int64_t kBlock = 4;
  const Problem& p;
  void* target = nullptr;

  explicit Portable(const Problem& problem) : p(problem) {}

  // Adds the chosen channels from .. to to the sums, [count, stride]; the range they belong to ends at end.
  void block(int64_t from, int64_t to, int64_t /* end */, float* sums, int64_t stride) const {
    const auto* rows = static_cast<const Scalar*>(p.rows);
    const auto* activations = static_cast<const Scalar*>(p.activations);
    const Scalar* w[kBlock];
    for (int64_t k = 0; k < kBlock; k++)
      w[k] = static_cast<const Scalar*>(p.channels) + p.index[std::min(from + k, to - 1)] * p.stride;
    for (int64_t r = 0; r < p.count; r++) {
      const Scalar* x = rows + r * p.hidden;
      float s0 = 0, s1 = 0, s2 = 0, s3 = 0;
#pragma omp simd reduction(+ : s0, s1, s2, s3)
      for (int64_t j = 0; j < p.hidden; j++) {
        const float v = widen(x[j]);
        s0 += v * widen(w[0][j]);
        s1 += v * widen(w[1][j]);
        s2 += v * widen(w[2][j]);
        s3 += v * widen(w[3][j]);
      }
      float a[kBlock] = {s0, s1, s2, s3};
      for (int64_t k = 0; k < kBlock; k++)
        a[k] = from + k < to ? a[k] * widen(activations[r * p.width + p.index[from + k]]) : 0.0f;
      const Scalar *d0 = w[0] + p.hidden, *d1 = w[1] + p.hidden, *d2 = w[2] + p.hidden, *d3 = w[3] + p.hidden;
      float* out = sums + r * stride;
#pragma omp simd
      for (int64_t j = 0; j < p.hidden; j++)
        out[j] += a[0] * widen(d0[j]) + a[1] * widen(d1[j]) + a[2] * widen(d2[j]) + a[3] * widen(d3[j]);
    }
  }

  // One row of sums, rounded, to the target.
  void store(const float* sums, int64_t row) const {
    Scalar* out = static_cast<Scalar*>(target) + row * p.hidden;
    for (int64_t j = 0; j < p.hidden; j++) narrow(sums[j], out + j);
  }
};

}  // namespace sparse_ffn
