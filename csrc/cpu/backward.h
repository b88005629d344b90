// The backward pass of one direction of a layer: step by step in reverse, dh = drh(t + 1) W_hh + dy and the cell's
// backward on it, tile by tile; after the last step the input's and the weights' gradients as large products.
#pragma once

#include "outer_product.h"

namespace fusedrnn::FUSEDRNN_ISA {

// The gate gradients of a row, dgates [slots, H]. Gates whose wx and rh have the same gradient are stored once:
//   slots:  rh of the other gates | the shared gates | wx of the other gates
// so that drh and dwx are both G adjoining slots. drh's slots hold the gates rotated by `shared`, dwx's in order.
template <class Cell>
struct Slots {
  static constexpr int other = Cell::gates - Cell::shared;
  static constexpr int count = Cell::gates + other;
  static constexpr int dwx(int gate) { return other + gate; }
  static constexpr int drh(int gate) { return gate < Cell::shared ? other + gate : gate - Cell::shared; }
};

template <class Cell, class S>
class BackwardPass {
  using A = Acc<S>;
  using V = AccVec<S>;
  using Slot = Slots<Cell>;
  static constexpr int w = lanes<S>, G = Cell::gates;

 public:
  BackwardPass(const Backward<S>& p, int threads) : p_(p), shape_(p.shape), threads_(threads) {
    const auto [N, I, H, P] = std::array{shape_.N, shape_.I, shape_.H, shape_.P};
    w_hh_ = {.K = G * H, .units = P, .columns = p.weights.w_hh, .shift = Cell::shared * H};
    w_ih_ = {.K = G * H, .units = I, .columns = p.weights.w_ih, .shift = 0};
    w_hr_ = {.K = P, .units = H, .columns = p.weights.w_hr, .shift = 0};
    // A cache line more: rows a power of two apart would all fall into the same few places of the cache.
    ldg_ = Slot::count * H + 64 / int64_t(sizeof(S));
    arena_.allocate([&, N = N, I = I, H = H, P = P](Arena& arena) {
      layout_matrix(arena, w_hh_, true);
      layout_matrix(arena, w_ih_, p_.dx != nullptr);
      layout_matrix(arena, w_hr_, shape_.projected);
      groups_.layout(arena, threads_);
      dgates_ = arena.take<S>(shape_.rows() * ldg_);
      dh_projected_ = arena.take<S>(shape_.projected ? shape_.rows() * P : 0);
      dh_ = arena.take<A>(N * P);
      dc_ = arena.take<A>(Cell::has_c ? N * H : 0);
      c0_ = arena.take<A>(Cell::has_c ? N * H : 0);
      zeros_ = arena.take<S>(std::max(H, P));
      dh_block_ = arena.take<A>(threads_ * product_size<S>);
      products_ = arena.take<OuterProduct<S>>(threads_);
      for (int i = 0; i < threads_; ++i) {
        OuterProduct<S> product;
        product.layout(arena, shape_.rows(), divide_up(G * H, threads_) + 1, std::max(I + P, H));
        if (products_) products_[i] = product;
      }
    });
  }

  // The time loop, by the direction's team.
  void run(const Member& me) {
    const Matrix<S>& widest = shape_.projected ? w_hr_ : w_hh_;
    const Split split = plan_split(me.size, double(shape_.rows()) / shape_.T, widest.panel_count(),
                                   double(w_hh_.panels_size()) / widest.panel_count() * sizeof(S));
    prepare(me);
    me.meet();
    if (me.id >= split.threads()) return;
    const Part part = groups_.part(shape_, split, me.id);
    A* block = dh_block_ + me.id * product_size<S>;
    for (int64_t s = shape_.T - 1; s >= -1; --s) step(part, block, s);
    if (Cell::has_c && p_.dc0) {
      const Range units = part_of(shape_.H, part.group.id, part.group.size);
      for (int64_t n = part.n.begin; n < part.n.end; ++n)
        copy_or_zero(p_.dc0 + n * shape_.H + units.begin, const_cast<const A*>(dc_ + n * shape_.H + units.begin),
                     units.size());
    }
  }

