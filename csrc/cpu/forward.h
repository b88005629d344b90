// The forward pass of one direction of a layer: for each chunk of time steps the input projection
// wx = W_ih x + b_ih, then step by step rh = W_hh h_prev + b_hh and the cell on both, tile by tile.
#pragma once

#include "../cells/tangent.h"
#include "recurrence.h"

namespace fusedrnn::FUSEDRNN_ISA {

enum class Purpose { inference, training, tangent };  // training saves; tangent: see Tangent in params.h

template <class Cell, class S, Purpose purpose>
class ForwardPass {
  using A = Acc<S>;
  using V = AccVec<S>;
  static constexpr int w = lanes<S>, G = Cell::gates;
  static constexpr bool save = purpose == Purpose::training;
  static constexpr bool keeps_c = Cell::has_c && purpose != Purpose::inference;
  static_assert(G <= max_vectors);

 public:
  ForwardPass(const Forward<S>& p, int threads) : p_(p), shape_(p.shape), threads_(threads) {
    const auto [T, N, I, H, P] = std::array{shape_.T, shape_.N, shape_.I, shape_.H, shape_.P};
    w_ih_ = {
        .K = I, .units = H, .gates = G, .rows = p.weights.w_ih, .bias = p.weights.b_ih, .most_rows = shape_.rows()};
    w_hh_ = {.K = P, .units = H, .gates = G, .rows = p.weights.w_hh, .bias = p.weights.b_hh, .most_rows = N};
    w_hr_ = {.K = H, .units = P, .rows = p.weights.w_hr, .most_rows = N};
    arena_.allocate([&, N = N, I = I, H = H, P = P](Arena& arena) {
      const int64_t rows = shape_.rows();
      layout_matrix(arena, w_ih_, worth_packing(w_ih_));
      layout_matrix(arena, w_hh_, worth_packing(w_hh_));
      if (shape_.projected) layout_matrix(arena, w_hr_, worth_packing(w_hr_));
      groups_.layout(arena, threads_);
      c_ = arena.take<A>(Cell::has_c ? N * H : 0);
      zeros_ = arena.take<S>(P);
      h_full_ = arena.take<S>(shape_.projected && !save ? N * H : 0);
      // wx of a chunk of several steps within the budget, or of one step and one panel.
      const int64_t width = w_ih_.width();
      wx_size_ = std::max(std::min(wx_budget, rows * w_ih_.panel_count() * width), N * width);
      wx_ = arena.take<A>(threads_ * wx_size_);
      x_size_ = std::min(max_chunk_rows, rows) * I;
      x_ = arena.take<S>(threads_ * x_size_);
      rh_size_ = std::min(row_block, N) * max_vectors * w;
      rh_ = arena.take<A>(threads_ * rh_size_);
    });
  }

  ForwardPlan plan(int threads) const {
    const double panel_bytes = double(w_hh_.width() * w_hh_.K * sizeof(S));
    const double packings = double(w_ih_.packed + w_hh_.packed) / shape_.T;
    return {plan_split(threads, double(shape_.rows()) / shape_.T, w_hh_.panel_count(), panel_bytes, packings),
            w_hh_.packed};
  }

  void run(const Member& me) {
    const Split split = plan(me.size).split;
    prepare(me);
    if (me.id >= split.threads()) return me.meet();
    Thread thread{};
    static_cast<Part&>(thread) = groups_.part(shape_, split, me.id);
    thread.panels = panels_of(w_hh_, thread);
    thread.w_ih = packed_for(w_ih_, thread, chunk_end(thread, 0) == shape_.T);
    thread.w_hh = packed_for(w_hh_, thread, shape_.T == 1);
    if (shape_.projected) pack_share(w_hr_, thread);
    me.meet();
    thread.wx = wx_ + me.id * wx_size_;
    thread.x_copy = x_ + me.id * x_size_;
    thread.rh = rh_ + me.id * rh_size_;
    for (int64_t s = 0; s < shape_.T;) {
      const int64_t end = chunk_end(thread, s);
      begin_chunk(thread, s, end);
      for (; s < end; ++s) step(thread, s);
    }
    finish(thread);
  }

 private:
  static constexpr int64_t max_chunk_rows = 96;
  static constexpr int64_t wx_budget = 256 * 1024 / sizeof(A);

  struct Thread : Part {
    Matrix<S> w_ih, w_hh;  // as this thread sees them
    Range panels;          // of both
    A* wx;                 // [rows of the chunk, panels, width]; of one panel only if project_in_step
    S* x_copy;             // [rows of the chunk, I], where x itself is not in that form
    A* rh;                 // a block's product
    const S* x;            // the chunk's rows of x
    int64_t ldx, rows;     // elements between them, their number
    int64_t low_time;      // the chunk's earliest time step
    bool project_in_step;  // the chunk is one step: each panel is projected just before its product
  };

