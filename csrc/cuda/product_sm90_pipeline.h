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

// The steps of a part of the contraction, and how many of the last term follow them: the last part has those.
struct Range {
  int begin, end, low_steps;
};

INT4_HD int steps_of_low(int columns) { return (columns + kStep - 1) / kStep; }

INT4_HD Range range_of(int steps, int low_columns, int part, int parts) {
  return {(int)((int64_t)steps * part / parts), (int)((int64_t)steps * (part + 1) / parts),
          part == parts - 1 ? steps_of_low(low_columns) : 0};
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

// Clusters run on multiprocessors that lie together, whose numbers are not all multiples of theirs: of blocks that have one
// to themselves, an H200 runs at once 30 clusters of 4 and 15 of 8, and not 33 and 16.
inline int64_t clusters_at_once(int processors, int parts) {
  return parts <= 2 ? processors / parts : processors * 15 / 16 / parts;
}

// What tiles of so many tokens cost, in microseconds, on an H200: fitted to what the cuts took of products of 64 to 4096
// tokens with weights of 4096 x 4096, 11008 x 4096 and 4096 x 11008, where what they choose is within 2 % of the fastest.
struct Cost {
  double launch;       // of a kernel
  double step, steps;  // of a block alone on its multiprocessor, and of as many as it holds beside each other
  double write, add;   // of a tile, and of its parts
};

struct Kind {
  int tokens, resident;
  Cost of[2];  // forward and gradient
};

constexpr Kind kKinds[] = {
    {256, 1, {{4.5, 0.636, 0.636, 4.2, 1.8}, {1.0, 0.668, 0.668, 5.8, 3.0}}},
    {128, 1, {{2.9, 0.440, 0.440, 3.0, 1.7}, {1.0, 0.491, 0.491, 5.5, 1.6}}},
    {64, 2, {{4.0, 0.360, 0.700, 0.8, 1.2}, {2.0, 0.484, 0.798, 3.0, 1.3}}},
};

// So many tiles in rounds of `at_once` blocks or clusters, one to a multiprocessor or its blocks' multiprocessors.
inline double cost_of(const Kind& kind, const Cost& cost, int64_t count, int64_t steps, int parts, int64_t at_once) {
  if (count == 0) return 0;
  const int64_t full = count / (at_once * kind.resident), left = count % (at_once * kind.resident);
  const double last = left == 0 ? 0 : left <= at_once ? cost.step : cost.steps;
  const double around = cost.write + (parts > 1 ? cost.add : 0);
  return cost.launch + tiles(steps, parts) * (full * cost.steps + last) + (full + (left > 0)) * around;
}

// The plan that costs least.
inline Plan choose(bool gradient, int64_t feature_tiles, int64_t tokens, int64_t steps, int processors) {
  Plan best = {};
  double least = 0;
  for (const Kind& kind : kKinds) {
    const Cost& cost = kind.of[gradient];
    const int64_t count = feature_tiles * tiles(tokens, kind.tokens);
    const int64_t left = count % ((int64_t)processors * kind.resident);
    for (int parts = 1; parts <= kMaxParts && parts * kLeastSlice <= kind.tokens && parts <= steps; parts *= 2) {
      const int64_t whole = parts == 1 ? count : count - left, at_once = clusters_at_once(processors, parts);
      if (at_once == 0 || (whole == count && parts > 1)) break;
      const double total = cost_of(kind, cost, whole, steps, 1, processors) +
                           cost_of(kind, cost, count - whole, steps, parts, at_once);
      if (!best.whole.tokens || total < least) {
        best = {{kind.tokens, 1, 0, whole}, {kind.tokens, parts, whole, count}};
        least = total;
      }
    }
  }
  return best;
}

}  // namespace entrenar::sm90