  // dx and the weight gradients, after every thread of the time loop is done; by the op's whole team.
  void products(const Member& me) {
    using Target = typename OuterProduct<S>::Target;
    if (p_.dx) input_gradient(me);
    const int64_t H = shape_.H, GH = G * H, rows = shape_.rows();
    const auto x = [&](int64_t r, int64_t count, const S** to) { x_rows(r, count, to); };
    const auto h_prev = [&](int64_t r, int64_t count, const S** to) { h_prev_rows(r, count, to); };
    const auto h_full = [&](int64_t r, int64_t count, const S** to) { h_full_rows(r, count, to); };
    const Target w_ih{p_.dw_ih, p_.db_ih, shape_.I, x}, w_hh{p_.dw_hh, p_.db_hh, shape_.P, h_prev};
    const Target w_hr{p_.dw_hr, nullptr, H, h_full};
    OuterProduct<S>& product = products_[me.id];
    for (int part = me.id; part < threads_; part += me.size) {  // a part for each thread, should all have come
      const Range m = part_of(GH, part, threads_);
      const S* dwx = dgates_ + Slot::other * H;
      if constexpr (Slot::other == 0) {
        product.run(rows, dwx, ldg_, GH, m, 0, {w_ih, w_hh});
      } else {
        product.run(rows, dwx, ldg_, GH, m, 0, {w_ih});
        product.run(rows, dgates_, ldg_, GH, m, Cell::shared * H, {w_hh});
      }
      if (p_.dw_hr) product.run(rows, dh_projected_, shape_.P, shape_.P, part_of(shape_.P, part, threads_), 0, {w_hr});
    }
  }

 private:
  void prepare(const Member& me) {
    pack_share(w_hh_, me);
    if (p_.dx) pack_share(w_ih_, me);
    if (shape_.projected) pack_share(w_hr_, me);
    const Range n = part_of(shape_.N, me.id, me.size);
    const int64_t H = shape_.H, P = shape_.P;
    copy_or_zero(dh_ + n.begin * P, p_.dh_n ? p_.dh_n + n.begin * P : nullptr, n.size() * P);
    if (Cell::has_c) {
      copy_or_zero(dc_ + n.begin * H, p_.dc_n ? p_.dc_n + n.begin * H : nullptr, n.size() * H);
      copy_or_zero(c0_ + n.begin * H, p_.c0 ? p_.c0 + n.begin * H : nullptr, n.size() * H);
    }
    if (me.id == 0) copy_or_zero(zeros_, static_cast<const S*>(nullptr), std::max(H, P));
  }

  // Step s of the forward order; s = -1 is what remains for h0.
  void step(const Part& part, A* block, int64_t s) {
    const int64_t now = shape_.step_batch(s), later = shape_.step_batch(s + 1);
    const auto within = [&](int64_t n) { return std::clamp(n, part.n.begin, part.n.end); };
    const Range continued{part.n.begin, within(std::min(now, later))};       // they have a step s + 1
    const Range ended{within(later), std::max(within(later), within(now))};  // this is their last step
    const Range started{within(now), std::max(within(now), within(later))};  // step s + 1 was their first
    const Range panels = part_of(w_hh_.panel_count(), part.group.id, part.group.size);
    const int width = w_hh_.width();
    for (int64_t i = 0; i < panels.size(); ++i) {
      // Back and forth, so that a step begins with the weights that the last one left in the cache.
      const int64_t panel = s & 1 ? panels.end - 1 - i : panels.begin + i;
      for_blocks(continued, [&](int64_t n, int64_t count) {
        w_hh_.multiply(panel, count, drh(s + 1, n), ldg_, block, width);
        hidden_gradient(panel, count, block, true, Cell::carries_h, s, n);
      });
      for_blocks(ended, [&](int64_t n, int64_t count) { hidden_gradient(panel, count, block, false, true, s, n); });
      if (p_.dh0)
        for_blocks(started, [&](int64_t n, int64_t count) {
          w_hh_.multiply(panel, count, drh(s + 1, n), ldg_, block, width);
          store_dh0(panel, count, block, n);
        });
    }
    if (s < 0) return;
    if (shape_.projected) {
      part.group.meet();
      const Range hidden = part_of(w_hr_.panel_count(), part.group.id, part.group.size);
      for (int64_t panel = hidden.begin; panel < hidden.end; ++panel)
        for_blocks({part.n.begin, within(now)}, [&](int64_t n, int64_t count) {
          const S* dh = dh_projected_ + (shape_.offset[shape_.time(s)] + n) * shape_.P;
          w_hr_.multiply(panel, count, dh, shape_.P, block, w_hr_.width());
          cell(w_hr_, panel, count, block, s, n);
        });
    }
    part.group.meet();
  }

