#include "base/tensor.h"

#include "model/kv_cache.h"

#include "base/check.h"

namespace trireme {

KvCache::KvCache(const std::map<int64_t, int64_t>& key_heads, int64_t head_dim, int64_t capacity, const at::TensorOptions& options) : capacity_(capacity) {
  // A device's rows are numbers from the start: where its kernels do not serve a model, unseen rows are multiplied by 0. The memory of the
  // host is only really taken where it is written to.
  auto rows = [&](int64_t heads) {
    const std::vector<int64_t> sizes = {1, capacity, heads, head_dim};
    return options.device().is_cpu() ? at::empty(sizes, options) : at::zeros(sizes, options);
  };
  for (const auto& [layer, heads] : key_heads) layers_[layer] = {rows(heads), rows(heads)};
}

void KvCache::put(int64_t number, const at::Tensor& k_TKD, const at::Tensor& v_TKD, const at::Tensor& positions_T) {
  const int64_t tokens = k_TKD.size(0);
  TRIREME_CHECK(tokens <= capacity_, tokens, " tokens into a cache of ", capacity_);
  const Layer& to = layers_.at(number);
  for (const auto& [cache_BSKD, values_TKD] : {std::pair{to.k_BSKD, k_TKD}, std::pair{to.v_BSKD, v_TKD}}) {
    at::Tensor rows_SKD = cache_BSKD[0];
    if (positions_T.defined()) rows_SKD.index_copy_(0, positions_T, values_TKD);
    else rows_SKD.narrow(0, 0, tokens).copy_(values_TKD);
  }
}

}  // namespace trireme
