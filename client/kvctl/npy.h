/* NumPy's .npy files, versions 1 and 2: C order, little-endian, fp16, fp32, and two-byte records for bf16 (what
 * ml_dtypes writes). Format: numpy/lib/format.py. */
#ifndef KVD_NPY_H
#define KVD_NPY_H

#include <stddef.h>
#include <stdint.h>
#include <stdio.h>

enum { NPY_DIMS_MAX = 8 };

struct npy {
    char descr[16]; /* "<f2", "<f4", "|V2", "|u1", … */
    size_t shape[NPY_DIMS_MAX];
    int n_dims;
    size_t item_bytes;
    const uint8_t *data; /* into the file's bytes */
    size_t n_bytes;
};

/* Reads a header out of a whole file of n bytes. Returns NULL, or a sentence that says what is wrong. */
const char *npy_parse(const uint8_t *file, size_t n, struct npy *ret);
/* Writes a header of version 1 for these; 0 or -1 (errno). */
int npy_write_header(FILE *f, const char *descr, const size_t *shape, int n_dims);

#endif
