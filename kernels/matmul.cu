// Matrix products by cuBLASLt, which has its matrices column by column: what is asked of it is the transposed product,
// d^T = op(b)^T op(a)^T, where each matrix as it lies in memory is the transposed of ours.
#include <array>
#include <map>
#include <mutex>

#include "kernels/arch.h"
#include "kernels/cublaslt.h"
#include "kernels/kernels.h"

namespace trireme::kernels::TRIREME_ARCH {
namespace {

#ifdef __CUDACC__
const CublasLt& library() {
  static const CublasLt lt = load_cublaslt(kCublasLt);
  return lt;
}
int current_device() {
  int device = 0;
  arch::check(cudaGetDevice(&device), "cudaGetDevice");
  return device;
}
#else
const CublasLt& library() { return emulated_cublaslt(); }
int current_device() { return 0; }
#endif

void check(int status, const char* call) {
  if (status != kLtSuccess) throw std::runtime_error(std::string(call) + ": " + library().get_status_string(status));
}

// What a library call made, until the end of its scope.
template <typename T>
struct Made {
  explicit Made(int (*d)(T)) : destroy(d) {}
  ~Made() {
    if (value) destroy(value);
  }
  Made(const Made&) = delete;
  Made& operator=(const Made&) = delete;
  T value{};
  int (*destroy)(T);
};

struct TypeFacts {
  const char* name;
  int number;
};
TypeFacts facts(Type type) {
  switch (type) {
    case Type::kFloat32:
      return {"float32", kLtFloat32};
    case Type::kBFloat16:
      return {"bfloat16", kLtBFloat16};
    case Type::kFloat16:
      return {"float16", kLtFloat16};
    case Type::kFloat8E4M3:
      return {"float8_e4m3", kLtFloat8E4M3};
    case Type::kFloat8E5M2:
      return {"float8_e5m2", kLtFloat8E5M2};
  }
  throw Refused("matmul of no known type");
}

bool is_float8(Type type) { return size_of(type) == 1; }

std::string described(const MatMul& p) {
  auto matrix = [](Type type, int64_t rows, int64_t columns, bool transposed, int64_t stride) {
    return std::string(facts(type).name) + " [" + std::to_string(rows) + ", " + std::to_string(columns) + "] " + (transposed ? "transposed, " : "") + "by " + std::to_string(stride);
  };
  return "matmul of " + matrix(p.a_type, p.m, p.k, p.transpose_a, p.a_stride) + " and " + matrix(p.b_type, p.k, p.n, p.transpose_b, p.b_stride) + " to " +
         matrix(p.d_type, p.m, p.n, false, p.d_stride);
}

void check_operands(const MatMul& p) {
  auto need = [&](bool good, const std::string& what) {
    if (!good) throw Refused(described(p) + ": " + what);
  };
  const bool float8 = is_float8(p.a_type) || is_float8(p.b_type);
  if (float8) {
    need(is_float8(p.a_type) && is_float8(p.b_type) && (p.a_type == Type::kFloat8E4M3 || p.b_type == Type::kFloat8E4M3), "float8 goes with float8, one of them e4m3");
    need(!is_float8(p.d_type), "its result is not float8");
    need(p.a_scale && p.b_scale, "float8 needs both scales");
    need(!p.transpose_a && p.transpose_b, "of float8 a is not transposed and b is");
    need(!p.bias || p.d_type != Type::kFloat32, "float8 with a float32 result takes no bias");
    need(p.n % 16 == 0 && p.k % 16 == 0 && p.a_stride % 16 == 0 && p.b_stride % 16 == 0 && p.d_stride % 16 == 0, "sizes and strides of float8, but the rows of a, are multiples of 16");
    need((reinterpret_cast<uintptr_t>(p.a) | reinterpret_cast<uintptr_t>(p.b) | reinterpret_cast<uintptr_t>(p.d) | reinterpret_cast<uintptr_t>(p.bias)) % 16 == 0,
         "float8 stands at multiples of 16 bytes");
  } else {
    need(p.a_type == p.b_type && (p.d_type == p.a_type || p.d_type == Type::kFloat32), "a and b are of one type, the result of theirs or float32");
    need(!p.a_scale && !p.b_scale, "only float8 has scales");
  }
  constexpr int64_t kMost = int64_t{1} << 31;
  need(p.m >= 0 && p.n >= 0 && p.k >= 1 && p.m < kMost && p.n < kMost && p.k < kMost, "each size is below 2^31, and what is summed over is not empty");
  need(p.a_stride >= (p.transpose_a ? p.m : p.k) && p.b_stride >= (p.transpose_b ? p.k : p.n) && p.d_stride >= p.n, "a stride is less than its row");
  auto aligned = [](const void* x, Type type) { return reinterpret_cast<uintptr_t>(x) % static_cast<uintptr_t>(size_of(type)) == 0; };
  need(aligned(p.a, p.a_type) && aligned(p.b, p.b_type) && aligned(p.d, p.d_type) && aligned(p.bias, p.d_type), "an address is no multiple of its elements' size");
  need(reinterpret_cast<uintptr_t>(p.workspace) % 256 == 0 && p.workspace_bytes >= 0 && (p.workspace || p.workspace_bytes == 0), "the workspace stands at a multiple of 256 bytes");
}

// As much as the address says, which is what a caching allocator keeps to.
uint32_t alignment_of(const void* x) {
  const uintptr_t address = reinterpret_cast<uintptr_t>(x);
  return static_cast<uint32_t>(std::min<uintptr_t>(address & (0 - address), 256));
}

LtHandle handle_of(int device) {
  static std::mutex mutex;
  static std::map<int, LtHandle> handles;
  std::lock_guard lock(mutex);
  LtHandle& handle = handles[device];
  if (!handle) check(library().create(&handle), "cublasLtCreate");
  return handle;
}

// A call of the library.
class Call {
 public:
  explicit Call(const MatMul& p)
      : p_(p), device_(current_device()), handle_(handle_of(device_)), product_(library().product_destroy), a_(library().layout_destroy), b_(library().layout_destroy),
        d_(library().layout_destroy) {
    check(library().product_create(&product_.value, p.tf32 && p.a_type == Type::kFloat32 ? kLtComputeTf32 : kLtCompute32, kLtFloat32), "cublasLtMatmulDescCreate");
    set(kLtTransposeA, p.transpose_b ? kLtTransposed : kLtPlain);
    set(kLtTransposeB, p.transpose_a ? kLtTransposed : kLtPlain);
    if (p.bias) set(kLtEpilogue, kLtBias), set(kLtBiasPointer, p.bias);
    if (p.a_scale) set(kLtScalePointerA, p.b_scale), set(kLtScalePointerB, p.a_scale);
    lay_out(a_, p.b_type, p.transpose_b ? p.n : p.k, p.transpose_b ? p.k : p.n, p.b_stride);
    lay_out(b_, p.a_type, p.transpose_a ? p.k : p.m, p.transpose_a ? p.m : p.k, p.a_stride);
    lay_out(d_, p.d_type, p.m, p.n, p.d_stride);
  }

