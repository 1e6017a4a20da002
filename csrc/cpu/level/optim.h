// Optimizer steps of float32, bfloat16 and float16 tensors, computed in float32 and rounded once each. Compiled without
// fusing multiplications with additions, which the base level could not do.
#pragma once

#include "codes8bit.h"
#include "elements.h"

namespace {

inline vfloat vsqrt(vfloat value) {
#if defined(__AVX512F__)
  return (vfloat)_mm512_sqrt_ps((__m512)value);
#elif defined(__AVX2__)
  return (vfloat)_mm256_sqrt_ps((__m256)value);
#else
  for (int i = 0; i < kLanes; i++) value[i] = __builtin_sqrtf(value[i]);
  return value;
#endif
}

struct VectorMath {
  template <class T>
  static vfloat mul(vfloat a, T b) {
    return a * b;
  }
  static vfloat sqrt(vfloat value) { return vsqrt(value); }
  static vfloat sign(vfloat value) {
    const vfloat one = (vfloat)((bits_of(value) & 0x80000000) | 0x3f800000);
    return value > 0 || value < 0 ? one : value;
  }
};

template <Dtype dtype>
inline void store_param(const OptimCall& call, const OptimStep& step, Element<dtype>* to, vfloat value, vfloat grad,
                        int64_t index, int64_t count) {
  if constexpr (dtype == kBFloat16) {
    if (call.stochastic) {
      const vuint draw = optim_draw((vuint)lane_numbers() + (uint32_t)index, step.key, bits_of(grad));
      const vuint bits = bits_of(value);
      const vuint moved = (bits + draw) & 0xffff0000;
      value = (vfloat)((bits & 0x7fffffff) > 0x7f800000 ? bits : moved);  // NaN stays
    }
  }
  store_some<dtype>(to, value, count);
}

template <Rule rule, Dtype dtype, Dtype state_dtype>
void step_floats(const OptimCall& call, const OptimStep& step, float factor, const OptimTensor& t, int64_t begin,
                 int64_t end) {
  auto* params = (Element<dtype>*)t.param;
  const auto* grads = (const Element<dtype>*)t.grad;
  auto* as = (Element<state_dtype>*)t.states[0];
  auto* bs = (Element<state_dtype>*)t.states[1];
  for_vectors(end - begin, [&](int64_t offset, int64_t count) INLINE {
    const int64_t i = begin + offset;
    const vfloat grad = load_some<dtype>(grads + i, count);
    vfloat param = load_some<dtype>(params + i, count), a = {}, b = {};
    if (rule != kSGD || call.states) a = load_some<state_dtype>(as + i, count);
    if (rule == kAdam) b = load_some<state_dtype>(bs + i, count);
    optim_update<rule, VectorMath>(step, call.states, grad * factor, param, a, b);
    store_param<dtype>(call, step, params + i, param, grad, i, count);
    if (rule != kSGD || call.states) store_some<state_dtype>(as + i, a, count);
    if (rule == kAdam) store_some<state_dtype>(bs + i, b, count);
  });
}

struct CodesState {
  uint8_t* codes;
  float* absmax;
};

// Steps of blocks, one after the other. A block's new states become codes while the next block is computed, which waits
// for square roots and divisions.
template <Rule rule, Dtype dtype>
class CodesStep {
 public:
  CodesStep(const OptimCall& call, const OptimStep& step, float factor)
      : call_(call), step_(step), factor_(factor), a_codec_(*call.codebooks[0]),
        b_codec_(*call.codebooks[rule == kAdam]) {}

