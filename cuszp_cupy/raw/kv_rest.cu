// kv_fetch, kv_publish, kv_collect, kv_gather: what surrounds encoding and decoding in a pipeline: arguments to the
// device, rows to and from the page table, the ends of regions that came out longer than what a copy was told to move,
// and payloads to the device.
//
// kv_fetch     before the others
//   in   from[num_words]         uint4  in mapped pinned host memory
//   out  to[num_words]           uint4
//   A copy engine would do it too, but only in its turn: behind all bulk copies to the device that are under way.
//
// kv_publish   after kv_encode
//   in   rows[num_pages]         uint4  the rows that kv_encode wrote
//   in   slots[num_pages]        u32    where each goes in the table
//   out  table[]                 uint4  the page table, in mapped pinned host memory
//   in   hosts[num_regions]      u64    addresses of the regions on the host (mapped), 16-byte aligned
//   in   works[num_regions]      u64    addresses of the regions in the ring, 16-byte aligned
//   in   copied[num_regions]     u32    what the copy moves of each region, in 16 bytes
//   in   cursors[num_regions]    u32    room that kv_encode took of each, in 16 bytes
//   in   parts                   u32    blocks that share a region
//   Bytes [16 copied, 16 cursors) of each region go to the host; usually there are none.
//
// kv_collect   before kv_decode
//   out  rows[num_pages]         uint4  = table[slots[page]]
//
// kv_gather    before kv_decode and kv_entropy_decode, where payloads lie in host memory
//   in   payloads[num_pages]     u64    addresses, 16-byte aligned; a payload lies 16 x its row's place behind
//   in   rows[num_pages]         uint4
//   out  slots[num_pages]        u64    addresses of device memory for `most` bytes each, 16-byte aligned
//   out  there[num_pages]        uint4  the rows with place 0
//   in   most                    u32    bytes; of longer payloads, which are damaged, no more is copied
//
//   grid any     block any     shared 0

typedef unsigned int u32;
typedef unsigned long long u64;

__global__ void kv_fetch(const uint4* __restrict__ from, uint4* __restrict__ to, u32 num_words) {
    for (u32 i = blockIdx.x * blockDim.x + threadIdx.x; i < num_words; i += gridDim.x * blockDim.x) to[i] = from[i];
}

__global__ void kv_publish(
    const uint4* __restrict__ rows, const u32* __restrict__ slots, uint4* __restrict__ table, u32 num_pages,
    const u64* __restrict__ hosts, const u64* __restrict__ works, const u32* __restrict__ copied,
    const u32* __restrict__ cursors, u32 num_regions, u32 parts) {
    for (u32 i = blockIdx.x * blockDim.x + threadIdx.x; i < num_pages; i += gridDim.x * blockDim.x) {
        table[slots[i]] = rows[i];
    }
    for (u32 task = blockIdx.x; task < num_regions * parts; task += gridDim.x) {
        const u32 region = task / parts, end = cursors[region];
        u32 word = copied[region] + task % parts * blockDim.x + threadIdx.x;
        if (word >= end) continue;
        const uint4* const from = (const uint4*)works[region];
        uint4* const to = (uint4*)hosts[region];
        for (; word < end; word += parts * blockDim.x) to[word] = from[word];
    }
}

__global__ void kv_collect(
    const uint4* __restrict__ table, const u32* __restrict__ slots, uint4* __restrict__ rows, u32 num_pages) {
    const u32 i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < num_pages) rows[i] = table[slots[i]];
}

__global__ void kv_gather(
    const u64* __restrict__ payloads, const uint4* __restrict__ rows, const u64* __restrict__ slots,
    uint4* __restrict__ there, u32 num_pages, u32 most) {
    for (u32 page = blockIdx.x; page < num_pages; page += gridDim.x) {
        uint4 row = rows[page];
        const uint4* const from = (const uint4*)payloads[page] + row.w;
        uint4* const to = (uint4*)slots[page];
        const u32 words = (min(row.y, most) + 15) / 16;
        for (u32 i = threadIdx.x; i < words; i += blockDim.x) to[i] = from[i];
        row.w = 0;
        if (threadIdx.x == 0) there[page] = row;
    }
}
