// outer.h and kept.h as Python calls it: addresses and sizes as integers, which trinity/ops checks; other threads of Python go on.
#include <Python.h>

#include "kept.h"
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

PyObject *multiply_rounded_of(PyObject *, PyObject *const *arguments, Py_ssize_t num) {
  Numbers<10> n;
  if (!n.read(arguments, num)) return nullptr;
  const RoundedProduct product{static_cast<Format>(n.of[0]), n.at<const void>(1), n.at<const void>(2), n.at<const int64_t>(3),
                               n.at<void>(4), n.of[5], n.of[6]};
  Py_BEGIN_ALLOW_THREADS;
  multiply_rounded(product, n.of[7], n.of[8], n.of[9]);
  Py_END_ALLOW_THREADS;
  Py_RETURN_NONE;
}

PyObject *forward_and_keep_of(PyObject *, PyObject *const *arguments, Py_ssize_t num) {
  Numbers<17> n;
  if (!n.read(arguments, num)) return nullptr;
  const KeptForward kept{static_cast<Format>(n.of[0]), n.at<const void>(1), n.at<const void>(2), n.at<const void>(3),
                         n.at<const void>(4), n.at<const float>(5), n.at<const int64_t>(6), n.at<const int64_t>(7),
                         n.at<const int64_t>(8), n.at<void>(9), n.at<void>(10), n.at<void>(11), n.of[12], n.of[13], n.of[14]};
  Py_BEGIN_ALLOW_THREADS;
  forward_and_keep(kept, n.of[15], n.of[16]);
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
    method("multiply_rounded", multiply_rounded_of),
    method("forward_and_keep", forward_and_keep_of),
    {nullptr, nullptr, 0, nullptr},
};
