// Sums that are the same for every thread count: each tile leaves its part in a slot of its own, and slots are added up
// in order, in double, when all tiles are done.
#pragma once

#include <cstdint>

#include "broadcast.h"
#include "cpu/memory.h"
#include "cpu/packs.h"
#include "cpu/tile.h"

namespace fusedvae {
namespace FUSEDVAE_NAMESPACE {

// A term's values, summed: over everything, or for each sample. Without `totals`, nothing is.
template <class T>
class ValueSums {
 public:
  ValueSums(double* totals, bool by_sample, const Extent& e, const Tiling& tiling)
      : totals_(totals),
        tiling_(tiling),
        batch_(by_sample ? e.batch : 1),
        sample_(e.sample()),
        by_sample_(by_sample),
        // Whole samples in a tile leave their sums where they belong.
        slots_(totals && !(by_sample && tiling.holds_whole_samples()) ? tiling.count() : 0) {}

  bool wanted() const { return totals_; }
  // Whether a tile's elements go into several sums, for which their values are needed.
  bool needs_values(const Tile& t) const { return totals_ && by_sample_ && t.nb > 1; }

  // Takes the sum of tile k, or the values that it needs.
  void take(int64_t k, const Tile& t, double total, const T* values) {
    if (!totals_) return;
    if (!by_sample_ || !tiling_.holds_whole_samples())
      slots_[k] = total;
    else if (t.nb == 1)
      totals_[t.b0] = total;
    else
      sum_rows(values, t.nb, sample_, totals_ + t.b0);
  }

  void add_up() {
    if (!totals_ || (by_sample_ && tiling_.holds_whole_samples() && tiling_.count() > 0)) return;
    for (int64_t b = 0; b < batch_; ++b) totals_[b] = 0;
    for (int64_t k = 0; k < tiling_.count(); ++k) totals_[by_sample_ ? tiling_[k].b0 : 0] += slots_[k];
  }

 private:
  double* const totals_;
  const Tiling& tiling_;
  const int64_t batch_, sample_;
  const bool by_sample_;
  Doubles slots_;
};

// Rows whose elements for each column are added up in float, before they are in double.
constexpr int64_t kRowsInFloat = 64;

// A tile on the way over them: in which block of rows it is, in which of the rows of tiles there, and whether the last.
struct Turn {
  int64_t tile, block, row;
  bool is_last;
};

// The way over the tiles, in units of work: each is a tile, but where columns have sums. There it is a block of rows of
// a band of columns, as wide as its sums stay in the L2 cache: memory is read ahead along the rows, not down columns.
struct Units {
  static constexpr int64_t kWidestBand = 32 * kTile, kMostBlocks = 16, kFewestRows = 16;
  int64_t groups, rows;  // of tiles
  int64_t bands, blocks;

  Units(const Extent& e, const Tiling& tiling, bool by_column)
      : groups(by_column ? tiling.column_groups() : 1),
        rows(tiling.count() / groups),
        bands(ceil_div(groups, max_of(1, kWidestBand / tiling.columns()))),
        blocks(rows) {
    if (!by_column) return;
    const int64_t most = min_of(ceil_div(kMostBlocks, bands), e.batch * e.outer / kFewestRows);
    blocks = max_of(1, min_of(most, rows));
  }
  int64_t count() const { return blocks * bands; }

  // Calls visit(turn) for the tiles of a unit.
  template <class Visit>
  void visit_tiles(int64_t unit, const Visit& visit) const {
    const int64_t block = unit / bands, band = unit % bands;
    const int64_t first = rows * block / blocks, last = rows * (block + 1) / blocks;
    for (int64_t row = first; row < last; ++row)
      for (int64_t group = groups * band / bands; group < groups * (band + 1) / bands; ++group)
        visit(Turn{row * groups + group, block, row - first, row + 1 == last});
  }
};

// A value or gradient that is summed over what it does not keep.
template <class T>
class OutputSum {
 public:
  OutputSum(Output kind, const Operand& out, const Extent& e, const Tiling& tiling, const Units& units)
      : kind_(kind),
        out_(out),
        e_(e),
        tiling_(tiling),
        units_(units),
        per_tile_(kind == Output::row      ? tiling.max_rows()
                  : kind == Output::sample ? tiling.max_samples()
                  : kind == Output::total  ? 1
                                           : 0),
        tiles_in_float_(max_of(1, kRowsInFloat / max_of(1, tiling.max_rows()))),
        is_whole_(kind == Output::sample && tiling.holds_whole_samples()),
        floats_(kind == Output::column ? units.blocks * e.inner : 0),
        slots_(kind == Output::column ? units.blocks * e.inner
               : is_whole_            ? 0
                                      : tiling.count() * per_tile_) {
    if (kind == Output::column && tiling.count() == 0) slots_.zero(e.inner);  // else a block's first rows are put there
  }

