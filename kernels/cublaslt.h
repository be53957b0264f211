// The part of cuBLASLt's C interface that matmul.cu uses, as a table of functions: filled at the first use from the library that
// libtorch's CUDA half has loaded (or that of the system), so that nothing links it, a build needs no header of it and ranks on
// CPUs do not load its 500 MB; the emulation has a table of its own (kernels/emu/cublaslt.cpp). Numbers and layouts are those of
// cublasLt.h 13 (tests/emulated_matmul_test.cpp compares them with the header and the library, where these are).
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace trireme::kernels {

enum : int { kLtSuccess = 0, kLtInvalidValue = 7, kLtNotSupported = 15 };  // cublasStatus_t
enum : int { kLtFloat32 = 0, kLtFloat16 = 2, kLtBFloat16 = 14, kLtFloat8E4M3 = 28, kLtFloat8E5M2 = 29 };  // cudaDataType_t
enum : int { kLtCompute32 = 68, kLtComputeTf32 = 77 };                     // cublasComputeType_t
enum : int32_t { kLtPlain = 0, kLtTransposed = 1 };                        // cublasOperation_t
enum : uint32_t { kLtNoEpilogue = 1, kLtBias = 4 };                        // cublasLtEpilogue_t
enum : uint32_t { kLtOneSum = 0, kLtSumsInFp32 = 2 };                      // cublasLtReductionScheme_t
enum LtProductAttribute : int {                                            // cublasLtMatmulDescAttributes_t
  kLtTransposeA = 3, kLtTransposeB = 4, kLtEpilogue = 7, kLtBiasPointer = 8, kLtScalePointerA = 17, kLtScalePointerB = 18
};
enum LtPreferenceAttribute : int {                                         // cublasLtMatmulPreferenceAttributes_t
  kLtMaxWorkspace = 1, kLtReductionSchemes = 3, kLtAlignmentA = 5, kLtAlignmentB = 6, kLtAlignmentC = 7, kLtAlignmentD = 8
};

using LtHandle = struct LtContext*;
using LtProduct = struct LtProductOpaque*;        // cublasLtMatmulDesc_t
using LtLayout = struct LtLayoutOpaque*;          // cublasLtMatrixLayout_t
using LtPreference = struct LtPreferenceOpaque*;  // cublasLtMatmulPreference_t
struct LtAlgorithm {
  uint64_t data[8];
};
struct LtHeuristic {
  LtAlgorithm algorithm;
  size_t workspace_bytes;
  int status;
  float waves;
  int reserved[4];
};

// Every function as cublasLt.h says; int: cublasStatus_t, or a type; stream: cudaStream_t.
struct CublasLt {
  size_t (*get_version)();  // 130100 is 13.1
  const char* (*get_status_string)(int status);
  int (*create)(LtHandle* handle);
  int (*product_create)(LtProduct* product, int compute_type, int scale_type);
  int (*product_destroy)(LtProduct product);
  int (*product_set)(LtProduct product, int attribute, const void* value, size_t num_bytes);
  int (*layout_create)(LtLayout* layout, int type, uint64_t rows, uint64_t columns, int64_t stride);
  int (*layout_destroy)(LtLayout layout);
  int (*preference_create)(LtPreference* preference);
  int (*preference_destroy)(LtPreference preference);
  int (*preference_set)(LtPreference preference, int attribute, const void* value, size_t num_bytes);
  int (*heuristic)(LtHandle handle, LtProduct product, LtLayout a, LtLayout b, LtLayout c, LtLayout d, LtPreference preference, int count, LtHeuristic* found,
                   int* num_found);
  int (*matmul)(LtHandle handle, LtProduct product, const void* alpha, const void* a, LtLayout a_layout, const void* b, LtLayout b_layout, const void* beta,
                const void* c, LtLayout c_layout, void* d, LtLayout d_layout, const LtAlgorithm* algorithm, void* workspace, size_t workspace_bytes, void* stream);
};

constexpr char kCublasLt[] = "libcublasLt.so.13";

// From the library of that name. std::runtime_error, in a sentence with the way out, where it is not there, lacks a function or is
// older than 13.
CublasLt load_cublaslt(const std::string& library);
void check_cublaslt_version(const CublasLt& lt, const std::string& library);

// The emulation's (kernels/emu/cublaslt.cpp), for tests.
const CublasLt& emulated_cublaslt();
struct LtCounts {
  int64_t objects = 0;    // made and not destroyed
  int64_t questions = 0;  // to the heuristic
};
LtCounts emulated_cublaslt_counts();
void set_emulated_capability(int major, int minor);  // of the device: 9, 0 at first

}  // namespace trireme::kernels
