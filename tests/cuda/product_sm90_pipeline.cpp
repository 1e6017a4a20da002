// The warps of product_sm90.cu, simulated: in whatever order they run, none waits for ever, and each reads a stage
// while it holds what that warp is to read.
#include "../../csrc/cuda/product_sm90_pipeline.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <set>
#include <vector>

using namespace entrenar::sm90;

namespace {

constexpr int kWarps = kThreads / 32, kFirstConsumerWarp = kFirstConsumer / 32, kFirstScalerWarp = kFirstScaler / 32;
constexpr int kScalerWarps = kScalers / 32, kSums = -1;
enum Action { kShrink, kGrow, kWaitFull, kWaitEmpty, kLoad, kPublish, kRead, kRelease, kMeet, kAdd, kCluster };

// What a step brings to a stage, by number of tile and step; codes and scales are left out of the last term.
struct Entry {
  Action action;
  Place place = {};
  int content = 0;
  bool last = false;
};
using Script = std::vector<Entry>;

struct Case {
  Work work;
  int steps, low_columns, blocks;

  // What a block's loops go through, as in the kernel.
  template <class Each>
  void each_tile(int block, Each each) const {
    for (int64_t tile = work.first + block / work.parts; tile < work.end; tile += blocks / work.parts) each((int)tile);
  }
  Range range(int block) const { return range_of(steps, low_columns, block % work.parts, work.parts); }
  int content(int tile, int step) const { return tile * (steps + steps_of_low(low_columns)) + step; }
};

template <int kTokens>
Script tensors(const Case& c, int block) {
  Script script;
  Place place = {};
  const Range range = c.range(block);
  const auto load = [&](int content, bool last) {
    script.push_back({kWaitEmpty, {place.stage, place.parity ^ 1}});
    script.push_back({kLoad, place, content, last});
    place = after<Layout<kTokens>::kStages>(place);
  };
  c.each_tile(block, [&](int tile) {
    for (int step = range.begin; step < range.end; step++) load(c.content(tile, step), false);
    for (int i = 0; i < range.low_steps; i++) load(c.content(tile, c.steps + i), true);
  });
  return script;
}

template <int kTokens>
Script scales(const Case& c, int block) {
  constexpr int kGroupSteps = Layout<kTokens>::kGroupSteps;
  Script script;
  Place place = {};
  const Range range = c.range(block);
  const auto publish = [&](int content, bool last) {
    script.push_back({kWaitEmpty, {place.stage, place.parity ^ 1}});
    script.push_back({kPublish, place, content, last});
    place = after<Layout<kTokens>::kStages>(place);
  };
  c.each_tile(block, [&](int tile) {
    for (int first = range.begin; first < range.end; first += kGroupSteps) {
      for (int i = 0; i < kGroupSteps; i++) {
        if (first + i >= range.end) break;
        publish(c.content(tile, first + i), false);
      }
    }
    for (int i = 0; i < range.low_steps; i++) publish(c.content(tile, c.steps + i), true);
  });
  return script;
}

// The tensor cores read a step's second half until the next step's first is under way.
template <int kTokens>
Script consumer(const Case& c, int block) {
  Script script;
  Place place = {};
  const Range range = c.range(block);
  Entry used = {};
  const auto release = [&] {
    script.push_back(used);
    used.action = kRelease;
    script.push_back(used);
  };
  const auto wait = [&](int content, bool last) {
    script.push_back({kWaitFull, place});
    script.push_back({kRead, place, content, last});
  };
  c.each_tile(block, [&](int tile) {
    wait(c.content(tile, range.begin), false);
    for (int step = range.begin; step < range.end; step++) {
      if (step > range.begin) release();
      used = {kRead, place, c.content(tile, step)};
      place = after<Layout<kTokens>::kStages>(place);
      if (step + 1 < range.end) wait(c.content(tile, step + 1), false);
    }
    for (int i = 0; i < range.low_steps; i++) {
      release();
      wait(c.content(tile, c.steps + i), true);
      used = {kRead, place, c.content(tile, c.steps + i), true};
      place = after<Layout<kTokens>::kStages>(place);
    }
    release();
    if (c.work.parts > 1) {
      for (Action action : {kMeet, kAdd, kCluster, kRead, kCluster}) script.push_back({action, {}, kSums});
    }
  });
  return script;
}

struct Barrier {
  int arrivals, pending, copies = 0, phase = 0;

