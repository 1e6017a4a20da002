// Masks of attention as the kernels take them.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstring>
#include <optional>

#include "../arguments.h"
#include "level/attention_block.h"
#include "workspace.h"

namespace entrenar {

namespace {

// A mask of every query's keys, or none. Bits lie in memory of the thread, until it makes another.
class Mask {
 public:
  Mask() = default;

  // Of booleans, which become bits, or of `dtype` and added to the scores; [batch, heads, queries, keys], or 1 in place of
  // any of the first three.
  Mask(const Tensor& mask, Dtype dtype, int64_t batch, int64_t heads, int64_t queries, int64_t keys) {
    STD_TORCH_CHECK(mask.dim() == 4 && fits(mask, 0, batch) && fits(mask, 1, heads) && fits(mask, 2, queries) &&
                        mask.size(3) == keys,
                    "mask must be [", batch, ", ", heads, ", ", queries, ", ", keys,
                    "], or 1 in place of any of the first three");
    if (keys == 0) return;
    const Tensor rows = mask.stride(3) == 1 ? mask : torch::stable::contiguous(mask);
    if (mask.scalar_type() == ScalarType::Bool) {
      pack(rows);
      return;
    }
    STD_TORCH_CHECK(dtype_of(mask, "mask") == dtype, "mask must be boolean or have the dtype of q");
    rows_ = rows;
    bias_ = static_cast<const char*>(rows.const_data_ptr());
    dtype_ = dtype;
    for (int d = 0; d < 3; d++) strides_[d] = rows.size(d) == 1 ? 0 : rows.stride(d);
  }

  // Of queries of a head, and of the first query of heads.
  AttentionMask from(int64_t batch, int64_t head, int64_t query) const { return from(batch, head, query, strides_[2]); }
  AttentionMask from(int64_t batch, int64_t head) const { return from(batch, head, 0, strides_[1]); }

 private:
  static constexpr int64_t kWord = 64, kRowsToSplit = 64;

  static bool fits(const Tensor& mask, int d, int64_t size) { return mask.size(d) == size || mask.size(d) == 1; }

  AttentionMask from(int64_t batch, int64_t head, int64_t query, int64_t stride) const {
    const int64_t at = batch * strides_[0] + head * strides_[1] + query * strides_[2];
    const int64_t bytes = dtype_ == kFloat32 ? 4 : 2;
    return {seen_ ? seen_ + at : nullptr, bias_ ? bias_ + at * bytes : nullptr, dtype_, stride};
  }

  void pack(const Tensor& mask) {
    static thread_local Workspace workspace;
    const int64_t heads = mask.size(1), queries = mask.size(2), keys = mask.size(3);
    const int64_t words = (keys + kWord - 1) / kWord, rows = mask.size(0) * heads * queries;
    const int64_t of_batch = mask.stride(0), of_head = mask.stride(1), of_query = mask.stride(2);
    const auto* const from = static_cast<const uint8_t*>(mask.const_data_ptr());
    auto* const seen = static_cast<uint64_t*>(workspace.reserve(rows * words * sizeof(uint64_t)));
    torch::stable::parallel_for(0, rows, kRowsToSplit, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; row++) {
        const int64_t batch = row / (heads * queries), head = row / queries % heads, query = row % queries;
        const uint8_t* booleans = from + batch * of_batch + head * of_head + query * of_query;
        for (int64_t key = 0; key < keys; key += kWord) {
          seen[row * words + key / kWord] = word_of(booleans + key, std::min(kWord, keys - key));
        }
      }
    });
    seen_ = seen;
    strides_[0] = mask.size(0) == 1 ? 0 : heads * queries * words;
    strides_[1] = heads == 1 ? 0 : queries * words;
    strides_[2] = queries == 1 ? 0 : words;
  }

  static uint64_t word_of(const uint8_t* booleans, int64_t count) {
    constexpr uint64_t kOnes = 0x0101010101010101, kSevens = 0x7f * kOnes;
    // Moves the lowest bit of each of eight bytes to the highest byte, none of them to the place of another.
    constexpr uint64_t kGather = 0x0102040810204080;
    uint64_t word = 0;
    for (int64_t i = 0; i < count; i += 8) {
      uint64_t bytes = 0;
      std::memcpy(&bytes, booleans + i, std::min<int64_t>(8, count - i));
      const uint64_t ones = (((bytes & kSevens) + kSevens) | bytes) >> 7 & kOnes;  // for all bytes but 0
      word |= ones * kGather >> 56 << i;
    }
    return word;
  }

  std::optional<Tensor> rows_;  // of the bias
  const uint64_t* seen_ = nullptr;
  const char* bias_ = nullptr;
  Dtype dtype_ = kFloat32;  // of the bias
  int64_t strides_[3] = {};
};

}  // namespace

}  // namespace entrenar
