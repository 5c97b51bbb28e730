// Kernels for bfloat16 on x86: dot-product instructions (AVX512-BF16) and, where present, tile registers (AMX-BF16).
#pragma once

#include "native.h"
#include "tiles.h"

#ifdef __AVX512BF16__

namespace sparse_ffn {

// What both bfloat16 kernels share: rows of channels in steps of 32 columns. unpacklo and unpackhi of two channels
// leave every 32 columns in an order of their own; the partial sums keep it until they are stored.
struct Steps {
  const Problem& p;
  const int64_t steps;
  const __mmask32 tail;
  void* target = nullptr;

  explicit Steps(const Problem& problem)
      : p(problem),
        steps((problem.hidden + kLanes - 1) / kLanes),
        tail(problem.hidden % kLanes ? (1u << (problem.hidden % kLanes)) - 1 : ~0u) {}

  __mmask32 mask(int64_t step) const { return step + 1 < steps ? ~0u : tail; }

  const uint16_t* channel(int64_t at) const {
    return static_cast<const uint16_t*>(p.channels) + p.index[at] * p.stride + p.stride - 2 * p.hidden;
  }

  __m512i load(const uint16_t* row, int64_t step) const {
    return _mm512_maskz_loadu_epi16(mask(step), row + step * kLanes);
  }

  static void fetch(const uint16_t* row, int64_t step) {
    _mm_prefetch(reinterpret_cast<const char*>(row + step * kLanes), _MM_HINT_T0);
  }

  float activation(int64_t row, int64_t at) const {
    return widen(static_cast<const BFloat16*>(p.activations)[row * p.width + p.index[at]]);
  }

