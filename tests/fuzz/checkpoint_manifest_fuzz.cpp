// libFuzzer target: any bytes as the manifest.json of a checkpoint, its hash being right, are a manifest whose pieces lie
// within their tensors and in files of the folder, or refused with a DataError; what was read is written and read again
// alike. Corpus: tests/fuzz/corpus/checkpoint_manifest, replayed by fuzz_corpus_test.
#include "base/check.h"
#include "base/hash.h"
#include "checkpoint/manifest.h"
#include "tests/fuzz/scratch.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace trireme;
  static const fuzz::Scratch scratch;
  const std::string hash = hash_bytes({reinterpret_cast<const char*>(data), size}) + "\n";
  scratch.write("manifest.json", data, size);
  scratch.write("manifest.hash", hash.data(), hash.size());
  try {
    Manifest manifest = read_manifest(scratch.folder());
    TRIREME_CHECK(manifest.step >= 0, manifest.step);
    for (const auto& [name, tensor] : manifest.tensors)
      for (const StoredPiece& piece : tensor.pieces) {
        TRIREME_CHECK(manifest.files.count(piece.file) && piece.file.find('/') == std::string::npos, piece.file);
        for (size_t d = 0; d < tensor.shape.size(); ++d)
          TRIREME_CHECK(piece.offset.at(d) >= 0 && piece.shape.at(d) >= 0 && piece.offset[d] + piece.shape[d] <= tensor.shape[d], name);
      }
    write_manifest(scratch.folder(), manifest);
    TRIREME_CHECK(manifest_to_json(read_manifest(scratch.folder())) == manifest_to_json(manifest), "written");
  } catch (const DataError&) {
  }
  return 0;
}
