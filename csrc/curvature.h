// What the curvature ops are given: steps of one direction of a layer, each by itself, in any order. All arrays are
// dense.
#pragma once

#include <cstdint>

namespace fusedrnn {

template <class S>
struct Curvature {
  int64_t rows, H;
  const S *wx, *rh;    // [rows, G * H]
  const S *h, *c;      // [rows, H], before the step; null where the cell doesn't read it
  const S *dwx, *drh;  // how they change, or null
  const S *dh, *dc;
  const S *upstream_h, *upstream_c;    // [rows, H]: a loss's gradients after the step (h before a projection)
  const S* dupstream_h;                // how the first changes, or null
  S *by_wx, *by_rh;                    // [rows, G * H]: the loss's gradients; by_rh is null where it is by_wx
  S *dby_wx, *dby_rh, *dby_h, *dby_c;  // how they change; by_h without what flows through rh, null if that is all
  S* dh_after;                         // [rows, H]: how h changes, or null
};

}  // namespace fusedrnn
