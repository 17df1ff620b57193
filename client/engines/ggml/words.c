#include "words.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* libllama is talkative; its errors are ours to tell. */
static void log_errors(enum ggml_log_level level, const char *text, void *ctx)
{
    (void)ctx;
    if (level == GGML_LOG_LEVEL_ERROR)
        fputs(text, stderr);
}

int words_open(const char *path, struct words *words)
{
    struct llama_model_params params = llama_model_default_params();

    params.vocab_only = true;
    llama_log_set(log_errors, NULL);
    llama_backend_init();
    words->model = llama_model_load_from_file(path, params);
    words->vocab = words->model ? llama_model_get_vocab(words->model) : NULL;
    return words->model ? 0 : -EIO;
}

void words_close(struct words *words)
{
    if (words->model)
        llama_model_free(words->model);
    memset(words, 0, sizeof(*words));
    llama_backend_free();
}

int words_tokenize(const struct words *words, const char *text, size_t n, bool is_start, uint32_t **ret)
{
    size_t room = n + 8; /* a token has at least a byte, but for the ones that libllama adds */
    uint32_t *tokens;
    int got;

    if (n > INT32_MAX - 8)
        return -E2BIG;
    tokens = malloc(room * sizeof(*tokens));
    if (!tokens)
        return -ENOMEM;
    got = llama_tokenize(words->vocab, text, (int32_t)n, (llama_token *)tokens, (int32_t)room, is_start, false);
    if (got < 0) {
        free(tokens);
        return -EIO;
    }
    *ret = tokens;
    return got;
}

size_t words_text(const struct words *words, uint32_t token, char *buffer, size_t size)
{
    int got = llama_token_to_piece(words->vocab, (llama_token)token, buffer, (int32_t)size, 0, false);

    return got > 0 ? (size_t)got : 0;
}

bool words_is_end(const struct words *words, uint32_t token)
{
    return llama_vocab_is_eog(words->vocab, (llama_token)token);
}
