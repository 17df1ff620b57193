/* Every method there is. A test compares the table with the descriptors of the services. */
#include <string.h>

#include "daemon/rpc-internal.h"
#include "proto/frame.h"
#include "proto/grpc/health/v1/health.pb-c.h"
#include "proto/grpc/reflection/v1/reflection.pb-c.h"
#include "proto/kvd.pb-c.h"

#define CACHE "/kvd.v1.Cache/"
#define ADMIN "/kvd.v1.Admin/"
#define HEALTH "/grpc.health.v1.Health/"

static const struct rpc_method methods[] = {
    {CACHE "Match", &kvd__v1__match_request__descriptor, RPC_UNARY, RPC_TENANT, .handle = rpc_match},
    {CACHE "Attend", &kvd__v1__attention_request__descriptor, RPC_UNARY, RPC_TENANT, .handle = rpc_attend},
    {CACHE "Release", &kvd__v1__release_request__descriptor, RPC_UNARY, RPC_TENANT, .handle = rpc_release},
    {CACHE "Load", &kvd__v1__load_request__descriptor, RPC_UNARY, RPC_TENANT, .handle = rpc_load},
    {CACHE "LoadStream", &kvd__v1__load_request__descriptor, RPC_OUT_STREAM, RPC_TENANT, .handle = rpc_load},
    {CACHE "Publish", &kvd__v1__publish_request__descriptor, RPC_UNARY, RPC_TENANT, .handle = rpc_publish},
    {CACHE "PublishStream", &kvd__v1__publish_request__descriptor, RPC_IN_STREAM, RPC_TENANT, .handle = rpc_publish},
    {CACHE "OpenSpace", &kvd__v1__space__descriptor, RPC_UNARY, RPC_TENANT, .handle = rpc_open_space},
    {ADMIN "Stats", &kvd__v1__stats__descriptor, RPC_UNARY, RPC_ADMIN, .frame = FRAME_STATS},
    {ADMIN "List", &kvd__v1__list__descriptor, RPC_UNARY, RPC_ADMIN, .frame = FRAME_LIST},
    {ADMIN "Show", &kvd__v1__show__descriptor, RPC_UNARY, RPC_ADMIN, .frame = FRAME_SHOW},
    {ADMIN "Evict", &kvd__v1__evict__descriptor, RPC_UNARY, RPC_ADMIN, .frame = FRAME_EVICT},
    {ADMIN "Pin", &kvd__v1__pin__descriptor, RPC_UNARY, RPC_ADMIN, .frame = FRAME_PIN},
    {ADMIN "Verify", &kvd__v1__verify__descriptor, RPC_UNARY, RPC_ADMIN, .frame = FRAME_VERIFY},
    {ADMIN "Drain", &kvd__v1__drain__descriptor, RPC_UNARY, RPC_ADMIN, .frame = FRAME_DRAIN},
    {ADMIN "Config", &kvd__v1__config__descriptor, RPC_UNARY, RPC_ADMIN, .frame = FRAME_CONFIG},
    {HEALTH "Check", &grpc__health__v1__health_check_request__descriptor, RPC_UNARY, RPC_ANYBODY, .local = rpc_health_check},
    {HEALTH "Watch", &grpc__health__v1__health_check_request__descriptor, RPC_OUT_STREAM, RPC_ANYBODY, .local = rpc_health_watch},
    {"/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
     &grpc__reflection__v1__server_reflection_request__descriptor, RPC_BIDI, RPC_ANYBODY, .local = rpc_reflect},
    {"/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
     &grpc__reflection__v1__server_reflection_request__descriptor, RPC_BIDI, RPC_ANYBODY, .local = rpc_reflect},
};

const struct rpc_method *rpc_method_find(const void *path, size_t n)
{
    for (size_t i = 0; i < sizeof(methods) / sizeof(methods[0]); i++)
        if (strlen(methods[i].path) == n && memcmp(methods[i].path, path, n) == 0)
            return &methods[i];
    return NULL;
}

const struct rpc_method *rpc_method_at(size_t i)
{
    return i < sizeof(methods) / sizeof(methods[0]) ? &methods[i] : NULL;
}
