// Losses of rows with logits x wᵀ that are never whole, and their gradients G w with G = softmax(x wᵀ) - onehot(target).
// That is attention of the rows to keys and values w, a tile of classes at a time. A row's target stays out of the sums.
// It comes in at the end, with p - 1 as minus the sum of the other probabilities, which keeps its digits where p is almost 1.
#pragma once

#include "attention_tile.h"
#include "linear_cross_entropy_block.h"
#include "online_softmax.h"

namespace {

constexpr int kClasses = 256;  // of a tile

// Rows of x against tiles of classes. Scores are logits in the unit of Probability.
template <bool kPairs>
class Head {
 public:
  static constexpr int kClassUnits = kClasses / kUnit<kPairs>;

  Head(const LinearCrossEntropy& p, int64_t rows, void* scratch)
      : p_(p),
        units_(round_up(ceil_div(p.columns, kUnit<kPairs>), kSquare)),
        panels_(ceil_div(p.columns, kBlock)) {
    const auto take = [&](int64_t words) {
      void* const part = (void*)((uintptr_t)scratch + bytes_);
      bytes_ += round_up(words, kSquare) * sizeof(uint32_t);
      return part;
    };
    const int64_t padded = round_up(rows, kStrip);
    rows_ = (SoftmaxRow*)take(padded * (int64_t)(sizeof(SoftmaxRow) / sizeof(uint32_t)));
    at_targets_ = (float*)take(padded);
    x_ = (uint32_t*)take(padded * units_);
    sums_ = (float*)take(p.dx ? padded * panels_ * kBlock : 0);
    scores_ = (float*)take(kStrip * kClasses);
    probabilities_ = (uint32_t*)take(kStrip * kClassUnits);
    packing_ = (uint32_t*)take(kBlock * units_);
    keys_ = (uint32_t*)take(kClasses * units_);
    values_ = (uint32_t*)take(p.dx ? panels_ * kClassUnits * kBlock : 0);
  }

  int64_t bytes() const { return bytes_; }

  void run(int64_t row_begin, int64_t row_end) {
    const Multiplying<kPairs> multiplying;
    const int64_t rows = row_end - row_begin;
    pack_rows<kPairs>(p_.dtype, {row_of(p_.x, row_begin), p_.columns}, rows, p_.columns, x_, units_);
    for (int64_t first = 0; first < p_.classes; first += kClasses) {
      const int64_t count = least(kClasses, p_.classes - first);
      pack_classes(first, count);
      for (int64_t row = 0; row < rows; row += kStrip) {
        const int64_t strip = least(kStrip, rows - row);
        const Meeting at = {0, strip, count, false};
        score(at, row);
        for (int64_t i = 0; i < strip; i++) take_target(row, i, p_.targets[row_begin + row + i] - first, count);
        prefetch_classes(first + kClasses, row, strip, rows);
        softmax(at, row, first == 0);
        if (!p_.dx) continue;
        sum_over_keys<kPairs>(at, probabilities_, kClassUnits, values_, p_.columns, sums_of(row), first == 0);
      }
    }
    for (int64_t row = 0; row < rows; row++) finish(row, row_begin + row);
  }

 private:
  using P = Probability<kPairs>;

  const void* row_of(const void* matrix, int64_t row) const {
    return element(p_.dtype, ConstRows{matrix, p_.columns}, row, 0);
  }

  float* sums_of(int64_t row) const { return sums_ + row * panels_ * kBlock; }

  void pack_classes(int64_t first, int64_t count) {
    for (int64_t c = 0; c < count; c += kBlock) {
      const ConstRows classes = {row_of(p_.weight, first + c), p_.columns};
      pack_rows_transposed<kPairs>(p_.dtype, classes, least(kBlock, count - c), p_.columns, packing_,
                                   keys_ + c * units_);
    }
    for (int64_t panel = 0; p_.dx && panel < panels_; panel++) {
      const ConstRows columns = {element(p_.dtype, {row_of(p_.weight, first), p_.columns}, 0, panel * kBlock), p_.columns};
      pack_row_units<kPairs>(p_.dtype, columns, count, least(kBlock, p_.columns - panel * kBlock),
                             values_ + panel * kClassUnits * kBlock, kBlock);
    }
  }

