#include "run.h"

#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "common.h"
#include "divergence.h"

#define TEXT_BYTES_PER_TOKEN 64

struct result {
    uint32_t *tokens; /* the prompt, then what was generated */
    uint32_t n_prompt, n_reused, n_generated;
    char *text;
    size_t n_text;
    double match_msec, ttft_msec, total_msec;
};

static double now_msec(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec * 1e3 + (double)t.tv_nsec * 1e-6;
}

const char *run_form_name(enum attention_form form)
{
    static const char *const names[] = {"plain", "local", "daemon", "auto"};

    return (size_t)form < sizeof(names) / sizeof(names[0]) ? names[form] : NULL;
}

/* ---- Generating -------------------------------------------------------------------------------------------------- */

static int result_init(const uint32_t *prompt, uint32_t n_prompt, uint32_t n_predict, struct result *result)
{
    *result = (struct result){.n_prompt = n_prompt};
    result->tokens = malloc(((size_t)n_prompt + n_predict) * sizeof(*result->tokens));
    result->text = malloc((size_t)n_predict * TEXT_BYTES_PER_TOKEN + 1);
    if (!result->tokens || !result->text)
        return -ENOMEM;
    memcpy(result->tokens, prompt, n_prompt * sizeof(*prompt));
    return 0;
}

static void result_deinit(struct result *result)
{
    free(result->tokens);
    free(result->text);
}

static void add_token(struct result *result, const struct words *words, uint32_t token, bool is_shown)
{
    char *text = result->text + result->n_text;

    result->tokens[result->n_prompt + result->n_generated++] = token;
    result->n_text += words_text(words, token, text, TEXT_BYTES_PER_TOKEN);
    result->text[result->n_text] = '\0';
    if (is_shown) {
        fputs(text, stdout);
        fflush(stdout);
    }
}

/* What kvd has of the prompt. A failure of the cache is no failure of the run. */
static void begin(struct worker *worker, const struct result *result, uint32_t n_predict)
{
    if (worker->reuse && reuse_match(worker->reuse, result->tokens, result->n_prompt) != KVD_OK)
        worker->reuse->n_matched = 0;
    worker_begin(worker, n_predict);
}

static int generate(struct worker *worker, const struct words *words, const struct run_options *options, struct result *result)
{
    double begun = now_msec();
    const float *logits;
    int r;

    begin(worker, result, options->n_predict);
    result->n_reused = worker->n_tokens;
    r = worker_compute_surely(worker, result->tokens, result->n_prompt, true, &logits);
    while (r == 0) {
        uint32_t token = worker_best(worker, logits);

        if (result->n_generated == 0)
            result->ttft_msec = now_msec() - begun;
        add_token(result, words, token, !options->json);
        if (words_is_end(words, token) || result->n_generated == options->n_predict)
            break;
        r = worker_compute_surely(worker, result->tokens, result->n_prompt + result->n_generated, false, &logits);
    }
    result->total_msec = now_msec() - begun;
    return r;
}

/* ---- Output ------------------------------------------------------------------------------------------------------ */

static double msec_per_token(const struct result *result)
{
    return result->n_generated > 1 ? (result->total_msec - result->ttft_msec) / (result->n_generated - 1) : 0;
}

/* How many layers attend to the prefix in each form. */
static void count_forms(const struct worker *worker, uint32_t *ret_n)
{
    for (uint32_t i = 0; i < worker->attention.n_layers; i++)
        ret_n[worker->attention.layers[i].form]++;
}

static void print_json_reuse(const struct worker *worker)
{
    const struct reuse *reuse = worker->reuse;
    uint32_t n[ATTENTION_AUTO] = {0};

    count_forms(worker, n);
    printf(",\"layers_plain\":%u,\"layers_local\":%u,\"layers_daemon\":%u", n[ATTENTION_PLAIN], n[ATTENTION_LOCAL],
           n[ATTENTION_DAEMON]);
    printf(",\"attend_requests\":%llu,\"attend_fallbacks\":%llu,\"recomputed_tokens\":%u",
           (unsigned long long)worker->attention.n_asked, (unsigned long long)worker->attention.n_fallbacks, worker->n_recomputed);
    printf(",\"match_ms\":%.3f,\"wait_ms\":%.3f,\"load_ms\":%.3f,\"publish_ms\":%.3f", reuse->match_msec, reuse->wait_msec,
           reuse->load_msec, reuse->publish_msec);
    printf(",\"blocks_published\":%u,\"blocks_present\":%u,\"blocks_failed\":%u", reuse->n_published, reuse->n_present,
           reuse->n_failed);
}

static void print_json(const struct worker *worker, const struct result *result, const char *error)
{
    printf("{\"attend\":\"%s\",\"ttft_ms\":%.3f,\"total_ms\":%.3f,\"ms_per_token\":%.3f", run_form_name(worker->form),
           result->ttft_msec, result->total_msec, msec_per_token(result));
    printf(",\"prompt_tokens\":%u,\"reused_tokens\":%u,\"computed_tokens\":%u,\"kvd\":%s", result->n_prompt, result->n_reused,
           result->n_prompt - result->n_reused, worker->reuse ? "true" : "false");
    if (worker->reuse)
        print_json_reuse(worker);
    if (error) {
        fputs(",\"kvd_error\":", stdout);
        common_print_json(stdout, error);
    }
    fputs(",\"tokens\":[", stdout);
    for (uint32_t i = 0; i < result->n_generated; i++)
        printf("%s%u", i ? "," : "", result->tokens[result->n_prompt + i]);
    fputs("],\"text\":", stdout);
    common_print_json(stdout, result->text);
    fputs("}\n", stdout);
}

