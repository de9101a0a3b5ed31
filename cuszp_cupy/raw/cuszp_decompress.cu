// cuszp_decompress: a cuszp stream to its array, in one pass.
//
//   in   stream         u8    any bytes (damaged ones give other values, no wild access); 4-byte aligned
//        stream_bytes   i64   its size; nothing is read past it
//        n              i64   1 <= n < 2^31
//        eb             T     as it was compressed, > 0
//   out  x[n]           T     every value is written
//        status         u32   |= 1 if a rate byte is illegal or missing, or if payload is missing
//   i/o  workspace      u64   1 + tiles words, zero before and after (cuszp_common.cuh)
//   grid  tiles = 1024 nc / (32 WARPS)     block  32 WARPS     shared  4 KiB a warp + 128, static
//
// Guarantee: the values of reference.decompress. Format: format.py section 1. Upstream: cuSZp 6ab90a5,
// src/cuSZp_kernels_1D_f32.cu. Every operation on T rounds by itself: part of the format.

#include "cuszp_common.cuh"

// 1.5
__device__ __forceinline__ float dequantise(u32 q, float eb) {
    return __fmul_rn(__fmul_rn(__int2float_rn(int(q)), eb), 2.0f);
}

__device__ __forceinline__ double dequantise(u32 q, double eb) {
    return __dmul_rn(__dmul_rn(__int2double_rn(int(q)), eb), 2.0);
}

// Copies 16 bytes to shared memory, the first `bytes` (0..16) from `global`, the others 0; the rest of
// `global` is not read. Done after wait_copies().
__device__ __forceinline__ void copy_quad(u8 *shared, const u8 *global, u32 bytes) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                 :
                 : "r"(u32(__cvta_generic_to_shared(shared))), "l"(global), "r"(bytes)
                 : "memory");
}

__device__ __forceinline__ void wait_copies() { asm volatile("cp.async.wait_all;" : : : "memory"); }

template <typename T, int MODE, int WARPS>
__global__ void __launch_bounds__(32 * WARPS)
    cuszp_decompress(const u8 *stream, i64 stream_bytes, i64 n, T eb, T *x, u32 *status, u64 *workspace) {
    // First the payloads, packed as in the stream; then the bin numbers, a row of 128 bytes a block.
    // Swizzled. 128 bytes more, because the payloads start at the alignment they have in the stream.
    __shared__ __align__(128) u8 tile_data[4096 * WARPS + 128];

    const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const u32 tile = take_tile(workspace);
    const u32 block = tile * 32 * WARPS + threadIdx.x;

    u32 byte = block < stream_bytes ? stream[block] : 0xff;
    if (i64(block) * 32 >= n && byte) byte = 0xff;  // padding must be 0; 0xff is illegal in every mode
    const Rate rate = Rate::parse<MODE>(byte);
    u32 tile_bytes;
    u32 at = scan_tile<WARPS>(rate.bytes, workspace, tile, tile_bytes);
    const u64 tile_offset = offset_of_tile(workspace, tile, tile_bytes);

    const i64 payload_start = i64(32 * WARPS) * gridDim.x + tile_offset;
    if (!rate.legal || payload_start + at + rate.bytes > stream_bytes) atomicOr(status, 1u);
    const u8 *payload = stream + payload_start;
    const u32 skew = reinterpret_cast<u64>(payload) % 16;
    for (u32 i = 16 * threadIdx.x; i < skew + tile_bytes; i += 16 * 32 * WARPS) {
        const i64 readable = stream_bytes - payload_start + skew - i;
        const u32 bytes = u32(min(max(readable, i64(0)), i64(16)));
        copy_quad(tile_data + swizzled(i), bytes ? payload - skew + i : stream, bytes);
    }
    wait_copies();
    __syncthreads();

    // 1.3, 1.4. lane = block; word[p] is plane p.
    u32 word[32] = {}, signs = 0, first = 0;
    at += skew;
    if (MODE == OUTLIER) {
        for (u32 i = 0; i < rate.outlier_bytes; ++i) first |= u32(tile_data[swizzled(at++)]) << 8 * i;
    }
    const u32 shift = 8 * (at % 4);  // 0 but in mode outlier
    u32 here = as<u32>(tile_data + swizzled(at -= at % 4));
    const auto next = [&] {
        const u32 above = as<u32>(tile_data + swizzled(at += 4));
        const u32 value = MODE == OUTLIER ? __funnelshift_r(here, above, shift) : here;
        here = above;
        return value;
    };
    if (rate.bytes) signs = next();
    const u32 most_planes = __reduce_max_sync(FULL, rate.planes);
#pragma unroll
    for (u32 p = 0; p < 31; ++p) {
        if (p % 8 == 0 && p >= most_planes) break;
        if (p < rate.planes) word[p] = next();
        if (p % 8 == 7 || p == 30) transpose_8_planes(word + p / 8 * 8);
    }
    transpose_step<8, 32>(word);
    transpose_step<16, 32>(word);
    if (rate.outlier_bytes) word[bit_of(0)] = first;

    // 1.2, 1.5. word[bit_of(i)] is value i.
#pragma unroll
    for (int i = 0; i < 32; ++i) {
        if (signs >> i & 1) word[i] = 0u - word[i];
    }
    if (MODE != FIXED) {
#pragma unroll
        for (int i = 1; i < 32; ++i) word[bit_of(i)] += word[bit_of(i - 1)];
    }
    __syncthreads();  // the payloads have been read
#pragma unroll
    for (int i = 0; i < 32; i += 4) {
        as<uint4>(tile_data + in_row(threadIdx.x, 4 * i)) =
            make_uint4(word[bit_of(i)], word[bit_of(i + 1)], word[bit_of(i + 2)], word[bit_of(i + 3)]);
    }
    __syncwarp();

    // A warp stores its 32 blocks, lane = value.
    const i64 first_value = (i64(tile) * WARPS + warp) * 1024 + lane;
    T *values = x + first_value;
    const int remaining = min(n - first_value, i64(1024));
    const auto value = [&](int i) {
        return dequantise(as<u32>(tile_data + in_row(32 * warp + i, 4 * lane)), eb);
    };
    if (remaining > 992) {
#pragma unroll
        for (int i = 0; i < 32; ++i) values[32 * i] = value(i);
    } else {
        for (int i = 0; 32 * i < remaining; ++i) values[32 * i] = value(i);
    }
}
