// The kernels as Python calls them: addresses and sizes as integers, which trinity/ops checks; other threads of Python go on.
#include <Python.h>

#include "kernels.h"

namespace {

using namespace trinity;

// The next argument as a number or an address, 0 for None.
struct Arguments {
  PyObject *const *next;
  bool failed = false;
  int64_t number() {
    PyObject *argument = *next++;
    if (argument == Py_None) return 0;
    const long long value = PyLong_AsLongLong(argument);
    if (value == -1 && PyErr_Occurred()) failed = true;
    return value;
  }
  template <class T>
  T *address() { return reinterpret_cast<T *>(static_cast<intptr_t>(number())); }
  Format format() { return static_cast<Format>(number()); }
  Rows rows() {
    Rows rows;
    rows.values = address<const void>();
    rows.scale = address<const float>();
    rows.at = address<const int64_t>();
    return rows;
  }
  Matrices matrices() {
    Matrices m;
    m.values = address<const void>();
    m.scale = address<const float>();
    m.more = address<const void>();
    m.n = number();
    m.k = number();
    return m;
  }
};

bool has(Py_ssize_t num, Py_ssize_t wanted) {
  if (num == wanted) return true;
  PyErr_Format(PyExc_TypeError, "%zd arguments, not %zd", num, wanted);
  return false;
}

PyObject *round_rows_of(PyObject *, PyObject *const *arguments, Py_ssize_t num) {
  if (!has(num, 6)) return nullptr;
  Arguments from{arguments};
  const Format format = from.format();
  const float *x = from.address<const float>();
  const int64_t rows = from.number(), k = from.number();
  void *values = from.address<void>();
  float *scale = from.address<float>();
  if (from.failed) return nullptr;
  Py_BEGIN_ALLOW_THREADS;
  round_rows(format, x, rows, k, values, scale);
  Py_END_ALLOW_THREADS;
  Py_RETURN_NONE;
}

PyObject *num_units(PyObject *, PyObject *const *arguments, Py_ssize_t num) {
  if (!has(num, 3)) return nullptr;
  Arguments from{arguments};
  const Format format = from.format();
  const int64_t n = from.number(), k = from.number();
  return from.failed ? nullptr : PyLong_FromLongLong(units_of(format, n, k));
}

PyObject *multiply_units(PyObject *, PyObject *const *arguments, Py_ssize_t num) {
  if (!has(num, 14)) return nullptr;
  Arguments from{arguments};
  Product p;
  p.format = from.format();
  p.x = from.rows();
  p.w = from.matrices();
  p.end = from.address<const int64_t>();
  p.y = from.address<float>();
  p.y_step = from.number();
  const int64_t first = from.number(), last = from.number();
  if (from.failed) return nullptr;
  Py_BEGIN_ALLOW_THREADS;
  multiply(p, first, last);
  Py_END_ALLOW_THREADS;
  Py_RETURN_NONE;
}

PyObject *feed_forward_units(PyObject *, PyObject *const *arguments, Py_ssize_t num) {
  if (!has(num, 26)) return nullptr;
  Arguments from{arguments};
  FeedForward l;
  l.format = from.format();
  l.x = from.rows();
  l.gate = from.matrices();
  l.up = from.matrices();
  l.down = from.matrices();
  l.weight = from.address<const float>();
  l.y = from.address<float>();
  l.expert = from.address<const int64_t>();
  l.begin = from.address<const int64_t>();
  l.end = from.address<const int64_t>();
  const int64_t first = from.number(), last = from.number();
  if (from.failed) return nullptr;
  Py_BEGIN_ALLOW_THREADS;
  feed_forward(l, first, last);
  Py_END_ALLOW_THREADS;
  Py_RETURN_NONE;
}

PyObject *use_instructions(PyObject *, PyObject *const *arguments, Py_ssize_t num) {
  if (!has(num, 1)) return nullptr;
  Arguments from{arguments};
  const int64_t most = from.number();
  if (from.failed) return nullptr;
  use(static_cast<Isa>(most));
  Py_RETURN_NONE;
}

using Function = PyObject *(*)(PyObject *, PyObject *const *, Py_ssize_t);

PyMethodDef method(const char *name, Function function) {
  return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function)), METH_FASTCALL, nullptr};
}

}  // namespace

PyMethodDef kernel_methods[] = {
    method("round_rows", round_rows_of),
    method("num_units", num_units),
    method("multiply", multiply_units),
    method("feed_forward", feed_forward_units),
    method("use_instructions", use_instructions),
    {nullptr, nullptr, 0, nullptr},
};
