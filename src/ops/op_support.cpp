#include "base/tensor.h"

#include "ops/op_support.h"

namespace trireme {

void refuse_unlike(std::string_view of, const NamedTensor& first, const NamedTensor& other, at::ScalarType wanted) {
  const auto text = [](at::ScalarType dtype, at::Device device) { return str(c10::toString(dtype), " on ", device.str()); };
  const auto is = [&](const at::Tensor& x) { return text(x.scalar_type(), x.device()); };
  throw InternalError(str(of, ": ", other.name, " is ", is(other.tensor), ", but with ", first.name, ", which is ", is(first.tensor), ", it has to be ",
                          text(wanted, first.tensor.device()), ": bring it there with to()"));
}

}  // namespace trireme
