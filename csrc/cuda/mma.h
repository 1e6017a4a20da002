// The tensor cores' product of small tiles, which every GPU since sm_80 has.
#pragma once

#include "floats.h"

namespace entrenar {

// d += a b for a 16 x 16 tile of bfloat16 pairs `a`, a 16 x 8 tile `b` and a 16 x 8 tile `d`, spread over a warp. With
// g = lane / 4 and t = lane % 4, a lane holds
//   a: rows g, g + 8, g, g + 8; of each the columns 2t and 2t + 1, for the last two 8 further
//   b: rows 2t and 2t + 1, then 8 further, of column g
//   d: row g at columns 2t and 2t + 1, then row g + 8
static __device__ inline void mma_bfloat16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if defined(ENTRENAR_EMULATED)
  emulator::mma_bfloat16(d, a, b);
#else
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

}  // namespace entrenar
