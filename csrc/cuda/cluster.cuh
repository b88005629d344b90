// The whole time loop of up to 8 batch entries of a direction by a cluster of blocks, each of which has some units and
// keeps their part of the recurrent weights on the chip: in registers, what is too much in shared memory. Between steps
// the blocks write into each other's shared memory (inbox.cuh).
#pragma once

#include "elements.cuh"
#include "inbox.cuh"
#include "tile.cuh"
#include "weights.cuh"

namespace fusedrnn::cuda {

constexpr int cluster_threads = cluster_warps * warp_size;
template <int apart>
using ClusterPlace = Place<cluster_columns, 1, apart>;

template <int apart>
FUSEDRNN_DEVICE ClusterPlace<apart> cluster_place(const ClusterShape& shape) {
  const Grid block = block_index();
  return {int(block.z), shape.groups, shape.columns, int(block.x) * shape.groups * units, int(block.y) * shape.columns};
}

// Divides numbers below 2^16 / by, faster than a division.
class Divisor {
 public:
  FUSEDRNN_DEVICE explicit Divisor(unsigned by) : inverse_((65536 + by - 1) / by) {}
  FUSEDRNN_DEVICE unsigned divide(unsigned n) const { return n * inverse_ >> 16; }

 private:
  unsigned inverse_;
};

template <class T>
FUSEDRNN_DEVICE T* shared_at(int64_t offset) {
  return reinterpret_cast<T*>(shared_memory() + offset);
}
FUSEDRNN_DEVICE void clear(Vector* from, const Vector* to) {
  for (from += thread_index(); from < to; from += block_threads()) *from = {};
}

// The partial sums of an element's gates.
template <int gates>
struct alignas(sizeof(float) * gate_floats(gates)) GateSums {
  float of[gate_floats(gates)];
};

// A block has all k of its units' gates: it gets all of h and sends its units' h.
template <class Cell, class Math>
FUSEDRNN_KERNEL(cluster_threads)
forward_cluster(const Forward<typename Math::Storage> p) {
  if constexpr (has_clusters) {
    using S = typename Math::Storage;
    constexpr int gates = Cell::gates;
    const ClusterShape& shape = p.cluster;
    const auto at = cluster_place<sums_apart>(shape);
    const auto& d = p.direction[at.direction];
    const int own = shape.groups * units, warp = thread_index() / warp_size, lane = thread_index() % warp_size;
    const int m_warp = warp / shape.k_warps, k_warp = warp % shape.k_warps;
    const int block_vectors = warp_size, inbox_vectors = shape.k_blocks * block_vectors;
    Vector* const h = shared_at<Vector>(shape.inbox);           // [2, k_blocks, 32], as the lanes read it
    S* const outbox = shared_at<S>(shape.outbox);               // [columns, own]
    auto* const sums = shared_at<GateSums<gates>>(shape.sums);  // [k_warps, columns, own], padded
    const int pitch = gates_pitch(shape.groups, gates);
    const unsigned own_vectors = own / Math::vector;
    const Divisor by_own_vectors(own_vectors);

    Inbox inbox(shape.blocks);
#pragma unroll 1
    for (int i = thread_index(); i < inbox_vectors; i += block_threads()) {
      const int column = i % warp_size / 4;  // of the product; the cluster has some of them
      const int64_t n = at.row + column, k = i / warp_size * Math::k + Math::k_of(i);
      const Rows<S>& h_prev = d.h[p.range.first % 2];
      const bool exists = column < at.columns && n < d.steps.N && k < h_prev.row;
      h[i] = h[inbox_vectors + i] = exists ? Math::prepare(load(h_prev.at(n) + k)) : Vector{};
    }
    clear(reinterpret_cast<Vector*>(outbox), shared_at<Vector>(shape.sums));
    const int blocks = (shape.k_blocks - k_warp + shape.k_warps - 1) / shape.k_warps;
    const WarpWeights<Math, gates, forward_near, 3> weights(
        shared_at<Vector>(shape.far) + warp * shape.far_fragments * 2 * warp_size, gates, blocks,
        [&](int g, int half, int i) {
          const int unit = at.unit + m_warp * units + half * 8 + lane / 4;
          const int k = (k_warp + i * shape.k_warps) * Math::k + Math::k_of(lane);
          return Math::prepare(load_if(unit < p.H && k < d.w_hh.row, d.w_hh.at(g * p.H + unit) + k));
        });
    ForwardCells<Cell, Math, ClusterPlace<sums_apart>> cells(p, d, at, p.range.first);
    sync_cluster();

    for (int64_t s = p.range.first; s < p.range.last; ++s) {
      if (cells.s != s) cells.fetch(s);
      if (at.row >= cells.batch) continue;  // all blocks of the cluster, or none
      inbox.receive();
      float c[gates][1][4] = {};
      const Vector* h_prev = h + inbox.buffer() * inbox_vectors + lane;
      weights.multiply(
          c, [&](int i, Vector(&b)[1][1]) { b[0][0] = h_prev[(k_warp + i * shape.k_warps) * block_vectors]; });
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int column = 2 * (lane % 4) + i % 2, m = m_warp * units + lane / 4 + i / 2 * 8;
        GateSums<gates> part{};
#pragma unroll
        for (int g = 0; g < gates; ++g) part.of[g] = c[g][0][i];
        sums[(k_warp * cluster_columns + column) * pitch + m] = part;
      }
      sync_block();
      at.each(p.H, cells.batch, [&](const Element& e) {
        outbox[e.column * own + e.m] = cells.step(e, [&](float (&rh)[gates]) {
#pragma unroll
          for (int g = 0; g < gates; ++g) rh[g] = 0;
          constexpr int at_once = 4;  // loads that are under way together
          const GateSums<gates>* from = sums + e.column * pitch + e.m;
#pragma unroll 1
          for (int w = 0; w < shape.k_warps; w += at_once, from += at_once * cluster_columns * pitch) {
            GateSums<gates> part[at_once]{};
#pragma unroll
            for (int j = 0; j < at_once; ++j) {
              if (w + j < shape.k_warps) part[j] = from[j * cluster_columns * pitch];
            }
#pragma unroll
            for (int j = 0; j < at_once; ++j) {
#pragma unroll
              for (int g = 0; g < gates; ++g) rh[g] += part[j].of[g];
            }
          }
        });
      });
      const int rows = cells.batch < cells.next_batch ? cells.batch : cells.next_batch;
      const bool goes_on = s + 1 < p.range.last && at.row < rows;
      if (goes_on) {
        sync_block();
        const unsigned columns = at.columns_before(rows), H = p.H;
        inbox.expect((H + Math::vector - 1) / Math::vector * columns * sizeof(Vector));
        Vector* const to_h = h + inbox.buffer() * inbox_vectors;
#pragma unroll 1
        for (unsigned i = lane; i < own_vectors * cluster_columns; i += warp_size) {
          const unsigned column = by_own_vectors.divide(i), m = (i - column * own_vectors) * Math::vector;
          const unsigned k = at.unit + m;
          if (column >= columns || k >= H) continue;
          const Vector v = Math::prepare(load(outbox + column * own + m));
          Vector* const slot = to_h + k / Math::k * block_vectors + column * 4 + k % Math::k / Math::vector;
#pragma unroll 1
          for (int to = warp; to < shape.blocks; to += shape.warps()) inbox.send(v, slot, to);
        }
      }
      at.each(p.H, cells.batch, [&](const Element& e) {
        cells.save(e);
        cells.output(e.unit, e.n, cells.h[e.i]);
      });
      if (goes_on) cells.fetch(s + 1);
    }
    if (p.range.last == d.steps.T) return;
    at.each(p.H, cells.batch, [&](const Element& e) { d.h[p.range.last % 2].at(e.n)[e.unit] = cells.h[e.i]; });
    cells.store();
  }
}

