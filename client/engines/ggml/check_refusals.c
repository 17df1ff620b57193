/* Shows that only models are taken that the graph represents: tiny files, each with one thing that is not as it should be.
 *
 *   check_refusals FOLDER      where the files are made, and removed */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "gemma.h"

#define LAYERS 7u
#define EMBD 64u
#define HEADS 4u
#define FF 96u
#define VOCAB 32u

/* What is wrong with a file; 0: nothing. */
struct fault {
    const char *what; /* part of the reason that must be given */
    int error;
    const char *architecture, *string_key, *string, *float_key, *number_key, *without, *extra;
    uint32_t number;
    float float_value;
    long cut_bytes; /* off the end */
};

static const struct fault faults[] = {
    {.what = ""},
    {.what = "architecture", .error = -ENOTSUP, .architecture = "llama"},
    {.what = "attn_logit_softcapping", .error = -ENOTSUP, .float_key = "gemma3.attn_logit_softcapping", .float_value = 50},
    {.what = "final_logit_softcapping", .error = -ENOTSUP, .float_key = "gemma3.final_logit_softcapping", .float_value = 30},
    {.what = "scaled RoPE", .error = -ENOTSUP, .string_key = "gemma3.rope.scaling.type", .string = "linear"},
    {.what = "scaled RoPE", .error = -ENOTSUP, .float_key = "gemma3.rope.scaling.factor", .float_value = 8},
    {.what = "heads of 96", .error = -ENOTSUP, .number_key = "gemma3.attention.key_length", .number = 96},
    {.what = "heads of 512", .error = -ENOTSUP, .number_key = "gemma3.attention.key_length", .number = 512},
    {.what = "heads of 64", .error = -ENOTSUP, .number_key = "gemma3.attention.value_length", .number = 128},
    {.what = "sizes", .error = -ENOTSUP, .number_key = "gemma3.attention.head_count_kv", .number = 3},
    {.what = "sizes", .error = -ENOTSUP, .number_key = "gemma3.block_count", .number = 0},
    {.what = "27B", .error = -ENOTSUP, .number_key = "gemma3.block_count", .number = 62},
    {.what = "tensors", .error = -ENOTSUP, .number_key = "gemma3.block_count", .number = 8},
    {.what = "attn_q", .error = -ENOTSUP, .number_key = "gemma3.attention.head_count", .number = 8},
    {.what = "pattern is 0", .error = -ENOTSUP, .number_key = "gemma3.attention.sliding_window_pattern", .number = 0},
    {.what = "tensors", .error = -ENOTSUP, .extra = "blk.0.attn_q.bias"},
    {.what = "blk.3.ffn_up.weight", .error = -ENOTSUP, .without = "blk.3.ffn_up.weight", .extra = "blk.0.attn_q.bias"},
    {.what = "not inside of the file", .error = -EBADMSG, .cut_bytes = 512},
};

static void add(struct gguf_context *file, struct ggml_context *context, const struct fault *fault, const char *name, int64_t columns,
                int64_t rows)
{
    struct ggml_tensor *tensor;

    if (fault->without && strcmp(fault->without, name) == 0)
        return;
    tensor = ggml_new_tensor_2d(context, GGML_TYPE_F32, columns, rows);
    ggml_set_name(tensor, name);
    memset(tensor->data, 0, ggml_nbytes(tensor));
    gguf_add_tensor(file, tensor);
}

static void add_tensors(struct gguf_context *file, struct ggml_context *context, const struct fault *fault)
{
    static const struct {
        const char *name;
        int64_t columns, rows;
    } of_layer[] = {
        {"attn_norm", EMBD, 1},    {"attn_q", EMBD, 64 * HEADS},      {"attn_k", EMBD, 64},
        {"attn_v", EMBD, 64},      {"attn_q_norm", 64, 1},            {"attn_k_norm", 64, 1},
        {"ffn_norm", EMBD, 1},     {"attn_output", 64 * HEADS, EMBD}, {"post_attention_norm", EMBD, 1},
        {"ffn_gate", EMBD, FF},    {"ffn_up", EMBD, FF},              {"ffn_down", FF, EMBD},
        {"post_ffw_norm", EMBD, 1},
    };
    char name[64];

    add(file, context, fault, "token_embd.weight", EMBD, VOCAB);
    for (uint32_t i = 0; i < LAYERS; i++)
        for (size_t j = 0; j < sizeof(of_layer) / sizeof(of_layer[0]); j++) {
            snprintf(name, sizeof(name), "blk.%u.%s.weight", i, of_layer[j].name);
            add(file, context, fault, name, of_layer[j].columns, of_layer[j].rows);
        }
    add(file, context, fault, "output_norm.weight", EMBD, 1);
    if (fault->extra)
        add(file, context, fault, fault->extra, EMBD, 1);
}