  void run(Stream stream) const {
    const LtAlgorithm algorithm = choice();
    check(library().matmul(handle_, product_.value, &p_.alpha, p_.b, a_.value, p_.a, b_.value, &p_.beta, p_.d, d_.value, p_.d, d_.value, &algorithm, p_.workspace,
                           static_cast<size_t>(p_.workspace_bytes), stream),
          "cublasLtMatmul");
  }

 private:
  template <typename T>
  void set(int attribute, T value) {
    check(library().product_set(product_.value, attribute, &value, sizeof value), "cublasLtMatmulDescSetAttribute");
  }
  static void lay_out(Made<LtLayout>& layout, Type type, int64_t rows, int64_t columns, int64_t stride) {  // as we see them
    check(library().layout_create(&layout.value, facts(type).number, static_cast<uint64_t>(columns), static_cast<uint64_t>(rows), stride), "cublasLtMatrixLayoutCreate");
  }

  // The library's first choice for all that it is told, which is asked for once.
  LtAlgorithm choice() const {
    constexpr size_t kMostKept = 4096;
    const std::array<int64_t, 19> key = {device_, static_cast<int64_t>(p_.a_type), static_cast<int64_t>(p_.b_type), static_cast<int64_t>(p_.d_type), p_.m, p_.n, p_.k, p_.a_stride,
                                         p_.b_stride, p_.d_stride, p_.transpose_a, p_.transpose_b, p_.tf32, p_.bias != nullptr, p_.workspace_bytes,
                                         alignment_of(p_.a), alignment_of(p_.b), alignment_of(p_.d), alignment_of(p_.bias)};
    static std::mutex mutex;
    static std::map<std::array<int64_t, 19>, LtAlgorithm> kept;
    std::lock_guard lock(mutex);
    const auto found = kept.find(key);
    if (found != kept.end()) return found->second;
    if (kept.size() >= kMostKept) kept.clear();  // a choice made again is the same
    return kept[key] = ask();
  }

  LtAlgorithm ask() const {
    Made<LtPreference> preference(library().preference_destroy);
    check(library().preference_create(&preference.value), "cublasLtMatmulPreferenceCreate");
    auto prefer = [&](int attribute, auto value) {
      check(library().preference_set(preference.value, attribute, &value, sizeof value), "cublasLtMatmulPreferenceSetAttribute");
    };
    prefer(kLtMaxWorkspace, static_cast<uint64_t>(p_.workspace_bytes));
    // Parts of a sum are kept in fp32 and added by a kernel of their own, in order; other ways round them to the output's type
    // or add them as they come.
    prefer(kLtReductionSchemes, kLtOneSum | kLtSumsInFp32);
    prefer(kLtAlignmentA, alignment_of(p_.b)), prefer(kLtAlignmentB, alignment_of(p_.a));
    prefer(kLtAlignmentC, alignment_of(p_.d)), prefer(kLtAlignmentD, alignment_of(p_.d));
    LtHeuristic found{};
    int num_found = 0;
    const int status = library().heuristic(handle_, product_.value, a_.value, b_.value, d_.value, d_.value, preference.value, 1, &found, &num_found);
    if (status != kLtSuccess || num_found < 1 || found.status != kLtSuccess)
      throw Refused(described(p_) + ": cuBLASLt " + std::to_string(library().get_version()) + " does not have it on this device (" +
                    library().get_status_string(status != kLtSuccess ? status : num_found < 1 ? int{kLtNotSupported} : found.status) + ")" +
                    (is_float8(p_.a_type) ? "; float8 needs a card of compute capability 8.9 or later" : ""));
    return found.algorithm;
  }

  const MatMul& p_;
  int device_;
  LtHandle handle_;
  Made<LtProduct> product_;
  Made<LtLayout> a_, b_, d_;  // the library's: its a is our b
};

void matmul(const MatMul& p, Stream stream) {
  check_operands(p);
  if (p.m == 0 || p.n == 0) return;
  Call(p).run(stream);
}

}  // namespace

void add_matmul(Kernels& kernels) { kernels.matmul = matmul; }

}  // namespace trireme::kernels::TRIREME_ARCH
