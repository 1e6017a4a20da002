// What the products of few rows with W share: codes as bfloat16, and their way through shared memory.
#pragma once

#include "async.h"
#include "cluster.h"
#include "dependent.h"
#include "floats.h"
#include "launch.h"
#include "mma.h"
#include "pairs.h"

namespace entrenar {

constexpr int kTile = 8;                  // columns of an instruction
constexpr int kChunk = 4 * int4::kGroup;  // elements of a row of W that four lanes copy at once
constexpr int kChunkBytes = 4 * int4::kGroupBytes;

// The bfloat16 numbers whose sum is an element of that dtype.
constexpr int bfloat16_parts(Dtype dtype) { return dtype == kFloat32 ? 3 : 1; }

// Their sum is x, unless a part is too small for float32.
static __device__ __forceinline__ void to_parts(float x, uint16_t (&parts)[3]) {
  const bool finite = (int4::float_bits(x) & 0x7f800000) != 0x7f800000;
  parts[0] = finite ? (uint16_t)(int4::float_bits(x) >> 16) : Float<kBFloat16>::narrow(x);
  const float rest = finite ? x - int4::bfloat16_to_float(parts[0]) : 0.0f;
  parts[1] = (uint16_t)(int4::float_bits(rest) >> 16);
  parts[2] = Float<kBFloat16>::narrow(rest - int4::bfloat16_to_float(parts[1]));
}

// A quarter of the codes in the lower and the higher nibbles of bytes 0 and 2. u in the four lowest bits of a bfloat16 is
// made 128 + u by an exponent; in the next four it is 16 u times the smallest number, 2^-133, as it stands: the quarter
// is what the largest power of two makes of that. Two instructions each, on units of the processor that work side by
// side.
static __device__ __forceinline__ uint32_t low_nibbles(uint32_t word) {
  return fma_pair(masked_or(word, 0x000f000f, 0x43004300), 0x3e803e80, 0xc208c208);  // (128 + u) / 4 - 34
}

static __device__ __forceinline__ uint32_t high_nibbles(uint32_t word) {
  return fma_pair(word & 0x00f000f0, 0x7f007f00, 0xc000c000);  // 2^127 (16 u 2^-133) - 2
}

constexpr float kCodeOfQuarter = 4.0f;

// Units of 16 bytes change places within a row's chunk, so that what a warp reads at once lies in different banks.
static __device__ __forceinline__ int exchanged(int row, int unit) {
  return unit ^ ((row >> 1 & 1) << 1 | (row >> 2 & 1));
}

}  // namespace entrenar
