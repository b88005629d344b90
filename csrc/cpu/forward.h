// The forward pass of one direction of a layer: for each chunk of time steps the input projection
// wx = W_ih x + b_ih, then step by step rh = W_hh h_prev + b_hh and the cell on both, tile by tile.
#pragma once

#include "recurrence.h"

namespace fusedrnn::FUSEDRNN_ISA {

template <class Cell, class S, bool save>
class ForwardPass {
  using A = Acc<S>;
  using V = AccVec<S>;
  static constexpr int w = lanes<S>, G = Cell::gates;
  static_assert(G <= max_vectors);

 public:
  ForwardPass(const Forward<S>& p, int threads) : p_(p), shape_(p.shape), threads_(threads) {
    const auto [T, N, I, H, P] = std::array{shape_.T, shape_.N, shape_.I, shape_.H, shape_.P};
    w_ih_ = {.K = I, .units = H, .gates = G, .rows = p.weights.w_ih, .bias = p.weights.b_ih};
    w_hh_ = {.K = P, .units = H, .gates = G, .rows = p.weights.w_hh, .bias = p.weights.b_hh};
    w_hr_ = {.K = H, .units = P, .rows = p.weights.w_hr};
    arena_.allocate([&, N = N, I = I, H = H, P = P](Arena& arena) {
      const int64_t rows = shape_.rows();
      const bool packed = rows >= min_rows_to_pack;
      layout_matrix(arena, w_ih_, packed);
      layout_matrix(arena, w_hh_, packed);
      if (shape_.projected) layout_matrix(arena, w_hr_, packed);
      groups_.layout(arena, threads_);
      c_ = arena.take<A>(Cell::has_c ? N * H : 0);
      zeros_ = arena.take<S>(P);
      h_full_ = arena.take<S>(shape_.projected && !save ? N * H : 0);
      wx_size_ = std::max<int64_t>(wx_budget, N * w_ih_.panel_count() * w_ih_.width());
      wx_ = arena.take<A>(threads_ * wx_size_);
      x_size_ = std::max(N, max_chunk_rows) * I;
      x_ = arena.take<S>(threads_ * x_size_);
      rh_ = arena.take<A>(threads_ * tile_size);
    });
  }

  void run(const Member& me) {
    const Split split = plan_split(me.size, double(shape_.rows()) / shape_.T, w_hh_.panel_count(),
                                   double(w_hh_.width() * w_hh_.K * sizeof(S)));
    prepare(me);
    me.meet();
    if (me.id >= split.threads()) return;
    const Part part = groups_.part(shape_, split, me.id);
    Thread thread{part,
                  part_of(w_hh_.panel_count(), part.group.id, part.group.size),
                  wx_ + me.id * wx_size_,
                  x_ + me.id * x_size_,
                  rh_ + me.id * tile_size,
                  0};
    for (int64_t s = 0; s < shape_.T;) {
      const int64_t end = chunk_end(thread, s);
      project_input(thread, s, end);
      for (; s < end; ++s) step(thread, s);
    }
    finish(thread);
  }

 private:
  static constexpr int64_t min_rows_to_pack = 8, max_chunk_rows = 96;
  static constexpr int64_t wx_budget = 256 * 1024 / sizeof(A);
  static constexpr int64_t tile_size = 14 * max_vectors * w;

  struct Thread : Part {
    Range panels;      // of w_ih and w_hh
    A* wx;             // [rows of the chunk, panels, width]
    S* x;              // [rows of the chunk, I] where x itself is not in that form
    A* rh;             // a tile's product
    int64_t low_time;  // the chunk's earliest time step
  };

  void prepare(const Member& me) {
    pack_share(w_ih_, me);
    pack_share(w_hh_, me);
    if (shape_.projected) pack_share(w_hr_, me);
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
    const int64_t most = std::min(max_chunk_rows, wx_budget / (std::max<int64_t>(1, thread.panels.size()) * w_ih_.width()));
    int64_t rows = active(shape_, thread, shape_.time(s)).size();
    for (++s; s < shape_.T; ++s) {
      rows += active(shape_, thread, shape_.time(s)).size();
      if (rows > most) break;
    }
    return s;
  }