  S* drh(int64_t s, int64_t n) const { return dgates_ + (shape_.offset[shape_.time(s)] + n) * ldg_; }

  // dL/dh of a block: from the later step (if in the block already), from dh_n or carried (dh_), and from dy; then the
  // cell's backward on it, unless a projection lies between.
  void hidden_gradient(int64_t panel, int64_t count, A* block, bool in_block, bool add_dh, int64_t s, int64_t n) {
    const int64_t t = shape_.time(s), P = shape_.P;
    const int width = w_hh_.width();
    for (int64_t i = 0; i < count; ++i)
      for (int v = 0; v < w_hh_.unit_vectors(panel); ++v) {
        const int64_t unit = w_hh_.first_unit(panel) + v * w;
        with_lanes<w>(P - unit, [&](auto valid) __attribute__((always_inline)) {
          V dh{};
          if (in_block) dh = load(block + i * width + v * w);
          if (add_dh) dh += load(dh_ + (n + i) * P + unit, valid);
          if (p_.dy.data) dh += load(p_.dy.at(shape_, t, n + i) + unit, valid);
          if (shape_.projected)
            store(dh_projected_ + (shape_.offset[t] + n + i) * P + unit, dh, valid);
          else
            store(block + i * width + v * w, dh);
        });
      }
    if (!shape_.projected) cell(w_hh_, panel, count, block, s, n);
  }

  // The cell's backward on a block of dL/dh [count, width of the panel].
  void cell(const Matrix<S>& matrix, int64_t panel, int64_t count, const A* dh, int64_t s, int64_t n) {
    const int64_t t = shape_.time(s), H = shape_.H, carried = shape_.step_batch(s - 1);
    const int64_t before = s > 0 ? shape_.time(s - 1) : t;
    const int width = matrix.width();
    for (int64_t i = 0; i < count; ++i) {
      const int64_t b = n + i;
      const S* gates = Cell::saved ? p_.gates.at(shape_, t, b) : nullptr;
      const A* c = Cell::has_c ? p_.cells.at(shape_, t, b) : nullptr;
      const A* c_prev = !Cell::has_c ? nullptr : b < carried ? p_.cells.at(shape_, before, b) : c0_ + b * H;
      const A* dcells = p_.dcells.data ? p_.dcells.at(shape_, t, b) : nullptr;
      const S* h = p_.y.at(shape_, t, b);
      const S* h_prev = h_before(before, b, carried);
      S* dgates = drh(s, b);
      for (int v = 0; v < matrix.unit_vectors(panel); ++v) {
        const int64_t unit = matrix.first_unit(panel) + v * w;
        // The next row's: the forward pass wrote them long ago.
        for (int k = 0; k < Cell::saved; ++k) __builtin_prefetch(gates + p_.gates.row + k * H + unit);
        if (Cell::has_c) __builtin_prefetch(c_prev + p_.cells.row + unit);
        with_lanes<w>(H - unit, [&](auto valid) __attribute__((always_inline)) {
          V saved[Cell::saved + 1], dwx[G], drh[G];
          for (int k = 0; k < Cell::saved; ++k) saved[k] = load(gates + k * H + unit, valid);
          State<V> prev{}, state{}, d{};
          if constexpr (Cell::reads_h) {
            prev.h = load(h_prev + unit, valid);
            state.h = load(h + unit, valid);
          }
          if constexpr (Cell::has_c) {
            prev.c = load(c_prev + unit, valid);
            state.c = load(c + unit, valid);
            d.c = load(dc_ + b * H + unit, valid);
            if (dcells) d.c += load(dcells + unit, valid);
          }
          d.h = load(dh + i * width + v * w);
          const State<V> dprev = Cell::backward(saved, prev, state, d, dwx, drh);
          for (int g = 0; g < G; ++g) {
            store(dgates + Slot::dwx(g) * H + unit, dwx[g], valid);
            if (g >= Cell::shared) store(dgates + Slot::drh(g) * H + unit, drh[g], valid);
          }
          if constexpr (Cell::carries_h) store(dh_ + b * H + unit, dprev.h, valid);
          if constexpr (Cell::has_c) store(dc_ + b * H + unit, dprev.c, valid);
        });
      }
    }
  }

