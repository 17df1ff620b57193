/* Server reflection (v1 and v1alpha, the same on the wire): the services describe themselves from the descriptors that protoc-c made of
 * proto/ at build time. They are walked as they are, in protobuf's wire form (google/protobuf/descriptor.proto):
 *
 *   FileDescriptorSet    file 1
 *   FileDescriptorProto  name 1, package 2, message_type 4, enum_type 5, service 6
 *   DescriptorProto      name 1, field 2, nested_type 3, enum_type 4, oneof_decl 8
 *   EnumDescriptorProto  name 1, value 2          ServiceDescriptorProto  name 1, method 2
 *   and every other one of them: name 1 */
#include <assert.h>
#include <stdio.h>
#include <string.h>

#include "daemon/rpc-internal.h"
#include "proto/descriptors.h"
#include "proto/grpc/reflection/v1/reflection.pb-c.h"

typedef Grpc__Reflection__V1__ServerReflectionRequest request;
typedef Grpc__Reflection__V1__ServerReflectionResponse response;

struct bytes {
    const uint8_t *at;
    size_t n;
};

static const struct bytes all = {descriptor_set, sizeof(descriptor_set)};

static uint64_t take_varint(struct bytes *b)
{
    uint64_t v = 0;

    for (int shift = 0; shift < 64; shift += 7) {
        uint8_t byte = *b->at;

        assert(b->n > 0); /* made by protoc-c */
        b->at++;
        b->n--;
        v |= (uint64_t)(byte & 0x7f) << shift;
        if (!(byte & 0x80))
            break;
    }
    return v;
}

/* The next field that has a length; others are passed over. False: no more. */
static bool next_field(struct bytes *b, unsigned *ret_number, struct bytes *ret)
{
    while (b->n > 0) {
        uint64_t tag = take_varint(b), v = take_varint(b);

        if ((tag & 7) == 0)
            continue;
        assert((tag & 7) == 2 && v <= b->n);
        *ret_number = (unsigned)(tag >> 3);
        *ret = (struct bytes){b->at, v};
        b->at += v;
        b->n -= v;
        return true;
    }
    return false;
}

static struct bytes field_of(struct bytes from, unsigned number)
{
    struct bytes field;
    unsigned n;

    while (next_field(&from, &n, &field))
        if (n == number)
            return field;
    return (struct bytes){0};
}

/* Takes "name" or "name." off the front of symbol. False: it does not begin so. */
static bool take_name(struct bytes name, struct bytes *symbol)
{
    if (name.n > symbol->n || memcmp(name.at, symbol->at, name.n) != 0)
        return false;
    if (symbol->n > name.n && symbol->at[name.n] != '.')
        return false;
    symbol->at += name.n;
    symbol->n -= name.n;
    if (symbol->n > 0) {
        symbol->at++;
        symbol->n--;
    }
    return true;
}

/* The kinds of things that are in a thing, by field number; their own, by the kind. */
enum kind { A_FILE, A_MESSAGE, AN_ENUM, A_SERVICE, A_LEAF, KINDS };
static const enum kind inside[KINDS][9] = {
    [A_FILE] = {[4] = A_MESSAGE, [5] = AN_ENUM, [6] = A_SERVICE},
    [A_MESSAGE] = {[2] = A_LEAF, [3] = A_MESSAGE, [4] = AN_ENUM, [8] = A_LEAF},
    [AN_ENUM] = {[2] = A_LEAF},
    [A_SERVICE] = {[2] = A_LEAF},
};

/* Is there something of this name in it? As deep as messages are nested. */
static bool defines(struct bytes thing, enum kind kind, struct bytes symbol)
{
    struct bytes field;
    unsigned n;

    while (next_field(&thing, &n, &field)) {
        struct bytes rest = symbol;

        if (n < 9 && inside[kind][n] && take_name(field_of(field, 1), &rest) &&
            (rest.n == 0 || defines(field, inside[kind][n], rest)))
            return true;
    }
    return false;
}

static bool file_defines(struct bytes file, const char *symbol)
{
    struct bytes rest = {(const uint8_t *)symbol, strlen(symbol)};

    return take_name(field_of(file, 2), &rest) && rest.n > 0 && defines(file, A_FILE, rest);
}

/* The file that has the name, or defines the symbol. Empty: none. */
static struct bytes find_file(const char *name, const char *symbol)
{
    struct bytes set = all, file;
    unsigned n;

    while (next_field(&set, &n, &file)) {
        struct bytes called = field_of(file, 1);

        if (name ? called.n == strlen(name) && memcmp(called.at, name, called.n) == 0 : file_defines(file, symbol))
            return file;
    }
    return (struct bytes){0};
}

/* ---- answers ---- */

static void answer_error(struct rpc_call *c, response *out, grpc_status_code code, const char *text)
{
    Grpc__Reflection__V1__ErrorResponse e = GRPC__REFLECTION__V1__ERROR_RESPONSE__INIT;

    e.error_code = code;
    e.error_message = (char *)text;
    out->message_response_case = GRPC__REFLECTION__V1__SERVER_REFLECTION_RESPONSE__MESSAGE_RESPONSE_ERROR_RESPONSE;
    out->error_response = &e;
    rpc_local_answer(c, &out->base, true);
}

