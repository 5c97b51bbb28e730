// Products of panels with packed weights and attention to a chunk of positions in bfloat16, with tile registers.
//
// What a row gets does not depend on how many rows are computed with it, or in how many threads: each product runs over
// the inputs in the same order, and each row has its own maximum and sums.
#pragma once

#include "portable.h"
#include "tiles.h"

#ifdef WITH_TILES

namespace decoder_layer {

struct Tiled {
  using Scalar = uint16_t;
  static constexpr int64_t kTile = 512;        // bfloat16 values of a tile: 16 pairs of inputs, 16 outputs
  static constexpr int64_t kAhead = 4 * kTile;  // distance of the weights being fetched
  static constexpr int64_t kSpan = 2 * kStrip;  // positions of one product
  static constexpr int64_t kWidth = kChunk * kStrip + 16;  // values from one row of scores to the next

  // Tiles 0 to 3 are sums, 4 and 5 hold rows, 6 and 7 weights, keys or values.
  static void begin(int64_t rows) {
    native::TileShapes shapes;
    std::fill_n(shapes.bytes, 8, uint16_t{64});
    std::fill_n(shapes.rows, 6, static_cast<uint8_t>(std::min(rows, kTileRows)));
    std::fill_n(shapes.rows + 6, 2, uint8_t{16});
    native::load_shapes(shapes);
  }

  static void end() { _tile_release(); }

  template <typename Store>
  static void multiply(const Matrix& m, Range groups, const uint16_t* panel, int64_t stride, int64_t rows, Store&& store) {
    const int64_t steps = (m.inputs + kStep - 1) / kStep;
    alignas(64) float sums[4][kTileRows][16];
    for (int64_t group = groups.from; group < groups.to; group++) {
      const auto* weights = static_cast<const uint16_t*>(m.weights) + group * steps * 2 * kTile;
      for (int64_t row = 0; row < rows; row += 2 * kTileRows) {
        const bool two = rows - row > kTileRows;
        const uint16_t* x = panel + row * stride;
        if (two)
          two_tiles(weights, steps, x, stride, row == 0);
        else
          one_tile(weights, steps, x, stride, row == 0);
        _tile_stored(0, sums[0], 64);
        _tile_stored(1, sums[1], 64);
        if (two) {
          _tile_stored(2, sums[2], 64);
          _tile_stored(3, sums[3], 64);
        }
        for (int64_t r = 0; r < std::min(2 * kTileRows, rows - row); r++) {
          const int64_t tile = r / kTileRows * 2;
          store(row + r, group, sums[tile][r % kTileRows], sums[tile + 1][r % kTileRows]);
        }
      }
    }
  }

  static void attend(const Strip* strips, int64_t number, const uint16_t* queries, int64_t count, int64_t head_dim,
                     const Sight& sight, const Strip* coming, int64_t coming_number, float* scratch, float* top,
                     float* sum, float* out) {
    const int64_t spans = (number + 1) / 2, steps = head_dim / kStep, stride = steps * 2 * kTile + kStep;
    auto* keys = reinterpret_cast<uint16_t*>(scratch);
    uint16_t *values = keys + spans_of(head_dim), *weights = values + spans_of(head_dim);
    auto* scores = reinterpret_cast<float*>(weights + kTileRows * kWidth);
    const int64_t tiles = (count + kTileRows - 1) / kTileRows;
    Fetcher fetcher(coming, coming_number, head_dim, sizeof(uint16_t), spans * (tiles * (1 + steps) + count));
    pack_keys(strips, number, steps, stride, keys);
    pack_values(strips, number, steps, stride, values);
    uint32_t seen[kChunk / 2];
    bool all[kChunk / 2], whole = true;
    for (int64_t s = 0; s < spans; s++) {
      const Strip& last = strips[std::min(2 * s + 1, number - 1)];
      all[s] = 2 * s + 1 < number && strips[2 * s].count + last.count == kSpan && strips[2 * s].skip + last.skip == 0 &&
               std::max(strips[2 * s].position, last.position) + kStrip <= sight.segment->start;
      whole &= all[s];
    }
    for (int64_t row = 0; row < count; row += kTileRows) {
      const int64_t rows = std::min(kTileRows, count - row);
      score(queries + row * head_dim, keys, spans, steps, stride, scores, fetcher);
      for (int64_t r = 0; r < rows; r++) {
        float *line = scores + r * kWidth, *highest = top + row + r, *total = sum + row + r;
        if (whole) {
          soften<false>(line, seen, spans, weights + r * kWidth, highest, total, fetcher);
          continue;
        }
        for (int64_t s = 0; s < spans; s++) seen[s] = all[s] ? ~0u : bits(strips + 2 * s, number - 2 * s, sight, row + r);
        soften<true>(line, seen, spans, weights + r * kWidth, highest, total, fetcher);
      }
      mix(weights, values, spans, steps, stride, rows, out + row * head_dim, fetcher);
    }
  }

