/* The configuration file: any text is either refused with a sentence, or becomes options that are within their own bounds, that
 * hold together, and that survive being written out and read again. */
#include <errno.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "daemon/options.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

/* A machine with two users and one group, the same wherever this runs. */
static int known_user(void *ctx, const char *name, uint32_t *ret_uid)
{
    (void)ctx;
    if (strcmp(name, "alice") != 0 && strcmp(name, "bob") != 0)
        return -ENOENT;
    *ret_uid = name[0] == 'a' ? 1000 : 1001;
    return 0;
}

static int known_group(void *ctx, const char *name, uint32_t *ret_gid)
{
    (void)ctx;
    if (strcmp(name, "research") != 0)
        return -ENOENT;
    *ret_gid = 2000;
    return 0;
}

static const struct id_resolver resolver = {.user = known_user, .group = known_group};

static void must(int holds, const char *what)
{
    if (!holds) {
        fprintf(stderr, "broken: %s\n", what);
        abort();
    }
}

/* Each option as text, set into fresh defaults, gives the same text. */
static void check_round_trip(const struct options *options)
{
    struct options again;
    struct option_error error;
    char text[OPTION_TEXT_MAX], back[OPTION_TEXT_MAX];

    if (options_init(&again) < 0)
        return;
    for (size_t i = 0; option_at(i); i++) {
        const struct option *o = option_at(i);

        option_format(options, o, text);
        must(option_set(&again, o, text, &resolver, &error) == 0, "what an option is written as is refused");
        option_format(&again, o, back);
        must(strcmp(text, back) == 0, "an option changes when it is written and read");
    }
    options_deinit(&again);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct options options;
    struct option_error error = {.text = ""};

    if (options_init(&options) < 0)
        return 0;
    int r = options_read_text(&options, "fuzz.conf", (const char *)data, size, &resolver, &error);
    if (r == 0) {
        check_round_trip(&options);
        error.text[0] = '\0';
        r = options_check(&options, &error);
    }
    if (r < 0 && r != -ENOMEM) {
        must(error.text[0] != '\0', "a refusal without a reason");
        must(memchr(error.text, '\0', sizeof(error.text)) != NULL, "a reason without an end");
    }
    options_deinit(&options);
    return 0;
}
