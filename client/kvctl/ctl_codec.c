/* kvctl codec: list, encode, decode, error. A tensor is [tokens][heads][dim]; a codec works on one head of one run
 * of tokens. */
#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "ctl_text.h"
#include "kvctl.h"
#include "npy.h"

const struct ctl_opt codec_opts[] = {
    {"codec", 'c', "SPEC",
     "codec with options, as in kvctl codec list; error: several with commas between, or all (the default)"},
    {"v", 'v', NULL, "the numbers are V (else K: some codecs differ)"},
    {"shape", 'S', "T,H,D", "tokens, heads, dim of raw numbers; or T,D"},
    {"dtype", 'd', "TYPE", "f16, bf16 or f32: of raw numbers, and of what decode writes (f16)"},
    {"block", 'b', "TOKENS", "tokens of a run (64)"},
    {"format", 'f', "FORMAT", "kvd (the default) or uq-page"},
    {"json", 'j', NULL, "error, list: JSON"},
    {NULL, 0, NULL, NULL},
};
enum { OPT_CODEC, OPT_V, OPT_SHAPE, OPT_DTYPE, OPT_BLOCK, OPT_FORMAT, OPT_JSON };

struct tensor {
    size_t n_tokens, n_heads, dim;
    int n_dims; /* 2 or 3, as it came */
    enum kvd_dtype dtype;
    const uint8_t *data;
    uint8_t *file; /* owned */
};

static size_t dtype_bytes(enum kvd_dtype dtype)
{
    return dtype == KVD_F32 ? 4 : 2;
}

static bool parse_dtype(const char *text, enum kvd_dtype *ret)
{
    static const char *const names[] = {"f16", "bf16", "f32"};
    static const enum kvd_dtype types[] = {KVD_F16, KVD_BF16, KVD_F32};

    for (int i = 0; i < 3; i++)
        if (strcmp(text, names[i]) == 0) {
            *ret = types[i];
            return true;
        }
    return false;
}

static bool parse_shape(const char *text, struct tensor *t)
{
    size_t dims[3] = {0};
    int n = 0;

    for (const char *p = text;; p++) {
        char *end;
        unsigned long long value = strtoull(p, &end, 10);

        if (n == 3 || end == p || value == 0 || value > UINT32_MAX)
            return false;
        dims[n++] = (size_t)value;
        p = end;
        if (*p == '\0')
            break;
        if (*p != ',' && *p != 'x')
            return false;
    }
    if (n < 2)
        return false;
    t->n_dims = n;
    t->n_tokens = dims[0];
    t->n_heads = n == 3 ? dims[1] : 1;
    t->dim = dims[n - 1];
    return true;
}

/* Bytes that a tensor of t's shape takes; 0: more than memory. */
static size_t tensor_bytes(const struct tensor *t)
{
    size_t n = dtype_bytes(t->dtype);

    if (__builtin_mul_overflow(n, t->n_tokens, &n) || __builtin_mul_overflow(n, t->n_heads, &n) ||
        __builtin_mul_overflow(n, t->dim, &n))
        return 0;
    return n;
}

static int complain(const char *path, const char *what)
{
    fprintf(stderr, "kvctl: %s: %s\n", path, what);
    return EXIT_REFUSED;
}

static int read_file(const char *path, uint8_t **ret, size_t *ret_n)
{
    int fd = strcmp(path, "-") == 0 ? dup(STDIN_FILENO) : open(path, O_RDONLY | O_CLOEXEC);
    size_t n = 0, room = 1 << 20;
    uint8_t *data = malloc(room);
    ssize_t got = 0;

    while (fd >= 0 && data && (got = read(fd, data + n, room - n)) > 0) {
        n += (size_t)got;
        if (n == room) {
            uint8_t *grown = realloc(data, room *= 2);

            if (!grown)
                free(data);
            data = grown;
        }
    }
    if (fd < 0 || got < 0 || !data) {
        int r = complain(path, fd < 0 || got < 0 ? strerror(errno) : "no memory for it");

        free(data);
        if (fd >= 0)
            close(fd);
        return r;
    }
    close(fd);
    *ret = data;
    *ret_n = n;
    return EXIT_OK;
}