  // Whether so many rows are multiplied with it that rewriting it in panels pays; that is dear beyond the caches.
  bool worth_packing(const Matrix<S>& matrix) const {
    return shape_.rows() >= (matrix.panels_size() * int64_t(sizeof(S)) < 1 << 20 ? 8 : 20);
  }

  void prepare(const Member& me) {
    if (Cell::has_c) {
      const Range n = part_of(shape_.N, me.id, me.size);
      copy_or_zero(c_ + n.begin * shape_.H, p_.c0 ? p_.c0 + n.begin * shape_.H : nullptr, n.size() * shape_.H);
    }
    if (me.id == 0) copy_or_zero(zeros_, static_cast<const S*>(nullptr), shape_.P);
  }

  // This thread's rows at time t.
  static Range active(const Shape& shape, const Part& part, int64_t t) {
    return {part.n.begin, std::max(part.n.begin, std::min(part.n.end, shape.batch(t)))};
  }

  // The chunk of steps from s that is projected at once.
  int64_t chunk_end(const Thread& thread, int64_t s) const {
    const int64_t most =
        std::min(max_chunk_rows, wx_budget / (std::max<int64_t>(1, thread.panels.size()) * w_ih_.width()));
    int64_t rows = active(shape_, thread, shape_.time(s)).size();
    for (++s; s < shape_.T; ++s) {
      rows += active(shape_, thread, shape_.time(s)).size();
      if (rows > most) break;
    }
    return s;
  }

  // Makes x of a chunk of steps ready for the projection: rows in the order of time, whatever the direction.
  void begin_chunk(Thread& thread, int64_t s, int64_t end) {
    const int64_t I = shape_.I, low = std::min(shape_.time(s), shape_.time(end - 1)), high = low + (end - s);
    thread.low_time = low;
    thread.rows = 0;
    for (int64_t t = low; t < high; ++t) thread.rows += active(shape_, thread, t).size();
    thread.x = p_.x.at(shape_, low, thread.n.begin);
    thread.ldx = p_.x.row;
    const bool whole_batch = thread.n.size() == shape_.N;
    const bool adjoining = whole_batch && (p_.x.step < 0 || p_.x.step == shape_.N * thread.ldx);
    if (high - low > 1 && !adjoining) {
      S* to = thread.x_copy;
      for (int64_t t = low; t < high; ++t)
        for (int64_t n = active(shape_, thread, t).begin; n < active(shape_, thread, t).end; ++n, to += I)
          std::copy_n(p_.x.at(shape_, t, n), I, to);  // memcpy takes no null, as I = 0 has
      thread.x = thread.x_copy;
      thread.ldx = I;
    }
    thread.project_in_step = high - low == 1;
    if (purpose != Purpose::tangent && !thread.project_in_step)
      for (int64_t panel = thread.panels.begin; panel < thread.panels.end; ++panel) project_input(thread, panel);
  }

  // wx of the chunk's rows and a panel's units.
  void project_input(Thread& thread, int64_t panel) {
    A* wx = wx_of(thread, panel, 0);
    if (thread.w_ih.in_turn) thread.w_ih.pack(panel);
    for_blocks({0, thread.rows}, [&](int64_t row, int64_t count) {
      thread.w_ih.multiply(panel, count, thread.x + row * thread.ldx, thread.ldx, wx + row * ldwx(thread),
                           ldwx(thread));
    });
  }

  int64_t ldwx(const Thread& thread) const {
    return (thread.project_in_step ? 1 : thread.panels.size()) * w_ih_.width();
  }
  A* wx_of(const Thread& thread, int64_t panel, int64_t row) const {
    const int64_t column = thread.project_in_step ? 0 : panel - thread.panels.begin;
    return thread.wx + row * ldwx(thread) + column * w_ih_.width();
  }

