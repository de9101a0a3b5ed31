// cuszp_compress: one array to its cuszp stream, in one pass: read once, write the stream.
//
//   in   x[n]        T     any values; T-aligned
//        n           i64   1 <= n < 2^31
//        r           T     0.5 / eb, rounded in T
//   out  stream      u8    max_stream_bytes(n) bytes; 4-byte aligned
//        size        u64   bytes of the stream
//   i/o  workspace   u64   1 + tiles words, zero before and after (cuszp_common.cuh)
//   grid  tiles = 1024 nc / (32 WARPS)     block  32 WARPS     shared  4 KiB a warp, static
//
// Guarantee: the bytes of reference.compress, whatever WARPS and the order of the CTAs; nothing is
// written past `size`. Format: format.py section 1. Upstream: cuSZp 6ab90a5,
// src/cuSZp_kernels_1D_f32.cu. Every operation on T rounds by itself: part of the format.

#include "cuszp_common.cuh"

// 1.1. PTX: conversion saturates; NaN gives 0 from float, INT_MIN from double, as specified.
__device__ __forceinline__ u32 quantise(float x, float r) {
    const float s = __fmul_rn(x, r);
    return u32(__float2int_rz(__fadd_rn(s, 0.5f))) - (s >= -0.5f ? 0 : 1);
}

__device__ __forceinline__ u32 quantise(double x, double r) {
    const double s = __dmul_rn(x, r);
    return u32(__double2int_rz(__dadd_rn(s, 0.5))) - (s >= -0.5 ? 0 : 1);
}

__device__ __forceinline__ int bits(int a) { return 32 - __clz(max(a, 0)); }

