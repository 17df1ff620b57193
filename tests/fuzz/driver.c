/*
 * Drives a fuzz target without libFuzzer: replays files, then mutates them a little.
 *
 * In a fuzz build libFuzzer brings its own main(); in every other build a target is linked with this file, so that
 * `make check` runs each input that was ever kept (under whatever sanitizer the build has), with any compiler.
 *
 *     fuzz_NAME [-n MUTATIONS] [-s SEED] [FILE|FOLDER...]
 *
 * Without a path the corpus is $KVD_SRCDIR/tests/fuzz/corpus/NAME; an empty or missing one is a failure, because a
 * replay of nothing passes whatever the target does. Mutations are derived from the printed seed.
 */
#include <dirent.h>
#include <errno.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

enum { INPUT_MAX_BYTES = 1 << 20, MUTATIONS_DEFAULT = 64 };

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

/* A target may define it, as libFuzzer allows. */
__attribute__((weak)) int LLVMFuzzerInitialize(int *argc, char ***argv);

struct driver {
    uint64_t rng;
    unsigned n_mutations;
    size_t n_files;
    size_t n_runs;
};

static uint64_t rng_next(uint64_t *state)
{
    /* splitmix64: any seed, zero included, is a good one. */
    uint64_t z = (*state += UINT64_C(0x9e3779b97f4a7c15));
    z = (z ^ (z >> 30)) * UINT64_C(0xbf58476d1ce4e5b9);
    z = (z ^ (z >> 27)) * UINT64_C(0x94d049bb133111eb);
    return z ^ (z >> 31);
}

/* Hand over an exact-size heap copy, so that AddressSanitizer sees a read of one byte too many. */
static void run_one(struct driver *d, const uint8_t *data, size_t size)
{
    uint8_t *copy = malloc(size ? size : 1);
    if (!copy)
        abort();
    if (size > 0)
        memcpy(copy, data, size);
    LLVMFuzzerTestOneInput(copy, size);
    free(copy);
    d->n_runs++;
}

/* Change `data` in place; returns the new size, never more than `size`. */
static size_t mutate(struct driver *d, uint8_t *data, size_t size)
{
    static const uint8_t edges[] = {0x00, 0x01, 0x7f, 0x80, 0xff};
    unsigned n_changes = 1 + rng_next(&d->rng) % 4;

    for (unsigned i = 0; i < n_changes && size > 0; i++) {
        size_t at = rng_next(&d->rng) % size;
        switch (rng_next(&d->rng) % 4) {
        case 0:
            data[at] ^= (uint8_t)(1u << (rng_next(&d->rng) % 8));
            break;
        case 1:
            data[at] = edges[rng_next(&d->rng) % sizeof(edges)];
            break;
        case 2:
            size = at;
            break;
        default: {
            size_t from = rng_next(&d->rng) % size;
            size_t n = size - (at > from ? at : from);
            memmove(data + at, data + from, n < 16 ? n : 16);
            break;
        }
        }
    }
    return size;
}

static int replay_file(struct driver *d, const char *path)
{
    uint8_t *data, *changed;
    FILE *f = fopen(path, "rb");
    int r = 0;

    if (!f) {
        r = -errno;
        fprintf(stderr, "%s: %s\n", path, strerror(errno));
        return r;
    }
    data = malloc(INPUT_MAX_BYTES);
    changed = malloc(INPUT_MAX_BYTES);
    if (!data || !changed) {
        r = -ENOMEM;
        goto out;
    }
    size_t size = fread(data, 1, INPUT_MAX_BYTES, f);
    if (!feof(f)) {
        if (fgetc(f) != EOF) {
            fprintf(stderr, "%s: larger than %d bytes\n", path, INPUT_MAX_BYTES);
            r = -EFBIG;
            goto out;
        }
    }
    d->n_files++;
    run_one(d, data, size);
    for (unsigned i = 0; i < d->n_mutations && size > 0; i++) {
        memcpy(changed, data, size);
        run_one(d, changed, mutate(d, changed, size));
    }
out:
    free(changed);
    free(data);
    fclose(f);
    return r;
}

static int replay_folder(struct driver *d, const char *path)
{
    struct dirent **entries;
    int r = 0;
    int n = scandir(path, &entries, NULL, alphasort); /* sorted, so that a seed means the same everywhere */

    if (n < 0) {
        r = -errno;
        fprintf(stderr, "%s: %s\n", path, strerror(errno));
        return r;
    }
    for (int i = 0; i < n; i++) {
        char *file;
        if (r == 0 && entries[i]->d_name[0] != '.') {
            if (asprintf(&file, "%s/%s", path, entries[i]->d_name) < 0)
                abort();
            r = replay_file(d, file);
            free(file);
        }
        free(entries[i]);
    }
    free(entries);
    return r;
}

static int replay_path(struct driver *d, const char *path)
{
    struct stat st;

    if (stat(path, &st) < 0) {
        fprintf(stderr, "%s: %s\n", path, strerror(errno));
        return -errno;
    }
    return S_ISDIR(st.st_mode) ? replay_folder(d, path) : replay_file(d, path);
}

/* The corpus that belongs to the program's name: [lt-]fuzz_NAME. Returns an allocated path. */
static char *corpus_path(const char *argv0)
{
    const char *srcdir = getenv("KVD_SRCDIR");
    const char *name = strrchr(argv0, '/');
    char *path;

    name = name ? name + 1 : argv0;
    if (strncmp(name, "lt-", 3) == 0)
        name += 3;
    if (strncmp(name, "fuzz_", 5) == 0)
        name += 5;
    if (asprintf(&path, "%s/tests/fuzz/corpus/%s", srcdir ? srcdir : ".", name) < 0)
        abort();
    return path;
}

static bool parse_number(const char *text, uint64_t *ret)
{
    char *end;
    errno = 0;
    unsigned long long v = strtoull(text, &end, 0);
    if (errno != 0 || end == text || *end != '\0')
        return false;
    *ret = v;
    return true;
}

int main(int argc, char **argv)
{
    struct driver d = {.n_mutations = MUTATIONS_DEFAULT};
    uint64_t seed = 1, n = MUTATIONS_DEFAULT;
    int i = 1, r = 0;

    if (LLVMFuzzerInitialize)
        LLVMFuzzerInitialize(&argc, &argv);
    for (; i + 1 < argc && argv[i][0] == '-'; i += 2) {
        uint64_t *to = strcmp(argv[i], "-n") == 0 ? &n : strcmp(argv[i], "-s") == 0 ? &seed : NULL;
        if (!to || !parse_number(argv[i + 1], to) || n > UINT32_MAX) {
            fprintf(stderr, "usage: %s [-n MUTATIONS] [-s SEED] [FILE|FOLDER...]\n", argv[0]);
            return 2;
        }
    }
    d.rng = seed;
    d.n_mutations = (unsigned)n;

    if (i == argc) {
        char *path = corpus_path(argv[0]);
        r = replay_path(&d, path);
        free(path);
    }
    for (; i < argc && r == 0; i++)
        r = replay_path(&d, argv[i]);
    if (r < 0)
        return 1;
    printf("%s: %zu files, %zu runs, seed %llu\n", argv[0], d.n_files, d.n_runs, (unsigned long long)seed);
    if (d.n_files == 0) {
        fprintf(stderr, "the corpus is empty\n");
        return 1;
    }
    return 0;
}
