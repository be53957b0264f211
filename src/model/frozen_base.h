// The weights of a model's linear layers in fewer bits, frozen: what quant.base chooses.
#pragma once

#include <optional>

#include "model/lora.h"
#include "quant/stored_format.h"

namespace trireme {

struct FrozenBase {
  std::string kind = "none";         // fp8: products of float8 (ops/float8.h); nf4, fp4: codes of 4 bits (quant/four_bit_weight.h);
                                     // int8: LLM.int8() (quant/int8_weight.h)
  std::optional<int64_t> block_size = {};  // values that share a scale; empty: 64, or what is stored
  std::optional<bool> is_double = {};      // scales in 8 bits; empty: yes, or what is stored
  std::optional<at::ScalarType> compute = {};  // of products with what was in 4 bits; empty: the model's
  double threshold = 6.0;             // of int8's outliers
  std::vector<std::string> skipped;  // layers that stay as they are, by name (model/linear_names.h)
  // Layers whose files hold them in such a form, by path: these alone, and each in its form. kind is none, or that of all of them.
  std::map<std::string, StoredFormat> stored = {};

  bool none() const { return kind == "none" && stored.empty(); }
  // Of layers that are not stored.
  int64_t blocks() const { return block_size.value_or(64); }
  bool has_double() const { return is_double.value_or(true); }
};

// Gives every linear layer of the blocks but the skipped ones a weight in that form, and freezes all of the model. The model is on
// the meta device: reading or initialising its leaves is encoding (FrozenWeight::encode). ConfigError: a layer that cannot be kept so,
// a name that matches nothing, a stored layer of another form than `base` asks for. DataError: a stored layer of another shape, or that cannot be kept so.
void freeze_base(Transformer& model, const FrozenBase& base);

// Values for the leaves that are made of a layer's whole weight, or for parts of them, a layer at a time: weights in another form, and of
// adapters what does not begin at random (lora.init, lora.dora), with the base that lacks it.
class FrozenLayers {
 public:
  explicit FrozenLayers(Transformer& model, const LoraConfig& lora = {});  // before it is cut

  bool holds(const std::string& leaf) const { return layers_.count(leaf) != 0; }
  // The weights that these leaves are made of, each once, on the meta device.
  std::vector<Parameter> made_of(const std::vector<Parameter>& leaves) const;
  // `read` gives a weight in the model's dtype, which is there while its leaves are filled. `stored` gives the values of all leaves of the
  // weight where it is stored so, else nothing.
  void fill(const std::vector<Parameter>& leaves, const std::function<void(const Parameter& whole)>& read,
            const std::function<std::vector<at::Tensor>(const std::string& weight)>& stored = {}) const;

 private:
  struct Layer {
    Parameter whole;  // on the meta device
    std::shared_ptr<const FrozenWeight> weight;  // or null
    std::vector<std::string> leaves;             // the names: of the weight; where the adapter `starts` so A and B; with `dora` the magnitude
    bool starts = false, dora = false;
    int64_t rank = 0;  // of the adapter
    double scale = 0;
  };
  using Place = std::pair<std::shared_ptr<const Layer>, size_t>;  // and the number of its leaf

  std::vector<at::Tensor> values(const Layer& layer, const at::Tensor& whole_OI, std::vector<at::Tensor> codes) const;

  LoraConfig lora_;
  std::map<std::string, Place> layers_;
};

}  // namespace trireme
