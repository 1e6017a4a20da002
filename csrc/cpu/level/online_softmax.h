// Softmax of rows that come a tile of columns at a time, and whose probabilities are factors of sums: as in Dao et al.,
// FlashAttention, https://arxiv.org/abs/2205.14135, probabilities are relative to a reference of their row, and what was
// summed is rescaled when that changes.
#pragma once

#include "attention_tile.h"

namespace {

struct SoftmaxRow {
  vfloat total;     // of the probabilities, a sum for each lane
  float reference;  // the score whose probability counts as 1
};

// A strip of rows. Scores and sums lie in panels of kBlock columns, [panel][row][column].
struct SoftmaxStrip {
  SoftmaxRow* rows;
  const float* scores;
  uint32_t* probabilities;  // rows of `units` units
  int64_t units;
  float* sums;
  int64_t columns;  // of the sums
};

// Probabilities of a tile of `kVectors` vectors; the scores are multiplied by `scale` first. A row keeps the reference that
// it got from its first tile, unless probabilities become so large that it needs another.
template <bool kPairs, int kVectors, Seen how>
struct OnlineSoftmax {
  static constexpr float kLarge = 65536;
  static constexpr int kAtOnce = kVectors < 4 ? kVectors : 4;

  const Meeting& at;
  const float scale;
  const bool first;
  const SoftmaxStrip& strip;

  vfloat score(int64_t row, int v, float reference) const {
    const int64_t panel = v / kBlockVectors, vector = v % kBlockVectors;
    const float* scores = strip.scores + (panel * kStrip + row) * kBlock + vector * kLanes;
    return relative_score<kPairs, how>(at, row, v, scores, scale, reference);
  }

  // Makes the highest score of this tile the reference.
  void refer(int64_t row) const {
    vfloat most = broadcast(-__FLT_MAX__);  // not -infinity, whose difference to itself is not 0
    for (int v = 0; v < kVectors; v++) most = larger(score(row, v, 0), most);
    SoftmaxRow& r = strip.rows[row];
    const float before = r.reference;
    r.reference = largest(most);
    if (first) return;
    vfloat factor[1] = {broadcast(before - r.reference)};
    Probability<kPairs>::of(factor);
    r.total *= factor[0];
    for (int64_t c = 0; c < round_up(strip.columns, kBlock); c += kLanes) {
      float* sum = strip.sums + (c / kBlock * kStrip + row) * kBlock + c % kBlock;
      store(sum, load<vfloat>(sum) * factor[0]);
    }
  }

  // Returns their sum.
  vfloat probabilities(int64_t row) const {
    const float reference = strip.rows[row].reference;
    uint32_t* units = strip.probabilities + row * strip.units;
    vfloat total = {};
    for (int v = 0; v < kVectors; v += kAtOnce, units += kAtOnce * kLanes / kUnit<kPairs>) {
      vfloat p[kAtOnce];
#pragma GCC unroll 4
      for (int i = 0; i < kAtOnce; i++) p[i] = score(row, v + i, reference);
      Probability<kPairs>::of(p);
#pragma GCC unroll 4
      for (int i = 0; i < kAtOnce; i += kUnit<kPairs>) {
        Probability<kPairs>::store_units(units + i * kLanes / kUnit<kPairs>, p + i);
      }
      for (int half = kAtOnce / 2; half > 0; half /= 2) {
        for (int i = 0; i < half; i++) p[i] += p[i + half];
      }
      total += p[0];
    }
    return total;
  }

  void run() const {
    for (int64_t row = 0; first && row < at.queries; row++) refer(row);
    for (int64_t row = 0; row < at.queries; row++) {
      vfloat total = probabilities(row);
      if (any_above(total, kLarge)) refer(row), total = probabilities(row);
      SoftmaxRow& r = strip.rows[row];
      r.total = first ? total : r.total + total;
    }
  }
};

}  // namespace