  void step(Thread& thread, int64_t s) {
    const int64_t t = shape_.time(s), H = shape_.H;
    const Range n = active(shape_, thread, t);
    if (n.size() == 0) return;  // the same for all of the row group
    int64_t row = 0;            // of the chunk
    for (int64_t u = thread.low_time; u < t; ++u) row += active(shape_, thread, u).size();
    // Entries before `carried` go on from the previous step, the others start from h0.
    const int64_t carried = std::clamp(shape_.step_batch(s - 1), n.begin, n.end);
    const int64_t before = carried > n.begin ? shape_.time(s - 1) : t;

    const auto run_panel = [&](int64_t panel, Range r, const S* h_prev, int64_t ldh, const A* c_prev, int64_t ldc) {
      for_blocks(r, [&](int64_t b, int64_t count) {
        const int64_t first = b - r.begin;
        thread.w_hh.multiply(panel, count, h_prev + first * ldh, ldh, thread.rh, w_hh_.width());
        if constexpr (purpose == Purpose::tangent)
          cell_tangent(panel, count, thread.rh, h_prev + first * ldh, ldh, c_prev + first * ldc, ldc, t, before,
                       carried, b);
        else
          cell(panel, count, wx_of(thread, panel, row + b - n.begin), ldwx(thread), thread.rh, h_prev + first * ldh,
               ldh, c_prev + first * ldc, ldc, t, b);
      });
    };
    for (int64_t i = 0; i < thread.panels.size(); ++i) {
      // Back and forth, so that a step begins with the weights that the last one left in the cache.
      const int64_t panel = s % 2 ? thread.panels.end - 1 - i : thread.panels.begin + i;
      if (purpose != Purpose::tangent && thread.project_in_step) project_input(thread, panel);
      if (thread.w_hh.in_turn) thread.w_hh.pack(panel);
      run_panel(panel, {n.begin, carried}, p_.y.at(shape_, before, n.begin), p_.y.row,
                keeps_c ? p_.cells.at(shape_, before, n.begin) : c_ + n.begin * H, keeps_c ? p_.cells.row : H);
      run_panel(panel, {carried, n.end}, p_.h0 ? p_.h0 + carried * shape_.P : zeros_, p_.h0 ? shape_.P : 0,
                c_ + carried * H, H);
    }
    if (shape_.projected) project_output(thread, t, n);
    thread.group.meet();
  }

  // The cell on `count` entries from b at time t and the units of a panel.
  void cell(int64_t panel, int64_t count, const A* wx, int64_t ldwx, const A* rh, const S* h_prev, int64_t ldh,
            const A* c_prev, int64_t ldc, int64_t t, int64_t b) {
    const int64_t H = shape_.H, first_unit = w_hh_.first_unit(panel);
    const int vectors = w_hh_.unit_vectors(panel), width = w_hh_.width();
    for (int64_t i = 0; i < count; ++i) {
      S* h_out = shape_.projected ? h_full(t, b + i) : p_.y.at(shape_, t, b + i);
      A* c_out = keeps_c ? p_.cells.at(shape_, t, b + i) : c_ + (b + i) * H;
      S* saved_out = save && Cell::saved ? p_.gates.at(shape_, t, b + i) : nullptr;
      for (int v = 0; v < vectors; ++v) {
        const int64_t unit = first_unit + v * w;
        V wxv[G], rhv[G], saved[Cell::saved + 1];
        for (int g = 0; g < G; ++g) {
          wxv[g] = load(wx + i * ldwx + (v * G + g) * w);
          rhv[g] = load(rh + i * width + (v * G + g) * w);
        }
        with_lanes<w>(H - unit, [&](auto valid) __attribute__((always_inline)) {
          State<V> prev{};
          if constexpr (Cell::reads_h) prev.h = load(h_prev + i * ldh + unit, valid);
          if constexpr (Cell::has_c) prev.c = load(c_prev + i * ldc + unit, valid);
          const State<V> state = Cell::forward(wxv, rhv, prev, saved);
          store(h_out + unit, state.h, valid);
          if constexpr (Cell::has_c) store(c_out + unit, state.c, valid);
          if constexpr (save)
            for (int k = 0; k < Cell::saved; ++k) store(saved_out + k * H + unit, saved[k], valid);
        });
      }
    }
  }

