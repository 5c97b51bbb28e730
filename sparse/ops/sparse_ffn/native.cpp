// Sparse feed-forward product on the CPU: out[r] = sum over chosen c of act[r, c] * <x[r], up[c]> * down[c].
//
// channels is [width, 2 * hidden], a channel's row of up and column of down side by side; only the chosen rows are
// read. Every thread takes a range of the chosen channels and sums them in fp32 apart from the others; the ranges are
// added and rounded once at the end. Within a range the channels go in small blocks: first the dot products with up,
// then the weighted sum of down.

#include <ATen/Parallel.h>

#include <array>
#include <cmath>
#include <functional>
#include <vector>

#include "native.h"
#include "native_bf16.h"

namespace sparse_ffn {
namespace {

template <typename Kernel>
int run(const Problem& p, void* out) {
  Kernel kernel(p);
  kernel.target = out;
  const int64_t stride = (p.hidden + kLanes - 1) / kLanes * kLanes;
  const int64_t ranges = std::clamp<int64_t>(p.chosen / 16, 1, at::get_num_threads());
  auto sums = aligned<float>(ranges * p.count * stride);
  at::parallel_for(0, ranges, 1, [&](int64_t begin, int64_t stop) {
    for (int64_t range = begin; range < stop; range++) {
      float* own = sums.get() + range * p.count * stride;
      std::fill_n(own, p.count * stride, 0.0f);
      const int64_t end = p.chosen * (range + 1) / ranges;
      for (int64_t from = p.chosen * range / ranges; from < end; from += Kernel::kBlock)
        kernel.block(from, std::min(from + Kernel::kBlock, end), end, own, stride);
    }
  });
  for (int64_t range = 1; range < ranges; range++)
    for (int64_t j = 0; j < p.count * stride; j++) sums[j] += sums[range * p.count * stride + j];
  for (int64_t row = 0; row < p.count; row++) kernel.store(sums.get() + row * stride, row);
  return 0;
}

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
uint32_t threshold_of(const uint32_t* values, int64_t width, int64_t keep) {
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

int64_t choose(const uint32_t* values, int64_t width, int64_t keep, uint32_t threshold, int64_t* out) {
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

}  // namespace
}  // namespace sparse_ffn

#include "native_experts.h"
#include "native_layer.h"

// Chooses channels by magnitude, ascending, at least one: the `keep` largest, or with keep = 0 those of at least
// `threshold`. activations is [count, width] in fp32 (kernel 0) or bfloat16; weights is null for the maximum over the
// rows. Returns how many were chosen, the first so many of out [width + 1], or -1 without memory.
extern "C" int64_t sparse_ffn_select(int kernel, const void* activations, const float* weights, int64_t count,
                                     int64_t width, int64_t keep, float threshold, int64_t* out) {
  using namespace sparse_ffn;
  try {
    std::vector<uint32_t> values(width);
    if (kernel == 0)
      magnitudes(static_cast<const float*>(activations), weights, count, width, values.data());
    else
      magnitudes(static_cast<const BFloat16*>(activations), weights, count, width, values.data());
    return choose(values.data(), width, keep, order(threshold), out);
  } catch (const std::bad_alloc&) {
    return -1;
  }
}

// The fastest kernel for bfloat16 here: 1 portable, 2 dot products, 3 tiles. All smaller ones run too; 0 is fp32.
extern "C" int sparse_ffn_best() {
#ifdef WITH_TILES
  if (sparse_ffn::tiles_granted()) return 3;
#endif
#ifdef __AVX512BF16__
  return 2;
#else
  return 1;
#endif
}

// All tensors are contiguous. Returns 0; 1 where an index lies outside [0, width); 2 where the kernel does not run
// here; 3 without memory.
extern "C" int sparse_ffn_run(int kernel, const void* rows, const void* activations, const void* channels,
                          const int64_t* index, int64_t count, int64_t hidden, int64_t width, int64_t chosen,
                          void* out) {
  if (!std::all_of(index, index + chosen, [&](int64_t at) { return at >= 0 && at < width; })) return 1;
  using namespace sparse_ffn;
  const Problem problem{rows, activations, channels, index, count, hidden, width, chosen, 2 * hidden};
  try {
    if (kernel == 0) return run<Portable<float>>(problem, out);
    if (kernel == 1) return run<Portable<BFloat16>>(problem, out);
#ifdef __AVX512BF16__
    if (kernel == 2) return run<DotProduct>(problem, out);
#endif
#ifdef WITH_TILES
    if (kernel == 3 && tiles_granted()) return run<Tiles>(problem, out);
#endif
  } catch (const std::bad_alloc&) {
    return 3;
  }
  return 2;
}
