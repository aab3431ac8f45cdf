// The extension: the tables of its parts in one, and what it says of itself. A part that is not compiled in has no table.
#include <Python.h>

#include <vector>

#include "cpu.h"

#ifndef TRINITY_SOURCES
#define TRINITY_SOURCES "unknown"
#endif

extern PyMethodDef kernel_methods[] __attribute__((weak));
extern PyMethodDef outer_methods[] __attribute__((weak));
extern PyMethodDef step_methods[] __attribute__((weak));
extern PyMethodDef ring_methods[] __attribute__((weak));

namespace {

constexpr int kContract = 2;  // trinity/native.py:CONTRACT; counted up when what Python calls changes its arguments

PyMethodDef* all_methods() {
  static std::vector<PyMethodDef> all;
  if (all.empty()) {
    for (PyMethodDef* table : {kernel_methods, outer_methods, step_methods, ring_methods})
      for (PyMethodDef* method = table; method && method->ml_name; ++method) all.push_back(*method);
    all.push_back({nullptr, nullptr, 0, nullptr});
  }
  return all.data();
}

}  // namespace

PyMODINIT_FUNC PyInit__native() {
  static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_native", nullptr, -1, all_methods(), nullptr, nullptr, nullptr,
                                   nullptr};
  PyObject* module = PyModule_Create(&definition);
  if (!module) return nullptr;
  if (PyModule_AddIntConstant(module, "contract", kContract) || PyModule_AddStringConstant(module, "sources", TRINITY_SOURCES) ||
      PyModule_AddStringConstant(module, "isa", trinity::isa_name())) {
    Py_DECREF(module);
    return nullptr;
  }
  return module;
}
