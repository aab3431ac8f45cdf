// The pieces as Python calls them: a description as bytes, as trinity/models/common/native_step.py packs it, then integers.
#include <Python.h>

#include <string.h>

#include <type_traits>
#include <utility>

#include "plan.h"

namespace {

using namespace trinity;

// The description and the integers of a call; false, and Python's error set, where they are not what is wanted.
template <class What>
bool taken(PyObject *const *arguments, Py_ssize_t num, int wanted, What *what, int64_t *integers) {
  char *bytes;
  Py_ssize_t size;
  if (num != wanted + 1) {
    PyErr_Format(PyExc_TypeError, "%zd arguments, not %d", num, wanted + 1);
    return false;
  }
  if (PyBytes_AsStringAndSize(arguments[0], &bytes, &size)) return false;
  if (size != static_cast<Py_ssize_t>(sizeof(What))) {
    PyErr_Format(PyExc_ValueError, "a description of %zd bytes, not %zd", size, static_cast<Py_ssize_t>(sizeof(What)));
    return false;
  }
  memcpy(what, bytes, sizeof(What));
  for (int i = 0; i < wanted; i++) {
    integers[i] = PyLong_AsLongLong(arguments[i + 1]);
    if (integers[i] == -1 && PyErr_Occurred()) return false;
  }
  return true;
}

template <class T>
T as(int64_t integer) {
  if constexpr (std::is_pointer_v<T>) return reinterpret_cast<T>(static_cast<intptr_t>(integer));
  else return static_cast<T>(integer);
}

// A method of a function of a description and of integers and addresses -> what it returns, if it is anything.
template <auto function>
struct Method;

template <class Result, class What, class... Rest, Result (*function)(const What &, Rest...)>
struct Method<function> {
  static PyObject *call(PyObject *, PyObject *const *arguments, Py_ssize_t num) {
    What what;
    int64_t integers[sizeof...(Rest)];
    if (!taken(arguments, num, sizeof...(Rest), &what, integers)) return nullptr;
    return called(what, integers, std::index_sequence_for<Rest...>());
  }

 private:
  template <size_t... at>
  static PyObject *called(const What &what, const int64_t *integers, std::index_sequence<at...>) {
    bool is_done = true;
    Py_BEGIN_ALLOW_THREADS;
    if constexpr (std::is_void_v<Result>) function(what, as<Rest>(integers[at])...);
    else is_done = function(what, as<Rest>(integers[at])...);
    Py_END_ALLOW_THREADS;
    if constexpr (std::is_void_v<Result>) Py_RETURN_NONE;
    return PyBool_FromLong(is_done);
  }
};

// Functions whose structs come as their fields.

void attend_flat(const Attend &what, int threads, int64_t num, const int64_t *row, const int64_t *position, const void *q, const void *k,
                 const void *v, void *keys, void *values, float *key_scale, float *value_scale, void *out) {
  attend(what, threads, {num, row, position}, q, k, v, {keys, values, key_scale, value_scale}, out);
}

void route_flat(const Route &what, int threads, int64_t num, const void *mixed, const void *gate, const void *h, void *residual,
                void *x, float *logits, float *scores, int64_t *ids, float *weights) {
  route(what, threads, num, mixed, gate, h, residual, x, {logits, scores, ids, weights});
}

void choose_flat(const Route &what, int64_t num, float *logits, float *scores, int64_t *ids, float *weights) {
  choose(what, num, {logits, scores, ids, weights});
}

bool experts_alone(const Experts &what, int threads, int64_t num, const void *x, const int64_t *ids, const float *weights, void *y,
                   int64_t *rows) {
  return experts(what, threads, num, x, ids, weights, y, rows, Local{}, nullptr);
}

// (is bfloat16, threads, rows, numbers of a row, numbers, places of the highest, the highest)
PyObject *step_highest(PyObject *, PyObject *const *arguments, Py_ssize_t num) {
  int64_t i[7];
  if (num != 7) return PyErr_Format(PyExc_TypeError, "%zd arguments, not 7", num);
  for (int at = 0; at < 7; at++) i[at] = PyLong_AsLongLong(arguments[at]);
  if (PyErr_Occurred()) return nullptr;
  Py_BEGIN_ALLOW_THREADS;
  highest(i[0], static_cast<int>(i[1]), i[2], i[3], as<void *>(i[4]), as<int64_t *>(i[5]), as<float *>(i[6]));
  Py_END_ALLOW_THREADS;
  Py_RETURN_NONE;
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

}  // namespace

#define FAST(name, function) {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function)), METH_FASTCALL, nullptr}
#define METHOD(name, function) FAST(name, Method<function>::call)

PyMethodDef step_methods[] = {METHOD("step_project", project), METHOD("step_attend", attend_flat), METHOD("step_route", route_flat),
                              METHOD("step_leave", leave), METHOD("step_choose", choose_flat),
                              METHOD("step_experts", experts_alone), METHOD("step_local", feed_forward_all),
                              METHOD("step_finish", finish), FAST("step_highest", step_highest), FAST("step_run", step_run),
                              {nullptr, nullptr, 0, nullptr}};
