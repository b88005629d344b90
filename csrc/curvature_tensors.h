// A curvature op but for its kernel: the same on every device.
#pragma once

#include "curvature.h"
#include "tensors.h"

namespace fusedrnn {

// Calls run(Curvature<S>) with the arguments, and returns the results that it has written.
template <class Cell, class S, class Run>
CurvatureResult with_curvature(const CurvatureArguments& given, Run run) {
  check_curvature(given, Cell::gates, Cell::has_c, Cell::reads_h);
  const CurvatureArguments a{dense(given.wx),         dense(given.rh),         dense(given.h),          dense(given.c),
                             dense(given.dwx),        dense(given.drh),        dense(given.dh),         dense(given.dc),
                             dense(given.upstream_h), dense(given.upstream_c), dense(given.dupstream_h)};
  const int64_t rows = a.wx.size(0), width = a.wx.size(1), H = width / Cell::gates;
  const auto result = [&](bool exists, int64_t columns) {
    return empty(exists ? std::vector<int64_t>{rows, columns} : std::vector<int64_t>{0}, a.wx.scalar_type(), a.wx);
  };
  constexpr bool apart = Cell::shared < Cell::gates;
  const CurvatureResult results{result(true, width), result(apart, width), result(Cell::carries_h, H),
                                result(Cell::has_c, H), result(true, H)};
  if (rows == 0 || H == 0) return results;
  const auto& [by_wx, by_rh, by_h, by_c, dh_after] = results;
  const auto wanted = [](bool exists, const Tensor& t) { return exists ? data<S>(t) : nullptr; };
  run(Curvature<S>{.rows = rows,
                   .H = H,
                   .wx = data<const S>(a.wx),
                   .rh = data<const S>(a.rh),
                   .h = Cell::reads_h ? data<const S>(a.h) : nullptr,
                   .c = data<const S>(a.c),
                   .dwx = data<const S>(a.dwx),
                   .drh = data<const S>(a.drh),
                   .dh = Cell::reads_h ? data<const S>(a.dh) : nullptr,
                   .dc = data<const S>(a.dc),
                   .upstream_h = data<const S>(a.upstream_h),
                   .upstream_c = data<const S>(a.upstream_c),
                   .dupstream_h = data<const S>(a.dupstream_h),
                   .by_wx = data<S>(by_wx),
                   .by_rh = wanted(apart, by_rh),
                   .by_h = wanted(Cell::carries_h, by_h),
                   .by_c = wanted(Cell::has_c, by_c),
                   .dh_after = data<S>(dh_after)});
  return results;
}

}  // namespace fusedrnn
