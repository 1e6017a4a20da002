// What attention on the CPU is computed of: heads in tensors, sequences, and the items that threads take of them.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <optional>
#include <vector>

#include "../arguments.h"
#include "attention_mask.h"
#include "dispatch.h"
#include "workspace.h"

namespace entrenar {

namespace {

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// A tensor [batch, heads, rows, columns] whose columns are contiguous.
template <class Pointer, class RowsType>
struct Heads {
  Pointer data;
  int64_t batch_stride, head_stride, row_stride, element_bytes;

  RowsType rows(int64_t batch, int64_t head, int64_t row) const {
    return {data + (batch * batch_stride + head * head_stride + row * row_stride) * element_bytes, row_stride};
  }
};

using Input = Heads<const char*, ConstRows>;
using Output = Heads<char*, Rows>;

template <class H, class Pointer>
H heads_of(const Tensor& x, Pointer data) {
  return {static_cast<decltype(H::data)>(data), x.stride(0), x.stride(1), x.stride(2),
          x.scalar_type() == ScalarType::Float ? 4 : 2};
}

Input input(const Tensor& x, const char* name, Dtype dtype, int64_t batch, int64_t heads, int64_t rows,
            int64_t columns) {
  STD_TORCH_CHECK(dtype_of(x, name) == dtype, name, " must have the dtype of q");
  STD_TORCH_CHECK(x.dim() == 4 && x.size(0) == batch && x.size(1) == heads && x.size(2) == rows && x.size(3) == columns,
                  name, " must be [", batch, ", ", heads, ", ", rows, ", ", columns, "]");
  STD_TORCH_CHECK(columns <= 1 || x.stride(3) == 1 || x.numel() == 0, name, " must have contiguous columns");
  return heads_of<Input>(x, x.const_data_ptr());
}

// Memory [batch, rows, heads, columns] seen as [batch, heads, rows, columns]: heads side by side, as projections are.
Tensor new_heads(const Tensor& like, int64_t batch, int64_t heads, int64_t rows, int64_t columns) {
  return torch::stable::transpose(torch::stable::new_empty(like, {batch, rows, heads, columns}), 1, 2);
}

Output output(Tensor& x) { return heads_of<Output>(x, x.mutable_data_ptr()); }

// Rows of q and of k and v that belong together.
struct Sequence {
  int64_t batch, query, queries, key, keys;
  int64_t tile;  // the number of the first tile of its keys, among those of one head

  int64_t blocks() const { return ceil_div(queries, kAttentionBlock); }
  int64_t tiles() const { return ceil_div(keys, kAttentionBlock); }
};

std::vector<Sequence> packed_sequences(const Tensor& offsets, int64_t batch, int64_t queries, int64_t keys) {
  STD_TORCH_CHECK(offsets.scalar_type() == ScalarType::Long && offsets.dim() == 1 && offsets.numel() > 0,
                  "offsets must be a vector of int64");
  STD_TORCH_CHECK(batch == 1 && queries == keys, "with offsets there must be one batch, and as many queries as keys");
  const Tensor contiguous = torch::stable::contiguous(offsets);
  const auto* at = contiguous.const_data_ptr<int64_t>();
  const int64_t count = offsets.numel() - 1;
  STD_TORCH_CHECK(at[0] == 0 && at[count] == queries, "offsets must begin with 0 and end with the number of queries");
  std::vector<Sequence> sequences;
  int64_t tile = 0;
  for (int64_t i = 0; i < count; i++) {
    STD_TORCH_CHECK(at[i] <= at[i + 1], "offsets must not decrease");
    const int64_t length = at[i + 1] - at[i];
    sequences.push_back({0, at[i], length, at[i], length, tile});
    tile += sequences.back().tiles();
  }
  return sequences;
}

struct Problem {
  AttentionKind kind;
  int64_t batch, heads, groups, queries, keys;  // `groups` are heads of k and v
  Input q, k, v;
  std::vector<Sequence> sequences;
  Mask mask;