  void store_dh0(int64_t panel, int64_t count, const A* block, int64_t n) {
    const int width = w_hh_.width();
    for (int64_t i = 0; i < count; ++i)
      for (int v = 0; v < w_hh_.unit_vectors(panel); ++v) {
        const int64_t unit = w_hh_.first_unit(panel) + v * w;
        const int64_t valid = std::min<int64_t>(w, shape_.P - unit);
        V dh = load(block + i * width + v * w);
        if (Cell::carries_h) dh += load(dh_ + (n + i) * shape_.P + unit, valid);
        store(p_.dh0 + (n + i) * shape_.P + unit, dh, valid);
      }
  }

  // h_prev of entry n: of the step before, at time `before`, if it is one of the `carried`; else h0 or zeros.
  const S* h_before(int64_t before, int64_t n, int64_t carried) const {
    if (n < carried) return p_.y.at(shape_, before, n);
    return p_.h0 ? p_.h0 + n * shape_.P : zeros_;
  }

  void input_gradient(const Member& me) {
    const int64_t I = shape_.I;
    A* block = dh_block_ + me.id * product_size<S>;
    const int width = w_ih_.width();
    for_blocks(part_of(shape_.rows(), me.id, me.size), [&](int64_t r, int64_t count) {
      for (int64_t panel = 0; panel < w_ih_.panel_count(); ++panel) {
        w_ih_.multiply(panel, count, dgates_ + r * ldg_ + Slot::other * shape_.H, ldg_, block, width);
        for (int64_t i = 0; i < count; ++i)
          for (int v = 0; v < w_ih_.unit_vectors(panel); ++v) {
            const int64_t unit = w_ih_.first_unit(panel) + v * w, valid = std::min<int64_t>(w, I - unit);
            S* to = p_.dx + (r + i) * I + unit;
            V dx = load(block + i * width + v * w);
            if (p_.dx_accumulate) dx += load(to, valid);
            store(to, dx, valid);
          }
      }
    });
  }

  // Calls f(i, t, n) for rows r .. r + count.
  template <class F>
  void for_rows(int64_t r, int64_t count, F f) const {
    int64_t t = std::upper_bound(shape_.offset, shape_.offset + shape_.T + 1, r) - shape_.offset - 1;
    for (int64_t i = 0; i < count; ++i) {
      while (r + i >= shape_.offset[t + 1]) ++t;
      f(i, t, r + i - shape_.offset[t]);
    }
  }

  void x_rows(int64_t r, int64_t count, const S** to) const {
    for_rows(r, count, [&](int64_t i, int64_t t, int64_t n) { to[i] = p_.x.at(shape_, t, n); });
  }

  void h_prev_rows(int64_t r, int64_t count, const S** to) const {
    for_rows(r, count, [&](int64_t i, int64_t t, int64_t n) {
      const int64_t s = shape_.time(t);  // time is its own inverse
      to[i] = h_before(s > 0 ? shape_.time(s - 1) : t, n, shape_.step_batch(s - 1));
    });
  }

  void h_full_rows(int64_t r, int64_t count, const S** to) const {
    for (int64_t i = 0; i < count; ++i) to[i] = p_.gates.data + (r + i) * p_.gates.row + Cell::saved * shape_.H;
  }

  const Backward<S>& p_;
  const Shape& shape_;
  const int threads_;
  Arena arena_;
  Matrix<S> w_ih_, w_hh_, w_hr_;
  Groups groups_;
  int64_t ldg_;                // elements between rows of dgates
  S* dgates_;                  // [rows, slots, H]
  S* dh_projected_;            // [rows, P]: dL/dh, before a projection's backward
  A* dh_;                      // [N, P]: dh_n, then what the cell carries to h_prev
  A* dc_;                      // [N, H]: dc_n, then dL/dc of the step before
  A* c0_;                      // [N, H]
  S* zeros_;                   // a row of h0 where there is none
  A* dh_block_;                // [threads, product_size]: dL/dh of a block
  OuterProduct<S>* products_;  // [threads]
};

}  // namespace fusedrnn::FUSEDRNN_ISA
