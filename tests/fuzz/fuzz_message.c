/* Bodies of every message: unpacked, packed, unpacked again; what was understood must survive, and the size must be told right.
 * First byte: which message. */
#include <stdlib.h>
#include <string.h>

#include "proto/kvd.pb-c.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static const ProtobufCMessageDescriptor *const messages[] = {
    &kvd__v1__hello__descriptor,        &kvd__v1__hello_reply__descriptor,   &kvd__v1__space__descriptor,
    &kvd__v1__space_reply__descriptor,  &kvd__v1__staging_add__descriptor,   &kvd__v1__staging_drop__descriptor,
    &kvd__v1__publish__descriptor,      &kvd__v1__publish_reply__descriptor, &kvd__v1__flight_begin__descriptor,
    &kvd__v1__flight_wait__descriptor,  &kvd__v1__flight_end__descriptor,    &kvd__v1__slab_get__descriptor,
    &kvd__v1__slab_reply__descriptor,   &kvd__v1__stats_reply__descriptor,   &kvd__v1__list__descriptor,
    &kvd__v1__list_reply__descriptor,   &kvd__v1__evict__descriptor,         &kvd__v1__pin__descriptor,
    &kvd__v1__verify__descriptor,       &kvd__v1__verify_reply__descriptor,  &kvd__v1__config__descriptor,
    &kvd__v1__config_reply__descriptor, &kvd__v1__error__descriptor,         &kvd__v1__show__descriptor,
};

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    const ProtobufCMessageDescriptor *type;
    ProtobufCMessage *m, *again;
    uint8_t *packed, *packed_again;
    size_t n;

    if (size < 1)
        return 0;
    type = messages[data[0] % (sizeof(messages) / sizeof(messages[0]))];
    m = protobuf_c_message_unpack(type, NULL, size - 1, data + 1);
    if (!m)
        return 0;
    n = protobuf_c_message_get_packed_size(m);
    packed = malloc(n + 1);
    packed_again = malloc(n + 1);
    if (!packed || !packed_again)
        abort();
    if (protobuf_c_message_pack(m, packed) != n)
        abort();
    again = protobuf_c_message_unpack(type, NULL, n, packed);
    /* protobuf-c takes unknown fields of number 0 and then refuses its own packing of them: no concern of ours. */
    if (again && (protobuf_c_message_get_packed_size(again) != n || protobuf_c_message_pack(again, packed_again) != n ||
                  memcmp(packed, packed_again, n) != 0))
        abort();
    protobuf_c_message_free_unpacked(again, NULL);
    protobuf_c_message_free_unpacked(m, NULL);
    free(packed);
    free(packed_again);
    return 0;
}
