#pragma once

#include <cstdint>

namespace molt {

// The threads that a core may use; the caller brings them, so that the cores need no torch header.
struct Parallel {
  using Body = void (*)(int64_t begin, int64_t end, void* context);
  void (*run)(int64_t count, Body body, void* context);
  int64_t threads;

  // A body must not throw: what leaves another thread is not caught everywhere.
  template <class F>
  void for_each(int64_t count, const F& body) const {
    if (threads == 1 || count == 1) {
      for (int64_t i = 0; i < count; ++i) body(i);
      return;
    }
    auto call = [](int64_t begin, int64_t end, void* context) {
      for (int64_t i = begin; i < end; ++i) (*static_cast<const F*>(context))(i);
    };
    run(count, call, const_cast<void*>(static_cast<const void*>(&body)));
  }

  Parallel alone() const { return {run, 1}; }
};

}  // namespace molt
