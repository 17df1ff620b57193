/* Text to tokens and back, by libllama's vocabulary of the same file; nothing else of libllama is used. */
#ifndef KVD_GGML_WORDS_H
#define KVD_GGML_WORDS_H

#include <llama.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct words {
    struct llama_model *model; /* its vocabulary only */
    const struct llama_vocab *vocab;
};

/* Returns 0 or a negative errno. To be freed with words_close(). */
int words_open(const char *path, struct words *words);
void words_close(struct words *words);

/* is_start: with the model's token for the beginning of a text. *ret is to be freed with free(). Returns how many, or a negative errno. */
int words_tokenize(const struct words *words, const char *text, size_t n, bool is_start, uint32_t **ret);
/* Writes a token's text, not terminated, to buffer. Returns how many bytes; 0 if they do not fit. */
size_t words_text(const struct words *words, uint32_t token, char *buffer, size_t size);
/* The model says that its answer ends here. */
bool words_is_end(const struct words *words, uint32_t token);

#endif
