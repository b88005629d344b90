// The time loop. A block computes 16 hidden units of some rows of the batch, for all gates: per step the recurrent
// product of that tile, then the cell on the sums. All directions and tiles are blocks of one launch. The launch has
// either all steps, when its blocks fit on the device at the same time and can wait for each other, or one step.
#pragma once

#include "../cells/cell.h"
#include "params.h"
#include "tile.cuh"

namespace fusedrnn::cuda {

constexpr int units = 16;  // of a block

// One of the blocks: 16 units (or outputs of the projection) from `unit`, some rows of the batch from `row`.
struct Place {
  int direction;
  int64_t unit, row;
};
template <class Tile>
FUSEDRNN_DEVICE Place place() {
  const Grid block = block_index();
  return {int(block.z), int64_t(block.x) * units, int64_t(block.y) * Tile::columns};
}

// The blocks of one direction and batch tile wait for each other between steps; they alone exchange anything.
class Meeting {
 public:
  FUSEDRNN_DEVICE explicit Meeting(uint32_t* arrivals) : counter_(arrivals + block_index().y * counter_pitch) {}
  FUSEDRNN_DEVICE void meet() {
    target_ += grid_size().x;
    sync_block();
    if (thread_index() == 0) {
      signal(counter_);
      wait_for(counter_, target_);
    }
    sync_block();
  }

 private:
  uint32_t* counter_;
  uint32_t target_ = 0;
};

FUSEDRNN_DEVICE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// The tile's elements that a thread has: always the same ones, neighbouring threads neighbouring units.
template <class Tile>
constexpr int elements = (units * Tile::columns + block_size - 1) / block_size;

// One of them: the unit and the batch entry, the same counted from the tile's corner, and its number.
struct Element {
  int64_t unit, n;
  int m, column, i;
};

// Calls f(element) for the thread's elements with unit < units_end and n < rows_end.
template <class Tile, class F>
FUSEDRNN_DEVICE void for_each_element(const Place& at, int64_t units_end, int64_t rows_end, F f) {
#pragma unroll
  for (int i = 0; i < elements<Tile>; ++i) {
    const int e = thread_index() + i * block_size, m = e % units, column = e / units;
    if (column < Tile::columns && at.unit + m < units_end && at.row + column < rows_end)
      f(Element{at.unit + m, at.row + column, m, column, i});
  }
}

template <class S>
FUSEDRNN_DEVICE Accumulator<S> value(const S* p, int64_t i) {
  return p ? Accumulator<S>(widen(p[i])) : Accumulator<S>(0);
}

// The block's shared memory: the partial sums, then the weights that stay.
template <class Tile>
FUSEDRNN_DEVICE typename Tile::A* shared_sums() {
  return reinterpret_cast<typename Tile::A*>(shared_memory());
}
template <class Tile>
FUSEDRNN_DEVICE Vector* shared_weights() {
  return reinterpret_cast<Vector*>(shared_memory() + Tile::sums_bytes);
}

// ---- forward -------------------------------------------------------------------------------------------------------

// h W_hh^T of all gates, then the cell.
template <class Cell, class Math, int n_tiles, int n_warps>
struct ForwardStep {
  using S = typename Math::Storage;
  using A = Accumulator<S>;
  static constexpr int gates = Cell::gates;
  using Recurrence = Tile<Math, gates, n_tiles, n_warps>;
  using Projection = Tile<Math, 1, n_tiles, n_warps>;

  // What a thread's elements need of a step beside h: loaded before the block waits for the step's h.
  struct Ahead {
    int64_t step = -1;
    S wx[elements<Recurrence>][gates];
  };
  FUSEDRNN_DEVICE static void fetch(const Forward<S>& p, const ForwardDirection<S>& d, const Place& at, int64_t s,
                                    Ahead& ahead) {
    ahead.step = s;
    const int64_t batch = d.steps.batch(s), first_row = batch ? d.steps.first_row(s) : 0;
    for_each_element<Recurrence>(at, p.H, batch, [&](const Element& e) {
#pragma unroll
      for (int g = 0; g < gates; ++g) ahead.wx[e.i][g] = d.wx.at(first_row + e.n)[g * p.H + e.unit];
    });
  }

  // Row m of the tile's weights: unit m % 16 of gate m / 16.
  FUSEDRNN_DEVICE static const S* w_hh_row(const Forward<S>& p, const ForwardDirection<S>& d, const Place& at, int m) {
    return d.w_hh.at(m / units * p.H + smaller(at.unit + m % units, p.H - 1));
  }

