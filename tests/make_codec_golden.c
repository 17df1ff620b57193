/* Writes the golden files of the codecs into a folder: make_codec_golden tests/golden/codec. To be run when a codec is added;
 * a change in what is there already is a change of format. */
#include "tests/check_codec_data.h"

static int write_file(const char *dir, const char *name, const void *data, size_t n)
{
    char path[4096];
    FILE *f;
    int failed;

    snprintf(path, sizeof(path), "%s/%s", dir, name);
    f = fopen(path, "wb");
    if (!f) {
        perror(path);
        return 1;
    }
    failed = fwrite(data, 1, n, f) != n;
    failed |= fclose(f) != 0;
    if (failed)
        perror(path);
    return failed;
}

int main(int argc, char **argv)
{
    struct data_case c = {0};
    char *list = NULL;
    size_t list_bytes = 0;
    FILE *out = open_memstream(&list, &list_bytes);
    int failed = 0;

    if (argc != 2 || !out) {
        fprintf(stderr, "usage: make_codec_golden FOLDER\n");
        return 2;
    }
    while (data_case_next(&c)) {
        char line[160], name[128];
        size_t n;
        uint8_t *packed = data_case_run(&c, &codec_ops_scalar, &n, line);

        fprintf(out, "%s\n", line);
        data_case_file(&c, name, sizeof(name));
        if (data_case_has_file(&c))
            failed |= write_file(argv[1], name, packed, n);
        free(packed);
    }
    fclose(out);
    failed |= write_file(argv[1], "LIST", list, list_bytes);
    free(list);
    return failed;
}