/* dtype and shape of a .npy file, checked against what the options say. */
static int adopt_npy(const char *path, const struct ctl_args *args, size_t n, struct tensor *t)
{
    struct npy npy;
    const char *wrong = npy_parse(t->file, n, &npy);

    if (wrong)
        return complain(path, wrong);
    if (strcmp(npy.descr, "<f4") == 0)
        t->dtype = KVD_F32;
    else if (strcmp(npy.descr, "<f2") == 0)
        t->dtype = KVD_F16;
    else if (npy.item_bytes == 2 && (npy.descr[1] == 'V' || npy.descr[1] == 'u') && args->set[OPT_DTYPE] &&
             strcmp(args->value[OPT_DTYPE], "bf16") == 0)
        t->dtype = KVD_BF16;
    else
        return complain(path, "its dtype is none of <f2 and <f4, nor two bytes with --dtype=bf16");
    if (npy.n_dims != 2 && npy.n_dims != 3)
        return complain(path, "it has neither 2 nor 3 dimensions: [tokens][heads][dim] or [tokens][dim]");
    t->n_dims = npy.n_dims;
    t->n_tokens = npy.shape[0];
    t->n_heads = npy.n_dims == 3 ? npy.shape[1] : 1;
    t->dim = npy.shape[npy.n_dims - 1];
    t->data = npy.data;
    return tensor_bytes(t) ? EXIT_OK : complain(path, "it has no numbers");
}

static int load_tensor(const char *path, const struct ctl_args *args, struct tensor *t)
{
    size_t n;
    int r;

    *t = (struct tensor){.dtype = KVD_F16};
    r = read_file(path, &t->file, &n);
    if (r != EXIT_OK)
        return r;
    if (n >= 6 && memcmp(t->file, "\x93NUMPY", 6) == 0)
        return adopt_npy(path, args, n, t);
    if (!args->set[OPT_SHAPE] || !args->set[OPT_DTYPE])
        return ctl_usage("%s is no .npy file: --shape and --dtype are needed", path);
    if (!parse_shape(args->value[OPT_SHAPE], t) || !parse_dtype(args->value[OPT_DTYPE], &t->dtype))
        return ctl_usage("--shape=%s --dtype=%s: a shape is T,H,D or T,D, a type f16, bf16 or f32",
                         args->value[OPT_SHAPE], args->value[OPT_DTYPE]);
    t->data = t->file;
    return n == tensor_bytes(t) && n ? EXIT_OK : complain(path, "it is not as long as --shape and --dtype say");
}

static void free_tensor(struct tensor *t)
{
    free(t->file);
    t->file = NULL;
}

/* One head of a run of tokens, contiguous. */
static void take_head(const struct tensor *t, size_t token, size_t n, size_t head, uint8_t *dst)
{
    size_t row = t->dim * dtype_bytes(t->dtype);

    for (size_t i = 0; i < n; i++)
        memcpy(dst + i * row, t->data + ((token + i) * t->n_heads + head) * row, row);
}

static int block_of(const struct ctl_args *args, size_t *ret)
{
    uint64_t value = 64;

    if (args->set[OPT_BLOCK] && (!text_parse_u64(args->value[OPT_BLOCK], &value) || value < 1 || value > 4096))
        return ctl_usage("--block=%s; allowed: 1 to 4096", args->value[OPT_BLOCK]);
    *ret = (size_t)value;
    return EXIT_OK;
}

static int codec_fail(int error)
{
    fprintf(stderr, "kvctl: %s: %s\n", kvd_strerror(error), kvd_message(NULL));
    return error == KVD_E_NOMEM ? EXIT_REFUSED : error == KVD_E_LAYOUT ? EXIT_USAGE : EXIT_REFUSED;
}

static int no_memory(void)
{
    fputs("kvctl: no memory\n", stderr);
    return EXIT_REFUSED;
}

static FILE *open_output(const char *path)
{
    FILE *f = strcmp(path, "-") == 0 ? stdout : fopen(path, "wbe");

    if (!f)
        complain(path, strerror(errno));
    return f;
}

static int close_output(FILE *f, const char *path)
{
    bool bad = ferror(f) != 0;

    if (f != stdout)
        bad |= fclose(f) != 0;
    else
        bad |= fflush(f) != 0;
    return bad ? complain(path, "writing failed") : EXIT_OK;
}