  // The change of the state of `count` entries from b at time t and the units of a panel. Entries before `carried` had
  // a step before, at time `before`.
  void cell_tangent(int64_t panel, int64_t count, const A* rh, const S* dh_prev, int64_t ldh, const A* dc_prev,
                    int64_t ldc, int64_t t, int64_t before, int64_t carried, int64_t b) {
    const Tangent<S>& p = p_.tangent;
    const int64_t H = shape_.H, first_unit = w_hh_.first_unit(panel);
    const int vectors = w_hh_.unit_vectors(panel), width = w_hh_.width();
    for (int64_t i = 0; i < count; ++i) {
      const int64_t n = b + i;
      const bool starts = n >= carried;
      const auto row = [&](const auto& rows) { return rows.data ? rows.at(shape_, t, n) : nullptr; };
      const auto row_before = [&](const auto& rows, auto* start, int64_t width) {
        if (!starts) return rows.at(shape_, before, n);
        return start ? start + n * width : nullptr;
      };
      const S *dwx = row(p.dwx), *drh = row(p.drh), *dy = shape_.projected ? nullptr : row(p.dy);
      const S *gates = row(p.at.gates), *h = row(p.at.y), *h_prev = row_before(p.at.y, p.at.h0, shape_.P);
      const A *c = row(p.at.cells), *c_prev = Cell::has_c ? row_before(p.at.cells, p.at.c0, H) : nullptr;
      S* drh_out = p.drh_out.at(shape_, t, n);
      S* dh_out = shape_.projected ? h_full(t, n) : p_.y.at(shape_, t, n);
      A* dc_out = Cell::has_c ? p_.cells.at(shape_, t, n) : nullptr;
      for (int v = 0; v < vectors; ++v) {
        const int64_t unit = first_unit + v * w;
        with_lanes<w>(H - unit, [&](auto valid) __attribute__((always_inline)) {
          const auto load_or_zero = [&](const A* from, int64_t at) __attribute__((always_inline)) {
            return from ? load(from + at + unit, valid) : V{};
          };
          V saved[Cell::saved + 1], dwxv[G], drhv[G];
          for (int k = 0; k < Cell::saved; ++k) saved[k] = load(gates + k * H + unit, valid);
          for (int g = 0; g < G; ++g) {
            dwxv[g] = load_or_zero(dwx, g * H);
            drhv[g] = load(rh + i * width + (v * G + g) * w) + load_or_zero(drh, g * H);
            store(drh_out + g * H + unit, drhv[g], valid);
          }
          State<V> prev{}, state{}, dprev{};
          if constexpr (Cell::reads_h) prev.h = load_or_zero(h_prev, 0), state.h = load(h + unit, valid);
          if constexpr (Cell::carries_h) dprev.h = load(dh_prev + i * ldh + unit, valid);
          if constexpr (Cell::has_c) {
            prev.c = load_or_zero(c_prev, 0), state.c = load(c + unit, valid);
            dprev.c = load(dc_prev + i * ldc + unit, valid);
          }
          const State<V> change = tangent<Cell>(saved, prev, state, dwxv, drhv, dprev);
          store(dh_out + unit, change.h + load_or_zero(dy, 0), valid);
          if constexpr (Cell::has_c) store(dc_out + unit, change.c, valid);
        });
      }
    }
  }

  // o * tanh(c) of entry n, that a projection takes to h; backward needs it too.
  S* h_full(int64_t t, int64_t n) const {
    return save ? p_.gates.at(shape_, t, n) + Cell::saved * shape_.H : h_full_ + n * shape_.H;
  }

  // h = W_hr h_full
  void project_output(Thread& thread, int64_t t, Range n) {
    thread.group.meet();
    const Range panels = panels_of(w_hr_, thread);
    const int width = w_hr_.width();
    for (int64_t panel = panels.begin; panel < panels.end; ++panel)
      for_blocks(n, [&](int64_t b, int64_t count) {
        w_hr_.multiply(panel, count, h_full(t, b), save ? p_.gates.row : shape_.H, thread.rh, width);
        for (int64_t i = 0; i < count; ++i)
          for (int v = 0; v < w_hr_.unit_vectors(panel); ++v) {
            const int64_t unit = w_hr_.first_unit(panel) + v * w, valid = std::min<int64_t>(w, shape_.P - unit);
            V h = load(thread.rh + i * width + v * w);
            if constexpr (purpose == Purpose::tangent)
              if (p_.tangent.dy.data) h += load(p_.tangent.dy.at(shape_, t, b + i) + unit, valid);
            store(p_.y.at(shape_, t, b + i) + unit, h, valid);
          }
      });
  }

  // h_n and c_n: each entry's state after the last step that it has in this direction.
  void finish(const Thread& thread) {
    const int64_t H = shape_.H, P = shape_.P;
    int64_t t = shape_.T - 1;
    for (int64_t n = thread.n.begin; n < thread.n.end; ++n) {
      if (n % thread.group.size != thread.group.id) continue;
      if (shape_.reverse)
        t = 0;
      else
        while (shape_.batch(t) <= n) --t;
      std::memcpy(p_.h_n + n * P, p_.y.at(shape_, t, n), P * sizeof(S));
      if constexpr (Cell::has_c)
        copy_or_zero(p_.c_n + n * H, const_cast<const A*>(keeps_c ? p_.cells.at(shape_, t, n) : c_ + n * H), H);
    }
  }

  const Forward<S>& p_;
  const Shape& shape_;
  const int threads_;
  Arena arena_;
  Matrix<S> w_ih_, w_hh_, w_hr_;
  Groups groups_;
  A* c_;       // [N, H]: c0; without saving, c of the last step
  S* zeros_;   // [P]: a row of h0 where there is none
  S* h_full_;  // [N, H]: see h_full
  A* wx_;      // [threads, wx_size_]
  S* x_;       // [threads, x_size_]
  A* rh_;      // [threads, rh_size_]
  int64_t wx_size_, x_size_, rh_size_;
};

}  // namespace fusedrnn::FUSEDRNN_ISA
