// What the attention kernels of a level are given. Plain C types only.
#pragma once

#include <stdint.h>

#include "../../weight.h"

namespace entrenar {

constexpr int64_t kAttentionBlock = 64;        // queries, and keys, that are worked on at a time
constexpr int64_t kMaxAttentionColumns = 256;  // of a head

// A head's matrix in a tensor: its rows lie `stride` elements apart.
struct Rows {
  void* data;
  int64_t stride;
};
struct ConstRows {
  const void* data;
  int64_t stride;
};

struct AttentionKind {
  Dtype dtype;  // of all tensors; sums and softmax are float32
  bool causal;
  float scale;
  int64_t columns, value_columns;
};

// Rows that are read next: of q, and for a backward of d_o and o. They come from memory while a block is worked on.
struct AttentionAhead {
  int64_t queries;  // 0 if there is no other block
  ConstRows q, d_o, o;
};

// Which keys each of some queries sees, or what is added to its scores.
struct AttentionMask {
  const uint64_t* seen;  // by bits: key k is the (k % 64)-th of word k / 64; or null
  const void* bias;      // of `dtype`, or null
  Dtype dtype;
  int64_t stride;  // words or elements from one query to the next

  bool given() const { return seen || bias; }
};

// Up to kAttentionBlock queries of a head, and the packed keys of their sequence.
struct AttentionBlock {
  int64_t first, queries;  // `first` is a multiple of kAttentionBlock
  ConstRows q;
  int64_t keys;
  const uint32_t* packed;
  AttentionMask mask;  // from the first of the queries on
  AttentionAhead ahead;
};

struct AttentionOutput {
  Rows o;
  float* lse;  // of each query the logarithm of its sum of exponentials
};

// dk and dv are what the block's gradients are added to: dk without the factor `scale`, both in tiles [column][key] of
// kAttentionBlock keys, with columns up to a multiple of as many.
struct AttentionGradient {
  ConstRows o, d_o;
  const float* lse;
  Rows dq;
  float *dk, *dv;
};

}  // namespace entrenar