static bool is_npy_name(const char *path)
{
    size_t n = strlen(path);

    return n > 4 && strcmp(path + n - 4, ".npy") == 0;
}

/* ---- list ---- */

static int codec_list(const struct ctl_args *args)
{
    bool json = args->set[OPT_JSON];
    int n = 0;

    if (json)
        putchar('[');
    for (const char *const *name = kvd_codec_names(); *name; name++) {
        size_t bytes = 0;
        double bits = kvd_codec_bytes(*name, 0, 64, 128, &bytes, NULL) == KVD_OK ? (double)bytes * 8 / (64 * 128) : NAN;

        if (json) {
            fputs(n++ ? ",\n  {" : "\n  {", stdout);
            json_text(stdout, true, "codec", *name);
            json_double(stdout, false, "bits_per_value", bits);
            json_text(stdout, false, "help", kvd_codec_help(*name));
            putchar('}');
        } else {
            printf("%-5s %6.3f bits  %s\n", *name, bits, kvd_codec_help(*name));
        }
    }
    puts(json ? "\n]" : "(bits a number at 64 tokens of 128)");
    return EXIT_OK;
}

/* ---- encode, decode ---- */

static int encode_all(const struct tensor *t, const char *spec, int is_v, size_t block, FILE *f)
{
    size_t row = t->dim * dtype_bytes(t->dtype), most;
    uint8_t *head, *code;
    int r = kvd_codec_bytes(spec, is_v, block, t->dim, &most, NULL);

    if (r != KVD_OK)
        return codec_fail(r);
    head = malloc(block * row);
    code = malloc(most);
    r = head && code ? EXIT_OK : no_memory();
    for (size_t token = 0; token < t->n_tokens && r == EXIT_OK; token += block) {
        size_t n = t->n_tokens - token < block ? t->n_tokens - token : block, bytes = 0;

        for (size_t h = 0; h < t->n_heads && r == EXIT_OK; h++) {
            int e;

            take_head(t, token, n, h, head);
            e = kvd_codec_bytes(spec, is_v, n, t->dim, &bytes, NULL);
            if (e == KVD_OK)
                e = kvd_codec_encode(spec, is_v, t->dtype, head, n, t->dim, code);
            if (e != KVD_OK)
                r = codec_fail(e);
            else if (fwrite(code, 1, bytes, f) != bytes)
                break;
        }
    }
    free(head);
    free(code);
    return r;
}

static int codec_encode(const struct ctl_args *args)
{
    const char *spec = args->set[OPT_CODEC] ? args->value[OPT_CODEC] : args->set[OPT_V] ? "tq4" : "kc4";
    struct tensor t;
    size_t block;
    FILE *f;
    int r, closed;

    if (args->n_rest != 3)
        return ctl_usage("usage: kvctl codec encode [--codec=SPEC] [--v] IN OUT");
    r = block_of(args, &block);
    if (r != EXIT_OK)
        return r;
    r = load_tensor(args->rest[1], args, &t);
    f = r == EXIT_OK ? open_output(args->rest[2]) : NULL;
    if (f) {
        r = encode_all(&t, spec, args->set[OPT_V], block, f);
        closed = close_output(f, args->rest[2]);
        r = r == EXIT_OK ? closed : r;
    } else if (r == EXIT_OK) {
        r = EXIT_REFUSED;
    }
    free_tensor(&t);
    return r;
}

