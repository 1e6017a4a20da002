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

static_assert(kBlock == 64, "a tile's keys have a word of a mask");

// Which keys of a tile the queries of a strip see: all, the first ones, or those whose bits are set; or the first ones,
// with something added to their scores.
enum class Seen { kAll, kFirst, kBits, kBiased };

// What a strip of queries and a tile of keys have to do with each other.
struct Meeting {
  int64_t first, queries;  // of the strip; `first` counts from the block's beginning
  int64_t keys;            // of the tile, up to the last one that some query of the strip sees
  bool diagonal;           // query i of the block sees the keys up to i
  Seen how = !diagonal && keys == kBlock ? Seen::kAll : Seen::kFirst;
  AttentionMask mask = {};  // of the block's queries and the tile's keys
  int64_t last = 0;         // of the block's queries; what fills up the strip behind it gets its mask

  int64_t seen(int64_t query) const { return diagonal ? least(keys, first + query + 1) : keys; }
  int64_t mask_row(int64_t query) const { return least(first + query, last) * mask.stride; }
  uint64_t bits(int64_t query) const { return mask.seen[mask_row(query)]; }
  int vectors() const { return ceil_div(keys, kLanes); }
};

// What is added to a query's scores for a vector of keys, in nats. A key with a finite bias is seen, however low that is, so
// it must not overflow in another unit. In a query's logarithm such a bias leaves no room for how many keys share it: where
// a query has no others, its gradients count each as the only one.
inline vfloat bias_of(const Meeting& at, int64_t query, int64_t vector) {
  const vfloat lowest = broadcast(-0x1p100f), none = broadcast(-__builtin_inff());
  const int64_t key = vector * kLanes, count = at.keys - key;
  if (count <= 0) return none;
  const AttentionMask& mask = at.mask;
  const void* from = element(mask.dtype, {mask.bias, 0}, 0, at.mask_row(query) + key);
  const vfloat bias = mask.dtype == kFloat32 ? load_some<kFloat32>((const float*)from, count)
                                             : load_some<kBFloat16>((const uint16_t*)from, count);
  return bias < lowest && bias > none ? lowest : bias;
}

inline int64_t keys_seen(const AttentionKind& kind, const AttentionBlock& block) {
  return kind.causal ? least(block.keys, block.first + block.queries) : block.keys;
}

inline Meeting meeting(const AttentionKind& kind, const AttentionBlock& block, int64_t first, int64_t queries,
                       int64_t key) {
  const bool diagonal = kind.causal && key == block.first;
  const int64_t keys = least(kBlock, block.keys - key);
  Meeting at = {first, queries, diagonal ? least(keys, first + queries) : keys, diagonal};
  at.mask = block.mask;
  at.last = block.queries - 1;
  if (at.mask.seen) {
    at.mask.seen += key / kBlock;
    uint64_t some = 0, all = -1;
    for (int64_t query = 0; query < queries; query++) some |= at.bits(query), all &= at.bits(query);
    at.keys = some ? kBlock - __builtin_clzll(some) : 0;
    at.how = ~all ? Seen::kBits : Seen::kAll;
  } else if (at.mask.bias) {
    at.mask.bias = element(at.mask.dtype, {at.mask.bias, 0}, 0, key);
    at.how = Seen::kBiased;
    vint some = {};
    for (int64_t query = 0; query < queries; query++) {
      for (int v = 0; v < kBlockVectors; v++) some |= bias_of(at, query, v) != -__builtin_inff();
    }
    if (largest((vuint)some) == 0) at.keys = 0;
  }
  return at;
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

// What is known of a tile's keys when the loops over them are compiled: how many vectors, and which are seen.
template <int vectors, Seen how>
struct KeysAre {
  static constexpr int kVectors = vectors;
  static constexpr Seen kSeen = how;
};

template <class F>
void for_keys(const Meeting& at, F f) {
  constexpr int kAll = kBlockVectors, kHalf = kBlockVectors / 2;
  const bool half = at.keys <= kBlock / 2;
  switch (at.how) {
    case Seen::kAll: return f(KeysAre<kAll, Seen::kAll>{});
    case Seen::kFirst: return half ? f(KeysAre<kHalf, Seen::kFirst>{}) : f(KeysAre<kAll, Seen::kFirst>{});
    case Seen::kBits: return half ? f(KeysAre<kHalf, Seen::kBits>{}) : f(KeysAre<kAll, Seen::kBits>{});
    case Seen::kBiased: return f(KeysAre<kAll, Seen::kBiased>{});
  }
}

// A vector of a query's scores relative to its reference; -infinity for keys that it does not see.
template <bool kPairs, Seen how>
inline vfloat relative_score(const Meeting& at, int64_t query, int64_t vector, const float* scores, float scale,
                             float reference) {
  vfloat score = scale * load<vfloat>(scores) - reference;
  if constexpr (how == Seen::kAll) return score;
  const vfloat unseen = broadcast(-__builtin_inff());
  if constexpr (how == Seen::kBits) return choose(at.bits(query) >> vector * kLanes, score, unseen);
  if constexpr (how == Seen::kBiased) score += bias_of(at, query, vector) * Probability<kPairs>::kPerNat;
  return lane_numbers() < (int)(at.seen(query) - vector * kLanes) ? score : unseen;
}

}  // namespace
