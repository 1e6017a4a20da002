// Instructions of the tensor cores, which a warp executes together.
#pragma once

#include "floats.h"

namespace entrenar {

// d += a b, of bfloat16 in pairs: a [16, 16], b [16, 8], d [16, 8]. With g = lane / 4 and t = lane % 4 a lane holds
//   a: rows g, g + 8, g, g + 8 at columns 2t, 2t, 2t + 8, 2t + 8 and their right neighbours,
//   b: rows 2t, 2t + 8 and their lower neighbours at column g,
//   d: row g at columns 2t, 2t + 1, and row g + 8 at the same.
static __device__ __forceinline__ void mma_bf16_16x8x16(float (&d)[4], const uint32_t (&a)[4],
                                                        const uint32_t (&b)[2]) {
#if defined(ENTRENAR_EMULATED)
  struct Fragments {
    uint32_t a[4], b[2];
  };
  const Fragments mine = {{a[0], a[1], a[2], a[3]}, {b[0], b[1]}};
  emulator::with_warp(mine, [&](const Fragments* lanes, int lane) {
    const auto element = [](const uint32_t* pairs, int index, int k) {
      return int4::bfloat16_to_float((uint16_t)(pairs[index] >> (k % 2 * 16)));
    };
    for (int i = 0; i < 4; i++) {
      const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
      for (int k = 0; k < 16; k++) {
        const int t = k % 8 / 2;
        d[i] += element(lanes[row % 8 * 4 + t].a, row / 8 + k / 8 * 2, k) * element(lanes[column * 4 + t].b, k / 8, k);
      }
    }
  });
#else
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

}  // namespace entrenar
