// The order in which scans read a map: direction, sense, line, position and chunk. Once, for the CPU and the CUDA
// kernels.
//
// A direction is an axis and a sense. The lines of "down" and "up" are the rows of the map, those of "right" and "left"
// its columns. A position counts tokens along a line. "Down" and "right" read lines in map order (sense 0), "up" and
// "left" in reverse (sense 1). Chunk c of n lines holds lines c n … c n + n - 1 of the map in every direction; the last
// chunk may be shorter. A scan restarts at every chunk: the first line that it reads there has no line before.
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

// The lines of one axis, for scans of both senses. Int: what lines and positions are counted in.
template <typename Int>
struct Lines {
  bool rows;             // whether lines are rows of the map
  Int lines, positions;  // lines of the map, positions of a line
  Int chunk;             // lines of a chunk

  GSPN_INLINE Lines(const Problem& p, bool rows_) : rows(rows_) {
    lines = Int(rows ? p.height : p.width);
    positions = Int(rows ? p.width : p.height);
    chunk = p.chunk && p.chunk < lines ? Int(p.chunk) : lines;
  }

  GSPN_INLINE Int row(Int line, Int position) const { return rows ? line : position; }
  GSPN_INLINE Int column(Int line, Int position) const { return rows ? position : line; }
  GSPN_INLINE Int line_of(Int row, Int column) const { return rows ? row : column; }
  GSPN_INLINE Int position_of(Int row, Int column) const { return rows ? column : row; }

  GSPN_INLINE Int num_chunks() const { return (lines + chunk - 1) / chunk; }
  GSPN_INLINE Int chunk_lines(Int c) const { return chunk < lines - c * chunk ? chunk : lines - c * chunk; }
  // Whether a line is the first that is read of its chunk.
  GSPN_INLINE bool starts_chunk(Int line, bool reversed) const {
    return (reversed ? line + 1 : line) % chunk == 0 || (reversed && line + 1 == lines);
  }
};

// The lines of one direction.
template <typename Int>
struct ScanOrder : Lines<Int> {
  bool reversed;

  GSPN_INLINE ScanOrder(const Problem& p, int direction)
      : Lines<Int>(p, lines_are_rows(direction)), reversed(is_reversed(direction)) {}
  // The n-th line that is read of chunk c.
  GSPN_INLINE Int line(Int c, Int n) const {
    return nth_read(c * this->chunk, this->chunk_lines(c), n, reversed);
  }
};

}  // namespace gspn
