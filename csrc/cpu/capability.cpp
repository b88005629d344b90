#include "capability.h"

#include <atomic>
#include <cstdlib>
#include <cstring>

#include "kernels.h"

namespace fusedrnn {
namespace {

struct Capability {
  const char* name;
  const Kernels* kernels;
  bool (*supported)();
};

// From the least to the most capable.
constexpr Capability capabilities[] = {
    {"default", &baseline::kernels, [] { return true; }},
#if defined(__x86_64__)
    {"avx2", &avx2::kernels, [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }},
    {"avx512", &avx512::kernels,
     [] {
       return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
              __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
     }},
    {"avx512_bf16", &avx512_bf16::kernels, [] { return bool(__builtin_cpu_supports("avx512bf16")); }},
#endif
};
constexpr int count = sizeof(capabilities) / sizeof(capabilities[0]);

// The best one whose predecessors are all supported too.
int best() {
  int i = 0;
  while (i + 1 < count && capabilities[i + 1].supported()) ++i;
  return i;
}

int named(const char* name) {
  for (int i = 0; i < count; ++i)
    if (std::strcmp(capabilities[i].name, name) == 0) return i;
  return -1;
}

int initial() {
  const char* name = std::getenv("FUSEDRNN_CPU_CAPABILITY");
  const int wanted = name ? named(name) : -1;
  return wanted >= 0 && wanted < best() ? wanted : best();
}

std::atomic<int>& current() {
  static std::atomic<int> index{initial()};
  return index;
}

}  // namespace

const Kernels& cpu_kernels() { return *capabilities[current().load(std::memory_order_relaxed)].kernels; }

}  // namespace fusedrnn

const char* fusedrnn_cpu_capability() { return fusedrnn::capabilities[fusedrnn::current().load()].name; }

int fusedrnn_set_cpu_capability(const char* name) {
  const int wanted = fusedrnn::named(name);
  if (wanted < 0 || wanted > fusedrnn::best()) return 1;
  fusedrnn::current().store(wanted);
  return 0;
}
