// Products with an int4 weight on Hopper: the weight is decoded into the registers that wgmma reads its first operand
// from, so the product comes out transposed, features by tokens, and is turned on its way to memory.
#include "product_sm90.h"

#include "cluster.h"
#include "dependent.h"
#include "hopper.h"
#include "launch.h"
#include "product_sm90_pipeline.h"

namespace entrenar {

namespace sm90 {

namespace {

using namespace hopper;

struct Source {
  CUtensorMap in, codes, out, low;
  uintptr_t scales;  // in the gradient those that the product's first step would have if all steps were its
  const float* bias;
  const uint16_t* factor;
  int features;
  int begin;  // the first of the product's tiles of features that are its, in the gradient of the steps; or none
};

struct Arguments {
  Source sources[ProductSm90::kMost];
  int64_t blocks;      // of a row
  int64_t first, end;  // of the tiles
  int block, rank, low_columns, steps, feature_tiles, token_tiles;
  int parts;  // of the contraction, each a block's of a cluster
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

template <int kTokens>
struct Pipeline {
  char* shared;
  Place place = {0, 0};

  __device__ void next() { place = after<Layout<kTokens>::kStages>(place); }
  __device__ char* in() const { return shared + place.stage * Layout<kTokens>::kStage; }
  __device__ char* codes() const { return in() + Layout<kTokens>::kIn; }
  __device__ char* scales() const { return codes() + kCodesBytes; }
  __device__ uint32_t full() const {
    return shared_address(shared + Layout<kTokens>::kBytes - Layout<kTokens>::kBarriers) + place.stage * 16;
  }
  __device__ uint32_t empty() const { return full() + 8; }
};

// Whose a tile of features is, or in the gradient a step.
__device__ __forceinline__ int source_of(const Arguments& p, int index) {
  int source = 0;
  while (source + 1 < ProductSm90::kMost && index >= p.sources[source + 1].begin) source++;
  return source;
}

// A tile: whose it is, and where its features and tokens begin. In the gradient the first source has what is common.
template <bool gradient, int kTokens>
struct TileOf {
  int source = 0, feature, token;

  __device__ TileOf(const Arguments& p, int64_t index) {
    const Tile tile = tile_at(index, p.feature_tiles, p.token_tiles);
    int first = 0;
    if (!gradient) {
      source = source_of(p, tile.features);
      first = p.sources[source].begin;
    }
    feature = (tile.features - first) * kFeatures;
    token = tile.tokens * kTokens;
  }
};

template <bool gradient, int kTokens>
__device__ void copy_tensors(const Arguments& p, Pipeline<kTokens> pipeline, int part) {
  using L = Layout<kTokens>;
  const Range range = range_of(p.steps, p.low_columns, part, p.parts);
  for (int64_t tile = p.first + blockIdx.x / p.parts; tile < p.end; tile += gridDim.x / p.parts) {
    const TileOf<gradient, kTokens> of(p, tile);
    for (int i = range.begin; i < range.end; i++) {
      const Source& source = p.sources[gradient ? source_of(p, i) : of.source];
      const int step = gradient ? i - source.begin : i;
      const uint32_t full = pipeline.full(), codes = shared_address(pipeline.codes());
      barrier_wait(pipeline.empty(), pipeline.place.parity ^ 1);
      barrier_arrive_expect(full, L::kIn + kCodesBytes);
      load_tile(shared_address(pipeline.in()), &source.in, step * kStep, of.token, full);
      if (gradient) {
        load_tile(codes, &source.codes, of.feature / 2, step * kStep, full);
      } else {
        load_tile(codes, &source.codes, step * (kStep / 2), of.feature, full);
      }
      pipeline.next();
    }
    for (int i = 0; i < range.low_steps; i++) {
      barrier_wait(pipeline.empty(), pipeline.place.parity ^ 1);
      barrier_arrive_expect(pipeline.full(), L::kIn);
      load_tile(shared_address(pipeline.in()), &p.sources[of.source].low, i * kStep, of.token, pipeline.full());
      pipeline.next();
    }
  }
}

// The scales of a tile for one thread. In each step it has two pairs: in the forward those of the 32-element groups of
// its row and of the row kScalers on; in the gradient those of the groups of features of its row.
template <bool gradient>
struct ScaleReader {
  const Arguments& p;
  const uintptr_t scales;
  int64_t first;
  int stride, second;
  bool two;  // or one scale for both of a pair

