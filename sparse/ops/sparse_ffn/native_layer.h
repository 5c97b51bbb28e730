// A whole sparse FFN layer in one call: the gates of all channels, the choice, and the chosen channels.
#pragma once

#include <cmath>

#include "native_bf16.h"

#ifdef WITH_TILES

namespace sparse_ffn {

// silu(<x, gate>) with tile registers; rows of gate are read where they lie, sixteen channels to a tile. Needs hidden
// and width to be multiples of 32.
struct Gates : TilesOf<false> {
  using TilesOf<false>::TilesOf;

  // Channels from .. to for all rows, into activations [count, width].
  void run(const uint16_t* gate, int64_t from, int64_t to, BFloat16* activations) const {
    for (int64_t row = 0; row < p.count; row += kRows) {
      TileShapes shapes;
      std::fill_n(shapes.bytes, 8, uint16_t{64});
      std::fill_n(shapes.rows, 8, uint8_t{16});
      load_shapes(shapes);
      for (int64_t first = from; first < to; first += kBlock) one(gate, first, to, row, activations);
      _tile_release();
    }
  }

 private:
  void one(const uint16_t* gate, int64_t first, int64_t to, int64_t row, BFloat16* activations) const {
    const uint16_t* x = pairs.get() + row / kRows * steps * kTile;
    const uint16_t* w = gate + first * p.hidden;
    const int64_t ahead = first + kBlock < to ? kBlock * p.hidden : 0, bytes = p.hidden * sizeof(uint16_t);
    _tile_zero(0);
    _tile_zero(1);
    for (int64_t step = 0; step < steps; step++, w += kLanes) {
      if (ahead)
        for (int64_t k = 0; k < kBlock; k++) fetch(w + ahead + k * p.hidden, 0);
      _tile_loadd(2, w, bytes);
      _tile_loadd(3, w + 16 * p.hidden, bytes);
      _tile_loadd(4, x + step * kTile, 64);
      _tile_dpbf16ps(0, 2, 4);
      _tile_dpbf16ps(1, 3, 4);
    }
    alignas(64) float gates[kBlock][kRows];
    _tile_stored(0, gates, 64);
    _tile_stored(1, gates[16], 64);
    for (int64_t k = 0; k < kBlock; k++) _mm512_store_ps(gates[k], silu(_mm512_load_ps(gates[k])));
    for (int64_t r = row; r < std::min(row + kRows, p.count); r++)
      for (int64_t k = 0; k < kBlock; k++) narrow(gates[k][r - row], activations + r * p.width + first + k);
  }
};

}  // namespace sparse_ffn

#endif

// gate is [width, hidden]; `ranked` rows say which channels count, the others as in sparse_ffn_select. Writes the
// chosen channels to index [width + 1] and the output to out. Returns how many were chosen, -1 without memory, -2 where
// the kernel does not run.
extern "C" int64_t sparse_ffn_layer(const void* rows, const void* gate, const void* channels, const float* weights,
                                    int64_t count, int64_t hidden, int64_t width, int64_t ranked, int64_t keep,
                                    float threshold, int64_t* index, void* out) {
#ifdef WITH_TILES
  using namespace sparse_ffn;
  if (!tiles_granted() || hidden % kLanes || width % kLanes) return -2;
  try {
    std::vector<BFloat16> activations(count * width);
    Problem problem{rows, activations.data(), channels, index, count, hidden, width, 0, 2 * hidden};
    const Gates gates(problem);
    const int64_t blocks = width / kLanes, threads = std::min<int64_t>(blocks, at::get_num_threads());
    at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t stop) {
      for (int64_t part = begin; part < stop; part++)
        gates.run(static_cast<const uint16_t*>(gate), blocks * part / threads * kLanes,
                  blocks * (part + 1) / threads * kLanes, activations.data());
    });
    std::vector<uint32_t> values(width);
    magnitudes(activations.data(), weights, ranked, width, values.data());
    problem.chosen = choose(values.data(), width, keep, order(threshold), index);
    run<Tiles>(problem, out);
    return problem.chosen;
  } catch (const std::bad_alloc&) {
    return -1;
  }
#else
  return -2;
#endif
}
