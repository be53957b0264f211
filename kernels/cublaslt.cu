#include "kernels/cublaslt.h"

#include <dlfcn.h>

#include <cstdlib>
#include <stdexcept>

namespace trireme::kernels {
namespace {

constexpr size_t kOldestVersion = 130000;
constexpr char kWayOut[] = "cuBLASLt 13 comes with libtorch's CUDA libraries (launch/setup.sh); TRIREME_TORCH may name the torch folder";

template <typename Function>
void find(void* library, const std::string& name, const char* symbol, Function& function) {
  function = reinterpret_cast<Function>(::dlsym(library, symbol));
  if (!function) throw std::runtime_error(name + " has no " + symbol + "; " + kWayOut);
}

}  // namespace

void check_cublaslt_version(const CublasLt& lt, const std::string& library) {
  const size_t version = lt.get_version();
  if (version < kOldestVersion)
    throw std::runtime_error(library + " is version " + std::to_string(version) + "; " + std::to_string(kOldestVersion) + " (13.0) or later is needed: " + kWayOut);
}

CublasLt load_cublaslt(const std::string& name) {
  void* library = ::dlopen(name.c_str(), RTLD_NOW);
  if (!library) {
    const std::string problem = ::dlerror();
    if (const char* torch = std::getenv("TRIREME_TORCH")) library = ::dlopen((std::string(torch) + "/../nvidia/cu13/lib/" + name).c_str(), RTLD_NOW);
    if (!library) throw std::runtime_error("cuBLASLt, which matrix products on a GPU need, is not there: " + problem + "; " + kWayOut);
  }
  CublasLt lt{};
  find(library, name, "cublasLtGetVersion", lt.get_version);
  find(library, name, "cublasLtGetStatusString", lt.get_status_string);
  find(library, name, "cublasLtCreate", lt.create);
  find(library, name, "cublasLtMatmulDescCreate", lt.product_create);
  find(library, name, "cublasLtMatmulDescDestroy", lt.product_destroy);
  find(library, name, "cublasLtMatmulDescSetAttribute", lt.product_set);
  find(library, name, "cublasLtMatrixLayoutCreate", lt.layout_create);
  find(library, name, "cublasLtMatrixLayoutDestroy", lt.layout_destroy);
  find(library, name, "cublasLtMatmulPreferenceCreate", lt.preference_create);
  find(library, name, "cublasLtMatmulPreferenceDestroy", lt.preference_destroy);
  find(library, name, "cublasLtMatmulPreferenceSetAttribute", lt.preference_set);
  find(library, name, "cublasLtMatmulAlgoGetHeuristic", lt.heuristic);
  find(library, name, "cublasLtMatmul", lt.matmul);
  check_cublaslt_version(lt, name);
  return lt;
}

}  // namespace trireme::kernels
