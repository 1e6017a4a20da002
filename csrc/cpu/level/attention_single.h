// Attention of single queries, as text is generated: each reads the keys and values once, as they lie in memory, together
// with the queries of the heads that share them. Packing would take longer than that.
#pragma once

#include "attention_forward.h"

namespace {

constexpr int kHeadsAtOnce = kLanes == 16 ? 4 : 2;  // whose sums stay in registers
constexpr int kVectorsAtOnce = 4;

inline int64_t score_stride(int64_t keys) { return round_up(keys, kLanes); }

// scores[head][key] = q · k. A query is padded with zeros to whole vectors.
template <Dtype dtype, int kHeads>
INLINE inline void dot_products(const float (&q)[kHeads][kMaxColumns], ConstRows k, int64_t keys, int64_t columns,
                                float* scores) {
  for (int64_t key = 0; key < keys; key++) {
    const auto* row = (const Element<dtype>*)k.data + key * k.stride;
    vfloat total[kHeads] = {};
    for_vectors(columns, [&](int64_t c, int64_t count) INLINE {
      const vfloat values = load_some<dtype>(row + c, count);
      for (int h = 0; h < kHeads; h++) total[h] += load<vfloat>(q[h] + c) * values;
    });
    for (int h = 0; h < kHeads; h++) scores[h * score_stride(keys) + key] = sum(total[h]);
  }
}

// Scores of a head to probabilities, relative to the highest, which is the logarithm's too. Returns their sum.
inline float to_probabilities(const Meeting& at, int64_t head, float scale, float* scores, float& reference) {
  const auto score = [&](int64_t key) INLINE {
    vfloat value = scale * load<vfloat>(scores + key);
    const vfloat unseen = broadcast(-__builtin_inff());
    if (at.mask.seen) value = choose(at.mask.seen[at.mask_row(head) + key / kBlock] >> key % kBlock, value, unseen);
    if (at.mask.bias) value += bias_of(at, head, key / kLanes);
    return lane_numbers() < (int)(at.keys - key) ? value : unseen;
  };
  vfloat most = broadcast(-__FLT_MAX__), total = {};
  for (int64_t key = 0; key < at.keys; key += kLanes) {
    const vfloat value = score(key);
    store(scores + key, value);
    most = larger(value, most);
  }
  reference = largest(most);
  for (int64_t key = 0; key < at.keys; key += kLanes) {
    const vfloat p = vexp_or_zero(load<vfloat>(scores + key) - reference);
    store(scores + key, p);
    total += p;
  }
  return sum(total);
}

// out[head][c] = Σ p[head][key] v[key][c], for up to kVectorsAtOnce vectors of columns from c on.
template <Dtype dtype, int kVectors, int kHeads>
INLINE inline void sum_of_values(const float* p, ConstRows v, int64_t keys, int64_t c, int64_t columns,
                                 float (&out)[kHeads][kMaxColumns]) {
  vfloat total[kHeads][kVectors] = {};
  for (int64_t key = 0; key < keys; key++) {
    const auto* row = (const Element<dtype>*)v.data + key * v.stride;
    vfloat values[kVectors];
#pragma GCC unroll 4
    for (int i = 0; i < kVectors; i++) values[i] = load_some<dtype>(row + c + i * kLanes, columns - c - i * kLanes);
#pragma GCC unroll 4
    for (int h = 0; h < kHeads; h++) {
#pragma GCC unroll 4
      for (int i = 0; i < kVectors; i++) total[h][i] += p[h * score_stride(keys) + key] * values[i];
    }
  }
  for (int h = 0; h < kHeads; h++) {
    for (int i = 0; i < kVectors; i++) store(out[h] + c + i * kLanes, total[h][i]);
  }
}

template <Dtype dtype, int kHeads>
void single_queries(const AttentionKind& kind, const AttentionBlock& block, int64_t first, ConstRows k, ConstRows v,
                    const AttentionOutput& output, float* scores) {
  alignas(64) float q[kHeads][kMaxColumns] = {}, o[kHeads][kMaxColumns] = {};
  for (int h = 0; h < kHeads; h++) {
    const auto* row = (const Element<dtype>*)element(kind.dtype, block.q, first + h, 0);
    for_vectors(kind.columns, [&](int64_t c, int64_t count) { store(q[h] + c, load_some<dtype>(row + c, count)); });
  }
  dot_products<dtype>(q, k, block.keys, kind.columns, scores);

  Meeting at = {first, kHeads, block.keys, false};
  at.mask = block.mask;
  at.last = block.queries - 1;
  float totals[kHeads], references[kHeads];
  for (int h = 0; h < kHeads; h++) {
    totals[h] = to_probabilities(at, h, kind.scale, scores + h * score_stride(block.keys), references[h]);
  }
  for_parts<kVectorsAtOnce>(ceil_div(kind.value_columns, kLanes), [&](auto vectors, int64_t begin) INLINE {
    sum_of_values<dtype, decltype(vectors)::kNumber>(scores, v, block.keys, begin * kLanes, kind.value_columns, o);
  });
  for (int h = 0; h < kHeads; h++) {
    store_query(kind, block, output, first + h, o[h], kBlock, totals[h], references[h]);
  }
}

// Of heads' queries, which are rows of the block.
template <Dtype dtype>
void single_queries(const AttentionKind& kind, const AttentionBlock& block, ConstRows k, ConstRows v,
                    const AttentionOutput& output, float* scores) {
  for_parts<kHeadsAtOnce>(block.queries, [&](auto heads, int64_t first) {
    single_queries<dtype, decltype(heads)::kNumber>(kind, block, first, k, v, output, scores);
  });
}

}  // namespace
