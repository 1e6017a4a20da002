// What the warps of product_sm90.cu agree on, without which they would wait for ever: their roles and registers, the
// stages and their barriers, and who takes which steps of which tiles.
#pragma once

#include "product_sm90_maps.h"

namespace entrenar::sm90 {

constexpr int kWarpgroup = 128;
constexpr int kConsumers = 2;
constexpr int kFirstConsumer = kWarpgroup, kFirstScaler = kWarpgroup / 2;  // before them one thread copies tensors
constexpr int kScalers = kFirstConsumer - kFirstScaler;
constexpr int kThreads = kFirstConsumer + kConsumers * kWarpgroup;
constexpr int kMaxRank = kStep;  // the last term is one more step
constexpr int kMaxParts = 8;     // blocks of a cluster
constexpr int kLeastSlice = 16;  // tokens of a part of a tile that store_matrices_transposed writes
constexpr int kRegisters = 65536, kMaxShared = 227 * 1024, kProcessorShared = 228 * 1024, kReservedShared = 1024;

static_assert(kConsumers * kWarpgroupFeatures == kFeatures, "");
static_assert(kScalers == kStep && kScales == 2 * kScalers, "a thread has two of a step's pairs of scales");

// A full barrier is arrived at by the thread that copies tensors and by each warp that copies scales, an empty one by
// each warp that consumes.
constexpr int kFullArrivals = 1 + kScalers / 32, kEmptyArrivals = kConsumers * kWarpgroup / 32;

// Shared memory: stages of the pipeline, each of input, codes and scales; the output's tile; the barriers.
template <int kTokens>
struct Layout {
  static constexpr int kResident = kTokens == 64 ? 2 : 1;  // blocks of a multiprocessor, which hide each other's waits
  static constexpr int kLaunchRegisters = kRegisters / (kResident * kThreads) / 8 * 8;  // of a thread, by eights
  static constexpr int kConsumerRegisters = kResident == 2 ? 96 : 216;
  static constexpr int kProducerRegisters = kResident == 2 ? 48 : 72;
  static constexpr int kGroupSteps = kResident == 2 ? 2 : 4;  // as registers allow
  static constexpr int kIn = kTokens * kStep * 2;
  static constexpr int kStage = kIn + kCodesBytes + kScalesBytes;
  static constexpr int kWarpgroupOut = kTokens * kWarpgroupFeatures * 2;
  static constexpr int kOut = kConsumers * kWarpgroupOut;
  static constexpr int kBarriers = 1024;
  static constexpr int kMost = kResident == 2 ? kProcessorShared / 2 - kReservedShared : kMaxShared;
  static constexpr int kFit = (kMost - kOut - kBarriers) / kStage;
  static constexpr int kStages = kFit < 8 ? kFit : 8;
  static constexpr int kBytes = kStages * kStage + kOut + kBarriers;
  static_assert(kStage % 1024 == 0, "the 128-byte swizzle repeats after 1024 bytes");
  static_assert(kStages * kStage >= kFeatures * kTokens * 4, "a part's sums lie where its stages were");
  static_assert((kConsumers * kConsumerRegisters + kProducerRegisters) * kWarpgroup <= kLaunchRegisters * kThreads,
                "a block has the registers that it was launched with: a warpgroup would wait for more for ever");
};

// Where a warp is in the ring of stages. Parity is that of the phase of a full barrier that it waits for; an empty
// barrier is one phase behind, and the first round finds it as after a phase of parity 1.
struct Place {
  int stage, parity;
};

template <int kStages>
INT4_HD Place after(Place place) {
  return place.stage + 1 == kStages ? Place{0, place.parity ^ 1} : Place{place.stage + 1, place.parity};
}

// The steps of a part of the contraction.
struct Range {
  int begin, end;
  bool last;  // the last term is its
};

INT4_HD Range range_of(int steps, int rank, int part, int parts) {
  return {(int)((int64_t)steps * part / parts), (int)((int64_t)steps * (part + 1) / parts),
          rank > 0 && part == parts - 1};
}

// Some of a product's tiles, of that many tokens, each by the blocks of a cluster that share out the contraction.
struct Work {
  int tokens, parts;
  int64_t first, end;
};

// A block that has one of the parts has one tile, as it adds up in the memory of its stages.
inline int64_t blocks_of(const Work& work, int64_t resident) {
  const int64_t count = work.end - work.first;
  return work.parts > 1 ? count * work.parts : count < resident ? count : resident;
}

// The whole product in one launch or two: rounds of whole tiles, and what is left, whose contraction is shared out so
// that it too occupies all multiprocessors.
struct Plan {
  Work whole, shared;
};

inline int64_t tiles(int64_t extent, int64_t tile) { return (extent + tile - 1) / tile; }

// Takes the least time, in cycles of a step and of what comes after the steps. The cycles are estimates: on an H200 the
// cut that they choose was not always the fastest, at worst 54 us where 38 were possible (128 rows, 4096 x 11008).
inline Plan choose(int64_t features, int64_t tokens, int64_t contraction, int processors) {
  struct Kind {
    int tokens, resident, step, write, add;
  };
  constexpr Kind kKinds[] = {{256, 1, 1150, 2500, 9000}, {128, 1, 640, 1500, 6000}, {64, 2, 700, 1500, 4500}};
  const int64_t steps = contraction / kStep;
  Plan best = {};
  int64_t least = 0;
  for (const Kind& kind : kKinds) {
    const int64_t count = tiles(features, kFeatures) * tiles(tokens, kind.tokens);
    const int64_t resident = (int64_t)processors * kind.resident, left = count % resident;
    for (int parts = 1; parts <= kMaxParts && parts * kLeastSlice <= kind.tokens && parts <= steps; parts *= 2) {
      const int64_t whole = parts == 1 ? count : count - left;
      if (whole == count && parts > 1) break;
      int64_t cost = tiles(whole, resident) * (steps * kind.step + kind.write);
      if (parts > 1) cost += tiles(left * parts, resident) * (tiles(steps, parts) * kind.step + kind.write + kind.add);
      if (!best.whole.tokens || cost < least) {
        best = {{kind.tokens, 1, 0, whole}, {kind.tokens, parts, whole, count}};
        least = cost;
      }
    }
  }
  return best;
}

}  // namespace entrenar::sm90
