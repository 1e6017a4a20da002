// Products of bfloat16 in Intel's matrix registers, which hold up to 16 rows of 64 bytes: 32 bfloat16 or 16 float32.
// Source: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 1, chapter "Programming with Intel AMX".
#pragma once

#include <stdint.h>

#if defined(__AMX_BF16__)

namespace {

namespace amx {

constexpr int kRows = 16, kUnits = 16;                    // of a whole register; a unit has 32 bits
constexpr int64_t kTall = 2 * kRows, kWide = 2 * kUnits;  // of the sums that the registers hold at once

enum Register {
  kTopLeft, kTopRight, kBottomLeft, kBottomRight,  // sums
  kTop, kBottom,                                   // rows of x
  kLeft, kRight,                                   // columns of the panel
};

struct alignas(64) Config {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {};
};

// For products of up to 32 rows of x, so many units at a time, by two halves of `width` columns each. The registers lose
// what they hold.
inline void configure(int64_t rows, int64_t units, int64_t width = kUnits) {
  const uint8_t top = rows < kRows ? rows : kRows, bottom = rows > kRows ? rows - kRows : kRows;
  Config config;
  for (int r = kTopLeft; r <= kRight; r++) config.row_bytes[r] = width * sizeof(uint32_t);
  config.rows[kTopLeft] = config.rows[kTopRight] = config.rows[kTop] = top;
  config.rows[kBottomLeft] = config.rows[kBottomRight] = config.rows[kBottom] = bottom;
  config.rows[kLeft] = config.rows[kRight] = units;
  config.row_bytes[kTop] = config.row_bytes[kBottom] = units * sizeof(uint32_t);
  asm volatile("ldtilecfg %0" : : "m"(config));
}

// While it lives, the registers are configured, between products as here.
struct Registers {
  explicit Registers(int64_t width = kUnits) { configure(kTall, kUnits, width); }
  ~Registers() { asm volatile("tilerelease"); }
};

// Not gcc's intrinsics, which do not say that they read memory.
template <Register r>
inline void clear() {
  asm volatile("tilezero %%tmm%c0" : : "i"(r));
}

template <Register r>
inline void load(const void* from, int64_t row_bytes) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(row_bytes), "i"(r) : "memory");
}

// Which of the factors is not in the nearest cache, and should not drive out what is.
enum class Far { kNone, kRows, kColumns };

template <Register r, bool far>
inline void load(const void* from, int64_t row_bytes) {
  if constexpr (far) {
    asm volatile("tileloaddt1 (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(row_bytes), "i"(r) : "memory");
  } else {
    load<r>(from, row_bytes);
  }
}

template <Register r>
inline void store(void* to, int64_t row_bytes) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(to), "r"(row_bytes), "i"(r) : "memory");
}

// sums[i][j] += Σ x[i][2u] w[u][2j] + x[i][2u + 1] w[u][2j + 1], over 16 units u.
template <Register sums, Register x, Register w>
inline void multiply_add() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(sums), "i"(x), "i"(w));
}

// Rows of x, and the panel that they are multiplied by: columns in two halves of 16.
struct Factors {
  const uint32_t* x;
  int64_t x_stride;
  const uint32_t *left, *right;
  int64_t panel_stride, units;
};

// Where the sums lie: a square of 16 x 16, and how far from it those to the right and below.
struct Sums {
  float* data;
  int64_t stride, right, below;
};

// Loads the registers of up to 32 rows and columns, from unit `u` of their factors on.
template <bool tall, bool wide, Far far>
struct Operands {
  const Factors& f;
  const int64_t x_bytes = f.x_stride * sizeof(uint32_t), panel_bytes = f.panel_stride * sizeof(uint32_t);

  void load_top(int64_t u) const { load<kTop, far == Far::kRows>(f.x + u, x_bytes); }
  void load_left(int64_t u) const { load<kLeft, far == Far::kColumns>(f.left + u * f.panel_stride, panel_bytes); }
  void load_bottom(int64_t u) const {
    if constexpr (tall) load<kBottom, far == Far::kRows>(f.x + kRows * f.x_stride + u, x_bytes);
  }
  void load_right(int64_t u) const {
    if constexpr (wide) load<kRight, far == Far::kColumns>(f.right + u * f.panel_stride, panel_bytes);
  }
};

