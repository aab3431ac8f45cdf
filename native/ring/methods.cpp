// The ring as Python sees it: capsules for what lives on, numbers for everything else. Waiting is done without Python's lock.
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <string>

#ifdef __linux__
#include "caller.h"
#include "experts.h"
#include "served.h"
#include "service.h"
#include "stream.h"

using namespace trinity;

namespace {

constexpr long long kFewTokens = 64;

using ServicePtr = std::shared_ptr<Service>;
using PlanPtr = std::shared_ptr<Plan>;

template <class T>
struct Name;
template <>
struct Name<WayPtr> { static constexpr const char* value = "trinity.ring"; };
template <>
struct Name<PlanPtr> { static constexpr const char* value = "trinity.plan"; };
template <>
struct Name<Pending> { static constexpr const char* value = "trinity.pending"; };
template <>
struct Name<ServicePtr> { static constexpr const char* value = "trinity.service"; };
template <>
struct Name<Attachment> { static constexpr const char* value = "trinity.attachment"; };
template <>
struct Name<Served> { static constexpr const char* value = "trinity.served"; };
template <>
struct Name<LayerPtr> { static constexpr const char* value = "trinity.layer"; };

template <class T>
PyObject* capsule(T* made) {
  PyObject* found = PyCapsule_New(made, Name<T>::value, [](PyObject* of) {
    T* owned = static_cast<T*>(PyCapsule_GetPointer(of, Name<T>::value));
    Py_BEGIN_ALLOW_THREADS delete owned;  // may wait for a thread
    Py_END_ALLOW_THREADS
  });
  if (!found) delete made;
  return found;
}

template <class T>
T* inside(PyObject* of) {
  return static_cast<T*>(PyCapsule_GetPointer(of, Name<T>::value));
}

PyObject* ring_open(PyObject*, PyObject* args) {
  int fd, sock;
  if (!PyArg_ParseTuple(args, "ii", &fd, &sock)) return nullptr;
  auto ring = std::make_shared<Ring>(fd, sock);
  if (!ring->ok()) Py_RETURN_NONE;
  return capsule(new WayPtr(std::move(ring)));
}

// (fd, magic): owns the descriptor
PyObject* ring_stream(PyObject*, PyObject* args) {
  int fd;
  const char* magic;
  Py_ssize_t size;
  if (!PyArg_ParseTuple(args, "iy#", &fd, &magic, &size)) return nullptr;
  if (size != 4) return PyErr_Format(PyExc_ValueError, "frames start with 4 bytes, not %zd", size);
  return capsule(new WayPtr(std::make_shared<Stream>(fd, magic)));
}

PyObject* ring_close(PyObject*, PyObject* arg) {
  WayPtr* ring = inside<WayPtr>(arg);
  if (!ring) return nullptr;
  (*ring)->close();
  Py_RETURN_NONE;
}

PyObject* ring_is_open(PyObject*, PyObject* arg) {
  WayPtr* ring = inside<WayPtr>(arg);
  return ring ? PyBool_FromLong((*ring)->ok()) : nullptr;
}

// (service, fd, magic)
PyObject* ring_serve(PyObject*, PyObject* args) {
  PyObject* of;
  int fd;
  const char* magic;
  Py_ssize_t size;
  if (!PyArg_ParseTuple(args, "Oiy#", &of, &fd, &magic, &size)) return nullptr;
  if (size != 4) return PyErr_Format(PyExc_ValueError, "frames start with 4 bytes, not %zd", size);
  ServicePtr* service = inside<ServicePtr>(of);
  return service ? capsule(new Served(*service, fd, magic)) : nullptr;
}

// served -> (head, None or what follows it) of a frame that Python is to answer, or None
PyObject* ring_next(PyObject*, PyObject* arg) {
  Served* served = inside<Served>(arg);
  if (!served) return nullptr;
  Served::Next found;
  Py_BEGIN_ALLOW_THREADS found = served->next();
  Py_END_ALLOW_THREADS
  if (found == Served::kEnded) Py_RETURN_NONE;
  std::string payload;
  if (found == Served::kWhole)
    for (int i = 0; i < 3; ++i) payload.append(static_cast<const char*>(served->payload()[i].iov_base), served->payload()[i].iov_len);
  const char* head = reinterpret_cast<const char*>(&served->head);
  return Py_BuildValue("y#y#", head, Py_ssize_t{sizeof served->head}, found == Served::kWhole ? payload.data() : nullptr, static_cast<Py_ssize_t>(payload.size()));
}

PyObject* ring_service(PyObject*, PyObject*) { return capsule(new ServicePtr(std::make_shared<Service>())); }

// (service, fd) -> attachment, or None where the descriptor is no ring of this layout
PyObject* ring_attach(PyObject*, PyObject* args) {
  PyObject* of;
  int fd;
  if (!PyArg_ParseTuple(args, "Oi", &of, &fd)) return nullptr;
  ServicePtr* service = inside<ServicePtr>(of);
  if (!service) return nullptr;
  std::unique_ptr<Attachment> made = Attachment::make(*service, fd);
  if (!made) Py_RETURN_NONE;
  return capsule(made.release());
}

PyObject* ring_detach(PyObject*, PyObject* arg) {
  Attachment* attachment = inside<Attachment>(arg);
  if (!attachment) return nullptr;
  Py_BEGIN_ALLOW_THREADS attachment->stop();
  Py_END_ALLOW_THREADS
  Py_RETURN_NONE;
}

// (layer, version, format of rows, dim, hidden, kernel, address of ids [E], E, X, addresses of the stacks) -> layer
PyObject* ring_layer(PyObject*, PyObject* args) {
  int layer, format;
  long long version, dim, hidden, num_experts, num_all;
  unsigned long long kernel, ids, stacks[9] = {};
  if (!PyArg_ParseTuple(args, "iLiLLKKLL|KKKKKKKKK", &layer, &version, &format, &dim, &hidden, &kernel, &ids, &num_experts, &num_all, stacks,
                        stacks + 1, stacks + 2, stacks + 3, stacks + 4, stacks + 5, stacks + 6, stacks + 7, stacks + 8))
    return nullptr;
  auto made = std::make_shared<Layer>();
  made->format = static_cast<uint32_t>(format);
  made->layer = layer, made->version = version, made->dim = dim, made->hidden = hidden;
  made->kernel = reinterpret_cast<ExpertKernel>(kernel);
  const int64_t* first = reinterpret_cast<const int64_t*>(ids);
  made->experts.assign(first, first + num_experts);
  made->rows.assign(num_experts, 0);
  made->position.assign(num_all, kNotHeld);
  for (int32_t e = 0; e < num_experts; ++e) {
    if (first[e] < 0 || first[e] >= num_all) return PyErr_Format(PyExc_ValueError, "expert %lld of %lld", (long long)first[e], num_all);
    made->position[first[e]] = e;
  }
  for (int i = 0; i < 9; ++i) made->stacks[i] = reinterpret_cast<const void*>(stacks[i]);
  return capsule(new LayerPtr(std::move(made)));
}

PyObject* ring_kernel(PyObject*, PyObject* arg) {
  const unsigned long format = PyLong_AsUnsignedLong(arg);
  if (PyErr_Occurred()) return nullptr;
  return PyLong_FromUnsignedLongLong(reinterpret_cast<uintptr_t>(experts_in(static_cast<uint32_t>(format))));
}

PyObject* ring_bytes(PyObject*, PyObject*) { return PyLong_FromLong(static_cast<long>(kRingBytes)); }

// (service, list of layers): these and no others; returns when nobody computes with the others any more
PyObject* ring_publish(PyObject*, PyObject* args) {
  PyObject *of, *list;
  if (!PyArg_ParseTuple(args, "OO", &of, &list)) return nullptr;
  ServicePtr* service = inside<ServicePtr>(of);
  std::vector<LayerPtr> layers;
  const Py_ssize_t num = PyList_Size(list);
  if (!service || num < 0) return nullptr;
  for (Py_ssize_t i = 0; i < num; ++i) {
    LayerPtr* layer = inside<LayerPtr>(PyList_GetItem(list, i));
    if (!layer) return nullptr;
    layers.push_back(*layer);
  }
  Py_BEGIN_ALLOW_THREADS(*service)->registry.publish(layers);
  Py_END_ALLOW_THREADS
  Py_RETURN_NONE;
}

// service -> [(layer, expert, rows)] since the last time
PyObject* ring_take_counts(PyObject*, PyObject* arg) {
  ServicePtr* service = inside<ServicePtr>(arg);
  if (!service) return nullptr;
  PyObject* list = PyList_New(0);
  for (auto& [layer, expert, rows] : (*service)->registry.take_counts()) {
    PyObject* item = list ? Py_BuildValue("iLL", layer, (long long)expert, (long long)rows) : nullptr;
    if (!item || PyList_Append(list, item)) return Py_XDECREF(item), Py_XDECREF(list), nullptr;
    Py_DECREF(item);
  }
  return list;
}

// (list of rings or None, epoch, address of shards [E, N] int32, address of replicas [E] int32, E, N) -> plan
PyObject* ring_plan(PyObject*, PyObject* args) {
  PyObject* rings;
  unsigned long long shard, num_replicas;
  long long epoch, num_experts, most;
  if (!PyArg_ParseTuple(args, "OLKKLL", &rings, &epoch, &shard, &num_replicas, &num_experts, &most)) return nullptr;
  auto made = std::make_shared<Plan>();
  const int32_t* shards = reinterpret_cast<const int32_t*>(shard);
  const int32_t* replicas = reinterpret_cast<const int32_t*>(num_replicas);
  made->shard.assign(shards, shards + num_experts * most);
  made->num_replicas.assign(replicas, replicas + num_experts);
  made->is_replicated = false, made->epoch = epoch;
  const Py_ssize_t num = PyList_Size(rings);
  if (num < 0) return nullptr;
  for (Py_ssize_t i = 0; i < num; ++i) {
    PyObject* item = PyList_GetItem(rings, i);
    WayPtr* ring = item == Py_None ? nullptr : inside<WayPtr>(item);
    if (!ring && item != Py_None) return nullptr;
    made->rings.push_back(ring ? *ring : nullptr);
    made->is_far |= ring && (*ring)->is_far();
  }
  for (int32_t each : made->num_replicas) {
    if (each < 1 || each > most) return PyErr_Format(PyExc_ValueError, "%d replicas of at most %lld", each, most);
    made->is_replicated |= each > 1;
  }
  for (int32_t each : made->shard)
    if (each < 0 || each >= num) return PyErr_Format(PyExc_ValueError, "shard %d of %zd", each, num);
  return capsule(new PlanPtr(std::move(made)));
}

PyObject* failed(Failure failure) { return PyLong_FromLong(static_cast<long>(failure.code) | static_cast<long>(failure.shard) << 8); }

// (plan, op_id, layer, version, priority, until_s, format, x, ids, weights, T, D, K) -> pending, or code + 256 * shard
PyObject* ring_begin(PyObject*, PyObject* args) {
  PyObject* of;
  int layer, format;
  long long version, priority, num_tokens, dim, top_k;
  double until_s;
  const char* op_id;
  unsigned long long x, ids, weights;
  if (!PyArg_ParseTuple(args, "OsiLLdiKKKLLL", &of, &op_id, &layer, &version, &priority, &until_s, &format, &x, &ids, &weights, &num_tokens, &dim, &top_k))
    return nullptr;
  PlanPtr* plan = inside<PlanPtr>(of);
  if (!plan) return nullptr;
  auto pending = std::make_unique<Pending>(*plan);
  const Batch batch = {layer, version, priority, until_s, static_cast<uint32_t>(format), reinterpret_cast<const char*>(x), reinterpret_cast<const int64_t*>(ids),
                       reinterpret_cast<const float*>(weights), num_tokens, dim, top_k, op_id};
  Failure failure;
  if (num_tokens < kFewTokens && !(*plan)->is_far) {  // some microseconds
    failure = pending->begin(batch);
  } else {
    Py_BEGIN_ALLOW_THREADS failure = pending->begin(batch);
    Py_END_ALLOW_THREADS
  }
  return failure.code == kDone ? capsule(pending.release()) : failed(failure);
}

// (pending, address of y, until_s) -> 0, or code + 256 * shard
PyObject* ring_finish(PyObject*, PyObject* args) {
  PyObject* of;
  unsigned long long y;
  double until_s;
  if (!PyArg_ParseTuple(args, "OKd", &of, &y, &until_s)) return nullptr;
  Pending* pending = inside<Pending>(of);
  if (!pending) return nullptr;
  Failure failure;
  Py_BEGIN_ALLOW_THREADS failure = pending->finish(reinterpret_cast<char*>(y), until_s);
  Py_END_ALLOW_THREADS
  return failed(failure);
}

}  // namespace

