// The operator of batch_norm_op.py in C++: same sums, same outputs, without Python in a step.
//
// MXNet's C API takes a custom operator as a list of C callbacks; mx.operator.register hands it
// Python's, this file its own. MXNet calls forward and backward on threads that it makes as they
// are needed, so one that waits for other ranks holds up nothing else.
//
// No header of MXNet is needed: what is used of its C API (c_api.h) is declared below.

#include <sched.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <type_traits>
#include <vector>

namespace {

// ---- of MXNet's C API

struct MXCallbackList {
  int num_callbacks;
  void (**callbacks)(void);
  void** contexts;
};
enum Request { kNull, kWrite, kInplace, kAdd };
enum DType { kFloat32 = 0, kFloat64 = 1, kFloat16 = 2 };

// ---- handed over by Python once, at loading

struct Interface {
  int (*get_data)(void* array, void** data);
  int (*get_shape)(void* array, int* dimensions, const int** shape);
  int (*get_dtype)(void* array, int* dtype);
  int (*free_array)(void* array);
  // RankSum.__call__: replaces the values by their sum over ranks; 0 if it failed.
  int (*python_sum)(int serial, double* values, int count);
  // SharedMemorySum.look, for one that waits in its n-th call; 0 if it must not go on.
  int (*look)(int serial, int64_t calls);
  const volatile int* batch_is_empty;
  int64_t* nanoseconds;  // what sums through memory have taken; of all threads
} api;

// ---- sums over ranks

using Vector = std::vector<double>;

int64_t now() {  // nanoseconds
  return std::chrono::steady_clock::now().time_since_epoch().count();
}

// SharedMemorySum of shared_memory.py, which says how it works; ranks may mix the two.
class SharedSum {
 public:
  SharedSum(int serial, int file, int64_t calls, int index, int size, int capacity)
      : serial_(serial), calls_(calls), index_(index), size_(size), capacity_(capacity) {
    bytes_ = 8 * int64_t(size) * (kCacheLine + 2 * capacity);
    memory_ = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
  }
  ~SharedSum() {
    if (mapped()) munmap(memory_, bytes_);
  }
  bool mapped() const { return memory_ != MAP_FAILED; }

  bool operator()(Vector* values) {
    double* slots = reinterpret_cast<double*>(&counter(size_)) + calls_ % 2 * (size_ * capacity_);
    std::copy(values->begin(), values->end(), slots + index_ * capacity_);
    counter(index_).store(++calls_, std::memory_order_release);
    for (int peer = 0; peer < size_; ++peer)
      if (!wait_for(peer)) return false;
    std::fill(values->begin(), values->end(), 0);
    for (int peer = 0; peer < size_; ++peer, slots += capacity_)
      for (size_t i = 0; i < values->size(); ++i) (*values)[i] += slots[i];
    return true;
  }

 private:
  static constexpr int kCacheLine = 8;  // numbers

  std::atomic<int64_t>& counter(int peer) {
    return static_cast<std::atomic<int64_t>*>(memory_)[peer * kCacheLine];
  }

  bool wait_for(int peer) {
    const int64_t start = now();
    int64_t look_at = start + 1000000000;
    while (counter(peer).load(std::memory_order_acquire) < calls_) {
      const int64_t time = now();
      if (time - start < 100000) {
        sched_yield();
        continue;
      }
      usleep(std::min<int64_t>((time - start) / 8000, 1000));  // an eighth more, at most
      if (time < look_at) continue;
      if (!api.look(serial_, calls_)) return false;
      look_at = time + 200000000;
    }
    return true;
  }

  const int serial_;
  int64_t calls_;
  const int index_, size_, capacity_;
  int64_t bytes_;
  void* memory_;
};

// Of one RankSum. Operators in flight hold it, whether or not the RankSum still lives.
struct Sum {
  bool operator()(Vector* values) {
    if (!shared) return api.python_sum(serial, values->data(), values->size());
    const int64_t start = now();
    const bool done = (*shared)(values);
    __atomic_fetch_add(api.nanoseconds, now() - start, __ATOMIC_RELAXED);
    return done;
  }
  int serial;
  std::unique_ptr<SharedSum> shared;
};

std::mutex sums_mutex;
std::map<int, std::shared_ptr<Sum>> sums;  // by the RankSum's serial

std::shared_ptr<Sum> sum_of(int serial) {
  std::lock_guard<std::mutex> guard(sums_mutex);
  std::shared_ptr<Sum>& sum = sums[serial];
  if (!sum) sum.reset(new Sum{serial, nullptr});
  return sum;
}

// ---- arrays

// IEEE 754 binary16, which compilers before GCC 12 lack.
class Half {
 public:
  explicit Half(double value) {
    const double magnitude = std::fmin(std::fabs(value), 65536);  // infinity, from here on
    const int exponent = std::max(std::ilogb(magnitude), -14);
    // A fraction of 11 bits carries into the exponent, as it should; so does one rounded up.
    bits_ = ((exponent + 14) << 10) + std::lrint(std::ldexp(magnitude, 10 - exponent));
    if (std::isnan(value)) bits_ = 0x7e00;
    if (std::signbit(value)) bits_ |= 0x8000;
  }
  operator double() const {
    const int exponent = bits_ >> 10 & 31, fraction = bits_ & 1023;
    const double magnitude = exponent == 31 ? (fraction ? NAN : INFINITY)
                             : exponent     ? std::ldexp(1024 + fraction, exponent - 25)
                                            : std::ldexp(fraction, -24);
    return bits_ & 0x8000 ? -magnitude : magnitude;
  }

