/* Writes a GGUF model again with every weight dequantised to F32.
 *
 * libllama's CPU kernels round activations to 8 bits where weights are quantised. That noise (a mean next-token KL of
 * some thousandths) is common to every run, but hides the difference that a 4-bit KV cache makes: so fidelity is
 * measured on F32. */
#include <llama.h>
#include <stdio.h>

int main(int argc, char **argv)
{
    struct llama_model_quantize_params params = llama_model_quantize_default_params();
    uint32_t failed;

    if (argc != 3) {
        fprintf(stderr, "usage: gguf-f32 IN.gguf OUT.gguf\n");
        return 2;
    }
    llama_backend_init();
    params.ftype = LLAMA_FTYPE_ALL_F32;
    params.allow_requantize = true;
    params.pure = true;
    failed = llama_model_quantize(argv[1], argv[2], &params);
    llama_backend_free();
    if (failed != 0)
        fprintf(stderr, "gguf-f32: %s could not be converted\n", argv[1]);
    return failed != 0;
}