  Problem(const Tensor& query, const Tensor& key, const Tensor& value, const std::optional<Tensor>& offsets,
          double scale, bool causal) {
    STD_TORCH_CHECK(query.dim() == 4 && key.dim() == 4 && value.dim() == 4, "q, k and v must have four dimensions");
    kind = {dtype_of(query, "q"), causal, static_cast<float>(scale), query.size(3), value.size(3)};
    batch = query.size(0), heads = query.size(1), queries = query.size(2);
    groups = key.size(1), keys = key.size(2);
    STD_TORCH_CHECK(kind.columns <= kMaxAttentionColumns && kind.value_columns <= kMaxAttentionColumns,
                    "heads can have up to ", kMaxAttentionColumns, " columns");
    STD_TORCH_CHECK(heads == 0 || (groups > 0 && heads % groups == 0), "q must have a multiple of the heads of k");
    q = input(query, "q", kind.dtype, batch, heads, queries, kind.columns);
    k = input(key, "k", kind.dtype, batch, groups, keys, kind.columns);
    v = input(value, "v", kind.dtype, batch, groups, keys, kind.value_columns);
    if (offsets) {
      sequences = packed_sequences(*offsets, batch, queries, keys);
    } else {
      for (int64_t b = 0; b < batch; b++) {
        sequences.push_back({b, 0, queries, 0, keys, b * ceil_div(keys, kAttentionBlock)});
      }
    }
  }

  // By a mask, which says all that there is to say of who sees whom.
  Problem(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& given, double scale)
      : Problem(query, key, value, std::nullopt, scale, false) {
    mask = Mask(given, kind.dtype, batch, heads, queries, keys);
  }

  int64_t heads_per_group() const { return groups == 0 ? 0 : heads / groups; }
  int64_t head_tiles() const { return sequences.empty() ? 0 : sequences.back().tile + sequences.back().tiles(); }
};

// What a thread takes at a time: a part of what has to be done for a sequence and a group.
struct Item {
  const Sequence* sequence;
  int64_t group, index;
};

// Runs `work(item, next)` for every item, each thread taking another one when it is done: blocks of queries see different
// numbers of keys. `next` is what the thread will take if all take turns, or null.
template <class F>
void for_each(const std::vector<Item>& items, F work) {
  std::atomic<size_t> taken{0};
  const size_t threads = std::min<size_t>(torch::stable::get_num_threads(), items.size());
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    for (size_t i = taken++; i < items.size(); i = taken++) {
      work(items[i], i + threads < items.size() ? &items[i + threads] : nullptr);
    }
  });
}

// `count(sequence)` items for each sequence and group.
template <class F>
std::vector<Item> items_of(const Problem& p, F count) {
  std::vector<Item> items;
  for (const Sequence& s : p.sequences) {
    for (int64_t group = 0; group < p.groups; group++) {
      for (int64_t index = 0; index < count(s); index++) items.push_back({&s, group, index});
    }
  }
  return items;
}

void* scratch() {
  static thread_local Workspace workspace;
  return workspace.reserve(kernels().attention_scratch_bytes());
}

uint32_t* reserve_tiles(const Problem& p, int64_t count, bool backward) {
  static thread_local Workspace workspace;
  const int64_t words = kernels().attention_tile_words(&p.kind, backward);
  return static_cast<uint32_t*>(workspace.reserve(count * words * sizeof(uint32_t)));
}

// Packs tile `item.index` of a group's keys to its place behind `tiles`.
void pack(const Problem& p, const Item& item, bool backward, uint32_t* tiles) {
  const Sequence& s = *item.sequence;
  const int64_t first = item.index * kAttentionBlock;
  kernels().attention_pack(&p.kind, backward, p.k.rows(s.batch, item.group, s.key + first),
                           p.v.rows(s.batch, item.group, s.key + first), std::min(kAttentionBlock, s.keys - first),
                           tiles + item.index * kernels().attention_tile_words(&p.kind, backward), scratch());
}

// Block `item.index` of the heads that share a group: the longest come first, so that the last ones to be taken are short.
struct Place {
  int64_t head, first, queries;  // `first` counts from the sequence's beginning
  int64_t batch, query;

  Place(const Problem& p, const Item& item) {
    const Sequence& s = *item.sequence;
    const int64_t shared = p.heads_per_group();
    head = item.group * shared + item.index % shared;
    first = (s.blocks() - 1 - item.index / shared) * kAttentionBlock;
    queries = std::min(kAttentionBlock, s.queries - first);
    batch = s.batch, query = s.query + first;
  }

  template <class Pointer, class RowsType>
  RowsType rows(const Heads<Pointer, RowsType>& x) const {
    return x.rows(batch, head, query);
  }

  AttentionMask mask(const Problem& p) const { return p.mask.from(batch, head, query); }

  // Among all queries' numbers, [batch, heads, queries].
  int64_t number(const Problem& p) const { return (batch * p.heads + head) * p.queries + query; }
};

}  // namespace

}  // namespace entrenar