 private:
  uint16_t bits_;
};

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

  // Calls f with the data as what they are.
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

// MXNet gives every array of a callback away.
struct Arrays {
  Arrays(void** handles, int count) : handles(handles), count(count) {}
  ~Arrays() {
    for (int i = 0; i < count; ++i) api.free_array(handles[i]);
  }
  Array operator[](int i) const { return Array(handles[i]); }
  void** handles;
  int count;
};

// ---- mathematics: see batch_norm_op.py

// Sums of x and of x^2 for each channel, one behind the other.
template <typename T>
Vector sums_of(const T* x, const Layout& l) {
  Vector sums(2 * l.channels);
  for (int64_t n = 0; n < l.outer; ++n)
    for (int64_t c = 0; c < l.channels; ++c, x += l.inner) {
      double first = 0, second = 0;
#pragma omp simd reduction(+ : first, second)
      for (int64_t i = 0; i < l.inner; ++i) {
        const double value = x[i];
        first += value;
        second += value * value;
      }
      sums[c] += first;
      sums[l.channels + c] += second;
    }
  return sums;
}

// to = slope x + offset, channel by channel.
template <typename T>
void line(const T* x, const Layout& l, const Vector& slope, const Vector& offset, T* to, bool add) {
  for (int64_t n = 0; n < l.outer; ++n)
    for (int64_t c = 0; c < l.channels; ++c, x += l.inner, to += l.inner)
      for (int64_t i = 0; i < l.inner; ++i)
        to[i] = static_cast<T>(slope[c] * x[i] + offset[c] + (add ? double(to[i]) : 0));
}

struct Moments {
  double samples;
  Vector mean, variance, inverse;

  Moments() = default;
  Moments(const Vector& sums, double count, double epsilon) : samples(count) {
    const size_t channels = sums.size() / 2;
    for (size_t c = 0; c < channels; ++c) {
      const double m = sums[c] / count;
      mean.push_back(m);
      variance.push_back(std::max(sums[channels + c] / count - m * m, 0.));
      inverse.push_back(1 / std::sqrt(variance[c] + epsilon));
    }
  }
};

class Operator {
 public:
  Operator(std::shared_ptr<Sum> sum, int axis, double epsilon, bool scale)
      : sum_(sum), axis_(axis), epsilon_(epsilon), scale_(scale) {}

  // x, gamma, beta; kernel_gamma, kernel_beta, pair; running_mean, running_var
  bool forward(const Arrays& arrays, const int* requests, bool is_train) {
    const Array x = arrays[0];
    gamma_ = arrays[1].read();
    if (!scale_) gamma_.assign(gamma_.size(), 1);
    Vector beta = arrays[2].read(), gamma = gamma_;
    Vector mean = arrays[6].read(), variance = arrays[7].read();
    is_train_ = is_train;
    if (is_train) {
      if (!sum_moments(x)) return false;
      for (size_t c = 0; c < gamma.size(); ++c) {
        ratio_[c] = whole_.inverse[c] / local_.inverse[c];
        shift_[c] = whole_.inverse[c] * (local_.mean[c] - whole_.mean[c]);
        beta[c] += gamma[c] * shift_[c];
        gamma[c] *= ratio_[c];
      }
      if (whole_.samples) mean = whole_.mean, variance = whole_.variance;
    }
    Vector pair;
    for (size_t c = 0; c < mean.size(); ++c)
      for (int sign : {-1, 1}) pair.push_back(mean[c] + sign * std::sqrt(variance[c]));
    arrays[3].write(gamma, requests[0]);
    arrays[4].write(beta, requests[1]);
    arrays[5].write(pair, requests[2]);
    return true;
  }

