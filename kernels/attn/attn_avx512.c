#include "kernels/attn/attn_vec_avx512.h"
#include "kernels/codec/codec_vec_avx512.h"

#define ATTN_CODEC codec_ops_avx512
#include "kernels/attn/attn_part.h"

const struct attn_ops attn_ops_avx512 = {"avx512", vector_partial};
