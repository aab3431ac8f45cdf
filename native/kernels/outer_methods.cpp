// outer.h as Python calls it: addresses and sizes as integers, which trinity/ops checks; other threads of Python go on.
#include <Python.h>

#include "outer.h"

namespace {

using namespace trinity;

template <int N>
struct Numbers {
  int64_t of[N];
  bool read(PyObject *const *arguments, Py_ssize_t num) {
    if (num != N) {
      PyErr_Format(PyExc_TypeError, "%zd arguments, not %d", num, N);
      return false;
    }
    for (int i = 0; i < N; i++) {
      of[i] = PyLong_AsLongLong(arguments[i]);
      if (of[i] == -1 && PyErr_Occurred()) return false;
    }
    return true;
  }
  template <class T>
  T *at(int i) const { return reinterpret_cast<T *>(static_cast<intptr_t>(of[i])); }
};

PyObject *has_outer_of(PyObject *, PyObject *const *arguments, Py_ssize_t num) {
  Numbers<1> numbers;
  if (!numbers.read(arguments, num)) return nullptr;
  return PyBool_FromLong(has_outer(static_cast<Format>(numbers.of[0])));
}

PyObject *add_products_of(PyObject *, PyObject *const *arguments, Py_ssize_t num) {
  Numbers<12> n;
  if (!n.read(arguments, num)) return nullptr;
  const AddedProducts products{static_cast<Format>(n.of[0]), n.at<const void>(1), n.at<const void>(2), n.at<const int64_t>(3),
                               n.at<float>(4), n.of[5], n.of[6], n.of[7], n.of[8] != 0};
  Py_BEGIN_ALLOW_THREADS;
  add_products(products, n.of[9], n.of[10], n.of[11]);
  Py_END_ALLOW_THREADS;
  Py_RETURN_NONE;
}

PyObject *add_row_sums_of(PyObject *, PyObject *const *arguments, Py_ssize_t num) {
  Numbers<13> n;
  if (!n.read(arguments, num)) return nullptr;
  const RowSums sums{static_cast<Format>(n.of[0]), n.at<const void>(1), n.at<const void>(2), n.at<const int64_t>(3),
                     n.at<float>(4), n.of[5], n.of[6], n.of[7], n.of[8], n.of[9] != 0};
  Py_BEGIN_ALLOW_THREADS;
  add_row_sums(sums, n.of[10], n.of[11], n.of[12]);
  Py_END_ALLOW_THREADS;
  Py_RETURN_NONE;
}

using Function = PyObject *(*)(PyObject *, PyObject *const *, Py_ssize_t);

PyMethodDef method(const char *name, Function function) {
  return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function)), METH_FASTCALL, nullptr};
}

}  // namespace

PyMethodDef outer_methods[] = {
    method("has_outer", has_outer_of),
    method("add_products", add_products_of),
    method("add_row_sums", add_row_sums_of),
    {nullptr, nullptr, 0, nullptr},
};
