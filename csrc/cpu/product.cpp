#include "product.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <vector>

#include "../int4.h"
#include "dispatch.h"
#include "workspace.h"

namespace entrenar {

using torch::stable::get_num_threads;
using torch::stable::parallel_for;

namespace {

// x as the units that the kernel reads: in place where its memory already is that, else in the workspace.
Units units_of(const Tensor& x, int64_t rows, int64_t columns, bool pairs, Workspace& workspace) {
  const Dtype dtype = dtype_of(x, "x");
  const int64_t stride = kernels().units_stride(columns, pairs);
  const bool in_place = pairs ? columns == 2 * stride : dtype == kFloat32;
  if (in_place) return {static_cast<const uint32_t*>(x.const_data_ptr()), stride};

  auto* units = static_cast<uint32_t*>(workspace.reserve(rows * stride * sizeof(uint32_t)));
  const auto* from = static_cast<const char*>(x.const_data_ptr());
  const int64_t row_bytes = columns * (dtype == kFloat32 ? 4 : 2);
  parallel_for(0, rows, std::max<int64_t>(1, 16384 / std::max<int64_t>(1, columns)), [&](int64_t begin, int64_t end) {
    kernels().to_units(from + begin * row_bytes, dtype, end - begin, columns, pairs, units + begin * stride, stride);
  });
  return {units, stride};
}

// x as tiles, in the workspace.
Units tiles_of(const Tensor& x, int64_t rows, int64_t columns, bool coded, Workspace& workspace) {
  constexpr int64_t kStep = 16;
  const int64_t stride = kernels().tiled_stride(columns), steps = (rows + kStep - 1) / kStep;
  auto* tiles = static_cast<uint32_t*>(workspace.reserve(steps * kStep * stride * sizeof(uint32_t)));
  const void* from = x.const_data_ptr();
  parallel_for(0, steps, std::max<int64_t>(1, 1024 / std::max<int64_t>(1, columns)), [&](int64_t begin, int64_t end) {
    kernels().to_tiles(from, rows, columns, coded, begin * kStep, std::min(rows, end * kStep), tiles);
  });
  return {tiles, stride};
}

// Few rows of x as the units that the dot kernel reads.
Units packed_rows_of(const Tensor& x, int64_t rows, int64_t columns, bool pairs, Workspace& workspace) {
  const Dtype dtype = dtype_of(x, "x");
  const int64_t groups = int4::groups(columns), group_units = pairs ? int4::kGroup / 2 : int4::kGroup;
  auto* units = static_cast<uint32_t*>(workspace.reserve(groups * group_units * rows * sizeof(uint32_t)));
  const void* from = x.const_data_ptr();
  parallel_for(0, groups, std::max<int64_t>(1, 512 / rows), [&](int64_t begin, int64_t end) {
    kernels().pack_rows(from, dtype, rows, columns, pairs, begin, end, units);
  });
  return {units, rows};
}

constexpr int64_t kFarBytes = 1 << 19;  // of y, which the second-level cache would not keep beside x and a weight
constexpr int64_t kRowsAtOnce = 512;  // whose sums fit the second-level cache beside a tile

// What a thread begins with; when it is done it takes from what others have left.
struct Part {
  int64_t row_begin, row_end, column_begin, column_end;
  std::atomic<int64_t> taken;  // of its blocks
};

void multiply_in_tiles(const Product& p) {
  const Kernels& k = kernels();
  const int64_t threads = get_num_threads();
  const int64_t tiles = (p.columns + kTileColumns - 1) / kTileColumns;
  // Rows are split first, for then each thread reads its own part of x, and few columns need not come out even. Of many
  // columns each thread decodes its own instead, until the rows are too many for a cache anyway.
  const bool many = tiles >= 16 * threads;
  const int64_t rows_to_split = many ? std::min(2 * k.rows_to_split, kRowsAtOnce) : k.rows_to_split;
  const int64_t row_parts = std::clamp<int64_t>(p.rows / rows_to_split, 1, threads);
  const int64_t column_parts = std::min((threads + row_parts - 1) / row_parts, tiles);
  const auto whole_steps = [&k](int64_t rows) { return (rows + k.row_step - 1) / k.row_step * k.row_step; };
  const int64_t part_rows = whole_steps((p.rows + row_parts - 1) / row_parts);
  const int64_t rows_at_once = whole_steps(kRowsAtOnce);  // or a part's last step would be decoded for by itself

  std::vector<Part> parts(row_parts * column_parts);
  for (size_t i = 0; i < parts.size(); i++) {
    const int64_t row = i / column_parts * part_rows, column = i % column_parts;
    parts[i].row_begin = std::min(p.rows, row), parts[i].row_end = std::min(p.rows, row + part_rows);
    parts[i].column_begin = tiles * column / column_parts * kTileColumns;
    parts[i].column_end = std::min(p.columns, tiles * (column + 1) / column_parts * kTileColumns);
  }

  parallel_for(0, parts.size(), 1, [&](int64_t begin, int64_t end) {
    static thread_local Workspace workspace;
    void* scratch = workspace.reserve(k.product_scratch_bytes(std::min(part_rows, rows_at_once)));
    for (size_t i = begin; i < end + parts.size() - 1; i++) {
      Part& part = parts[i % parts.size()];
      const int64_t across = (part.column_end - part.column_begin + k.columns_at_once - 1) / k.columns_at_once;
      const int64_t blocks = (part.row_end - part.row_begin + rows_at_once - 1) / rows_at_once * across;
      for (int64_t block = part.taken++; block < blocks; block = part.taken++) {
        const int64_t row = part.row_begin + block / across * rows_at_once;
        const int64_t column = part.column_begin + block % across * k.columns_at_once;
        k.product(&p, row, std::min(row + rows_at_once, part.row_end), column,
                  std::min(column + k.columns_at_once, part.column_end), scratch);
      }
    }
  });
}

}  // namespace

std::optional<Int8Rows> rounded_to_int8(const Tensor& x, const Weight& w) {
  constexpr int64_t kExactRows = 16;
  static thread_local Workspace workspace;
  const int64_t rows = rows_of(x);
  if (rows <= kExactRows) return std::nullopt;

  const int64_t stride = int4::groups(w.columns) * int4::kGroup, blocks = int4::blocks(w.columns, w.block);
  Int8Rows out = {nullptr, nullptr, stride, blocks};
  out.scales = static_cast<float*>(workspace.reserve(rows * (stride + 4 * blocks)));
  out.codes = reinterpret_cast<uint8_t*>(out.scales + rows * blocks);
  const Dtype dtype = dtype_of(x, "x");
  const auto* from = static_cast<const char*>(x.const_data_ptr());
  const int64_t row_bytes = w.columns * (dtype == kFloat32 ? 4 : 2);
  parallel_for(0, rows, std::max<int64_t>(1, 16384 / std::max<int64_t>(1, stride)), [&](int64_t begin, int64_t end) {
    const Int8Rows part = {out.codes + begin * stride, out.scales + begin * blocks, stride, blocks};
    kernels().to_int8(from + begin * row_bytes, dtype, end - begin, w.columns, w.block, &part);
  });
  return out;
}

void multiply(const Term* terms, int count, bool transposed, float scale, const std::optional<Tensor>& bias, Tensor& y,
              const std::optional<Int8Rows>& int8) {
  static thread_local Workspace units[kMaxTerms];
  STD_TORCH_CHECK(count <= kMaxTerms, "a sum must have at most ", kMaxTerms, " products, and has ", count);
  Product p = {};
  p.dtype = dtype_of(terms[0].x, "x");
  p.transposed = transposed;
  p.scale = scale;
  p.rows = rows_of(y);
  p.columns = y.size(-1);
  p.y = y.mutable_data_ptr();
  p.far = y.numel() * (p.dtype == kFloat32 ? 4 : 2) > kFarBytes;
  check_bias(bias, p.columns);
  if (bias) p.bias = bias->const_data_ptr<float>();
  if (p.rows == 0 || p.columns == 0) return;

  const Kernels& k = kernels();
  const bool few = transposed && p.rows <= k.max_dot_rows(p.dtype);
  const bool rounds = int8 && !few;
  const bool bfloat16_units = p.dtype == kBFloat16 && k.bfloat16_units;
  p.tiles = transposed && !few && !rounds && p.dtype == kBFloat16 && k.wants_tiles(p.rows, p.columns);
  for (int i = 0; i < count; i++) {
    const Tensor& x = terms[i].x;
    const Weight& w = terms[i].w;
    const int64_t contraction = transposed ? w.columns : w.rows;
    STD_TORCH_CHECK(dtype_of(x, "x") == p.dtype, "all x must have the same dtype");
    STD_TORCH_CHECK(x.is_contiguous() && x.numel() == p.rows * contraction, "x must be ", p.rows, " x ", contraction,
                    " and contiguous");
    if (contraction == 0) continue;  // nothing to add
    const int t = p.terms++;
    p.w[t] = w;
    if (i == 0 && rounds) {
      p.int8 = *int8;
    } else if (p.tiles) {
      p.x[t] = tiles_of(x, p.rows, contraction, w.codes != nullptr, units[t]);
    } else {
      p.x[t] = few ? packed_rows_of(x, p.rows, contraction, k.dot_pairs && p.dtype == kBFloat16 && w.codes, units[t])
                   : units_of(x, p.rows, contraction, bfloat16_units, units[t]);
    }
  }
  if (few) {
    const int64_t stripes = (p.columns + kDotColumns - 1) / kDotColumns;
    const int64_t grain = std::max<int64_t>(1, 4096 / std::max<int64_t>(1, terms[0].w.columns));
    parallel_for(0, stripes, grain, [&](int64_t begin, int64_t end) {
      kernels().dot(&p, begin * kDotColumns, std::min(p.columns, end * kDotColumns));
    });
  } else {
    multiply_in_tiles(p);
  }
}

}  // namespace entrenar
