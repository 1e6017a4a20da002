// Products with few rows of x, straight from the codes: memory-bound, so nothing is decoded to memory. Sixteen rows of
// the weight stand in the lanes: their codes are transposed as 32-bit words, and each word is decoded nibble by nibble
// and multiplied by the elements of x that belong there. The scale is applied to the sum of a block.
#pragma once

#include "codec.h"
#include "elements.h"
#include "store.h"
#include "transpose.h"

namespace {

using namespace entrenar;

constexpr int kMaxDotRows = kLanes == 16 ? 16 : 8;  // whose sums fit the registers
constexpr int kDotVectors = kDotColumns / kLanes;

// Whether bfloat16 is multiplied in pairs. Processors with matrix registers add up products of float32 twice as fast.
#if defined(__AVX512BF16__) && !defined(__AMX_BF16__)
constexpr bool kDotPairs = true;
#else
constexpr bool kDotPairs = false;
#endif

// Whether what the next rows need is asked for in the order of memory, and not for sixteen rows side by side: with one row
// of x a Zen 4 then reads codes at 25 GB/s instead of 18. A Xeon with AMX was measured side by side alone.
#if defined(__AMX_BF16__)
constexpr bool kInOrder = false;
#else
constexpr bool kInOrder = true;
#endif

constexpr int kWord = 4;  // bytes of codes in a lane
constexpr int kGroupWords = int4::kGroupBytes / kWord;

static_assert(kDotColumns == kSquare, "rows of the weight are transposed a square at a time");
static_assert(kGroupWords == kQuarter, "a quarter of its columns is a group");

// What a word of codes is multiplied by: `kSteps` units of x, one for each step, float32 or pairs of bfloat16. A group
// has kGroupSteps of them in the order in which pack_rows leaves x.
template <bool kPairs>
struct Step;

template <>
struct Step<false> {
  static constexpr int kSteps = 8;

  // The code in nibble i of each word.
  static vuint decode(vuint words, int i) {
#if defined(__AVX512F__)
    const __m512 codes = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
    return (vuint)_mm512_permutexvar_ps((__m512i)(words >> 4 * i), codes);
#else
    return (vuint)__builtin_convertvector((vint)(words >> 4 * i & 15) - int4::kZeroNibble, vfloat);
#endif
  }

  static vfloat multiply_add(vfloat total, uint32_t x, vuint w) { return total + int4::bits_float(x) * (vfloat)w; }
};

#if defined(__AVX512BF16__)
template <>
struct Step<true> {
  static constexpr int kSteps = 4;

  // The codes in nibble i of both halves of each word. The table's second half repeats the first, so that the next
  // nibble's lowest bit, which the permutation looks at too, does not matter.
  static vuint decode(vuint words, int i) {
    const __m256i codes = _mm256_setr_epi16(0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040, 0xc000, 0xbf80, 0, 0x3f80,
                                            0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0);
    return (vuint)_mm512_permutexvar_epi16((__m512i)(words >> 4 * i), _mm512_broadcast_i64x4(codes));
  }

