// The launchers with C names, for ctypes.
#include "../../../csrc/cuda/int4.h"

extern "C" void quantize(const void* weight, int dtype, int64_t rows, int64_t columns, int block, bool float32_scales,
                         uint8_t* codes, void* scales) {
  entrenar::int4_quantize_cuda(weight, (entrenar::Dtype)dtype, rows, columns, block, float32_scales, codes, scales,
                               nullptr);
}

extern "C" void dequantize(const uint8_t* codes, const void* scales, bool float32_scales, int64_t rows, int64_t columns,
                           int block, int dtype, void* out) {
  const entrenar::Weight weight = {codes, scales, float32_scales, block, nullptr, rows, columns};
  entrenar::int4_dequantize_cuda(weight, (entrenar::Dtype)dtype, out, nullptr);
}
