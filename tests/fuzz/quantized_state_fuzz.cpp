// libFuzzer target: a folder whose one layer, of 4 x 64 in NF4 with nested scales or in int8, has any bytes for its state, scales and config
// and tensors that are missing, of other dtypes and sizes, is either read whole or refused with a DataError. Of the input come first what is
// changed (fuzz::kChanges bytes) and the scales (kScales), then the text of the state.
// Corpus: tests/fuzz/corpus/quantized_state, replayed by fuzz_corpus_test.
#include <cstring>

#include "base/check.h"
#include "checkpoint/bitsandbytes.h"
#include "tests/fuzz/scratch.h"

namespace fuzz {

constexpr size_t kChanges = 6, kScales = 8;

inline trireme::TensorSource tensor_of(const char* name, at::ScalarType dtype, std::vector<int64_t> shape, const void* bytes, size_t size) {
  at::Tensor value = at::zeros(shape, dtype);
  if (value.numel() > 0 && size > 0) std::memcpy(value.data_ptr(), bytes, std::min(size, value.nbytes()));
  return {name, dtype, shape, [value] { return value; }};
}

}  // namespace fuzz

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace trireme;
  static const fuzz::Scratch scratch;
  if (size < fuzz::kChanges + fuzz::kScales) return 0;
  const uint8_t *scales = data + fuzz::kChanges, *state = scales + fuzz::kScales;
  const size_t state_size = size - fuzz::kChanges - fuzz::kScales;
  const bool is_int8 = data[0] & 1, is_plain = data[0] & 2;
  const auto& map = four_bit_numbers(FourBit::kNf4);
  std::vector<float> numbers(256, 0.5f);
  std::vector<uint8_t> codes(256, 0x5A);
  std::vector<TensorSource> tensors;
  const auto add = [&](const char* name, at::ScalarType dtype, std::vector<int64_t> shape, const void* bytes, size_t bytes_size) {
    tensors.push_back(fuzz::tensor_of(name, dtype, std::move(shape), bytes, bytes_size));
  };
  if (is_int8) {
    add("layers.0.weight", at::kChar, {4, 64}, codes.data(), codes.size());
    add("layers.0.SCB", at::kFloat, {4}, scales, fuzz::kScales);
    add("layers.0.weight_format", at::kByte, {}, data + 5, 1);
  } else {
    add("layers.0.weight", at::kByte, {128, 1}, codes.data(), codes.size());
    add("layers.0.weight.absmax", is_plain ? at::kFloat : at::kByte, {4}, scales, fuzz::kScales);
    add("layers.0.weight.quant_map", at::kFloat, {16}, map.data(), sizeof map);
    if (!is_plain) {
      add("layers.0.weight.nested_absmax", at::kFloat, {1}, scales + 4, 4);
      add("layers.0.weight.nested_quant_map", at::kFloat, {256}, numbers.data(), 1024);
    }
    add("layers.0.weight.quant_state.bitsandbytes__nf4", at::kByte, {static_cast<int64_t>(state_size)}, state, state_size);
  }
  // One tensor is gone, one of another dtype, one of another size.
  constexpr at::ScalarType kTypes[] = {at::kByte, at::kChar, at::kShort, at::kInt, at::kLong, at::kHalf, at::kBFloat16, at::kFloat, at::kDouble, at::kBool};
  if (TensorSource& t = tensors[data[2] % tensors.size()]; data[2] < 128) t = fuzz::tensor_of(t.name.c_str(), kTypes[data[3] % std::size(kTypes)], t.shape, codes.data(), 4);
  if (TensorSource& t = tensors[data[4] % tensors.size()]; data[4] < 128) t = fuzz::tensor_of(t.name.c_str(), t.dtype, {data[3] % 8, data[1] % 8}, codes.data(), 4);
  if (data[1] < 128) tensors.erase(tensors.begin() + data[1] % static_cast<int>(tensors.size()));
  try {
    write_safetensors(scratch.folder() + "/model.safetensors", tensors);
    const auto files = std::make_shared<SafetensorsFolder>(scratch.folder());
    try {
      check_not_quantized(*files, "config.json");
    } catch (const DataError&) {
    }
    const QuantizedFolder folder(files);
    for (const auto& [path, format] : folder.layers()) {
      for (const char* kind : {"nf4", "fp4", "int8"}) try {
        folder.check_config(kind, parse_json(R"({"bnb_4bit_use_double_quant": true})", "config.json"), "config.json");
      } catch (const DataError&) {
      }
      const at::Tensor value = at::empty({format.rows, format.columns});
      folder.load({path + ".weight", value, ShardSpec::whole(value)});
      (void)folder.leaves(path + ".weight");
      // Of rows, code times scale comes before the division by 127, as in bitsandbytes, and may be too large.
      TRIREME_CHECK(format.kind == "int8" || value.isfinite().all().item<bool>(), path);
    }
  } catch (const DataError&) {
  }
  return 0;
}
