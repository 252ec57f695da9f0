// What this library calls in MXNet and in Python, and the two numbers it shares with Python.
//
// No header of MXNet is needed: what is used of its C API (c_api.h) is declared here, in arrays.h
// and in batch_norm.cc.

#pragma once

#include <cstdint>

namespace batch_norm {

// Handed over once, by load().
struct Interface {
  int (*get_data)(void* array, void** data);
  int (*get_shape)(void* array, int* dimensions, const int** shape);
  int (*get_dtype)(void* array, int* dtype);
  int (*free_array)(void* array);
  // RankSum.__call__: replaces the values by their sum over ranks; 0 if it failed.
  int (*python_sum)(int serial, double* values, int count);
  // SharedMemorySum.check_peers, in its n-th call; 0 if a peer is dead.
  int (*look)(int serial, int64_t calls);
  const volatile int* batch_is_empty;
  int64_t* nanoseconds;  // what sums through memory have taken; of all threads
};

extern Interface api;

}  // namespace batch_norm
