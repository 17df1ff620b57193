/* kvd-ggml: a worker on libggml whose attention over a shared prefix is kvd's: the prefix is never fetched. */
#include <errno.h>
#include <getopt.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "common.h"
#include "run.h"

struct options {
    const char *model_path, *prompt_path, *question, *revision;
    struct reuse_options reuse;
    struct run_options run;
    enum attention_form form, compare;
    uint32_t n_prompt_max;
    bool use_kvd, is_comparison;
};

static const char help[] =
    "usage: kvd-ggml --model FILE --prompt-file FILE [--question TEXT] [OPTION...]\n"
    "\n"
    "Generates greedily from a prompt. What kvd has of the prompt's K and V is neither computed again nor, unless\n"
    "it is told so, fetched: kvd attends to it.\n"
    "\n"
    "  --model FILE          GGUF, of the Gemma 3 family\n"
    "  --prompt-file FILE    the prompt; - is standard input\n"
    "  --prompt-tokens N     only the first N tokens of it\n"
    "  --question TEXT       comes after the prompt; tokenized by itself, so that prompts share\n"
    "  --n-predict N         tokens to generate (32)\n"
    "  --threads N           (all processors)\n"
    "  --json                one line of JSON instead of text\n"
    "\n"
    "  --attend FORM         attention over the cached prefix:\n"
    "                          plain   here, over what was decoded into this process\n"
    "                          local   here, over the cache's blocks as they are\n"
    "                          daemon  by the daemon, together with other workers' requests\n"
    "                          auto    what libkvd finds cheapest for each layer (the default)\n"
    "  --compare FORM        go on in the plain form and, with the same tokens, in this one: a line of JSON that says\n"
    "                        how far the next-token distributions are apart. The prompt must be in the cache\n"
    "\n"
    "  --socket PATH         of the daemon ($KVD_SOCKET, else /run/kvd/kvd.sock)\n"
    "  --no-kvd              compute everything\n"
    "  --block N             tokens a block (64)\n"
    "  --codec-k, --codec-v, --codec-first SPEC\n"
    "                        for K, for V, for both in the first block of a prompt (kc4, tq4, raw)\n"
    "  --wait MSEC           for another worker that is computing the same prefix (30000); 0: compute it too\n"
    "  --revision TEXT       what tells this model from others; without it, the file's SHA-256 is computed\n";

enum {
    OPTION_MODEL = 256,
    OPTION_PROMPT,
    OPTION_PROMPT_TOKENS,
    OPTION_QUESTION,
    OPTION_N_PREDICT,
    OPTION_THREADS,
    OPTION_JSON,
    OPTION_ATTEND,
    OPTION_COMPARE,
    OPTION_SOCKET,
    OPTION_NO_KVD,
    OPTION_BLOCK,
    OPTION_CODEC_K,
    OPTION_CODEC_V,
    OPTION_CODEC_FIRST,
    OPTION_WAIT,
    OPTION_REVISION,
    OPTION_HELP
};

static const struct option long_options[] = {
    {"model", required_argument, NULL, OPTION_MODEL},
    {"prompt-file", required_argument, NULL, OPTION_PROMPT},
    {"prompt-tokens", required_argument, NULL, OPTION_PROMPT_TOKENS},
    {"question", required_argument, NULL, OPTION_QUESTION},
    {"n-predict", required_argument, NULL, OPTION_N_PREDICT},
    {"threads", required_argument, NULL, OPTION_THREADS},
    {"json", no_argument, NULL, OPTION_JSON},
    {"attend", required_argument, NULL, OPTION_ATTEND},
    {"compare", required_argument, NULL, OPTION_COMPARE},
    {"socket", required_argument, NULL, OPTION_SOCKET},
    {"no-kvd", no_argument, NULL, OPTION_NO_KVD},
    {"block", required_argument, NULL, OPTION_BLOCK},
    {"codec-k", required_argument, NULL, OPTION_CODEC_K},
    {"codec-v", required_argument, NULL, OPTION_CODEC_V},
    {"codec-first", required_argument, NULL, OPTION_CODEC_FIRST},
    {"wait", required_argument, NULL, OPTION_WAIT},
    {"revision", required_argument, NULL, OPTION_REVISION},
    {"help", no_argument, NULL, OPTION_HELP},
    {NULL, 0, NULL, 0},
};