static int write_page(const struct tensor *k, const struct tensor *v, const char *spec, const char *path)
{
    size_t slot = 2 * (k->dim / 2 + k->dim / 32), row = k->dim * dtype_bytes(k->dtype);
    size_t shape[3] = {k->n_tokens, k->n_heads, slot};
    uint8_t *page = malloc(k->n_tokens * k->n_heads * slot), *rows = malloc(2 * row), *out = malloc(slot);
    FILE *f = page && rows && out ? open_output(path) : NULL;
    int r = f ? EXIT_OK : page && rows && out ? EXIT_REFUSED : no_memory(), closed;

    for (size_t t = 0; t < k->n_tokens && r == EXIT_OK; t++)
        for (size_t h = 0; h < k->n_heads && r == EXIT_OK; h++) {
            int e;

            take_head(k, t, 1, h, rows);
            take_head(v, t, 1, h, rows + row);
            e = kvd_codec_uq_page(spec, spec, k->dtype, rows, rows + row, 1, k->dim, out);
            if (e != KVD_OK)
                r = codec_fail(e);
            memcpy(page + (t * k->n_heads + h) * slot, out, slot);
        }
    if (f) {
        if (r == EXIT_OK && is_npy_name(path))
            npy_write_header(f, "|u1", shape, 3);
        if (r == EXIT_OK)
            fwrite(page, slot, k->n_tokens * k->n_heads, f);
        closed = close_output(f, path);
        r = r == EXIT_OK ? closed : r;
    }
    free(page);
    free(rows);
    free(out);
    return r;
}

static int codec_encode_page(const struct ctl_args *args)
{
    const char *spec = args->set[OPT_CODEC] ? args->value[OPT_CODEC] : "uq4";
    struct tensor k = {0}, v = {0};
    size_t bytes;
    int r;

    if (args->n_rest != 4)
        return ctl_usage("usage: kvctl codec encode --format=uq-page [--codec=uq4:…] K V OUT");
    r = load_tensor(args->rest[1], args, &k);
    if (r == EXIT_OK)
        r = load_tensor(args->rest[2], args, &v);
    if (r == EXIT_OK && (k.n_tokens != v.n_tokens || k.n_heads != v.n_heads || k.dim != v.dim || k.dtype != v.dtype))
        r = complain(args->rest[2], "it has another shape or type than K");
    if (r == EXIT_OK && (strncmp(spec, "uq4", 3) != 0 || kvd_codec_bytes(spec, 0, 1, k.dim, &bytes, NULL) != KVD_OK))
        r = complain(spec, "the page layout is of uq4, with a head size that it has");
    if (r == EXIT_OK)
        r = write_page(&k, &v, spec, args->rest[3]);
    free_tensor(&k);
    free_tensor(&v);
    return r;
}

/* Decodes what encode_all() wrote into [tokens][heads][dim]. */
static int decode_all(const uint8_t *code, size_t n_code, const struct tensor *t, const char *spec, int is_v,
                      size_t block, uint8_t *dst)
{
    size_t row = t->dim * dtype_bytes(t->dtype), at = 0;
    uint8_t *head = malloc(block * row);
    int r = head ? EXIT_OK : no_memory();

    for (size_t token = 0; token < t->n_tokens && r == EXIT_OK; token += block) {
        size_t n = t->n_tokens - token < block ? t->n_tokens - token : block, bytes = 0;

        for (size_t h = 0; h < t->n_heads && r == EXIT_OK; h++) {
            int e = kvd_codec_bytes(spec, is_v, n, t->dim, &bytes, NULL);

            if (e == KVD_OK && bytes > n_code - at)
                r = complain(spec, "the input is shorter than --shape, --block and the codec say");
            else if (e != KVD_OK || (e = kvd_codec_decode(spec, is_v, code + at, n, t->dim, t->dtype, head)) != KVD_OK)
                r = codec_fail(e);
            for (size_t i = 0; r == EXIT_OK && i < n; i++)
                memcpy(dst + ((token + i) * t->n_heads + h) * row, head + i * row, row);
            at += bytes;
        }
    }
    if (r == EXIT_OK && at != n_code)
        r = complain(spec, "the input is longer than --shape, --block and the codec say");
    free(head);
    return r;
}

static int write_tensor(const struct tensor *t, const uint8_t *data, const char *path)
{
    static const char *const descr[] = {[KVD_F16] = "<f2", [KVD_BF16] = "|V2", [KVD_F32] = "<f4"};
    size_t shape[3] = {t->n_tokens, t->n_dims == 3 ? t->n_heads : t->dim, t->dim};
    FILE *f = open_output(path);

    if (!f)
        return EXIT_REFUSED;
    if (is_npy_name(path))
        npy_write_header(f, descr[t->dtype], shape, t->n_dims);
    fwrite(data, 1, tensor_bytes(t), f);
    return close_output(f, path);
}

