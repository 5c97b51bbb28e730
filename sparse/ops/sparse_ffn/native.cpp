// Sparse feed-forward product on the CPU: out[r] = sum over chosen c of act[r, c] * <x[r], up[c]> * down[c].
//
// channels is [width, 2 * hidden], a channel's row of up and column of down side by side; only the chosen rows are
// read. Every thread takes a range of the chosen channels and sums them in fp32 apart from the others; the ranges are
// added and rounded once at the end. Within a range the channels go in small blocks: first the dot products with up,
// then the weighted sum of down.

#include <ATen/Parallel.h>

#include <vector>

#include "native.h"
#include "native_bf16.h"
#include "native_choice.h"

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