static uint32_t number(const char *name, const char *text, uint32_t min, uint32_t max)
{
    char *end;
    unsigned long long value;

    errno = 0;
    value = strtoull(text, &end, 10);
    if (errno || end == text || *end || *text == '-' || value < min || value > max) {
        fprintf(stderr, "kvd-ggml: --%s %s: allowed are %u to %u\n", name, text, min, max);
        exit(2);
    }
    return (uint32_t)value;
}

static enum attention_form form(const char *name, const char *text)
{
    for (enum attention_form f = ATTENTION_PLAIN; run_form_name(f); f++)
        if (strcmp(run_form_name(f), text) == 0)
            return f;
    fprintf(stderr, "kvd-ggml: --%s %s: allowed are plain, local, daemon, auto\n", name, text);
    exit(2);
}

static void take_option(struct options *o, int option, const char *name)
{
    switch (option) {
    case OPTION_MODEL:
        o->model_path = optarg;
        break;
    case OPTION_PROMPT:
        o->prompt_path = optarg;
        break;
    case OPTION_PROMPT_TOKENS:
        o->n_prompt_max = number(name, optarg, 1, 1 << 24);
        break;
    case OPTION_QUESTION:
        o->question = optarg;
        break;
    case OPTION_N_PREDICT:
        o->run.n_predict = number(name, optarg, 1, 1 << 20);
        break;
    case OPTION_THREADS:
        o->run.n_threads = (int)number(name, optarg, 1, 512);
        break;
    case OPTION_JSON:
        o->run.json = true;
        break;
    case OPTION_ATTEND:
        o->form = form(name, optarg);
        break;
    case OPTION_COMPARE:
        o->compare = form(name, optarg), o->is_comparison = true;
        break;
    case OPTION_SOCKET:
        o->reuse.socket_path = optarg;
        break;
    case OPTION_NO_KVD:
        o->use_kvd = false;
        break;
    case OPTION_BLOCK:
        o->reuse.block_tokens = number(name, optarg, 1, 512);
        break;
    case OPTION_CODEC_K:
        o->reuse.codec_k = optarg;
        break;
    case OPTION_CODEC_V:
        o->reuse.codec_v = optarg;
        break;
    case OPTION_CODEC_FIRST:
        o->reuse.codec_first = optarg;
        break;
    case OPTION_WAIT:
        o->reuse.wait_msec = number(name, optarg, 0, 3600000);
        break;
    case OPTION_REVISION:
        o->revision = optarg;
        break;
    case OPTION_HELP:
        fputs(help, stdout);
        exit(0);
    default:
        fputs(help, stderr);
        exit(2);
    }
}

static void parse(int argc, char **argv, struct options *o)
{
    int option, index = 0;

    while ((option = getopt_long(argc, argv, "", long_options, &index)) != -1)
        take_option(o, option, long_options[index].name);
    if (!o->model_path || !o->prompt_path || optind < argc || (o->is_comparison && !o->use_kvd)) {
        fputs(help, stderr);
        exit(2);
    }
}

static int complain(const char *what, const char *text)
{
    fprintf(stderr, "kvd-ggml: %s%s%s\n", what, what[0] ? ": " : "", text);
    return -1;
}

/* Appends a text's tokens, the first n_max of them, to *tokens. */
static int append(const struct words *words, const char *text, size_t n_text, bool is_start, uint32_t n_max, uint32_t **tokens,
                  uint32_t *n_tokens)
{
    uint32_t *more = NULL, *all;
    int n = words_tokenize(words, text, n_text, is_start, &more);

    if (n < 0)
        return complain("a text that libllama cannot tokenize", strerror(-n));
    n = (uint32_t)n > n_max ? (int)n_max : n;
    all = realloc(*tokens, (*n_tokens + (size_t)n + 1) * sizeof(*all));
    if (all) {
        memcpy(all + *n_tokens, more, (size_t)n * sizeof(*all));
        *tokens = all;
        *n_tokens += (uint32_t)n;
    }
    free(more);
    return all ? 0 : complain("a prompt", strerror(ENOMEM));
}

