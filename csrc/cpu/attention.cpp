// attention: o = softmax(scale q kᵀ) v for each head. Queries and keys may be packed: several sequences behind each other,
// each of which sees itself only.
#include <torch/csrc/stable/library.h>

#include <limits>
#include <tuple>

#include "attention_items.h"

namespace entrenar {

namespace {

// Of one query a head, for the heads of a group together, unless then there were less than a group for each thread.
void forward_single(const Problem& p, const Output& o, float* lse) {
  const bool together = p.batch * p.groups >= static_cast<int64_t>(torch::stable::get_num_threads());
  const int64_t heads = together ? p.heads_per_group() : 1;
  for_each(items_of(p, [&](const Sequence& s) { return s.queries * p.heads_per_group() / heads; }),
           [&](const Item& item, const Item*) {
             static thread_local Workspace workspace;
             const int64_t batch = item.sequence->batch, head = item.group * p.heads_per_group() + item.index * heads;
             const auto rows = [&](const auto& x) {
               auto rows = x.rows(batch, head, 0);
               rows.stride = x.head_stride;
               return rows;
             };
             const AttentionBlock block = {0, heads, rows(p.q), p.keys, nullptr, p.mask.from(batch, head), {}};
             const AttentionOutput output = {rows(o), lse + batch * p.heads + head};
             const int64_t floats = kernels().attention_single_floats(p.keys);
             kernels().attention_single(&p.kind, &block, p.k.rows(batch, item.group, 0), p.v.rows(batch, item.group, 0),
                                        &output, static_cast<float*>(workspace.reserve(floats * sizeof(float))));
           });
}

std::tuple<Tensor, Tensor> forward(const Problem& p, const Tensor& q) {
  Tensor o = new_heads(q, p.batch, p.heads, p.queries, p.kind.value_columns);
  Tensor lse = torch::stable::new_empty(q, {p.batch, p.heads, p.queries}, ScalarType::Float);
  if (p.keys == 0) {
    torch::stable::zero_(o);
    torch::stable::fill_(lse, -std::numeric_limits<double>::infinity());
    return {o, lse};
  }
  if (p.queries == 1 && p.heads > 0 && !p.kind.causal) {
    forward_single(p, output(o), lse.mutable_data_ptr<float>());
    return {o, lse};
  }
  uint32_t* tiles = reserve_tiles(p, p.groups * p.head_tiles(), false);
  const int64_t tile_words = kernels().attention_tile_words(&p.kind, false);
  const auto tiles_of = [&](const Item& item) {
    return tiles + (item.group * p.head_tiles() + item.sequence->tile) * tile_words;
  };
  for_each(items_of(p, [](const Sequence& s) { return s.tiles(); }),
           [&](const Item& item, const Item*) { pack(p, item, false, tiles_of(item)); });

  const Output to = output(o);
  auto* sums = lse.mutable_data_ptr<float>();
  const auto blocks = items_of(p, [&](const Sequence& s) { return s.blocks() * p.heads_per_group(); });
  for_each(blocks, [&](const Item& item, const Item* next) {
    const Place place(p, item);
    AttentionBlock block = {place.first,    place.queries, place.rows(p.q), item.sequence->keys,
                            tiles_of(item), place.mask(p), {}};
    if (next != nullptr) {
      const Place ahead(p, *next);
      block.ahead = {ahead.queries, ahead.rows(p.q), {}, {}};
    }
    const AttentionOutput result = {place.rows(to), sums + place.number(p)};
    kernels().attention_forward(&p.kind, &block, &result, scratch());
  });
  return {o, lse};
}

std::tuple<Tensor, Tensor> attention(const Tensor& q, const Tensor& k, const Tensor& v, std::optional<Tensor> offsets,
                                     double scale, bool causal) {
  return forward(Problem(q, k, v, offsets, scale, causal), q);
}

std::tuple<Tensor, Tensor> masked_attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& mask,
                                            double scale) {
  return forward(Problem(q, k, v, mask, scale), q);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(entrenar, CPU, m) {
  m.impl("attention", TORCH_BOX(&attention));
  m.impl("masked_attention", TORCH_BOX(&masked_attention));
}

}  // namespace entrenar
