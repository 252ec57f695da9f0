// The operator of coefficients.py in C++: same sums, same outputs, without Python in a step.
//
// To MXNet's C API a custom operator is a list of C callbacks; mx.operator.register passes those of
// Python, this file its own. MXNet runs forward and backward on threads that it creates as needed,
// so one that waits for other ranks does not block anything else.

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <utility>

#include "arrays.h"
#include "interface.h"
#include "operator.h"
#include "sums.h"

namespace batch_norm {

Interface api;

namespace {

Sums sums;

// ---- callbacks of MXNet; they return 1 for success, 0 for failure

struct MXCallbackList {
  int num_callbacks;
  void (**callbacks)(void);
  void** contexts;
};

// The properties of one layer, parsed from its arguments; MXNet creates operators from it.
struct Property {
  std::shared_ptr<Sum> sum;
  int axis = 1;
  double epsilon = 1e-5;
  bool scale = true;
  // Results of infer_shape and declare_backward_dependency, which MXNet reads after the call.
  int dims[8][2];
  int dependencies[4];
  void* contexts[8];
};

template <typename F>
void (*callback(F function))(void) {
  return reinterpret_cast<void (*)(void)>(function);
}

int delete_property(void* property) {
  delete static_cast<Property*>(property);
  return 1;
}

template <int which>
int list_names(const char*** names, void*) {
  static const char* lists[][4] = {{"x", "gamma", "beta"},
                                   {"kernel_gamma", "kernel_beta", "pair"},
                                   {"running_mean", "running_var"}};
  *names = lists[which];
  return 1;
}

int infer_shape(int, int* dimensions, int** shapes, void* self) {
  Property* property = static_cast<Property*>(self);
  const int axis = property->axis < 0 ? property->axis + dimensions[0] : property->axis;
  if (axis < 0 || axis >= dimensions[0]) return 0;  // MXNet's message names the operator
  for (int i = 1; i < 8; ++i) {
    property->dims[i][0] = shapes[0][axis];
    property->dims[i][1] = 2;
    dimensions[i] = i == 5 ? 2 : 1;  // pair has two values per channel
    shapes[i] = property->dims[i];
  }
  return 1;
}

int infer_type(int, int* types, void*) {
  for (int i : {3, 4, 5, 6, 7}) types[i] = types[2];
  return 1;
}

// Backward reads the outputs' gradients and x.
int declare_backward_dependency(const int* out_grad, const int* in_data, const int*, int* count,
                                int** list, void* self) {
  int* dependencies = static_cast<Property*>(self)->dependencies;
  std::copy(out_grad, out_grad + 3, dependencies);
  dependencies[3] = in_data[0];
  *count = 4;
  *list = dependencies;
  return 1;
}

// An operator that is the context of its own callbacks.
struct OperatorInContext : Operator {
  using Operator::Operator;
  void* contexts[3] = {this, this, this};
};

int delete_operator(void* self) {
  delete static_cast<OperatorInContext*>(self);
  return 1;
}

int forward(int count, void** handles, const int*, const int* requests, int is_train, void* self) {
  const Arrays arrays(handles, count);
  return static_cast<OperatorInContext*>(self)->forward(arrays, requests, is_train);
}

int backward(int count, void** handles, const int*, const int* requests, int, void* self) {
  const Arrays arrays(handles, count);
  return static_cast<OperatorInContext*>(self)->backward(arrays, requests);
}

int create_operator(const char*, int, unsigned**, const int* dimensions, const int*,
                    MXCallbackList* list, void* self) {
  static void (*callbacks[])(void) = {callback(delete_operator), callback(forward),
                                      callback(backward)};
  const Property* p = static_cast<Property*>(self);
  const int axis = p->axis < 0 ? p->axis + dimensions[0] : p->axis;
  auto* made = new OperatorInContext(p->sum, axis, p->epsilon, p->scale);
  *list = MXCallbackList{3, callbacks, made->contexts};
  return 1;
}

int create_property(const char*, int count, const char** keys, const char** values,
                    MXCallbackList* list) {
  static void (*callbacks[])(void) = {
      callback(delete_property), callback(list_names<0>), callback(list_names<1>),
      callback(list_names<2>), callback(infer_shape),
      callback(declare_backward_dependency), callback(create_operator), callback(infer_type)};
  Property* property = new Property;
  for (int i = 0; i < count; ++i) {
    const std::string key = keys[i];
    if (key == "rank_sum") property->sum = sums.of(std::atoi(values[i]));
    if (key == "axis") property->axis = std::atoi(values[i]);
    if (key == "epsilon") property->epsilon = std::strtod(values[i], nullptr);
    if (key == "scale") property->scale = !std::strcmp(values[i], "True");
  }
  for (void*& context : property->contexts) context = property;
  *list = MXCallbackList{8, callbacks, property->contexts};
  return 1;
}

}  // namespace

// ---- called by coefficients_native.py

#pragma GCC visibility push(default)
extern "C" {

void* load(const Interface* given) {
  api = *given;
  return reinterpret_cast<void*>(create_property);
}

// Moves a RankSum's sums to shared memory; called within one of them, or before the first.
// `channel` is what channel_open returned, or null.
void share(int serial, int file, int64_t calls, int index, int size, int capacity, int one_node,
           const void* channel, uint32_t stream) {
  auto of_leader = channel ? *static_cast<const std::shared_ptr<Channel>*>(channel) : nullptr;
  std::unique_ptr<SharedSum> shared(new SharedSum(serial, file, calls, index, size, capacity,
                                                  one_node, std::move(of_leader), stream));
  if (shared->mapped()) sums.of(serial)->shared = std::move(shared);
}

void forget(int serial) { sums.forget(serial); }

void unshare(int serial) { sums.unshare(serial); }

// ---- called by channel.py

// Takes over the sockets, each connected with the leader of a peer, a node.
void* channel_open(int node, int nodes, int links, const int* peers, const int* sockets,
                   double timeout) {
  return new std::shared_ptr<Channel>(new Channel(node, nodes, {peers, peers + links},
                                                  {sockets, sockets + links}, timeout));
}

int channel_sum(void* opened, uint32_t stream, int64_t call, void* values, int count, int integer) {
  Channel& channel = **static_cast<std::shared_ptr<Channel>*>(opened);
  if (integer) return channel.sum(stream, call, static_cast<uint64_t*>(values), count);
  return channel.sum(stream, call, static_cast<double*>(values), count);
}

int channel_lost(const void* opened) {
  return (*static_cast<const std::shared_ptr<Channel>*>(opened))->lost();
}

void channel_abandon(const void* opened) {
  (*static_cast<const std::shared_ptr<Channel>*>(opened))->abandon();
}

void channel_close(void* opened) { delete static_cast<std::shared_ptr<Channel>*>(opened); }

}  // extern "C"
#pragma GCC visibility pop

}  // namespace batch_norm