template <typename T, int MODE, int WARPS>
__global__ void __launch_bounds__(32 * WARPS, 24 / WARPS)
    cuszp_compress(const T *x, i64 n, T r, u8 *stream, u64 *size, u64 *workspace) {
    // First the quantised values, a row of 128 bytes a block; then the payloads, packed. Swizzled.
    __shared__ __align__(128) u8 tile_data[4096 * WARPS];

    const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const u32 tile = take_tile(workspace);
    const u32 block = tile * 32 * WARPS + threadIdx.x;

    // A warp loads its 32 blocks, lane = value.
    const i64 first_value = (i64(tile) * WARPS + warp) * 1024 + lane;
    const T *values = x + first_value;
    const int remaining = min(n - first_value, i64(1024));
    constexpr int BATCH = 128 / sizeof(T);  // loads in flight
#pragma unroll
    for (int batch = 0; batch < 32; batch += BATCH) {
        T value[BATCH];
#pragma unroll
        for (int i = 0; i < BATCH; ++i) {
            value[i] = 32 * (batch + i) < remaining ? __ldcs(values + 32 * (batch + i)) : T(0);
        }
#pragma unroll
        for (int i = 0; i < BATCH; ++i) {
            as<u32>(tile_data + in_row(32 * warp + batch + i, 4 * lane)) = quantise(value[i], r);
        }
    }
    __syncwarp();

    // 1.2. From here on lane = block; word[bit_of(i)] is value i.
    u32 word[32];
#pragma unroll
    for (int i = 0; i < 32; i += 4) {
        const uint4 quad = as<uint4>(tile_data + in_row(threadIdx.x, 4 * i));
        word[bit_of(i)] = quad.x;
        word[bit_of(i + 1)] = quad.y;
        word[bit_of(i + 2)] = quad.z;
        word[bit_of(i + 3)] = quad.w;
    }
    if (MODE != FIXED) {
#pragma unroll
        for (int i = 31; i > 0; --i) word[bit_of(i)] -= word[bit_of(i - 1)];
    }
    const int num_values = min(n - i64(block) * 32, i64(32));
    if (num_values < 32) {
#pragma unroll
        for (int i = 0; i < 32; ++i) {
            if (i >= num_values) word[bit_of(i)] = 0;
        }
    }
    u32 signs = 0;
#pragma unroll
    for (int i = 31; i >= 0; --i) signs = __funnelshift_l(word[i], signs, 1);
    int largest = 0;  // of all magnitudes but the first; INT_MIN stays negative, so it is left out
#pragma unroll
    for (int i = 0; i < 32; ++i) {
        const int v = int(word[i]);
        word[i] = v < 0 ? 0u - word[i] : word[i];
        if (i != bit_of(0)) largest = max(largest, int(word[i]));
    }

    // 1.3, 1.4
    const u32 first = word[bit_of(0)];
    u32 planes = bits(max(largest, int(first)));
    u32 bytes = planes ? 4 + 4 * planes : 0, outlier_bytes = 0, rate = planes;
    if (MODE == OUTLIER) {
        const u32 k2 = bits(largest), ob = (bits(int(first)) + 7) / 8;
        if (bytes > 4 + 4 * k2 + ob) {
            planes = k2, outlier_bytes = ob, bytes = 4 + 4 * k2 + ob;
            rate = 0x80 | (ob - 1) << 5 | k2;
            word[bit_of(0)] = 0;
        }
    }
    stream[block] = u8(rate);  // the grid covers the whole rate area: padding is written here too

    u32 tile_bytes;
    u32 at = scan_tile<WARPS>(bytes, workspace, tile, tile_bytes);
    if (MODE == OUTLIER) {
        for (u32 i = 0; i < outlier_bytes; ++i) tile_data[swizzled(at++)] = u8(first >> 8 * i);
    }
    // In mode outlier the words of the payload lie `skew` bytes beyond words of the tile. A word of the
    // tile at either end of the payload is shared with the next block, so it is written by bytes.
    const u32 skew = MODE == OUTLIER ? at % 4 : 0;
    u32 before = signs;
    if (skew) {
        for (u32 b = 0; b < 4 - skew && bytes; ++b) tile_data[swizzled(at + b)] = u8(signs >> 8 * b);
        at -= skew;
    } else if (bytes) {
        as<u32>(tile_data + swizzled(at)) = signs;
    }
    transpose_step<16, 32>(word);
    transpose_step<8, 32>(word);
    const u32 most_planes = __reduce_max_sync(FULL, planes);
#pragma unroll
    for (u32 p = 0; p < 31; ++p) {
        if (p % 8 == 0) {
            if (p >= most_planes) break;
            transpose_8_planes(word + p);
        }
        if (p < planes) {
            as<u32>(tile_data + swizzled(at + 4 + 4 * p)) =
                MODE == OUTLIER ? __funnelshift_l(before, word[p], 8 * skew) : word[p];
            if (MODE == OUTLIER) before = word[p];
        }
    }
    if (skew && bytes) {
        at += 4 + 4 * planes;
        for (u32 b = 0; b < skew; ++b) tile_data[swizzled(at + b)] = u8(before >> 8 * (4 - skew + b));
    }

    const u64 tile_offset = offset_of_tile(workspace, tile, tile_bytes);
    u8 *out = stream + 32 * WARPS * u64(gridDim.x) + tile_offset;
    if (tile == gridDim.x - 1 && threadIdx.x == 0) *size = out + tile_bytes - stream;

    // The tile's payloads to global memory, word by word of global memory: skewed again.
    const u32 out_skew = MODE == OUTLIER ? reinterpret_cast<u64>(out) % 4 : 0;
    out -= out_skew;
    const u32 end = out_skew + tile_bytes;
    for (u32 i = 4 * threadIdx.x; i < end; i += 4 * 32 * WARPS) {
        u32 here = i < tile_bytes ? as<u32>(tile_data + swizzled(i)) : 0;
        if (MODE == OUTLIER) {
            const u32 below = i ? as<u32>(tile_data + swizzled(i - 4)) : 0;
            here = __funnelshift_l(below, here, 8 * out_skew);
        }
        if (MODE != OUTLIER || (i >= out_skew && i + 4 <= end)) {
            as<u32>(out + i) = here;
        } else {  // an end of the tile, in a word shared with another tile
            for (u32 b = i ? 0 : out_skew; b < 4 && i + b < end; ++b) out[i + b] = u8(here >> 8 * b);
        }
    }
}
