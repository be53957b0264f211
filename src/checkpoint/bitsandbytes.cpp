#include "checkpoint/bitsandbytes.h"

#include <algorithm>
#include <cmath>

#include "base/check.h"
#include "checkpoint/manifest.h"
#include "quant/four_bit_weight.h"
#include "quant/int8.h"

namespace trireme {
namespace {

constexpr char kState[] = ".quant_state.bitsandbytes__";
constexpr char kRowScales[] = ".SCB";
constexpr uint64_t kMaxStateBytes = 1 << 16;
constexpr int64_t kNestedBlockSize = 256;
constexpr size_t kMaxOffsetChars = 24;  // of a double, written so that it is read back as the same
// What follows X.weight in the names of the tensors of a layer.
constexpr const char* kParts[] = {".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map"};

// The X.weight that a tensor of this name belongs to; empty: none.
std::string weight_of(const std::string& name) {
  if (const size_t at = name.find(str(".weight", kState)); at != std::string::npos) return name.substr(0, at + 7);
  for (const char* end : kParts)
    if (name.ends_with(str(".weight", end))) return name.substr(0, name.size() - std::string_view(end).size());
  return "";
}

// Of X.weight: X; empty where it is called otherwise.
std::string layer_of(const std::string& name) { return name.ends_with(".weight") ? name.substr(0, name.size() - 7) : ""; }

}  // namespace

QuantizedFolder::QuantizedFolder(std::shared_ptr<const SafetensorsFolder> files) : files_(std::move(files)) {
  std::map<std::string, std::vector<std::string>> states_of;
  for (const std::string& name : files_->names()) {
    const std::string weight = weight_of(name);
    if (weight.empty()) continue;
    std::vector<std::string>& states = states_of[weight];
    if (name.starts_with(weight + kState)) states.push_back(name);
  }
  for (const auto& [weight, states] : states_of) {
    const auto [format, layer] = check(weight, states);
    insert(layer_of(weight), format, layer);
  }
  for (const std::string& name : files_->names())
    if (name.ends_with(kRowScales)) {
      const std::string layer = name.substr(0, name.size() - std::string_view(kRowScales).size());
      insert(layer, check_rows(layer), {layer + ".weight"});
    }
  if (formats_.empty()) throw DataError(str(files_->folder(), ": config.json has a quantization_config, but no tensor of the files is quantized by bitsandbytes."));
  for (const std::string& name : files_->names())  // codes would be taken for values
    if (const SafetensorsInfo& info = files_->info(name); name.ends_with(".weight") && !owns(name) && c10::isIntegralType(info.dtype, true))
      throw DataError(str(files_->file_of(name).path(), ": tensor '", name, "' is ", safetensors_dtype_name(info.dtype), " ", shape_text(info.shape), ", but no quant_state and no SCB goes with it."));
}

void QuantizedFolder::check_config(const std::string& kind, const Json& config, const std::string& source) const {
  const std::string where = str(source, ": quantization_config");
  for (const auto& [path, format] : formats_) {
    const auto check = [&, &path = path, &format = format](const char* key, const auto& says, const auto& holds) {
      if (says != holds)
        throw DataError(str(where, " says ", key, "=", dump_json(says), ", but the files hold ", path, " in ", format.kind, format.kind == "int8" ? "" : format.is_double ? " with scales in 8 bits" : " with scales in 32 bits",
                            ": take the config.json that was written with the files"));
    };
    check("load_in_8bit", kind == "int8", format.kind == "int8");
    if (format.kind == "int8") continue;
    check("bnb_4bit_quant_type", json_get_or<std::string>(config, "bnb_4bit_quant_type", format.kind, where), format.kind);
    check("bnb_4bit_use_double_quant", json_get_or<bool>(config, "bnb_4bit_use_double_quant", format.is_double, where), format.is_double);
  }
}

void check_not_quantized(const SafetensorsFolder& files, const std::string& source) {
  for (const std::string& name : files.names())
    if (!weight_of(name).empty() || name.ends_with(kRowScales))
      throw DataError(str(source, ": has no quantization_config, but ", files.file_of(name).path(), " holds '", name, "', a part of a weight that bitsandbytes has quantized: take the config.json that was written with the files"));
}

void QuantizedFolder::insert(const std::string& name, const StoredFormat& format, const Layer& layer) {
  const std::string path = name.starts_with("layers.") ? "model." + name : name;
  if (!formats_.emplace(path, format).second) throw DataError(str(files_->folder(), ": ", name, " is quantized in two forms."));
  layers_.emplace(path, layer);
}

StoredFormat QuantizedFolder::check_rows(const std::string& layer) {
  const std::string weight = layer + ".weight", format = layer + ".weight_format";
  if (!files_->contains(weight)) throw DataError(str(files_->folder(), ": '", weight, "' is missing, but its ", kRowScales + 1, " is there."));
  const SafetensorsInfo& codes = files_->info(weight);
  if (codes.dtype != at::kChar || codes.shape.size() != 2)
    throw DataError(str(files_->file_of(weight).path(), ": tensor '", weight, "' is ", safetensors_dtype_name(codes.dtype), " ", shape_text(codes.shape), "; I8 of a matrix goes with its ", kRowScales + 1, "."));
  part(layer + kRowScales, at::kFloat, codes.shape[0]);
  owned_.insert({weight, layer + kRowScales});
  if (files_->contains(format)) {  // bitsandbytes wrote none at first
    part(format, at::kByte, 1);
    if (const auto layout = static_cast<int>(*static_cast<const uint8_t*>(files_->view(format).data_ptr())); layout != 0)
      throw DataError(str(files_->file_of(format).path(), ": tensor '", format, "' is ", layout, ", a layout of old GPUs that is not supported; supported is 0, rows."));
    owned_.insert(format);
  }
  return {.kind = "int8", .rows = codes.shape[0], .columns = codes.shape[1]};
}

bool QuantizedFolder::holds(const std::string& parameter) const { return formats_.count(layer_of(parameter)) != 0; }

const SafetensorsInfo& QuantizedFolder::part(const std::string& name, at::ScalarType dtype, int64_t count) const {
  if (!files_->contains(name)) throw DataError(str(files_->folder(), ": '", name, "' is missing: the weight beside it is quantized by bitsandbytes."));
  const SafetensorsInfo& info = files_->info(name);
  if (info.dtype != dtype || info.bytes != static_cast<uint64_t>(count) * c10::elementSize(dtype))
    throw DataError(str(files_->file_of(name).path(), ": tensor '", name, "' is ", safetensors_dtype_name(info.dtype), " ", shape_text(info.shape), "; ",
                        safetensors_dtype_name(dtype), " of ", count, " values is what goes with its weight."));
  return info;
}

std::pair<StoredFormat, QuantizedFolder::Layer> QuantizedFolder::check(const std::string& weight, const std::vector<std::string>& states) {
  const SafetensorsFolder& files = *files_;
  const auto wrong = [&](const std::string& name, const auto&... what) -> DataError { return DataError(str(files.file_of(name).path(), ": tensor '", name, "'", what..., ".")); };
  if (!files.contains(weight)) throw DataError(str(files.folder(), ": '", weight, "' is missing, but tensors of its quantization are there."));
  if (states.empty()) throw DataError(str(files.folder(), ": '", weight, kState, "nf4' (or fp4) is missing: without it the other tensors of ", weight, " cannot be read."));
  if (states.size() > 1) throw wrong(states[1], " is a second state of ", weight, " beside ", states[0]);
  const std::string& state = states[0];
  const SafetensorsInfo& info = files.info(state);
  if (info.dtype != at::kByte || info.bytes == 0 || info.bytes > kMaxStateBytes)
    throw wrong(state, " is ", safetensors_dtype_name(info.dtype), " ", shape_text(info.shape), "; U8 of 1 to ", kMaxStateBytes, " values is expected, the text of a JSON object");
  const at::Tensor bytes = files.view(state);
  const std::string where = str(files.file_of(state).path(), ": tensor '", state, "'");
  const Json json = parse_json({static_cast<const char*>(bytes.data_ptr()), info.bytes}, where, 4);
  if (!json.is_object()) throw wrong(state, " is not a JSON object");

  StoredFormat format;
  format.kind = json_get<std::string>(json, "quant_type", where);
  if (format.kind != "nf4" && format.kind != "fp4") throw wrong(state, ": quant_type ", dump_json(format.kind), " is not supported; supported are nf4, fp4");
  if (state != weight + kState + format.kind) throw wrong(state, ": quant_type is ", dump_json(format.kind), ", which its name contradicts");
  format.block_size = json_get<int64_t>(json, "blocksize", where);
  if (!is_block_size(format.block_size)) throw wrong(state, ": blocksize ", format.block_size, " does not exist; there are 32, 64, 128, 256, 512, 1024, 2048, 4096");
  const std::string dtype = json_get<std::string>(json, "dtype", where);
  if (dtype != "float32" && dtype != "bfloat16" && dtype != "float16") throw wrong(state, ": dtype ", dump_json(dtype), " is not supported; supported are float32, bfloat16, float16");
  const Json shape = json.contains("shape") ? json["shape"] : Json();
  const auto is_size = [](const Json& n) { return n.is_number_integer() && n.get<int64_t>() > 0 && n.get<int64_t>() < (int64_t{1} << 31); };
  if (!shape.is_array() || shape.size() != 2 || !is_size(shape[0]) || !is_size(shape[1])) throw wrong(state, ": shape ", dump_json(shape), " is not that of a matrix");
  format.rows = shape[0].get<int64_t>(), format.columns = shape[1].get<int64_t>();

  const int64_t count = format.rows * format.columns, blocks = (count + format.block_size - 1) / format.block_size;
  if (const SafetensorsInfo& codes = files.info(weight); codes.bytes != static_cast<uint64_t>((count + 1) / 2))
    throw wrong(weight, " is ", safetensors_dtype_name(codes.dtype), " ", shape_text(codes.shape), "; its quant_state says ", shape_text({format.rows, format.columns}), " in 4 bits, ", (count + 1) / 2, " bytes");
  const auto name = [&](const char* end) { return weight + end; };
  part(name(".quant_map"), at::kFloat, 16);
  const at::Tensor map = files.view(name(".quant_map"));
  const std::array<float, 16>& numbers = four_bit_numbers(format.kind == "nf4" ? FourBit::kNf4 : FourBit::kFp4);
  if (!std::equal(numbers.begin(), numbers.end(), map.data_ptr<float>())) throw wrong(name(".quant_map"), " does not hold the 16 numbers of ", format.kind);

  Layer layer{weight};
  format.is_double = files.contains(name(".nested_absmax")) || json.contains("nested_offset") || json.contains("nested_blocksize");
  part(name(".absmax"), format.is_double ? at::kByte : at::kFloat, blocks);
  if (format.is_double) {
    part(name(".nested_absmax"), at::kFloat, (blocks + kNestedBlockSize - 1) / kNestedBlockSize);
    part(name(".nested_quant_map"), at::kFloat, 256);
    if (const auto size = json_get<int64_t>(json, "nested_blocksize", where); size != kNestedBlockSize) throw wrong(state, ": nested_blocksize ", size, " is not supported; supported is ", kNestedBlockSize);
    if (const auto nested = json_get<std::string>(json, "nested_dtype", where); nested != "float32") throw wrong(state, ": nested_dtype ", dump_json(nested), " is not supported; supported is float32");
    layer.offset = static_cast<float>(json_get<double>(json, "nested_offset", where));
  }
  owned_.insert({weight, state});
  for (const char* end : kParts)
    if (files.contains(name(end))) owned_.insert(name(end));
  return {format, layer};
}

at::Tensor QuantizedFolder::view_until_gone(const std::string& name) const {
  const at::Tensor view = files_->view(name);
  return at::from_blob(view.data_ptr(), {view.numel()}, [view, files = files_, name](void*) { files->file_of(name).release(name); }, view.scalar_type());
}

FourBitTensor QuantizedFolder::read(const std::string& parameter) const {
  const std::string path = layer_of(parameter);
  const StoredFormat& format = formats_.at(path);
  const Layer& layer = layers_.at(path);
  FourBitTensor q{format.kind == "nf4" ? FourBit::kNf4 : FourBit::kFp4, format.block_size, view_until_gone(layer.weight).view(at::kByte), {.absmax = view_until_gone(layer.weight + ".absmax")}};
  if (format.is_double) {
    q.scales.nested_absmax = view_until_gone(layer.weight + ".nested_absmax");
    q.scales.nested_map = view_until_gone(layer.weight + ".nested_quant_map");
    q.scales.nested_block_size = kNestedBlockSize;
    q.scales.offset = at::full({1}, layer.offset, at::kFloat);
  }
  check(layer.weight, q.scales);
  return q;
}

void QuantizedFolder::check(const std::string& weight, const BlockScales& scales) const {
  if (const std::string wrong = check_scales(scales); !wrong.empty()) throw DataError(str(files_->file_of(weight).path(), ": tensor '", weight, "': ", wrong, "."));
}

std::vector<at::Tensor> QuantizedFolder::leaves(const std::string& parameter) const {
  const StoredFormat& format = formats_.at(layer_of(parameter));
  if (format.kind == "int8") {
    const std::string& weight = layers_.at(layer_of(parameter)).weight;
    const at::Tensor absmax_R = view_until_gone(layer_of(weight) + kRowScales);
    check(weight, {.absmax = absmax_R});
    return {view_until_gone(weight).view({format.rows, format.columns}), absmax_R};
  }
  return four_bit_leaves(read(parameter), format.rows, format.columns);
}

void QuantizedFolder::check_shape(const Parameter& target) const {
  const std::string path = layer_of(target.name);
  const StoredFormat& format = formats_.at(path);
  const std::vector<int64_t> stored = {format.rows, format.columns};
  if (target.shard.global_shape != stored)
    throw DataError(str(files_->folder(), ": ", layers_.at(path).weight, " is ", shape_text(stored), " in ", format.kind, ", but the model's is ", shape_text(target.shard.global_shape), "."));
}

void QuantizedFolder::load(const Parameter& target) const {
  check_shape(target);
  const auto& shape = target.shard.global_shape;
  const at::ScalarType dtype = target.value.scalar_type() == at::kDouble ? at::kFloat : target.value.scalar_type();
  at::Tensor values = at::empty(shape, dtype);
  if (formats_.at(layer_of(target.name)).kind == "int8") {
    const std::vector<at::Tensor> rows = leaves(target.name);
    dequantize_int8_rows({rows[0], rows[1]}, values);
  } else {
    dequantize_4bit(read(target.name), values.view({-1}));
  }
  for (int64_t d = 0; d < 2; ++d) values = values.narrow(d, target.shard.offset[static_cast<size_t>(d)], target.value.size(d));
  target.value.detach().copy_(values);
}

std::vector<TensorSource> quantized_tensors(const std::string& weight, const StoredFormat& f, at::ScalarType dtype, const std::function<std::vector<at::Tensor>()>& leaves) {
  if (f.kind == "int8")
    return {{weight, at::kChar, {f.rows, f.columns}, [leaves] { return leaves().at(0); }},
            {layer_of(weight) + kRowScales, at::kFloat, {f.rows}, [leaves] { return leaves().at(1); }},
            {weight + "_format", at::kByte, {}, [] { return at::zeros({}, at::kByte); }}};
  const int64_t count = f.rows * f.columns, blocks = (count + f.block_size - 1) / f.block_size;
  const auto leaf = [leaves](size_t i) { return [leaves, i] { return leaves().at(i); }; };
  const auto flat = [leaves](size_t i) { return [leaves, i] { return leaves().at(i).flatten(); }; };
  const std::array<float, 16>& numbers = four_bit_numbers(f.kind == "nf4" ? FourBit::kNf4 : FourBit::kFp4);
  std::vector<TensorSource> tensors = {{weight, at::kByte, {(count + 1) / 2, 1}, [leaves] { return leaves().at(0).view({-1, 1}); }},
                                       {weight + ".absmax", f.is_double ? at::kByte : at::kFloat, {blocks}, flat(1)},
                                       {weight + ".quant_map", at::kFloat, {16}, [numbers] { return at::tensor(at::ArrayRef<float>(numbers)); }}};
  const std::string state = str("{\"quant_type\": \"", f.kind, "\", \"blocksize\": ", f.block_size, ", \"dtype\": \"", stored_dtype_name(dtype), "\", \"shape\": [", f.rows, ", ", f.columns, "]",
                                f.is_double ? str(", \"nested_blocksize\": ", kNestedBlockSize, ", \"nested_dtype\": \"float32\", \"nested_offset\": ") : "}");
  const size_t length = state.size() + (f.is_double ? kMaxOffsetChars + 1 : 0);
  const auto text = [state, length, leaves, is_double = f.is_double] {
    std::string whole = state;
    if (is_double) whole += dump_json(static_cast<double>(leaves().at(4).item<float>())) + "}";
    TRIREME_CHECK(whole.size() <= length, whole);
    whole.resize(length, ' ');
    return at::tensor(at::ArrayRef<uint8_t>(reinterpret_cast<const uint8_t*>(whole.data()), whole.size()), at::kByte);
  };
  if (f.is_double) {
    tensors.push_back({weight + ".nested_absmax", at::kFloat, {(blocks + kNestedBlockSize - 1) / kNestedBlockSize}, leaf(2)});
    tensors.push_back({weight + ".nested_quant_map", at::kFloat, {256}, leaf(3)});
  }
  tensors.push_back({weight + kState + f.kind, at::kByte, {static_cast<int64_t>(length)}, text});
  return tensors;
}

Json quantization_config(const std::string& kind, bool is_double, const std::string& compute_dtype, double threshold, std::vector<std::string> skipped) {
  Json names;  // null: all but the output layer
  if (!skipped.empty()) {
    names = Json(std::move(skipped));
    names.insert(names.begin(), "lm_head");
  }
  if (kind == "int8")  // the keys of 4 bits as they are where nobody sets them
    return {{"_load_in_4bit", false}, {"_load_in_8bit", true}, {"bnb_4bit_compute_dtype", "float32"}, {"bnb_4bit_quant_storage", "uint8"}, {"bnb_4bit_quant_type", "fp4"},
            {"bnb_4bit_use_double_quant", false}, {"llm_int8_enable_fp32_cpu_offload", false}, {"llm_int8_has_fp16_weight", false}, {"llm_int8_skip_modules", names},
            {"llm_int8_threshold", threshold}, {"load_in_4bit", false}, {"load_in_8bit", true}, {"quant_method", "bitsandbytes"}};
  return {{"_load_in_4bit", true}, {"_load_in_8bit", false}, {"bnb_4bit_compute_dtype", compute_dtype}, {"bnb_4bit_quant_storage", "uint8"}, {"bnb_4bit_quant_type", kind},
          {"bnb_4bit_use_double_quant", is_double}, {"llm_int8_enable_fp32_cpu_offload", false}, {"llm_int8_has_fp16_weight", false}, {"llm_int8_skip_modules", names},
          {"llm_int8_threshold", 6.0}, {"load_in_4bit", true}, {"load_in_8bit", false}, {"quant_method", "bitsandbytes"}};
}

}  // namespace trireme
