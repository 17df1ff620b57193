#include "report.h"

#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common.h"
#include "fidelity.h"

/* With the default first: what the others are there to be compared with. */
static const char default_codecs[] = "kc4/tq4/raw,fp8/fp8,raw/raw,int8/int8,kc4/tq4/-,kc4/uq4/-,kc4:grid=e2m1/tq4/"
                                     "raw,kc4/tq3/raw,tq4/tq4,tq3/tq3,uq4:rule=even/uq4:rule=even,uq4/uq4";

/* What a codec is held against: as many errors as 8-bit floats make, which engines take for free. */
static const char reference_codec[] = "fp8";
#define ALLOWED_RATIO 1.2

struct total {
    double kl, kl_squares, kl_p99, top1, nll_ratio;
    uint32_t n;
};

/* "K/V/FIRST,..." FIRST: "-" or none for no codec of its own. */
static int parse_codecs(struct engine *engine, const char *text, struct fidelity_options *ret)
{
    while (*text) {
        struct fidelity_codec *codec = &ret->codecs[ret->n_codecs];
        int n = 0;

        if (ret->n_codecs == FIDELITY_MAX_CODECS) {
            snprintf(engine->error, sizeof(engine->error), "more than %d codecs", FIDELITY_MAX_CODECS);
            return -E2BIG;
        }
        memset(codec, 0, sizeof(*codec));
        if (sscanf(text, "%63[^/,]/%63[^/,]%n", codec->k, codec->v, &n) != 2 || n == 0) {
            snprintf(engine->error, sizeof(engine->error), "codecs \"%.100s\": K/V or K/V/FIRST is expected", text);
            return -EINVAL;
        }
        text += n;
        n = 0;
        if (*text == '/' && sscanf(text, "/%63[^/,]%n", codec->first, &n) == 1)
            text += n;
        if (strcmp(codec->first, "-") == 0)
            codec->first[0] = '\0';
        if (*text != '\0' && *text != ',') {
            snprintf(engine->error, sizeof(engine->error), "codecs: not understood from \"%.100s\"", text);
            return -EINVAL;
        }
        text += *text == ',';
        ret->n_codecs++;
    }
    return 0;
}

/* The options of a codec hold commas: in a list they are written with a +, "uq4:rule=even+rotate=off". */
static void restore_commas(struct fidelity_options *options)
{
    for (uint32_t i = 0; i < options->n_codecs; i++) {
        char *specs[] = {options->codecs[i].k, options->codecs[i].v, options->codecs[i].first};

        for (size_t s = 0; s < 3; s++)
            for (char *p = specs[s]; *p; p++)
                *p = *p == '+' ? ',' : *p;
    }
}

static void print_case(const struct fidelity_codec *codec)
{
    printf("{\"bench\":\"fidelity\",\"case\":\"%s/%s%s%s", codec->k, codec->v, codec->first[0] ? " first " : "",
           codec->first);
}

static void print_result(const struct fidelity_codec *codec, const char *path, const struct fidelity_result *result)
{
    print_case(codec);
    printf("\",\"text\":");
    common_print_json(stdout, path);
    printf(",\"kl\":%.6f,\"kl_se\":%.6f,\"kl_p99\":%.6f,\"top1\":%.4f,\"ppl_ratio\":%.5f,\"unit\":\"nats\"}\n",
           result->kl, result->kl_se, result->kl_p99, result->top1, result->ppl_ratio);
}

static void add(struct total *total, const struct fidelity_result *result)
{
    total->n++;
    total->kl += result->kl;
    total->kl_squares += result->kl * result->kl;
    total->kl_p99 += result->kl_p99;
    total->top1 += result->top1;
    total->nll_ratio += log(result->ppl_ratio);
}

