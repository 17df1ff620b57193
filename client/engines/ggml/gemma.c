#include "gemma.h"

#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

/* What the files leave out, as every model of the family has it. */
#define SLIDING_PERIOD 6u /* every sixth layer has full attention */
#define SLIDING_ROPE_BASE 10000.0f

/* The one size whose attention has another scale, which its file does not tell. */
#define LAYERS_OF_27B 62u

static int fail(struct gemma *model, int error, const char *format, ...)
{
    va_list args;

    va_start(args, format);
    vsnprintf(model->error, sizeof(model->error), format, args);
    va_end(args);
    model->failure = error;
    return error;
}

/* ---- Metadata ---------------------------------------------------------------------------------------------------- */

/* A number of the model's, or fallback if the file has none of this name and type. */
static uint32_t get_u32(const struct gemma *model, const char *name, uint32_t fallback)
{
    int64_t id = gguf_find_key(model->file, name);

    return id >= 0 && gguf_get_kv_type(model->file, id) == GGUF_TYPE_UINT32 ? gguf_get_val_u32(model->file, id) : fallback;
}

static float get_f32(const struct gemma *model, const char *name, float fallback)
{
    int64_t id = gguf_find_key(model->file, name);

    return id >= 0 && gguf_get_kv_type(model->file, id) == GGUF_TYPE_FLOAT32 ? gguf_get_val_f32(model->file, id) : fallback;
}

static const char *get_string(const struct gemma *model, const char *name)
{
    int64_t id = gguf_find_key(model->file, name);

    return id >= 0 && gguf_get_kv_type(model->file, id) == GGUF_TYPE_STRING ? gguf_get_val_str(model->file, id) : "";
}

/* What would change the graph, and is not in it. */
static int refuse_unknown(struct gemma *model)
{
    static const char *const none[] = {"gemma3.attn_logit_softcapping", "gemma3.final_logit_softcapping",
                                       "gemma3.rope.dimension_count", "gemma3.expert_count"};
    const char *scaling = get_string(model, "gemma3.rope.scaling.type");

    if (strcmp(get_string(model, "general.architecture"), "gemma3") != 0)
        return fail(model, -ENOTSUP, "a model of architecture \"%.64s\"; only gemma3 is known here",
                    get_string(model, "general.architecture"));
    for (size_t i = 0; i < sizeof(none) / sizeof(none[0]); i++)
        if (gguf_find_key(model->file, none[i]) >= 0)
            return fail(model, -ENOTSUP, "a model with %s, which this graph has not", none[i]);
    if ((scaling[0] && strcmp(scaling, "none") != 0) || get_f32(model, "gemma3.rope.scaling.factor", 1) != 1)
        return fail(model, -ENOTSUP, "a model with scaled RoPE, which this graph has not");
    return 0;
}

/* Which layers slide: a period in the file (or none: the family's), or an array of truth values. */
static int read_windows(struct gemma *model)
{
    static const char key[] = "gemma3.attention.sliding_window_pattern";
    int64_t id = gguf_find_key(model->file, key);
    uint32_t window = get_u32(model, "gemma3.attention.sliding_window", 0), period = get_u32(model, key, SLIDING_PERIOD);
    const uint8_t *slides = NULL;

    if (id >= 0 && gguf_get_kv_type(model->file, id) == GGUF_TYPE_ARRAY) {
        if (gguf_get_arr_type(model->file, id) != GGUF_TYPE_BOOL || gguf_get_arr_n(model->file, id) < model->n_layers)
            return fail(model, -ENOTSUP, "%s is no list of a truth value a layer", key);
        slides = gguf_get_arr_data(model->file, id);
    }
    if (period == 0)
        return fail(model, -ENOTSUP, "%s is 0", key);
    for (uint32_t i = 0; i < model->n_layers; i++) {
        bool is_sliding = window > 0 && (slides ? slides[i] != 0 : i % period < period - 1);

        model->layers[i].window_tokens = is_sliding ? window : 0;
        model->layers[i].rope_base = is_sliding ? get_f32(model, "gemma3.rope.freq_base_swa", SLIDING_ROPE_BASE)
                                                : get_f32(model, "gemma3.rope.freq_base", SLIDING_ROPE_BASE);
    }
    return 0;
}