  __device__ ScaleReader(const Arguments& p, int source, int feature, int thread)
      : p(p), scales(p.sources[source].scales), two(p.block == int4::kGroup) {
    const int blocks = (int)p.blocks;
    if (gradient) {
      first = thread * p.blocks + (two ? feature / int4::kGroup : feature / kStep);
      stride = kStep * blocks;
      second = two ? 2 : 1;
    } else {
      first = (feature + thread) * p.blocks;
      stride = two ? 2 : 1;
      second = kScalers * blocks;
    }
    if (feature + kWarpgroupFeatures >= p.sources[source].features) second = 0;  // beyond the edge nothing is written
  }

  __device__ int64_t index(int step, int pair) const { return first + (int64_t)step * stride + pair * second; }

  // The word of memory that holds them: nothing may wait for it here, nor branch.
  __device__ uint32_t read(int step, int pair) const {
    uintptr_t of_step = scales;
    if (gradient) {
#pragma unroll
      for (int i = 1; i < ProductSm90::kMost; i++) of_step = step >= p.sources[i].begin ? p.sources[i].scales : of_step;
    }
    return __ldg((const uint32_t*)of_step + (index(step, pair) >> 1));
  }
  // Whose halves they are does not depend on the source: its first step is an even number of scales away.
  __device__ uint32_t both(uint32_t word, int step, int pair) const {
    return __byte_perm(word, 0, two ? 0x3210 : index(step, pair) & 1 ? 0x3232 : 0x1010);
  }
};

// Scales are read a group of steps before they are used. A group's loads go out together: the hardware counts them
// together, and waiting for one that was sent earlier would be waiting for all.
template <bool gradient, int kTokens>
__device__ void copy_scales(const Arguments& p, Pipeline<kTokens> pipeline, int part) {
  constexpr int kGroupSteps = Layout<kTokens>::kGroupSteps;
  const int thread = threadIdx.x - kFirstScaler;
  const Range range = range_of(p.steps, p.low_columns, part, p.parts);
  const auto publish = [&] {
    __syncwarp();
    if (thread % kWarp == 0) barrier_arrive(pipeline.full());
    pipeline.next();
  };
  for (int64_t tile = p.first + blockIdx.x / p.parts; tile < p.end; tile += gridDim.x / p.parts) {
    const TileOf<gradient, kTokens> of(p, tile);
    const ScaleReader<gradient> scales(p, of.source, of.feature, thread);
    uint32_t next[kGroupSteps][2];
    const auto read = [&](int first) {
#pragma unroll
      for (int i = 0; i < kGroupSteps; i++) {
        for (int j = 0; j < 2; j++) next[i][j] = first + i < range.end ? scales.read(first + i, j) : 0;
      }
    };
    read(range.begin);

    for (int first = range.begin; first < range.end; first += kGroupSteps) {
      uint32_t words[kGroupSteps][2];
#pragma unroll
      for (int i = 0; i < kGroupSteps; i++) {
        for (int j = 0; j < 2; j++) words[i][j] = next[i][j];
      }
      read(first + kGroupSteps);
#pragma unroll
      for (int i = 0; i < kGroupSteps; i++) {
        const int step = first + i;
        if (step >= range.end) break;
        barrier_wait(pipeline.empty(), pipeline.place.parity ^ 1);
        for (int j = 0; j < 2; j++) {
          write_scales<gradient>(pipeline.scales(), thread + j * kScalers, scales.both(words[i][j], step, j));
        }
        publish();
      }
    }
    for (int i = 0; i < range.low_steps; i++) {
      barrier_wait(pipeline.empty(), pipeline.place.parity ^ 1);
      publish();
    }
  }
}

// The factor of the last term: the fragment of 16 of its contraction, zero beyond its rank.
template <bool gradient>
__device__ void read_factor(uint32_t (&a)[4], const Arguments& p, const Source& source, int feature, int first) {
  const int warp = threadIdx.x % kWarpgroup / kWarp, lane = threadIdx.x % kWarp;
  for (int half = 0; half < 2; half++) {
    const int64_t row = min(feature + feature_of(gradient, warp, lane, half), source.features - 1);
    for (int i = 0; i < 2; i++) {
      const int k = first + 2 * (lane % 4) + 8 * i;
      uint32_t pair = 0;
      if (k < p.low_columns) {
        if (gradient) {
          const uint16_t* const at = p.sources[k / p.rank].factor + k % p.rank * (int64_t)source.features + row;
          pair = __ldg(at) | (uint32_t)__ldg(at + source.features) << 16;
        } else {
          pair = __ldg((const uint32_t*)(source.factor + row * p.rank + k));
        }
      }
      a[2 * i + half] = pair;
    }
  }
}

template <int kSums>
__device__ void multiply(float (&sums)[kSums], Fragments& a, uint64_t in, bool accumulate) {
  for (auto& fragment : a) {
    for (uint32_t& pair : fragment) pin(pair);
  }
  wgmma_fence();
  wgmma(sums, a[0], in, accumulate);
  wgmma(sums, a[1], in + kWgmmaNext, true);
  wgmma_commit();
}

__device__ void release(uint32_t empty) {
  if (threadIdx.x % kWarp == 0) barrier_arrive(empty);
}

// Adds up the parts of a tile, always in the same order: of each thread's sums this block keeps, as the first, those of
// its own slice of the tokens. They are exchanged through the memory of the stages, which have all been used.
template <int kTokens, int kParts>
__device__ void add_parts(float (&sums)[kTokens / 2], char* shared, int part) {
  constexpr int kChunks = kTokens / 8, kOwn = kChunks / kParts, kSumming = kConsumers * kWarpgroup;
  auto* const at = (float4*)shared + (threadIdx.x - kFirstConsumer);
  consumers_sync<kSumming>();
#pragma unroll
  for (int i = 0; i < kChunks; i++) {
    at[i * kSumming] = make_float4(sums[4 * i], sums[4 * i + 1], sums[4 * i + 2], sums[4 * i + 3]);
  }
  cluster_barrier();
#pragma unroll
  for (float& sum : sums) sum = 0;
#pragma unroll 1
  for (int other = 0; other < kParts; other++) {
    const float4* const from = of_block(at, other) + part * kOwn * kSumming;
    float4 part_sums[kOwn];  // all on the way at once: the way is long
#pragma unroll
    for (int i = 0; i < kOwn; i++) part_sums[i] = from[i * kSumming];
#pragma unroll
    for (int i = 0; i < kOwn; i++) {
      sums[4 * i] += part_sums[i].x;
      sums[4 * i + 1] += part_sums[i].y;
      sums[4 * i + 2] += part_sums[i].z;
      sums[4 * i + 3] += part_sums[i].w;
    }
  }
  for (float& sum : sums) pin(sum);
  cluster_arrive();  // the others' memory has been read
}

// The first of sums, those of slice tokens.
template <bool gradient, int kTokens>
__device__ void write(const Source& source, float (&sums)[kTokens / 2], char* out, int feature, int token, int slice) {
  const int warpgroup = (threadIdx.x - kFirstConsumer) / kWarpgroup, warp = threadIdx.x % kWarpgroup / kWarp;
  const int lane = threadIdx.x % kWarp;
  if (!gradient && source.bias) {
    for (int half = 0; half < 2; half++) {
      const int row = feature + feature_of(gradient, warp, lane, half);
      const float bias = row < source.features ? __ldg(source.bias + row) : 0;
#pragma unroll
      for (int i = 0; i < kTokens / 2; i += 4) {
        sums[i + 2 * half] += bias;
        sums[i + 2 * half + 1] += bias;
      }
    }
  }
  const bool elected = threadIdx.x % kWarpgroup == 0;
  if (elected) wait_stores_read();
  warpgroup_sync(1 + warpgroup);
#pragma unroll
  for (int i = 0; i < kTokens / 8; i += 2) {
    if (8 * i >= slice) break;
    const float* const s = sums + 4 * i;
    if (gradient) {
      for (int j = 0; j < 4; j++) {
        *(uint32_t*)(out + gradient_stored(warp, lane, j % 2) + kNextTokens * (i + j / 2)) =
            narrowed_pair(s[4 * (j / 2) + j % 2], s[4 * (j / 2) + j % 2 + 2]);
      }
    } else {
      store_matrices_transposed(shared_address(out) + forward_stored(warp, lane) + kNextTokens * i, narrowed_pair(s[0], s[1]),
                                narrowed_pair(s[2], s[3]), narrowed_pair(s[4], s[5]), narrowed_pair(s[6], s[7]));
    }
  }
  fence_tensor_copies();
  warpgroup_sync(1 + warpgroup);
  if (elected) store_tile(&source.out, feature, token, shared_address(out));
}

template <bool gradient, int kTokens>
__device__ void consume(const Arguments& p, Pipeline<kTokens> pipeline, int part) {
  using L = Layout<kTokens>;
  const int thread = threadIdx.x - kFirstConsumer, warpgroup = thread / kWarpgroup;
  char* const out = pipeline.shared + L::kStages * L::kStage + warpgroup * L::kWarpgroupOut;
  const Range range = range_of(p.steps, p.low_columns, part, p.parts);
  float sums[kTokens / 2];
  Fragments a[2];
  Encoded<gradient> encoded;

  for (int64_t tile = p.first + blockIdx.x / p.parts; tile < p.end; tile += gridDim.x / p.parts) {
    const TileOf<gradient, kTokens> of(p, tile);
    const Source& source = p.sources[of.source];
    const int feature = of.feature + warpgroup * kWarpgroupFeatures;
    uint32_t used = 0;

    // While the tensor cores multiply by one half of a stage, the next half is decoded. It is read before they are set
    // to work, and whether the next stage has come is asked for earlier still: neither is waited for.
    barrier_wait(pipeline.full(), pipeline.place.parity);
    read(encoded, pipeline.codes(), pipeline.scales(), thread, 0);
    decode(a[0], encoded, thread);
    for (int step = range.begin; step < range.end; step++) {
      const uint64_t in = wgmma_rows(shared_address(pipeline.in()));
      read(encoded, pipeline.codes(), pipeline.scales(), thread, 1);
      multiply(sums, a[0], in, step > range.begin);
      Pipeline<kTokens> next = pipeline;
      next.next();
      const bool more = step + 1 < range.end, is_full = more && barrier_try_wait(next.full(), next.place.parity);
      wgmma_wait<1>();
      if (step > range.begin) release(used);
      decode(a[1], encoded, thread);
      if (more) {
        if (!is_full) barrier_wait(next.full(), next.place.parity);
        read(encoded, next.codes(), next.scales(), thread, 0);
      }
      multiply(sums, a[1], in + 2 * kWgmmaNext, true);
      used = pipeline.empty();
      pipeline = next;
      if (more) {
        wgmma_wait<1>();
        decode(a[0], encoded, thread);
      }
    }
    for (int first = 0; first < range.low_steps * kStep; first += kStep) {
      if (first > 0) wgmma_wait<0>();  // which reads the last factor's registers
      uint32_t factor[kStep / 16][4];
      for (int i = 0; i < kStep / 16; i++) {
        if (first + 16 * i < p.low_columns) read_factor<gradient>(factor[i], p, source, feature, first + 16 * i);
      }
      wgmma_wait<0>();
      release(used);
      barrier_wait(pipeline.full(), pipeline.place.parity);
      const uint64_t in = wgmma_rows(shared_address(pipeline.in()));
      for (int i = 0; i < kStep / 16; i++) {
        if (first + 16 * i >= p.low_columns) break;
        for (uint32_t& pair : factor[i]) pin(pair);
        wgmma_fence();
        wgmma(sums, factor[i], in + i * kWgmmaNext, true);
        wgmma_commit();
      }
      used = pipeline.empty();
      pipeline.next();
    }
    wgmma_wait<0>();
    release(used);
    for (float& sum : sums) pin(sum);
    switch (p.parts) {
      case 2: add_parts<kTokens, 2>(sums, pipeline.shared, part); break;
      case 4: add_parts<kTokens, 4>(sums, pipeline.shared, part); break;
      case 8:
        if constexpr (kTokens >= 8 * kLeastSlice) add_parts<kTokens, 8>(sums, pipeline.shared, part);
        break;
    }
    const int slice = kTokens / p.parts;
    write<gradient, kTokens>(source, sums, out, feature, of.token + part * slice, slice);
  }
  if (threadIdx.x % kWarpgroup == 0) wait_stores();
}

#endif

template <bool gradient, int kTokens>
__global__ __launch_bounds__(kThreads, Layout<kTokens>::kResident) void product_kernel(
    const __grid_constant__ Arguments p) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using L = Layout<kTokens>;
  Pipeline<kTokens> pipeline;
  pipeline.shared = shared_memory();
  if (threadIdx.x == 0) {
    for (const CUtensorMap* map : {&p.sources[0].in, &p.sources[0].codes, &p.sources[0].out}) prefetch_map(map);
    for (int i = 0; i < L::kStages; i++) {
      barrier_init(pipeline.full(), kFullArrivals);
      barrier_init(pipeline.empty(), kEmptyArrivals);
      pipeline.next();
    }
    fence_barrier_init();
  }
  pipeline.place = {0, 0};
  let_next_kernel_begin();
  wait_for_kernel_before();
  __syncthreads();

