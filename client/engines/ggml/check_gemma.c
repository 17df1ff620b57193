/* Shows that the graph is the model's: next-token distributions against libllama's over the same tokens, in one batch, in several,
 * and token by token, beyond the sliding window. Needs a model; best is one stored as F32 (fetch.sh model-f32), as with quantised
 * weights both round activations to 8 bits, each in its own places.
 *
 *   check_gemma MODEL TEXT [MOST-KL]      default 1e-5 nats, in the mean */
#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "divergence.h"
#include "words.h"
#include "worker.h"

#define TOKENS 1100u /* more than two windows of 512 */
#define BATCH 100u   /* no multiple of anything */
#define ALONE 40u    /* the last ones, each in a graph of its own */
#define BLOCK 64u

static int complain(const char *what)
{
    fprintf(stderr, "check_gemma: %s\n", what);
    return 1;
}

static struct llama_context *open_reference(const char *path, struct llama_model **ret_model)
{
    struct llama_context_params params = llama_context_default_params();

    *ret_model = llama_model_load_from_file(path, llama_model_default_params());
    params.n_ctx = 2048;
    params.n_batch = params.n_ubatch = 512;
    params.n_threads = params.n_threads_batch = 2;
    params.type_k = params.type_v = GGML_TYPE_F32;
    params.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_DISABLED;
    return *ret_model ? llama_init_from_model(*ret_model, params) : NULL;
}

/* KL of each token of [first, first + n). */
static int compare_some(struct worker *worker, struct llama_context *reference, const uint32_t *tokens, uint32_t first, uint32_t n,
                        struct divergence *rows)
{
    struct llama_batch batch = llama_batch_get_one((llama_token *)(tokens + first), (int32_t)n);
    int8_t wanted[BATCH];
    const float *logits;

    memset(wanted, 1, n);
    batch.logits = wanted;
    if (llama_decode(reference, batch) != 0 || worker_compute_logits(worker, tokens + first, n, &logits) < 0)
        return -EIO;
    divergence_rows(llama_get_logits(reference), logits, tokens + first + 1, n, worker->model->n_vocab, 2, rows + first);
    return 0;
}

static int compare(struct worker *worker, struct llama_context *reference, const uint32_t *tokens, double most)
{
    struct divergence *rows = calloc(TOKENS, sizeof(*rows));
    double sum = 0, worst = 0;
    uint32_t n_same = 0;
    int r = rows ? 0 : -ENOMEM;

    for (uint32_t at = 0, n; r == 0 && at + 1 < TOKENS; at += n) {
        n = at + BATCH + ALONE < TOKENS ? BATCH : 1;
        r = compare_some(worker, reference, tokens, at, n, rows);
    }
    for (uint32_t i = 0; r == 0 && i + 1 < TOKENS; i++) {
        sum += rows[i].kl;
        worst = fmax(worst, fabs(rows[i].kl));
        n_same += (uint32_t)rows[i].same_top;
    }
    free(rows);
    if (r < 0)
        return complain("a batch could not be computed");
    printf("%u tokens against libllama: mean KL %.3g, most %.3g nats, the same most likely token %u times\n", TOKENS - 1,
           sum / (TOKENS - 1), worst, n_same);
    return !(sum / (TOKENS - 1) <= most) ? complain("more than allowed") : 0;
}

static int run(const char *model_path, const char *text, size_t n_text, double most)
{
    struct gemma model;
    struct words words = {0};
    struct worker worker = {0};
    struct llama_model *reference_model = NULL;
    struct llama_context *reference = NULL;
    uint32_t *tokens = NULL;
    int failed = 1;

    if (gemma_open(model_path, &model) < 0)
        complain(model.error);
    else if (words_open(model_path, &words) < 0 || words_tokenize(&words, text, n_text, true, &tokens) < (int)TOKENS)
        complain("the text has too few tokens");
    else if (worker_open(&model, NULL, BLOCK, ATTENTION_PLAIN, 2, &worker) < 0)
        complain(worker.error);
    else if (!(reference = open_reference(model_path, &reference_model)))
        complain("libllama does not load the model");
    else
        failed = worker_begin(&worker, 0) < 0 || compare(&worker, reference, tokens, most);
    if (reference)
        llama_free(reference);
    if (reference_model)
        llama_model_free(reference_model);
    worker_close(&worker);
    words_close(&words);
    gemma_close(&model);
    free(tokens);
    return failed;
}

int main(int argc, char **argv)
{
    static char text[1 << 20];
    FILE *file;
    size_t n;

    if (argc != 3 && argc != 4) {
        fprintf(stderr, "usage: check_gemma MODEL TEXT [MOST-KL]\n");
        return 2;
    }
    file = fopen(argv[2], "rb");
    if (!file)
        return complain(strerror(errno));
    n = fread(text, 1, sizeof(text), file);
    fclose(file);
    return run(argv[1], text, n, argc == 4 ? strtod(argv[3], NULL) : 1e-5);
}