  // Floats of scratch memory of a thread that attends.
  static int64_t scratch(int64_t head_dim) {
    return spans_of(head_dim) + kTileRows * kWidth / 2 + kTileRows * kWidth;
  }

  template <typename Count>
  static void widen(const uint16_t* from, Count count, float* to) {
    for (int64_t i = 0; i < count; i++) to[i] = native::widen(native::BFloat16{from[i]});
  }

  template <typename Count>
  static void narrow(const float* from, Count count, uint16_t* to) {
    for (int64_t i = 0; i < count; i += 16) {
      const auto mask = static_cast<__mmask16>(count - i < 16 ? (1u << (count - i)) - 1 : 0xffffu);
      const auto rounded = (__m256i)_mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(mask, from + i));
      _mm256_mask_storeu_epi16(to + i, mask, rounded);
    }
  }

  static float weight_of(float difference) { return std::exp(difference); }

  static void gate(const float* gates, const float* ups, float* out) {
    _mm512_storeu_ps(out, _mm512_mul_ps(native::silu(_mm512_loadu_ps(gates)), _mm512_loadu_ps(ups)));
  }

 private:
  static int64_t spans_of(int64_t head_dim) { return kChunk / 2 * (head_dim / kStep * 2 * kTile + kStep); }

  static void fetch(const uint16_t* from) {
    for (int64_t line = 0; line < 2 * kTile; line += kStep)
      _mm_prefetch(reinterpret_cast<const char*>(from + line), _MM_HINT_T0);
  }

  static void one_tile(const uint16_t* weights, int64_t steps, const uint16_t* x, int64_t stride, bool first) {
    _tile_zero(0);
    _tile_zero(1);
    for (int64_t step = 0; step < steps; step++, weights += 2 * kTile) {
      if (first) fetch(weights + kAhead);
      _tile_loadd(4, x + step * kStep, stride * sizeof(uint16_t));
      _tile_loadd(6, weights, 64);
      _tile_loadd(7, weights + kTile, 64);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
    }
  }

