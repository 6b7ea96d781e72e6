/*
 * Can the CUDA binary of this image run here? It is linked with libcuda and does not start without a driver, so this asks before it is started:
 * it finds the driver's library as the loader would and asks it what the binary will ask.
 *
 *   cc -O2 -DBUILT_CUDA=13000 -DBUILT_CAPABILITY=90 -o hardmax-cuda-probe cuda-probe.c
 *
 * BUILT_CUDA is the toolkit that the binary was built with, as CUDA_VERSION in cuda.h has it; BUILT_CAPABILITY is CUDA_COMPUTE_CAP of that build.
 * Prints one line: exit status 0, and the GPU in words; exit status 1, and what is missing. It uses no header of CUDA's, so it compiles anywhere.
 */
#include <dlfcn.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#ifndef DEVICES /* of tests */
#define DEVICES "/dev"
#endif

/* Of cuda.h. */
enum { MAJOR = 75, MINOR = 76 };

/* Ends the program with a line that can stand between quotes in JSON: no control characters, no quotes, no backslashes. */
__attribute__((format(printf, 2, 3), noreturn)) static void answer(int status, const char *format, ...)
{
    char line[1024];
    va_list values;
    va_start(values, format);
    vsnprintf(line, sizeof line, format, values);
    va_end(values);
    for (char *c = line; *c; c++)
        if (*c < ' ' || *c > '~' || *c == '"' || *c == '\\')
            *c = ' ';
    puts(line);
    exit(status);
}

/* Nodes that the NVIDIA Container Toolkit or WSL puts into a container that was given a GPU. */
static const char *device_node(void)
{
    static const char *const nodes[] = {DEVICES "/nvidiactl", DEVICES "/nvidia0", DEVICES "/dxg"};
    for (size_t i = 0; i < sizeof nodes / sizeof *nodes; i++)
        if (access(nodes[i], F_OK) == 0)
            return nodes[i];
    return NULL;
}

static void *driver(void)
{
    void *library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
    if (library)
        return library;
    const char *why = dlerror(), *node = device_node();
    if (node)
        answer(1, "there is %s but not the library of its driver (%s): NVIDIA_DRIVER_CAPABILITIES must contain compute", node, why);
    answer(1, "no GPU was given to this container (%s): docker run needs --gpus, and the machine a driver and the NVIDIA Container Toolkit", why);
}

static void *function(void *library, const char *name)
{
    void *address = dlsym(library, name);
    if (!address)
        answer(1, "libcuda.so.1 has no %s: it is not an NVIDIA driver that this image can use", name);
    return address;
}

static void check(void *library, int code, const char *call)
{
    if (code == 0)
        return;
    int (*describe)(int, const char **) = function(library, "cuGetErrorString");
    const char *words = NULL, *visible = getenv("CUDA_VISIBLE_DEVICES");
    if (describe(code, &words) != 0 || !words)
        words = "unknown error";
    if (visible)
        answer(1, "the driver refuses: %s gives %d, %s (CUDA_VISIBLE_DEVICES is '%s')", call, code, words, visible);
    answer(1, "the driver refuses: %s gives %d, %s", call, code, words);
}

/* Code for 9.0 and newer is built with the features of that very architecture (sm_90a) and runs on nothing else; older code also runs on what is newer
 * within its major version. */
static bool runs_on(int major, int minor)
{
    if (BUILT_CAPABILITY >= 90)
        return major * 10 + minor == BUILT_CAPABILITY;
    return major == BUILT_CAPABILITY / 10 && minor >= BUILT_CAPABILITY % 10;
}

int main(void)
{
    void *library = driver();
    int (*get_version)(int *) = function(library, "cuDriverGetVersion");
    int (*init)(unsigned) = function(library, "cuInit");
    int (*get_count)(int *) = function(library, "cuDeviceGetCount");
    int (*get_device)(int *, int) = function(library, "cuDeviceGet");
    int (*get_attribute)(int *, int, int) = function(library, "cuDeviceGetAttribute");
    int (*get_name)(char *, int, int) = function(library, "cuDeviceGetName");
    int (*get_memory)(size_t *, int) = function(library, "cuDeviceTotalMem_v2");

    int version = 0;
    check(library, get_version(&version), "cuDriverGetVersion");
    if (version < BUILT_CUDA)
        answer(1, "the driver is too old: it knows CUDA %d.%d, and hardmax-cuda was built with %d.%d", version / 1000, version % 1000 / 10,
               BUILT_CUDA / 1000, BUILT_CUDA % 1000 / 10);
    check(library, init(0), "cuInit");
    int count = 0, device = 0, major = 0, minor = 0;
    check(library, get_count(&count), "cuDeviceGetCount");
    if (count == 0)
        answer(1, "the driver sees no GPU");
    char name[128] = "";
    size_t memory = 0;
    check(library, get_device(&device, 0), "cuDeviceGet(0)");
    check(library, get_name(name, sizeof name, device), "cuDeviceGetName");
    check(library, get_memory(&memory, device), "cuDeviceTotalMem");
    check(library, get_attribute(&major, MAJOR, device), "cuDeviceGetAttribute");
    check(library, get_attribute(&minor, MINOR, device), "cuDeviceGetAttribute");
    if (!runs_on(major, minor))
        answer(1, "%s has compute capability %d.%d, and hardmax-cuda was built for %d.%d: build the image with CUDA_COMPUTE_CAP=%d%d", name, major,
               minor, BUILT_CAPABILITY / 10, BUILT_CAPABILITY % 10, major, minor);
    answer(0, "%s, %.1f GiB, compute capability %d.%d, driver for CUDA %d.%d", name, (double)memory / (1 << 30), major, minor, version / 1000,
           version % 1000 / 10);
}
