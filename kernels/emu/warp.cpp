// Operations of a warp on fragments, whose layouts are those of the PTX ISA (sections on ldmatrix and mma.m16n8k16).
#include "kernels/arch.h"

namespace trireme::kernels::emulated::arch {
namespace {

struct Rows {
  const void* row;
  uint32_t* r;
};

void gather_rows(Lanes lanes) {
  for (int m = 0; m < 4; ++m)
    for (int l = 0; l < 32; ++l) {
      auto* row = static_cast<const uint32_t*>(static_cast<Rows*>(lanes[8 * m + l / 4])->row);
      static_cast<Rows*>(lanes[l])->r[m] = row[l % 4];
    }
}

void gather_columns(Lanes lanes) {
  auto element = [&](int m, int row, int column) {
    return static_cast<const uint16_t*>(static_cast<Rows*>(lanes[8 * m + row])->row)[column];
  };
  for (int m = 0; m < 4; ++m)
    for (int l = 0; l < 32; ++l)
      static_cast<Rows*>(lanes[l])->r[m] = element(m, 2 * (l % 4), l / 4) | uint32_t{element(m, 2 * (l % 4) + 1, l / 4)} << 16;
}

struct Product {
  float* d;
  const uint32_t* a;
  uint32_t b[2];
  float (*widen)(uint16_t);
};

// d[16,8] += a[16,16] b[16,8]: exact products, added in fp32 in the order of k.
void multiply_all(Lanes lanes) {
  float a[16][16], b[16][8];
  auto lane = [&](int l) { return static_cast<Product*>(lanes[l]); };
  auto half = [](uint32_t u, int high) { return static_cast<uint16_t>(high ? u >> 16 : u); };
  for (int l = 0; l < 32; ++l) {
    const Product& p = *lane(l);
    const int g = l / 4, k = 2 * (l % 4);
    for (int e = 0; e < 2; ++e) {
      for (int i = 0; i < 4; ++i) a[g + 8 * (i % 2)][k + e + 8 * (i / 2)] = p.widen(half(p.a[i], e));
      for (int i = 0; i < 2; ++i) b[k + e + 8 * i][g] = p.widen(half(p.b[i], e));
    }
  }
  for (int l = 0; l < 32; ++l)
    for (int i = 0; i < 4; ++i) {
      const int row = l / 4 + 8 * (i / 2), column = 2 * (l % 4) + i % 2;
      float sum = lane(l)->d[i];
      for (int k = 0; k < 16; ++k) sum += a[row][k] * b[k][column];
      lane(l)->d[i] = sum;
    }
}

}  // namespace

void load_matrix(uint32_t (&r)[4], const void* row) {
  check_shared(row, 16, "load_matrix");
  Rows mine{row, r};
  meet("load_matrix", &mine, gather_rows);
}

void load_matrix_transposed(uint32_t (&r)[4], const void* row) {
  check_shared(row, 16, "load_matrix_transposed");
  Rows mine{row, r};
  meet("load_matrix_transposed", &mine, gather_columns);
}

void multiply(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, float (*widen)(uint16_t)) {
  Product mine{d, a, {b0, b1}, widen};
  meet("mma", &mine, multiply_all);
}

}  // namespace trireme::kernels::emulated::arch
