// Weight gradients: dW[M, N] = sum over the rows r of a[r, :M]^T b[r, :N], and the bias gradients sum_r a[r, :M].
#pragma once

#include <functional>
#include <vector>

#include "recurrence.h"

namespace fusedrnn::FUSEDRNN_ISA {

// One thread's part of the gradients that share an a, summed up over any number of calls.
template <class S>
class OuterProduct {
  using A = Acc<S>;
  using Unit = MatrixUnit<S>;
  static constexpr int w = lanes<S>, width = max_vectors * w, step = k_step<S>, k_block = Unit::k_block;
  static constexpr const TileRow<S>& kernels =
      Unit::exists ? Unit::tiling(row_block).of[max_vectors - 1] : tiles<S, true>[max_vectors - 1];
  static constexpr int tile_m =
      Unit::exists ? Unit::tiling(row_block).most_rows[max_vectors - 1] : max_rows(max_vectors);
  static constexpr int64_t block_m = 8 * tile_m;
  static_assert(block_m % w == 0);
  static constexpr int group = 8;  // panels whose b stays in the second-level cache
  static constexpr int64_t most_k = 256;

 public:
  // Where a product's gradients go (or null), and where its b is.
  struct Target {
    S* dw;  // [M, N]
    S* db;  // [M]
    int64_t N;
    std::function<void(int64_t r, int64_t count, const S** to)> rows;  // to[i] <- row r + i of b

    int64_t panels() const { return dw ? divide_up(N, width) : 0; }
    // Whether dw itself holds the sums.
    bool in_place() const { return std::is_same_v<S, A> && N % width == 0; }
  };

  // What all products of a thread can share.
  struct Scratch {
    int64_t block_k = 0;       // rows that are multiplied at once
    S* b = nullptr;            // [panels of a group][block_k / step][width][step]
    S* a = nullptr;            // [block_k / step][block_m][step]; for a matrix unit [block_m][block_k]
    const S** rows = nullptr;  // [block_k]

    // For calls with up to `most_rows`, and products of up to N columns.
    void layout(Arena& arena, int64_t most_rows, int64_t N) {
      const int64_t columns = width * std::min<int64_t>(group, N / width + 2);  // two targets: two narrower panels
      block_k = std::min<int64_t>(round_up(most_rows, k_block), most_k);
      b = arena.take<S>(block_k * columns);
      a = arena.take<S>(block_k * block_m);
      rows = arena.take<const S*>(block_k);
    }
  };

  // The part `m` of the gradients' M rows; row i of them is of column (i - shift) mod M of a.
  OuterProduct(int64_t M, Range m, int64_t shift, std::vector<Target> targets)
      : M_(M), m_(m), shift_(shift), targets_(std::move(targets)) {
    if (m_.size() == 0) targets_.clear();
    for (const Target& target : targets_) panels_ += target.panels(), sums_wanted_ |= target.db != nullptr;
  }

  void layout(Arena& arena) {
    bool in_place = true;
    for (const Target& target : targets_) in_place &= target.in_place();
    c_ = arena.take<A>(in_place ? 0 : m_.size() * panels_ * width);
    sums_ = arena.take<A>(sums_wanted_ ? round_up(m_.size(), w) + w : 0);
    zeros_ = arena.take<A>(width);
  }

  // Adds the rows from `first`, `count` of them; a is the first one's.
  void add(const Scratch& scratch, int64_t first, int64_t count, const S* a, int64_t lda) {
    if (!started_) {
      std::fill(zeros_, zeros_ + width, A{});
      if (sums_wanted_) std::fill(sums_, sums_ + m_.size(), A{});
    }
    for (int64_t k = 0; sums_wanted_ && k < count; k += scratch.block_k)
      add_sums(a + k * lda + m_.begin, lda, std::min(scratch.block_k, count - k));
    const int64_t groups = divide_up(panels_, group);
    for (int64_t i = 0; i < groups; ++i)
      for (int64_t k = 0; k < count; k += scratch.block_k)
        multiply(scratch, first + k, std::min(scratch.block_k, count - k), a + k * lda + m_.begin, lda,
                 part_of(panels_, i, groups), !started_ && k == 0);
    started_ = true;
  }

  // Writes the gradients.
  void write() const {
    for_panels({0, panels_}, [&](const Target& target, int64_t panel, int64_t column) {
      for (int64_t i = 0; !target.in_place() && i < m_.size(); ++i)
        copy_or_zero(target.dw + row_of(i) * target.N + column,
                     static_cast<const A*>(c_ + (panel * m_.size() + i) * width),
                     std::min<int64_t>(width, target.N - column));
    });
    for (int64_t i = 0; sums_wanted_ && i < m_.size(); ++i)
      for (const Target& target : targets_)
        if (target.db) copy_or_zero(target.db + row_of(i), static_cast<const A*>(sums_ + i), 1);
  }