  // Of a block, whose first element is the parameter's `index`-th. `finish` completes its codes, or the next block's step.
  void take(Element<dtype>* params, const Element<dtype>* grads, const CodesState* states, int64_t index) {
    const float a_absmax = *states[0].absmax, b_absmax = rule == kAdam ? *states[1].absmax : 0;
    const OptimStep step = step_;  // which no store can change, so that it stays in registers
    const float factor = factor_;
    const Uncoded last_a = last(0), last_b = last(kStates - 1);
    float* const new_as = values_[turn_][0];
    float* const new_bs = values_[turn_][kStates - 1];
    constexpr int64_t kElementsAhead = 512;  // as many as of float32
    vfloat a_most = {}, b_most = {};
    for (int i = 0; i < kCodeBlock; i += kCodeLanes) {
      vfloat as[kCodeVectors], bs[kCodeVectors] = {};
      for (int state = 0; state < kStates; state++) prefetch_ahead(states[state].codes + i, kCodeLanes, kElementsAhead);
      a_codec_.decode(states[0].codes + i, as);
      if (rule == kAdam) b_codec_.decode(states[1].codes + i, bs);
      typename Codec<true>::Places a_places;
      typename Codec<false>::Places b_places;
#pragma GCC unroll 4
      for (int v = 0; v < kCodeVectors; v++) {
        const int j = i + v * kLanes;
        const vfloat grad = load_some<dtype>(grads + j, kLanes);
        vfloat param = load_some<dtype>(params + j, kLanes), a = as[v] * a_absmax, b = bs[v] * b_absmax;
        optim_update<rule, VectorMath>(step, 1, grad * factor, param, a, b);
        store_param<dtype>(call_, step, params + j, param, grad, index + j, kLanes);
        store(new_as + j, a);
        a_most = larger(magnitude(a), a_most);  // NaN does not count
        if (rule == kAdam) {
          store(new_bs + j, b);
          b_most = larger(b, b_most);
        }
        a_codec_.place(last_a.values + i, last_a.inverse, v, a_places);
        if (rule == kAdam) b_codec_.place(last_b.values + i, last_b.inverse, v, b_places);
      }
      a_codec_.encode(last_a.values + i, last_a.inverse, a_places, last_a.codes + i);
      if (rule == kAdam) b_codec_.encode(last_b.values + i, last_b.inverse, b_places, last_b.codes + i);
    }
    store_absmax(0, a_most, states[0]);
    if (rule == kAdam) store_absmax(1, b_most, states[1]);
    turn_ = 1 - turn_;
  }

  void finish() {
    encode_all(a_codec_, last(0));
    if (rule == kAdam) encode_all(b_codec_, last(1));
    for (uint8_t*& codes : last_codes_) codes = nowhere_;
  }

  // Of a shorter block, which is padded with what stays zero.
  void take_some(int64_t size, Element<dtype>* params, const Element<dtype>* grads, const CodesState* states,
                 int64_t index) {
    constexpr int kZeros[kMaxStates] = {kZeroCode, 0};
    Element<dtype> padded_params[kCodeBlock] = {}, padded_grads[kCodeBlock] = {};
    uint8_t codes[kMaxStates][kCodeBlock];
    CodesState padded_states[kMaxStates];
    __builtin_memcpy(padded_params, params, size * sizeof *params);
    __builtin_memcpy(padded_grads, grads, size * sizeof *grads);
    for (int s = 0; s < kStates; s++) {
      __builtin_memset(codes[s], kZeros[s], kCodeBlock);
      __builtin_memcpy(codes[s], states[s].codes, size);
      padded_states[s] = {codes[s], states[s].absmax};
    }
    take(padded_params, padded_grads, padded_states, index);
    finish();
    __builtin_memcpy(params, padded_params, size * sizeof *params);
    for (int s = 0; s < kStates; s++) __builtin_memcpy(states[s].codes, codes[s], size);
  }

  static constexpr int kStates = rule == kAdam ? 2 : 1;

 private:
  // A state of a block: its values, the inverse of their largest magnitude, and where their codes belong.
  struct Uncoded {
    const float* values;
    float inverse;
    uint8_t* codes;
  };

  Uncoded last(int state) const { return {values_[1 - turn_][state], inverses_[state], last_codes_[state]}; }

  template <bool with_sign>
  static void encode_all(const Codec<with_sign>& codec, const Uncoded& block) {
    for (int i = 0; i < kCodeBlock; i += kCodeLanes) {
      typename Codec<with_sign>::Places places;
      for (int v = 0; v < kCodeVectors; v++) codec.place(block.values + i, block.inverse, v, places);
      codec.encode(block.values + i, block.inverse, places, block.codes + i);
    }
  }

