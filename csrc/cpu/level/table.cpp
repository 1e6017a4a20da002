// The kernels of one level, compiled once for each instruction set.
#include "codec.h"
#include "dot.h"
#include "kernels.h"
#include "outer.h"
#include "product.h"

#define TABLE_OF(level) kernels_##level
#define TABLE(level) TABLE_OF(level)

namespace entrenar {

const Kernels TABLE(LEVEL) = {
    kBFloat16Units, quantize, dequantize, to_units, product, product_scratch_bytes, dot, kMaxDotRows, pack_rows, outer,
};

}  // namespace entrenar
