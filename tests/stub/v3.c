/* A libcuSZp that computes nothing: it writes down what its functions receive, in the order of V3's
   header, as text in last_call. Compile with -DINCOMPLETE to leave the f64 functions out. */
#include <stddef.h>
#include <stdio.h>

typedef struct {
    unsigned x, y, z;
} uint3;

char last_call[512];
int next_error; /* what cudaGetLastError returns once */

int cudaGetLastError(void)
{
    int error = next_error;
    next_error = 0;
    return error;
}

const char *cudaGetErrorString(int error)
{
    return error == 2 ? "out of memory" : "unknown error";
}

static void write_down(const char *name, const void *data, const void *cmp, size_t n, size_t size, double eb,
                       const char *rest, const void *stream)
{
    snprintf(last_call, sizeof last_call, "%s data=%zx cmp=%zx n=%zu size=%zu eb=%.17g%s stream=%zx", name,
             (size_t)data, (size_t)cmp, n, size, eb, rest, (size_t)stream);
}

static const char *extents(int dim, uint3 dims, int type, int mode)
{
    static char text[128];
    snprintf(text, sizeof text, " dim=%d dims=%u,%u,%u type=%d mode=%d", dim, dims.x, dims.y, dims.z, type, mode);
    return text;
}

void cuSZp_compress(void *data, unsigned char *cmp, size_t n, size_t *size, float eb, int dim, uint3 dims, int type,
                    int mode, void *stream)
{
    *size = 1024;
    write_down("compress", data, cmp, n, *size, eb, extents(dim, dims, type, mode), stream);
}

void cuSZp_decompress(void *data, unsigned char *cmp, size_t n, size_t size, float eb, int dim, uint3 dims, int type,
                      int mode, void *stream)
{
    write_down("decompress", data, cmp, n, size, eb, extents(dim, dims, type, mode), stream);
}

/* What tells V3 from older versions. */
void _Z27cuSZp_compress_1D_fixed_f32PfPhmPmfP11CUstream_st(void) {}

#ifndef INCOMPLETE
#define F64(mode, compress, decompress)                                                                             \
    void compress(double *data, unsigned char *cmp, size_t n, size_t *size, double eb, void *stream)                \
    {                                                                                                               \
        *size = 1024;                                                                                               \
        write_down("compress " mode, data, cmp, n, *size, eb, "", stream);                                          \
    }                                                                                                               \
    void decompress(double *data, unsigned char *cmp, size_t n, size_t size, double eb, void *stream)               \
    {                                                                                                               \
        write_down("decompress " mode, data, cmp, n, size, eb, "", stream);                                         \
    }

F64("fixed", _Z27cuSZp_compress_1D_fixed_f64PdPhmPmdP11CUstream_st, _Z29cuSZp_decompress_1D_fixed_f64PdPhmmdP11CUstream_st)
F64("plain", _Z27cuSZp_compress_1D_plain_f64PdPhmPmdP11CUstream_st, _Z29cuSZp_decompress_1D_plain_f64PdPhmmdP11CUstream_st)
F64("outlier", _Z29cuSZp_compress_1D_outlier_f64PdPhmPmdP11CUstream_st,
    _Z31cuSZp_decompress_1D_outlier_f64PdPhmmdP11CUstream_st)
#endif