  FUSEDRNN_DEVICE static void keep_weights(const Forward<S>& p, const ForwardDirection<S>& d, const Place& at) {
    if (at.unit < p.H) {
      Recurrence::keep(shared_weights<Recurrence>(), [&](int m) { return w_hh_row(p, d, at, m); }, d.w_hh.row);
    }
  }

  FUSEDRNN_DEVICE static void recurrence(const Forward<S>& p, const ForwardDirection<S>& d, const Place& at, int64_t s,
                                         const Ahead& ahead) {
    const int64_t batch = d.steps.batch(s), first_row = d.steps.first_row(s);
    if (at.unit >= p.H) return;
    const Rows<S>& h_prev = d.h[s % 2];
    A* sums = shared_sums<Recurrence>();
    Recurrence::multiply(
        sums, p.range.resident ? shared_weights<Recurrence>() : nullptr, [&](int m) { return w_hh_row(p, d, at, m); },
        [&](int n) { return h_prev.at(smaller(at.row + n, batch - 1)); }, d.w_hh.row);
    sync_block();
    for_each_element<Recurrence>(at, p.H, batch, [&](const Element& e) {
      const int64_t unit = e.unit, n = e.n, r = first_row + n;
      A wx[gates], rh[gates], saved[Cell::saved + 1];
#pragma unroll
      for (int g = 0; g < gates; ++g) {
        wx[g] = widen(ahead.wx[e.i][g]) + value(d.b_ih, g * p.H + unit);
        rh[g] = Recurrence::sum(sums, g * units + e.m, e.column) + value(d.b_hh, g * p.H + unit);
      }
      State<A> prev{};
      if constexpr (Cell::reads_h) prev.h = widen(h_prev.at(n)[unit]);
      if constexpr (Cell::has_c) prev.c = d.c[n * p.H + unit];
      const State<A> state = Cell::forward(wx, rh, prev, saved);
      if (d.gates) {
#pragma unroll
        for (int i = 0; i < Cell::saved; ++i) d.gates.at(r)[i * p.H + unit] = narrow<S>(saved[i]);
      }
      const bool ends = n >= d.steps.batch(s + 1);
      if constexpr (Cell::has_c) {
        d.c[n * p.H + unit] = state.c;
        if (d.cells) d.cells.at(r)[unit] = state.c;
        if (ends) d.c_n[n * p.H + unit] = narrow<S>(state.c);
      }
      const S h = narrow<S>(state.h);
      if (p.projected) {
        d.unprojected.at(n)[unit] = h;
        if (d.gates) d.gates.at(r)[Cell::saved * p.H + unit] = h;
      } else {
        store(p, d, s, unit, n, h);
      }
    });
  }

  FUSEDRNN_DEVICE static void projection(const Forward<S>& p, const ForwardDirection<S>& d, const Place& at,
                                         int64_t s) {
    const int64_t batch = d.steps.batch(s);
    if (at.unit >= p.P) return;
    A* sums = shared_sums<Projection>();
    Projection::multiply(
        sums, nullptr, [&](int m) { return d.w_hr.at(smaller(at.unit + m, p.P - 1)); },
        [&](int n) { return d.unprojected.at(smaller(at.row + n, batch - 1)); }, d.w_hr.row);
    sync_block();
    for_each_element<Projection>(at, p.P, batch, [&](const Element& e) {
      store(p, d, s, e.unit, e.n, narrow<S>(Projection::sum(sums, e.m, e.column)));
    });
  }

