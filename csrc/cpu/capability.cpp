#include "capability.h"

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#if defined(__linux__) && defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "kernels.h"

namespace fusedrnn {
namespace {

struct Capability {
  const char* name;
  Kernels kernels;
  bool (*supported)();
};

// The processor has tiles and their bfloat16 product, and Linux lets this process use them: their 8 KB of state a
// thread must be asked for.
[[maybe_unused]] bool amx_supported() {
#if defined(FUSEDRNN_AMX_HOST)
  return true;
#elif defined(__linux__) && defined(__x86_64__)
  constexpr unsigned amx_bf16 = 1u << 22, amx_tile = 1u << 24;
  unsigned eax, ebx, ecx, edx;
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) || (~edx & (amx_bf16 | amx_tile))) return false;
  constexpr long request_permission = 0x1023, tile_data = 18;  // <asm/prctl.h>'s ARCH_REQ_XCOMP_PERM, since Linux 5.16
  return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
#else
  return false;
#endif
}

// From the least to the most capable.
constexpr Capability capabilities[] = {
    {"default", {baseline::f32, baseline::f64, baseline::b16}, [] { return true; }},
#if defined(FUSEDRNN_HAVE_AVX2)
    {"avx2",
     {avx2::f32, avx2::f64, avx2::b16},
     [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }},
#endif
#if defined(FUSEDRNN_HAVE_AVX512)
    {"avx512",
     {avx512::f32, avx512::f64, avx512::b16},
     [] {
       return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
              __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
     }},
#endif
#if defined(FUSEDRNN_HAVE_AVX512_BF16)
    {"avx512_bf16",
     {avx512::f32, avx512::f64, avx512_bf16::b16},
     [] { return bool(__builtin_cpu_supports("avx512bf16")); }},
#endif
#if defined(FUSEDRNN_HAVE_AMX)
    {"amx", {avx512::f32, avx512::f64, amx::b16}, amx_supported},
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
  if (name && wanted < 0)
    std::fprintf(stderr, "fusedrnn: FUSEDRNN_CPU_CAPABILITY: '%s' is none of this build's, %s to %s; using %s\n", name,
                 capabilities[0].name, capabilities[count - 1].name, capabilities[best()].name);
  return wanted >= 0 && wanted < best() ? wanted : best();
}

std::atomic<int>& current() {
  static std::atomic<int> index{initial()};
  return index;
}

}  // namespace

const Kernels& cpu_kernels() { return capabilities[current().load(std::memory_order_relaxed)].kernels; }

}  // namespace fusedrnn

const char* fusedrnn_cpu_capability() { return fusedrnn::capabilities[fusedrnn::current().load()].name; }

int fusedrnn_set_cpu_capability(const char* name) {
  const int wanted = fusedrnn::named(name);
  if (wanted < 0 || wanted > fusedrnn::best()) return 1;
  fusedrnn::current().store(wanted);
  return 0;
}
