// The pieces as Python calls them: a description as bytes, as trinity/models/common/native_step.py packs it, then integers.
#include <Python.h>

#include <string.h>

#include "plan.h"

namespace {

using namespace trinity;

constexpr int kMost = 16;

// The description and the integers of a call; false, and Python's error set, where they are not what is wanted.
template <class T>
bool taken(PyObject *const *arguments, Py_ssize_t num, int wanted, T *what, int64_t *integers) {
  char *bytes;
  Py_ssize_t size;
  if (num != wanted + 1) {
    PyErr_Format(PyExc_TypeError, "%zd arguments, not %d", num, wanted + 1);
    return false;
  }
  if (PyBytes_AsStringAndSize(arguments[0], &bytes, &size)) return false;
  if (size != static_cast<Py_ssize_t>(sizeof(T))) {
    PyErr_Format(PyExc_ValueError, "a description of %zd bytes, not %zd", size, static_cast<Py_ssize_t>(sizeof(T)));
    return false;
  }
  memcpy(what, bytes, sizeof(T));
  for (int i = 0; i < wanted; i++) {
    integers[i] = PyLong_AsLongLong(arguments[i + 1]);
    if (integers[i] == -1 && PyErr_Occurred()) return false;
  }
  return true;
}

void *address(int64_t integer) { return reinterpret_cast<void *>(static_cast<intptr_t>(integer)); }

PyObject *step_project(PyObject *, PyObject *const *arguments, Py_ssize_t num) {
  Project what;
  int64_t i[kMost];
  if (!taken(arguments, num, 9, &what, i)) return nullptr;
  Py_BEGIN_ALLOW_THREADS;
  project(what, static_cast<int>(i[0]), i[1], address(i[2]), address(i[3]), address(i[4]), address(i[5]), address(i[6]),
          address(i[7]), address(i[8]));
  Py_END_ALLOW_THREADS;
  Py_RETURN_NONE;
}

PyObject *step_attend(PyObject *, PyObject *const *arguments, Py_ssize_t num) {
  Attend what;
  int64_t i[kMost];
  if (!taken(arguments, num, 7, &what, i)) return nullptr;
  Py_BEGIN_ALLOW_THREADS;
  attend(what, static_cast<int>(i[0]), address(i[1]), address(i[2]), address(i[3]), address(i[4]), address(i[5]), address(i[6]));
  Py_END_ALLOW_THREADS;
  Py_RETURN_NONE;
}

Routed routed_at(const int64_t *i) {
  return {static_cast<float *>(address(i[0])), static_cast<float *>(address(i[1])), static_cast<int64_t *>(address(i[2])),
          static_cast<float *>(address(i[3]))};
}

PyObject *step_route(PyObject *, PyObject *const *arguments, Py_ssize_t num) {
  Route what;
  int64_t i[kMost];
  if (!taken(arguments, num, 11, &what, i)) return nullptr;
  Py_BEGIN_ALLOW_THREADS;
  route(what, static_cast<int>(i[0]), i[1], address(i[2]), address(i[3]), address(i[4]), address(i[5]), address(i[6]),
        routed_at(i + 7));
  Py_END_ALLOW_THREADS;
  Py_RETURN_NONE;
}

PyObject *step_leave(PyObject *, PyObject *const *arguments, Py_ssize_t num) {
  Leave what;
  int64_t i[kMost];
  if (!taken(arguments, num, 6, &what, i)) return nullptr;
  Py_BEGIN_ALLOW_THREADS;
  leave(what, static_cast<int>(i[0]), i[1], address(i[2]), address(i[3]), address(i[4]), address(i[5]));
  Py_END_ALLOW_THREADS;
  Py_RETURN_NONE;
}

PyObject *step_choose(PyObject *, PyObject *const *arguments, Py_ssize_t num) {
  Route what;
  int64_t i[kMost];
  if (!taken(arguments, num, 5, &what, i)) return nullptr;
  Py_BEGIN_ALLOW_THREADS;
  choose(what, i[0], routed_at(i + 1));
  Py_END_ALLOW_THREADS;
  Py_RETURN_NONE;
}

PyObject *step_experts(PyObject *, PyObject *const *arguments, Py_ssize_t num) {
  Experts what;
  int64_t i[kMost];
  bool is_done;
  if (!taken(arguments, num, 7, &what, i)) return nullptr;
  Py_BEGIN_ALLOW_THREADS;
  is_done = experts(what, static_cast<int>(i[0]), i[1], address(i[2]), static_cast<const int64_t *>(address(i[3])),
                    static_cast<const float *>(address(i[4])), address(i[5]), static_cast<int64_t *>(address(i[6])), Local{},
                    nullptr);
  Py_END_ALLOW_THREADS;
  return PyBool_FromLong(is_done);
}

// The bytes of so many structs, or null and Python's error set; none of None.
template <class T>
bool structs(PyObject *from, int64_t wanted, const T **found) {
  *found = nullptr;
  if (from == Py_None) return true;
  char *bytes;
  Py_ssize_t size;
  if (PyBytes_AsStringAndSize(from, &bytes, &size)) return false;
  if (size != static_cast<Py_ssize_t>(wanted * sizeof(T))) {
    PyErr_Format(PyExc_ValueError, "a description of %zd bytes, not %lld", size, static_cast<long long>(wanted * sizeof(T)));
    return false;
  }
  *found = reinterpret_cast<const T *>(bytes);
  return true;
}

// (list of ring_plan's or None, the caller's name, first op, version, priority, seconds), or None
bool near_of(PyObject *from, int64_t num_layers, Near *near) {
  if (from == Py_None) return true;
  PyObject *plans;
  const char *name;
  long long first_op, version, priority;
  if (!PyArg_ParseTuple(from, "OsLLLd", &plans, &name, &first_op, &version, &priority, &near->left_s)) return false;
  near->name = name, near->first_op = first_op, near->version = version, near->priority = priority;
  if (PyList_Size(plans) != num_layers) return PyErr_SetString(PyExc_ValueError, "a plan for each layer, or None"), false;
  for (int64_t layer = 0; layer < num_layers; layer++) {
    PyObject *each = PyList_GetItem(plans, layer);
    void *plan = each == Py_None ? nullptr : PyCapsule_GetPointer(each, "trinity.plan");
    if (!plan && each != Py_None) return false;
    near->plans.push_back(plan ? *static_cast<std::shared_ptr<Plan> *>(plan) : nullptr);
  }
  return true;
}

// (number of layers, layers, head, experts, number of attentions, attentions, memory or None, run, near or None, at)
// -> where Python goes on, and above 32 bits why rings were of no use
PyObject *step_run(PyObject *, PyObject *const *a, Py_ssize_t num) {
  if (num != 10) return PyErr_Format(PyExc_TypeError, "%zd arguments, not 10", num);
  Step step;
  const int64_t attends = PyLong_AsLongLong(a[4]), at = PyLong_AsLongLong(a[9]);
  step.num_layers = PyLong_AsLongLong(a[0]);
  if (PyErr_Occurred()) return nullptr;
  if (!structs(a[1], step.num_layers, &step.layers) || !structs(a[2], 1, &step.head) ||
      !structs(a[3], step.num_layers, &step.experts) || !structs(a[5], attends, &step.attends) ||
      !structs(a[6], step.num_layers, &step.memory) || !structs(a[7], 1, &step.run) ||
      !near_of(a[8], step.num_layers, &step.near))
    return nullptr;
  Stop stop;
  Py_BEGIN_ALLOW_THREADS;
  stop = go(step, at);
  Py_END_ALLOW_THREADS;
  return PyLong_FromLongLong(stop.at | stop.failure << 32);
}

PyObject *step_local(PyObject *, PyObject *const *arguments, Py_ssize_t num) {
  Local what;
  int64_t i[kMost];
  if (!taken(arguments, num, 4, &what, i)) return nullptr;
  Py_BEGIN_ALLOW_THREADS;
  feed_forward_all(what, static_cast<int>(i[0]), i[1], address(i[2]), address(i[3]));
  Py_END_ALLOW_THREADS;
  Py_RETURN_NONE;
}

PyObject *step_finish(PyObject *, PyObject *const *arguments, Py_ssize_t num) {
  Ending what;
  int64_t i[kMost];
  if (!taken(arguments, num, 5, &what, i)) return nullptr;
  Py_BEGIN_ALLOW_THREADS;
  finish(what, static_cast<int>(i[0]), i[1], address(i[2]), address(i[3]), address(i[4]));
  Py_END_ALLOW_THREADS;
  Py_RETURN_NONE;
}

}  // namespace

#define METHOD(name) {#name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(name)), METH_FASTCALL, nullptr}

PyMethodDef step_methods[] = {METHOD(step_project), METHOD(step_attend), METHOD(step_route), METHOD(step_leave),
                              METHOD(step_choose), METHOD(step_experts), METHOD(step_run), METHOD(step_local),
                              METHOD(step_finish), {nullptr, nullptr, 0, nullptr}};
