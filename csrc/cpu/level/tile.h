// A panel, which is a tile of a matrix in the cache, times rows of x: the microkernel, and its way through a panel.
#pragma once

#include "amx.h"
#include "kernels.h"
#include "simd.h"

namespace {

using namespace entrenar;

#if defined(__AVX512BF16__)
constexpr bool kBFloat16Units = true;
#else
constexpr bool kBFloat16Units = false;
#endif

// Registers of the microkernel: rows x vectors sums, and a few for its operands.
constexpr int kMicroVectors = kLanes == 16 ? 4 : 2;
constexpr int kInt8Vectors = 2, kInt8Rows = kLanes == 16 ? 6 : 4;  // beside which there are as many whole numbers
constexpr int micro_rows(int vectors) { return kLanes == 16 ? (vectors <= 2 ? 12 : 6) : kLanes == 8 ? 6 : 4; }

// How a tile is held: float32 values, or pairs of bfloat16 that are neighbours in the contraction.
template <bool kPairs>
struct Tile;

template <>
struct Tile<false> {
  static constexpr int kUnit = 1;  // elements

  static vfloat multiply_add(vfloat total, uint32_t x, vuint panel) {
    return total + int4::bits_float(x) * (vfloat)panel;
  }
};

#if defined(__AVX512BF16__)
template <>
struct Tile<true> {
  static constexpr int kUnit = 2;

  static vfloat multiply_add(vfloat total, uint32_t x, vuint panel) {
    return (vfloat)_mm512_dpbf16_ps((__m512)total, (__m512bh)_mm512_set1_epi32(x), (__m512bh)panel);
  }
};
#endif

template <int kRows, int kVectors>
INLINE inline void load_sums(vfloat (&total)[kRows][kVectors], const float* sums, bool first) {
#pragma GCC unroll 12
  for (int r = 0; r < kRows; r++) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; v++) {
      total[r][v] = first ? vfloat{} : load<vfloat>(sums + r * kTileColumns + v * kLanes);
    }
  }
}

template <int kRows, int kVectors>
INLINE inline void store_sums(const vfloat (&total)[kRows][kVectors], float* sums) {
#pragma GCC unroll 12
  for (int r = 0; r < kRows; r++) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; v++) store(sums + r * kTileColumns + v * kLanes, total[r][v]);
  }
}

// total += x panel over `units` units. With kFar the next rows of x are asked for meanwhile.
template <bool kPairs, bool kFar, int kRows, int kVectors>
INLINE inline void multiply_add(vfloat (&total)[kRows][kVectors], const Units& x, const uint32_t* panel,
                                int64_t units) {
  constexpr int64_t kLine = 16;
  for (int64_t u = 0; u < units; u++) {
    if (kFar && u % kLine == 0) {
#pragma GCC unroll 12
      for (int r = 0; r < kRows; r++) __builtin_prefetch(x.data + (kRows + r) * x.stride + u, 0, 2);
    }
    vuint columns[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; v++) columns[v] = load<vuint>(panel + u * kTileColumns + v * kLanes);
#pragma GCC unroll 12
    for (int r = 0; r < kRows; r++) {
      const uint32_t value = load<uint32_t>(x.data + r * x.stride + u);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; v++) total[r][v] = Tile<kPairs>::multiply_add(total[r][v], value, columns[v]);
    }
  }
}

// A number that is known when the microkernel is compiled.
template <int number>
struct Known {
  static constexpr int kNumber = number;
};

// f of a number from 1 to kMost; of kMost for more.
template <int kMost, class F>
INLINE inline void with_known(int64_t number, F f) {
  if (number >= kMost) {
    f(Known<kMost>{});
  } else if constexpr (kMost > 1) {
    with_known<kMost - 1>(number, f);
  }
}