static int read_sizes(struct gemma *model)
{
    model->n_layers = get_u32(model, "gemma3.block_count", 0);
    model->n_embd = get_u32(model, "gemma3.embedding_length", 0);
    model->n_heads = get_u32(model, "gemma3.attention.head_count", 0);
    model->n_kv_heads = get_u32(model, "gemma3.attention.head_count_kv", model->n_heads);
    model->dim = get_u32(model, "gemma3.attention.key_length", 0);
    model->n_ff = get_u32(model, "gemma3.feed_forward_length", 0);
    model->n_context = get_u32(model, "gemma3.context_length", 0);
    model->norm_epsilon = get_f32(model, "gemma3.attention.layer_norm_rms_epsilon", 0);
    if (model->n_layers == 0 || model->n_layers > 1024 || model->n_embd == 0 || model->n_heads == 0 || model->n_kv_heads == 0 ||
        model->n_heads % model->n_kv_heads != 0 || model->n_ff == 0 || model->n_context == 0 || model->norm_epsilon <= 0)
        return fail(model, -ENOTSUP, "sizes that are missing or do not fit each other");
    if (model->dim == 0 || model->dim > 256 || model->dim % 64 != 0 ||
        get_u32(model, "gemma3.attention.value_length", 0) != model->dim)
        return fail(model, -ENOTSUP, "heads of %u channels: 64, 128, 192 or 256 are represented, for K and V alike", model->dim);
    if (model->n_layers == LAYERS_OF_27B)
        return fail(model, -ENOTSUP, "the 27B, whose attention has a scale that its file does not tell");
    model->scale = 1 / sqrtf((float)model->dim);
    model->layers = calloc(model->n_layers, sizeof(*model->layers));
    return model->layers ? 0 : fail(model, -ENOMEM, "no memory for %u layers", model->n_layers);
}

/* ---- Weights ----------------------------------------------------------------------------------------------------- */

/* Finds a tensor and makes it point into the mapping. rows 0: a vector. NULL (with an error) if it is not as it must be. */
static struct ggml_tensor *take_tensor(struct gemma *model, const char *name, uint32_t columns, uint32_t rows)
{
    struct ggml_tensor *tensor = ggml_get_tensor(model->tensors, name);
    int64_t id = gguf_find_tensor(model->file, name);
    size_t off, bytes;

    if (!tensor || id < 0 || tensor->ne[0] != columns || ggml_nrows(tensor) != (rows ? rows : 1)) {
        if (model->failure == 0)
            fail(model, -ENOTSUP, "%s is missing or not %u x %u", name, columns, rows ? rows : 1);
        return NULL;
    }
    off = gguf_get_data_offset(model->file) + gguf_get_tensor_offset(model->file, id);
    bytes = ggml_nbytes(tensor);
    if (off > model->map_bytes || bytes > model->map_bytes - off ||
        ggml_backend_tensor_alloc(model->buffer, tensor, (char *)model->map + off) != GGML_STATUS_SUCCESS) {
        if (model->failure == 0)
            fail(model, -EBADMSG, "%s is not inside of the file", name);
        return NULL;
    }
    return tensor;
}

static struct ggml_tensor *take_layer_tensor(struct gemma *model, uint32_t layer, const char *name, uint32_t columns, uint32_t rows)
{
    char full[96];

    snprintf(full, sizeof(full), "blk.%u.%s.weight", layer, name);
    return take_tensor(model, full, columns, rows);
}

