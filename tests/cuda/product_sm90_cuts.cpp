// Prints, for a number of multiprocessors, a small product for each way that product_sm90 cuts one up: whether it is a
// gradient, the tokens of a tile, the parts of the contraction, whether whole tiles come before those; features, tokens
// and contraction.
#include <cstdio>
#include <cstdlib>
#include <map>
#include <tuple>

#include "../../csrc/cuda/product_sm90_pipeline.h"

using namespace entrenar::sm90;

int main(int, char** arguments) {
  const int processors = std::atoi(arguments[1]);
  // From 33 tokens on, and in the gradient from 9 up to 4095, the ops leave products to it: csrc/cuda/product.cpp.
  constexpr int64_t kFewest = 37, kMost = 2047;  // more are not needed
  struct Product {
    int64_t features, tokens, contraction, numbers;
  };
  std::map<std::tuple<bool, int, int, bool>, Product> smallest;
  for (int64_t contraction = kStep; contraction <= 16384; contraction *= 2) {
    for (int64_t features = kStep; features <= 16384; features += kStep) {
      for (int64_t tokens = kFewest; tokens <= kMost; tokens += 21) {  // not of a tile's size
        for (const bool gradient : {false, true}) {
          const Plan plan = choose(gradient, tiles(features, kFeatures), tokens, contraction / kStep, processors);
          const bool is_cut = plan.shared.first < plan.shared.end, has_whole = plan.whole.first < plan.whole.end;
          const int64_t numbers = features * contraction + features * tokens + tokens * contraction;
          Product& found = smallest[{gradient, plan.whole.tokens, is_cut ? plan.shared.parts : 1, has_whole}];
          if (!found.numbers || numbers < found.numbers) found = {features, tokens, contraction, numbers};
        }
      }
    }
  }
  for (const auto& [cut, product] : smallest) {
    const auto [gradient, of_tile, parts, has_whole] = cut;
    std::printf("%d %d %d %d %ld %ld %ld\n", gradient, of_tile, parts, has_whole, (long)product.features,
                (long)product.tokens, (long)product.contraction);
  }
}
