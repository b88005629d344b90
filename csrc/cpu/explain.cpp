#include "explain.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

#include "../cells/gru.h"
#include "../cells/lstm.h"
#include "../cells/rnn.h"
#include "kernels.h"
#include "team.h"

namespace fusedrnn {
namespace {

constexpr int64_t most_rows = int64_t(1) << 36;  // whose sizes no int64 is too small for

template <class S>
CpuExplanation explain(const CpuLayer& l, CellKind kind, int gates) {
  const int64_t T = std::min<int64_t>(l.T, 8);  // more would have the same plan
  std::vector<int64_t> offset(T + 1);
  for (int64_t t = 0; t <= T; ++t) offset[t] = t * l.N;
  Forward<S> direction{};
  direction.shape = {T, l.N, l.I, l.H, l.P, offset.data(), false, l.projected};
  CpuExplanation e{};
  e.max_threads = max_threads();
  e.multiply_adds = layer_multiply_adds(l.T * l.N, l.directions, gates, l.H, l.I, l.P);
  e.threads = plan_threads(e.max_threads, e.multiply_adds);
  e.plan = cpu_kernels().of<S>(kind).plan(direction, int(l.directions), e.threads);
  return e;
}

CpuExplanation explain(const CpuLayer& l, CellKind kind, int gates) {
  if (l.dtype == "float64") return explain<double>(l, kind, gates);
  if (l.dtype == "bfloat16") return explain<bf16>(l, kind, gates);
  if (l.dtype == "float32" || l.dtype == "float16") return explain<float>(l, kind, gates);
  throw std::invalid_argument("unknown dtype '" + l.dtype + "'");
}

}  // namespace

CpuExplanation explain_cpu(const CpuLayer& l) {
  if (l.T < 1 || l.N < 1) throw std::invalid_argument("expected at least one step of one sequence");
  if (l.T > most_rows / l.N)
    throw std::invalid_argument("expected no more than " + std::to_string(most_rows) + " rows");
  if (l.cell == "lstm") return explain(l, CellKind::lstm, LSTM::gates);
  if (l.cell == "gru") return explain(l, CellKind::gru, GRU::gates);
  if (l.cell == "rnn_tanh") return explain(l, CellKind::rnn_tanh, RNNTanh::gates);
  if (l.cell == "rnn_relu") return explain(l, CellKind::rnn_relu, RNNRelu::gates);
  throw std::invalid_argument("unknown cell '" + l.cell + "'");
}

}  // namespace fusedrnn