static int codec_decode(const struct ctl_args *args)
{
    const char *spec = args->set[OPT_CODEC] ? args->value[OPT_CODEC] : args->set[OPT_V] ? "tq4" : "kc4";
    struct tensor t = {.dtype = KVD_F16};
    uint8_t *code = NULL, *dst;
    size_t n, block;
    int r;

    if (args->n_rest != 3)
        return ctl_usage("usage: kvctl codec decode [--codec=SPEC] [--v] --shape=T,H,D [--dtype=TYPE] IN OUT");
    if (!args->set[OPT_SHAPE] || !parse_shape(args->value[OPT_SHAPE], &t) ||
        (args->set[OPT_DTYPE] && !parse_dtype(args->value[OPT_DTYPE], &t.dtype)) || tensor_bytes(&t) == 0)
        return ctl_usage("--shape=T,H,D (or T,D) is needed; --dtype is f16, bf16 or f32");
    r = block_of(args, &block);
    if (r == EXIT_OK)
        r = read_file(args->rest[1], &code, &n);
    if (r != EXIT_OK)
        return r;
    dst = malloc(tensor_bytes(&t));
    r = dst ? decode_all(code, n, &t, spec, args->set[OPT_V], block, dst) : no_memory();
    if (r == EXIT_OK)
        r = write_tensor(&t, dst, args->rest[2]);
    free(dst);
    free(code);
    return r;
}

/* ---- error ---- */

struct error_sum {
    double error, power, dot, power_out, worst;
    size_t bits;
};

/* Codes and decodes one head's run and adds what is lost. x, y: fp32, n * dim. */
static int add_error(const struct tensor *t, const char *spec, int is_v, const uint8_t *head, size_t n, uint8_t *code,
                     float *x, float *y, struct error_sum *s)
{
    size_t bytes;
    int r = kvd_codec_bytes(spec, is_v, n, t->dim, &bytes, NULL);

    if (r == KVD_OK)
        r = kvd_codec_encode("f32", is_v, t->dtype, head, n, t->dim, x); /* its code is the numbers in fp32 */
    if (r == KVD_OK)
        r = kvd_codec_encode(spec, is_v, t->dtype, head, n, t->dim, code);
    if (r == KVD_OK)
        r = kvd_codec_decode(spec, is_v, code, n, t->dim, KVD_F32, y);
    if (r != KVD_OK)
        return r;
    for (size_t i = 0; i < n * t->dim; i++) {
        double a = x[i], b = y[i], e = a - b;

        s->error += e * e;
        s->power += a * a;
        s->power_out += b * b;
        s->dot += a * b;
        s->worst = fabs(e) > s->worst ? fabs(e) : s->worst;
    }
    s->bits += bytes * 8;
    return KVD_OK;
}

static int measure(const struct tensor *t, const char *spec, int is_v, size_t block, struct error_sum *s)
{
    size_t row = t->dim * dtype_bytes(t->dtype), most = 0;
    int r = kvd_codec_bytes(spec, is_v, block, t->dim, &most, NULL);
    uint8_t *head = malloc(block * row), *code = malloc(most ? most : 1);
    float *x = malloc(block * t->dim * sizeof(*x)), *y = malloc(block * t->dim * sizeof(*y));

    if (r == KVD_OK && (!head || !code || !x || !y))
        r = KVD_E_NOMEM;
    for (size_t token = 0; token < t->n_tokens && r == KVD_OK; token += block)
        for (size_t h = 0; h < t->n_heads && r == KVD_OK; h++) {
            size_t n = t->n_tokens - token < block ? t->n_tokens - token : block;

            take_head(t, token, n, h, head);
            r = add_error(t, spec, is_v, head, n, code, x, y, s);
        }
    free(head);
    free(code);
    free(x);
    free(y);
    return r;
}

