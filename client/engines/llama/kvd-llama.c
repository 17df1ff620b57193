/* kvd-llama: a worker on libllama that shares its prefixes through kvd; also measures what a codec costs a model. */
#include <errno.h>
#include <getopt.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "common.h"
#include "engine.h"
#include "fidelity.h"
#include "generate.h"
#include "report.h"
#include "sharing.h"

/* Context beyond the prompt and what is generated, so that runs with questions of different lengths have caches of one
 * size. */
#define CONTEXT_GRAIN 1024u

struct options {
    const char *model_path, *prompt_path, *question, *revision;
    struct sharing_options sharing;
    struct report_options report;
    uint32_t n_predict, n_context, n_prompt_max;
    int n_threads;
    bool use_kvd, json, cache_f32, socket_given, fidelity;
};

static const char help[] =
    "usage: kvd-llama --model FILE --prompt-file FILE [--question TEXT] [OPTION...]\n"
    "       kvd-llama --model FILE --fidelity [OPTION...] TEXT...\n"
    "\n"
    "Generates greedily from a prompt; what kvd has of the prompt's K and V is not computed again.\n"
    "\n"
    "  --model FILE          GGUF\n"
    "  --prompt-file FILE    the prompt; - is standard input\n"
    "  --prompt-tokens N     only the first N tokens of it\n"
    "  --question TEXT       comes after the prompt; tokenized by itself, so that prompts share\n"
    "  --n-predict N         tokens to generate (32)\n"
    "  --context N           tokens that the context holds (what is needed)\n"
    "  --threads N           (all processors)\n"
    "  --cache-f32           K and V in fp32 instead of fp16\n"
    "  --json                one line of JSON instead of text\n"
    "\n"
    "  --socket PATH         of the daemon ($KVD_SOCKET, else /run/kvd/kvd.sock)\n"
    "  --no-kvd              compute everything\n"
    "  --block N             tokens a block (64)\n"
    "  --codec-k, --codec-v, --codec-first SPEC\n"
    "                        for K, for V, for both in the first block of a prompt (kc4, tq4, raw)\n"
    "  --exact               reuse only as much as keeps every bit equal to a run without kvd; the default\n"
    "                        if --codec-k and --codec-v are raw\n"
    "  --wait MSEC           for another worker that is computing the same prefix (30000); 0: compute it too\n"
    "  --verify              check the checksum of every block before it is used\n"
    "  --revision TEXT       what tells this model from others; without it, the file's SHA-256 is computed\n"
    "\n"
    "  --fidelity            next-token KL, top-1 agreement and perplexity ratio on the tail of each text, over a\n"
    "                        prefix that went through a codec, against the exact prefix; JSON lines. Use a model\n"
    "                        stored as F32 or F16: others round activations to 8 bits, which hides codec errors.\n"
    "                        With --socket the prefix goes through the daemon, with --codec-k, -v, -first\n"
    "  --codecs K/V[/FIRST],...  what to measure without --socket (all, next to fp8); - for no FIRST, and + for a\n"
    "                        comma of a codec's options\n"
    "  --prefix-tokens N     (1536)\n"
    "  --tail-tokens N       (512)\n";

enum {
    OPTION_MODEL = 256,
    OPTION_PROMPT,
    OPTION_PROMPT_TOKENS,
    OPTION_QUESTION,
    OPTION_N_PREDICT,
    OPTION_CONTEXT,
    OPTION_THREADS,
    OPTION_CACHE_F32,
    OPTION_JSON,
    OPTION_SOCKET,
    OPTION_NO_KVD,
    OPTION_BLOCK,
    OPTION_CODEC_K,
    OPTION_CODEC_V,
    OPTION_CODEC_FIRST,
    OPTION_EXACT,
    OPTION_VERIFY,
    OPTION_WAIT,
    OPTION_REVISION,
    OPTION_FIDELITY,
    OPTION_CODECS,
    OPTION_PREFIX,
    OPTION_TAIL,
    OPTION_HELP
};

static const struct option long_options[] = {
    {"model", required_argument, NULL, OPTION_MODEL},
    {"prompt-file", required_argument, NULL, OPTION_PROMPT},
    {"prompt-tokens", required_argument, NULL, OPTION_PROMPT_TOKENS},
    {"question", required_argument, NULL, OPTION_QUESTION},
    {"n-predict", required_argument, NULL, OPTION_N_PREDICT},
    {"context", required_argument, NULL, OPTION_CONTEXT},
    {"threads", required_argument, NULL, OPTION_THREADS},
    {"cache-f32", no_argument, NULL, OPTION_CACHE_F32},
    {"json", no_argument, NULL, OPTION_JSON},
    {"socket", required_argument, NULL, OPTION_SOCKET},
    {"no-kvd", no_argument, NULL, OPTION_NO_KVD},
    {"block", required_argument, NULL, OPTION_BLOCK},
    {"codec-k", required_argument, NULL, OPTION_CODEC_K},
    {"codec-v", required_argument, NULL, OPTION_CODEC_V},
    {"codec-first", required_argument, NULL, OPTION_CODEC_FIRST},
    {"exact", no_argument, NULL, OPTION_EXACT},
    {"wait", required_argument, NULL, OPTION_WAIT},
    {"verify", no_argument, NULL, OPTION_VERIFY},
    {"revision", required_argument, NULL, OPTION_REVISION},
    {"fidelity", no_argument, NULL, OPTION_FIDELITY},
    {"codecs", required_argument, NULL, OPTION_CODECS},
    {"prefix-tokens", required_argument, NULL, OPTION_PREFIX},
    {"tail-tokens", required_argument, NULL, OPTION_TAIL},
    {"help", no_argument, NULL, OPTION_HELP},
    {NULL, 0, NULL, 0},
};

