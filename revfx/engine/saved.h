// Saved tensors of the native watcher: the counterpart of saved.py.
#pragma once

#include "watch.h"

namespace revfx {
// A saved tensor: kept, or dropped and obtained from the call of a unit.
struct Saved {
  Tensor tensor;    // without its history; undefined once it is dropped
  int64_t version;  // how often it had been written to when it was saved
  Shared call{};    // gives a dropped tensor back, from a slot
  int64_t slot = -1;

  explicit Saved(const Tensor& t) : tensor(alias_of(t)), version(version_of(tensor)) {}

  void drop(py::object by, int64_t from) {
    tensor = Tensor();
    call = share(std::move(by));
    slot = from;
  }

  py::object kept() const { return tensor.defined() ? py::cast(tensor) : py::none(); }

  py::object get() const {
    if (call) return py::handle(call.get()).attr("fetch")(slot);
    if (version_of(tensor) == version) return py::cast(tensor);
    return py::module_::import("revfx._torch").attr("checked_version")(tensor, version);  // raises autograd's error
  }
};
}  // namespace revfx
