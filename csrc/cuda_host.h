// Runs the CUDA kernels on the host, so that they can be checked where there is no GPU: blocks one after another, the
// threads of a block as fibers that change places at barriers and shuffles.
//
// What a GPU would leave to chance is made hostile: shared memory starts as NaN in every block, and the order of the
// threads is that of the environment variable ODER_HOST_ORDER: "forward" (default), "reverse", or the seed of a
// random order, drawn anew after every barrier. Included by cuda_launch.h alone, in place of the CUDA runtime.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#define ODER_KERNEL void
#define ODER_DEVICE inline
#define ODER_BOUNDS(threads, blocks)
#define ODER_CONSTANT(type) const type
#define ODER_SHARED(type, name, count)                                                    \
  alignas(16) static type name[count];                                                    \
  static const bool name##_is_known = oder::host::block().add_shared(name, sizeof(name)); \
  static_cast<void>(name##_is_known)
#define ODER_DYNAMIC_SHARED(type, name) type* const name = reinterpret_cast<type*>(oder::host::block().dynamic_shared())

namespace oder::host {

struct Index {
  unsigned x = 0;
};

// A stack of its own, and where to go on with it.
class Fiber {
 public:
  // Makes the fiber start in `entry`, which must not return.
  void reset(void (*entry)()) {
    if (!stack_) stack_.reset(new char[kStackBytes]);
#if defined(__x86_64__)
    char* top = stack_.get() + kStackBytes;
    top -= reinterpret_cast<uintptr_t>(top) % 16 + 16;
    *reinterpret_cast<void (**)()>(top) = entry;
    // Six registers that the callee saves; their values do not matter.
    pointer_ = top - 6 * sizeof(void*);
#else
    getcontext(&context_);
    context_.uc_stack.ss_sp = stack_.get();
    context_.uc_stack.ss_size = kStackBytes;
    makecontext(&context_, entry, 0);
#endif
  }

  static void change(Fiber& from, Fiber& to) {
#if defined(__x86_64__)
    change_stack(&from.pointer_, to.pointer_);
#else
    swapcontext(&from.context_, &to.context_);
#endif
  }

 private:
  static constexpr size_t kStackBytes = 64 * 1024;
  std::unique_ptr<char[]> stack_;
#if defined(__x86_64__)
  void* pointer_ = nullptr;
  __attribute__((naked, noinline)) static void change_stack(void** /* rdi */, void* /* rsi */) {
    asm("pushq %rbp\n pushq %rbx\n pushq %r12\n pushq %r13\n pushq %r14\n pushq %r15\n"
        "movq %rsp, (%rdi)\n movq %rsi, %rsp\n"
        "popq %r15\n popq %r14\n popq %r13\n popq %r12\n popq %rbx\n popq %rbp\n ret\n");
  }
#else
  ucontext_t context_;
#endif
};

// The block that is running.
class Block {
 public:
  Index thread, index, size, grid;

  bool add_shared(void* address, size_t bytes) {
    shared_.emplace_back(address, bytes);
    std::memset(address, kUnset, bytes);
    return true;
  }

  char* dynamic_shared() { return dynamic_.get() + (16 - reinterpret_cast<uintptr_t>(dynamic_.get()) % 16); }

  void launch(const char* name, unsigned blocks, unsigned threads, size_t shared, std::function<void()> kernel) {
    const std::lock_guard<std::mutex> guard(mutex_);
    kernel_ = std::move(kernel);
    dynamic_.reset(new char[shared + 16 + kGuardBytes]);
    std::memset(dynamic_.get(), kUnset, 16);
    grid.x = blocks;
    size.x = threads;
    if (fibers_.size() < threads) fibers_.resize(threads);
    values_.resize(threads);
    copies_.assign(threads, {});
    const char* order = std::getenv("ODER_HOST_ORDER");
    order_ = order ? order : "forward";
    random_.seed(std::strtoul(order_.c_str(), nullptr, 10));
    for (index.x = 0; index.x < blocks; ++index.x) {
      for (const auto& [address, bytes] : shared_) std::memset(address, kUnset, bytes);
      std::memset(dynamic_shared(), kUnset, shared);
      std::memset(dynamic_shared() + shared, kGuard, kGuardBytes);
      run(name);
      for (size_t k = 0; k < kGuardBytes; ++k) {
        if (dynamic_shared()[shared + k] != kGuard) fail(name, "writes beyond its shared memory");
      }
    }
  }

  void wait_for_block() { wait(kAtBlock); }

  void copy_async(void* target, const void* source, size_t bytes, bool copy) {
    copies_[thread.x].push_back({target, copy ? source : nullptr, bytes});
  }

  // Nothing arrives before it is waited for.
  void wait_for_copies() {
    for (const Copy& c : copies_[thread.x]) {
      if (c.source) std::memcpy(c.target, c.source, c.bytes);
      if (!c.source) std::memset(c.target, 0, c.bytes);
    }
    copies_[thread.x].clear();
  }

  uint32_t ballot(bool value) {
    const unsigned t = thread.x, warp = t / 32 * 32, end = std::min(warp + 32, size.x);
    values_[t] = value;
    wait(kAtWarp);
    uint32_t result = 0;
    for (unsigned lane = warp; lane < end; ++lane) result |= static_cast<uint32_t>(values_[lane] != 0) << (lane - warp);
    wait(kAtWarp);
    return result;
  }

  double shuffle_down(double value, unsigned offset) {
    const unsigned t = thread.x, source = t % 32 + offset < 32 && t + offset < size.x ? t + offset : t;
    values_[t] = value;
    wait(kAtWarp);
    const double result = values_[source];
    wait(kAtWarp);
    return result;
  }

 private:
  enum State { kReady, kAtBlock, kAtWarp, kDone };
  static constexpr int kUnset = 0xff;
  static constexpr char kGuard = 0x5a;
  static constexpr size_t kGuardBytes = 256;

  std::mutex mutex_;
  std::function<void()> kernel_;
  std::vector<std::pair<void*, size_t>> shared_;
  std::unique_ptr<char[]> dynamic_;
  std::vector<Fiber> fibers_;
  Fiber scheduler_;
  std::vector<State> states_;
  std::vector<double> values_;
  struct Copy {
    void* target;
    const void* source;
    size_t bytes;
  };
  std::vector<std::vector<Copy>> copies_;
  std::string order_;
  std::mt19937 random_;

  [[noreturn]] void fail(const char* name, const char* what) {
    throw std::logic_error(std::string(name) + ": block " + std::to_string(index.x) + " " + what);
  }

  void wait(State state) {
    const unsigned t = thread.x;
    states_[t] = state;
    Fiber::change(fibers_[t], scheduler_);
  }

  static void enter();

  void run(const char* name) {
    std::vector<unsigned> order(size.x);
    std::iota(order.begin(), order.end(), 0u);
    if (order_ == "reverse") std::reverse(order.begin(), order.end());
    const bool shuffled = order_ != "reverse" && order_ != "forward";
    states_.assign(size.x, kReady);
    for (unsigned t = 0; t < size.x; ++t) fibers_[t].reset(enter);
    for (;;) {
      if (shuffled) std::shuffle(order.begin(), order.end(), random_);
      // The first in the order goes on for as long as it can, so that a warp may be a whole barrier ahead.
      for (unsigned k = 0; k < size.x; ++k) {
        const unsigned t = order[k];
        if (states_[t] != kReady) continue;
        thread.x = t;
        Fiber::change(scheduler_, fibers_[t]);
        const unsigned warp = t / 32 * 32, end = std::min(warp + 32, size.x);
        if (states_[t] == kAtWarp && all(warp, end, kAtWarp)) {
          std::fill(states_.begin() + warp, states_.begin() + end, kReady);
          k = -1u;  // from the start
        }
      }
      if (all(0, size.x, kDone)) return;
      if (!all(0, size.x, kAtBlock)) fail(name, "has a barrier that some of its threads do not reach");
      states_.assign(size.x, kReady);
    }
  }

  bool all(unsigned begin, unsigned end, State state) const {
    return std::all_of(states_.begin() + begin, states_.begin() + end, [state](State s) { return s == state; });
  }
};

inline Block& block() {
  static Block it;
  return it;
}

inline void Block::enter() {
  Block& b = block();
  b.kernel_();
  b.wait(kDone);
}

}  // namespace oder::host

// The names that kernels use.
#define threadIdx (oder::host::block().thread)
#define blockIdx (oder::host::block().index)
inline void __syncthreads() { oder::host::block().wait_for_block(); }

namespace oder {

inline int processor_count() { return 1; }
inline size_t shared_bytes() { return 227 * 1024; }

template <class... Parameters, class... Arguments>
void launch_checked(const char* name, void (*kernel)(Parameters...), int64_t blocks, int threads, size_t shared,
                    void* /* stream */, Arguments&&... arguments) {
  host::block().launch(name, static_cast<unsigned>(blocks), threads, shared,
                       [&] { kernel(static_cast<Parameters>(arguments)...); });
}

inline float float_of_bits(uint32_t bits) {
  float a;
  std::memcpy(&a, &bits, sizeof a);
  return a;
}
inline uint32_t bits_of_float(float a) {
  uint32_t bits;
  std::memcpy(&bits, &a, sizeof bits);
  return bits;
}
inline uint32_t shift_right(uint32_t low, uint32_t high, int shift) {
  return static_cast<uint32_t>((static_cast<uint64_t>(high) << 32 | low) >> shift);
}
inline float saturate(float a) { return a > 0 ? (a < 1 ? a : 1.0f) : 0.0f; }
inline int64_t multiply_add(int a, int b, int64_t c) { return static_cast<int64_t>(a) * b + c; }
// Rounded correctly, where the device is within a unit in the last place.
inline float quotient(float a, float b) { return a / b; }
inline float root(float a) { return std::sqrt(a); }
inline int lowest_bit(uint32_t a) { return __builtin_ctz(a); }
inline uint32_t ballot(bool a) { return host::block().ballot(a); }
inline double shuffle_down(double a, int offset) { return host::block().shuffle_down(a, offset); }
template <int Bytes>
void copy_async(void* target, const void* source, bool copy) {
  host::block().copy_async(target, source, Bytes, copy);
}
inline void wait_for_copies() { host::block().wait_for_copies(); }

}  // namespace oder
