// The time loop. A block computes 16 hidden units of some rows of the batch, for all gates: per step the recurrent
// product of that tile, then the cell on the sums. All directions and tiles are blocks of one launch. The launch has
// either all steps, when its blocks fit on the device at the same time and can wait for each other, or one step.
//
// Backward, k is all gates of all units, and each block would read a step's gate gradients whole. Where that takes too
// long, the blocks of a cluster divide k: each multiplies its part of the gradients with the weights of all their
// units, and they add up what they get from each other.
#pragma once

#include "elements.cuh"
#include "inbox.cuh"
#include "tile.cuh"

namespace fusedrnn::cuda {

// The blocks of one direction and batch tile wait for each other between steps; they alone exchange anything.
class Meeting {
 public:
  FUSEDRNN_DEVICE explicit Meeting(uint32_t* arrivals) : counter_(arrivals + block_index().y * counter_pitch) {}
  FUSEDRNN_DEVICE void meet() { arrive(), wait(); }
  // Loads that don't depend on the others come best between these two: those before are waited for in arrive().
  FUSEDRNN_DEVICE void arrive() {
    target_ += grid_size().x;
    sync_block();
    if (thread_index() == 0) signal(counter_);
  }
  FUSEDRNN_DEVICE void wait() const {
    if (thread_index() == 0) wait_for(counter_, target_);
    sync_block();
  }

 private:
  uint32_t* counter_;
  uint32_t target_ = 0;
};

FUSEDRNN_DEVICE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

template <class Tile>
using TilePlace = Place<Tile::columns, (units * Tile::columns + block_size - 1) / block_size, sums_apart>;
template <class Tile>
FUSEDRNN_DEVICE TilePlace<Tile> place() {
  const Grid block = block_index();
  return {int(block.z), 1, Tile::columns, int(block.x) * units, int(block.y) * Tile::columns};
}

// The block's shared memory: what blocks that divide k send each other, the partial sums, then the weights that stay
// and are too many for registers.
template <class Tile, int divide_k = 1>
FUSEDRNN_DEVICE typename Tile::A* shared_sums() {
  return reinterpret_cast<typename Tile::A*>(shared_memory() + split_inbox_bytes(divide_k, Tile::columns));
}

// What a tile multiplies by: the rows of the recurrent weights, or what it keeps of them on the chip (`resident`).
template <class Tile, bool resident, int divide_k = 1, class RowOfA>
FUSEDRNN_DEVICE auto recurrent_weights(const RowOfA& rows, int64_t K) {
  if constexpr (resident)
    return Tile::keep(reinterpret_cast<Vector*>(shared_sums<Tile, divide_k>()) + Tile::sums_bytes / sizeof(Vector),
                      rows, K);
  else
    return rows;
}

// h W_hh^T of all gates, then the cell.
template <class Cell, class Math, int n_tiles, int n_warps>
struct ForwardStep {
  using S = typename Math::Storage;
  using A = Accumulator<S>;
  static constexpr int gates = Cell::gates;
  using Recurrence = Tile<Math, gates, n_tiles, n_warps>;
  using Projection = Tile<Math, 1, n_tiles, n_warps>;
  using Place = TilePlace<Recurrence>;
  using Cells = typename ElementsOf<Cell, Math, Place>::Type;

  // Rows of the tile's weights: row m is unit m % 16 of gate m / 16.
  struct W_hh {
    const Forward<S>& p;
    const ForwardDirection<S>& d;
    int64_t first_unit;
    FUSEDRNN_DEVICE const S* operator()(int m) const {
      return d.w_hh.at(m / units * p.H + smaller(first_unit + m % units, p.H - 1));
    }
  };

  // w_hh: such rows, or what the tile keeps of them.
  template <class Weights>
  FUSEDRNN_DEVICE static void recurrence(const Forward<S>& p, const ForwardDirection<S>& d, const Place& at,
                                         Cells& cells, const Weights& w_hh) {
    if (at.unit >= p.H) return;
    const Rows<S>& h_prev = d.h[cells.s % 2];
    A* sums = shared_sums<Recurrence>();
    Recurrence::multiply(
        sums, w_hh, [&](int n) { return h_prev.at(smaller(at.row + n, cells.batch - 1)); }, d.w_hh.row);
    sync_block();
    at.each(p.H, cells.batch, [&](const Element& e) {
      const S h = cells.step(e, [&](A(&rh)[gates]) {
#pragma unroll
        for (int g = 0; g < gates; ++g) rh[g] = Recurrence::sum(sums, g * units + e.m, e.column);
      });
      (p.projected ? d.unprojected : d.h[(cells.s + 1) % 2]).at(e.n)[e.unit] = h;
    });
  }
  // What nobody waits for.
  FUSEDRNN_DEVICE static void save(const Forward<S>& p, const Place& at, const Cells& cells) {
    at.each(p.H, cells.batch, [&](const Element& e) {
      cells.save(e);
      if (!p.projected) cells.output(e.unit, e.n, cells.h[e.i]);
    });
  }