  bool wanted() const { return kind_ != Output::none && kind_ != Output::element; }

  // Where a tile that is one row may leave its elements for `take`, in the sums of its columns: added to what is there,
  // or put there if the tile is the first.
  T* sums_of_columns(const Turn& turn, const Tile& t, bool* are_added) {
    *are_added = turn.row % tiles_in_float_ != 0;
    return floats_.at(turn.block * e_.inner + t.i0);
  }

  // Takes the elements of a tile.
  void take(const Turn& turn, const Tile& t, const T* elements) {
    switch (kind_) {
      case Output::total:
        slots_[turn.tile] = sum(elements, t.count());
        break;
      case Output::sample:
        if (is_whole_)
          put_samples(t, elements);
        else
          take_rows(turn.tile, elements, t.nb, t.no * t.ni);
        break;
      case Output::row:
        take_rows(turn.tile, elements, t.nb * t.no, t.ni);
        break;
      case Output::column:
        take_columns(turn, t, elements);
        break;
      default:
        break;
    }
  }

  void add_up() {
    if (kind_ == Output::column)
      add_up_columns();
    else if (wanted())
      add_up_slots();
  }

 private:
  void take_rows(int64_t k, const T* elements, int64_t rows, int64_t length) {
    sum_rows(elements, rows, length, slots_.at(k * per_tile_));
  }

  // Sums of whole samples go where they belong.
  void put_samples(const Tile& t, const T* elements) {
    T sums[kTile];
    sum_rows(elements, t.nb, t.no * t.ni, sums);
    put_array(out_, t.b0, out_.stride[0], sums, t.nb);
  }

  void take_columns(const Turn& turn, const Tile& t, const T* elements) {
    const int64_t rows = t.nb * t.no, from = turn.block * e_.inner + t.i0;
    T* const sums = floats_.at(from);
    double* const totals = slots_.at(from);
    int64_t held = turn.row % tiles_in_float_ * tiling_.max_rows();  // rows in `sums`, if not fewer
    bool has_totals = turn.row >= tiles_in_float_;
    const bool is_last = turn.is_last || (turn.row + 1) % tiles_in_float_ == 0;
    const bool are_there = elements == sums;  // see sums_of_columns
    for (int64_t r = 0; r < rows; ++r, elements += t.ni) {
      for (int64_t i = 0; i < t.ni && !are_there; ++i) sums[i] = held == 0 ? elements[i] : sums[i] + elements[i];
      if (++held < kRowsInFloat && !(is_last && r + 1 == rows)) continue;
      for (int64_t i = 0; i < t.ni; ++i) totals[i] = (has_totals ? totals[i] : 0) + static_cast<double>(sums[i]);
      has_totals = true;
      held = 0;
    }
  }

  void add_up_columns() {
    double* const total = slots_.at(0);
    for (int64_t block = 1; block < units_.blocks; ++block) {
      const double* const more = slots_.at(block * e_.inner);
      for (int64_t i = 0; i < e_.inner; ++i) total[i] += more[i];
    }
    put_array(out_, 0, 1, total, e_.inner);
  }

  void add_up_slots() {
    const int64_t* const step = out_.stride;
    if (is_whole_ && tiling_.count() > 0) return;
    const int64_t count = max_of(0, (e_.batch - 1) * step[0] + (e_.outer - 1) * step[1] + 1);
    Doubles sums(count);
    sums.zero(count);
    for (int64_t k = 0; k < tiling_.count(); ++k) {
      const Tile t = tiling_[k];
      const int64_t rows = kind_ == Output::row ? t.no : 1, samples = kind_ == Output::total ? 1 : t.nb;
      for (int64_t b = 0; b < samples; ++b)
        for (int64_t o = 0; o < rows; ++o)
          sums[(t.b0 + b) * step[0] + (t.o0 + o) * step[1]] += slots_[k * per_tile_ + b * rows + o];
    }
    for (int64_t b = 0; b < (step[0] ? e_.batch : 1); ++b)
      for (int64_t o = 0; o < (step[1] ? e_.outer : 1); ++o) {
        const int64_t at = b * step[0] + o * step[1];
        put(out_, at, sums[at]);
      }
  }

  const Output kind_;
  const Operand& out_;
  const Extent& e_;
  const Tiling& tiling_;
  const Units& units_;
  const int64_t per_tile_, tiles_in_float_;
  const bool is_whole_;  // each sum is of one tile
  Scratch<T> floats_;
  Doubles slots_;
};

}  // namespace FUSEDVAE_NAMESPACE
}  // namespace fusedvae
