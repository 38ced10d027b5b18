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
    else if (sample_ <= kShort)
      sum_short_rows(values, t.nb, sample_, totals_ + t.b0);
    else
      for (int64_t b = 0; b < t.nb; ++b) totals_[t.b0 + b] = sum(values + b * sample_, sample_);
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

// The way over the tiles. Sums for each column need a row of accumulators: a few blocks of rows of tiles have one each,
// and go down a group of columns at a time. Without them, a block is a tile.
struct Blocks {
  int64_t count, groups, rows;

  Blocks(const Extent& e, const Tiling& tiling, bool by_column)
      : groups(by_column ? tiling.column_groups() : 1), rows(tiling.count() / groups) {
    count = by_column ? max_of(1, min_of(16, min_of(rows, e.batch * e.outer / 8))) : tiling.count();
  }
  int64_t first_row(int64_t block) const { return rows * block / count; }
};

// A thread's accumulators for the columns of the tiles that it goes down.
template <class T>
struct Columns {
  alignas(kLine) T sums[kTile];
  int64_t rows = 0;  // that are in them
};

// A value or gradient that is summed over what it does not keep.
template <class T>
class OutputSum {
 public:
  OutputSum(Output kind, const Operand& out, const Extent& e, const Tiling& tiling, const Blocks& blocks)
      : kind_(kind),
        out_(out),
        e_(e),
        tiling_(tiling),
        blocks_(blocks),
        per_tile_(kind == Output::row      ? tiling.max_rows()
                  : kind == Output::sample ? tiling.max_samples()
                  : kind == Output::total  ? 1
                                           : 0),
        slots_(kind == Output::column ? blocks.count * e.inner : tiling.count() * per_tile_) {
    if (kind == Output::column) slots_.zero(blocks.count * e.inner);  // other slots are written once
  }

  bool wanted() const { return kind_ != Output::none && kind_ != Output::element; }

  // Takes the elements of tile k, of some block; `is_last` says that the block goes no further down these columns.
  void take(int64_t k, const Tile& t, const T* elements, int64_t block, bool is_last, Columns<T>& columns) {
    switch (kind_) {
      case Output::total:
        slots_[k] = sum(elements, t.count());
        break;
      case Output::sample:
        take_rows(k, elements, t.nb, t.no * t.ni);
        break;
      case Output::row:
        take_rows(k, elements, t.nb * t.no, t.ni);
        break;
      case Output::column:
        take_columns(t, elements, block, is_last, columns);
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
    double* const into = slots_.at(k * per_tile_);
    if (length > 0 && length <= kShort)
      sum_short_rows(elements, rows, length, into);
    else
      for (int64_t r = 0; r < rows; ++r) into[r] = sum(elements + r * length, length);
  }

  void take_columns(const Tile& t, const T* elements, int64_t block, bool is_last, Columns<T>& columns) {
    double* const into = slots_.at(block * e_.inner + t.i0);
    const auto add_up = [&] {
      for (int64_t i = 0; i < t.ni; ++i) into[i] += static_cast<double>(columns.sums[i]);
      columns.rows = 0;
    };
    for (int64_t r = 0; r < t.nb * t.no; ++r) {
      const T* const from = elements + r * t.ni;
      if (columns.rows == 0)
        for (int64_t i = 0; i < t.ni; ++i) columns.sums[i] = from[i];
      else
        for (int64_t i = 0; i < t.ni; ++i) columns.sums[i] += from[i];
      if (++columns.rows == kRowsInFloat) add_up();
    }
    if (is_last && columns.rows > 0) add_up();
  }

  void add_up_columns() {
    double* const total = slots_.at(0);
    for (int64_t block = 1; block < blocks_.count; ++block) {
      const double* const more = slots_.at(block * e_.inner);
      for (int64_t i = 0; i < e_.inner; ++i) total[i] += more[i];
    }
    put_array(out_, 0, 1, total, e_.inner);
  }

  void add_up_slots() {
    const int64_t* const step = out_.stride;
    if (kind_ == Output::sample && tiling_.holds_whole_samples() && tiling_.count() > 0) {
      put_array(out_, 0, step[0], slots_.at(0), e_.batch);  // each slot is a sample's
      return;
    }
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
  const Blocks& blocks_;
  const int64_t per_tile_;
  Doubles slots_;
};

}  // namespace FUSEDVAE_NAMESPACE
}  // namespace fusedvae
