// Gradients of activation functions, and SwiGLU.
#include "activation.h"

#include "../mills.h"
#include "functions.h"
#include "rows.h"

namespace entrenar {

namespace {

constexpr int kThreads = 256;
constexpr int kHeld = 4;  // packs of a row

template <Dtype dtype>
__device__ float sigmoid(float x) {
  return reciprocal<dtype>(1.0f + exponential<dtype>(-x));
}

// An element of the result, from elements of two arrays.
template <Binary f>
struct BinaryOf {
  static constexpr int kIn = 2, kOut = 1;
  template <Dtype dtype>
  static __device__ void apply(const float (&in)[kIn], float (&out)[kOut]) {
    const float a = in[0], b = in[1];
    if constexpr (f == kSiluBackward) {
      const float s = sigmoid<dtype>(b);
      out[0] = a * (s * (1.0f + b * (1.0f - s)));
    } else if constexpr (f == kGeluBackward) {
      const float density = 0x1.988454p-2f * exponential<dtype>(-0.5f * (b * b));  // φ(b)
      const float tail = density * mills_ratio(reciprocal<dtype>(1.0f + kMillsSlope * fabsf(b)));
      out[0] = a * ((b < 0 ? tail : 1.0f - tail) + b * density);
    } else if constexpr (f == kGeluTanhBackward) {
      constexpr float kSlope = 0.7978845608f, kCubic = 0.044715f;  // √(2/π)
      const float square = b * b;
      const float s = sigmoid<dtype>(2 * kSlope * (b + kCubic * (square * b)));  // (1 + tanh u) / 2 = σ(2u)
      out[0] = a * (s + b * (2.0f * s) * (1.0f - s) * (kSlope * (1.0f + 3 * kCubic * square)));
    } else if constexpr (f == kSigmoidBackward) {
      out[0] = a * (1.0f - b) * b;
    } else if constexpr (f == kTanhBackward) {
      out[0] = a * (1.0f - b * b);
    } else {
      static_assert(f == kSwiGLU, "");
      out[0] = a * sigmoid<dtype>(a) * b;
    }
  }
};

template <bool with_y>
struct SwiGLUBackward {
  static constexpr int kIn = 3, kOut = with_y ? 3 : 2;
  template <Dtype dtype>
  static __device__ void apply(const float (&in)[kIn], float (&out)[kOut]) {
    const float dy = in[0], g = in[1], s = sigmoid<dtype>(g);
    out[0] = dy * in[2] * (s * (1.0f + g * (1.0f - s)));
    out[1] = dy * (g * s);
    if constexpr (with_y) out[2] = g * s * in[2];
  }
};

template <class F>
struct Arrays {
  const void* in[F::kIn];
  void* out[F::kOut];
};

// The n elements from i on.
template <class F, Dtype dtype, int n>
__device__ void apply_at(const Arrays<F>& arrays, int64_t i) {
  using Bits = typename Float<dtype>::Bits;
  Pack<float, n> in[F::kIn], out[F::kOut];
  for (int a = 0; a < F::kIn; a++) in[a] = widened<dtype>(load<n>((const Bits*)arrays.in[a] + i));
  for (int e = 0; e < n; e++) {
    float values[F::kIn], results[F::kOut];
    for (int a = 0; a < F::kIn; a++) values[a] = in[a].at[e];
    F::template apply<dtype>(values, results);
    for (int a = 0; a < F::kOut; a++) out[a].at[e] = results[a];
  }
  for (int a = 0; a < F::kOut; a++) store((Bits*)arrays.out[a] + i, narrowed<dtype>(out[a]));
}

// A pack for each thread, in so few registers that a multiprocessor is full of threads: on an H200 more packs each, in
// flight together, take as long. The first threads take an element each of what is left beyond the last whole pack.
template <class F, Dtype dtype, int n>
__global__ void __launch_bounds__(kThreads) elementwise_kernel(Arrays<F> arrays, int64_t size) {
  const int64_t thread = (int64_t)blockIdx.x * kThreads + threadIdx.x, packs = size / n, left = packs * n + thread;
  if (thread < packs) apply_at<F, dtype, n>(arrays, thread * n);
  if (n > 1 && left < size) apply_at<F, dtype, 1>(arrays, left);
}

template <class F>
int elementwise(Dtype dtype, int64_t size, const Arrays<F>& arrays, void* stream) {
  if (size == 0) return cudaSuccess;
  bool aligned = true;
  for (const void* pointer : arrays.in) aligned = aligned && aligned_to_16(pointer);
  for (const void* pointer : arrays.out) aligned = aligned && aligned_to_16(pointer);
  return with_dtype(dtype, [&](auto type) -> int {
    constexpr int wide = kWide<type.value>;
    const int64_t in_block = (int64_t)kThreads * (aligned ? wide : 1);
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3((unsigned)((size + in_block - 1) / in_block));
    config.blockDim = dim3(kThreads);
    config.stream = (cudaStream_t)stream;
    return cudaLaunchKernelEx(
        &config, aligned ? elementwise_kernel<F, type.value, wide> : elementwise_kernel<F, type.value, 1>, arrays, size);
  });
}

template <Binary f>
int binary_of(Dtype dtype, int64_t size, const void* a, const void* b, void* out, void* stream) {
  return elementwise<BinaryOf<f>>(dtype, size, {{a, b}, {out}}, stream);
}

// dx = y (dy - Σ dy y), or of the logarithm dx = dy - e^y Σ dy: a row for each team.
template <bool log, Dtype dtype, int n, int held>
__global__ void __launch_bounds__(kMaxTeam, 1)
    softmax_backward_kernel(int64_t rows, int64_t columns, const void* dy, const void* y, void* dx) {
  const int64_t row = team();
  if (row >= rows) return;
  const RowPart<dtype, n, held> gradient(dy, row, columns), result(y, row, columns);
  float total[1] = {};
  for_packs<n, held>(columns, [&](int p, int64_t i) {
    const Pack<float, n> dys = gradient.at(p, i);
    if constexpr (log) {
      for (int e = 0; e < n; e++) total[0] += dys.at[e];
    } else {
      const Pack<float, n> ys = result.at(p, i);
      for (int e = 0; e < n; e++) total[0] += dys.at[e] * ys.at[e];
    }
  });
  team_sum(total, 0);
  auto* to = (typename Float<dtype>::Bits*)dx + row * columns;
  for_packs<n, held>(columns, [&](int p, int64_t i) {
    Pack<float, n> dys = gradient.at(p, i);
    const Pack<float, n> ys = result.at(p, i);
    for (int e = 0; e < n; e++) {
      dys.at[e] = log ? dys.at[e] - expf(ys.at[e]) * total[0] : ys.at[e] * (dys.at[e] - total[0]);
    }
    store(to + i, narrowed<dtype>(dys));
  });
}

template <bool log>
int softmax_backward(Dtype dtype, int64_t rows, int64_t columns, const void* dy, const void* y, void* dx,
                     void* stream) {
  return with_dtype(dtype, [&](auto type) -> int {
    constexpr Dtype d = type.value;
    const bool aligned = columns % kWide<d> == 0 && aligned_to_16(dy) && aligned_to_16(y) && aligned_to_16(dx);
    const Teams teams = teams_for<d, kHeld>(columns, aligned);
    const cudaLaunchConfig_t config = launch_teams(teams, rows, stream);
    return with_teams<d, kHeld>(teams, [&](auto n, auto held) {
      return (int)cudaLaunchKernelEx(&config, softmax_backward_kernel<log, d, n.value, held.value>, rows, columns, dy,
                                     y, dx);
    });
  });
}

}  // namespace

int binary_cuda(Binary f, Dtype dtype, int64_t size, const void* a, const void* b, void* out, void* stream) {
  switch (f) {
    case kSiluBackward: return binary_of<kSiluBackward>(dtype, size, a, b, out, stream);
    case kGeluBackward: return binary_of<kGeluBackward>(dtype, size, a, b, out, stream);
    case kGeluTanhBackward: return binary_of<kGeluTanhBackward>(dtype, size, a, b, out, stream);
    case kSigmoidBackward: return binary_of<kSigmoidBackward>(dtype, size, a, b, out, stream);
    case kTanhBackward: return binary_of<kTanhBackward>(dtype, size, a, b, out, stream);
    default: return binary_of<kSwiGLU>(dtype, size, a, b, out, stream);
  }
}

int swiglu_backward_cuda(Dtype dtype, int64_t size, const void* dy, const void* gate, const void* up, void* dgate,
                         void* dup, void* y, void* stream) {
  return y ? elementwise<SwiGLUBackward<true>>(dtype, size, {{dy, gate, up}, {dgate, dup, y}}, stream)
           : elementwise<SwiGLUBackward<false>>(dtype, size, {{dy, gate, up}, {dgate, dup}}, stream);
}

int softmax_backward_cuda(bool log, Dtype dtype, int64_t rows, int64_t columns, const void* dy, const void* y, void* dx,
                          void* stream) {
  if (rows == 0) return cudaSuccess;
  return log ? softmax_backward<true>(dtype, rows, columns, dy, y, dx, stream)
             : softmax_backward<false>(dtype, rows, columns, dy, y, dx, stream);
}

}  // namespace entrenar