 private:
  // Calls f(target, panel, column) for some of the targets' panels, with the panel's first column.
  template <class F>
  void for_panels(Range some, F f) const {
    int64_t panel = 0;
    for (const Target& target : targets_)
      for (int64_t i = 0; i < target.panels(); ++i, ++panel)
        if (panel >= some.begin && panel < some.end) f(target, panel, i * width);
  }

  // The gradients' row that column i of the part is for.
  int64_t row_of(int64_t i) const { return (m_.begin + i + shift_) % M_; }

  // c (+)= a^T b, for some panels
  void multiply(const Scratch& scratch, int64_t r, int64_t k, const S* a, int64_t lda, Range some, bool first) {
    const bool pack = step > 1 || panels_ > 4;  // with few columns, packing a would cost more than it saves
    const int64_t ld = !pack ? lda : Unit::exists ? scratch.block_k : block_m;
    const Target* last = nullptr;
    for_panels(some, [&](const Target& target, int64_t panel, int64_t column) {
      if (&target != last) target.rows(r, k, scratch.rows), last = &target;
      pack_b(scratch, panel - some.begin, column, k, target.N);
    });
    for (int64_t m0 = 0, count; m0 < m_.size(); m0 += count) {
      count = std::min({block_m, m_.size() - m0, M_ - row_of(m0)});  // the rows of a block adjoin each other
      if (pack) pack_a(scratch, a + m0, lda, k, count);
      for_panels(some, [&](const Target& target, int64_t panel, int64_t column) {
        A* c = c_ + (panel * m_.size() + m0) * width;
        int64_t ldc = width;
        if constexpr (std::is_same_v<S, A>)
          if (target.in_place()) c = target.dw + row_of(m0) * target.N + column, ldc = target.N;
        const S* b = scratch.b + (panel - some.begin) * width * scratch.block_k;
        for_tiles(count, tile_m, [&](int64_t i, int tile) {
          const S* from = pack ? scratch.a + i * (Unit::exists ? scratch.block_k : step) : a + m0 + i;
          A* to = c + i * ldc;
          kernels[tile - 1](round_up(k, k_block), from, ld, b, first ? zeros_ : to, first ? 0 : ldc, to, ldc);
        });
      });
    }
  }

  // Columns from `first` of the rows of b, which have N columns.
  static void pack_b(const Scratch& scratch, int64_t panel, int64_t first, int64_t k, int64_t N) {
    S* to = scratch.b + panel * width * scratch.block_k;
    const auto row = [&](int64_t i, int64_t column) {
      return i < k && column < N ? scratch.rows[i] + column : nullptr;
    };
    for (int64_t i = 0; i < round_up(k, k_block); i += step)
      for (int64_t j = first; j < first + width; j += w, to += w * step) {
        const Operand<S> operand = load_columns(row(i, j), row(i + 1, j), std::min<int64_t>(w, N - j));
        std::memcpy(to, &operand, sizeof(operand));
      }
  }

  // `count` columns of k rows of a.
  static void pack_a(const Scratch& scratch, const S* from, int64_t lda, int64_t k, int64_t count) {
    if constexpr (Unit::exists) {
      for_tiles(count, tile_m, [&](int64_t i, int tile) {
        Unit::transpose_columns(from + i, lda, k, tile, scratch.a + i * scratch.block_k, scratch.block_k);
      });
    } else {
      for (int64_t i = 0; i < k; i += step, from += step * lda)
        for (int64_t j = 0; j < count; j += w) {
          const S* next = i + 1 < k ? from + lda + j : nullptr;
          const Operand<S> operand = load_columns(from + j, next, std::min<int64_t>(w, count - j));
          std::memcpy(scratch.a + i * block_m + j * step, &operand, sizeof(operand));
        }
    }
  }

  void add_sums(const S* from, int64_t lda, int64_t k) {
    for (int64_t j = 0; j < m_.size(); j += w) {
      const int64_t valid = std::min<int64_t>(w, m_.size() - j);
      with_lanes<w>(valid, [&](auto n) __attribute__((always_inline)) {
        AccVec<S> total{};
        for (int64_t i = 0; i < k; ++i) total += load(from + i * lda + j, n);
        store(sums_ + j, load(sums_ + j, n) + total, n);
      });
    }
  }

  int64_t M_;
  Range m_;
  int64_t shift_;
  std::vector<Target> targets_;
  int64_t panels_ = 0;
  bool sums_wanted_ = false, started_ = false;
  A* c_ = nullptr;      // [panels, m, width], where dw can't hold the sums
  A* sums_ = nullptr;   // [m]
  A* zeros_ = nullptr;  // [width]
};

}  // namespace fusedrnn::FUSEDRNN_ISA
