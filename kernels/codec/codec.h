/* Codecs: how the numbers of a block become bytes, and back. docs/codecs.md is the format, byte by byte; the scalar variant
 * (codec_scalar.c) is its specification, and every other variant writes the same bytes and decodes to the same bits.
 *
 * What is coded: x[n_tokens][dim], the keys or the values of one KV head of one layer over the tokens of a block, fp16, bf16 or
 * fp32, token t at src + t * stride_bytes. It becomes two parts: side data (scales, ranges; may be empty) and codes.
 *
 * Nothing here allocates, keeps state or touches a global; a call uses at most 32 KiB of stack. All functions may be called
 * from any thread. The rounding mode must be the default one, denormals not flushed.
 *
 * Includes: the C library and kernels/cpu.h only. */
#ifndef KVD_KERNELS_CODEC_CODEC_H
#define KVD_KERNELS_CODEC_CODEC_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "kernels/cpu.h"

#define CODEC_TOKENS_MAX 4096u
#define CODEC_DIM_MAX 1024u  /* dim is a multiple of 16 */
#define CODEC_TEXT_MAX 64u   /* bytes of a specification's text with its 0 */

/* Pinned: these numbers are in fingerprints and on disk. */
enum codec_id {
    CODEC_RAW = 1,  /* 16- or 32-bit floats as they are */
    CODEC_FP8 = 2,  /* E4M3 */
    CODEC_INT8 = 3, /* per token: fp16 scale, int8 codes */
    CODEC_UQ4 = 4,  /* per 32 channels of a token: UE8M0 scale, E2M1 codes */
    CODEC_TQ4 = 5,  /* per token: fp16 norm, rotated, 16 Lloyd-Max levels */
    CODEC_TQ3 = 6,  /* the same with 8 levels */
    CODEC_KC4 = 7,  /* per channel over the block: fp16 low and high, 4-bit codes */
};
enum codec_dtype { CODEC_F16 = 1, CODEC_BF16 = 2, CODEC_F32 = 3 };
enum codec_grid { CODEC_GRID_INT = 0, CODEC_GRID_E2M1 = 1 };
enum codec_rule { CODEC_RULE_ULTRAQUANT = 0, CODEC_RULE_EVEN = 1 };
enum codec_role { CODEC_K = 0, CODEC_V = 1 };

/* The 8 bytes are canonical: two specifications mean the same if and only if their bytes are equal, so they can be hashed.
 * A field that the codec does not have is zero. */
struct codec_spec {
    uint8_t id;     /* enum codec_id */
    uint8_t dtype;  /* CODEC_RAW: enum codec_dtype that is stored */
    uint8_t grid;   /* CODEC_KC4: enum codec_grid */
    uint8_t rule;   /* CODEC_UQ4: enum codec_rule */
    uint8_t rotate; /* CODEC_UQ4: 1 = Hadamard over the head */
    uint8_t zero[3];
};
_Static_assert(sizeof(struct codec_spec) == 8, "hashed and stored");

/* Parameters of a codec for one layer and head that belong to the space (a width for each channel, say). No codec of this
 * version takes any: pass NULL; codec_check() refuses others. */
struct codec_params {
    const void *data;
    size_t bytes;
};

/* Reads "name" or "name:option=value,option=value":
 *   raw | f16 (the same) | bf16 | f32        kept exactly if the source has this type, else converted
 *   fp8   int8   tq4   tq3
 *   kc4[:grid=int|e2m1]                       default int
 *   uq4[:rule=ultraquant|even][,rotate=on|off] default ultraquant; rotate on for keys and off for values
 * Errors: -EINVAL (unknown name, option or value; *ret_reason, if not NULL, says which). */
int codec_spec_parse(const char *text, enum codec_role role, struct codec_spec *ret_spec, const char **ret_reason);

/* Writes the one text form that parses back to spec for either role. buf holds CODEC_TEXT_MAX bytes. Returns buf. */
char *codec_spec_format(const struct codec_spec *spec, char *buf);

/* The codec that keeps a source type exactly. */
struct codec_spec codec_spec_raw(enum codec_dtype dtype);

bool codec_spec_equal(const struct codec_spec *a, const struct codec_spec *b);

/* Every codec in its default form and its options, for listings and tests; NULL past the last. */
const char *codec_spec_example(size_t i);