  FUSEDRNN_DEVICE static void projection(const Forward<S>& p, const ForwardDirection<S>& d, const Place& at,
                                         const Cells& cells) {
    if (at.unit >= p.P) return;
    A* sums = shared_sums<Projection>();
    Projection::multiply(
        sums, [&](int m) { return d.w_hr.at(smaller(at.unit + m, p.P - 1)); },
        [&](int n) { return d.unprojected.at(smaller(at.row + n, cells.batch - 1)); }, d.w_hr.row);
    sync_block();
    at.each(p.P, cells.batch, [&](const Element& e) {
      const S h = cells.projected(e, Projection::sum(sums, e.m, e.column));
      d.h[(cells.s + 1) % 2].at(e.n)[e.unit] = h;
      cells.output(e.unit, e.n, h);
    });
  }
};

// `resident`: the recurrent weights stay on the chip.
template <class Cell, class Math, int n_tiles, int n_warps, bool resident>
FUSEDRNN_KERNEL(block_size)
forward_kernel(const Forward<typename Math::Storage> p) {
  using Step = ForwardStep<Cell, Math, n_tiles, n_warps>;
  using Tile = typename Step::Recurrence;
  const auto at = place<Tile>();
  const auto& d = p.direction[at.direction];
  Meeting meeting(d.arrivals);
  const typename Step::W_hh rows{p, d, at.unit};
  const auto w_hh = recurrent_weights<Tile, resident>(rows, d.w_hh.row);
  typename Step::Cells cells(p, d, at, p.range.first);
  for (int64_t s = p.range.first; s < p.range.last; ++s) {
    if (cells.s != s) cells.fetch(s);
    if (at.row >= cells.batch) continue;  // all blocks that meet, or none
    if (p.range.recurrence) Step::recurrence(p, d, at, cells, w_hh);
    if (p.range.recurrence && p.range.projection) meeting.meet();
    if (p.range.projection) Step::projection(p, d, at, cells);
    const bool goes_on = s + 1 < p.range.last;
    if (goes_on) meeting.arrive();
    if (p.range.recurrence) Step::save(p, at, cells);
    if (goes_on) {
      cells.fetch(s + 1);
      meeting.wait();
    }
  }
  cells.store();
}

// A block's part of k, and the sums over all of it. Of a cluster, so many blocks divide k.
template <class Tile, int divide_k>
class Split {
 public:
  static_assert(sizeof(typename Tile::A) == sizeof(float) && Tile::rows == divide_k * units);

  FUSEDRNN_DEVICE Split() : inbox_(divide_k) {}
  FUSEDRNN_DEVICE static int rank() { return int(block_index().x % divide_k); }

  // After the product. Sends each block this one's sums for its units, and gets the others'.
  FUSEDRNN_DEVICE void exchange(const float* sums, int columns) {
    constexpr int quads = Tile::rows / 4;  // units that are sent together
    sync_block();
    inbox_.expect(uint32_t(divide_k * units * columns * sizeof(float)));
#pragma unroll
    for (int first = 0; first < quads * Tile::columns; first += block_size) {
      const int i = first + thread_index(), column = i / quads, m = i % quads * 4;
      if (column >= columns) continue;
      const Vector sum = Tile::sum_of_4(sums, m, column);
      inbox_.send(sum, reinterpret_cast<Vector*>(part(rank(), m % units, column)), m / units);
    }
    inbox_.receive();
  }
  FUSEDRNN_DEVICE float sum(const float*, int m, int column) const {
    float total = 0;
#pragma unroll
    for (int from = 0; from < divide_k; ++from) total += *part(from, m, column);
    return total;
  }

 private:
  // [2, divide_k, columns, units], padded
  FUSEDRNN_DEVICE float* part(int from, int m, int column) const {
    auto* const parts = reinterpret_cast<float*>(shared_memory() + mailboxes_bytes);
    return parts + ((inbox_.buffer() * divide_k + from) * Tile::columns + column) * sums_pitch(units) + m;
  }

  Inbox inbox_;
};
template <class Tile>
class Split<Tile, 1> {
 public:
  using A = typename Tile::A;
  FUSEDRNN_DEVICE static int rank() { return 0; }
  FUSEDRNN_DEVICE void exchange(const A*, int) const { sync_block(); }
  FUSEDRNN_DEVICE A sum(const A* sums, int m, int column) const { return Tile::sum(sums, m, column); }
};

// drh W_hh of the step after, then the cell's derivative.
template <class Cell, class Math, int n_tiles, int n_warps, int divide_k, bool writes_states>
struct BackwardStep {
  using S = typename Math::Storage;
  using A = Accumulator<S>;
  using Product = Tile<Math, divide_k, n_tiles, n_warps>;
  using Projection = Tile<Math, 1, n_tiles, n_warps>;
  using Place = TilePlace<Product>;
  using Cells = BackwardCells<Cell, Math, Place, writes_states>;
  using Split = cuda::Split<Product, divide_k>;

