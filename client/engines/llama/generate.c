#include "generate.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "common.h"

#define TEXT_BYTES_PER_TOKEN 64

static double now_msec(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec * 1e3 + (double)t.tv_nsec * 1e-6;
}

/* Greedy, from the logits of the last token that was computed. */
static int continue_greedily(struct engine *engine, uint32_t n_predict, double begun, struct generate_result *ret)
{
    size_t n_text = 0, text_size = (size_t)n_predict * TEXT_BYTES_PER_TOKEN + 1;
    uint32_t at = ret->n_prompt;
    int r = 0;

    for (uint32_t i = 0; i < n_predict && r >= 0; i++) {
        uint32_t token = engine_best(engine);

        if (i == 0)
            ret->ttft_msec = now_msec() - begun;
        ret->generated[ret->n_generated++] = token;
        engine_append_text(engine, token, ret->text, text_size - 1, &n_text);
        if (llama_vocab_is_eog(engine->vocab, (llama_token)token) || i + 1 == n_predict)
            break;
        r = engine_compute_next(engine, token, at++);
    }
    ret->text[n_text] = '\0';
    return r;
}

int generate(struct engine *engine, struct sharing *sharing, const uint32_t *tokens, uint32_t n_tokens,
             uint32_t n_predict, struct generate_result *ret)
{
    double begun = now_msec(), restored;
    struct generate_result result = {.n_prompt = n_tokens};
    int r = -ENOMEM;

    result.generated = malloc((n_predict + 1) * sizeof(*result.generated));
    result.text = malloc((size_t)n_predict * TEXT_BYTES_PER_TOKEN + 1);
    if (result.generated && result.text) {
        result.n_reused = sharing ? sharing_restore(sharing, tokens, n_tokens) : 0;
        restored = now_msec();
        r = engine_compute(engine, tokens, result.n_reused, n_tokens, sharing ? sharing_publish : NULL, sharing);
        result.n_computed = n_tokens - result.n_reused;
        result.prefill_msec = now_msec() - restored;
        if (r >= 0)
            r = continue_greedily(engine, n_predict, begun, &result);
        result.total_msec = now_msec() - begun;
    }
    if (r < 0) {
        free(result.generated);
        free(result.text);
        return r;
    }
    *ret = result;
    return 0;
}

/* ---- Output -------------------------------------------------------------------------------------------------------
 * */

static void print_json_sharing(FILE *file, const struct sharing *sharing)
{
    const struct sharing_figures *f = &sharing->figures;

    fprintf(file,
            ",\"matched_tokens\":%u,\"match_ms\":%.3f,\"wait_ms\":%.3f,\"load_ms\":%.3f,\"put_ms\":%.3f,\"take_ms\":%."
            "3f,\"publish_ms\":"
            "%.3f",
            f->n_matched_tokens, f->match_msec, f->wait_msec, f->load_msec, f->put_msec, f->take_msec, f->publish_msec);
    fprintf(file,
            ",\"blocks_published\":%u,\"blocks_present\":%u,\"blocks_failed\":%u,\"block_bytes\":%llu,\"block_fp16_"
            "bytes\":%llu",
            f->n_published, f->n_present, f->n_failed, (unsigned long long)f->block_bytes,
            (unsigned long long)f->block_fp16_bytes);
}

void generate_print_json(FILE *file, const struct generate_result *result, const struct sharing *sharing,
                         const char *sharing_error)
{
    const char *error = sharing_error ? sharing_error : sharing && sharing->error[0] ? sharing->error : NULL;

    fprintf(file,
            "{\"ttft_ms\":%.3f,\"prefill_ms\":%.3f,\"total_ms\":%.3f,\"prompt_tokens\":%u,\"reused_tokens\":%u,"
            "\"computed_tokens\":%u",
            result->ttft_msec, result->prefill_msec, result->total_msec, result->n_prompt, result->n_reused,
            result->n_computed);
    fprintf(file, ",\"kvd\":%s", sharing ? "true" : "false");
    if (sharing)
        print_json_sharing(file, sharing);
    if (error) {
        fputs(",\"kvd_error\":", file);
        common_print_json(file, error);
    }
    fputs(",\"tokens\":[", file);
    for (uint32_t i = 0; i < result->n_generated; i++)
        fprintf(file, "%s%u", i ? "," : "", result->generated[i]);
    fputs("],\"text\":", file);
    common_print_json(file, result->text);
    fputs("}\n", file);
}

void generate_print_text(FILE *file, const struct generate_result *result, const struct sharing *sharing)
{
    fprintf(file, "%s\n\n", result->text);
    fprintf(file, "first token after %.0f ms; of %u prompt tokens %u came from the cache, %u were computed\n",
            result->ttft_msec, result->n_prompt, result->n_reused, result->n_computed);
    if (sharing)
        fprintf(file,
                "match %.2f ms, load %.1f ms, into the engine %.1f ms, publish %.1f ms; %u blocks published, %u there "
                "already, %u failed\n",
                sharing->figures.match_msec, sharing->figures.load_msec, sharing->figures.put_msec,
                sharing->figures.take_msec + sharing->figures.publish_msec, sharing->figures.n_published,
                sharing->figures.n_present, sharing->figures.n_failed);
    if (sharing && sharing->error[0])
        fprintf(file, "the cache failed: %s\n", sharing->error);
}
