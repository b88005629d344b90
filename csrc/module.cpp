// fusedrnn._C: what Python may ask the library about itself. Tensors go through torch.ops.fusedrnn instead.
#include <pybind11/pybind11.h>

#include <sstream>
#include <stdexcept>
#include <string>

#include "build_facts.h"  // written by setup.py
#include "cpu/explain.h"
#include "cuda/plan.h"

namespace py = pybind11;

// libfusedrnn.so. To set returns 0, or nonzero for a name that it doesn't know or the CPU lacks.
extern "C" const char* fusedrnn_cpu_capability();
extern "C" int fusedrnn_set_cpu_capability(const char* name);
extern "C" size_t fusedrnn_release_memory();

namespace {

py::tuple words(const std::string& text) {
  std::istringstream stream(text);
  py::list list;
  for (std::string word; stream >> word;) list.append(word);
  return py::tuple(list);
}

py::object text_or_none(const std::string& text) {
  return text.empty() ? py::object(py::none()) : py::object(py::str(text));
}

py::dict build_info() {
  py::dict info;
  info["version"] = FUSEDRNN_BUILD_VERSION;
  info["compiler"] = FUSEDRNN_BUILD_COMPILER;
  info["torch"] = FUSEDRNN_BUILD_TORCH;
  info["cpu_capabilities"] = words("default " FUSEDRNN_BUILD_ISAS);
  info["nvcc"] = text_or_none(FUSEDRNN_BUILD_NVCC);
  info["cuda_archs"] = words(FUSEDRNN_BUILD_CUDA_ARCHS);
  info["sanitize"] = text_or_none(FUSEDRNN_BUILD_SANITIZE);
  return info;
}

void set_cpu_capability(const std::string& name) {
  if (fusedrnn_set_cpu_capability(name.c_str()) != 0) {
    throw std::invalid_argument("cpu capability '" + name + "' is unknown, or not one this build and CPU have");
  }
}

// The names are those of csrc/cpu/explain.h.
py::dict cpu_plan(const std::string& cell, const std::string& dtype, int64_t T, int64_t N, int64_t I, int64_t H,
                  int64_t P, int directions, bool projected) {
  const fusedrnn::CpuExplanation e = fusedrnn::explain_cpu({cell, dtype, T, N, I, H, P, directions, projected});
  py::dict d;
  d["capability"] = fusedrnn_cpu_capability();
  d["threads"] = e.threads;
  d["max_threads"] = e.max_threads;
  d["multiply_adds"] = e.multiply_adds;
  d["multiply_adds_per_thread"] = fusedrnn::multiply_adds_per_thread;
  d["row_groups"] = e.plan.split.row_groups;
  d["unit_groups"] = e.plan.split.unit_groups;
  d["packed"] = e.plan.packed;
  d["both_at_once"] = e.plan.both_at_once;
  return d;
}

// The names are those of csrc/cuda/plan.h.
py::dict cuda_plan(int64_t N, int64_t H, int64_t P, int directions, int gates, bool backward, int64_t element,
                   bool tensor_cores, bool projected, int processors, int64_t shared_bytes, int cluster_blocks,
                   int layers) {
  using namespace fusedrnn::cuda;
  const Plan plan = widest_plan(layers, [&](int together) {
    return make_plan({N, H, P, directions, gates, backward, element, tensor_cores, projected, together},
                     {processors, shared_bytes, cluster_blocks}, forced_plan());
  });
  py::dict d;
  d["name"] = plan.name;
  d["reason"] = plan.reason;
  d["columns"] = plan.columns();
  d["units"] = plan.units();
  d["blocks"] = py::make_tuple(plan.blocks_x, plan.blocks_y, directions);
  d["shared_bytes"] = plan.shared_bytes();
  d["together"] = plan.together;
  return d;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.def("build_info", &build_info, "What was built: version, compiler, torch's version, instruction sets, CUDA.");
  m.def("cpu_capability", &fusedrnn_cpu_capability, "The instruction set that the CPU kernels use.");
  m.def("set_cpu_capability", &set_cpu_capability, py::arg("name"), "Makes the CPU kernels use an instruction set.");
  m.def("release_memory", &fusedrnn_release_memory,
        "Gives the memory that ops on the CPU keep for later ones back to the system; returns how many bytes it was.");
  m.def("cpu_plan", &cpu_plan, py::kw_only(), py::arg("cell"), py::arg("dtype"), py::arg("T"), py::arg("N"),
        py::arg("I"), py::arg("H"), py::arg("P"), py::arg("directions"), py::arg("projected"),
        "How a padded layer would run on the CPU.");
  m.def("cuda_plan", &cuda_plan, py::kw_only(), py::arg("N"), py::arg("H"), py::arg("P"), py::arg("directions"),
        py::arg("gates"), py::arg("backward"), py::arg("element"), py::arg("tensor_cores"), py::arg("projected"),
        py::arg("processors"), py::arg("shared_bytes"), py::arg("cluster_blocks"), py::arg("layers") = 1,
        "How a layer's time loop would run on a GPU; in a stack, with how many at the same time.");
  m.def("forced_cuda_plan", &fusedrnn::cuda::forced_plan, "The plan that ops on a GPU are made to use, or ''.");
  m.def("force_cuda_plan", &fusedrnn::cuda::force_plan, py::arg("name"), "Makes ops on a GPU use a plan; '': any.");
}