  // Of whose magnitudes the largest is among `most`.
  void store_absmax(int index, vfloat most, const CodesState& state) {
    float size = largest(most);
    if (size < kLeastAbsmax) size = 0;
    *state.absmax = size;
    inverses_[index] = size ? 1 / size : 0;
    last_codes_[index] = state.codes;
  }

  const OptimCall& call_;
  const OptimStep step_;
  const float factor_;
  const Codec<true> a_codec_;
  const Codec<false> b_codec_;
  alignas(64) float values_[2][kStates][kCodeBlock] = {};  // of this block and of the last one, in turns
  int turn_ = 0;
  uint8_t nowhere_[kCodeBlock];
  float inverses_[kMaxStates] = {};
  uint8_t* last_codes_[kMaxStates] = {nowhere_, nowhere_};
};

template <Rule rule, Dtype dtype>
void step_codes(const OptimCall& call, const OptimStep& step, float factor, const OptimTensor& t, int64_t begin,
                int64_t end) {
  CodesStep<rule, dtype> steps(call, step, factor);
  auto* params = (Element<dtype>*)t.param;
  const auto* grads = (const Element<dtype>*)t.grad;
  for (int64_t i = begin; i < end; i += kCodeBlock) {
    CodesState states[kMaxStates];
    for (int s = 0; s < steps.kStates; s++) states[s] = {(uint8_t*)t.states[s] + i, t.absmaxes[s] + i / kCodeBlock};
    if (i + kCodeBlock <= end) {
      steps.take(params + i, grads + i, states, i);
    } else {
      steps.take_some(end - i, params + i, grads + i, states, i);
    }
  }
  steps.finish();
}

template <Rule rule, Dtype dtype>
void step_dtype(const OptimCall& call, const OptimStep& step, float factor, const OptimTensor& t, int64_t begin,
                int64_t end) {
  if (call.codes) return step_codes<rule, dtype>(call, step, factor, t, begin, end);
  if (call.state_dtype == dtype) return step_floats<rule, dtype, dtype>(call, step, factor, t, begin, end);
  step_floats<rule, dtype, kFloat32>(call, step, factor, t, begin, end);
}

template <Dtype dtype>
void step_rule(const OptimCall& call, const OptimStep& step, float factor, const OptimTensor& t, int64_t begin,
               int64_t end) {
  switch (call.rule) {
    case kSGD: return step_dtype<kSGD, dtype>(call, step, factor, t, begin, end);
    case kAdam: return step_dtype<kAdam, dtype>(call, step, factor, t, begin, end);
    case kLion: return step_dtype<kLion, dtype>(call, step, factor, t, begin, end);
  }
}

inline void optim(const OptimCall* call, const OptimStep* step, const OptimTensor* tensor, int64_t begin, int64_t end) {
  const float factor = step->sign * (call->factor ? *call->factor : 1.0f);
  FOR_DTYPE(call->dtype, step_rule, *call, *step, factor, *tensor, begin, end);
}

// In 64 sums whatever the level, so that each gives the same bits.
template <Dtype dtype>
float square_sum_in(const void* data, int64_t begin, int64_t end) {
  constexpr int kChains = 64 / kLanes;
  const auto* from = (const Element<dtype>*)data + begin;
  vfloat sums[kChains] = {};
  const int64_t size = end - begin;
  int64_t i = 0;
  for (; i + 64 <= size; i += 64) {
#pragma GCC unroll 16
    for (int chain = 0; chain < kChains; chain++) {
      const vfloat value = load_vector<dtype>(from + i + chain * kLanes);
      sums[chain] += value * value;
    }
  }
  for (int chain = 0; i < size; chain++, i += kLanes) {
    const vfloat value = load_some<dtype>(from + i, size - i);
    sums[chain] += value * value;
  }
  float all[64];
  for (int chain = 0; chain < kChains; chain++) store(all + chain * kLanes, sums[chain]);
  for (int width = 32; width > 0; width /= 2) {
    for (int j = 0; j < width; j++) all[j] += all[j + width];
  }
  return all[0];
}

inline float square_sum(Dtype dtype, const void* data, int64_t begin, int64_t end) {
  FOR_DTYPE(dtype, square_sum_in, data, begin, end);
  return 0;
}

}  // namespace