static void answer_file(struct rpc_call *c, response *out, struct bytes file)
{
    Grpc__Reflection__V1__FileDescriptorResponse f = GRPC__REFLECTION__V1__FILE_DESCRIPTOR_RESPONSE__INIT;
    ProtobufCBinaryData data = {.len = file.n, .data = (uint8_t *)file.at};

    if (!file.at) {
        answer_error(c, out, GRPC_STATUS_NOT_FOUND, "no file has this name or defines this symbol");
        return;
    }
    f.n_file_descriptor_proto = 1; /* no file of ours imports another */
    f.file_descriptor_proto = &data;
    out->message_response_case = GRPC__REFLECTION__V1__SERVER_REFLECTION_RESPONSE__MESSAGE_RESPONSE_FILE_DESCRIPTOR_RESPONSE;
    out->file_descriptor_response = &f;
    rpc_local_answer(c, &out->base, true);
}

/* Every file's services. */
static void answer_services(struct rpc_call *c, response *out)
{
    enum { SERVICES_MAX = 8 };
    Grpc__Reflection__V1__ServiceResponse services[SERVICES_MAX], *list[SERVICES_MAX];
    Grpc__Reflection__V1__ListServiceResponse l = GRPC__REFLECTION__V1__LIST_SERVICE_RESPONSE__INIT;
    char names[SERVICES_MAX][96];
    struct bytes set = all, file, field;
    unsigned n;

    while (next_field(&set, &n, &file)) {
        struct bytes rest = file, package = field_of(file, 2);

        while (next_field(&rest, &n, &field)) {
            struct bytes name;

            if (n != 6)
                continue;
            name = field_of(field, 1);
            assert(l.n_service < SERVICES_MAX);
            snprintf(names[l.n_service], sizeof(names[0]), "%.*s.%.*s", (int)package.n, (const char *)package.at, (int)name.n,
                     (const char *)name.at);
            grpc__reflection__v1__service_response__init(&services[l.n_service]);
            services[l.n_service].name = names[l.n_service];
            list[l.n_service] = &services[l.n_service];
            l.n_service++;
        }
    }
    l.service = list;
    out->message_response_case = GRPC__REFLECTION__V1__SERVER_REFLECTION_RESPONSE__MESSAGE_RESPONSE_LIST_SERVICES_RESPONSE;
    out->list_services_response = &l;
    rpc_local_answer(c, &out->base, true);
}

/* proto3 has none. */
static void answer_extensions(struct rpc_call *c, response *out, const char *type)
{
    Grpc__Reflection__V1__ExtensionNumberResponse e = GRPC__REFLECTION__V1__EXTENSION_NUMBER_RESPONSE__INIT;

    if (!find_file(NULL, type).at) {
        answer_error(c, out, GRPC_STATUS_NOT_FOUND, "there is no such type");
        return;
    }
    e.base_type_name = (char *)type;
    out->message_response_case = GRPC__REFLECTION__V1__SERVER_REFLECTION_RESPONSE__MESSAGE_RESPONSE_ALL_EXTENSION_NUMBERS_RESPONSE;
    out->all_extension_numbers_response = &e;
    rpc_local_answer(c, &out->base, true);
}

void rpc_reflect(struct rpc_call *c)
{
    request *m = c->message;
    response out = GRPC__REFLECTION__V1__SERVER_REFLECTION_RESPONSE__INIT;

    out.valid_host = m->host;
    out.original_request = m;
    switch (m->message_request_case) {
    case GRPC__REFLECTION__V1__SERVER_REFLECTION_REQUEST__MESSAGE_REQUEST_FILE_BY_FILENAME:
        answer_file(c, &out, find_file(m->file_by_filename, NULL));
        break;
    case GRPC__REFLECTION__V1__SERVER_REFLECTION_REQUEST__MESSAGE_REQUEST_FILE_CONTAINING_SYMBOL:
        answer_file(c, &out, find_file(NULL, m->file_containing_symbol));
        break;
    case GRPC__REFLECTION__V1__SERVER_REFLECTION_REQUEST__MESSAGE_REQUEST_FILE_CONTAINING_EXTENSION:
        answer_error(c, &out, GRPC_STATUS_NOT_FOUND, "there are no extensions");
        break;
    case GRPC__REFLECTION__V1__SERVER_REFLECTION_REQUEST__MESSAGE_REQUEST_ALL_EXTENSION_NUMBERS_OF_TYPE:
        answer_extensions(c, &out, m->all_extension_numbers_of_type);
        break;
    case GRPC__REFLECTION__V1__SERVER_REFLECTION_REQUEST__MESSAGE_REQUEST_LIST_SERVICES:
        answer_services(c, &out);
        break;
    default:
        answer_error(c, &out, GRPC_STATUS_INVALID_ARGUMENT, "nothing is asked");
    }
}