// after = before + Σ x panel, for `tall` 32 rows of x, else 16, and `wide` 32 columns of the panel, else 16. Without
// `before` that is 0. No factor is without units.
//
// A register is loaded again as soon as it has been used for the last time, or the next product would wait for it.
template <bool tall, bool wide, Far far>
inline void multiply(const Factors* factors, int count, const Sums* before, const Sums& after) {
  if (before) {
    const int64_t bytes = before->stride * sizeof(float);
    load<kTopLeft>(before->data, bytes);
    if constexpr (wide) load<kTopRight>(before->data + before->right, bytes);
    if constexpr (tall) load<kBottomLeft>(before->data + before->below, bytes);
    if constexpr (tall && wide) load<kBottomRight>(before->data + before->below + before->right, bytes);
  } else {
    clear<kTopLeft>(), clear<kTopRight>(), clear<kBottomLeft>(), clear<kBottomRight>();
  }
  for (const Factors* f = factors; f < factors + count; f++) {
    const Operands<tall, wide, far> operands = {*f};
    operands.load_top(0), operands.load_left(0), operands.load_right(0), operands.load_bottom(0);
    for (int64_t next = kUnits;; next += kUnits) {
      const bool more = next < f->units;
      multiply_add<kTopLeft, kTop, kLeft>();
      if constexpr (wide) multiply_add<kTopRight, kTop, kRight>();
      if (more) operands.load_top(next);
      if constexpr (tall) multiply_add<kBottomLeft, kBottom, kLeft>();
      if (more) operands.load_left(next);
      if constexpr (tall && wide) multiply_add<kBottomRight, kBottom, kRight>();
      if (!more) break;
      operands.load_right(next), operands.load_bottom(next);
    }
  }
  const int64_t bytes = after.stride * sizeof(float);
  store<kTopLeft>(after.data, bytes);
  if constexpr (wide) store<kTopRight>(after.data + after.right, bytes);
  if constexpr (tall) store<kBottomLeft>(after.data + after.below, bytes);
  if constexpr (tall && wide) store<kBottomRight>(after.data + after.below + after.right, bytes);
}

// 32 rows of x by 16 columns: sums (+)= x panel.
template <Register top, Register bottom, Register column>
inline void multiply_half(const Factors& f, const uint32_t* panel) {
  const int64_t x_bytes = f.x_stride * sizeof(uint32_t), panel_bytes = f.panel_stride * sizeof(uint32_t);
  for (int64_t u = 0; u < f.units; u += kUnits) {
    load<kTop>(f.x + u, x_bytes);
    load<column>(panel + u * f.panel_stride, panel_bytes);
    multiply_add<top, kTop, column>();
    load<kBottom>(f.x + kRows * f.x_stride + u, x_bytes);
    multiply_add<bottom, kBottom, column>();
  }
}

// Sums of 32 by 32 where everything is in the nearest cache: one half of the columns after the other, so that the first
// is stored while the second is multiplied. Factors and sums are values, or they would be loaded again for every
// instruction, each of which may have written to memory.
inline void multiply_near(Factors f, bool first, Sums sums) {
  const int64_t bytes = sums.stride * sizeof(float);
  if (first) {
    clear<kTopLeft>(), clear<kTopRight>(), clear<kBottomLeft>(), clear<kBottomRight>();
  } else {
    load<kTopLeft>(sums.data, bytes), load<kBottomLeft>(sums.data + sums.below, bytes);
    load<kTopRight>(sums.data + sums.right, bytes), load<kBottomRight>(sums.data + sums.below + sums.right, bytes);
  }
  multiply_half<kTopLeft, kBottomLeft, kLeft>(f, f.left);
  store<kTopLeft>(sums.data, bytes), store<kBottomLeft>(sums.data + sums.below, bytes);
  multiply_half<kTopRight, kBottomRight, kRight>(f, f.right);
  store<kTopRight>(sums.data + sums.right, bytes), store<kBottomRight>(sums.data + sums.below + sums.right, bytes);
}

// The same for 1 to 32 rows and columns, and so many units at a time: for less than whole registers these are configured
// and back.
template <Far far>
inline void multiply(int64_t rows, int64_t columns, int64_t units, const Factors* factors, int count,
                     const Sums* before, const Sums& after) {
  const bool whole = rows == kTall && units == kUnits;
  if (!whole) configure(rows, units);
  const auto tall = columns > kUnits ? multiply<true, true, far> : multiply<true, false, far>;
  const auto low = columns > kUnits ? multiply<false, true, far> : multiply<false, false, far>;
  (rows > kRows ? tall : low)(factors, count, before, after);
  if (!whole) configure(kTall, kUnits);
}

}  // namespace amx

}  // namespace

#endif
