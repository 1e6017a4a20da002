// Transposition of 32-bit elements, in squares.
#pragma once

#include "simd.h"

namespace {

constexpr int kSquare = 16;

#if defined(__AVX512F__)

inline void transpose_square(const uint32_t* in, int64_t in_stride, uint32_t* out, int64_t out_stride) {
  __m512i a[16], b[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; i++) a[i] = _mm512_loadu_si512(in + i * in_stride);
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
    a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
    a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
    a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    b[i] = _mm512_shuffle_i32x4(a[i], a[i + 4], 0x88);
    b[i + 4] = _mm512_shuffle_i32x4(a[i], a[i + 4], 0xdd);
    b[i + 8] = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0x88);
    b[i + 12] = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0xdd);
  }
#pragma GCC unroll 8
  for (int i = 0; i < 8; i++) {
    _mm512_storeu_si512(out + i * out_stride, _mm512_shuffle_i32x4(b[i], b[i + 8], 0x88));
    _mm512_storeu_si512(out + (i + 8) * out_stride, _mm512_shuffle_i32x4(b[i], b[i + 8], 0xdd));
  }
}

#else

inline void transpose_square(const uint32_t* in, int64_t in_stride, uint32_t* out, int64_t out_stride) {
  typedef uint32_t quad __attribute__((vector_size(16)));
  const quad low = {0, 4, 1, 5}, high = {2, 6, 3, 7}, first = {0, 1, 4, 5}, second = {2, 3, 6, 7};
  for (int n = 0; n < kSquare; n += 4) {
    for (int u = 0; u < kSquare; u += 4) {
      const uint32_t* from = in + n * in_stride + u;
      const quad a = load<quad>(from), b = load<quad>(from + in_stride);
      const quad c = load<quad>(from + 2 * in_stride), d = load<quad>(from + 3 * in_stride);
      const quad ab = __builtin_shuffle(a, b, low), cd = __builtin_shuffle(c, d, low);
      const quad AB = __builtin_shuffle(a, b, high), CD = __builtin_shuffle(c, d, high);
      uint32_t* to = out + u * out_stride + n;
      store(to, __builtin_shuffle(ab, cd, first));
      store(to + out_stride, __builtin_shuffle(ab, cd, second));
      store(to + 2 * out_stride, __builtin_shuffle(AB, CD, first));
      store(to + 3 * out_stride, __builtin_shuffle(AB, CD, second));
    }
  }
}

#endif

// out[u, n] = in[n, u]. Whole squares are written: `in` must be readable, and `out` writable, up to the next multiple of
// 16 in both directions; what lies past `rows` and `columns` there is unspecified.
inline void transpose(const uint32_t* in, int64_t in_stride, int64_t rows, int64_t columns, uint32_t* out,
                      int64_t out_stride) {
  for (int64_t n = 0; n < rows; n += kSquare) {
    for (int64_t u = 0; u < columns; u += kSquare) {
      transpose_square(in + n * in_stride + u, in_stride, out + u * out_stride + n, out_stride);
    }
  }
}

constexpr int kQuarter = kSquare / 4;

// A square that is transposed bit by bit, between other work that the shuffles then overlap: a quarter of its rows goes in
// at a time, and after the last one a quarter of its columns comes out at a time.
class TransposedByQuarters {
 public:
#if defined(__AVX512F__)

  INLINE void take(int quarter, const uint32_t* in, int64_t in_stride) {
    const auto row = [&](int i) INLINE { return _mm512_loadu_si512(in + (quarter + i * kQuarter) * in_stride); };
    const __m512i a = row(0), b = row(1), c = row(2), d = row(3);
    const __m512i ab = _mm512_shuffle_i32x4(a, b, 0x44), cd = _mm512_shuffle_i32x4(c, d, 0x44);
    const __m512i AB = _mm512_shuffle_i32x4(a, b, 0xee), CD = _mm512_shuffle_i32x4(c, d, 0xee);
    store(quarters_[0][quarter], _mm512_shuffle_i32x4(ab, cd, 0x88));
    store(quarters_[1][quarter], _mm512_shuffle_i32x4(ab, cd, 0xdd));
    store(quarters_[2][quarter], _mm512_shuffle_i32x4(AB, CD, 0x88));
    store(quarters_[3][quarter], _mm512_shuffle_i32x4(AB, CD, 0xdd));
  }

  // use(i, elements [row, row + kLanes) of the quarter's column i), for each in turn.
  template <class Use>
  INLINE void give(int quarter, int row, const Use& use) const {
    const auto rows = [&](int i) INLINE { return _mm512_load_si512(quarters_[quarter][i] + row); };
    const __m512i a = rows(0), b = rows(1), c = rows(2), d = rows(3);
    const __m512i ab = _mm512_unpacklo_epi32(a, b), cd = _mm512_unpacklo_epi32(c, d);
    const __m512i AB = _mm512_unpackhi_epi32(a, b), CD = _mm512_unpackhi_epi32(c, d);
    use(0, (vuint)_mm512_unpacklo_epi64(ab, cd));
    use(1, (vuint)_mm512_unpackhi_epi64(ab, cd));
    use(2, (vuint)_mm512_unpacklo_epi64(AB, CD));
    use(3, (vuint)_mm512_unpackhi_epi64(AB, CD));
  }

#else

  // Here nothing is gained by quarters.
  INLINE void take(int quarter, const uint32_t* in, int64_t in_stride) {
    if (quarter == 0) transpose_square(in, in_stride, quarters_[0][0], kSquare);
  }

  template <class Use>
  INLINE void give(int quarter, int row, const Use& use) const {
#pragma GCC unroll 4
    for (int i = 0; i < kQuarter; i++) use(i, load<vuint>(quarters_[quarter][i] + row));
  }

#endif

 private:
  alignas(64) uint32_t quarters_[kQuarter][kQuarter][kSquare];  // of the columns
};

}  // namespace