  // Rows of the tile's weights, from the block's part of k on.
  struct W_hh {
    const Backward<S>& p;
    const BackwardDirection<S>& d;
    int64_t first_unit, first_k, K;

    FUSEDRNN_DEVICE W_hh(const Backward<S>& p, const BackwardDirection<S>& d, const Place& at)
        : p(p), d(d), first_unit(at.unit - Split::rank() * units) {
      const int64_t all = d.w_hh.row, each = (all + divide_k * Math::k - 1) / (divide_k * Math::k) * Math::k;
      first_k = smaller(Split::rank() * each, all), K = smaller(each, all - first_k);
    }
    FUSEDRNN_DEVICE const S* operator()(int m) const { return d.w_hh.at(smaller(first_unit + m, p.P - 1)) + first_k; }
  };

  // w_hh: such rows, or what the tile keeps of them.
  template <class Weights>
  FUSEDRNN_DEVICE static void recurrence(const Backward<S>& p, const BackwardDirection<S>& d, const Place& at,
                                         Cells& cells, const W_hh& rows, const Weights& w_hh, Split& split) {
    if (at.unit - Split::rank() * units >= p.P) return;  // the whole cluster
    A* sums = shared_sums<Product, divide_k>();
    if (at.row < cells.next_batch) {
      const int64_t next_row = d.steps.rows(cells.s + 1).first;
      Product::multiply(
          sums, w_hh,
          [&](int n) { return d.drh.at(next_row + smaller(at.row + n, cells.next_batch - 1)) + rows.first_k; }, rows.K);
      split.exchange(sums, at.columns_before(cells.next_batch));
    }
    at.each(p.P, cells.rows, [&](const Element& e) {
      const A dh = cells.dh(e, [&] { return split.sum(sums, e.m, e.column); });
      if (e.n >= cells.batch) {
        cells.initial_h(e, dh);
        if (!p.projected) cells.initial_c(e);
      } else if (p.projected) {
        d.dh.at(cells.first_row + e.n)[e.unit] = narrow<S>(dh + cells.dy(e));
      } else {
        cells.step(e, dh + cells.dy(e));
        cells.save(e);
      }
    });
  }

  FUSEDRNN_DEVICE static void projection(const Backward<S>& p, const BackwardDirection<S>& d, const Place& at,
                                         Cells& cells) {
    if (at.unit >= p.H) return;
    A* sums = shared_sums<Projection, divide_k>();
    if (at.row < cells.batch) {
      Projection::multiply(
          sums, [&](int m) { return d.w_hr.at(smaller(at.unit + m, p.H - 1)); },
          [&](int n) { return d.dh.at(cells.first_row + smaller(at.row + n, cells.batch - 1)); }, d.w_hr.row);
    }
    sync_block();
    at.each(p.H, cells.rows, [&](const Element& e) {
      if (e.n >= cells.batch) {
        cells.initial_c(e);
      } else {
        cells.step(e, Projection::sum(sums, e.m, e.column));
        cells.save(e);
      }
    });
  }
};

// `resident`: the recurrent weights stay on the chip. So many blocks of a cluster `divide_k`.
template <class Cell, class Math, int n_tiles, int n_warps, bool resident, int divide_k = 1>
FUSEDRNN_KERNEL(block_size)
backward_kernel(const Backward<typename Math::Storage> p) {
  if constexpr (divide_k == 1 || has_clusters) {
    using Step = BackwardStep<Cell, Math, n_tiles, n_warps, divide_k, !resident>;
    using Tile = typename Step::Product;
    const auto at = place<Tile>();
    const auto& d = p.direction[at.direction];
    Meeting meeting(d.arrivals);
    typename Step::Split split;
    const typename Step::W_hh rows(p, d, at);
    const auto w_hh = recurrent_weights<Tile, resident, divide_k>(rows, rows.K);
    typename Step::Cells cells(p, d, at, p.range.last - 1);
    if constexpr (divide_k > 1) sync_cluster();  // mailboxes are open before anyone sends
    for (int64_t s = p.range.last - 1; s >= p.range.first; --s) {
      if (cells.s != s) cells.fetch(s);
      if (at.row >= cells.rows) continue;
      if (p.range.recurrence) Step::recurrence(p, d, at, cells, rows, w_hh, split);
      if (p.range.recurrence && p.range.projection) meeting.meet();
      if (p.range.projection) Step::projection(p, d, at, cells);
      if (s > p.range.first) {
        meeting.arrive();
        cells.fetch(s - 1);
        meeting.wait();
      }
    }
    cells.store();
  }
}

}  // namespace fusedrnn::cuda
