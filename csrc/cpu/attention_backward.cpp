// The gradients of attention.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "attention_items.h"

namespace entrenar {

namespace {

int64_t padded(int64_t columns) { return ceil_div(columns, kAttentionBlock) * kAttentionBlock; }

// The sums that become dk and dv of a group, for each sequence its tiles of dk and then those of dv. Where there are few
// groups, their blocks of queries are dealt out to parts, each with its own sums. How many depends on sizes alone, so that
// the result does not depend on the number of threads.
class Sums {
 public:
  explicit Sums(const Problem& p)
      : dk_tile(padded(p.kind.columns) * kAttentionBlock), dv_tile(padded(p.kind.value_columns) * kAttentionBlock), p_(p) {
    const int64_t tasks = p.sequences.size() * p.groups, floats = std::max<int64_t>(1, p.groups * stride());
    parts_ = std::max<int64_t>(1, std::min(kTasks / tasks, kMostPartFloats / floats));
    shared_ = parts_ == 1 ? nullptr : reserve(p.groups * parts_ * p.head_tiles());
  }

  int64_t parts_of(const Sequence& s) const { return std::min(parts_, s.blocks() * p_.heads_per_group()); }

  // Those of the part `item.index`, where a part that is alone has its thread's own ones, which stay in its cache.
  float* of(const Item& item) const {
    const Sequence& s = *item.sequence;
    if (parts_ == 1) return reserve(s.tiles());
    return shared_ + ((item.group * parts_ + item.index) * p_.head_tiles() + s.tile) * (dk_tile + dv_tile);
  }

  int64_t stride() const { return p_.head_tiles() * (dk_tile + dv_tile); }  // from one part to the next
  bool shared() const { return parts_ > 1; }

  const int64_t dk_tile, dv_tile;  // in floats

 private:
  static constexpr int64_t kTasks = 8, kMostPartFloats = int64_t{1} << 26;

  float* reserve(int64_t tiles) const {
    static thread_local Workspace workspace;
    return static_cast<float*>(workspace.reserve(tiles * (dk_tile + dv_tile) * sizeof(float)));
  }

  const Problem& p_;
  int64_t parts_;
  float* shared_;
};

using Gradients = std::tuple<Tensor, Tensor, Tensor>;

Gradients backward(const Problem& p, const Tensor& d_o, const Tensor& q, const Tensor& k, const Tensor& v,
                   const Tensor& o, const Tensor& lse) {
  const Input from_o = input(o, "o", p.kind.dtype, p.batch, p.heads, p.queries, p.kind.value_columns);
  const Input from_d_o = input(d_o, "d_o", p.kind.dtype, p.batch, p.heads, p.queries, p.kind.value_columns);
  STD_TORCH_CHECK(lse.scalar_type() == ScalarType::Float && lse.is_contiguous() && lse.dim() == 3 &&
                      lse.size(0) == p.batch && lse.size(1) == p.heads && lse.size(2) == p.queries,
                  "lse must be float32 [", p.batch, ", ", p.heads, ", ", p.queries, "] and contiguous");
  Tensor dq = new_heads(q, p.batch, p.heads, p.queries, p.kind.columns);
  Tensor dk = new_heads(k, p.batch, p.groups, p.keys, p.kind.columns);
  Tensor dv = new_heads(v, p.batch, p.groups, p.keys, p.kind.value_columns);
  if (p.batch == 0 || p.heads == 0 || p.queries == 0 || p.keys == 0) {
    torch::stable::zero_(dq), torch::stable::zero_(dk), torch::stable::zero_(dv);
    return {dq, dk, dv};
  }

  const Sums sums(p);
  const Output to_dq = output(dq), to_dk = output(dk), to_dv = output(dv);
  const auto* lse_from = lse.const_data_ptr<float>();

  // Of a tile the sums of all parts, of which those of the first are given.
  const auto store = [&](const Item& tile, const float* first_dk) {
    const Sequence& s = *tile.sequence;
    const int64_t first = tile.index * kAttentionBlock, keys = std::min(kAttentionBlock, s.keys - first);
    const float* first_dv = first_dk + s.tiles() * sums.dk_tile;
    kernels().attention_sum(first_dk + tile.index * sums.dk_tile, sums.parts_of(s), sums.stride(), p.kind.scale,
                            p.kind.dtype, keys, p.kind.columns, to_dk.rows(s.batch, tile.group, s.key + first));
    kernels().attention_sum(first_dv + tile.index * sums.dv_tile, sums.parts_of(s), sums.stride(), 1.0f, p.kind.dtype,
                            keys, p.kind.value_columns, to_dv.rows(s.batch, tile.group, s.key + first));
  };

  for_each(items_of(p, [&](const Sequence& s) { return sums.parts_of(s); }), [&](const Item& item, const Item* next) {
    const Sequence& s = *item.sequence;
    const int64_t blocks = s.blocks() * p.heads_per_group();
    // Each part packs them for itself, into its thread's cache, and waits for no other.
    uint32_t* tiles = reserve_tiles(p, s.tiles(), true);
    for (Item tile = {&s, item.group, 0}; tile.index < s.tiles(); tile.index++) pack(p, tile, true, tiles);
    float* part = sums.of(item);
    std::fill_n(part, s.tiles() * (sums.dk_tile + sums.dv_tile), 0.0f);
    for (Item at = item, following = item; at.index < blocks; at = following) {
      following.index += sums.parts_of(s);
      const Place place(p, at);
      AttentionBlock block = {place.first, place.queries, place.rows(p.q), s.keys, tiles, place.mask(p), {}};
      if (const Item* upcoming = following.index < blocks ? &following : next) {
        const Place ahead(p, *upcoming);
        block.ahead = {ahead.queries, ahead.rows(p.q), ahead.rows(from_d_o), ahead.rows(from_o)};
      }
      const AttentionGradient gradient = {place.rows(from_o), place.rows(from_d_o), lse_from + place.number(p),
                                          place.rows(to_dq),  part,                 part + s.tiles() * sums.dk_tile};
      kernels().attention_backward(&p.kind, &block, &gradient, scratch());
    }
    if (sums.shared()) return;
    for (Item tile = {&s, item.group, 0}; tile.index < s.tiles(); tile.index++) store(tile, part);
  });
  if (sums.shared()) {
    for_each(items_of(p, [](const Sequence& s) { return s.tiles(); }), [&](const Item& tile, const Item*) {
      store(tile, sums.of({tile.sequence, tile.group, 0}));
    });
  }
  return {dq, dk, dv};
}

Gradients attention_backward(const Tensor& d_o, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& o,
                             const Tensor& lse, std::optional<Tensor> offsets, double scale, bool causal) {
  return backward(Problem(q, k, v, offsets, scale, causal), d_o, q, k, v, o, lse);
}

Gradients masked_attention_backward(const Tensor& d_o, const Tensor& q, const Tensor& k, const Tensor& v,
                                    const Tensor& o, const Tensor& lse, const Tensor& mask, double scale) {
  return backward(Problem(q, k, v, mask, scale), d_o, q, k, v, o, lse);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(entrenar, CPU, m) {
  m.impl("attention_backward", TORCH_BOX(&attention_backward));
  m.impl("masked_attention_backward", TORCH_BOX(&masked_attention_backward));
}

}  // namespace entrenar