  static vfloat multiply_add(vfloat total, const uint32_t& x, vuint w) {
    // Not the intrinsic, for which gcc 12 copies and spills sums.
    asm("vdpbf16ps %2%{1to16%}, %1, %0" : "+v"(total) : "v"(w), "m"(x));
    return total;
  }
};
#endif

template <bool kPairs>
constexpr int kGroupSteps = kGroupWords * Step<kPairs>::kSteps;

// Which unit of a group belongs to nibble i of its word t.
template <bool kPairs>
constexpr int unit_of(int t, int i) {
  return t * Step<kPairs>::kSteps / 2 + i / 2 + i % 2 * kGroupSteps<kPairs> / 2;
}

#if defined(__AVX512BF16__)
// Pairs of elements (0, 2) and (1, 3) of every four, which are two bytes apart in the codes.
void pack_pairs(const uint16_t* x, int64_t rows, int64_t columns, int64_t group_begin, int64_t group_end,
                uint32_t* out) {
  const __m512i order = _mm512_set_epi16(31, 29, 30, 28, 27, 25, 26, 24, 23, 21, 22, 20, 19, 17, 18, 16,  //
                                         15, 13, 14, 12, 11, 9, 10, 8, 7, 5, 6, 4, 3, 1, 2, 0);
  static_assert(kMaxDotRows <= kSquare && kGroupSteps<true> == kSquare, "a group's pairs are transposed as a square");
  alignas(64) uint32_t square[kSquare * kSquare] = {};
  for (int64_t g = group_begin; g < group_end; g++, x += int4::kGroup) {
    const int64_t rest = columns - g * int4::kGroup;
    const __mmask32 some = rest >= int4::kGroup ? -1 : (1u << rest) - 1;
    uint32_t* const to = out + g * kSquare * rows;
    uint32_t* const pairs = rows == 1 ? to : square;
    for (int64_t m = 0; m < rows; m++) {
      const __m512i group = _mm512_maskz_loadu_epi16(some, x + m * columns);
      store(pairs + m * kSquare, _mm512_permutexvar_epi16(order, group));
    }
    if (rows == 1) continue;
    transpose_square(square, kSquare, square, kSquare);
    for (int u = 0; u < kSquare; u++) {
      _mm512_mask_storeu_epi32(to + u * rows, (1 << rows) - 1, _mm512_load_si512(square + u * kSquare));
    }
  }
}
#endif

// x as [unit][row].
void pack_rows(const void* x, Dtype dtype, int64_t rows, int64_t columns, [[maybe_unused]] bool pairs,
               int64_t group_begin, int64_t group_end, uint32_t* out) {
#if defined(__AVX512BF16__)
  if (pairs) {
    return pack_pairs((const uint16_t*)x + group_begin * int4::kGroup, rows, columns, group_begin, group_end, out);
  }
#endif
  for (int64_t g = group_begin; g < group_end; g++) {
    for (int64_t m = 0; m < rows; m++) {
      float values[int4::kGroup];
      uint32_t group[int4::kGroup];
      load_group(x, dtype, m, columns, g * int4::kGroup, values);
      __builtin_memcpy(group, values, sizeof group);
      uint32_t* to = out + g * int4::kGroup * rows + m;
      for (int i = 0; i < int4::kGroup; i++) to[i * rows] = group[i];
    }
  }
}

// `count` words of each of `rows` rows that are `stride` bytes apart, as a square; zeros where there are none.
inline void pad_words(const void* from, int64_t stride, int64_t rows, int64_t count, uint32_t* square) {
  __builtin_memset(square, 0, kSquare * kSquare * kWord);
  for (int64_t r = 0; r < rows; r++) __builtin_memcpy(square + r * kSquare, (const char*)from + r * stride, count * kWord);
}

// The same as [word][row].
inline void load_words(const void* from, int64_t stride, int64_t rows, int64_t count, uint32_t* out) {
  if (rows == kSquare && count == kSquare) return transpose_square((const uint32_t*)from, stride / kWord, out, kSquare);
  uint32_t square[kSquare * kSquare];
  pad_words(from, stride, rows, count, square);
  transpose_square(square, kSquare, out, kSquare);
}

// The scales of `count` blocks of `rows` rows as [block][row].
inline void load_scales(const Weight& w, int64_t row, int64_t rows, int64_t block, int64_t count, uint32_t* out) {
  const int64_t blocks = int4::blocks(w.columns, w.block), index = row * blocks + block;
  if (w.float32_scales) return load_words((const float*)w.scales + index, blocks * kWord, rows, count, out);
  const uint16_t* halves = (const uint16_t*)w.scales + index;
  float values[kSquare * kSquare];
  for (int64_t r = 0; r < rows; r++, halves += blocks) {
    float* to = values + r * kSquare;
    if (count == kSquare) {
      for (int i = 0; i < kSquare; i += kLanes) store(to + i, load_float16(halves + i));
    } else {
      for (int64_t i = 0; i < count; i++) to[i] = half_to_float(halves[i]);
    }
  }
  load_words(values, kSquare * kWord, rows, count, out);
}

// Where registers allow, each sum is split, to hide the latency of an addition.
constexpr int kSums = kLanes == 16 ? 16 : 10;
constexpr int chains(int rows) { return 4 * rows <= kSums ? 4 : 2 * rows <= kSums ? 2 : 1; }

// total += scale * (codes x), over `groups` groups of a block, for one vector of columns. The codes are quarters of a
// square from `quarter` on; `meanwhile(quarter)` is called with each.
template <bool kPairs, int kRows, class Meanwhile>
INLINE inline void dot_block(const TransposedByQuarters& square, int quarter, int groups, int row, const uint32_t* x,
                             vfloat scale, vfloat* total, const Meanwhile& meanwhile) {
  constexpr int kChains = chains(kRows), kSteps = Step<kPairs>::kSteps;
  vfloat sums[kRows][kChains] = {};
  for (int g = 0; g < groups; g++, x += kGroupSteps<kPairs> * kRows) {
    meanwhile(quarter + g);
    square.give(quarter + g, row, [&](int t, vuint words) INLINE {
      const vuint kept = keep(words);
#pragma GCC unroll 8
      for (int i = 0; i < kSteps; i++) {
        const vuint codes = Step<kPairs>::decode(kept, i);
        const uint32_t* xs = x + unit_of<kPairs>(t, i) * kRows;
#pragma GCC unroll 16
        for (int m = 0; m < kRows; m++) {
          vfloat& sum = sums[m][i % kChains];
          sum = Step<kPairs>::multiply_add(sum, xs[m], codes);
        }
      }
    });
  }
#pragma GCC unroll 16
  for (int m = 0; m < kRows; m++) {
    for (int c = 1; c < kChains; c++) sums[m][0] += sums[m][c];
    total[m] += scale * sums[m][0];
  }
}

// Asks for the codes that will be wanted some time after a square of them, from word `word` of its rows on.
INLINE inline void prefetch_codes(const uint8_t* codes, int64_t row_bytes, int64_t word) {
  const int64_t words = row_bytes / kWord;
  if constexpr (kInOrder) return prefetch(codes + kSquare * (row_bytes + word * kWord), kSquare * kSquare * kWord);
  constexpr int64_t kAhead = 128;
  // Past the end of these rows come the next rows' codes, as far ahead.
  const int64_t ahead = word + kAhead + (word + kAhead < words ? 0 : words * (kSquare - 1));
  for (int r = 0; r < kSquare; r++) __builtin_prefetch(codes + r * row_bytes + ahead * kWord);
}

// Asks for as many scales of the next rows as load_scales takes.
INLINE inline void prefetch_scales(const Weight& w, int64_t row, int64_t block, int64_t blocks) {
  if constexpr (!kInOrder) return;
  const int64_t bytes = w.float32_scales ? 4 : 2;
  prefetch((const char*)w.scales + ((row + kSquare) * blocks + block * kSquare) * bytes, kSquare * kSquare * bytes);
}

template <bool kPairs, int kRows>
void dot_int4(const Weight& w, int64_t row, int64_t rows, const uint32_t* x, vfloat (*total)[kRows]) {
  const int64_t row_bytes = int4::row_bytes(w.columns), words = row_bytes / kWord;
  const int64_t blocks = int4::blocks(w.columns, w.block);
  const int block_groups = w.block / int4::kGroup, block_words = block_groups * kGroupWords;
  const uint8_t* codes = w.codes + row * row_bytes;
  alignas(64) uint32_t scales[kSquare * kSquare], padded[kSquare * kSquare];
  TransposedByQuarters squares[2];

  struct Square {
    const uint32_t* words;
    int64_t stride;
  };
  const auto square_at = [&](int64_t word) -> Square {
    const int64_t count = words - word < kSquare ? words - word : kSquare;
    const uint8_t* from = codes + word * kWord;
    if (rows == kSquare && count == kSquare) return {(const uint32_t*)from, row_bytes / kWord};
    pad_words(from, row_bytes, rows, count, padded);
    return {padded, kSquare};
  };
  Square next = square_at(0);
  for (int q = 0; q < kQuarter; q++) squares[0].take(q, next.words, next.stride);
  int64_t block = 0;
  for (int64_t word = 0, i = 0; word < words; word += kSquare, i++) {
    if (block % kSquare == 0) {
      load_scales(w, row, rows, block, blocks - block < kSquare ? blocks - block : kSquare, scales);
      prefetch_scales(w, row, block, blocks);
    }
    prefetch_codes(codes, row_bytes, word);
    const bool more = word + kSquare < words;
    if (more) next = square_at(word + kSquare);
    for (int64_t begin = word; begin < word + kSquare && begin < words; begin += block_words, block++) {
      const int groups = words - begin < block_words ? (words - begin) / kGroupWords : block_groups;
      const int quarter = (begin - word) / kGroupWords;
      const uint32_t* xs = x + begin / kGroupWords * kGroupSteps<kPairs> * kRows;
      const uint32_t* s = scales + block % kSquare * kSquare;
      for (int v = 0; v < kDotVectors; v++) {
        dot_block<kPairs, kRows>(squares[i % 2], quarter, groups, v * kLanes, xs, load<vfloat>(s + v * kLanes), total[v],
                                 [&](int q) INLINE {
                                   if (v == 0 && more) squares[(i + 1) % 2].take(q, next.words, next.stride);
                                 });
      }
    }
  }
}

template <int kRows>
void dot_dense(const Weight& w, int64_t row, int64_t rows, const uint32_t* x, vfloat (*total)[kRows]) {
  alignas(64) uint32_t square[kSquare * kSquare];
  for (int64_t c = 0; c < w.columns; c += kSquare) {
    const int64_t count = w.columns - c < kSquare ? w.columns - c : kSquare;
    load_words(w.dense + row * w.columns + c, w.columns * kWord, rows, count, square);
    for (int v = 0; v * kLanes < rows; v++) {
      for (int64_t i = 0; i < count; i++) {
        const vuint values = load<vuint>(square + i * kSquare + v * kLanes);
        const uint32_t* xs = x + (c + i) * kRows;
#pragma GCC unroll 16
        for (int m = 0; m < kRows; m++) total[v][m] = Step<false>::multiply_add(total[v][m], xs[m], values);
      }
    }
  }
}

template <int kRows>
void dot_rows(const Product& p, int64_t column_begin, int64_t column_end) {
  for (int64_t n = column_begin; n < column_end; n += kDotColumns) {
    const int64_t count = column_end - n < kDotColumns ? column_end - n : kDotColumns;
    vfloat total[kDotVectors][kRows] = {};
    for (int t = 0; t < p.terms; t++) {
      const Weight& w = p.w[t];
      if (w.codes == nullptr) {
        dot_dense<kRows>(w, n, count, p.x[t].data, total);
      } else if (p.dtype == kBFloat16) {
        dot_int4<kDotPairs, kRows>(w, n, count, p.x[t].data, total);
      } else {
        dot_int4<false, kRows>(w, n, count, p.x[t].data, total);
      }
    }
    for (int m = 0; m < kRows; m++) {
      float sums[kDotColumns];
      for (int v = 0; v < kDotVectors; v++) store(sums + v * kLanes, total[v][m]);
      store_columns(p, m, n, count, sums);
    }
  }
}

template <int kRows = kMaxDotRows>
void dot_of(const Product& p, int64_t column_begin, int64_t column_end) {
  if (p.rows == kRows) {
    dot_rows<kRows>(p, column_begin, column_end);
  } else if constexpr (kRows > 1) {
    dot_of<kRows - 1>(p, column_begin, column_end);
  }
}

// The matrix registers overtake these products early.
int64_t max_dot_rows([[maybe_unused]] Dtype dtype) {
#if defined(__AMX_BF16__)
  if (dtype == kBFloat16) return 2;
#endif
  return kMaxDotRows;
}

void dot(const Product* p, int64_t column_begin, int64_t column_end) { dot_of(*p, column_begin, column_end); }

}  // namespace
