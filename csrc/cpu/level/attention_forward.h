// Attention of a block of queries to the keys of its sequence, a tile of keys at a time: the softmax is rescaled from tile
// to tile, as in Dao et al., FlashAttention, https://arxiv.org/abs/2205.14135.
#pragma once

#include "attention_tile.h"

namespace {

struct ForwardScratch {
  uint32_t queries[kMaxColumns * kStrip];
  float scores[kStrip * kBlock];
  uint32_t probabilities[kStrip * kBlock];
  float outputs[kMaxColumns * kStrip];  // in panels of kBlock columns
  vfloat total[kStrip];                 // of each query, a sum for each lane
  float reference[kStrip];              // the score whose probability counts as 1
};

// The probabilities of a tile, relative to a reference. A query keeps the one that it got from its first tile, unless
// probabilities become so large that what was summed must be rescaled to another.
template <bool kPairs, int kVectors, bool kMasked>
struct Softmax {
  static constexpr float kLarge = 65536;

  const Meeting& at;
  const float scale;
  const int64_t columns;
  const bool first;
  ForwardScratch& s;

  vfloat score(int64_t query, int v, float reference) const {
    return relative_score<kMasked>(s.scores + query * kBlock + v * kLanes, scale, reference,
                                   at.seen(query) - v * kLanes);
  }

  // Makes the highest score of this tile the reference.
  void refer(int64_t query) {
    vfloat most = broadcast(-__FLT_MAX__);  // not -infinity, whose difference to itself is not 0
    for (int v = 0; v < kVectors; v++) most = larger(score(query, v, 0), most);
    const float before = s.reference[query];
    s.reference[query] = largest(most);
    if (first) return;
    vfloat factor[1] = {broadcast(before - s.reference[query])};
    Probability<kPairs>::of(factor);
    s.total[query] *= factor[0];
    for (int64_t c = 0; c < round_up(columns, kBlock); c += kLanes) {
      float* output = s.outputs + c / kBlock * kStrip * kBlock + query * kBlock + c % kBlock;
      store(output, load<vfloat>(output) * factor[0]);
    }
  }

  vfloat row(int64_t query) {
    vfloat p[kVectors];
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; v++) p[v] = score(query, v, s.reference[query]);
    Probability<kPairs>::of(p);
    uint32_t* units = s.probabilities + query * kBlockUnits<kPairs>;
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; v += kUnit<kPairs>) {
      Probability<kPairs>::store_units(units + v * kLanes / kUnit<kPairs>, p + v);
    }
#pragma GCC unroll 4
    for (int half = kVectors / 2; half > 0; half /= 2) {
#pragma GCC unroll 8
      for (int v = 0; v < half; v++) p[v] += p[v + half];
    }
    return p[0];
  }

  void run() {
    for (int64_t query = 0; first && query < at.queries; query++) refer(query);
    for (int64_t query = 0; query < at.queries; query++) {
      vfloat total = row(query);
      if (any_above(total, kLarge)) refer(query), total = row(query);
      s.total[query] = first ? total : s.total[query] + total;
    }
  }
};

template <bool kPairs>
void softmax(const Meeting& at, float scale, int64_t columns, bool first, ForwardScratch& s) {
  if (at.keys <= kBlock / 2) {
    Softmax<kPairs, kBlockVectors / 2, true>{at, scale, columns, first, s}.run();
  } else if (at.whole()) {
    Softmax<kPairs, kBlockVectors, false>{at, scale, columns, first, s}.run();
  } else {
    Softmax<kPairs, kBlockVectors, true>{at, scale, columns, first, s}.run();
  }
}

template <bool kPairs>
void forward_strip(const AttentionKind& kind, const AttentionBlock& block, int64_t first, const AttentionOutput& output,
                   ForwardScratch& s) {
  const KeyTile<kPairs> layout(kind, false);
  const int64_t queries = least(kStrip, block.queries - first);
  const float scale = kind.scale * Probability<kPairs>::kPerNat;
  pack_rows<kPairs>(kind.dtype, {element(kind.dtype, block.q, first, 0), block.q.stride}, queries, kind.columns,
                    s.queries, layout.units);
  const uint32_t* tile = block.packed;
  for (int64_t key = 0; key < keys_seen(kind, block); key += kBlock, tile += layout.words) {
    const Meeting at = meeting(kind, block, first, queries, key);
    dot_products<kPairs>(at, s.queries, tile, layout.units, s.scores);
    softmax<kPairs>(at, scale, kind.value_columns, key == 0, s);
    sum_over_keys<kPairs>(at, s.probabilities, tile + layout.panels, kind.value_columns, s.outputs, key == 0);
  }
  for (int64_t query = 0; query < queries; query++) {
    const float total = sum(s.total[query]);
    store_panel_row(kind.dtype, s.outputs + query * kBlock, kStrip * kBlock, kind.value_columns, 1.0f / total,
                    element(kind.dtype, output.o, first + query, 0));
    output.lse[first + query] = s.reference[query] / Probability<kPairs>::kPerNat + __builtin_logf(total);
  }
}

template <bool kPairs>
void forward_block(const AttentionKind& kind, const AttentionBlock& block, const AttentionOutput& output,
                   ForwardScratch& s) {
  const Multiplying<kPairs> multiplying;
  for (int64_t first = 0; first < block.queries; first += kStrip) forward_strip<kPairs>(kind, block, first, output, s);
}

}  // namespace