extern PyMethodDef ring_methods[];
PyMethodDef ring_methods[] = {
    {"ring_kernel", ring_kernel, METH_O, "format -> address of what computes experts in it, 0 where there is none"},
    {"ring_bytes", ring_bytes, METH_NOARGS, "-> the size of a ring's memory"},
    {"ring_open", ring_open, METH_VARARGS, "(fd, socket) -> a caller's ring, or None"},
    {"ring_stream", ring_stream, METH_VARARGS, "(fd, magic) -> the same over a socket that nobody else uses, whose descriptor it owns"},
    {"ring_close", ring_close, METH_O, "a ring -> None: its connection is gone"},
    {"ring_is_open", ring_is_open, METH_O, "a ring -> whether it may be used"},
    {"ring_serve", ring_serve, METH_VARARGS, "(service, fd, magic) -> what answers inference on a connection"},
    {"ring_next", ring_next, METH_O, "-> (head, None or payload) of a frame for Python, or None: the peer has gone"},
    {"ring_service", ring_service, METH_NOARGS, "-> what computes for all rings of a shard"},
    {"ring_attach", ring_attach, METH_VARARGS, "(service, fd) -> a thread that serves this ring, or None"},
    {"ring_detach", ring_detach, METH_O, "an attachment -> None: its thread has ended"},
    {"ring_layer", ring_layer, METH_VARARGS, "-> a layer of a version"},
    {"ring_publish", ring_publish, METH_VARARGS, "(service, layers) -> None: these and no others"},
    {"ring_take_counts", ring_take_counts, METH_O, "service -> [(layer, expert, rows)]"},
    {"ring_plan", ring_plan, METH_VARARGS, "-> where a layer's rows go"},
    {"ring_begin", ring_begin, METH_VARARGS, "-> rows on their way, or a number that says why not"},
    {"ring_finish", ring_finish, METH_VARARGS, "-> 0, or a number that says why not"},
    {nullptr, nullptr, 0, nullptr},
};

#else
extern PyMethodDef ring_methods[];
PyMethodDef ring_methods[] = {{nullptr, nullptr, 0, nullptr}};  // no futex: the socket is the way
#endif