// A block has all rows of W_hh^T and, as k, its own units' gate gradients: it sends each block a part of that one's dh
// and adds up the parts that it gets. For an LSTM these are half the bytes of everybody's gate gradients.
template <class Cell, class Math, int tiles>
FUSEDRNN_KERNEL(cluster_threads)
backward_cluster(const Backward<typename Math::Storage> p) {
  if constexpr (has_clusters) {
    using S = typename Math::Storage;
    constexpr int gates = Cell::gates;
    const ClusterShape& shape = p.cluster;
    const auto at = cluster_place<1>(shape);
    const auto& d = p.direction[at.direction];
    const int own = shape.groups * units, warp = thread_index() / warp_size, lane = thread_index() % warp_size;
    const int rank = int(block_index().x), groups_of_all = int((p.H + units - 1) / units);
    const int own_floats = own * cluster_columns, inbox_floats = shape.blocks * own_floats;
    const int outbox_vectors = shape.k_blocks * warp_size;
    const Divisor by_groups(shape.groups);
    float* const parts = shared_at<float>(shape.inbox);      // [2, blocks, own, columns], see partial_place: of dh
    Vector* const outbox = shared_at<Vector>(shape.outbox);  // [2, k_blocks, 32], as the lanes read it: drh

    Inbox inbox(shape.blocks);
    clear(outbox, shared_at<Vector>(shape.sums));
    const int64_t gate_width = d.w_hh_gates.row / gates;
    // The warp's tiles of 16 rows are warp, warp + m_warps, ...
    const int count = warp < groups_of_all ? (groups_of_all - warp + shape.m_warps - 1) / shape.m_warps : 0;
    const WarpWeights<Math, tiles, backward_near, tiles == few_tiles ? 2 : 1> weights(
        shared_at<Vector>(shape.far) + warp * shape.far_fragments * 2 * warp_size, count, shape.k_blocks,
        [&](int m, int half, int i) {
          const int row = (warp + m * shape.m_warps) * units + half * 8 + lane / 4;
          const int k = i * Math::k + Math::k_of(lane), g = k / own, unit = at.unit + k % own;
          return Math::prepare(
              load_if(row < p.H && g < gates && unit < gate_width, d.w_hh_gates.at(row) + g * gate_width + unit));
        });
    const int64_t first = p.range.first, last = p.range.last - 1;
    const auto put = [&](Vector* drh, const Element& e, int g, S gradient) {
      const unsigned k = g * own + e.m;
      S* slot = reinterpret_cast<S*>(drh + k / Math::k * warp_size + e.column * 4 + k % Math::k / Math::vector);
      slot[k % Math::vector] = gradient;
    };
    // If there is a step after the last, another launch has done it and left its drh.
    const int64_t start = at.row < d.steps.rows(last + 1).batch ? last + 1 : last;
    BackwardCells<Cell, Math, ClusterPlace<1>, false> cells(p, d, at, start);
    sync_cluster();

    for (int64_t s = start; s >= first; --s) {
      if (cells.s != s) cells.fetch(s);
      if (at.row >= cells.rows) continue;
      if (s <= last && at.row < cells.next_batch) inbox.receive();
      const float* dh_parts = parts + inbox.buffer() * inbox_floats;
      Vector* const drh = outbox + (s & 1) * outbox_vectors;  // a slow warp may still read the last step's
      at.each(p.H, s > last ? cells.batch : 0, [&](const Element& e) {
        for (int g = 0; g < gates; ++g) put(drh, e, g, d.drh.at(cells.first_row + e.n)[g * p.H + e.unit]);
      });
      at.each(p.H, s > last ? 0 : cells.rows, [&](const Element& e) {
        const float dh = cells.dh(e, [&] {
          float sum = 0;
          for (int from = 0; from < shape.blocks; ++from)
            sum += dh_parts[from * own_floats + partial_place(e.m, e.column)];
          return sum;
        });
        if (e.n >= cells.batch) {
          cells.initial_h(e, dh);
          cells.initial_c(e);
          return;
        }
        cells.step(e, dh + cells.dy(e));
#pragma unroll
        for (int g = 0; g < gates; ++g) put(drh, e, g, cells.drh[e.i][g]);
      });
      const bool goes_on = s > first && at.row < cells.batch;
      if (goes_on) {
        sync_block();
        const unsigned H = p.H, columns = at.columns_before(cells.batch), pairs = (columns + 1) / 2;
        const unsigned mine = H - at.unit < unsigned(own) ? H - at.unit : own;
        inbox.expect(mine * pairs * shape.blocks * 2 * sizeof(float));
        float c[tiles][1][4] = {};
        weights.multiply(c, [&](int i, Vector(&b)[1][1]) { b[0][0] = Math::prepare(drh[i * warp_size + lane]); });
        float* const mine_there = parts + inbox.buffer() * inbox_floats + rank * own_floats;
        const unsigned column = 2 * (lane % 4);
#pragma unroll
        for (int m = 0; m < tiles; ++m) {
          const unsigned tile = warp + m * shape.m_warps, to = by_groups.divide(tile), group = tile - to * shape.groups;
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const unsigned unit = half * 8 + lane / 4;
            if (m >= count || tile * units + unit >= H || column >= columns) continue;
            float* const place = mine_there + group * units * cluster_columns + partial_place(unit, column);
            inbox.send(c[m][0][2 * half], c[m][0][2 * half + 1], place, to);
          }
        }
      }
      at.each(p.H, s > last ? 0 : cells.batch, [&](const Element& e) { cells.save(e); });
      if (goes_on) cells.fetch(s - 1);
    }
    if (first > 0) cells.store();
  }
}

}  // namespace fusedrnn::cuda
