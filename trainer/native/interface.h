// The functions that this library calls in MXNet and Python, and the variables shared with Python.
//
// MXNet's headers are not needed: the parts of its C API (c_api.h) in use are declared here, in
// arrays.h and in batch_norm.cc.

#pragma once

#include <cstdint>

namespace batch_norm {

// Set once, by load().
struct Interface {
  int (*get_data)(void* array, void** data);
  int (*get_shape)(void* array, int* dimensions, const int** shape);
  int (*get_dtype)(void* array, int* dtype);
  int (*free_array)(void* array);
  // RankSum.__call__: replaces the values by their sum over ranks; 0 if it failed.
  int (*python_sum)(int serial, double* values, int count);
  // SharedMemorySum.check_peers, in the calls-th sum; 0 if a peer has died.
  int (*look)(int serial, int64_t calls);
  const volatile int* batch_is_empty;
  int64_t* nanoseconds;  // total time of sums through shared memory, over all threads
};

extern Interface api;

}  // namespace batch_norm
