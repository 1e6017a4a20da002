// attention: o = softmax(scale q kᵀ) v for each head, and its gradients. Queries and keys may be packed: several
// sequences behind each other, each of which sees itself only.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#include "../arguments.h"
#include "dispatch.h"
#include "workspace.h"

namespace entrenar {

namespace {

using torch::stable::parallel_for;

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
  STD_TORCH_CHECK(columns <= 1 || x.stride(3) == 1, name, " must have contiguous columns");
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

  int64_t heads_per_group() const { return groups == 0 ? 0 : heads / groups; }
  int64_t head_tiles() const { return sequences.empty() ? 0 : sequences.back().tile + sequences.back().tiles(); }
  int64_t row(const Sequence& s, int64_t head, int64_t query) const {
    return (s.batch * heads + head) * queries + s.query + query;
  }
};

// The keys of all heads, packed: [group][tile].
struct PackedKeys {
  const uint32_t* tiles;
  int64_t tile_words, head_tiles;

  const uint32_t* of(const Sequence& s, int64_t group) const {
    return tiles + (group * head_tiles + s.tile) * tile_words;
  }
};

struct Item {
  const Sequence* sequence;
  int64_t group, index;
};

// Runs `work(item)` for every item, each thread taking the next one when it is done with another: blocks of queries see
// different numbers of keys.
template <class F>
void for_each(const std::vector<Item>& items, F work) {
  std::atomic<size_t> next{0};
  const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), items.size());
  parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    for (size_t i = next++; i < items.size(); i = next++) work(items[i]);
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

PackedKeys pack(const Problem& p, bool backward) {
  static thread_local Workspace workspace;
  const int64_t words = kernels().attention_tile_words(&p.kind, backward), head_tiles = p.head_tiles();
  auto* tiles = static_cast<uint32_t*>(workspace.reserve(p.groups * head_tiles * words * sizeof(uint32_t)));
  for_each(items_of(p, [](const Sequence& s) { return s.tiles(); }), [&](const Item& item) {
    const Sequence& s = *item.sequence;
    const int64_t first = item.index * kAttentionBlock;
    kernels().attention_pack(&p.kind, backward, p.k.rows(s.batch, item.group, s.key + first),
                             p.v.rows(s.batch, item.group, s.key + first), std::min(kAttentionBlock, s.keys - first),
                             tiles + (item.group * head_tiles + s.tile + item.index) * words, scratch());
  });
  return {tiles, words, head_tiles};
}

// Block `index` of the heads that share a group: the longest come first, so that the last ones to be taken are short.
struct Place {
  int64_t head, first;
};

Place place_of(const Problem& p, const Item& item) {
  const int64_t shared = p.heads_per_group();
  const int64_t block = item.sequence->blocks() - 1 - item.index / shared;
  return {item.group * shared + item.index % shared, block * kAttentionBlock};
}

AttentionBlock block_of(const Problem& p, const PackedKeys& packed, const Item& item) {
  const Sequence& s = *item.sequence;
  const Place place = place_of(p, item);
  return {place.first, std::min(kAttentionBlock, s.queries - place.first),
          p.q.rows(s.batch, place.head, s.query + place.first), s.keys, packed.of(s, item.group)};
}

std::tuple<Tensor, Tensor> attention(const Tensor& q, const Tensor& k, const Tensor& v, std::optional<Tensor> offsets,
                                     double scale, bool causal) {
  const Problem p(q, k, v, offsets, scale, causal);
  Tensor o = new_heads(q, p.batch, p.heads, p.queries, p.kind.value_columns);
  Tensor lse = torch::stable::new_empty(q, {p.batch, p.heads, p.queries}, ScalarType::Float);
  if (p.keys == 0) {
    torch::stable::zero_(o);
    torch::stable::fill_(lse, -std::numeric_limits<double>::infinity());
    return {o, lse};
  }
  const PackedKeys packed = pack(p, false);
  const Output to = output(o);
  auto* sums = lse.mutable_data_ptr<float>();
  for_each(items_of(p, [&](const Sequence& s) { return s.blocks() * p.heads_per_group(); }), [&](const Item& item) {
    const Sequence& s = *item.sequence;
    const Place place = place_of(p, item);
    const AttentionBlock block = block_of(p, packed, item);
    const AttentionOutput result = {to.rows(s.batch, place.head, s.query + place.first),
                                    sums + p.row(s, place.head, place.first)};
    kernels().attention_forward(&p.kind, &block, &result, scratch());
  });
  return {o, lse};
}

// Where there are few heads, their blocks of queries are dealt out to parts, each with its own sums of dk and dv. How
// many depends on sizes alone, so that the result does not depend on the number of threads.
constexpr int64_t kTasks = 8;
constexpr int64_t kMostPartFloats = int64_t{1} << 26;

int64_t padded(int64_t columns) { return ceil_div(columns, kAttentionBlock) * kAttentionBlock; }

