// Rows of x, of which there are few, and of a weight for matrix registers: a register's rows are rows of the weight, just
// as they are decoded, and rows of x are its columns, so that nothing of the weight is transposed. Both are in the order in
// which codes are decoded: of two blocks, or of what is left at the end, first the low nibbles of every other byte, then
// the high ones, and then those of the other bytes.
#pragma once

#include "amx.h"
#include "codec.h"
#include "elements.h"
#include "transpose.h"

#if defined(__AMX_BF16__)

namespace {

using namespace entrenar;

namespace amx {

constexpr int64_t kNibbles = 4;                    // of a 16-bit word of codes
constexpr int64_t kWords = int4::kGroupBytes / 2;  // of a group
constexpr int64_t kQuad = 4 * int4::kGroup;        // elements that are decoded at once
constexpr int64_t kQuadUnits = kQuad / 2;
constexpr int64_t kSquare = kRows * kUnits;

// How many of a row, in whole registers.
inline int64_t row_units(int64_t columns) { return (columns + kQuad / 2 - 1) / (kQuad / 2) * (kQuad / 4); }

// Elements of the quad that begins at `column`: fewer at the end, but of whole registers.
inline int64_t quad_size(int64_t column, int64_t columns) {
  const int64_t rest = 2 * row_units(columns) - column;
  return rest < kQuad ? rest : kQuad;
}

// Rows of x beside each other in a register.
inline int64_t tile_width(int64_t rows) { return rows < kRows ? rows : kRows; }

// Elements [begin, begin + size) of a row of x, of which `count` are there, in the order of codes or as they are.
inline void reorder(const uint16_t* x, int64_t count, int64_t size, bool coded, uint32_t* out) {
  // Elements of a group by the nibbles of words that they are: 0, 2, ..., 14, then 16, 18, ..., and the same of odd ones.
  const __m512i order = _mm512_set_epi16(31, 29, 27, 25, 23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1,  //
                                         30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
  const int64_t groups = size / int4::kGroup;
  for (int64_t g = 0; g < groups; g++, x += int4::kGroup, count -= int4::kGroup) {
    const __mmask32 some = count >= int4::kGroup ? -1 : count > 0 ? (1u << count) - 1 : 0;
    const __m512i group = _mm512_maskz_loadu_epi16(some, x);
    if (!coded) {
      ::store(out + g * kUnits, group);
      continue;
    }
    alignas(64) uint32_t nibbles[kNibbles][kWords / 2];
    ::store(nibbles[0], _mm512_permutexvar_epi16(order, group));
    for (int64_t n = 0; n < kNibbles; n++) {
      __builtin_memcpy(out + (n * groups + g) * (kWords / 2), nibbles[n], sizeof nibbles[n]);
    }
  }
}

// Rows [row_begin, row_end) of x, to registers of so many rows: [register][pair][row], zeros past the ends.
void to_tiles(const uint16_t* x, int64_t rows, int64_t columns, bool coded, int64_t row_begin, int64_t row_end,
              uint32_t* out) {
  const int64_t width = tile_width(rows), units = row_units(columns);
  for (int64_t row = row_begin; row < row_end; row += width) {
    uint32_t* const tile = out + row * units;
    for (int64_t begin = 0; begin < 2 * units; begin += kQuad) {
      const int64_t size = quad_size(begin, columns);
      alignas(64) uint32_t quad[kRows][kQuadUnits] = {}, square[kSquare];
      for (int64_t r = 0; r < width && row + r < row_end; r++) {
        reorder(x + (row + r) * columns + begin, columns - begin, size, coded, quad[r]);
      }
      for (int64_t u = 0; u < size / 2; u += kUnits) {
        uint32_t* const to = tile + (begin / 2 + u) * width;
        if (width == kUnits) {
          transpose_square(&quad[0][u], kQuadUnits, to, kUnits);
          continue;
        }
        transpose_square(&quad[0][u], kQuadUnits, square, kUnits);
        for (int64_t i = 0; i < kUnits; i++) __builtin_memcpy(to + i * width, square + i * kUnits, width * sizeof *to);
      }
    }
  }
}

// Rows of codes in blocks of 64, from one column on.
struct CodedRows {
  const uint8_t* codes;
  const void* scales;
  int64_t code_stride, scale_stride;
  int64_t ahead;  // how many bytes from the codes lie those that are wanted next
};

// `quads` whole quads of each row.
template <class Scale>
inline void decode_quads(const CodedRows& from, int64_t rows, int64_t quads, uint32_t* out, int64_t stride) {
  constexpr int64_t kScales = 16;  // that are converted at once
  const vfloat units = {-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7};
  const __m512i nibble = _mm512_set1_epi16(15);
  const __m512i second = _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi16(16), 1);
  constexpr int kAndOr = 0xea;  // (a & b) | c
  const uint8_t* codes = from.codes;
  const Scale* scales = (const Scale*)from.scales;
  for (int64_t r = 0; r < rows; r++, codes += from.code_stride, scales += from.scale_stride, out += stride) {
    for (int64_t begin = 0; begin < quads; begin += kScales / 2) {
      const int64_t end = quads - begin < kScales / 2 ? quads : begin + kScales / 2;
      const __mmask16 some = (1 << 2 * (end - begin)) - 1;
      alignas(64) float s[kScales];
      if constexpr (sizeof(Scale) == sizeof(float)) {
        ::store(s, _mm512_maskz_loadu_ps(some, scales + 2 * begin));
      } else {
        ::store(s, _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(some, scales + 2 * begin)));
      }
      asm("" : "+m"(s));  // from where they are broadcast in the multiplication
      for (int64_t i = begin; i < end; i++) {
        const vfloat low = units * s[2 * (i - begin)], high = units * s[2 * (i - begin) + 1];
        const __m512i values = (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
        const __m512i words = _mm512_loadu_si512(codes + i * kQuad / 2);
        __builtin_prefetch(codes + from.ahead + i * kQuad / 2);
        uint32_t* const to = out + i * kQuadUnits;
        const auto look_up = [&](__m512i index) INLINE {
          return _mm512_permutexvar_epi16(_mm512_ternarylogic_epi64(index, nibble, second, kAndOr), values);
        };
        ::store(to, look_up(words));
        ::store(to + kUnits, look_up(_mm512_srli_epi16(words, 4)));
        ::store(to + 2 * kUnits, look_up(_mm512_srli_epi16(words, 8)));
        ::store(to + 3 * kUnits, look_up(_mm512_srli_epi16(words, 12)));
      }
    }
  }
}

// Elements [begin, end) of a row from `column` on, a group at a time; zeros where a quad has no more groups.
inline void decode_groups(const Weight& w, int64_t row, int64_t column, int64_t begin, int64_t end, uint32_t* out) {
  for (int64_t quad = begin; quad < end; quad += kQuad) {
    const int64_t size = quad_size(quad, end), groups = size / int4::kGroup;
    uint16_t* const to = (uint16_t*)(out + quad / 2);
    for (int64_t g = 0; g < groups; g++) {
      const int64_t c = quad + g * int4::kGroup;
      __m256i values = {};
      __m128i words = {};
      if (c < end) {
        values = block_values(scale_of(w, row, column + c));
        words = _mm_loadu_si128((const __m128i*)group_of(w, row, column + c));
      }
      for (int64_t n = 0; n < kNibbles; n++, words = _mm_srli_epi16(words, 4)) {
        const __m256i found = _mm256_permutexvar_epi16(_mm256_castsi128_si256(words), values);
        _mm_storeu_si128((__m128i*)(to + (n * groups + g) * kWords), _mm256_castsi256_si128(found));
      }
    }
  }
}

inline void round_dense(const float* from, int64_t count, uint32_t* out) {
  for (int64_t i = 0; i < 2 * row_units(count); i += kLanes) {
    const int64_t rest = count - i;
    const __mmask16 some = rest >= kLanes ? -1 : rest > 0 ? (1 << rest) - 1 : 0;
    ::store(out + i / 2, (__m256i)_mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(some, from + i)));
  }
}

// Columns [column, column + count) of rows [row, row + rows) of a weight, `column` a multiple of kQuad. Past these columns
// those of the rows `below` will be wanted.
inline void decode_rows(const Weight& w, int64_t row, int64_t rows, int64_t column, int64_t count, int64_t below,
                        uint32_t* out, int64_t stride) {
  if (w.codes == nullptr) {
    for (int64_t r = 0; r < rows; r++) round_dense(w.dense + (row + r) * w.columns + column, count, out + r * stride);
    return;
  }
  int64_t done = 0;
  if (w.block == 2 * int4::kGroup) {
    const int64_t blocks = int4::blocks(w.columns, w.block), quads = (count + int4::kGroup - 1) / kQuad;
    const int64_t index = row * blocks + column / w.block;
    const int64_t row_bytes = int4::row_bytes(w.columns), rest = row_bytes - (column + count) / 2;
    CodedRows from = {group_of(w, row, column), nullptr, row_bytes, blocks, count / 2};
    if (rest <= 0) from.ahead += (below - 1) * row_bytes;
    if (w.float32_scales) {
      from.scales = (const float*)w.scales + index;
      decode_quads<float>(from, rows, quads, out, stride);
    } else {
      from.scales = (const uint16_t*)w.scales + index;
      decode_quads<uint16_t>(from, rows, quads, out, stride);
    }
    done = quads * kQuad;
  }
  for (int64_t r = 0; done < count && r < rows; r++) decode_groups(w, row + r, column, done, count, out + r * stride);
}

}  // namespace amx

}  // namespace

#endif
