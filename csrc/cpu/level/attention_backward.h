// The gradients of a block of queries, and what it adds to those of the keys and values. As in FlashAttention, the
// probabilities are computed anew from the logarithm of their sum.
#pragma once

#include "attention_tile.h"

namespace {

struct BackwardScratch {
  Packing packing;
  uint32_t queries[kMaxColumns * kBlock], d_outputs[kMaxColumns * kBlock];
  uint32_t query_columns[kMaxColumns * kBlock], d_output_columns[kMaxColumns * kBlock];  // transposed
  float scores[kStrip * kBlock], d_probabilities[kStrip * kBlock];
  uint32_t d_scores[kStrip * kBlock];
  uint32_t probability_units[kBlock * kBlock], d_score_units[kBlock * kBlock];  // of neighbouring queries
  float d_queries[kStrips * kStrip * kMaxColumns];  // by strips, in panels of kBlock columns
  float lse[kBlock], delta[kBlock];
};

// dS = P (dP - delta) without the factor `scale`: for the sums over keys, and with P for those over queries.
template <bool kPairs, int kVectors, Seen how>
void differentiate_softmax(const Meeting& at, float scale, BackwardScratch& s) {
  constexpr int kRows = kUnit<kPairs>, kAtOnce = kUnit<kPairs>;
  for (int64_t query = 0; query < at.queries; query += kRows) {
    uint32_t* p_units = s.probability_units + (at.first + query) / kRows * kBlock;
    uint32_t* d_score_units = s.d_score_units + (at.first + query) / kRows * kBlock;
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; v += kAtOnce) {
      vfloat p[kRows * kAtOnce], d_scores[kRows * kAtOnce];  // [row][vector]
#pragma GCC unroll 4
      for (int i = 0; i < kRows * kAtOnce; i++) {
        const int row = query + i / kAtOnce, vector = v + i % kAtOnce;
        p[i] = relative_score<kPairs, how>(at, row, vector, s.scores + row * kBlock + vector * kLanes, scale,
                                           s.lse[at.first + row]);
      }
      Probability<kPairs>::of(p);
#pragma GCC unroll 4
      for (int i = 0; i < kRows * kAtOnce; i++) {
        const int row = query + i / kAtOnce, vector = v + i % kAtOnce;
        d_scores[i] = p[i] * (load<vfloat>(s.d_probabilities + row * kBlock + vector * kLanes) - s.delta[at.first + row]);
      }
#pragma GCC unroll 2
      for (int row = 0; row < kRows; row++) {
        Probability<kPairs>::store_units(s.d_scores + ((query + row) * kBlock + v * kLanes) / kAtOnce,
                                         d_scores + row * kAtOnce);
      }
#pragma GCC unroll 2
      for (int i = 0; i < kAtOnce; i++) {
        Probability<kPairs>::store_row_units(p_units + (v + i) * kLanes, p + i);
        Probability<kPairs>::store_row_units(d_score_units + (v + i) * kLanes, d_scores + i);
      }
    }
  }
}

// sums[column][key] += sum over queries of x[query][column] p[query][key], with x transposed, for the queries of a block
// and up to kBlock keys. On the diagonal a strip of keys is seen from its own queries on.
template <bool kPairs>
void sum_over_queries(const AttentionBlock& block, const Meeting& last, const uint32_t* x, int64_t columns,
                      const uint32_t* p, float* sums) {
  const int64_t step = last.diagonal ? kStrip : kBlock;
  for (int64_t key = 0; key < last.keys; key += step) {
    const int64_t unit = last.diagonal ? key / kUnit<kPairs> : 0;
    multiply_tile<kPairs>(ceil_div(least(step, last.keys - key), kLanes), columns, {x + unit, kBlockUnits<kPairs>},
                          p + unit * kBlock + key, ceil_div(block.queries, kUnit<kPairs>) - unit, sums + key, false);
  }
}

inline vfloat load_values(Dtype dtype, const void* from, int64_t index) {
  return dtype == kFloat32 ? load<vfloat>((const float*)from + index) : load_bfloat16((const uint16_t*)from + index);
}

