// How the contractions of a product's terms are cut into tiles.
#pragma once

#include "kernels.h"

namespace {

using namespace entrenar;

// The depth of equal parts of a contraction of at most `most`, a multiple of `multiple`: a last thin part would cost as
// much as a whole one.
inline int64_t part_depth(int64_t contraction, int64_t most, int64_t multiple) {
  const int64_t parts = (contraction + most - 1) / most, depth = (contraction + parts - 1) / parts;
  return (depth + multiple - 1) / multiple * multiple;
}

// The sizes of a level's tiles.
struct TileSizes {
  int64_t depth, multiple;  // of one weight, in elements: at most, and what it is a multiple of
  int64_t quantum;          // elements, a whole number of which a tile has room for
  int64_t unit;             // elements
  int64_t units;            // of all weights
};

// A part of a term's contraction, in the tile from unit `unit` on.
struct Piece {
  int term;
  int64_t begin, depth, unit, units;
};

// Goes through the contractions of all terms, as many parts at a time as fit a tile.
struct Cursor {
  const Product& p;
  const TileSizes sizes;
  int term = 0;
  int64_t begin = 0;
  int count = 0;
  Piece pieces[kMaxTerms] = {};

  bool done() const { return term == p.terms; }

  void next() {
    int64_t units = 0;
    for (count = 0; !done() && count < kMaxTerms;) {
      const Weight& w = p.w[term];
      const int64_t contraction = p.transposed ? w.columns : w.rows;
      const int64_t step = part_depth(contraction, sizes.depth, sizes.multiple);
      const int64_t depth = contraction - begin < step ? contraction - begin : step;
      const int64_t more = (depth + sizes.quantum - 1) / sizes.quantum * (sizes.quantum / sizes.unit);
      if (units + more > sizes.units) return;
      pieces[count++] = {term, begin, depth, units, more};
      units += more, begin += depth;
      if (begin == contraction) term++, begin = 0;
    }
  }
};

}  // namespace
