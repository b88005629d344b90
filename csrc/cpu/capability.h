// Which instruction set's kernels run.
#pragma once

// default, avx2, avx512, avx512_bf16, amx
extern "C" __attribute__((visibility("default"))) const char* fusedrnn_cpu_capability();
// Chooses an instruction set by name, at most what the processor has; 0 if that was possible.
extern "C" __attribute__((visibility("default"))) int fusedrnn_set_cpu_capability(const char* name);