// f(count, first) for parts of [0, size) of kMost and a last one of the rest.
template <int kMost, class F>
INLINE inline void for_parts(int64_t size, F f) {
  for (int64_t first = 0; first < size; first += kMost) {
    with_known<kMost>(size - first, [&](auto count) INLINE { f(count, first); });
  }
}

// sums[kRows][kVectors] (+)= x panel, over `units` units.
template <bool kPairs, int kRows, int kVectors>
void micro(const Units& x, const uint32_t* panel, int64_t units, float* sums, bool first) {
  vfloat total[kRows][kVectors];
  load_sums(total, sums, first);
  multiply_add<kPairs, false>(total, x, panel, units);
  store_sums(total, sums);
}

// What must live around calls of multiply_tile.
template <bool kPairs>
struct Multiplying {
  ~Multiplying() {}  // or it would be an unused variable
};

#if defined(__AMX_BF16__)

template <>
struct Multiplying<true> {
  amx::Registers registers;
};

// Less than 32 rows or columns, or units that do not fill the registers.
__attribute__((noinline)) void multiply_part(int64_t rows, int64_t columns, amx::Factors factors, bool first,
                                             const amx::Sums& sums) {
  const int64_t rest = factors.units % amx::kUnits;
  factors.units -= rest;
  const int whole = factors.units != 0;
  if (whole || first) {  // without factors as well, for sums of 0
    amx::multiply<amx::Far::kNone>(rows, columns, amx::kUnits, &factors, whole, first ? nullptr : &sums, sums);
  }
  if (rest != 0) {
    const int64_t done = factors.units * factors.panel_stride;
    factors = {factors.x + factors.units, factors.x_stride, factors.left + done, factors.right + done,
               factors.panel_stride, rest};
    amx::multiply<amx::Far::kNone>(rows, columns, rest, &factors, 1, &sums, sums);
  }
}

inline void multiply_tile_amx(int vectors, int64_t rows, const Units& x, const uint32_t* panel, int64_t units,
                              float* sums, bool first) {
  constexpr int64_t kStride = kTileColumns, kNearUnits = 64;
  for (int64_t r = 0; r < rows; r += amx::kTall) {
    for (int v = 0; v < vectors; v += 2) {
      const uint32_t* left = panel + v * amx::kUnits;
      const amx::Factors factors = {x.data + r * x.stride, x.stride, left, left + amx::kUnits, kStride, units};
      const amx::Sums at = {sums + r * kStride + v * amx::kUnits, kStride, amx::kUnits, amx::kRows * kStride};
      const bool whole = rows - r >= amx::kTall && vectors - v >= 2 && units % amx::kUnits == 0;
      if (whole && units <= kNearUnits) {
        amx::multiply_near(factors, first, at);
      } else if (whole) {
        amx::multiply<true, true, amx::Far::kColumns>(&factors, 1, first ? nullptr : &at, at);
      } else {
        multiply_part(rows - r < amx::kTall ? rows - r : amx::kTall, vectors - v < 2 ? amx::kUnits : amx::kWide, factors,
                      first, at);
      }
    }
  }
}

#endif

// sums[row][column] (+)= x panel, over `units` units and so many vectors of columns.
template <bool kPairs>
void multiply_tile(int vectors, int64_t rows, const Units& x, const uint32_t* panel, int64_t units, float* sums,
                   bool first) {
#if defined(__AMX_BF16__)
  if constexpr (kPairs) return multiply_tile_amx(vectors, rows, x, panel, units, sums, first);
#endif
  for_parts<kMicroVectors>(vectors, [&](auto width, int64_t v) {
    constexpr int kVectors = decltype(width)::kNumber;
    for_parts<micro_rows(kVectors)>(rows, [&](auto height, int64_t r) {
      micro<kPairs, decltype(height)::kNumber, kVectors>({x.data + r * x.stride, x.stride}, panel + v * kLanes, units,
                                                         sums + r * kTileColumns + v * kLanes, first);
    });
  });
}

}  // namespace