  FUSEDRNN_DEVICE static void store(const Forward<S>& p, const ForwardDirection<S>& d, int64_t s, int64_t unit,
                                    int64_t n, S h) {
    d.h[(s + 1) % 2].at(n)[unit] = h;
    d.y.at(d.steps.first_row(s) + n)[unit] = h;
    if (n >= d.steps.batch(s + 1)) d.h_n[n * p.P + unit] = h;
  }
};

template <class Cell, class Math, int n_tiles, int n_warps>
FUSEDRNN_KERNEL(block_size)
forward_kernel(const Forward<typename Math::Storage> p) {
  using Step = ForwardStep<Cell, Math, n_tiles, n_warps>;
  const Place at = place<typename Step::Recurrence>();
  const auto& d = p.direction[at.direction];
  Meeting meeting(d.arrivals);
  if (p.range.resident) {
    Step::keep_weights(p, d, at);
    sync_block();
  }
  typename Step::Ahead ahead;
  for (int64_t s = p.range.first; s < p.range.last; ++s) {
    if (at.row < d.steps.batch(s)) {  // of all blocks that meet, or of none
      if (p.range.recurrence) {
        if (ahead.step != s) Step::fetch(p, d, at, s, ahead);
        Step::recurrence(p, d, at, s, ahead);
      }
      if (p.range.recurrence && p.range.projection) meeting.meet();
      if (p.range.projection) Step::projection(p, d, at, s);
      if (s + 1 < p.range.last) {
        Step::fetch(p, d, at, s + 1, ahead);
        meeting.meet();
      }
    }
  }
}

// ---- backward ------------------------------------------------------------------------------------------------------

// dL/dh of a step from the next one's drh, drh W_hh, then the cell's derivative. Rows come in at their last step, with
// dh_n and dc_n, and leave one step before their first, with dh0 and dc0.
template <class Cell, class Math, int n_tiles, int n_warps>
struct BackwardStep {
  using S = typename Math::Storage;
  using A = Accumulator<S>;
  static constexpr int gates = Cell::gates;
  using Product = Tile<Math, 1, n_tiles, n_warps>;

  // What a thread's elements need of a step beside drh: loaded before the block waits for the next step's drh.
  struct Ahead {
    int64_t step = -2;
    struct {
      S saved[Cell::saved + 1], h, h_prev, dy;
      A c, c_prev, dcells;
    } of[elements<Product>];
  };
  FUSEDRNN_DEVICE static void fetch(const Backward<S>& p, const BackwardDirection<S>& d, const Place& at, int64_t s,
                                    Ahead& ahead) {
    ahead.step = s;
    const int64_t batch = d.steps.batch(s), first_row = batch ? d.steps.first_row(s) : 0;
    const int64_t known = d.steps.batch(s - 1), row_before = known ? d.steps.first_row(s - 1) : 0;
    for_each_element<Product>(at, p.P, batch, [&](const Element& e) {
      if (d.dy) ahead.of[e.i].dy = d.dy.at(first_row + e.n)[e.unit];
    });
    for_each_element<Product>(at, p.H, batch, [&](const Element& e) {
      auto& of = ahead.of[e.i];
      const int64_t r = first_row + e.n, r_prev = row_before + e.n;
      const bool starts = e.n >= known;
#pragma unroll
      for (int i = 0; i < Cell::saved; ++i) of.saved[i] = d.gates.at(r)[i * p.H + e.unit];
      if constexpr (Cell::reads_h) {
        of.h = d.y.at(r)[e.unit];
        of.h_prev = starts ? (d.h0 ? d.h0[e.n * p.P + e.unit] : S{}) : d.y.at(r_prev)[e.unit];
      }
      if constexpr (Cell::has_c) {
        of.c = d.cells.at(r)[e.unit];
        of.c_prev = starts ? value(d.c0, e.n * p.H + e.unit) : d.cells.at(r_prev)[e.unit];
        of.dcells = d.dcells ? d.dcells.at(r)[e.unit] : A(0);
      }
    });
  }

  FUSEDRNN_DEVICE static void keep_weights(const Backward<S>& p, const BackwardDirection<S>& d, const Place& at) {
    if (at.unit < p.P) {
      Product::keep(
          shared_weights<Product>(), [&](int m) { return d.w_hh.at(smaller(at.unit + m, p.P - 1)); }, d.w_hh.row);
    }
  }

  FUSEDRNN_DEVICE static void recurrence(const Backward<S>& p, const BackwardDirection<S>& d, const Place& at,
                                         int64_t s, const Ahead& ahead) {
    if (at.unit >= p.P) return;
    const int64_t batch = d.steps.batch(s), next_batch = d.steps.batch(s + 1);
    A* sums = shared_sums<Product>();
    if (at.row < next_batch) {
      const int64_t next_row = d.steps.first_row(s + 1);
      Product::multiply(
          sums, p.range.resident ? shared_weights<Product>() : nullptr,
          [&](int m) { return d.w_hh.at(smaller(at.unit + m, p.P - 1)); },
          [&](int n) { return d.drh.at(next_row + smaller(at.row + n, next_batch - 1)); }, d.w_hh.row);
    }
    sync_block();
    const int64_t rows = batch > next_batch ? batch : next_batch;
    for_each_element<Product>(at, p.P, rows, [&](const Element& e) {
      const int64_t unit = e.unit, n = e.n;
      A dh;
      if (n < next_batch) {
        dh = Product::sum(sums, e.m, e.column);
        if constexpr (Cell::carries_h) dh += d.dh_direct[n * p.P + unit];
      } else {
        dh = value(d.dh_n, n * p.P + unit);
      }
      if (n >= batch) {
        if (d.dh0) d.dh0[n * p.P + unit] = narrow<S>(dh);
        if constexpr (Cell::has_c) {
          if (!p.projected && d.dc0) d.dc0[n * p.H + unit] = narrow<S>(d.dc[n * p.H + unit]);
        }
        return;
      }
      if (d.dy) dh += widen(ahead.of[e.i].dy);
      if (p.projected)
        d.dh.at(d.steps.first_row(s) + n)[unit] = narrow<S>(dh);
      else
        cell(p, d, s, e, ahead, dh);
    });
  }