  explicit Barrier(int arrivals) : arrivals(arrivals), pending(arrivals) {}
  bool passed(int parity) const { return (phase & 1) != parity; }
  void end_phase() {
    if (pending || copies) return;
    pending = arrivals;
    phase++;
  }
};

// What some warps meet at.
struct Meeting {
  int arrivals, pending, meetings = 0;

  explicit Meeting(int arrivals) : arrivals(arrivals), pending(arrivals) {}
  void arrive() {
    if (--pending) return;
    pending = arrivals;
    meetings++;
  }
};

struct Stage {
  Barrier full = Barrier(kFullArrivals), empty = Barrier(kEmptyArrivals);
  int in = kSums - 1, codes = kSums - 1, scales[kScalerWarps] = {};
};

struct Copy {
  Place place;
  int content;
  bool last;
};

struct Warp {
  Script script;
  size_t at = 0;
  int met = -1;  // the meeting that it waits for
};

struct Block {
  std::vector<Stage> stages;
  std::vector<Copy> copies;  // under way
  Meeting consumers = Meeting(kConsumers * kWarpgroup / 32);
  int registers;  // free ones, in those of a warp's thread
  Warp warps[kWarps];
};

[[noreturn]] void fail(const Case& c, const char* what, int block, int warp) {
  std::printf("%s: tile of %d, %d parts, %d steps, %d low columns, %d tiles, %d blocks: block %d, warp %d\n", what,
              c.work.tokens, c.work.parts, c.steps, c.low_columns, (int)(c.work.end - c.work.first), c.blocks, block, warp);
  std::exit(1);
}

template <int kTokens>
struct Cluster {
  using L = Layout<kTokens>;
  const Case& c;
  int first;
  std::vector<Block> blocks;
  Meeting meeting;

  Cluster(const Case& c, int first) : c(c), first(first), blocks(c.work.parts), meeting(c.work.parts * kWarps) {
    for (int i = 0; i < c.work.parts; i++) {
      Block& block = blocks[i];
      block.stages.resize(L::kStages);
      block.registers = 0;
      for (int w = 0; w < kWarps; w++) {
        Script& script = block.warps[w].script;
        if (w >= kFirstConsumerWarp) {
          script = consumer<kTokens>(c, first + i);
        } else {
          if (w == 0) script = tensors<kTokens>(c, first + i);
          if (w >= kFirstScalerWarp) script = scales<kTokens>(c, first + i);
          if (c.work.parts > 1) script.insert(script.end(), 2, {kCluster});
        }
        script.insert(script.begin(), {w >= kFirstConsumerWarp ? kGrow : kShrink});
      }
    }
  }

  bool meet(Meeting& meeting, Warp& warp) {
    if (warp.met < 0) {
      warp.met = meeting.meetings;
      meeting.arrive();
    }
    if (meeting.meetings == warp.met) return false;
    warp.met = -1;
    return true;
  }

  // Whether the warp could do what is next.
  bool advance(int b, int w) {
    Block& block = blocks[b];
    Warp& warp = block.warps[w];
    if (warp.at == warp.script.size()) return false;
    const Entry& e = warp.script[warp.at];
    Stage& stage = block.stages[e.place.stage];
    switch (e.action) {
      case kShrink: block.registers += L::kLaunchRegisters - L::kProducerRegisters; break;
      case kGrow:
        if (block.registers < L::kConsumerRegisters - L::kLaunchRegisters) return false;
        block.registers -= L::kConsumerRegisters - L::kLaunchRegisters;
        break;
      case kWaitFull:
        if (!stage.full.passed(e.place.parity)) return false;
        break;
      case kWaitEmpty:
        if (!stage.empty.passed(e.place.parity)) return false;
        break;
      case kLoad:
        stage.full.copies++;
        stage.full.pending--;
        block.copies.push_back({e.place, e.content, e.last});
        break;
      case kPublish:
        stage.scales[w - kFirstScalerWarp] = e.content;
        stage.full.pending--;
        stage.full.end_phase();
        break;
      case kRead:
        if (e.content == kSums) {
          for (const Block& other : blocks) {
            for (const Stage& s : other.stages) {
              if (s.in != kSums || s.codes != kSums) fail(c, "Sums are gone", first + b, w);
            }
          }
        } else {
          if (stage.in != e.content || (!e.last && stage.codes != e.content)) fail(c, "Tensors", first + b, w);
          for (int scales : stage.scales) {
            if (scales != e.content) fail(c, "Scales", first + b, w);
          }
        }
        break;
      case kRelease:
        stage.empty.pending--;
        stage.empty.end_phase();
        break;
      case kMeet:
        if (!meet(block.consumers, warp)) return false;
        break;
      case kAdd:
        if (!block.copies.empty()) fail(c, "A copy overwrites sums", first + b, w);
        for (Stage& s : block.stages) s.in = s.codes = kSums;
        break;
      case kCluster:
        if (!meet(meeting, warp)) return false;
        break;
    }
    warp.at++;
    return true;
  }