static int take_layer(struct gemma *model, uint32_t i)
{
    struct gemma_layer *layer = &model->layers[i];
    uint32_t e = model->n_embd, d = model->dim, f = model->n_ff, q = d * model->n_heads, kv = d * model->n_kv_heads;

    layer->attn_norm = take_layer_tensor(model, i, "attn_norm", e, 0);
    layer->wq = take_layer_tensor(model, i, "attn_q", e, q);
    layer->wk = take_layer_tensor(model, i, "attn_k", e, kv);
    layer->wv = take_layer_tensor(model, i, "attn_v", e, kv);
    layer->q_norm = take_layer_tensor(model, i, "attn_q_norm", d, 0);
    layer->k_norm = take_layer_tensor(model, i, "attn_k_norm", d, 0);
    layer->wo = take_layer_tensor(model, i, "attn_output", q, e);
    layer->post_attn_norm = take_layer_tensor(model, i, "post_attention_norm", e, 0);
    layer->ffn_norm = take_layer_tensor(model, i, "ffn_norm", e, 0);
    layer->ffn_gate = take_layer_tensor(model, i, "ffn_gate", e, f);
    layer->ffn_up = take_layer_tensor(model, i, "ffn_up", e, f);
    layer->ffn_down = take_layer_tensor(model, i, "ffn_down", f, e);
    layer->post_ffn_norm = take_layer_tensor(model, i, "post_ffw_norm", e, 0);
    return model->failure;
}

static int take_weights(struct gemma *model)
{
    struct ggml_tensor *embedding = ggml_get_tensor(model->tensors, "token_embd.weight");
    /* One tensor more than the graph has would be one that it leaves out. */
    int64_t n_known = 2 + 13 * (int64_t)model->n_layers;
    int r = 0;

    if (gguf_get_n_tensors(model->file) != n_known)
        return fail(model, -ENOTSUP, "%lld tensors; this graph has %lld", (long long)gguf_get_n_tensors(model->file),
                    (long long)n_known);
    if (!embedding || embedding->ne[1] <= 0 || embedding->ne[1] > INT32_MAX)
        return fail(model, -ENOTSUP, "token_embd.weight is missing");
    model->n_vocab = (uint32_t)embedding->ne[1];
    model->embedding = take_tensor(model, "token_embd.weight", model->n_embd, model->n_vocab);
    model->output_norm = take_tensor(model, "output_norm.weight", model->n_embd, 0);
    for (uint32_t i = 0; r == 0 && i < model->n_layers; i++)
        r = take_layer(model, i);
    return r == 0 ? model->failure : r;
}

static int map_file(const char *path, struct gemma *model)
{
    int fd = open(path, O_RDONLY | O_CLOEXEC), r = 0;
    struct stat st;

    if (fd < 0 || fstat(fd, &st) < 0) {
        r = fail(model, -errno, "%s", strerror(errno));
    } else {
        model->map = mmap(NULL, (size_t)st.st_size, PROT_READ, MAP_SHARED, fd, 0);
        model->map_bytes = (size_t)st.st_size;
        if (model->map == MAP_FAILED) {
            model->map = NULL;
            r = fail(model, -errno, "mapping it: %s", strerror(errno));
        }
    }
    if (fd >= 0)
        close(fd);
    return r;
}

int gemma_open(const char *path, struct gemma *model)
{
    int r;

    memset(model, 0, sizeof(*model));
    r = map_file(path, model);
    if (r < 0)
        return r;
    model->file = gguf_init_from_file(path, (struct gguf_init_params){.no_alloc = true, .ctx = &model->tensors});
    if (!model->file)
        return fail(model, -EBADMSG, "this is no GGUF file");
    model->buffer = ggml_backend_cpu_buffer_from_ptr(model->map, model->map_bytes);
    if (!model->buffer)
        return fail(model, -ENOMEM, "no memory for a buffer");
    r = refuse_unknown(model);
    if (r == 0)
        r = read_sizes(model);
    if (r == 0)
        r = read_windows(model);
    return r == 0 ? take_weights(model) : r;
}

void gemma_close(struct gemma *model)
{
    if (model->buffer)
        ggml_backend_buffer_free(model->buffer);
    if (model->tensors)
        ggml_free(model->tensors);
    if (model->file)
        gguf_free(model->file);
    if (model->map)
        munmap(model->map, model->map_bytes);
    free(model->layers);
    memset(model, 0, sizeof(*model));
}