static void print_text(const struct worker *worker, const struct result *result, const char *error)
{
    uint32_t n[ATTENTION_AUTO] = {0};

    printf("\n\nfirst token after %.0f ms, then %.1f ms a token; of %u prompt tokens %u came from the cache\n", result->ttft_msec,
           msec_per_token(result), result->n_prompt, result->n_reused);
    if (result->n_reused > 0) {
        count_forms(worker, n);
        printf("attention over them: %u layers plain, %u here over the cache's blocks, %u by the daemon, which failed %llu times\n",
               n[ATTENTION_PLAIN], n[ATTENTION_LOCAL], n[ATTENTION_DAEMON], (unsigned long long)worker->attention.n_fallbacks);
    }
    if (error)
        printf("the cache failed: %s\n", error);
}

int run_generate(struct worker *worker, const struct words *words, const uint32_t *prompt, uint32_t n_prompt,
                 const struct run_options *options, const char *reuse_error)
{
    struct result result;
    const char *error = reuse_error;
    int r = result_init(prompt, n_prompt, options->n_predict, &result);

    if (r == 0)
        r = generate(worker, words, options, &result);
    if (!error && worker->reuse && worker->reuse->error[0])
        error = worker->reuse->error;
    if (!error && worker->n_recomputed > 0)
        error = worker->attention.message;
    if (r == 0 && options->json)
        print_json(worker, &result, error);
    else if (r == 0)
        print_text(worker, &result, error);
    result_deinit(&result);
    return r;
}

/* ---- Comparing --------------------------------------------------------------------------------------------------- */

struct comparison {
    uint32_t n, n_same, first_parted;
    double kl_sum, kl_max, kl_parted;
};

static void compare_logits(const struct worker *plain, const float *p, const float *q, int n_threads, struct comparison *c)
{
    uint32_t best = worker_best(plain, p);
    struct divergence row;

    divergence_rows(p, q, &best, 1, plain->model->n_vocab, n_threads, &row);
    c->kl_sum += row.kl;
    c->kl_max = fmax(c->kl_max, fabs(row.kl));
    if (!row.same_top) {
        c->kl_parted = fmax(c->kl_parted, fabs(row.kl));
        c->first_parted = c->first_parted < c->n ? c->first_parted : c->n;
    }
    c->n_same += (uint32_t)row.same_top;
    c->n++;
}

static int compare(struct worker *plain, struct worker *other, struct result *result, const struct run_options *options,
                   struct comparison *c)
{
    const float *p, *q;
    int r = 0;

    while (r == 0 && c->n < options->n_predict) {
        uint32_t n = result->n_prompt + result->n_generated;

        r = worker_compute(plain, result->tokens, n, false, &p);
        if (r == 0 && (r = worker_compute(other, result->tokens, n, false, &q)) < 0)
            memcpy(plain->error, other->error, sizeof(plain->error));
        if (r == 0) {
            compare_logits(plain, p, q, options->n_threads, c);
            result->tokens[n] = worker_best(plain, p);
            result->n_generated++;
        }
    }
    return r;
}

int run_compare(struct worker *plain, struct worker *other, const uint32_t *prompt, uint32_t n_prompt,
                const struct run_options *options)
{
    struct comparison c = {.first_parted = UINT32_MAX};
    struct result result;
    int r = result_init(prompt, n_prompt, options->n_predict, &result);

    if (r == 0 && reuse_match(plain->reuse, prompt, n_prompt) != KVD_OK)
        r = -EIO;
    if (r == 0 && plain->reuse->n_matched == 0) {
        snprintf(plain->error, sizeof(plain->error), "nothing of this prompt is cached: generate from it first");
        r = -ENODATA;
    }
    if (r == 0 && (r = worker_begin(plain, options->n_predict)) == 0)
        r = worker_begin(other, options->n_predict);
    if (r == 0)
        r = compare(plain, other, &result, options, &c);
    if (r == 0)
        printf("{\"compare\":\"%s\",\"prompt_tokens\":%u,\"reused_tokens\":%u,\"steps\":%u,\"same_top\":%u,\"first_parted\":%d,"
               "\"kl_mean\":%.4g,\"kl_max\":%.4g,\"kl_parted\":%.4g,\"attend_requests\":%llu,\"attend_fallbacks\":%llu}\n",
               run_form_name(other->form), n_prompt, other->attention.n_prefix, c.n, c.n_same,
               c.n_same < c.n ? (int)c.first_parted : -1, c.kl_sum / c.n, c.kl_max, c.kl_parted,
               (unsigned long long)other->attention.n_asked, (unsigned long long)other->attention.n_fallbacks);
    else if (!plain->error[0])
        snprintf(plain->error, sizeof(plain->error), "%.500s", other->error[0] ? other->error : plain->reuse->error);
    result_deinit(&result);
    return r;
}