  bool finish_copy(int b, unsigned random) {
    Block& block = blocks[b];
    if (block.copies.empty()) return false;
    const size_t chosen = random % block.copies.size();
    const Copy copy = block.copies[chosen];
    block.copies.erase(block.copies.begin() + chosen);
    Stage& stage = block.stages[copy.place.stage];
    stage.in = copy.content;
    if (!copy.last) stage.codes = copy.content;
    stage.full.copies--;
    stage.full.end_phase();
    return true;
  }

  // Each turn one of the actors, the warps and the copies, goes as far as it can, or one step.
  void run(unsigned seed) {
    const int actors = c.work.parts * (kWarps + 1);
    std::vector<int> order(actors);
    for (int i = 0; i < actors; i++) order[i] = seed % 2 ? i : actors - 1 - i;
    unsigned random = seed;
    while (true) {
      bool moved = false;
      for (int i = actors - 1; seed > 1 && i > 0; i--) {
        random = random * 1664525 + 1013904223;
        std::swap(order[i], order[(random >> 8) % (i + 1)]);
      }
      for (int actor : order) {
        const int b = actor / (kWarps + 1), w = actor % (kWarps + 1);
        random = random * 1664525 + 1013904223;
        const auto go = [&] { return w < kWarps ? advance(b, w) : finish_copy(b, random >> 8); };
        const bool far = seed < 2 || (random >> 16 & 1);
        while (go()) {
          moved = true;
          if (!far) break;
        }
      }
      if (!moved) break;
    }
    for (int b = 0; b < c.work.parts; b++) {
      for (int w = 0; w < kWarps; w++) {
        if (blocks[b].warps[w].at < blocks[b].warps[w].script.size()) fail(c, "Waits for ever", first + b, w);
      }
    }
  }
};

template <int kTokens>
void test(int tiles_of_block) {
  for (int parts = 1; parts <= kMaxParts && parts * kLeastSlice <= kTokens; parts *= 2) {
    for (int steps = parts; steps <= 40; steps++) {
      for (int low_columns : {0, 16, 136}) {
        const Work work = {kTokens, parts, 5, 5 + 2 * tiles_of_block};
        const Case c = {work, steps, low_columns, (int)blocks_of(work, 2)};
        std::multiset<int> done;
        for (int first = 0; first < c.blocks; first += parts) {
          c.each_tile(first, [&](int tile) { done.insert(tile); });
          if (first / parts > 1) continue;  // the others are like these
          for (unsigned seed = 0; seed < 4; seed++) Cluster<kTokens>(c, first).run(seed);
        }
        if ((int64_t)done.size() != work.end - work.first || *done.begin() != work.first ||
            *done.rbegin() != work.end - 1) {
          fail(c, "Tiles are not done once each", 0, 0);
        }
      }
    }
  }
}

void test_plans() {
  for (int processors : {1, 78, 132}) {
    for (int64_t features : {64, 192, 576, 4096, 11008}) {
      for (int64_t contraction : {64, 192, 576, 4096, 11008}) {
        for (int64_t tokens : {1, 37, 128, 512, 1000, 2048, 4096, 100000}) {
          const Plan plan = choose(tokens % 2, tiles(features, kFeatures), tokens, contraction / kStep, processors);
          const Work &a = plan.whole, &b = plan.shared;
          const int64_t count = tiles(features, kFeatures) * tiles(tokens, a.tokens);
          const bool right = a.tokens == b.tokens && a.parts == 1 && a.first == 0 && a.end == b.first &&
                             b.end == count && b.parts <= kMaxParts && b.parts * kLeastSlice <= b.tokens &&
                             b.parts <= contraction / kStep && (b.parts > 1 || b.first == b.end);
          if (right) continue;
          std::printf("A plan is wrong: %d features, %d tokens, %d contracted\n", (int)features, (int)tokens,
                      (int)contraction);
          std::exit(1);
        }
      }
    }
  }
}

template <int... kTokens>
void test_all() {
  for (int tiles_of_block : {1, 3}) (test<kTokens>(tiles_of_block), ...);
}

}  // namespace

int main() {
  test_plans();
  test_all<64, 128, 256>();
}
