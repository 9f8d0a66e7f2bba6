// The emulator's driver with a few functions of its own, which behave as a GPU's driver may and the emulator
// does not. tests/gpu/fakes.py builds it.
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int taken;  // stands for a module of machine code

static void* real(const char* name) {
    return dlsym(dlopen("libcuda.so.1", RTLD_LAZY | RTLD_NOLOAD), name);
}

// Takes machine code where FAKE_TAKES_CUBINS is set; what it was given is written to the file FAKE_LOG.
int cuModuleLoadData(void** module, const void* image) {
    const int is_cubin = memcmp(image, "\177ELF", 4) == 0;
    const char* path = getenv("FAKE_LOG");
    if (path != NULL) {
        FILE* log = fopen(path, "a");
        fputs(is_cubin ? "cubin\n" : "ptx\n", log);
        fclose(log);
    }
    if (is_cubin && getenv("FAKE_TAKES_CUBINS") != NULL) {
        *module = &taken;
        return 0;
    }
    return ((int (*)(void**, const void*))real("cuModuleLoadData"))(module, image);
}

int cuModuleUnload(void* module) {
    return module == &taken ? 0 : ((int (*)(void*))real("cuModuleUnload"))(module);
}

// On the default stream, for which the other streams don't wait: not there when they begin.
int cuMemsetD8_v2(unsigned long long address, unsigned char value, size_t count) {
    (void)address, (void)value, (void)count;
    return 0;
}
