// The processor's tile registers (AMX-BF16), and vector functions for what is multiplied in them.
#pragma once

#ifdef __AVX512BF16__
#include <immintrin.h>
#if defined(__AMX_BF16__) && defined(__linux__)
#define WITH_TILES
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

#include "numbers.h"

#ifdef WITH_TILES

namespace native {

// Asks the system for the tile registers, once per process.
inline bool tiles_granted() {
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  static const bool granted = syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  return granted;
}

struct alignas(64) TileShapes {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t bytes[16] = {};
  uint8_t rows[16] = {};
};

// Loads tile shapes. GCC takes the instruction to read the first eight bytes only and may leave out the stores to the
// others, so they are made to happen first.
inline void load_shapes(const TileShapes& shapes) {
  __asm__ volatile("" : : "r"(&shapes) : "memory");
  _tile_loadconfig(&shapes);
}

// 2^x by a polynomial on [-1/2, 1/2] with a relative error below 2e-7.
inline __m512 power_of_two(__m512 x) {
  constexpr float kSeries[] = {1.5403530e-4f, 1.3333558e-3f, 9.6181291e-3f, 5.5504109e-2f,
                               2.4022651e-1f, 6.9314718e-1f, 1.0f};
  const __m512 whole = _mm512_roundscale_ps(x, 0), rest = _mm512_sub_ps(x, whole);
  __m512 value = _mm512_setzero_ps();
  for (const float term : kSeries) value = _mm512_fmadd_ps(value, rest, _mm512_set1_ps(term));
  return _mm512_scalef_ps(value, whole);
}

// x / (1 + exp(-x)).
inline __m512 silu(__m512 x) {
  const __m512 power = power_of_two(_mm512_mul_ps(x, _mm512_set1_ps(-1.44269504f)));
  return _mm512_div_ps(x, _mm512_add_ps(_mm512_set1_ps(1.0f), power));
}

}  // namespace native

#endif
