// Turns a function on pointers and numbers into one that Python calls with addresses and numbers, the GIL released.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <type_traits>

namespace fastcam {

template <typename T>
using Address = std::conditional_t<std::is_pointer_v<T>, uintptr_t, T>;

template <typename T>
T from_address(Address<T> a) {
  if constexpr (std::is_pointer_v<T>) {
    return reinterpret_cast<T>(a);
  } else {
    return a;
  }
}

template <typename R, typename... Args>
void bind(pybind11::module_& m, const char* name, R (*f)(Args...)) {
  m.def(
      name, [f](Address<Args>... args) { return f(from_address<Args>(args)...); },
      pybind11::call_guard<pybind11::gil_scoped_release>());
}

}  // namespace fastcam
