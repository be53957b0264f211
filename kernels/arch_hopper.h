// kernels/arch.h for sm_90a: copies of tiles by the tensor memory accelerator (TMA), barriers that count arrivals and bytes, and
// matrix products of warp groups. A Kernel that uses it has kHopper = true; on another architecture it traps.
//
// Barriers in shared memory (mbarrier, 8 bytes each: Shared<uint64_t>):
//   barrier_init(b, arrivals)              by one thread; then barrier_init_done() and sync_threads()
//   barrier_arrive(b), barrier_arrive_expect(b, bytes)  the latter also announces the bytes of copies to come
//   barrier_wait(b, parity)                until the phase of that parity (0 first, then 1, 0 ...) has ended
// Tiles of bf16 or fp16, 64 values (128 bytes) wide, at a multiple of 1024 bytes, whose 16 bytes i of row r stand at i ^ r % 8
// (the 128-byte swizzle), of tensors [rows, heads, columns]:
//   TensorMap make_tile_map<T>(base, rows, heads, columns, row_stride, head_stride, tile_rows)  on the host; none is 0, strides in
//                                          values, multiples of 8
//   tile_load(to, map, row, head, column, b)  by one thread; what is outside of the tensor is zero; bytes count at b
//   tile_store(map, row, head, column, from), tile_store_commit(), tile_store_wait()  by one thread; the latter until it is all written
// The accelerator and the products read shared memory through another proxy: what threads write for them goes through
//   store_shared(p, v), and then async_fence() and a barrier.
// Products of a warp group (4 warps, all threads), each of 16 of the inner dimension k:
//   rows_of(p)                             a factor [., k]: the tile's rows from p on, a multiple of 8; p + 16 values: the next k
//   columns_of(p, next)                    a factor [., k] too: the tile's columns, whose k are the 16 rows from p on, a multiple of
//                                          8; `next`: bytes to the tile with the next 64 columns
//   group_fence(x ...)                     before the first product after registers were touched: those of x
//   group_mma<T>(d, a, b, add)             d[64, 8N] = a b^T, or with `add` that + d; N is 8 or 16; a: such a factor, or registers
//                                          uint32_t[4] as mma has them; b: such a factor. A thread has d[n][2h + e] of row
//                                          16 * warp + lane / 4 + 8h and column 8n + 2 * (lane % 4) + e, as mma has
//   group_commit(), group_wait<N>(x ...)   until at most N groups are under way; x, the registers of d and a of the others, are
//                                          neither read nor written before
// settle(x)                              x, which is never negative, and all that it is made of are computed before a group_wait that
//                                          follows, and not while nothing is under way any more, as the compiler likes to
// registers_up<N>(), registers_down<N>(): registers of a thread from here on (setmaxnreg).
#pragma once

#include "kernels/arch.h"

#ifdef __CUDACC__
#include "kernels/arch_hopper_cuda.h"
#else
#include "kernels/emu/arch_hopper_emu.h"
#endif
