// The kernels of one level, compiled once for each instruction set.
#include "activation.h"
#include "attention.h"
#include "codec.h"
#include "cross_entropy.h"
#include "dot.h"
#include "kernels.h"
#include "linear_cross_entropy.h"
#include "norm.h"
#include "optim_entry.h"
#include "outer_entry.h"
#include "product_entry.h"
#include "quantize.h"
#include "rotary.h"
#include "softmax.h"

namespace entrenar {

const Kernels LEVELED(kernels) = {
    kBFloat16Units, quantize, dequantize, units_stride, to_units, wants_tiles, tiled_stride, to_tiles, to_int8, product,
    product_scratch_bytes, kRowsToSplit,
    kRowStep, kColumnsAtOnce, dot, max_dot_rows, kDotPairs, pack_rows, pack_outer, outer,
    attention_tile_words, attention_pack, attention_scratch_bytes, attention_forward,
    attention_single_floats, attention_single, attention_backward, attention_sum,
    cross_entropy, linear_cross_entropy, linear_cross_entropy_bytes,
    binary, swiglu_backward, rms_norm, rms_norm_backward, layer_norm_backward, add_sums, softmax_backward, rotary,
    LEVELED(optim), LEVELED(square_sum),
};

}  // namespace entrenar