  // wx of this thread's rows and units; rows in the order of time, whatever the direction.
  void project_input(Thread& thread, int64_t s, int64_t end) {
    const int64_t I = shape_.I, low = std::min(shape_.time(s), shape_.time(end - 1)), high = low + (end - s);
    thread.low_time = low;
    int64_t rows = 0;
    for (int64_t t = low; t < high; ++t) rows += active(shape_, thread, t).size();
    const S* x = p_.x.at(shape_, low, thread.n.begin);
    int64_t ldx = p_.x.row;
    const bool whole_batch = thread.n.size() == shape_.N;
    const bool adjoining = high - low == 1 || (whole_batch && (p_.x.step < 0 || p_.x.step == shape_.N * ldx));
    if (!adjoining) {
      S* to = thread.x;
      for (int64_t t = low; t < high; ++t)
        for (int64_t n = active(shape_, thread, t).begin; n < active(shape_, thread, t).end; ++n, to += I)
          std::memcpy(to, p_.x.at(shape_, t, n), I * sizeof(S));
      x = thread.x;
      ldx = I;
    }
    const int64_t width = w_ih_.width(), ldwx = thread.panels.size() * width;
    for (int64_t panel = thread.panels.begin; panel < thread.panels.end; ++panel)
      for_tiles(rows, w_ih_.tile_rows(), [&](int64_t row, int m) {
        w_ih_.tile(panel, m, x + row * ldx, ldx, thread.wx + row * ldwx + (panel - thread.panels.begin) * width, ldwx);
      });
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
    const int64_t width = w_hh_.width(), ldwx = thread.panels.size() * width;

    const auto tiles_of = [&](int64_t panel, Range r, const S* h_prev, int64_t ldh, const A* c_prev, int64_t ldc) {
      for_tiles(r.size(), w_hh_.tile_rows(), [&](int64_t first, int m) {
        const int64_t b = r.begin + first;
        w_hh_.tile(panel, m, h_prev + first * ldh, ldh, thread.rh, width);
        const A* wx = thread.wx + (row + b - n.begin) * ldwx + (panel - thread.panels.begin) * width;
        cell(panel, m, wx, ldwx, thread.rh, h_prev + first * ldh, ldh, c_prev + first * ldc, ldc, t, b);
      });
    };
    for (int64_t i = 0; i < thread.panels.size(); ++i) {
      // Back and forth, so that a step begins with the weights that the last one left in the cache.
      const int64_t panel = s % 2 ? thread.panels.end - 1 - i : thread.panels.begin + i;
      const bool c_saved = save && Cell::has_c;
      tiles_of(panel, {n.begin, carried}, p_.y.at(shape_, before, n.begin), p_.y.row,
               c_saved ? p_.cells.at(shape_, before, n.begin) : c_ + n.begin * H, c_saved ? p_.cells.row : H);
      tiles_of(panel, {carried, n.end}, p_.h0 ? p_.h0 + carried * shape_.P : zeros_, p_.h0 ? shape_.P : 0,
               c_ + carried * H, H);
    }
    if (shape_.projected) project_output(thread, t, n);
    thread.group.meet();
  }

  // The cell on a tile: m entries from b at time t, the units of a panel.
  FUSEDRNN_INLINE void cell(int64_t panel, int m, const A* wx, int64_t ldwx, const A* rh, const S* h_prev, int64_t ldh,
                            const A* c_prev, int64_t ldc, int64_t t, int64_t b) {
    const int64_t H = shape_.H;
    const int vectors = w_hh_.unit_vectors(panel), width = w_hh_.width();
    for (int i = 0; i < m; ++i) {
      S* h_out = shape_.projected ? h_full(t, b + i) : p_.y.at(shape_, t, b + i);
      A* c_out = save && Cell::has_c ? p_.cells.at(shape_, t, b + i) : c_ + (b + i) * H;
      S* saved_out = save && Cell::saved ? p_.gates.at(shape_, t, b + i) : nullptr;
      for (int v = 0; v < vectors; ++v) {
        const int64_t unit = w_hh_.first_unit(panel) + v * w;
        V wxv[G], rhv[G], saved[Cell::saved + 1];
        for (int g = 0; g < G; ++g) {
          wxv[g] = load(wx + i * ldwx + (v * G + g) * w);
          rhv[g] = load(rh + i * width + (v * G + g) * w);
        }
        with_lanes<w>(shape_.H - unit, [&](auto valid) __attribute__((always_inline)) {
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

  // o * tanh(c) of entry n, that a projection takes to h; backward needs it too.
  S* h_full(int64_t t, int64_t n) const {
    return save ? p_.gates.at(shape_, t, n) + Cell::saved * shape_.H : h_full_ + n * shape_.H;
  }

  // h = W_hr h_full
  void project_output(Thread& thread, int64_t t, Range n) {
    thread.group.meet();
    const Range panels = part_of(w_hr_.panel_count(), thread.group.id, thread.group.size);
    const int width = w_hr_.width();
    for (int64_t panel = panels.begin; panel < panels.end; ++panel)
      for_tiles(n.size(), w_hr_.tile_rows(), [&](int64_t first, int m) {
        const int64_t b = n.begin + first;
        w_hr_.tile(panel, m, h_full(t, b), save ? p_.gates.row : shape_.H, thread.rh, width);
        for (int i = 0; i < m; ++i)
          for (int v = 0; v < w_hr_.unit_vectors(panel); ++v) {
            const int64_t unit = w_hr_.first_unit(panel) + v * w;
            store(p_.y.at(shape_, t, b + i) + unit, load(thread.rh + i * width + v * w),
                  std::min<int64_t>(w, shape_.P - unit));
          }
      });
  }

  // h_n and c_n: each entry's state after the last step that it has in this direction.
  void finish(const Thread& thread) {
    const int64_t H = shape_.H, P = shape_.P;
    int64_t t = shape_.T - 1;
    for (int64_t n = thread.n.begin; n < thread.n.end; ++n) {
      if (n % thread.group.size != thread.group.id) continue;
      if (shape_.reverse) t = 0;
      else while (shape_.batch(t) <= n) --t;
      std::memcpy(p_.h_n + n * P, p_.y.at(shape_, t, n), P * sizeof(S));
      if constexpr (Cell::has_c)
        copy_or_zero(p_.c_n + n * H, const_cast<const A*>(save ? p_.cells.at(shape_, t, n) : c_ + n * H), H);
    }
  }

  const Forward<S>& p_;
  const Shape& shape_;
  const int threads_;
  Arena arena_;
  Matrix<S> w_ih_, w_hh_, w_hr_;
  Groups groups_;
  A* c_;         // [N, H]: c0; without saving, c of the last step
  S* zeros_;     // [P]: a row of h0 where there is none
  S* h_full_;    // [N, H]: see h_full
  A* wx_;        // [threads, wx_size_]
  S* x_;         // [threads, x_size_]
  A* rh_;        // [threads, tile_size]
  int64_t wx_size_, x_size_;
};

}  // namespace fusedrnn::FUSEDRNN_ISA