static void print_error(const char *spec, const struct error_sum *s, size_t n_values, bool json, int *io_n)
{
    double bits = (double)s->bits / (double)n_values, rel = s->power > 0   ? s->error / s->power
                                                            : s->error > 0 ? INFINITY
                                                                           : 0;
    double cosine =
        s->power > 0 && s->power_out > 0 ? s->dot / sqrt(s->power * s->power_out) : s->power == s->power_out;

    if (!json) {
        if ((*io_n)++ == 0)
            printf("%-28s %8s %12s %10s %12s %9s\n", "codec", "bits", "rel MSE", "SNR dB", "max abs", "cosine");
        printf("%-28s %8.3f %12.4e %10.2f %12.4e %9.6f\n", spec, bits, rel, -10 * log10(rel), s->worst, cosine);
        return;
    }
    fputs((*io_n)++ ? ",\n  {" : "\n  {", stdout);
    json_text(stdout, true, "codec", spec);
    json_double(stdout, false, "bits_per_value", bits);
    json_double(stdout, false, "rel_mse", rel);
    json_double(stdout, false, "max_abs", s->worst);
    json_double(stdout, false, "cosine", cosine);
    putchar('}');
}

/* The next codec of a list with commas. A comma within options separates options: a name follows only if it is a
 * codec's. */
static char *next_spec(char **at)
{
    char *start = *at, *p = start;

    if (!start || !*start)
        return NULL;
    while ((p = strchr(p, ',')) != NULL) {
        char name[64];

        snprintf(name, sizeof(name), "%.*s", (int)strcspn(p + 1, ","), p + 1);
        if (kvd_codec_help(name)) {
            *p = '\0';
            *at = p + 1;
            return start;
        }
        p++;
    }
    *at = NULL;
    return start;
}

static int codec_error(const struct ctl_args *args)
{
    bool all = !args->set[OPT_CODEC] || strcmp(args->value[OPT_CODEC], "all") == 0, json = args->set[OPT_JSON];
    char list[1024] = "", *at = list, *spec;
    struct error_sum unused = {0};
    struct tensor t;
    size_t block;
    int r, e, n = 0;

    if (args->n_rest != 2)
        return ctl_usage("usage: kvctl codec error [--codec=SPEC,…] [--v] IN");
    if (all)
        for (const char *const *name = kvd_codec_names(); *name; name++)
            snprintf(list + strlen(list), sizeof(list) - strlen(list), "%s%s", list[0] ? "," : "", *name);
    else
        snprintf(list, sizeof(list), "%s", args->value[OPT_CODEC]);
    r = block_of(args, &block);
    if (r != EXIT_OK)
        return r;
    r = load_tensor(args->rest[1], args, &t);
    if (r == EXIT_OK && (e = measure(&t, "f32", 0, block, &unused)) != KVD_OK) /* NaN: no codec's error can be told */
        r = codec_fail(e);
    if (r != EXIT_OK) {
        free_tensor(&t);
        return r;
    }
    if (json)
        putchar('[');
    while (r == EXIT_OK && (spec = next_spec(&at)) != NULL) {
        struct error_sum s = {0};

        e = measure(&t, spec, args->set[OPT_V], block, &s);
        if (e == KVD_OK)
            print_error(spec, &s, t.n_tokens * t.n_heads * t.dim, json, &n);
        else if (all) /* one that has no form for this shape or these numbers: said, and on */
            fprintf(stderr, "kvctl: %s: %s\n", spec, kvd_message(NULL));
        else
            r = codec_fail(e);
    }
    if (json)
        puts("\n]");
    free_tensor(&t);
    return r;
}

int run_codec(struct ctl *ctl, const struct ctl_args *args)
{
    const char *what = args->rest[0], *format = args->set[OPT_FORMAT] ? args->value[OPT_FORMAT] : "kvd";

    (void)ctl;
    if (strcmp(format, "kvd") != 0 && strcmp(format, "uq-page") != 0)
        return ctl_usage("--format=%s; allowed: kvd, uq-page", format);
    if (strcmp(format, "uq-page") == 0 && strcmp(what, "encode") != 0)
        return ctl_usage("--format=uq-page is for encode");
    if (strcmp(what, "list") == 0)
        return codec_list(args);
    if (strcmp(what, "encode") == 0)
        return strcmp(format, "kvd") == 0 ? codec_encode(args) : codec_encode_page(args);
    if (strcmp(what, "decode") == 0)
        return codec_decode(args);
    if (strcmp(what, "error") == 0)
        return codec_error(args);
    return ctl_usage("\"%s\"; allowed: list, encode, decode, error", what);
}
