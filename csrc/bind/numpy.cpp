// SPDX-License-Identifier: MIT
// The CPU core for NumPy arrays (pybind11, no torch): the module lap_ext._np. lap_ext/numpy.py
// checks the arguments in the user's words.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <thread>
#include <vector>

#include "../cpu/isa.h"
#include "../math/dtype.h"
#include "check.h"
#include "cpu_core.h"
#include "operators.h"

namespace py = pybind11;

namespace {

namespace bind = lap::bind;
using lap::DType;

struct NumpyArrays {
  using Array = py::array;
  using Norm = py::array_t<double, py::array::c_style | py::array::forcecast>;
  using Mask = py::array_t<bool, py::array::c_style | py::array::forcecast>;
  static constexpr const char* kNoun = "array";
  static constexpr const char* kNotInPlace = "w with strides of whole elements";

  static lap::cpu::Pool pool() {
    const unsigned cores = std::thread::hardware_concurrency();
    return lap::cpu::thread_pool(cores == 0 ? 1 : static_cast<int>(cores));
  }

  static DType dtype(const char* op, const Array& x) {
    const std::string name = py::str(x.dtype().attr("name"));
    if (name == "float32") return DType::f32;
    if (name == "float64") return DType::f64;
    if (name == "float16") return DType::f16;
    if (name == "bfloat16") return DType::bf16;
    fail_dtype(op, {"float32, float64, float16 or bfloat16", name});
  }
  [[noreturn]] static void fail_dtype(const char* op, const bind::Mistake& mistake) {
    throw py::type_error(mistake.text(op));
  }
  static bool same_dtype(const Array& a, const Array& b) { return a.dtype().equal(b.dtype()); }

  static bind::Sizes sizes(const Array& x) { return {x.shape(), x.shape() + x.ndim()}; }
  static int64_t size(const Array& x) { return x.size(); }
  static bool strides(const Array& x, bind::Sizes* out) {
    bool whole = true;
    for (py::ssize_t d = 0; d < x.ndim(); ++d) {
      whole = whole && x.strides(d) % x.itemsize() == 0;
      out->push_back(x.strides(d) / x.itemsize());
    }
    return whole;
  }
  static const void* data(const Array& x) { return x.data(); }
  static void* mutable_data(Array x) { return x.mutable_data(); }  // refuses a read-only array
  static Array contiguous(const Array& x) {
    return py::module_::import("numpy").attr("ascontiguousarray")(x);
  }

  template <typename T>
  static Array empty(const Array&, const bind::Sizes& sizes) {
    return py::array_t<T>(sizes);
  }

  static const Norm& norm(const char*, const Norm& x) { return x; }
  static const uint8_t* eligible(const char* op, const Mask& mask, const Array& like) {
    if (mask.size() != like.size()) bind::fail(op, {"a mask of the weights' shape"});
    return reinterpret_cast<const uint8_t*>(mask.data());
  }
};

using Operators = bind::Operators<bind::CpuCore<NumpyArrays>>;

}  // namespace

PYBIND11_MODULE(_np, m) {
  lap::cpu::kernels();  // an unusable LAP_EXT_ISA fails the import
  py::register_local_exception_translator([](std::exception_ptr raised) {
    try {
      std::rethrow_exception(raised);
    } catch (const bind::Failure& failure) {
      const bind::Mistake& parts = failure.mistake;
      const py::object kind = py::module_::import("lap_ext.errors").attr("LapValueError");
      const py::object error =
          kind(parts.expected, parts.got, parts.cure, py::arg("argument") = parts.argument,
               py::arg("option") = parts.option);
      PyErr_SetObject(kind.ptr(), error.ptr());
    }
  });
  m.doc() = "The CPU core of lap_ext for NumPy arrays; see lap_ext.numpy.";
  m.def("row_squared_norms", &Operators::row_squared_norms);
  m.def("col_squared_norms", &Operators::col_squared_norms);
  m.def("score", &Operators::score);
  m.def("mask", &Operators::mask<false>);
  m.def("prune_", &Operators::mask<true>);
  m.def("topk_mask", &Operators::topk_mask);
  m.def("kth_largest", [](const std::vector<py::array>& scores, int64_t k, bool check_finite) {
    return py::float_(Operators::kth_largest(scores, k, check_finite));
  });
  m.def("isa", [] { return std::string(lap::cpu::kernels().name); });
}