/* *tokens is to be freed also after a failure. */
static int read_prompt(const struct options *o, const struct words *words, uint32_t **tokens, uint32_t *n_tokens)
{
    size_t n_text;
    char *text = common_read_file(o->prompt_path, &n_text);
    int r;

    if (!text)
        return complain(o->prompt_path, strerror(errno));
    r = append(words, text, n_text, true, o->n_prompt_max ? o->n_prompt_max : UINT32_MAX, tokens, n_tokens);
    free(text);
    if (r == 0 && o->question)
        r = append(words, o->question, strlen(o->question), false, UINT32_MAX, tokens, n_tokens);
    if (r == 0 && *n_tokens == 0)
        r = complain(o->prompt_path, "an empty prompt");
    return r;
}

/* Attaches. A worker goes on without a cache that it cannot have: then the result is false, and reuse->error says why. */
static bool share(const struct options *o, const struct gemma *model, uint32_t n_context, struct reuse *reuse)
{
    struct reuse_options options = o->reuse;
    const char *slash = strrchr(o->model_path, '/');
    char digest[65];

    memset(reuse, 0, sizeof(*reuse));
    options.model_name = slash ? slash + 1 : o->model_path;
    options.revision = o->revision ? o->revision : digest;
    if (!o->revision && common_digest_file(o->model_path, digest) < 0) {
        snprintf(reuse->error, sizeof(reuse->error), "%s: no SHA-256 of it: %s", o->model_path, strerror(errno));
        return false;
    }
    if (reuse_open(model, &options, n_context, reuse) == KVD_OK)
        return true;
    reuse_close(reuse);
    return false;
}

/* With a second worker for a comparison. */
static int run(const struct options *o, const struct gemma *model, const struct words *words, struct reuse *reuse,
               const char *reuse_error, const uint32_t *prompt, uint32_t n_prompt)
{
    enum attention_form first = o->is_comparison ? ATTENTION_PLAIN : o->form;
    struct worker worker, other = {0};
    int r = worker_open(model, reuse, o->reuse.block_tokens, first, o->run.n_threads, &worker);

    if (r == 0 && o->is_comparison)
        r = worker_open(model, reuse, o->reuse.block_tokens, o->compare, o->run.n_threads, &other);
    if (r == 0)
        r = o->is_comparison ? run_compare(&worker, &other, prompt, n_prompt, &o->run)
                             : run_generate(&worker, words, prompt, n_prompt, &o->run, reuse_error);
    if (r < 0)
        complain("", worker.error[0] ? worker.error : strerror(-r));
    worker_close(&other);
    worker_close(&worker);
    return r;
}

static int run_on(const struct options *o, const struct gemma *model, const struct words *words)
{
    uint32_t *tokens = NULL, n_tokens = 0;
    struct reuse reuse;
    bool shared = false;
    int r = read_prompt(o, words, &tokens, &n_tokens);

    if (r == 0 && n_tokens + (uint64_t)o->run.n_predict > model->n_context)
        r = complain("", "the prompt and what is to be generated are longer than the model's context");
    if (r == 0 && o->use_kvd) {
        shared = share(o, model, n_tokens + o->run.n_predict, &reuse);
        if (!shared)
            r = complain(o->is_comparison ? "no comparison without the cache" : "going on without the cache", reuse.error);
        if (!o->is_comparison)
            r = 0;
    }
    if (r == 0)
        r = run(o, model, words, shared ? &reuse : NULL, o->use_kvd && !shared ? reuse.error : NULL, tokens, n_tokens);
    if (shared)
        reuse_close(&reuse);
    free(tokens);
    return r;
}

int main(int argc, char **argv)
{
    struct options o = {
        .reuse = {.block_tokens = 64, .wait_msec = 30000},
        .run = {.n_predict = 32, .n_threads = (int)sysconf(_SC_NPROCESSORS_ONLN)},
        .form = ATTENTION_AUTO,
        .use_kvd = true,
    };
    struct gemma model;
    struct words words = {0};
    int r;

    parse(argc, argv, &o);
    r = gemma_open(o.model_path, &model);
    if (r < 0)
        complain(o.model_path, model.error);
    else if ((r = words_open(o.model_path, &words)) < 0)
        complain(o.model_path, "libllama does not load its vocabulary");
    else
        r = run_on(&o, &model, &words);
    words_close(&words);
    gemma_close(&model);
    return r < 0;
}
