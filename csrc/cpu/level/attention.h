// The entries of attention for a level.
#pragma once

#include "attention_backward.h"
#include "attention_forward.h"
#include "attention_single.h"

namespace {

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

int64_t attention_single_floats(int64_t keys) { return kHeadsAtOnce * score_stride(keys); }

void attention_single(const AttentionKind* kind, const AttentionBlock* block, ConstRows k, ConstRows v,
                      const AttentionOutput* output, float* scratch) {
  (kind->dtype == kFloat32 ? single_queries<kFloat32> : single_queries<kBFloat16>)(*kind, *block, k, v, *output, scratch);
}

void attention_backward(const AttentionKind* kind, const AttentionBlock* block, const AttentionGradient* gradient,
                        void* scratch) {
  FOR_UNITS_OF(kind->dtype, backward_block)(*kind, *block, *gradient, *(BackwardScratch*)scratch);
}

void attention_sum(const float* parts, int64_t count, int64_t part_stride, float scale, Dtype dtype, int64_t keys,
                   int64_t columns, Rows out) {
  for (int64_t c = 0; c < columns; c += kBlock, parts += kBlock * kBlock) {
    uint32_t sums[kBlock * kBlock], rows[kBlock * kBlock];
    for (int64_t i = 0; i < kBlock * kBlock; i += kLanes) {
      vfloat total = {};
      for (int64_t part = 0; part < count; part++) total += load<vfloat>(parts + part * part_stride + i);
      store(sums + i, total * scale);
    }
    transpose(sums, kBlock, kBlock, kBlock, rows, kBlock);
    for (int64_t key = 0; key < keys; key++) {
      store_row(dtype, (const float*)rows + key * kBlock, least(kBlock, columns - c), element(dtype, out, key, c));
    }
  }
}

}  // namespace
