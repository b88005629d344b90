// fusedrnn._C: what Python may ask the library about itself. Tensors go through torch.ops.fusedrnn instead.
#include <pybind11/pybind11.h>

#include <sstream>
#include <stdexcept>
#include <string>

#include "build_facts.h"  // written by setup.py

namespace py = pybind11;

// libfusedrnn.so. To set returns 0, or nonzero for a name that it doesn't know or the CPU lacks.
extern "C" const char* fusedrnn_cpu_capability();
extern "C" int fusedrnn_set_cpu_capability(const char* name);

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

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.def("build_info", &build_info, "What was built: version, compiler, torch's version, instruction sets, CUDA.");
  m.def("cpu_capability", &fusedrnn_cpu_capability, "The instruction set that the CPU kernels use.");
  m.def("set_cpu_capability", &set_cpu_capability, py::arg("name"), "Makes the CPU kernels use an instruction set.");
}
