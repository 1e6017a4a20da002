// Where queries and keys meet in attention: scores and probabilities of a strip of queries and a tile of keys.
//
// Keys lie in the lanes: the scores [query][key] are a product of queries, whose units are broadcast, with transposed
// keys. A strip is as large as its scores and sums can be in the nearest cache.
#pragma once

#include "attention_pack.h"
#include "elements.h"
#include "probability.h"

namespace {

constexpr int kBlockVectors = kBlock / kLanes;
// Queries of a strip: rows of the matrix registers, or a whole number of the microkernel's.
constexpr int kStrip = kLanes == 8 ? 48 : 32;
constexpr int kStrips = ceil_div(kBlock, kStrip);

// What a strip of queries and a tile of keys have to do with each other.
struct Meeting {
  int64_t first, queries;  // of the strip; `first` counts from the block's beginning
  int64_t keys;            // of the tile, up to the last one that some query of the strip sees
  bool diagonal;           // query i of the block sees the keys up to i

  int64_t seen(int64_t query) const { return diagonal ? least(keys, first + query + 1) : keys; }
  int vectors() const { return ceil_div(keys, kLanes); }
  bool whole() const { return !diagonal && keys == kBlock; }
};

inline int64_t keys_seen(const AttentionKind& kind, const AttentionBlock& block) {
  return kind.causal ? least(block.keys, block.first + block.queries) : block.keys;
}

inline Meeting meeting(const AttentionKind& kind, const AttentionBlock& block, int64_t first, int64_t queries,
                       int64_t key) {
  const bool diagonal = kind.causal && key == block.first;
  const int64_t keys = least(kBlock, block.keys - key);
  return {first, queries, diagonal ? least(keys, first + queries) : keys, diagonal};
}

// Asks for the rows of a strip.
inline void prefetch_strip(Dtype dtype, ConstRows rows, int64_t first, int64_t queries, int64_t columns) {
  for (int64_t query = first; query < least(queries, first + kStrip); query++) {
    prefetch(element(dtype, rows, query, 0), columns * (dtype == kFloat32 ? 4 : 2));
  }
}

// out[query][key] = x[query] · y[key], with y transposed.
template <bool kPairs>
void dot_products(const Meeting& at, const uint32_t* x, const uint32_t* y, int64_t units, float* out) {
  multiply_tile<kPairs>(at.vectors(), at.queries, {x, units}, y, units, out, true);
}

// sums[query][column] (+)= sum over keys of p[query][key] x[key][column], with sums and x in panels of kBlock columns.
// A tile has room for `units` units of keys.
template <bool kPairs>
void sum_over_keys(const Meeting& at, const uint32_t* p, int64_t units, const uint32_t* x, int64_t columns, float* sums,
                   bool first) {
  for (int64_t c = 0; c < columns; c += kBlock, x += units * kBlock, sums += kStrip * kBlock) {
    multiply_tile<kPairs>(ceil_div(least(kBlock, columns - c), kLanes), at.queries, {p, units}, x,
                          ceil_div(at.keys, kUnit<kPairs>), sums, first);
  }
}

// What is known of a tile's keys when the loops over them are compiled: how many vectors, and whether some are unseen.
template <int vectors, bool masked>
struct KeysAre {
  static constexpr int kVectors = vectors;
  static constexpr bool kMasked = masked;
};

template <class F>
void for_keys(const Meeting& at, F f) {
  if (at.keys <= kBlock / 2) {
    f(KeysAre<kBlockVectors / 2, true>{});
  } else if (at.whole()) {
    f(KeysAre<kBlockVectors, false>{});
  } else {
    f(KeysAre<kBlockVectors, true>{});
  }
}

// A vector of a query's scores relative to its reference; of a masked tile -infinity for all but the first `seen` keys.
template <bool kMasked>
inline vfloat relative_score(const float* scores, float scale, float reference, int64_t seen) {
  const vfloat score = scale * load<vfloat>(scores) - reference;
  if constexpr (!kMasked) return score;
  return lane_numbers() < (int)seen ? score : broadcast(-__builtin_inff());
}

}  // namespace