  // gradients of the three outputs; x, gamma, beta; outputs; gradients of the inputs; running ...
  bool backward(const Arrays& arrays, const int* requests) {
    const Array x = arrays[3], d_x = arrays[9];
    Vector kernel_sum = arrays[0].read(), beta_sum = arrays[1].read();
    const size_t channels = beta_sum.size();
    Vector gamma_sum = kernel_sum, slope(channels), offset(channels);
    if (is_train_) {
      if (!local_.samples) kernel_sum = beta_sum = Vector(channels);
      for (size_t c = 0; c < channels; ++c)
        gamma_sum[c] = ratio_[c] * kernel_sum[c] + shift_[c] * beta_sum[c];
      Vector total = gamma_sum;
      total.insert(total.end(), beta_sum.begin(), beta_sum.end());
      if (!(*sum_)(&total)) return false;
      for (size_t c = 0; c < channels && local_.samples; ++c) {
        const double gamma_mean = total[c] / whole_.samples;
        const double beta_mean = total[channels + c] / whole_.samples;
        const double scale = gamma_[c] * whole_.inverse[c];
        slope[c] = scale * (kernel_sum[c] / local_.samples - ratio_[c] * gamma_mean);
        offset[c] = scale * (beta_sum[c] / local_.samples - beta_mean - shift_[c] * gamma_mean);
        slope[c] *= local_.inverse[c];  // of x itself from here on
        offset[c] -= slope[c] * local_.mean[c];
      }
    }
    if (requests[0] != kNull)
      x.visit([&](auto* data) {
        line(data, x.layout(axis_), slope, offset, static_cast<decltype(data)>(d_x.data),
             requests[0] == kAdd);
      });
    arrays[10].write(gamma_sum, requests[1]);
    arrays[11].write(beta_sum, requests[2]);
    return true;
  }

  void* contexts[3];  // this, for each of the callbacks

 private:
  bool sum_moments(const Array& x) {
    const Layout layout = x.layout(axis_);
    Vector sums;
    x.visit([&](auto* data) { sums = sums_of(data, layout); });
    local_ = Moments(sums, layout.samples(), epsilon_);
    if (*api.batch_is_empty) {
      sums.assign(sums.size(), 0);
      local_.samples = 0;
    }
    sums.push_back(local_.samples);
    if (!(*sum_)(&sums)) return false;
    const double samples = sums.back();
    sums.pop_back();
    whole_ = samples ? Moments(sums, samples, epsilon_) : local_;
    ratio_.resize(layout.channels);
    shift_.resize(layout.channels);
    return true;
  }

  const std::shared_ptr<Sum> sum_;
  const int axis_;
  const double epsilon_;
  const bool scale_;
  bool is_train_ = false;
  Moments local_, whole_;
  Vector gamma_, ratio_, shift_;
};

// ---- what MXNet calls: 1 for success, 0 for failure

// Of one layer, as its arguments say; MXNet makes operators from it.
struct Property {
  std::shared_ptr<Sum> sum;
  int axis = 1;
  double epsilon = 1e-5;
  bool scale = true;
  int dims[8][2];  // what infer_shape and
  int dependencies[4];  // declare_backward_dependency answer: MXNet reads it later
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
  if (axis < 0 || axis >= dimensions[0]) return 0;  // MXNet says of which operator
  for (int i = 1; i < 8; ++i) {
    property->dims[i][0] = shapes[0][axis];
    property->dims[i][1] = 2;
    dimensions[i] = i == 5 ? 2 : 1;  // pair has a row of two for each channel
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

int delete_operator(void* self) {
  delete static_cast<Operator*>(self);
  return 1;
}

int forward(int count, void** handles, const int*, const int* requests, int is_train, void* self) {
  const Arrays arrays(handles, count);
  return static_cast<Operator*>(self)->forward(arrays, requests, is_train);
}

int backward(int count, void** handles, const int*, const int* requests, int, void* self) {
  const Arrays arrays(handles, count);
  return static_cast<Operator*>(self)->backward(arrays, requests);
}

int create_operator(const char*, int, unsigned**, const int* dimensions, const int*,
                    MXCallbackList* list, void* self) {
  static void (*callbacks[])(void) = {callback(delete_operator), callback(forward),
                                      callback(backward)};
  const Property* p = static_cast<Property*>(self);
  const int axis = p->axis < 0 ? p->axis + dimensions[0] : p->axis;
  Operator* made = new Operator(p->sum, axis, p->epsilon, p->scale);
  void** contexts = made->contexts;
  contexts[0] = contexts[1] = contexts[2] = made;
  *list = MXCallbackList{3, callbacks, contexts};
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
    if (key == "rank_sum") property->sum = sum_of(std::atoi(values[i]));
    if (key == "axis") property->axis = std::atoi(values[i]);
    if (key == "epsilon") property->epsilon = std::strtod(values[i], nullptr);
    if (key == "scale") property->scale = !std::strcmp(values[i], "True");
  }
  for (void*& context : property->contexts) context = property;
  *list = MXCallbackList{8, callbacks, property->contexts};
  return 1;
}

}  // namespace

// ---- what batch_norm_native.py calls

extern "C" {

void* load(const Interface* given) {
  api = *given;
  return reinterpret_cast<void*>(create_property);
}

// Have a RankSum's sums take this way, from within one of them or before the first.
void share(int serial, int file, int64_t calls, int index, int size, int capacity) {
  std::unique_ptr<SharedSum> shared(new SharedSum(serial, file, calls, index, size, capacity));
  if (shared->mapped()) sum_of(serial)->shared = std::move(shared);
}

void forget(int serial) {
  std::lock_guard<std::mutex> guard(sums_mutex);
  sums.erase(serial);
}

}  // extern "C"
