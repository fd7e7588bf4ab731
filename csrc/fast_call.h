// The short way from Python to the CPU ops, for calls with nothing out of the ordinary about them.
#pragma once
#include <pybind11/pybind11.h>

namespace lorakern {

void define_fast_calls(pybind11::module_& m);

}  // namespace lorakern