  void store(const float* sums, int64_t row) const {
    const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
    uint16_t* out = static_cast<uint16_t*>(target) + row * p.hidden;
    for (int64_t step = 0; step < steps; step++) {
      const __m512 low = _mm512_load_ps(sums + step * kLanes), high = _mm512_load_ps(sums + step * kLanes + 16);
      const __m512 left = _mm512_permutex2var_ps(low, first, high), right = _mm512_permutex2var_ps(low, second, high);
      _mm512_mask_storeu_epi16(out + step * kLanes, mask(step), (__m512i)_mm512_cvtne2ps_pbh(right, left));
    }
  }
};

// The sums of four vectors.
inline __m128 sums_of(__m512 a, __m512 b, __m512 c, __m512 d) {
  const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
  const __m512 all = _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
  return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

// bfloat16 with dot-product instructions, at most eight rows at a time.
struct DotProduct : Steps {
  static constexpr int64_t kBlock = 24, kRows = 8;
  using Pairs = uint16_t[kBlock / 2][kRows][2];            // act * <x, up>, neighbouring channels side by side
  std::unique_ptr<uint16_t[], decltype(&std::free)> rows;  // [count, steps * kLanes], padded with zeros

  explicit DotProduct(const Problem& problem) : Steps(problem), rows(aligned<uint16_t>(p.count * steps * kLanes)) {
    const auto* source = static_cast<const uint16_t*>(p.rows);
    for (int64_t r = 0; r < p.count; r++) {
      uint16_t* row = rows.get() + r * steps * kLanes;
      std::memcpy(row, source + r * p.hidden, p.hidden * sizeof(uint16_t));
      std::fill(row + p.hidden, row + steps * kLanes, uint16_t{0});
    }
  }

  void block(int64_t from, int64_t to, int64_t end, float* sums, int64_t stride) const {
    for (int64_t row = 0; row < p.count; row += kRows) {
      switch (std::min(kRows, p.count - row)) {
        case 1: rows_of_block<1>(row, from, to, end, sums, stride); break;
        case 2: rows_of_block<2>(row, from, to, end, sums, stride); break;
        case 3: rows_of_block<3>(row, from, to, end, sums, stride); break;
        case 4: rows_of_block<4>(row, from, to, end, sums, stride); break;
        case 5: rows_of_block<5>(row, from, to, end, sums, stride); break;
        case 6: rows_of_block<6>(row, from, to, end, sums, stride); break;
        case 7: rows_of_block<7>(row, from, to, end, sums, stride); break;
        default: rows_of_block<8>(row, from, to, end, sums, stride);
      }
    }
  }

  template <int R>
  void rows_of_block(int64_t row, int64_t from, int64_t to, int64_t end, float* sums, int64_t stride) const {
    Pairs pairs = {};
    project_up<R>(row, from, to, end, pairs);
    project_down<R>(from, to, pairs, sums + row * stride, stride);
  }

  template <int R>
  void project_up(int64_t row, int64_t from, int64_t to, int64_t end, Pairs& pairs) const {
    constexpr int kTile = R > 6 ? 3 : 4;  // channels whose dot products with R rows fit into the registers
    const uint16_t* x = rows.get() + row * steps * kLanes;
    for (int64_t first = from; first < to; first += kTile) {
      const uint16_t *w[kTile], *next[kTile];
      for (int k = 0; k < kTile; k++) {
        w[k] = channel(std::min(first + k, to - 1));
        next[k] = channel(std::min(first + k + kBlock, end - 1));
      }
      __m512 dots[kTile * R + 3];
      for (auto& dot : dots) dot = _mm512_setzero_ps();
      for (int64_t step = 0; step < steps; step++) {
        __m512i weights[kTile];
        for (int k = 0; k < kTile; k++) {
          weights[k] = load(w[k], step);
          fetch(w[k] + p.hidden, step);
          fetch(next[k], step);
        }
        for (int r = 0; r < R; r++) {
          const __m512i values = _mm512_load_si512(x + (r * steps + step) * kLanes);
          for (int k = 0; k < kTile; k++)
            dots[k * R + r] = _mm512_dpbf16_ps(dots[k * R + r], (__m512bh)weights[k], (__m512bh)values);
        }
      }
      alignas(16) float products[kTile * R + 3] = {};
      for (int i = 0; i < kTile * R; i += 4)
        _mm_store_ps(products + i, sums_of(dots[i], dots[i + 1], dots[i + 2], dots[i + 3]));
      for (int64_t at = first; at < std::min(first + kTile, to); at++)
        for (int r = 0; r < R; r++) {
          BFloat16 rounded;
          narrow(products[(at - first) * R + r] * activation(row + r, at), &rounded);
          pairs[(at - from) / 2][r][(at - from) % 2] = rounded.bits;
        }
    }
  }

  template <int R>
  void project_down(int64_t from, int64_t to, const Pairs& pairs, float* sums, int64_t stride) const {
    const uint16_t* w[kBlock];
    for (int64_t k = 0; k < kBlock; k++) w[k] = channel(std::min(from + k, to - 1)) + p.hidden;
    for (int64_t step = 0; step < steps; step++) {
      float* out = sums + step * kLanes;
      __m512 low[R], high[R];
      for (int r = 0; r < R; r++) {
        low[r] = _mm512_load_ps(out + r * stride);
        high[r] = _mm512_load_ps(out + r * stride + 16);
      }
      for (int64_t k = 0; k < to - from; k += 2) {
        const __m512i one = load(w[k], step), two = load(w[k + 1], step);
        const auto lower = (__m512bh)_mm512_unpacklo_epi16(one, two);
        const auto upper = (__m512bh)_mm512_unpackhi_epi16(one, two);
        for (int r = 0; r < R; r++) {
          int pair;
          std::memcpy(&pair, pairs[k / 2][r], sizeof pair);
          const auto factor = (__m512bh)_mm512_set1_epi32(pair);
          low[r] = _mm512_dpbf16_ps(low[r], lower, factor);
          high[r] = _mm512_dpbf16_ps(high[r], upper, factor);
        }
      }
      for (int r = 0; r < R; r++) {
        _mm512_store_ps(out + r * stride, low[r]);
        _mm512_store_ps(out + r * stride + 16, high[r]);
      }
    }
  }
};

#ifdef WITH_TILES

// bfloat16 with tile registers, at most sixteen rows at a time. Tiles hold 16 rows of 32 bfloat16 or 16 fp32 values:
// 0 and 1 the dot products of 16 channels each, 2 and 3 weights, 4 pairs of columns of x, 5 factors, 6 and 7 sums.
//
// Gated, a channel's row of gate stands before its row of up, and the activation is silu(<x, gate>) times the scale of
// the expert that the channel belongs to; 6 and 7 first hold the dot products with gate.
template <bool kGated>
struct TilesOf : Steps {
  static constexpr int64_t kBlock = 32, kRows = 16;
  static constexpr int64_t kTile = 512;  // bfloat16 values of a tile
  static constexpr int64_t kParts = kGated ? 2 : 1;  // matrices that x is multiplied with
  static constexpr int64_t kChunk = 4;   // steps whose weights are copied side by side before they are multiplied
  static constexpr int64_t kAhead = 16;  // channels between the row of up being read and the one being fetched
  using Factors = uint16_t[kRows][kBlock];                  // act * <x, up>
  std::unique_ptr<uint16_t[], decltype(&std::free)> pairs;  // [count / kRows, steps, 16 pairs of columns, kRows, 2]

  explicit TilesOf(const Problem& problem)
      : Steps(problem), pairs(aligned<uint16_t>((problem.count + kRows - 1) / kRows * steps * kTile)) {
    std::fill_n(pairs.get(), (p.count + kRows - 1) / kRows * steps * kTile, uint16_t{0});
    for (int64_t r = 0; r < p.count; r++) {
      const uint16_t* source = static_cast<const uint16_t*>(p.rows) + r * p.hidden;
      uint16_t* to = pairs.get() + r / kRows * steps * kTile + r % kRows * 2;
      for (int64_t j = 0; j + 1 < p.hidden; j += 2) std::memcpy(to + j * kRows, source + j, 2 * sizeof(uint16_t));
      if (p.hidden % 2) to[(p.hidden - 1) * kRows] = source[p.hidden - 1];
    }
  }

  void block(int64_t from, int64_t to, int64_t end, float* sums, int64_t stride) const {
    for (int64_t row = 0; row < p.count; row += kRows) {
      const int64_t height = std::min(kRows, p.count - row);
      TileShapes shapes;
      std::fill_n(shapes.bytes, 8, uint16_t{64});
      std::fill_n(shapes.rows, 8, uint8_t{16});
      if (!kGated) std::fill_n(shapes.rows + 5, 3, static_cast<uint8_t>(height));
      load_shapes(shapes);
      alignas(64) Factors factors = {};
      project_up(row, height, from, to, end, factors);
      if (kGated) {
        std::fill_n(shapes.rows + 5, 3, static_cast<uint8_t>(height));
        load_shapes(shapes);
      }
      project_down(from, to, factors, sums + row * stride, stride);
      _tile_release();
    }
  }

  // Copies are one chunk or step ahead of the products that read them: a tile cannot be loaded from stores in flight.
  void project_up(int64_t row, int64_t height, int64_t from, int64_t to, int64_t end, Factors& factors) const {
    alignas(64) uint16_t weights[2][kParts][kChunk * 2 * kTile];
    const uint16_t* x = pairs.get() + row / kRows * steps * kTile;
    const auto copy = [&](int64_t begin) {
      const int64_t stop = std::min(begin + kChunk, steps);
      for (int64_t k = 0; k < kBlock; k++) {
        const uint16_t *w = channel(std::min(from + k, to - 1)), *next = channel(std::min(from + k + kAhead, end - 1));
        for (int64_t part = 0; part < kParts; part++) {
          uint16_t* copied = weights[begin / kChunk % 2][part] + k * kLanes;
          for (int64_t step = begin; step < stop; step++, copied += 2 * kTile) {
            _mm512_store_si512(copied, load(w - part * p.hidden, step));
            fetch(next - part * p.hidden, step);
            if (part == 0) fetch(w + p.hidden, step);
          }
        }
      }
    };
    _tile_zero(0);
    _tile_zero(1);
    if constexpr (kGated) {
      _tile_zero(6);
      _tile_zero(7);
    }
    copy(0);
    for (int64_t begin = 0; begin < steps; begin += kChunk) {
      copy(begin + kChunk);
      const auto& copied = weights[begin / kChunk % 2];
      for (int64_t step = begin; step < std::min(begin + kChunk, steps); step++) {
        const int64_t at = (step - begin) * 2 * kTile;
        _tile_loadd(2, copied[0] + at, 64);
        _tile_loadd(3, copied[0] + at + kTile, 64);
        _tile_loadd(4, x + step * kTile, 64);
        _tile_dpbf16ps(0, 2, 4);
        _tile_dpbf16ps(1, 3, 4);
        if constexpr (kGated) {
          _tile_loadd(2, copied[1] + at, 64);
          _tile_loadd(3, copied[1] + at + kTile, 64);
          _tile_dpbf16ps(6, 2, 4);
          _tile_dpbf16ps(7, 3, 4);
        }
      }
    }
    alignas(64) float products[kBlock][kRows], gates[kBlock][kRows] = {};
    alignas(32) uint16_t rounded[kBlock][kRows];
    _tile_stored(0, products, 64);
    _tile_stored(1, products[16], 64);
    if constexpr (kGated) {
      _tile_stored(6, gates, 64);
      _tile_stored(7, gates[16], 64);
      const auto present = static_cast<__mmask16>((1u << height) - 1);
      for (int64_t k = 0; k < kBlock; k++) {
        const float* scale = p.scales + std::min(p.index[std::min(from + k, to - 1)] / p.expert_width, p.experts) * p.count;
        const __m512 scales = _mm512_maskz_loadu_ps(from + k < to ? present : __mmask16{0}, scale + row);
        _mm512_store_ps(gates[k], _mm512_maskz_mul_ps(present, silu(_mm512_load_ps(gates[k])), scales));
      }
    } else {
      for (int64_t at = from; at < to; at++)
        for (int64_t r = 0; r < height; r++) gates[at - from][r] = activation(row + r, at);
    }
    for (int64_t k = 0; k < kBlock; k++) {
      const __m512 factor = _mm512_mul_ps(_mm512_load_ps(products[k]), _mm512_load_ps(gates[k]));
      _mm256_store_si256(reinterpret_cast<__m256i*>(rounded[k]), (__m256i)_mm512_cvtneps_pbh(factor));
    }
    for (int64_t r = 0; r < height; r++)
      for (int64_t k = 0; k < kBlock; k++) factors[r][k] = rounded[k][r];
  }

  void project_down(int64_t from, int64_t to, const Factors& factors, float* sums, int64_t stride) const {
    const uint16_t* w[kBlock];
    for (int64_t k = 0; k < kBlock; k++) w[k] = channel(std::min(from + k, to - 1)) + p.hidden;
    alignas(64) uint16_t weights[2][2 * kTile];
    const auto interleave = [&](int64_t step) {
      uint16_t* lower = weights[step % 2];
      for (int64_t k = 0; k < kBlock; k += 2, lower += kLanes) {
        const __m512i one = load(w[k], step), two = load(w[k + 1], step);
        _mm512_store_si512(lower, _mm512_unpacklo_epi16(one, two));
        _mm512_store_si512(lower + kTile, _mm512_unpackhi_epi16(one, two));
      }
    };
    _tile_loadd(5, factors, 64);
    interleave(0);
    for (int64_t step = 0; step < steps; step++) {
      if (step + 1 < steps) interleave(step + 1);
      float* out = sums + step * kLanes;
      _tile_loadd(6, out, stride * sizeof(float));
      _tile_loadd(7, out + 16, stride * sizeof(float));
      _tile_loadd(2, weights[step % 2], 64);
      _tile_loadd(3, weights[step % 2] + kTile, 64);
      _tile_dpbf16ps(6, 5, 2);
      _tile_dpbf16ps(7, 5, 3);
      _tile_stored(6, out, stride * sizeof(float));
      _tile_stored(7, out + 16, stride * sizeof(float));
    }
  }
};

using Tiles = TilesOf<false>;
using GatedTiles = TilesOf<true>;

#endif

}  // namespace sparse_ffn

#endif
