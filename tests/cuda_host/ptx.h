// Runs kernels on the CPU as nvcc compiled them: an interpreter of PTX, written from the PTX ISA, for the instructions
// that nvcc makes of csrc/cuda. So what device.cuh says to a GPU in assembler, and what the compiler made of all the
// rest, is tested without a GPU as well.
#pragma once

namespace fusedrnn::cuda::host {

struct PtxKernel;

// The kernel that nvcc made of this function; null if no PTX is loaded.
const PtxKernel* find_ptx(const void* function);

// What one thread does: the fiber that calls.
void run_ptx(const PtxKernel& kernel, const void* params);

}  // namespace fusedrnn::cuda::host