static void write_model(const char *path, const struct fault *fault)
{
    struct ggml_init_params params = {.mem_size = 16 << 20};
    struct ggml_context *context = ggml_init(params);
    struct gguf_context *file = gguf_init_empty();
    FILE *written;

    gguf_set_val_str(file, "general.architecture", fault->architecture ? fault->architecture : "gemma3");
    gguf_set_val_u32(file, "gemma3.block_count", LAYERS);
    gguf_set_val_u32(file, "gemma3.context_length", 1024);
    gguf_set_val_u32(file, "gemma3.embedding_length", EMBD);
    gguf_set_val_u32(file, "gemma3.feed_forward_length", FF);
    gguf_set_val_u32(file, "gemma3.attention.head_count", HEADS);
    gguf_set_val_u32(file, "gemma3.attention.head_count_kv", 1);
    gguf_set_val_u32(file, "gemma3.attention.key_length", 64);
    gguf_set_val_u32(file, "gemma3.attention.value_length", 64);
    gguf_set_val_u32(file, "gemma3.attention.sliding_window", 128);
    gguf_set_val_f32(file, "gemma3.attention.layer_norm_rms_epsilon", 1e-6f);
    gguf_set_val_f32(file, "gemma3.rope.freq_base", 1e6f);
    if (fault->string_key)
        gguf_set_val_str(file, fault->string_key, fault->string);
    if (fault->float_key)
        gguf_set_val_f32(file, fault->float_key, fault->float_value);
    if (fault->number_key)
        gguf_set_val_u32(file, fault->number_key, fault->number);
    add_tensors(file, context, fault);
    if (!gguf_write_to_file(file, path, false))
        exit(1);
    gguf_free(file);
    ggml_free(context);
    written = fopen(path, "rb+");
    if (!written || fseek(written, 0, SEEK_END) < 0 || ftruncate(fileno(written), ftell(written) - fault->cut_bytes) < 0)
        exit(1);
    fclose(written);
}

/* The layers' windows and RoPE bases, where the file is as it should be. */
static bool is_right(const struct gemma *model)
{
    for (uint32_t i = 0; i < LAYERS; i++)
        if (model->layers[i].window_tokens != (i == 5 ? 0 : 128) || model->layers[i].rope_base != (i == 5 ? 1e6f : 1e4f))
            return false;
    return model->n_layers == LAYERS && model->n_vocab == VOCAB && model->scale == 0.125f;
}

static bool check(const char *path, const struct fault *fault)
{
    struct gemma model;
    int r;
    bool is_good;

    write_model(path, fault);
    r = gemma_open(path, &model);
    is_good = r == fault->error && strstr(model.error, fault->what) && (r < 0 || is_right(&model));
    printf("%s: %s\n", is_good ? "as it should be" : "WRONG", r == 0 ? "taken" : model.error);
    gemma_close(&model);
    unlink(path);
    return is_good;
}

int main(int argc, char **argv)
{
    char path[4096];
    bool is_good = true;
    struct gemma model;
    FILE *file;

    if (argc != 2) {
        fprintf(stderr, "usage: check_refusals FOLDER\n");
        return 2;
    }
    snprintf(path, sizeof(path), "%s/refused.gguf", argv[1]);
    for (size_t i = 0; i < sizeof(faults) / sizeof(faults[0]); i++)
        is_good &= check(path, &faults[i]);
    is_good &= gemma_open("/nonexistent", &model) == -ENOENT;
    gemma_close(&model);
    file = fopen(path, "wb");
    if (!file || fputs("no model", file) < 0 || fclose(file) < 0)
        return 1;
    is_good &= gemma_open(path, &model) == -EBADMSG;
    gemma_close(&model);
    unlink(path);
    return !is_good;
}
