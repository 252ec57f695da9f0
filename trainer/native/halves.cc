// Float32 gradients to float16 and back, and sums of float16 in float32: see half_sum.py.
//
// Functions of MXNet's engine: it calls them, on its threads, when the arrays of their task are
// ready. Eight numbers at a time, with F16C.

#include <cstdint>

#include <immintrin.h>

#define F16C __attribute__((target("avx,f16c")))

namespace {

int (*get_data)(void* array, void** data);
int (*shallow_copy)(void* array, void** copy);
int (*free_array)(void* array);

// Arrays of the engine's, kept alive, and how many numbers of each row are meant.
struct Task {
  void *from, *to;
  int64_t numbers;
  int rows;

  template <typename T>
  static T* memory(void* array) {
    void* data = nullptr;
    get_data(array, &data);
    return static_cast<T*>(data);
  }
};

F16C __m256 load(const uint16_t* at) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at)));
}

F16C void store(uint16_t* at, __m256 values) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(at),
                   _mm256_cvtps_ph(values, _MM_FROUND_TO_NEAREST_INT));
}

}  // namespace

#define EXPORTED extern "C" __attribute__((visibility("default")))

EXPORTED int supported() { return __builtin_cpu_supports("f16c") && __builtin_cpu_supports("avx"); }

EXPORTED void load_interface(decltype(get_data) data, decltype(shallow_copy) copy,
                             decltype(free_array) release) {
  get_data = data, shallow_copy = copy, free_array = release;
}

// numbers: a multiple of 8.
EXPORTED void* new_task(void* from, void* to, int64_t numbers, int rows) {
  Task* task = new Task{nullptr, nullptr, numbers, rows};
  shallow_copy(from, &task->from);
  shallow_copy(to, &task->to);
  return task;
}

EXPORTED void free_task(void* param) {
  Task* task = static_cast<Task*>(param);
  free_array(task->from);
  free_array(task->to);
  delete task;
}

EXPORTED F16C void round_to_half(void*, void* param) {
  const Task& task = *static_cast<Task*>(param);
  const float* from = Task::memory<float>(task.from);
  uint16_t* to = Task::memory<uint16_t>(task.to);
  for (int64_t i = 0; i < task.numbers; i += 8) store(to + i, _mm256_loadu_ps(from + i));
}

EXPORTED F16C void widen(void*, void* param) {
  const Task& task = *static_cast<Task*>(param);
  const uint16_t* from = Task::memory<uint16_t>(task.from);
  float* to = Task::memory<float>(task.to);
  for (int64_t i = 0; i < task.numbers; i += 8) _mm256_storeu_ps(to + i, load(from + i));
}

// The sum of the rows, in their order.
EXPORTED F16C void sum_rows(void*, void* param) {
  const Task& task = *static_cast<Task*>(param);
  const uint16_t* from = Task::memory<uint16_t>(task.from);
  uint16_t* to = Task::memory<uint16_t>(task.to);
  for (int64_t i = 0; i < task.numbers; i += 8) {
    __m256 sum = load(from + i);
    for (int row = 1; row < task.rows; ++row)
      sum = _mm256_add_ps(sum, load(from + row * task.numbers + i));
    store(to + i, sum);
  }
}
