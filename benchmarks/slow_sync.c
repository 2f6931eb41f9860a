/* A disk whose syncs take longer: loaded before the C library, it waits MICROSECONDS in each fsync and fdatasync.

   cc -shared -fPIC -DMICROSECONDS=2000 slow_sync.c -o slow_sync.so -ldl
   LD_PRELOAD=./slow_sync.so batchserve serve */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <time.h>

typedef int sync_call(int descriptor);

static int later(const char *name, int descriptor) {
    struct timespec left = {MICROSECONDS / 1000000, MICROSECONDS % 1000000 * 1000L};
    sync_call *next = (sync_call *)dlsym(RTLD_NEXT, name);

    while (nanosleep(&left, &left) != 0 && errno == EINTR)
        continue;
    return next(descriptor);
}

int fsync(int descriptor) { return later("fsync", descriptor); }

int fdatasync(int descriptor) { return later("fdatasync", descriptor); }
