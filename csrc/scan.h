// The order in which scans read a map: direction, sense, line, position, chunk and window. Once, for the CPU and the
// CUDA kernels.
//
// A direction is an axis and a sense. The lines of "down" and "up" are the rows of the map, those of "right" and "left"
// its columns. A position counts tokens along a line. "Down" and "right" read lines in map order (sense 0), "up" and
// "left" in reverse (sense 1).
//
// An axis of the map may be cut into spans. A chunk is a span of lines, the same in every direction of an axis: chunk c
// of n lines holds lines c n … c n + n - 1. A scan restarts at every chunk: the first line that it reads there has no
// line before. Windows cut both axes. Their lines are chunks, so a scan restarts there, too; and along a line, a
// position has no neighbour in another window, as it has none beyond the map. Kernels ask for nothing else: restarts()
// of a line, has_minus() and has_plus() of a position.
#pragma once

#include <cstdint>

#include "inline.h"
#include "problem.h"

namespace gspn {

enum Direction : int { kDown = 0, kUp = 1, kRight = 2, kLeft = 3 };

GSPN_INLINE bool lines_are_rows(int direction) { return direction == kDown || direction == kUp; }
GSPN_INLINE bool is_reversed(int direction) { return direction == kUp || direction == kLeft; }
GSPN_INLINE Direction direction_of(bool rows, bool reversed) {
  return rows ? (reversed ? kUp : kDown) : (reversed ? kLeft : kRight);
}

// The n-th that is read of `count` neighbours from `first` on: lines of a chunk, or parts of a map.
template <typename Int>
GSPN_INLINE Int nth_read(Int first, Int count, Int n, bool reversed) {
  return reversed ? first + count - 1 - n : first + n;
}

// An axis of the map, cut into spans of one size; the first and the last may be shorter. An axis no longer than a span
// is one span, wherever borders would be.
template <typename Int>
struct Spans {
  Int length, size;  // tokens of the axis, and of a span
  Int missing;       // tokens that the first span lacks: span n begins at n · size - missing

  // size_: 0 leaves the axis whole. border: where a span begins, 0 … size_ - 1.
  GSPN_INLINE Spans(Int length_, int64_t size_, int64_t border = 0) : length(length_) {
    const bool cut = size_ && size_ < length_;
    size = cut ? Int(size_) : length_;
    missing = cut && border ? Int(size_ - border) : 0;
  }
  GSPN_INLINE bool is_cut() const { return size < length; }
  GSPN_INLINE Int count() const { return (length + missing + size - 1) / size; }
  GSPN_INLINE Int begin(Int n) const { return n ? n * size - missing : 0; }
  GSPN_INLINE Int end(Int n) const {
    const Int next = (n + 1) * size - missing;
    return next < length ? next : length;
  }
  // Whether token i is the first or the last of its span; no division where the axis is whole.
  GSPN_INLINE bool is_first(Int i) const { return i == 0 || (is_cut() && (i + missing) % size == 0); }
  GSPN_INLINE bool is_last(Int i) const { return i + 1 == length || (is_cut() && (i + 1 + missing) % size == 0); }
};

// The lines of one axis, for scans of both senses. Int: what lines and positions are counted in.
template <typename Int>
struct Lines {
  bool rows;             // whether lines are rows of the map
  Int lines, positions;  // lines of the map, positions of a line
  Spans<Int> chunks;     // of the lines: chunks, or windows
  Spans<Int> windows;    // of a line's positions: one, but for windows

  GSPN_INLINE Lines(const Problem& p, bool rows_)
      : rows(rows_), lines(Int(rows_ ? p.height : p.width)), positions(Int(rows_ ? p.width : p.height)),
        chunks(lines, p.window ? p.window : p.chunk, p.shift), windows(positions, p.window, p.shift) {}

  GSPN_INLINE Int row(Int line, Int position) const { return rows ? line : position; }
  GSPN_INLINE Int column(Int line, Int position) const { return rows ? position : line; }
  GSPN_INLINE Int line_of(Int row, Int column) const { return rows ? row : column; }
  GSPN_INLINE Int position_of(Int row, Int column) const { return rows ? column : row; }

  // Whether a scan begins anew at a line: it is the first that is read of its chunk.
  GSPN_INLINE bool restarts(Int line, bool reversed) const {
    return reversed ? chunks.is_last(line) : chunks.is_first(line);
  }
  // Whether a position has a neighbour before it, or behind it, on its line and on the one before.
  GSPN_INLINE bool has_minus(Int position) const { return !windows.is_first(position); }
  GSPN_INLINE bool has_plus(Int position) const { return !windows.is_last(position); }
};

// The lines of one direction.
template <typename Int>
struct ScanOrder : Lines<Int> {
  bool reversed;

  GSPN_INLINE ScanOrder(const Problem& p, int direction)
      : Lines<Int>(p, lines_are_rows(direction)), reversed(is_reversed(direction)) {}
  GSPN_INLINE Int chunk_lines(Int c) const { return this->chunks.end(c) - this->chunks.begin(c); }
  // The n-th line that is read of chunk c.
  GSPN_INLINE Int line(Int c, Int n) const { return nth_read(this->chunks.begin(c), chunk_lines(c), n, reversed); }
};

}  // namespace gspn