  // The share of these rows among all in the classes that come next.
  void prefetch_classes(int64_t first, int64_t row, int64_t strip, int64_t rows) const {
    const int64_t count = least(kClasses, p_.classes - first);
    if (count <= 0) return;
    const auto* from = (const char*)row_of(p_.weight, first + count * row / rows);
    prefetch(from, (const char*)row_of(p_.weight, first + count * (row + strip) / rows) - from);
  }

  // Scores of a strip by panels of classes: [panel][row][class].
  void score(const Meeting& at, int64_t row) {
    for (int64_t c = 0; c < at.keys; c += kBlock) {
      const Meeting panel = {0, at.queries, least(kBlock, at.keys - c), false};
      dot_products<kPairs>(panel, x_ + row * units_, keys_ + c * units_, units_, scores_ + c * kStrip);
    }
  }

  void take_target(int64_t row, int64_t i, int64_t target, int64_t count) {
    if (target < 0 || target >= count) return;
    float& score = scores_[(target / kBlock * kStrip + i) * kBlock + target % kBlock];
    at_targets_[row + i] = score * P::kPerNat;
    score = -__builtin_inff();
  }

  void softmax(const Meeting& at, int64_t row, bool first) {
    constexpr int kVectors = kClasses / kLanes;
    const SoftmaxStrip strip = {rows_ + row, scores_,      probabilities_,
                                kClassUnits, sums_of(row), p_.dx ? p_.columns : 0};
    if (at.keys == kClasses) {
      OnlineSoftmax<kPairs, kVectors, Seen::kAll>{at, P::kPerNat, first, strip}.run();
    } else {
      OnlineSoftmax<kPairs, kVectors, Seen::kFirst>{at, P::kPerNat, first, strip}.run();
    }
  }

  static float power(float score) { return kPairs ? __builtin_exp2f(score) : __builtin_expf(score); }

  void finish(int64_t row, int64_t index) {
    const int64_t target = p_.targets[index];
    const Rows dx = {p_.dx, p_.columns};
    if (target == p_.ignore_index) {
      p_.losses[index] = 0;
      if (p_.dx) __builtin_memset(element(p_.dtype, dx, index, 0), 0, p_.columns * (p_.dtype == kFloat32 ? 4 : 2));
      return;
    }
    const float reference = rows_[row].reference, at_target = at_targets_[row];
    const float most = at_target > reference ? at_target : reference;
    const float scale = power(reference - most), others = sum(rows_[row].total) * scale;
    const float all = others + power(at_target - most);
    p_.losses[index] = (most - at_target) / P::kPerNat + __builtin_logf(all);
    if (!p_.dx) return;

    const void* const target_row = row_of(p_.weight, target);
    const float* sums = sums_of(row / kStrip * kStrip) + row % kStrip * kBlock;
    for (int64_t c = 0; c < p_.columns; c += kBlock, sums += kStrip * kBlock) {
      const int64_t count = least(kBlock, p_.columns - c);
      float values[kBlock] = {};
      for (int64_t i = 0; i < count; i++) {
        const float w = p_.dtype == kFloat32 ? ((const float*)target_row)[c + i]
                                             : int4::bfloat16_to_float(((const uint16_t*)target_row)[c + i]);
        values[i] = (sums[i] * scale - others * w) / all;
      }
      store_row(p_.dtype, values, count, element(p_.dtype, dx, index, c));
    }
  }

  const LinearCrossEntropy& p_;
  const int64_t units_, panels_;
  SoftmaxRow* rows_;  // without the target
  uint32_t* x_;
  float *at_targets_, *sums_, *scores_;
  uint32_t *probabilities_, *packing_, *keys_, *values_;
  int64_t bytes_ = 0;
};

template <bool kPairs>
int64_t head_bytes(const LinearCrossEntropy& p, int64_t rows) {
  return Head<kPairs>(p, rows, nullptr).bytes();
}

template <bool kPairs>
void run_head(const LinearCrossEntropy& p, int64_t row_begin, int64_t row_end, void* scratch) {
  Head<kPairs>(p, row_end - row_begin, scratch).run(row_begin, row_end);
}

int64_t linear_cross_entropy_bytes(const LinearCrossEntropy* p, int64_t rows) {
  return FOR_UNITS_OF(p->dtype, head_bytes)(*p, rows);
}

void linear_cross_entropy(const LinearCrossEntropy* p, int64_t row_begin, int64_t row_end, void* scratch) {
  FOR_UNITS_OF(p->dtype, run_head)(*p, row_begin, row_end, scratch);
}

}  // namespace