int64_t parts_of(const Problem& p, int64_t tile_floats) {
  const int64_t tasks = std::max<int64_t>(1, p.sequences.size() * p.groups);
  const int64_t floats = std::max<int64_t>(1, p.groups * p.head_tiles() * tile_floats);
  return std::max<int64_t>(1, std::min(kTasks / tasks, kMostPartFloats / floats));
}

std::tuple<Tensor, Tensor, Tensor> attention_backward(const Tensor& d_o, const Tensor& q, const Tensor& k,
                                                      const Tensor& v, const Tensor& o, const Tensor& lse,
                                                      std::optional<Tensor> offsets, double scale, bool causal) {
  const Problem p(q, k, v, offsets, scale, causal);
  const Input from_o = input(o, "o", p.kind.dtype, p.batch, p.heads, p.queries, p.kind.value_columns);
  const Input from_d_o = input(d_o, "d_o", p.kind.dtype, p.batch, p.heads, p.queries, p.kind.value_columns);
  STD_TORCH_CHECK(lse.scalar_type() == ScalarType::Float && lse.is_contiguous() && lse.dim() == 3 &&
                      lse.size(0) == p.batch && lse.size(1) == p.heads && lse.size(2) == p.queries,
                  "lse must be float32 [", p.batch, ", ", p.heads, ", ", p.queries, "] and contiguous");
  Tensor dq = new_heads(q, p.batch, p.heads, p.queries, p.kind.columns);
  Tensor dk = new_heads(k, p.batch, p.groups, p.keys, p.kind.columns);
  Tensor dv = new_heads(v, p.batch, p.groups, p.keys, p.kind.value_columns);
  if (p.keys == 0) {
    torch::stable::zero_(dq);
    return {dq, dk, dv};
  }

  static thread_local Workspace workspace;
  const int64_t dk_tile = padded(p.kind.columns) * kAttentionBlock;
  const int64_t dv_tile = padded(p.kind.value_columns) * kAttentionBlock;
  const int64_t tile_floats = dk_tile + dv_tile, head_tiles = p.head_tiles(), parts = parts_of(p, tile_floats);
  auto* sums = static_cast<float*>(workspace.reserve(p.groups * parts * head_tiles * tile_floats * sizeof(float)));
  // A sequence's tiles of dk, then its tiles of dv.
  const auto part_of = [&](const Sequence& s, int64_t group, int64_t part) {
    return sums + ((group * parts + part) * head_tiles + s.tile) * tile_floats;
  };

  const PackedKeys packed = pack(p, true);
  const Output to_dq = output(dq), to_dk = output(dk), to_dv = output(dv);
  const auto* lse_from = lse.const_data_ptr<float>();
  for_each(items_of(p, [&](const Sequence&) { return parts; }), [&](const Item& item) {
    const Sequence& s = *item.sequence;
    float* part = part_of(s, item.group, item.index);
    std::fill_n(part, s.tiles() * tile_floats, 0.0f);
    for (int64_t i = item.index; i < s.blocks() * p.heads_per_group(); i += parts) {
      const Item block_item = {&s, item.group, i};
      const Place place = place_of(p, block_item);
      const AttentionBlock block = block_of(p, packed, block_item);
      const int64_t query = s.query + place.first;
      const AttentionGradient gradient = {from_o.rows(s.batch, place.head, query),
                                          from_d_o.rows(s.batch, place.head, query),
                                          lse_from + p.row(s, place.head, place.first),
                                          to_dq.rows(s.batch, place.head, query),
                                          part,
                                          part + s.tiles() * dk_tile};
      kernels().attention_backward(&p.kind, &block, &gradient, scratch());
    }
  });
  for_each(items_of(p, [](const Sequence& s) { return s.tiles(); }), [&](const Item& item) {
    const Sequence& s = *item.sequence;
    const float* from_dk = part_of(s, item.group, 0) + item.index * dk_tile;
    const float* from_dv = part_of(s, item.group, 0) + s.tiles() * dk_tile + item.index * dv_tile;
    const int64_t first = item.index * kAttentionBlock, stride = head_tiles * tile_floats;
    const int64_t keys = std::min(kAttentionBlock, s.keys - first);
    kernels().attention_sum(from_dk, parts, stride, p.kind.scale, p.kind.dtype, keys, p.kind.columns,
                            to_dk.rows(s.batch, item.group, s.key + first));
    kernels().attention_sum(from_dv, parts, stride, 1.0f, p.kind.dtype, keys, p.kind.value_columns,
                            to_dv.rows(s.batch, item.group, s.key + first));
  });
  return {dq, dk, dv};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(entrenar, CPU, m) {
  m.impl("attention", TORCH_BOX(&attention));
  m.impl("attention_backward", TORCH_BOX(&attention_backward));
}

}  // namespace entrenar