static void print_totals(const struct fidelity_options *options, const struct total *totals)
{
    double reference = 0;

    for (uint32_t i = 0; i < options->n_codecs; i++)
        if (strcmp(options->codecs[i].k, reference_codec) == 0 && strcmp(options->codecs[i].v, reference_codec) == 0 &&
            totals[i].n > 0)
            reference = totals[i].kl / totals[i].n;
    for (uint32_t i = 0; i < options->n_codecs; i++) {
        const struct total *t = &totals[i];
        double n = t->n, mean = t->kl / n;

        if (t->n == 0)
            continue;
        print_case(&options->codecs[i]);
        printf("\",\"value\":%.6f,\"unit\":\"nats\"", mean);
        if (reference > 0)
            printf(",\"limit\":%.6f,\"ratio\":%.3f,\"limit_is\":\"mean next-token KL of %s on the same texts; the "
                   "default codec's is to be "
                   "at most %.1f times it\"",
                   reference, mean / reference, reference_codec, ALLOWED_RATIO);
        printf(",\"kl_se\":%.6f,\"kl_p99\":%.6f,\"top1\":%.4f,\"ppl_ratio\":%.5f,\"texts\":%u,\"prefix_tokens\":%u,"
               "\"tail_tokens\":%u}\n",
               t->n > 1 ? sqrt(fmax(0, t->kl_squares / n - mean * mean) / (n - 1)) : 0, t->kl_p99 / n, t->top1 / n,
               exp(t->nll_ratio / n), t->n, options->prefix_tokens, options->tail_tokens);
    }
}

/* The tokens of a text that is long enough; 0 if it is not. */
static int text_tokens(struct engine *engine, const char *path, uint32_t n_wanted, uint32_t **ret)
{
    size_t n_text;
    char *text = common_read_file(path, &n_text);
    int n;

    if (!text) {
        snprintf(engine->error, sizeof(engine->error), "%s: %s", path, strerror(errno));
        return -EIO;
    }
    n = engine_tokenize(engine, text, n_text, true, ret);
    free(text);
    if (n >= 0 && (uint32_t)n < n_wanted) {
        fprintf(stderr, "kvd-llama: %s has only %d tokens of %u: passed over\n", path, n, n_wanted);
        free(*ret);
        *ret = NULL;
        return 0;
    }
    return n;
}

static int measure_text(struct fidelity *fidelity, struct sharing *sharing, const struct fidelity_options *options,
                        const uint32_t *tokens, const char *path, struct total *totals)
{
    int r = fidelity_begin(fidelity, tokens);

    for (uint32_t i = 0; i < options->n_codecs && r >= 0; i++) {
        struct fidelity_result result;

        r = sharing ? fidelity_measure_shared(fidelity, sharing, &result)
                    : fidelity_measure(fidelity, &options->codecs[i], &result);
        if (r < 0)
            break;
        print_result(&options->codecs[i], path, &result);
        add(&totals[i], &result);
    }
    return r;
}

/* The codecs of the space, for the lines that are printed. */
static void name_shared(const struct sharing *sharing, struct fidelity_options *options)
{
    const struct sharing_options *o = &sharing->options;
    struct fidelity_codec *codec = &options->codecs[0];

    snprintf(codec->k, sizeof(codec->k), "%s", o->codec_k ? o->codec_k : "kc4");
    snprintf(codec->v, sizeof(codec->v), "%s", o->codec_v ? o->codec_v : "tq4");
    snprintf(codec->first, sizeof(codec->first), "%s", o->codec_first ? o->codec_first : "raw");
    options->n_codecs = 1;
}

int report_fidelity(struct engine *engine, struct sharing *sharing, const struct report_options *report)
{
    struct fidelity_options options = {
        .prefix_tokens = report->prefix_tokens,
        .tail_tokens = report->tail_tokens,
        .block_tokens = report->block_tokens,
        .n_threads = report->n_threads,
    };
    struct total totals[FIDELITY_MAX_CODECS] = {0};
    struct fidelity *fidelity;
    int r = 0;

    if (sharing) {
        name_shared(sharing, &options);
        if (options.prefix_tokens % options.block_tokens != 0) {
            snprintf(engine->error, sizeof(engine->error),
                     "a prefix of %u tokens; through the daemon it is whole blocks of %u", options.prefix_tokens,
                     options.block_tokens);
            return -EINVAL;
        }
    } else {
        r = parse_codecs(engine, report->codecs ? report->codecs : default_codecs, &options);
        restore_commas(&options);
    }
    if (r < 0)
        return r;
    fidelity = fidelity_create(engine, &options);
    if (!fidelity)
        return -ENOMEM;
    for (uint32_t i = 0; i < report->n_texts && r >= 0; i++) {
        uint32_t *tokens = NULL;

        r = text_tokens(engine, report->texts[i], options.prefix_tokens + options.tail_tokens + 1, &tokens);
        if (r > 0)
            r = measure_text(fidelity, sharing, &options, tokens, report->texts[i], totals);
        free(tokens);
    }
    if (r >= 0)
        print_totals(&options, totals);
    fidelity_destroy(fidelity);
    return r < 0 ? r : 0;
}