  static void two_tiles(const uint16_t* weights, int64_t steps, const uint16_t* x, int64_t stride, bool first) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t step = 0; step < steps; step++, weights += 2 * kTile) {
      if (first) fetch(weights + kAhead);
      _tile_loadd(4, x + step * kStep, stride * sizeof(uint16_t));
      _tile_loadd(5, x + kTileRows * stride + step * kStep, stride * sizeof(uint16_t));
      _tile_loadd(6, weights, 64);
      _tile_loadd(7, weights + kTile, 64);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  }

  // Two strips as pairs of channels. unpacklo and unpackhi leave positions 0-3, 8-11, 16-19, 24-27 of the span in one
  // tile and the others in the next; scores, masks and values keep that order.
  static void pack_keys(const Strip* strips, int64_t number, int64_t steps, int64_t stride, uint16_t* out) {
    for (int64_t pair = 0; pair < steps * 16; pair++) {
      uint16_t* to = out + pair / 16 * 2 * kTile + pair % 16 * kStep;
      for (int64_t s = 0; s < number; s += 2, to += stride) {
        const auto* low = static_cast<const uint16_t*>(strips[s].keys) + 2 * pair * kPage;
        const auto* high = static_cast<const uint16_t*>(strips[std::min(s + 1, number - 1)].keys) + 2 * pair * kPage;
        const __m512i one = both(low, high), two = both(low + kPage, high + kPage);
        _mm512_storeu_si512(to, _mm512_unpacklo_epi16(one, two));
        _mm512_storeu_si512(to + kTile, _mm512_unpackhi_epi16(one, two));
      }
    }
  }

  static __m512i both(const uint16_t* low, const uint16_t* high) {
    if (high == low + kStrip) return _mm512_loadu_si512(low);
    return _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(low))),
                              _mm256_loadu_si256(reinterpret_cast<const __m256i*>(high)), 1);
  }

  // Pairs of positions in the order of the scores, 32 channels of both interleaved in two tiles. Positions that are not
  // valid count as zeros, whatever the memory holds.
  static void pack_values(const Strip* strips, int64_t number, int64_t steps, int64_t stride, uint16_t* out) {
    const int64_t head_dim = steps * kStep;
    for (int64_t s = 0; s < number; s++) {
      const Strip& strip = strips[s];
      const auto* from = static_cast<const uint16_t*>(strip.values);
      for (int64_t at = 0; at < kStrip; at += 2, from += 2 * head_dim) {
        const int64_t place = s % 2 * kStrip + at, pair = place / 8 * 2 + place % 4 / 2 + place % 8 / 4 * 8;
        const __mmask32 one_valid = at < strip.count ? ~0u : 0, two_valid = at + 1 < strip.count ? ~0u : 0;
        uint16_t* to = out + s / 2 * stride + pair * kStep;
        for (int64_t step = 0; step < steps; step++, to += 2 * kTile) {
          const __m512i one = _mm512_maskz_loadu_epi16(one_valid, from + step * kStep);
          const __m512i two = _mm512_maskz_loadu_epi16(two_valid, from + head_dim + step * kStep);
          _mm512_storeu_si512(to, _mm512_unpacklo_epi16(one, two));
          _mm512_storeu_si512(to + kTile, _mm512_unpackhi_epi16(one, two));
        }
      }
    }
    if (number % 2 == 0) return;
    for (int64_t tile = 0; tile < 2 * steps; tile++)  // the half of a span that is missing
      for (int64_t pair = 4; pair < 16; pair += pair % 8 == 7 ? 5 : 1)
        _mm512_storeu_si512(out + number / 2 * stride + tile * kTile + pair * kStep, _mm512_setzero_si512());
  }

  static uint32_t bits(const Strip* strips, int64_t left, const Sight& sight, int64_t row) {
    return sight.bits(strips[0], row) | (left > 1 ? sight.bits(strips[1], row) << 16 : 0);
  }

  static void score(const uint16_t* queries, const uint16_t* keys, int64_t spans, int64_t steps, int64_t stride,
                    float* scores, Fetcher& fetcher) {
    const int64_t head_dim = steps * kStep;
    for (int64_t span = 0; span < spans; span++) {
      _tile_zero(0);
      _tile_zero(1);
      fetcher.step();
      for (int64_t step = 0; step < steps; step++) {
        const uint16_t* from = keys + span * stride + step * 2 * kTile;
        _tile_loadd(4, queries + step * kStep, head_dim * sizeof(uint16_t));
        _tile_loadd(6, from, 64);
        _tile_loadd(7, from + kTile, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
      }
      _tile_stored(0, scores + span * kSpan, kWidth * sizeof(float));
      _tile_stored(1, scores + span * kSpan + 16, kWidth * sizeof(float));
    }
  }

  // One row: exponentials of its scores from their maximum, as bfloat16, and the fp32 sum of them. Unless masked, all
  // positions are seen.
  template <bool kMasked>
  static void soften(const float* scores, const uint32_t* seen, int64_t spans, uint16_t* weights, float* top, float* sum,
                     Fetcher& fetcher) {
    const auto low = [&](int64_t s) { return static_cast<__mmask16>(kMasked ? _pext_u32(seen[s], 0x0f0f0f0fu) : ~0u); };
    const auto high = [&](int64_t s) { return static_cast<__mmask16>(kMasked ? _pext_u32(seen[s], 0xf0f0f0f0u) : ~0u); };
    __m512 a = _mm512_set1_ps(kNothing), b = a;
    for (int64_t s = 0; s < spans; s++) {
      a = _mm512_mask_max_ps(a, low(s), a, _mm512_load_ps(scores + s * kSpan));
      b = _mm512_mask_max_ps(b, high(s), b, _mm512_load_ps(scores + s * kSpan + 16));
    }
    *top = _mm512_reduce_max_ps(_mm512_max_ps(a, b));
    const __m512 scale = _mm512_set1_ps(1.44269504f), from = _mm512_set1_ps(*top * 1.44269504f);
    a = b = _mm512_setzero_ps();
    for (int64_t s = 0; s < spans; s++) {
      fetcher.step();
      const __m512 first = exponential<kMasked>(_mm512_load_ps(scores + s * kSpan), from, scale, low(s));
      const __m512 second = exponential<kMasked>(_mm512_load_ps(scores + s * kSpan + 16), from, scale, high(s));
      a = _mm512_add_ps(a, first);
      b = _mm512_add_ps(b, second);
      _mm512_storeu_si512(weights + s * kSpan, (__m512i)_mm512_cvtne2ps_pbh(second, first));
    }
    *sum = _mm512_reduce_add_ps(_mm512_add_ps(a, b));
  }

  // exp(score - top) with a relative error below 2e-5: far finer than the rounding to bfloat16 that follows.
  template <bool kMasked>
  static __m512 exponential(__m512 score, __m512 from, __m512 scale, __mmask16 seen) {
    constexpr float kSeries[] = {9.6181291e-3f, 5.5504109e-2f, 2.4022651e-1f, 6.9314718e-1f, 1.0f};
    const __m512 power = kMasked ? _mm512_maskz_fmsub_ps(seen, score, scale, from) : _mm512_fmsub_ps(score, scale, from);
    const __m512 whole = _mm512_roundscale_ps(power, 0), rest = _mm512_sub_ps(power, whole);
    __m512 value = _mm512_set1_ps(kSeries[0]);
    for (int i = 1; i < 5; i++) value = _mm512_fmadd_ps(value, rest, _mm512_set1_ps(kSeries[i]));
    return kMasked ? _mm512_maskz_scalef_ps(seen, value, whole) : _mm512_scalef_ps(value, whole);
  }

  static void mix(const uint16_t* weights, const uint16_t* values, int64_t spans, int64_t steps, int64_t stride,
                  int64_t rows, float* out, Fetcher& fetcher) {
    const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
    alignas(64) float sums[2][kTileRows][16];
    for (int64_t step = 0; step < steps; step++) {
      _tile_zero(0);
      _tile_zero(1);
      for (int64_t span = 0; span < spans; span++) {
        const uint16_t* from = values + span * stride + step * 2 * kTile;
        fetcher.step();
        _tile_loadd(4, weights + span * kSpan, kWidth * sizeof(uint16_t));
        _tile_loadd(6, from, 64);
        _tile_loadd(7, from + kTile, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
      }
      _tile_stored(0, sums[0], 64);
      _tile_stored(1, sums[1], 64);
      for (int64_t r = 0; r < rows; r++) {
        const __m512 low = _mm512_load_ps(sums[0][r]), high = _mm512_load_ps(sums[1][r]);
        float* to = out + r * steps * kStep + step * kStep;
        _mm512_storeu_ps(to, _mm512_permutex2var_ps(low, first, high));
        _mm512_storeu_ps(to + 16, _mm512_permutex2var_ps(low, second, high));
      }
    }
  }
};

}  // namespace decoder_layer

#endif