  const int part = blockIdx.x % p.parts;
  if (threadIdx.x >= kFirstConsumer) {
    grow_registers<L::kConsumerRegisters>();
    consume<gradient, kTokens>(p, pipeline, part);
    if (p.parts > 1) cluster_wait();  // for those that read this block's memory
    return;
  }
  shrink_registers<L::kProducerRegisters>();
  if (threadIdx.x == 0) copy_tensors<gradient, kTokens>(p, pipeline, part);
  if (threadIdx.x >= kFirstScaler) copy_scales<gradient, kTokens>(p, pipeline, part);
  __syncwarp();
  if (p.parts > 1) {  // a block of a cluster has one tile: these are the two of add_parts
    cluster_barrier();
    cluster_arrive();
    cluster_wait();
  }
#endif
}

using Encode = decltype(&cuTensorMapEncodeTiled);

Encode find_encode() {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found;
  const cudaError_t status =
      cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
  return status == cudaSuccess && found == cudaDriverEntryPointSuccess ? (Encode)function : nullptr;
}

// A row-major matrix, and its tile in shared memory.
struct Matrix {
  CUtensorMapDataType type;
  const void* data;
  int64_t rows, columns;
  int tile_rows, tile_columns;
  CUtensorMapSwizzle swizzle;
};

bool describe(CUtensorMap* map, const Matrix& matrix) {
  static const Encode encode = find_encode();
  if (!encode) return false;
  const int size = matrix.type == CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 ? 2 : 1;
  const cuuint64_t extent[] = {(cuuint64_t)matrix.columns, (cuuint64_t)matrix.rows};
  const cuuint64_t pitch[] = {(cuuint64_t)matrix.columns * size};
  const cuuint32_t box[] = {(cuuint32_t)matrix.tile_columns, (cuuint32_t)matrix.tile_rows}, step[] = {1, 1};
  return encode(map, matrix.type, 2, (void*)matrix.data, extent, pitch, box, step, CU_TENSOR_MAP_INTERLEAVE_NONE,
                matrix.swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
                CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

bool describe(CUtensorMap* map, const void* data, int64_t rows, int64_t columns, int tile_rows) {
  return describe(map, {CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, data, rows, columns, tile_rows, kStep,
                        CU_TENSOR_MAP_SWIZZLE_128B});
}

// What the product has in all: tiles of features, and steps of the contraction.
struct Extent {
  int feature_tiles = 0, steps = 0;
};

Extent extent_of(const ProductSm90& product, int sources) {
  Extent extent;
  for (int i = 0; i < sources; i++) {
    const Weight& w = product.sources[i].weight;
    if (product.gradient) {
      extent.feature_tiles = (int)tiles(w.columns, kFeatures);
      extent.steps += (int)(w.rows / kStep);
    } else {
      extent.feature_tiles += (int)tiles(w.rows, kFeatures);
      extent.steps = (int)(w.columns / kStep);
    }
  }
  return extent;
}

int low_columns(const ProductSm90& product) { return product.gradient ? product.count * product.rank : product.rank; }

template <bool gradient, int kTokens>
bool describe(Source* source, const ProductSm90& product, int index, int parts) {
  const ProductSm90::Source& of = product.sources[index];
  const Weight& w = of.weight;
  const int64_t features = gradient ? w.columns : w.rows, contraction = gradient ? w.rows : w.columns;
  source->bias = of.bias;
  source->factor = (const uint16_t*)of.factor;
  source->features = (int)features;
  const Extent before = extent_of(product, index);
  source->begin = gradient ? before.steps : before.feature_tiles;
  const int64_t of_step = kStep * int4::blocks(w.columns, w.block) * sizeof(uint16_t);
  source->scales = (uintptr_t)w.scales - (gradient ? before.steps * of_step : 0);
  const Matrix codes = {CU_TENSOR_MAP_DATA_TYPE_UINT8, w.codes, w.rows, int4::row_bytes(w.columns),
                        gradient ? kStep : kFeatures, (gradient ? kFeatures : kStep) / 2,
                        gradient ? CU_TENSOR_MAP_SWIZZLE_64B : CU_TENSOR_MAP_SWIZZLE_32B};
  if (!describe(&source->codes, codes)) return false;
  if (!describe(&source->in, of.in, product.tokens, contraction, kTokens)) return false;
  if (gradient && index > 0) return true;
  return describe(&source->out, of.out, product.tokens, features, kTokens / parts) &&
         (!product.rank || describe(&source->low, of.low, product.tokens, low_columns(product), kTokens));
}

template <bool gradient, int kTokens>
int launch(const Device& device, const ProductSm90& product, const Work& work, void* stream) {
  using L = Layout<kTokens>;
  const Weight& w = product.sources[0].weight;
  const Extent extent = extent_of(product, product.count);
  Arguments p = {};
  p.blocks = int4::blocks(w.columns, w.block);
  p.block = w.block;
  p.rank = product.rank;
  p.low_columns = low_columns(product);
  p.steps = extent.steps;
  p.feature_tiles = extent.feature_tiles;
  p.token_tiles = (int)tiles(product.tokens, kTokens);
  p.first = work.first;
  p.end = work.end;
  p.parts = work.parts;
  for (int i = 0; i < ProductSm90::kMost; i++) {
    p.sources[i].begin = INT32_MAX;
    if (i < product.count && !describe<gradient, kTokens>(&p.sources[i], product, i, p.parts)) {
      return cudaErrorInvalidValue;
    }
  }

  const Launch how = {dim3((unsigned)blocks_of(work, (int64_t)device.processors * L::kResident)), kThreads, L::kBytes,
                      stream, (unsigned)p.parts, true};
  return entrenar::launch<product_kernel<gradient, kTokens>>(device, how, p);
}

int launch(const Device& device, const ProductSm90& product, const Work& work, void* stream) {
  const auto with_tokens = [&](auto gradient) {
    switch (work.tokens) {
      case 256: return launch<decltype(gradient)::value, 256>(device, product, work, stream);
      case 128: return launch<decltype(gradient)::value, 128>(device, product, work, stream);
      default: return launch<decltype(gradient)::value, 64>(device, product, work, stream);
    }
  };
  return product.gradient ? with_tokens(std::true_type()) : with_tokens(std::false_type());
}

// Whether a kernel was compiled for sm_90a, where alone it is not empty, and is launched with the registers that its
// warpgroups then share out.
template <bool gradient, int kTokens>
bool compiled() {
  cudaFuncAttributes found;
  return cudaFuncGetAttributes(&found, product_kernel<gradient, kTokens>) == cudaSuccess &&
         found.numRegs == Layout<kTokens>::kLaunchRegisters;
}

template <int... kTokens>
bool all_compiled() {
  return ((compiled<false, kTokens>() && compiled<true, kTokens>()) && ...);
}

bool aligned(const void* pointer, int bytes) { return (uintptr_t)pointer % bytes == 0; }

}  // namespace

}  // namespace sm90

bool product_sm90_takes(const ProductSm90& product) {
  using namespace sm90;
  constexpr int64_t kMost = INT32_MAX / 4 / ProductSm90::kMost;  // tiles at the edges reach beyond
  if (product.count < 1 || product.count > ProductSm90::kMost || product.tokens > kMost) return false;
  if (product.rank % 8 || product.rank < 0 || product.rank > kMost) return false;
  const Weight& first = product.sources[0].weight;
  for (int i = 0; i < product.count; i++) {
    const ProductSm90::Source& source = product.sources[i];
    const Weight& w = source.weight;
    if (!w.codes || w.float32_scales || (w.block != 64 && w.block != 32)) return false;
    if (w.block != first.block || w.columns != first.columns) return false;
    if (w.rows == 0 || w.rows % kStep || w.rows > kMost) return false;
    if (w.columns == 0 || w.columns % kStep || w.columns > kMost) return false;
    if (!aligned(source.in, 16) || !aligned(source.out, 16)) return false;
    if (!aligned(w.codes, 16) || !aligned(w.scales, 4)) return false;
    if (!aligned(source.low, 16) || !aligned(source.factor, 4)) return false;
  }
  const Device& device = current_device();
  if (device.major != 9 || device.minor != 0) return false;
  static const bool ready = all_compiled<64, 128, 256>();
  return ready;
}

int product_sm90(const ProductSm90& product, void* stream) {
  using namespace sm90;
  if (product.tokens == 0) return cudaSuccess;
  const Device& device = current_device();
  const Extent extent = extent_of(product, product.count);
  const Plan plan = choose(product.gradient, extent.feature_tiles, product.tokens, extent.steps, device.processors);
  for (const Work& work : {plan.whole, plan.shared}) {
    if (work.first == work.end) continue;
    const int status = launch(device, product, work, stream);
    if (status != cudaSuccess) return status;
  }
  return cudaSuccess;
}

}  // namespace entrenar
