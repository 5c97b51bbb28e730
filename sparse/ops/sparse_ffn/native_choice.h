// Which channels a step keeps, by their magnitudes.
#pragma once

#include <array>
#include <cmath>
#include <functional>
#include <vector>

#include "native.h"

namespace sparse_ffn {

// The bits of a magnitude: ordered like the magnitudes themselves, NaN above infinity.
inline uint32_t order(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits & 0x7fffffffu;
}

// How much each channel counts: the maximum over the rows (weights null) or a weighted sum of magnitudes.
template <typename T>
void magnitudes(const T* activations, const float* weights, int64_t count, int64_t width, uint32_t* out) {
  std::vector<float> sums(weights ? width : 0);
  std::fill_n(out, width, 0u);
  for (int64_t row = 0; row < count; row++) {
    const T* own = activations + row * width;
    if (weights)
      for (int64_t c = 0; c < width; c++) sums[c] += weights[row] * std::fabs(widen(own[c]));
    else
      for (int64_t c = 0; c < width; c++) out[c] = std::max(out[c], order(widen(own[c])));
  }
  if (weights)
    for (int64_t c = 0; c < width; c++) out[c] = order(sums[c]);
}

// The keep-th largest value: first its leading bits by counting, then the value among those that share them.
inline uint32_t threshold_of(const uint32_t* values, int64_t width, int64_t keep) {
  constexpr int kShift = 20;
  std::array<int32_t, (1u << (31 - kShift))> counts{};
  for (int64_t c = 0; c < width; c++) counts[values[c] >> kShift]++;
  int64_t above = 0;
  auto lead = static_cast<int64_t>(counts.size()) - 1;
  while (above + counts[lead] < keep) above += counts[lead--];
  std::vector<uint32_t> close;
  close.reserve(counts[lead]);
  for (int64_t c = 0; c < width; c++)
    if (values[c] >> kShift == static_cast<uint32_t>(lead)) close.push_back(values[c]);
  std::nth_element(close.begin(), close.begin() + (keep - above - 1), close.end(), std::greater<uint32_t>());
  return close[keep - above - 1];
}

inline int64_t choose(const uint32_t* values, int64_t width, int64_t keep, uint32_t threshold, int64_t* out) {
  int64_t ties = width, found = 0;
  if (keep > 0) {
    threshold = threshold_of(values, width, keep);
    ties = keep - std::count_if(values, values + width, [&](uint32_t value) { return value > threshold; });
  }
  for (int64_t c = 0; c < width; c++) {
    const bool tied = values[c] == threshold && ties > 0;
    ties -= tied;
    out[found] = c;
    found += values[c] > threshold || tied;
  }
  if (found == 0) out[found++] = std::max_element(values, values + width) - values;
  return found;
}

}  // namespace sparse_ffn
