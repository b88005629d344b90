/* Measures one core: fused multiply-adds and bf16 dot products held in registers, and reads.
 * Compiled by limits.py with -O3 -march=native; the callers are Python threads (no GIL here). */
#include <stdint.h>
#include <time.h>

#if defined(__AVX512F__)
#define WIDTH 64
#define CHAINS 16
#elif defined(__AVX__)
#define WIDTH 32
#define CHAINS 12
#else
#define WIDTH 16
#define CHAINS 24
#endif

typedef float vector __attribute__((vector_size(WIDTH)));
typedef uint64_t words __attribute__((vector_size(WIDTH)));

static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec + 1e-9 * t.tv_nsec;
}

/* GF/s, a multiply-add counted as two. */
double fma_gflops(double seconds) {
  vector acc[CHAINS], a, b;
  for (int i = 0; i < WIDTH / 4; ++i) a[i] = 0.999f, b[i] = 1e-3f;
  for (int k = 0; k < CHAINS; ++k) acc[k] = a;
  __asm__ volatile("" : "+m"(a), "+m"(b));
  const double start = now();
  double spent, done = 0;
  do {
    for (int i = 0; i < 20000; ++i) {
      for (int k = 0; k < CHAINS; ++k) acc[k] = acc[k] * a + b;
    }
    done += 20000.0 * CHAINS * (WIDTH / 4) * 2;
    spent = now() - start;
  } while (spent < seconds);
  for (int k = 1; k < CHAINS; ++k) acc[0] += acc[k];
  __asm__ volatile("" ::"m"(acc[0]));
  return done / spent * 1e-9;
}

#ifdef __AVX512BF16__
#include <immintrin.h>
double bf16_gflops(double seconds) {
  __m512 acc[16];
  const __m512bh a = (__m512bh)_mm512_set1_epi32(0x3a803a80);
  for (int k = 0; k < 16; ++k) acc[k] = _mm512_setzero_ps();
  const double start = now();
  double spent, done = 0;
  do {
    for (int i = 0; i < 20000; ++i) {
      for (int k = 0; k < 16; ++k) acc[k] = _mm512_dpbf16_ps(acc[k], a, a);
    }
    done += 20000.0 * 16 * 64;
    spent = now() - start;
  } while (spent < seconds);
  for (int k = 1; k < 16; ++k) acc[0] = _mm512_add_ps(acc[0], acc[k]);
  __asm__ volatile("" ::"v"(acc[0]));
  return done / spent * 1e-9;
}
#else
double bf16_gflops(double seconds) { return 0 * seconds; }
#endif

/* GB/s of reading the buffer again and again; bytes is a multiple of 1024, data is aligned. */
double read_gbs(const char* data, long bytes, double seconds) {
  words acc[8] = {{0}};
  const double start = now();
  double spent, done = 0;
  do {
    for (long passes = 0; passes < 1 + (1 << 20) / bytes; ++passes) {
      for (long at = 0; at < bytes; at += 8 * WIDTH) {
        const words* p = (const words*)(data + at);
        for (int k = 0; k < 8; ++k) acc[k] |= p[k];
      }
      __asm__ volatile("" ::: "memory");
      done += bytes;
    }
    spent = now() - start;
  } while (spent < seconds);
  for (int k = 1; k < 8; ++k) acc[0] |= acc[k];
  __asm__ volatile("" ::"m"(acc[0]));
  return done / spent * 1e-9;
}