/* ---- The graph --------------------------------------------------------------------------------------------------- */

#define NODES_PER_LAYER 48
#define NODES_BESIDE 32

static size_t n_nodes(const struct gemma *model)
{
    return NODES_BESIDE + (size_t)NODES_PER_LAYER * model->n_layers;
}

size_t gemma_graph_bytes(const struct gemma *model)
{
    return n_nodes(model) * ggml_tensor_overhead() + ggml_graph_overhead_custom(n_nodes(model), false);
}

static struct ggml_tensor *norm(const struct gemma *model, struct ggml_context *c, struct ggml_tensor *x, struct ggml_tensor *weight)
{
    return ggml_mul(c, ggml_rms_norm(c, x, model->norm_epsilon), weight);
}

/* Projects x to heads, with their norm and RoPE where norm_weight is given. */
static struct ggml_tensor *heads(const struct gemma *model, struct ggml_context *c, const struct gemma_graph *graph,
                                 const struct gemma_layer *layer, struct ggml_tensor *x, struct ggml_tensor *matrix,
                                 struct ggml_tensor *norm_weight)
{
    struct ggml_tensor *y = ggml_mul_mat(c, matrix, x);

    y = ggml_reshape_3d(c, y, model->dim, matrix->ne[1] / model->dim, x->ne[1]);
    if (!norm_weight)
        return y;
    return ggml_rope_ext(c, norm(model, c, y, norm_weight), graph->positions, NULL, (int)model->dim, GGML_ROPE_TYPE_NEOX,
                         (int)model->n_context, layer->rope_base, 1, 0, 1, 32, 1);
}

static struct ggml_tensor *feed_forward(struct ggml_context *c, const struct gemma_layer *layer, struct ggml_tensor *x)
{
    struct ggml_tensor *up = ggml_mul_mat(c, layer->ffn_up, x), *gate = ggml_mul_mat(c, layer->ffn_gate, x);

    return ggml_mul_mat(c, layer->ffn_down, ggml_geglu_split(c, gate, up));
}

void gemma_graph_build(const struct gemma *model, struct ggml_context *context, uint32_t n_tokens, uint32_t n_logits,
                       gemma_attention_fn attention, void *ctx, struct gemma_graph *ret)
{
    struct ggml_context *c = context;
    struct ggml_tensor *x;

    ret->graph = ggml_new_graph_custom(c, n_nodes(model), false);
    ret->tokens = ggml_new_tensor_1d(c, GGML_TYPE_I32, n_tokens);
    ret->positions = ggml_new_tensor_1d(c, GGML_TYPE_I32, n_tokens);
    ggml_set_input(ret->tokens);
    ggml_set_input(ret->positions);
    x = ggml_scale(c, ggml_get_rows(c, model->embedding, ret->tokens), sqrtf((float)model->n_embd));
    for (uint32_t i = 0; i < model->n_layers; i++) {
        const struct gemma_layer *layer = &model->layers[i];
        struct ggml_tensor *y = norm(model, c, x, layer->attn_norm);
        struct ggml_tensor *q = heads(model, c, ret, layer, y, layer->wq, layer->q_norm);
        struct ggml_tensor *k = heads(model, c, ret, layer, y, layer->wk, layer->k_norm);
        struct ggml_tensor *v = heads(model, c, ret, layer, y, layer->wv, NULL);

        y = ggml_mul_mat(c, layer->wo, attention(ctx, c, i, q, k, v));
        x = ggml_add(c, norm(model, c, y, layer->post_attn_norm), x);
        y = feed_forward(c, layer, norm(model, c, x, layer->ffn_norm));
        x = ggml_add(c, norm(model, c, y, layer->post_ffn_norm), x);
    }
    x = ggml_view_2d(c, x, model->n_embd, n_logits, x->nb[1], (n_tokens - n_logits) * x->nb[1]);
    ret->logits = ggml_mul_mat(c, model->embedding, norm(model, c, x, model->output_norm));
    ggml_set_output(ret->logits);
    ggml_build_forward_expand(ret->graph, ret->logits);
}