static int complain(const char *text)
{
    fprintf(stderr, "kvd-llama: %s\n", text);
    return 1;
}

static void number(const char *name, const char *text, uint32_t min, uint32_t max, uint32_t *ret)
{
    char *end;
    unsigned long long value;

    errno = 0;
    value = strtoull(text, &end, 10);
    if (errno || end == text || *end || *text == '-' || value < min || value > max) {
        fprintf(stderr, "kvd-llama: --%s %s: allowed are %u to %u\n", name, text, min, max);
        exit(2);
    }
    *ret = (uint32_t)value;
}

static void take_option(struct options *o, int option, const char *name)
{
    uint32_t n;

    switch (option) {
    case OPTION_MODEL:
        o->model_path = optarg;
        break;
    case OPTION_PROMPT:
        o->prompt_path = optarg;
        break;
    case OPTION_PROMPT_TOKENS:
        number(name, optarg, 1, 1 << 24, &o->n_prompt_max);
        break;
    case OPTION_QUESTION:
        o->question = optarg;
        break;
    case OPTION_N_PREDICT:
        number(name, optarg, 1, 1 << 20, &o->n_predict);
        break;
    case OPTION_CONTEXT:
        number(name, optarg, 1, 1 << 24, &o->n_context);
        break;
    case OPTION_THREADS:
        number(name, optarg, 1, 512, &n), o->n_threads = (int)n;
        break;
    case OPTION_CACHE_F32:
        o->cache_f32 = true;
        break;
    case OPTION_JSON:
        o->json = true;
        break;
    case OPTION_SOCKET:
        o->sharing.socket_path = optarg, o->socket_given = true;
        break;
    case OPTION_NO_KVD:
        o->use_kvd = false;
        break;
    case OPTION_BLOCK:
        number(name, optarg, 1, 512, &o->sharing.block_tokens);
        break;
    case OPTION_CODEC_K:
        o->sharing.codec_k = optarg;
        break;
    case OPTION_CODEC_V:
        o->sharing.codec_v = optarg;
        break;
    case OPTION_CODEC_FIRST:
        o->sharing.codec_first = optarg;
        break;
    case OPTION_EXACT:
        o->sharing.exact = true;
        break;
    case OPTION_WAIT:
        number(name, optarg, 0, 3600000, &o->sharing.wait_msec);
        break;
    case OPTION_VERIFY:
        o->sharing.verify = true;
        break;
    case OPTION_REVISION:
        o->revision = optarg;
        break;
    case OPTION_FIDELITY:
        o->fidelity = true;
        break;
    case OPTION_CODECS:
        o->report.codecs = optarg;
        break;
    case OPTION_PREFIX:
        number(name, optarg, 1, 1 << 20, &o->report.prefix_tokens);
        break;
    case OPTION_TAIL:
        number(name, optarg, 1, 1 << 16, &o->report.tail_tokens);
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
    o->report.texts = argv + optind;
    o->report.n_texts = (uint32_t)(argc - optind);
    if (!o->model_path || (o->fidelity ? o->report.n_texts == 0 : !o->prompt_path || o->report.n_texts > 0)) {
        fputs(help, stderr);
        exit(2);
    }
    if (o->sharing.codec_k && o->sharing.codec_v && strcmp(o->sharing.codec_k, "raw") == 0 &&
        strcmp(o->sharing.codec_v, "raw") == 0)
        o->sharing.exact = true;
    o->report.block_tokens = o->sharing.block_tokens;
    o->report.n_threads = o->n_threads;
}

/* ---- The model's identity ---------------------------------------------------------------------------------------- */

/* Attaches. A worker goes on without a cache that it cannot have: then the result is false, and sharing->error says
 * why. */
static bool share(const struct options *o, struct engine *engine, struct sharing *sharing)
{
    struct sharing_options options = o->sharing;
    const char *slash = strrchr(o->model_path, '/');
    char digest[65];

    options.model_name = slash ? slash + 1 : o->model_path;
    options.revision = o->revision ? o->revision : digest;
    if (!o->revision && common_digest_file(o->model_path, digest) < 0) {
        memset(sharing, 0, sizeof(*sharing));
        snprintf(sharing->error, sizeof(sharing->error), "%s: no SHA-256 of it: %s", o->model_path, strerror(errno));
        return false;
    }
    if (sharing_open(engine, &options, sharing) == 0)
        return true;
    sharing_close(sharing);
    return false;
}

/* ---- Generate ---------------------------------------------------------------------------------------------------- */

static int prompt_tokens(const struct options *o, struct engine *engine, uint32_t **ret, uint32_t *ret_n)
{
    size_t n_text;
    char *text = common_read_file(o->prompt_path, &n_text);
    uint32_t *prompt = NULL, *question = NULL, *all;
    int n_prompt, n_question = 0;

    if (!text) {
        snprintf(engine->error, sizeof(engine->error), "%s: %s", o->prompt_path, strerror(errno));
        return -EIO;
    }
    n_prompt = engine_tokenize(engine, text, n_text, true, &prompt);
    free(text);
    if (o->n_prompt_max > 0 && n_prompt > (int)o->n_prompt_max)
        n_prompt = (int)o->n_prompt_max;
    if (n_prompt >= 0 && o->question)
        n_question = engine_tokenize(engine, o->question, strlen(o->question), false, &question);
    if (n_prompt < 0 || n_question < 0) {
        free(prompt);
        return n_prompt < 0 ? n_prompt : n_question;
    }
    all = realloc(prompt, ((size_t)n_prompt + (size_t)n_question + 1) * sizeof(*all));
    if (all && n_question > 0)
        memcpy(all + n_prompt, question, (size_t)n_question * sizeof(*all));
    free(question);
    if (!all) {
        free(prompt);
        return -ENOMEM;
    }
    *ret = all;
    *ret_n = (uint32_t)n_prompt + (uint32_t)n_question;
    if (*ret_n == 0)
        snprintf(engine->error, sizeof(engine->error), "%s: an empty prompt", o->prompt_path);
    return *ret_n == 0 ? -EINVAL : 0;
}

static int run_generate(const struct options *o, struct engine *engine)
{
    struct generate_result result = {0};
    struct sharing sharing;
    uint32_t *tokens = NULL, n_tokens = 0, n_context;
    bool shared = false;
    int r = prompt_tokens(o, engine, &tokens, &n_tokens);

    if (r < 0)
        return r;
    n_context = (n_tokens + o->n_predict + CONTEXT_GRAIN - 1) / CONTEXT_GRAIN * CONTEXT_GRAIN;
    r = engine_start(engine, o->n_context ? o->n_context : n_context, o->n_threads, o->cache_f32);
    if (r >= 0) {
        shared = o->use_kvd && share(o, engine, &sharing);
        if (o->use_kvd && !shared)
            fprintf(stderr, "kvd-llama: going on without the cache: %s\n", sharing.error);
        r = generate(engine, shared ? &sharing : NULL, tokens, n_tokens, o->n_predict, &result);
    }
    if (r >= 0 && o->json)
        generate_print_json(stdout, &result, shared ? &sharing : NULL, o->use_kvd && !shared ? sharing.error : NULL);
    else if (r >= 0)
        generate_print_text(stdout, &result, shared ? &sharing : NULL);
    free(result.generated);
    free(result.text);
    free(tokens);
    if (shared)
        sharing_close(&sharing);
    return r;
}

static int run_fidelity(const struct options *o, struct engine *engine)
{
    struct sharing sharing;
    int r = engine_start(engine, o->report.prefix_tokens + o->report.tail_tokens + 1, o->n_threads, o->cache_f32);

    if (r < 0)
        return r;
    if (!o->socket_given)
        return report_fidelity(engine, NULL, &o->report);
    if (!share(o, engine, &sharing)) {
        snprintf(engine->error, sizeof(engine->error), "%.500s", sharing.error);
        return -EIO;
    }
    sharing.options.exact = false;
    r = report_fidelity(engine, &sharing, &o->report);
    sharing_close(&sharing);
    return r;
}

int main(int argc, char **argv)
{
    struct options o = {
        .sharing = {.block_tokens = 64, .wait_msec = 30000},
        .report = {.prefix_tokens = 1536, .tail_tokens = 512},
        .n_predict = 32,
        .n_threads = (int)sysconf(_SC_NPROCESSORS_ONLN),
        .use_kvd = true,
    };
    struct engine engine;
    int r;

    setvbuf(stdout, NULL, _IOLBF, 0);
    parse(argc, argv, &o);
    r = engine_open(o.model_path, o.sharing.block_tokens, &engine);
    if (r >= 0)
        r = o.fidelity ? run_fidelity(&o, &engine) : run_generate(&o, &engine);
    if (r < 0)
        complain(engine.error[0] ? engine.error : strerror(-r));
    engine_close(&engine);
    return r < 0;
}
