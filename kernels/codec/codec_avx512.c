#include "kernels/codec/codec_vec_avx512.h"

#include "kernels/codec/codec_rows.h"

const struct codec_ops codec_ops_avx512 = {"avx512", vec_encode, vec_decode};
