// Attention of a block of queries to the keys of its sequence, a tile of keys at a time. As in Dao et al.,
// FlashAttention, https://arxiv.org/abs/2205.14135, the softmax is rescaled from tile to tile, and the backward
// computes the probabilities anew from the logarithm of their sum.
//
// Queries lie in the lanes: the scores [key][query] are a product of keys, whose units are broadcast, with transposed
// queries, and the softmax goes lane by lane.
#pragma once

#include "attention_pack.h"
#include "math.h"

namespace {

constexpr int kBlockVectors = kBlock / kLanes;
constexpr int kDiagonalStep = kBlock / 2;  // on the diagonal, a step of keys leaves out the steps of earlier queries

// How probabilities become operands of the next products.
template <bool kPairs>
struct Operand;

template <>
struct Operand<false> {
  static void store_row(uint32_t* row, int vector, vfloat value) { store(row + vector * kLanes, value); }
  static void store_unit(uint32_t* to, const vfloat* rows) { store(to, rows[0]); }
};

#if defined(__AVX512BF16__)
// The order of 16-bit elements 0, 16, 1, 17, ...
inline __m512i interleaved() {
  const __m512i low = _mm512_cvtepu16_epi32(_mm256_setr_epi16(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
  return _mm512_or_si512(low, _mm512_slli_epi32(_mm512_add_epi32(low, _mm512_set1_epi32(16)), 16));
}

template <>
struct Operand<true> {
  static void store_row(uint32_t* row, int vector, vfloat value) {
    _mm256_storeu_si256((__m256i*)row + vector, (__m256i)_mm512_cvtneps_pbh((__m512)value));
  }
  static void store_unit(uint32_t* to, const vfloat* rows) {
    const __m512i rounded = (__m512i)_mm512_cvtne2ps_pbh((__m512)rows[1], (__m512)rows[0]);
    _mm512_storeu_si512(to, _mm512_permutexvar_epi16(interleaved(), rounded));
  }
};
#endif

// What a block and a tile of keys have to do with each other.
struct Meeting {
  int64_t keys;     // of the tile
  int64_t queries;  // of the block
  bool diagonal;    // query i sees the keys up to i

  int vectors() const { return ceil_div(queries, kLanes); }
  int64_t step() const { return diagonal ? kDiagonalStep : kBlock; }
};

// out[key][query] = x[key] · y[query], with y transposed.
template <bool kPairs>
void dot_products(const Meeting& at, const uint32_t* x, const uint32_t* y, int64_t units, float* out) {
  for (int64_t key = 0; key < at.keys; key += at.step()) {
    const int64_t query = at.diagonal ? key : 0;
    const int64_t keys = round_up(least(at.step(), at.keys - key), kUnit<kPairs>);
    multiply_tile<kPairs>(at.vectors() - query / kLanes, keys, {x + key * units, units}, y + query, units,
                          out + key * kBlock + query, true);
  }
}

// sums[column][query] (+)= sum over keys of x[key][column] p[key][query], with x transposed.
template <bool kPairs>
void sum_over_keys(const Meeting& at, const uint32_t* x, int64_t columns, const uint32_t* p, float* sums, bool first) {
  for (int64_t query = 0; query < at.queries; query += at.step()) {
    const int64_t keys = at.diagonal ? least(at.keys, query + at.step()) : at.keys;
    const int vectors = ceil_div(least(at.step(), at.queries - query), kLanes);
    multiply_tile<kPairs>(vectors, columns, {x, kBlockUnits<kPairs>}, p + query, ceil_div(keys, kUnit<kPairs>),
                          sums + query, first);
  }
}

// sums[panel][key][column] += sum over queries of p[key][query] x[query][column], with x in panels.
template <bool kPairs>
void sum_over_queries(const Meeting& at, const uint32_t* p, const uint32_t* x, int64_t columns, float* sums) {
  for (int64_t c = 0; c < columns; c += kBlock, x += kBlockUnits<kPairs> * kBlock, sums += kBlock * kBlock) {
    const int vectors = ceil_div(least(kBlock, columns - c), kLanes);
    for (int64_t key = 0; key < at.keys; key += at.step()) {
      const int64_t unit = at.diagonal ? key / kUnit<kPairs> : 0;
      multiply_tile<kPairs>(vectors, least(at.step(), at.keys - key),
                            {p + key * kBlockUnits<kPairs> + unit, kBlockUnits<kPairs>}, x + unit * kBlock,
                            ceil_div(at.queries, kUnit<kPairs>) - unit, sums + key * kBlock, false);
    }
  }
}

// -infinity for what is not seen: by the diagonal, and the key that fills up a last unit.
template <bool kPairs>
void mask(const Meeting& at, float* scores) {
  const vfloat unseen = broadcast(-__builtin_inff());
  if (at.diagonal) {
    for (int key = 0; key < at.keys; key++) {
      for (int v = 0; v < at.vectors(); v++) {
        float* s = scores + key * kBlock + v * kLanes;
        store(s, lane_numbers() >= key - v * kLanes ? load<vfloat>(s) : unseen);
      }
    }
  }
  for (int64_t i = at.keys * kBlock; i < round_up(at.keys, kUnit<kPairs>) * kBlock; i += kLanes) {
    store(scores + i, unseen);
  }
}

struct ForwardScratch {
  Packing packing;
  uint32_t queries[kMaxColumns * kBlock];  // transposed
  float scores[kBlock * kBlock];           // [key][query]
  uint32_t probabilities[kBlock * kBlock];
  float outputs[kMaxColumns * kBlock];     // [column][query]
  vfloat highest[kBlockVectors], total[kBlockVectors];
};

inline vfloat highest_score(const float* scores, int64_t keys, float scale, vfloat highest) {
  constexpr int kApart = 4;  // comparisons that do not wait for each other
  vfloat found[kApart] = {highest, highest, highest, highest};
  int64_t key = 0;
  for (; key + kApart <= keys; key += kApart) {
#pragma GCC unroll 4
    for (int i = 0; i < kApart; i++) found[i] = larger(scale * load<vfloat>(scores + (key + i) * kBlock), found[i]);
  }
  for (; key < keys; key++) found[0] = larger(scale * load<vfloat>(scores + key * kBlock), found[0]);
  return larger(larger(found[0], found[1]), larger(found[2], found[3]));
}

// The probabilities of a tile as units of keys, relative to the highest score so far; what was summed relative to the
// highest one before is rescaled.
template <bool kPairs>
void softmax_tile(const Meeting& at, float scale, int64_t columns, bool first, ForwardScratch& s) {
  for (int v = 0; v < at.vectors(); v++) {
    const float* scores = s.scores + v * kLanes;
    const vfloat highest = highest_score(scores, at.keys, scale, s.highest[v]);
    vfloat total = {};
    for (int64_t key = 0; key < at.keys; key += kUnit<kPairs>) {
      vfloat p[kUnit<kPairs>];
      for (int i = 0; i < kUnit<kPairs>; i++) {
        p[i] = vexp_or_zero(scale * load<vfloat>(scores + (key + i) * kBlock) - highest);
        total += p[i];
      }
      Operand<kPairs>::store_unit(s.probabilities + key / kUnit<kPairs> * kBlock + v * kLanes, p);
    }
    const vfloat factor = vexp_or_zero(s.highest[v] - highest);
    s.total[v] = s.total[v] * factor + total;
    s.highest[v] = highest;
    for (int64_t i = v * kLanes; !first && i < columns * kBlock; i += kBlock) {
      store(s.outputs + i, load<vfloat>(s.outputs + i) * factor);
    }
  }
}

inline int64_t keys_seen(const AttentionKind& kind, const AttentionBlock& block) {
  return kind.causal ? least(block.keys, block.first + block.queries) : block.keys;
}

inline Meeting meeting(const AttentionKind& kind, const AttentionBlock& block, int64_t key) {
  return {least(kBlock, keys_seen(kind, block) - key), block.queries, kind.causal && key == block.first};
}

template <bool kPairs>
void forward_block(const AttentionKind& kind, const AttentionBlock& block, const AttentionOutput& output,
                   ForwardScratch& s) {
  const KeyTile<kPairs> layout(kind, false);
  const Multiplying<kPairs> multiplying;
  const int vectors = ceil_div(block.queries, kLanes);
  pack_rows_transposed<kPairs>(kind.dtype, block.q, block.queries, kind.columns, s.packing, s.queries);
  for (int v = 0; v < vectors; v++) {
    s.highest[v] = broadcast(-__FLT_MAX__);  // not -infinity, whose difference to itself is not 0
    s.total[v] = vfloat{};
  }
  const uint32_t* tile = block.packed;
  for (int64_t key = 0; key < keys_seen(kind, block); key += kBlock, tile += layout.words) {
    const Meeting at = meeting(kind, block, key);
    dot_products<kPairs>(at, tile, s.queries, layout.units, s.scores);
    mask<kPairs>(at, s.scores);
    softmax_tile<kPairs>(at, kind.scale, kind.value_columns, key == 0, s);
    sum_over_keys<kPairs>(at, tile + layout.transposed, kind.value_columns, s.probabilities, s.outputs, key == 0);
  }
  for (int v = 0; v < vectors; v++) {
    const vfloat factor = 1.0f / s.total[v];
    for (int64_t i = v * kLanes; i < kind.value_columns * kBlock; i += kBlock) {
      store(s.outputs + i, load<vfloat>(s.outputs + i) * factor);
    }
  }
  store_transposed(kind.dtype, s.outputs, block.queries, kind.value_columns, s.packing, output.o);
  for (int64_t q = 0; q < block.queries; q++) {
    output.lse[q] = s.highest[q / kLanes][q % kLanes] + __builtin_logf(s.total[q / kLanes][q % kLanes]);
  }
}

struct BackwardScratch {
  Packing packing;
  uint32_t queries[kMaxColumns * kBlock], d_outputs[kMaxColumns * kBlock];  // transposed
  uint32_t query_panels[kMaxColumns * kBlock], d_output_panels[kMaxColumns * kBlock];
  float scores[kBlock * kBlock], d_probabilities[kBlock * kBlock];  // [key][query]
  uint32_t probabilities[kBlock * kBlock], d_scores[kBlock * kBlock], d_score_units[kBlock * kBlock];
  float d_queries[kMaxColumns * kBlock];  // [column][query]
  float lse[kBlock], delta[kBlock];
};

// dS = P (dP - delta) without the factor `scale`: rows of keys, and units of keys for the sum over them.
template <bool kPairs>
void differentiate_softmax(const Meeting& at, float scale, BackwardScratch& s) {
  for (int64_t key = 0; key < at.keys; key += kUnit<kPairs>) {
    for (int v = 0; v < at.vectors(); v++) {
      const vfloat lse = load<vfloat>(s.lse + v * kLanes), delta = load<vfloat>(s.delta + v * kLanes);
      vfloat d_score[kUnit<kPairs>];
      for (int i = 0; i < kUnit<kPairs>; i++) {
        const int64_t from = (key + i) * kBlock + v * kLanes;
        const vfloat p = vexp_or_zero(scale * load<vfloat>(s.scores + from) - lse);
        d_score[i] = p * (load<vfloat>(s.d_probabilities + from) - delta);
        Operand<kPairs>::store_row(s.probabilities + (key + i) * kBlockUnits<kPairs>, v, p);
        Operand<kPairs>::store_row(s.d_scores + (key + i) * kBlockUnits<kPairs>, v, d_score[i]);
      }
      Operand<kPairs>::store_unit(s.d_score_units + key / kUnit<kPairs> * kBlock + v * kLanes, d_score);
    }
  }
}

inline vfloat load_values(Dtype dtype, const void* from, int64_t index) {
  return dtype == kFloat32 ? load<vfloat>((const float*)from + index) : load_bfloat16((const uint16_t*)from + index);
}

inline float load_value(Dtype dtype, const void* from, int64_t index) {
  return dtype == kFloat32 ? ((const float*)from)[index] : int4::bfloat16_to_float(((const uint16_t*)from)[index]);
}

inline float dot_of_rows(Dtype dtype, const void* a, const void* b, int64_t columns) {
  vfloat total = {};
  int64_t c = 0;
  for (; c + kLanes <= columns; c += kLanes) total += load_values(dtype, a, c) * load_values(dtype, b, c);
  float rest = 0;
  for (; c < columns; c++) rest += load_value(dtype, a, c) * load_value(dtype, b, c);
  return sum(total) + rest;
}

// Of each query delta = dO · O. Queries that fill up the block get lse = infinity, and so probabilities of 0.
inline void load_statistics(const AttentionKind& kind, const AttentionBlock& block, const AttentionGradient& gradient,
                            BackwardScratch& s) {
  for (int64_t q = 0; q < kBlock; q++) {
    const bool exists = q < block.queries;
    s.lse[q] = exists ? gradient.lse[q] : __builtin_inff();
    s.delta[q] = exists ? dot_of_rows(kind.dtype, element(kind.dtype, gradient.o, q, 0),
                                      element(kind.dtype, gradient.d_o, q, 0), kind.value_columns)
                        : 0;
  }
}

template <bool kPairs>
void backward_block(const AttentionKind& kind, const AttentionBlock& block, const AttentionGradient& gradient,
                    BackwardScratch& s) {
  const KeyTile<kPairs> layout(kind, true);
  const Multiplying<kPairs> multiplying;
  const int64_t dk_tile = round_up(kind.columns, kBlock) * kBlock;
  const int64_t dv_tile = round_up(kind.value_columns, kBlock) * kBlock;
  pack_rows_transposed<kPairs>(kind.dtype, block.q, block.queries, kind.columns, s.packing, s.queries);
  pack_rows_transposed<kPairs>(kind.dtype, gradient.d_o, block.queries, kind.value_columns, s.packing, s.d_outputs);
  pack_panels<kPairs>(kind.dtype, block.q, block.queries, kind.columns, s.query_panels);
  pack_panels<kPairs>(kind.dtype, gradient.d_o, block.queries, kind.value_columns, s.d_output_panels);
  load_statistics(kind, block, gradient, s);

  const uint32_t* tile = block.packed;
  float *dk = gradient.dk, *dv = gradient.dv;
  for (int64_t key = 0; key < keys_seen(kind, block); key += kBlock, tile += layout.words) {
    const Meeting at = meeting(kind, block, key);
    dot_products<kPairs>(at, tile, s.queries, layout.units, s.scores);
    mask<kPairs>(at, s.scores);
    dot_products<kPairs>(at, tile + layout.value, s.d_outputs, layout.value_units, s.d_probabilities);
    differentiate_softmax<kPairs>(at, kind.scale, s);
    sum_over_queries<kPairs>(at, s.probabilities, s.d_output_panels, kind.value_columns, dv);
    sum_over_queries<kPairs>(at, s.d_scores, s.query_panels, kind.columns, dk);
    sum_over_keys<kPairs>(at, tile + layout.transposed, kind.columns, s.d_score_units, s.d_queries, key == 0);
    dk += dk_tile;
    dv += dv_tile;
  }
  for (int64_t i = 0; i < kind.columns * kBlock; i += kLanes) {
    store(s.d_queries + i, load<vfloat>(s.d_queries + i) * kind.scale);
  }
  store_transposed(kind.dtype, s.d_queries, block.queries, kind.columns, s.packing, gradient.dq);
}

#if defined(__AVX512BF16__)
#define FOR_UNITS_OF(dtype, call) (dtype == kBFloat16 ? call<true> : call<false>)
#else
#define FOR_UNITS_OF(dtype, call) (call<false>)
#endif

int64_t attention_scratch_bytes() {
  return sizeof(BackwardScratch) > sizeof(ForwardScratch) ? sizeof(BackwardScratch) : sizeof(ForwardScratch);
}

template <bool kPairs>
int64_t tile_words(const AttentionKind& kind, bool backward) {
  return KeyTile<kPairs>(kind, backward).words;
}

int64_t attention_tile_words(const AttentionKind* kind, bool backward) {
  return FOR_UNITS_OF(kind->dtype, tile_words)(*kind, backward);
}

void attention_pack(const AttentionKind* kind, bool backward, ConstRows k, ConstRows v, int64_t keys, uint32_t* tile,
                    void* scratch) {
  FOR_UNITS_OF(kind->dtype, pack_keys)(*kind, backward, k, v, keys, *(Packing*)scratch, tile);
}

void attention_forward(const AttentionKind* kind, const AttentionBlock* block, const AttentionOutput* output,
                       void* scratch) {
  FOR_UNITS_OF(kind->dtype, forward_block)(*kind, *block, *output, *(ForwardScratch*)scratch);
}

void attention_backward(const AttentionKind* kind, const AttentionBlock* block, const AttentionGradient* gradient,
                        void* scratch) {
  FOR_UNITS_OF(kind->dtype, backward_block)(*kind, *block, *gradient, *(BackwardScratch*)scratch);
}

void attention_sum(const float* parts, int64_t count, int64_t part_stride, float scale, Dtype dtype, int64_t keys,
                   int64_t columns, Rows out) {
  for (int64_t c = 0; c < columns; c += kBlock, parts += kBlock * kBlock) {
    for (int64_t key = 0; key < keys; key++) {
      float row[kBlock];
      for (int i = 0; i < kBlock; i += kLanes) {
        vfloat total = {};
        for (int64_t part = 0; part < count; part++) {
          total += load<vfloat>(parts + part * part_stride + key * kBlock + i);
        }
        store(row + i, total * scale);
      }
      store_row(dtype, row, least(kBlock, columns - c), element(dtype, out, key, c));
    }
  }
}

}  // namespace
