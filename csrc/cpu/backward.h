// The backward pass of one direction of a layer: step by step in reverse, dh = drh(t + 1) W_hh + dy and the cell's
// backward on it, tile by tile; after each chunk of steps the input's and the weights' gradients as large products.
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
  static constexpr int rows_ahead = 4;  // how early rows are fetched that were written long ago
  static constexpr int64_t chunk_bytes = 512 << 10, min_chunk_rows = 256, max_chunk_rows = 2048;

 public:
  BackwardPass(const Backward<S>& p, int threads) : p_(p), shape_(p.shape), threads_(threads), parts_(threads) {
    const auto [N, I, H, P] = std::array{shape_.N, shape_.I, shape_.H, shape_.P};
    w_hh_ = {.K = G * H, .units = P, .columns = p.weights.w_hh, .shift = Cell::shared * H, .most_rows = N};
    w_ih_ = {.K = G * H, .units = I, .columns = p.weights.w_ih, .shift = 0, .most_rows = shape_.rows()};
    w_hr_ = {.K = P, .units = H, .columns = p.weights.w_hr, .shift = 0, .most_rows = N};
    // A cache line more: rows a power of two apart would all fall into the same few places of the cache.
    ldg_ = Slot::count * H + 64 / int64_t(sizeof(S));
    const int64_t chunk_rows = divide_into_chunks();
    w_ih_last_ = p_.dx && chunks() == 1 && w_ih_.panels_size() <= w_hh_.panels_size();
    list_products();
    arena_.allocate([&, N = N, I = I, H = H, P = P](Arena& arena) {
      layout_matrix(arena, w_hh_, true);
      layout_matrix(arena, w_ih_, p_.dx && !w_ih_last_);
      if (w_ih_last_) w_ih_.packed = true, w_ih_.panels = w_hh_.panels;
      layout_matrix(arena, w_hr_, shape_.projected);
      groups_.layout(arena, threads_);
      dgates_ = arena.take<S>(chunk_rows * ldg_);
      border_ = arena.take<S>(chunks() > 1 ? N * ldg_ : 0);
      dh_projected_ = arena.take<S>(shape_.projected ? chunk_rows * P : 0);
      dh_ = arena.take<A>(N * P);
      dc_ = arena.take<A>(Cell::has_c ? N * H : 0);
      c0_ = arena.take<A>(Cell::has_c ? N * H : 0);
      zeros_ = arena.take<S>(std::max(H, P));
      dh_block_ = arena.take<A>(threads_ * product_size<S>);
      for (Products& products : products_) {
        products.scratch.layout(arena, chunk_rows, std::max(I + P, H));
        for (OuterProduct<S>* product : {&products.ih, &products.hh, &products.hr}) product->layout(arena);
      }
    });
  }

  // The pass goes through the sequence in chunks of steps, from the last: first the time loop of a chunk, then the
  // products over all its rows, while its gate gradients are in the cache.
  int64_t chunks() const { return int64_t(bounds_.size()) - 1; }

  // The time loop of a chunk, by the direction's team.
  void steps(const Member& me, int64_t index) {
    if (index == 0) begin(me);
    if (index >= chunks() || me.id >= split(me).threads()) return;
    const Chunk chunk = this->chunk(index);
    const Part part = parts_[me.id];
    A* block = dh_block_ + me.id * product_size<S>;
    for (int64_t s = chunk.steps.end - 1; s >= chunk.steps.begin; --s) step(chunk, part, block, s);
    if (chunk.steps.begin > 0) return;
    step(chunk, part, block, -1);
    if (Cell::has_c && p_.dc0) {
      const Range units = part_of(shape_.H, part.group.id, part.group.size);
      for (int64_t n = part.n.begin; n < part.n.end; ++n)
        copy_or_zero(p_.dc0 + n * shape_.H + units.begin, const_cast<const A*>(dc_ + n * shape_.H + units.begin),
                     units.size());
    }
  }

  // dx of a chunk's rows, and what they add to the weight gradients, after every thread is done with the chunk's time
  // loop; by the op's whole team.
  void products(const Member& me, int64_t index) {
    if (index >= chunks()) return;
    const Chunk chunk = this->chunk(index);
    if (w_ih_last_) {
      pack_share(w_ih_, input_part(me, 0));
      me.meet();
    }
    if (p_.dx) input_gradient(me, chunk);
    for (int i = me.id; i < threads_; i += me.size) {  // a part for each thread, should all have come
      Products& products = products_[i];
      products.ih.add(products.scratch, chunk.row, chunk.rows, dgates_ + Slot::other * shape_.H, ldg_);
      products.hh.add(products.scratch, chunk.row, chunk.rows, dgates_, ldg_);
      products.hr.add(products.scratch, chunk.row, chunk.rows, dh_projected_, shape_.P);
    }
    if (chunk.steps.begin == 0) return;
    // The next chunk's last step needs drh of this chunk's first.
    const Range n = part_of(shape_.step_batch(chunk.steps.begin), me.id, me.size);
    std::memcpy(border_ + n.begin * ldg_, drh(chunk, chunk.steps.begin, n.begin), n.size() * ldg_ * sizeof(S));
  }

  // The weight gradients, after the last chunk.
  void finish(const Member& me) {
    for (int i = me.id; i < threads_; i += me.size)
      for (const OuterProduct<S>* product : {&products_[i].ih, &products_[i].hh, &products_[i].hr}) product->write();
  }

 private:
  // A run of steps and the rows of the sequence that it has.
  struct Chunk {
    Range steps;
    int64_t row, rows;
  };
  // Of one thread; hh has nothing to do where drh is dwx, and ih does both.
  struct Products {
    typename OuterProduct<S>::Scratch scratch;
    OuterProduct<S> ih, hh, hr;
  };

  // Sets bounds_; returns the rows of the largest chunk.
  int64_t divide_into_chunks() {
    const int64_t most = std::clamp<int64_t>(chunk_bytes / (ldg_ * sizeof(S)), min_chunk_rows, max_chunk_rows);
    int64_t rows = 0, largest = 0;
    bounds_.push_back(shape_.T);
    for (int64_t s = shape_.T - 1; s >= 0; --s) {
      const int64_t batch = shape_.step_batch(s);
      if (rows > 0 && rows + batch > most) bounds_.push_back(s + 1), rows = 0;
      rows += batch;
      largest = std::max(largest, rows);
    }
    bounds_.push_back(0);
    return largest;
  }
  Chunk chunk(int64_t index) const {
    const Range steps{bounds_[index + 1], bounds_[index]};
    const int64_t low = std::min(shape_.time(steps.begin), shape_.time(steps.end - 1));
    return {steps, shape_.offset[low], shape_.offset[low + steps.size()] - shape_.offset[low]};
  }

  void list_products() {
    using Target = typename OuterProduct<S>::Target;
    const auto rows = [this](auto method) {
      return [this, method](int64_t r, int64_t count, const S** to) { (this->*method)(r, count, to); };
    };
    const int64_t H = shape_.H, P = shape_.P, GH = G * H;
    const Target ih{p_.dw_ih, p_.db_ih, shape_.I, rows(&BackwardPass::x_rows)};
    const Target hh{p_.dw_hh, p_.db_hh, P, rows(&BackwardPass::h_prev_rows)};
    const Target hr{p_.dw_hr, nullptr, H, rows(&BackwardPass::h_full_rows)};
    using Targets = std::vector<Target>;
    for (int i = 0; i < threads_; ++i) {
      const Range m = part_of(GH, i, threads_);
      const bool together = Slot::other == 0;
      products_.push_back({{},
                           {GH, m, 0, together ? Targets{ih, hh} : Targets{ih}},
                           {GH, m, Cell::shared * H, together ? Targets{} : Targets{hh}},
                           {P, part_of(P, i, threads_), 0, shape_.projected ? Targets{hr} : Targets{}}});
    }
  }

  void begin(const Member& me) {
    if (p_.dx && !w_ih_last_) pack_share(w_ih_, input_part(me, 0));
    const Range n = part_of(shape_.N, me.id, me.size);
    const int64_t H = shape_.H, P = shape_.P;
    copy_or_zero(dh_ + n.begin * P, p_.dh_n ? p_.dh_n + n.begin * P : nullptr, n.size() * P);
    if (Cell::has_c) {
      copy_or_zero(dc_ + n.begin * H, p_.dc_n ? p_.dc_n + n.begin * H : nullptr, n.size() * H);
      copy_or_zero(c0_ + n.begin * H, p_.c0 ? p_.c0 + n.begin * H : nullptr, n.size() * H);
    }
    if (me.id == 0) copy_or_zero(zeros_, static_cast<const S*>(nullptr), std::max(H, P));
    const Split split = this->split(me);
    if (me.id < split.threads()) {
      const Part& part = parts_[me.id] = groups_.part(shape_, split, me.id);
      pack_share(w_hh_, part);
      if (shape_.projected) pack_share(w_hr_, part);
    }
    me.meet();
  }
  Split split(const Member& me) const {
    const Matrix<S>& widest = shape_.projected ? w_hr_ : w_hh_;
    return plan_split(me.size, double(shape_.rows()) / shape_.T, widest.panel_count(),
                      double(w_hh_.panels_size()) / widest.panel_count() * sizeof(S), 1.0 / shape_.T);
  }

  // Step s of the forward order; s = -1 is what remains for h0.
  void step(const Chunk& chunk, const Part& part, A* block, int64_t s) {
    const int64_t now = shape_.step_batch(s), later = shape_.step_batch(s + 1);
    const auto within = [&](int64_t n) { return std::clamp(n, part.n.begin, part.n.end); };
    const Range continued{part.n.begin, within(std::min(now, later))};       // they have a step s + 1
    const Range ended{within(later), std::max(within(later), within(now))};  // this is their last step
    const Range started{within(now), std::max(within(now), within(later))};  // step s + 1 was their first
    const Range panels = panels_of(w_hh_, part);
    const int width = w_hh_.width();
    for (int64_t i = 0; i < panels.size(); ++i) {
      // Back and forth, so that a step begins with the weights that the last one left in the cache.
      const int64_t panel = s & 1 ? panels.end - 1 - i : panels.begin + i;
      for_blocks(continued, [&](int64_t n, int64_t count) {
        w_hh_.multiply(panel, count, drh(chunk, s + 1, n), ldg_, block, width);
        hidden_gradient(panel, count, block, true, Cell::carries_h, chunk, s, n);
      });
      for_blocks(ended,
                 [&](int64_t n, int64_t count) { hidden_gradient(panel, count, block, false, true, chunk, s, n); });
      if (p_.dh0)
        for_blocks(started, [&](int64_t n, int64_t count) {
          w_hh_.multiply(panel, count, drh(chunk, s + 1, n), ldg_, block, width);
          store_dh0(panel, count, block, n);
        });
    }
    if (s < 0) return;
    if (shape_.projected) {
      part.group.meet();
      const Range hidden = panels_of(w_hr_, part);
      for (int64_t panel = hidden.begin; panel < hidden.end; ++panel)
        for_blocks({part.n.begin, within(now)}, [&](int64_t n, int64_t count) {
          w_hr_.multiply(panel, count, dh_projected(chunk, s, n), shape_.P, block, w_hr_.width());
          cell(w_hr_, panel, count, chunk, s, n,
               [&](int64_t i, int v, int64_t, auto) { return load(block + i * w_hr_.width() + v * w); });
        });
    }
    part.group.meet();
  }

  // A chunk's rows begin with its first one; beside them is the next chunk's first step.
  S* drh(const Chunk& chunk, int64_t s, int64_t n) const {
    if (s == chunk.steps.end) return border_ + n * ldg_;
    return dgates_ + (shape_.offset[shape_.time(s)] - chunk.row + n) * ldg_;
  }
  S* dh_projected(const Chunk& chunk, int64_t s, int64_t n) const {
    return dh_projected_ + (shape_.offset[shape_.time(s)] - chunk.row + n) * shape_.P;
  }

  // dL/dh of a block: from the later step (if in the block already), from dh_n or carried (dh_), and from dy; then the
  // cell's backward on it, unless a projection lies between.
  void hidden_gradient(int64_t panel, int64_t count, const A* block, bool in_block, bool add_dh, const Chunk& chunk,
                       int64_t s, int64_t n) {
    const int64_t t = shape_.time(s), P = shape_.P;
    const int width = w_hh_.width();
    const auto dh = [&](int64_t i, int v, int64_t unit, auto valid) __attribute__((always_inline)) {
      V sum{};
      if (in_block) sum = load(block + i * width + v * w);
      if (add_dh) sum += load(dh_ + (n + i) * P + unit, valid);
      if (p_.dy.data) {
        const S* dy = p_.dy.at(shape_, t, n + i) + unit;
        __builtin_prefetch(dy + rows_ahead * p_.dy.row);
        sum += load(dy, valid);
      }
      if (p_.dh.data) store(p_.dh.at(shape_, t, n + i) + unit, sum, valid);
      return sum;
    };
    if (!shape_.projected) return cell(w_hh_, panel, count, chunk, s, n, dh);
    for (int64_t i = 0; i < count; ++i)
      for (int v = 0; v < w_hh_.unit_vectors(panel); ++v) {
        const int64_t unit = w_hh_.first_unit(panel) + v * w;
        with_lanes<w>(P - unit, [&](auto valid) __attribute__((always_inline)) {
          store(dh_projected(chunk, s, n + i) + unit, dh(i, v, unit, valid), valid);
        });
      }
  }

  // The cell's backward on `count` entries from n and the units of a panel; dh(i, v, unit, valid) is dL/dh of entry
  // n + i and the v-th vector of units.
  template <class Dh>
  void cell(const Matrix<S>& matrix, int64_t panel, int64_t count, const Chunk& chunk, int64_t s, int64_t n, Dh dh) {
    const int64_t t = shape_.time(s), H = shape_.H, carried = shape_.step_batch(s - 1);
    const int64_t before = s > 0 ? shape_.time(s - 1) : t, first_unit = matrix.first_unit(panel);
    const int vectors = matrix.unit_vectors(panel);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t b = n + i;
      const S* gates = Cell::saved ? p_.gates.at(shape_, t, b) : nullptr;
      const A* c = Cell::has_c ? p_.cells.at(shape_, t, b) : nullptr;
      const A* c_prev = !Cell::has_c ? nullptr : b < carried ? p_.cells.at(shape_, before, b) : c0_ + b * H;
      const A* dcells = p_.dcells.data ? p_.dcells.at(shape_, t, b) : nullptr;
      const S* h = p_.y.at(shape_, t, b);
      const S* h_prev = h_before(before, b, carried);
      S* dgates = drh(chunk, s, b);
      S* dwx_out = p_.dwx.data ? p_.dwx.at(shape_, t, b) : nullptr;
      S* drh_out = p_.drh.data ? p_.drh.at(shape_, t, b) : nullptr;
      for (int v = 0; v < vectors; ++v) {
        const int64_t unit = first_unit + v * w;
        for (int k = 0; k < Cell::saved; ++k) __builtin_prefetch(gates + rows_ahead * p_.gates.row + k * H + unit);
        if (Cell::has_c) __builtin_prefetch(c_prev + rows_ahead * p_.cells.row + unit);
        if (Cell::reads_h) __builtin_prefetch(h_prev + rows_ahead * p_.y.row + unit);
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
            if (p_.dc.data) store(p_.dc.at(shape_, t, b) + unit, d.c, valid);
          }
          d.h = dh(i, v, unit, valid);
          const State<V> dprev = Cell::backward(saved, prev, state, d, dwx, drh);
          for (int g = 0; g < G; ++g) {
            store(dgates + Slot::dwx(g) * H + unit, dwx[g], valid);
            if (g >= Cell::shared) store(dgates + Slot::drh(g) * H + unit, drh[g], valid);
            if (dwx_out) store(dwx_out + g * H + unit, dwx[g], valid);
            if (drh_out) store(drh_out + g * H + unit, drh[g], valid);
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

  // A thread's part of dx of some rows: of few rows some columns, as that leaves each its own weights to fetch.
  Part input_part(const Member& me, int64_t rows) const {
    if (shape_.rows() < shape_.I && w_ih_.panel_count() % me.size == 0) return {{0, rows}, me, 0, 1};
    return {part_of(rows, me.id, me.size), {0, 1, nullptr}, me.id, me.size};
  }

  void input_gradient(const Member& me, const Chunk& chunk) {
    const int64_t I = shape_.I;
    const Part part = input_part(me, chunk.rows);
    const Range panels = panels_of(w_ih_, part);
    A* block = dh_block_ + me.id * product_size<S>;
    const int width = w_ih_.width();
    for_blocks(part.n, [&](int64_t r, int64_t count) {
      for (int64_t panel = panels.begin; panel < panels.end; ++panel) {
        const int64_t first_unit = w_ih_.first_unit(panel);
        const int vectors = w_ih_.unit_vectors(panel);
        w_ih_.multiply(panel, count, dgates_ + r * ldg_ + Slot::other * shape_.H, ldg_, block, width);
        for (int64_t i = 0; i < count; ++i)
          for (int v = 0; v < vectors; ++v) {
            const int64_t unit = first_unit + v * w, valid = std::min<int64_t>(w, I - unit);
            S* to = p_.dx + (chunk.row + r + i) * I + unit;
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
  bool w_ih_last_;  // W_ih's panels take the place of W_hh's: after the only chunk's steps nobody needs those
  Groups groups_;
  int64_t ldg_;                     // elements between rows of dgates
  S* dgates_;                       // [rows of a chunk, slots, H]
  S* border_;                       // [N, slots, H]: of the step after the chunk
  S* dh_projected_;                 // [rows of a chunk, P]: dL/dh, before a projection's backward
  A* dh_;                           // [N, P]: dh_n, then what the cell carries to h_prev
  A* dc_;                           // [N, H]: dc_n, then dL/dc of the step before
  A* c0_;                           // [N, H]
  S* zeros_;                        // a row of h0 where there is none
  A* dh_block_;                     // [threads, product_size]: dL/dh of a block
  std::vector<int64_t> bounds_;     // chunk i has steps bounds_[i + 1] .. bounds_[i] - 1
  std::vector<Part> parts_;         // [threads]
  std::vector<Products> products_;  // [threads]
};

}  // namespace fusedrnn::FUSEDRNN_ISA
