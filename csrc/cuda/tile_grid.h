// How tiles lie on a map that is larger than a block holds.
#pragma once

#include "scan.h"

namespace gspn {

// Tiles of up to `side` rows and columns: from the map's first token on; or, where windows of at most `side` tokens cut
// an axis that is longer, so that each has whole windows.
struct TileGrid {
  Spans<int> rows, columns;  // each tile has a span of either
  int down, across;          // how many there are of them
  bool linked;               // whether tiles have scans in common, and need each other's edges

  GSPN_INLINE TileGrid(const Problem& p, int side)
      : rows(axis(p, p.height, side)), columns(axis(p, p.width, side)), down(rows.count()), across(columns.count()),
        linked(!has_windows(p, side) && down * across > 1) {}
  GSPN_INLINE int count() const { return down * across; }

 private:
  static GSPN_INLINE bool has_windows(const Problem& p, int side) { return p.window > 0 && p.window <= side; }
  static GSPN_INLINE Spans<int> axis(const Problem& p, int64_t length, int side) {
    if (!has_windows(p, side) || length <= side) return Spans<int>(int(length), side);
    const int whole = side / int(p.window) * int(p.window);
    // the first tile lacks what the first window lacks
    return Spans<int>(int(length), whole, p.shift ? whole - (p.window - p.shift) : 0);
  }
};

}  // namespace gspn
