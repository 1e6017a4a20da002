// What the products of few rows with W share: codes as bfloat16, and their way through shared memory.
#pragma once

#include "async.h"
#include "cluster.h"
#include "dependent.h"
#include "floats.h"
#include "launch.h"
#include "mma.h"

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

// a b + c for pairs of bfloat16, where that is exact.
static __device__ __forceinline__ uint32_t multiply_add(uint32_t a, uint32_t b, uint32_t c) {
#if defined(ENTRENAR_EMULATED)
  const auto one = [=](int shift) {
    const auto part = [=](uint32_t pair) { return int4::bfloat16_to_float((uint16_t)(pair >> shift)); };
    return (uint32_t)int4::float_to_bfloat16(part(a) * part(b) + part(c)) << shift;
  };
  return one(0) | one(16);
#else
  uint32_t result;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(result) : "r"(a), "r"(b), "r"(c));
  return result;
#endif
}

// The bits of word that mask names, and those of rest: one instruction, which the compiler does not find for constants.
static __device__ __forceinline__ uint32_t masked_or(uint32_t word, uint32_t mask, uint32_t rest) {
#if defined(ENTRENAR_EMULATED)
  return (word & mask) | rest;
#else
  uint32_t result;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(result) : "r"(word), "r"(mask), "r"(rest));
  return result;
#endif
}

// A quarter of the codes in the lower and the higher nibbles of bytes 0 and 2. u in the four lowest bits of a bfloat16 is
// made 128 + u by an exponent; in the next four it is 16 u times the smallest number, 2^-133, as it stands: the quarter
// is what the largest power of two makes of that. Two instructions each, on units of the processor that work side by
// side.
static __device__ __forceinline__ uint32_t low_nibbles(uint32_t word) {
  return multiply_add(masked_or(word, 0x000f000f, 0x43004300), 0x3e803e80, 0xc208c208);  // (128 + u) / 4 - 34
}

static __device__ __forceinline__ uint32_t high_nibbles(uint32_t word) {
  return multiply_add(word & 0x00f000f0, 0x7f007f00, 0xc000c000);  // 2^127 (16 u 2^-133) - 2
}

constexpr float kCodeOfQuarter = 4.0f;

// Units of 16 bytes change places within a row's chunk, so that what a warp reads at once lies in different banks.
static __device__ __forceinline__ int exchanged(int row, int unit) {
  return unit ^ ((row >> 1 & 1) << 1 | (row >> 2 & 1));
}

}  // namespace entrenar