  FUSEDRNN_DEVICE static void projection(const Backward<S>& p, const BackwardDirection<S>& d, const Place& at,
                                         int64_t s, const Ahead& ahead) {
    if (at.unit >= p.H) return;
    const int64_t batch = d.steps.batch(s), next_batch = d.steps.batch(s + 1);
    A* sums = shared_sums<Product>();
    if (at.row < batch) {
      const int64_t first_row = d.steps.first_row(s);
      Product::multiply(
          sums, nullptr, [&](int m) { return d.w_hr.at(smaller(at.unit + m, p.H - 1)); },
          [&](int n) { return d.dh.at(first_row + smaller(at.row + n, batch - 1)); }, d.w_hr.row);
    }
    sync_block();
    const int64_t rows = batch > next_batch ? batch : next_batch;
    for_each_element<Product>(at, p.H, rows, [&](const Element& e) {
      if (e.n < batch)
        cell(p, d, s, e, ahead, Product::sum(sums, e.m, e.column));
      else if (d.dc0)
        d.dc0[e.n * p.H + e.unit] = narrow<S>(d.dc[e.n * p.H + e.unit]);
    });
  }

  FUSEDRNN_DEVICE static void cell(const Backward<S>& p, const BackwardDirection<S>& d, int64_t s, const Element& e,
                                   const Ahead& ahead, A dh) {
    const auto& of = ahead.of[e.i];
    const int64_t r = d.steps.first_row(s) + e.n, state = e.n * p.H + e.unit;
    A saved[Cell::saved + 1], dwx[gates], drh[gates];
#pragma unroll
    for (int i = 0; i < Cell::saved; ++i) saved[i] = widen(of.saved[i]);
    State<A> prev{}, now{}, upstream{dh, A(0)};
    if constexpr (Cell::reads_h) prev.h = widen(of.h_prev), now.h = widen(of.h);
    if constexpr (Cell::has_c) {
      prev.c = of.c_prev, now.c = of.c;
      upstream.c = (e.n < d.steps.batch(s + 1) ? d.dc[state] : value(d.dc_n, state)) + of.dcells;
    }
    const State<A> dprev = Cell::backward(saved, prev, now, upstream, dwx, drh);
#pragma unroll
    for (int g = 0; g < gates; ++g) {
      d.drh.at(r)[g * p.H + e.unit] = narrow<S>(drh[g]);
      if (d.dwx) d.dwx.at(r)[g * p.H + e.unit] = narrow<S>(dwx[g]);
    }
    if constexpr (Cell::carries_h) d.dh_direct[state] = dprev.h;
    if constexpr (Cell::has_c) d.dc[state] = dprev.c;
  }
};

template <class Cell, class Math, int n_tiles, int n_warps>
FUSEDRNN_KERNEL(block_size)
backward_kernel(const Backward<typename Math::Storage> p) {
  using Step = BackwardStep<Cell, Math, n_tiles, n_warps>;
  const Place at = place<typename Step::Product>();
  const auto& d = p.direction[at.direction];
  Meeting meeting(d.arrivals);
  if (p.range.resident) {
    Step::keep_weights(p, d, at);
    sync_block();
  }
  typename Step::Ahead ahead;
  for (int64_t s = p.range.last - 1; s >= p.range.first; --s) {
    if (at.row < d.steps.batch(s) || at.row < d.steps.batch(s + 1)) {
      if (ahead.step != s) Step::fetch(p, d, at, s, ahead);
      if (p.range.recurrence) Step::recurrence(p, d, at, s, ahead);
      if (p.range.recurrence && p.range.projection) meeting.meet();
      if (p.range.projection) Step::projection(p, d, at, s, ahead);
      if (s > p.range.first) {
        Step::fetch(p, d, at, s - 1, ahead);
        meeting.meet();
      }
    }
  }
}

}  // namespace fusedrnn::cuda
