// What the CUDA kernels are given: one struct for each pass, with both directions of a layer. Row r of the sequence is
// time step t, batch entry n: r = first_row(t) + n, as in torch's PackedSequence. Rows that the tile reads (h, drh, dh
// and the weights) are padded with zeros to a multiple of 16 bytes.
#pragma once

#include "cluster_shape.h"
#include "device.cuh"

namespace fusedrnn::cuda {

// Elements between the counters of neighbouring batch tiles: each has 128 bytes of its own.
constexpr int counter_pitch = 32;

// Where a step's rows and those of the step before begin, and how many each has; steps before the first and after the
// last have none.
struct StepRows {
  int64_t first, first_before;
  int batch, batch_before, batch_after;
};

// The steps of one direction, in the order they are computed: s = 0 is time 0, or T - 1 in reverse.
struct Steps {
  int64_t T, N;
  const int64_t* offset;  // [T + 1], the first row of each time step; null: every step has N rows
  bool reverse;

  FUSEDRNN_DEVICE StepRows rows(int64_t s) const {
    if (!offset) {
      const int64_t t = reverse ? T - 1 - s : s;
      const auto batch = [this](int64_t step) { return step >= 0 && step < T ? int(N) : 0; };
      return {t * N, (reverse ? t + 1 : t - 1) * N, batch(s), batch(s - 1), batch(s + 1)};
    }
    int64_t of[4];  // the rows that steps s - 1, s and s + 1 lie between; all loads are under way together
    for (int i = 0; i < 4; ++i) {
      const int64_t after = s + i < 1 ? 0 : s + i - 1 > T ? T : s + i - 1;
      of[i] = offset[reverse ? T - after : after];
    }
    const auto first = [&](int i) { return of[i] < of[i + 1] ? of[i] : of[i + 1]; };
    const auto batch = [&](int i) { return int(of[i] < of[i + 1] ? of[i + 1] - of[i] : of[i] - of[i + 1]); };
    return {first(1), first(0), batch(1), batch(0), batch(2)};
  }
};

// A matrix whose rows are `row` elements apart.
template <class S>
struct Rows {
  S* data;
  int64_t row;
  FUSEDRNN_DEVICE S* at(int64_t r) const { return data + r * row; }
  FUSEDRNN_DEVICE explicit operator bool() const { return data != nullptr; }
};

// Steps first .. last - 1 of one launch, and which of a step's two halves it runs (in stepwise.cuh).
struct Range {
  int64_t first, last;
  bool recurrence, projection;
};

// Of a tangent pass (see tangent.cuh): what forward was given and left where it is taken, and what changes beside h and
// c. What is const but y, gates and cells may be null.
template <class S>
struct TangentDirection {
  Rows<const S> y, gates;
  Rows<const Accumulator<S>> cells;
  const S* h0;
  const S* c0;
  Rows<const S> dwx, drh;  // [rows, G * H]: of wx, and of rh at a constant h_prev
  Rows<const S> dy;        // [rows, P]: of h at a constant state before the projection
  Rows<S> drh_out;         // [rows, G * H]: of rh
};

template <class S>
struct ForwardDirection {
  Steps steps;
  Rows<const S> wx;            // [rows, G * H], without b_ih
  Rows<const S> w_hh;          // [G * H, P]
  const S* b_ih;               // [G * H] or null
  const S* b_hh;               // [G * H] or null
  Rows<const S> w_hr;          // [P, H], if projected
  Rows<S> h[2];                // [N, P] before an even step and before an odd one; h0 in both at first
  Rows<S> unprojected;         // [N, H], if projected
  Accumulator<S>* c;           // [N, H], c0 at first; null without c
  Rows<S> y;                   // [rows, P]
  S* h_n;                      // [N, P]
  S* c_n;                      // [N, H]
  Rows<S> gates;               // [rows, saved, H], and h before the projection; or null
  Rows<Accumulator<S>> cells;  // [rows, H] or null
  uint32_t* arrivals;          // one counter of blocks for each batch tile, counter_pitch apart; zero at first
  TangentDirection<S> tangent = {};
};

template <class S>
struct Forward {
  int64_t H, P;
  bool projected;
  Range range;
  ClusterShape cluster;  // of a launch of cluster.cuh
  ForwardDirection<S> direction[2];
};

template <class S>
struct BackwardDirection {
  Steps steps;
  Rows<const S> w_hh;                 // [P, G * H], transposed
  Rows<const S> w_hh_gates;           // the same, each gate's H padded
  Rows<const S> w_hr;                 // [H, P], transposed, if projected
  Rows<const S> dy;                   // [rows, P] or null
  const S* dh_n;                      // [N, P] or null
  const S* dc_n;                      // [N, H] or null
  Rows<const Accumulator<S>> dcells;  // [rows, H] or null
  Rows<const S> y, gates;             // as forward left them
  Rows<const Accumulator<S>> cells;
  const S* h0;                  // [N, P] or null (zeros)
  const S* c0;                  // [N, H] or null (zeros)
  Rows<S> drh;                  // [rows, G * H]
  Rows<S> dwx;                  // [rows, G * H]; null where it is drh
  Rows<S> dh;                   // [rows, P]: dL/dh of every step, if projected or if somebody wants it; else null
  Rows<Accumulator<S>> dc_all;  // [rows, H]: dL/dc of every step, or null
  Accumulator<S>* dh_direct;    // [N, P], what reaches h_prev not through rh; null without it
  Accumulator<S>* dc;           // [N, H]; null without c
  S* dh0;                       // [N, P] or null
  S* dc0;                       // [N, H] or null
  uint32_t* arrivals;
};

template <class S>
struct Backward {
  int64_t H, P;
  bool projected;
  Range range;           // last - 1 down to first; step -1 gives dh0 and dc0
  ClusterShape cluster;  // of a launch of cluster.cuh
  BackwardDirection<S> direction[2];
};

}  // namespace fusedrnn::cuda
