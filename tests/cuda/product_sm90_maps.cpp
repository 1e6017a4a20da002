// The index maps of product_sm90, and its decode, against the byte format and wgmma's and TMA's layouts.
#include "../../csrc/cuda/product_sm90_maps.h"

#include <cstdio>
#include <cstdlib>
#include <set>
#include <utility>
#include <vector>

using namespace entrenar;
using namespace entrenar::sm90;

namespace {

void check(bool right, const char* what, int a, int b, int c) {
  if (right) return;
  std::printf("%s is wrong at %d, %d, %d\n", what, a, b, c);
  std::exit(1);
}

// What TMA does to an address whose tile is aligned: the chunk's lowest bits are xored with those of its 128 bytes.
int swizzle(int address, int bits) { return address ^ (address >> 7 & ((1 << bits) - 1)) << 4; }

uint16_t decoded(int nibble, uint16_t scale) {
  return int4::float_to_bfloat16((nibble - int4::kZeroNibble) * int4::half_to_float(scale));
}

void test_decode() {
  for (int scale = 0; scale < 65536; scale++) {
    if ((scale >> 10 & 31) == 31) continue;
    const uint32_t split = split_scale(scale), high = split & 0xffff, low = split >> 16;
    for (int nibble = 0; nibble < 16; nibble++) {
      const float product = (nibble - int4::kZeroNibble) * int4::bfloat16_to_float(low);
      check(int4::bfloat16_to_float(int4::float_to_bfloat16(product)) == product, "the low product", scale, nibble, 0);
      const uint32_t pair = decode_pair(0xfff0fff0 | nibble | (15 - nibble) << 16, high * 0x10001, low * 0x10001);
      check((pair & 0xffff) == decoded(nibble, scale), "the first of a pair", scale, nibble, 0);
      check(pair >> 16 == decoded(15 - nibble, scale), "the second of a pair", scale, nibble, 0);
    }
  }
}

template <bool gradient>
void test_fragments(int block) {
  constexpr int kRows = gradient ? kStep : kFeatures, kColumns = gradient ? kFeatures : kStep;
  std::vector<uint8_t> bytes(kCodesBytes);
  std::vector<uint16_t> scales(kRows * kColumns / block);
  for (uint8_t& byte : bytes) byte = std::rand();
  for (uint16_t& scale : scales) scale = 0x2000 + std::rand() % 0x1800;
  const auto value = [&](int row, int column) {
    const int byte = bytes[row * kColumns / 2 + column / 32 * 16 + column % 16];
    return decoded(column % 32 < 16 ? byte & 15 : byte >> 4, scales[row * (kColumns / block) + column / block]);
  };

  alignas(16) char codes[kCodesBytes], written[kScalesBytes] = {};
  for (int i = 0; i < kCodesBytes; i++) codes[swizzle(i, gradient ? 2 : 1)] = bytes[i];
  for (int thread = 0; thread < 128; thread++) {
    const int row = thread % kRows, column = thread / kRows * kWarpgroupFeatures;
    const uint16_t* const at = &scales[row * (kColumns / block) + column / block];
    write_scales<gradient>(written, thread, at[0] | (uint32_t)at[block == 32] << 16);
  }

  std::set<std::pair<int, int>> seen;
  for (int thread = 0; thread < 256; thread++) {
    const int warp = thread % 128 / 32, lane = thread % 32;
    for (int group = 0; group < 2; group++) {
      Fragments a;
      Encoded<gradient> encoded;
      read(encoded, codes, written, thread, group);
      decode(a, encoded, thread);
      for (int i = 0; i < 16; i++) {
        const int element = i % 2, half = i / 2 % 2, eight = i / 4 % 2, multiplication = i / 8;
        const int feature = thread / 128 * 64 + feature_of(gradient, warp, lane, half);
        const int k = 32 * group + 16 * multiplication + 8 * eight + 2 * (lane % 4) + element;
        const uint16_t got = a[multiplication][2 * eight + half] >> 16 * element;
        check(got == (gradient ? value(k, feature) : value(feature, k)), "a fragment", thread, group, i);
        seen.insert({feature, k});
      }
    }
  }
  check(seen.size() == kFeatures * kStep, "the cover of a stage", gradient, block, (int)seen.size());
}

template <bool gradient>
void test_stores() {
  constexpr int kTokens = 256;
  const auto value = [](int token, int feature) { return (uint16_t)(token * kWarpgroupFeatures + feature); };
  std::vector<uint16_t> out(kTokens * kWarpgroupFeatures);
  for (int warp = 0; warp < 4; warp++) {
    for (int lane = 0; lane < 32; lane++) {
      for (int i = 0; i < kTokens / 8; i++) {
        if (gradient) {
          for (int token = 0; token < 2; token++) {
            for (int half = 0; half < 2; half++) {
              const int to = gradient_stored(warp, lane, token) + kNextTokens * i;
              out[to / 2 + half] = value(8 * i + 2 * (lane % 4) + token, feature_of(true, warp, lane, half));
            }
          }
        } else if (i % 2 == 0) {  // the lane's row of a matrix: a feature of each lane that has such a token
          const int to = forward_stored(warp, lane) + kNextTokens * i, token = 8 * (i + lane / 16) + lane % 8;
          for (int k = 0; k < 8; k++) out[to / 2 + k] = value(token, feature_of(false, warp, 4 * k, lane / 8 % 2));
        }
      }
    }
  }
  for (int token = 0; token < kTokens; token++) {
    for (int feature = 0; feature < kWarpgroupFeatures; feature++) {
      const int at = swizzle(token * 128 + feature * 2, 3);
      check(out[at / 2] == value(token, feature), "a stored value", gradient, token, feature);
    }
  }
}

void test_order() {
  for (int features = 1; features < 20; features++) {
    for (int tokens = 1; tokens < 20; tokens++) {
      std::set<std::pair<int, int>> seen;
      for (int i = 0; i < features * tokens; i++) {
        const Tile tile = tile_at(i, features, tokens);
        check(tile.features < features && tile.tokens < tokens, "a tile", features, tokens, i);
        seen.insert({tile.features, tile.tokens});
      }
      check((int)seen.size() == features * tokens, "the cover of the tiles", features, tokens, (int)seen.size());
    }
  }
}

}  // namespace

int main() {
  test_decode();
  for (const int block : {64, 32}) {
    test_fragments<false>(block);
    test_fragments<true>(block);
  }
  test_stores<false>();
  test_stores<true>();
  test_order();
}
