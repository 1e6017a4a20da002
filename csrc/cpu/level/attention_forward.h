// Attention of a block of queries to the keys of its sequence, a tile of keys at a time.
#pragma once

#include "attention_tile.h"
#include "online_softmax.h"

namespace {

struct ForwardScratch {
  uint32_t queries[kMaxColumns * kStrip];
  float scores[kStrip * kBlock];
  uint32_t probabilities[kStrip * kBlock];
  float outputs[kMaxColumns * kStrip];  // in panels of kBlock columns
  SoftmaxRow rows[kStrip];
};

// Whether a mask lets a query of the block see some key.
inline bool sees_some(const AttentionBlock& block, int64_t query) {
  const AttentionMask& mask = block.mask;
  for (int64_t key = 0; key < block.keys; key++) {
    if (mask.seen ? mask.seen[query * mask.stride + key / kBlock] >> key % kBlock & 1
                  : load_value(mask.dtype, mask.bias, query * mask.stride + key) != -__builtin_inff()) {
      return true;
    }
  }
  return false;
}

// Writes a query's output, from sums in panels of kBlock columns that lie `stride` apart, and the logarithm of the
// probabilities' `total`, which are relative to e^reference.
inline void store_query(const AttentionKind& kind, const AttentionBlock& block, const AttentionOutput& output,
                        int64_t query, const float* sums, int64_t stride, float total, float reference) {
  void* const o = element(kind.dtype, output.o, query, 0);
  if (total == 0 && block.mask.given() && !sees_some(block, query)) {
    __builtin_memset(o, 0, kind.value_columns * (kind.dtype == kFloat32 ? 4 : 2));
    output.lse[query] = -__builtin_inff();
    return;
  }
  store_panel_row(kind.dtype, sums, stride, kind.value_columns, 1.0f / total, o);
  output.lse[query] = reference + __builtin_logf(total);
}

template <bool kPairs>
void forward_strip(const AttentionKind& kind, const AttentionBlock& block, int64_t first, const AttentionOutput& output,
                   ForwardScratch& s) {
  const KeyTile<kPairs> layout(kind, false);
  const int64_t queries = least(kStrip, block.queries - first);
  const float scale = kind.scale * Probability<kPairs>::kPerNat;
  pack_rows<kPairs>(kind.dtype, {element(kind.dtype, block.q, first, 0), block.q.stride}, queries, kind.columns,
                    s.queries, layout.units);
  const SoftmaxStrip strip = {s.rows, s.scores, s.probabilities, kBlockUnits<kPairs>, s.outputs, kind.value_columns};
  const uint32_t* tile = block.packed;
  bool begun = false;
  for (int64_t key = 0; key < keys_seen(kind, block); key += kBlock, tile += layout.words) {
    const Meeting at = meeting(kind, block, first, queries, key);
    if (at.keys == 0) continue;
    dot_products<kPairs>(at, s.queries, tile, layout.units, s.scores);
    if (!begun) prefetch_strip(kind.dtype, block.ahead.q, first, block.ahead.queries, kind.columns);
    for_keys(at, [&](auto keys) {
      OnlineSoftmax<kPairs, keys.kVectors, keys.kSeen>{at, scale, !begun, strip}.run();
    });
    sum_over_keys<kPairs>(at, s.probabilities, kBlockUnits<kPairs>, tile + layout.panels, kind.value_columns, s.outputs,
                          !begun);
    begun = true;
  }
  for (int64_t query = 0; query < queries; query++) {
    const float total = begun ? sum(s.rows[query].total) : 0;
    store_query(kind, block, output, first + query, s.outputs + query * kBlock, kStrip * kBlock, total,
                s.rows[query].reference / Probability<kPairs>::kPerNat);
  }
}

template <bool kPairs>
void forward_block(const AttentionKind& kind, const AttentionBlock& block, const AttentionOutput& output,
                   ForwardScratch& s) {
  const Multiplying<kPairs> multiplying;
  for (int64_t first = 0; first < block.queries; first += kStrip) forward_strip<kPairs>(kind, block, first, output, s);
}

}  // namespace