inline float dot_of_rows(Dtype dtype, const void* a, const void* b, int64_t columns) {
  vfloat total = {};
  int64_t c = 0;
  for (; c + kLanes <= columns; c += kLanes) total += load_values(dtype, a, c) * load_values(dtype, b, c);
  float rest = 0;
  for (; c < columns; c++) rest += load_value(dtype, a, c) * load_value(dtype, b, c);
  return sum(total) + rest;
}

// Of each query delta = dO · O. Those that see nothing or fill up the block get lse = infinity, and so probabilities of 0.
template <bool kPairs>
void load_statistics(const AttentionKind& kind, const AttentionBlock& block, const AttentionGradient& gradient,
                     BackwardScratch& s) {
  for (int64_t q = 0; q < kBlock; q++) {
    const bool exists = q < block.queries;
    const bool sees = exists && gradient.lse[q] != -__builtin_inff();
    s.lse[q] = sees ? gradient.lse[q] * Probability<kPairs>::kPerNat : __builtin_inff();
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
  const float scale = kind.scale * Probability<kPairs>::kPerNat;
  const int64_t dk_tile = round_up(kind.columns, kBlock) * kBlock;
  const int64_t dv_tile = round_up(kind.value_columns, kBlock) * kBlock;
  pack_whole_rows<kPairs>(kind.dtype, block.q, block.queries, kind.columns, s.queries);
  pack_whole_rows<kPairs>(kind.dtype, gradient.d_o, block.queries, kind.value_columns, s.d_outputs);
  pack_row_units_transposed<kPairs>(kind.dtype, block.q, block.queries, kind.columns, s.packing, s.query_columns);
  pack_row_units_transposed<kPairs>(kind.dtype, gradient.d_o, block.queries, kind.value_columns, s.packing,
                                    s.d_output_columns);
  load_statistics<kPairs>(kind, block, gradient, s);

  const AttentionAhead& ahead = block.ahead;
  const uint32_t* tile = block.packed;
  float *dk = gradient.dk, *dv = gradient.dv;
  bool begun = false;
  for (int64_t key = 0; key < keys_seen(kind, block);
       key += kBlock, tile += layout.words, dk += dk_tile, dv += dv_tile) {
    Meeting at = meeting(kind, block, 0, block.queries, key);
    const int64_t most = at.keys;
    if (most == 0) continue;
    for (int64_t first = 0; first < block.queries; first += kStrip) {
      at = meeting(kind, block, first, round_up(least(kStrip, block.queries - first), kUnit<kPairs>), key);
      if (at.mask.given()) at.keys = most;  // as many for all strips, which are summed over together
      dot_products<kPairs>(at, s.queries + first * layout.units, tile, layout.units, s.scores);
      if (!begun) prefetch_strip(kind.dtype, ahead.q, first, ahead.queries, kind.columns);
      dot_products<kPairs>(at, s.d_outputs + first * layout.value_units, tile + layout.value, layout.value_units,
                           s.d_probabilities);
      if (!begun) prefetch_strip(kind.dtype, ahead.d_o, first, ahead.queries, kind.value_columns);
      for_keys(at, [&](auto keys) { differentiate_softmax<kPairs, keys.kVectors, keys.kSeen>(at, scale, s); });
      sum_over_keys<kPairs>(at, s.d_scores, kBlockUnits<kPairs>, tile + layout.panels, kind.columns,
                            s.d_queries + first * kMaxColumns, !begun);
      if (!begun) prefetch_strip(kind.dtype, ahead.o, first, ahead.queries, kind.value_columns);
    }
    sum_over_queries<kPairs>(block, at, s.d_output_columns, kind.value_columns, s.probability_units, dv);
    sum_over_queries<kPairs>(block, at, s.query_columns, kind.columns, s.d_score_units, dk);
    begun = true;
  }
  if (!begun) __builtin_memset(s.d_queries, 0, sizeof s.d_queries);
  for (int64_t query = 0; query < block.queries; query++) {
    const float* d_query = s.d_queries + query / kStrip * kStrip * kMaxColumns + query % kStrip * kBlock;
    store_panel_row(kind.dtype, d_query, kStrip * kBlock, kind.columns, kind.scale,
                    element(kind.dtype, gradient.dq, query, 0));
  }
}

}  // namespace
