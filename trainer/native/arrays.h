// Access to MXNet's arrays: small ones are copied as float64, large ones processed in place.

#pragma once

#include <cstdint>
#include <type_traits>
#include <vector>

#include "half.h"
#include "interface.h"

namespace batch_norm {

// From MXNet's C API: what to do with an output, and dtypes.
enum Request { kNull, kWrite, kInplace, kAdd };
enum DType { kFloat32 = 0, kFloat64 = 1, kFloat16 = 2 };

using Vector = std::vector<double>;

// A large array as (outer, channels, inner).
struct Layout {
  int64_t outer, channels, inner;
  int64_t samples() const { return outer * inner; }
};

struct Array {
  explicit Array(void* handle) {
    int dimensions;
    const int* shape;
    api.get_data(handle, &data);
    api.get_dtype(handle, &dtype);
    api.get_shape(handle, &dimensions, &shape);
    dims.assign(shape, shape + dimensions);
  }

  Layout layout(int axis) const {
    Layout l{1, dims[axis], 1};
    for (int i = 0; i < int(dims.size()); ++i)
      if (i != axis) (i < axis ? l.outer : l.inner) *= dims[i];
    return l;
  }

  // Calls f with the data as a pointer to their dtype.
  template <typename F>
  void visit(F f) const {
    if (dtype == kFloat64) f(static_cast<double*>(data));
    else if (dtype == kFloat16) f(static_cast<Half*>(data));
    else f(static_cast<float*>(data));
  }

  Vector read() const {
    Vector values;
    visit([&](auto* from) { values.assign(from, from + dims[0]); });
    return values;
  }

  void write(const Vector& values, int request) const {
    if (request == kNull) return;
    visit([&](auto* to) {
      for (double value : values) {
        using T = typename std::remove_reference<decltype(*to)>::type;
        *to = static_cast<T>(request == kAdd ? double(*to) + value : value);
        ++to;
      }
    });
  }

  void* data;
  int dtype;
  std::vector<int> dims;
};

// The arrays of a callback, which it has to free.
struct Arrays {
  Arrays(void** handles, int count) : handles(handles), count(count) {}
  ~Arrays() {
    for (int i = 0; i < count; ++i) api.free_array(handles[i]);
  }
  Array operator[](int i) const { return Array(handles[i]); }
  void** handles;
  int count;
};

}  // namespace batch_norm