/* "f16", "bf16", "f32" (also "fp16", "float16", "bfloat16", "fp32", "float32"). Errors: -EINVAL. */
int codec_dtype_parse(const char *text, enum codec_dtype *ret_dtype);
const char *codec_dtype_name(enum codec_dtype dtype);
size_t codec_dtype_bytes(enum codec_dtype dtype); /* 2 or 4; 0 for none of the enum */

/* Can this codec code blocks of this shape? Errors: -EINVAL (a specification that codec_spec_parse() can't give, a shape out of
 * bounds), -ENOTSUP (the codec has no form for this head size). *ret_reason, if not NULL, becomes a constant sentence. */
int codec_check(const struct codec_spec *spec, const struct codec_params *params, enum codec_role role, uint32_t n_tokens,
                uint32_t dim, const char **ret_reason);

/* Bytes of the two parts; the shape has passed codec_check(). */
size_t codec_side_bytes(const struct codec_spec *spec, uint32_t n_tokens, uint32_t dim);
size_t codec_code_bytes(const struct codec_spec *spec, uint32_t n_tokens, uint32_t dim);

/* Bytes of codes of one token: token t's codes start at t * this, in every codec. */
size_t codec_row_bytes(const struct codec_spec *spec, uint32_t dim);

/* One variant: what an instruction set does. Arguments are those of codec_encode() and codec_decode(), already checked. */
struct codec_ops {
    const char *name; /* "scalar", "avx2", "avx512" */
    int (*encode)(const struct codec_spec *spec, enum codec_dtype dtype, const void *src, size_t stride_bytes,
                  uint32_t n_tokens, uint32_t dim, void *side, void *codes);
    void (*decode)(const struct codec_spec *spec, const void *side, const void *codes, uint32_t n_tokens, uint32_t dim,
                   uint32_t t0, uint32_t t1, enum codec_dtype dtype, void *dst, size_t stride_bytes);
};

extern const struct codec_ops codec_ops_scalar;
extern const struct codec_ops codec_ops_avx2;   /* AVX2, FMA, F16C, BMI2 */
extern const struct codec_ops codec_ops_avx512; /* AVX-512 F, BW, VL, DQ and the above */

/* The fastest variant for these features; NULL: the scalar one. Choose once and pass it along. */
const struct codec_ops *codec_ops_choose(const struct cpu_features *cpu);

/* Encodes a block. side and codes are codec_side_bytes() and codec_code_bytes() long and any alignment; all their bytes are
 * written on success. src may be memory that another process changes meanwhile: then the bytes are some valid code of some
 * values, and nothing outside side and codes is touched.
 * Errors: -EINVAL, -ENOTSUP (as codec_check, or |stride_bytes| below a row), -EDOM (a value that the codec refuses:
 * codec_find_refused() says which); then side and codes hold no meaning. */
int codec_encode(const struct codec_ops *ops, const struct codec_spec *spec, const struct codec_params *params,
                 enum codec_dtype dtype, const void *src, size_t stride_bytes, uint32_t n_tokens, uint32_t dim, void *side,
                 void *codes);

/* Decodes the tokens t0 <= t < t1 of a block of n_tokens; token t goes to dst + (t - t0) * stride_bytes. Any bytes may come in:
 * those that no encoder writes give unspecified numbers, never a fault. Values beyond fp16 saturate to +-65504 in an fp16
 * dst. Errors: -EINVAL, -ENOTSUP. */
int codec_decode(const struct codec_ops *ops, const struct codec_spec *spec, const struct codec_params *params,
                 const void *side, const void *codes, uint32_t n_tokens, uint32_t dim, uint32_t t0, uint32_t t1,
                 enum codec_dtype dtype, void *dst, size_t stride_bytes);

enum codec_fault_kind { CODEC_FAULT_NONE = 0, CODEC_FAULT_NAN, CODEC_FAULT_INF, CODEC_FAULT_RANGE };
struct codec_fault {
    enum codec_fault_kind kind;
    uint32_t token, channel; /* the first such value; for CODEC_FAULT_RANGE of a whole token, its largest one */
    float value;
};

/* After -EDOM: looks for the first value that is refused (slow, scalar). kind is CODEC_FAULT_NONE if there is none (any more).
 * Errors: -EINVAL, -ENOTSUP. */
int codec_find_refused(const struct codec_spec *spec, enum codec_dtype dtype, const void *src, size_t stride_bytes,
                       uint32_t n_tokens, uint32_t dim, struct codec_fault *ret_fault);

#endif
