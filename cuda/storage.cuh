// Sixteen-bit storage (bf16 or fp16) and the instructions that work on it.
//
// -DSTORAGE_BF16 or -DSTORAGE_F16 chooses the type. Kernels handle values in pairs, the lower address in the
// lower half of a word, and in vectors of 16 bytes. Compiles under NVRTC without a CUDA toolkit's headers.
#pragma once

#if defined(STORAGE_BF16) == defined(STORAGE_F16)
#error "define either STORAGE_BF16 or STORAGE_F16"
#endif

using Storage = unsigned short;

// Sixteen bytes: eight values in pairs, or four floats by their bits.
struct alignas(16) Pairs {
    unsigned pair[4];
};

__device__ __forceinline__ float2 unpack(unsigned pair) {
#ifdef STORAGE_BF16
    return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u));
#else
    float2 values;
    asm("{ .reg .b16 low, high; mov.b32 {low, high}, %2; cvt.f32.f16 %0, low; cvt.f32.f16 %1, high; }"
        : "=f"(values.x), "=f"(values.y)
        : "r"(pair));
    return values;
#endif
}

// Rounds to nearest even.
__device__ __forceinline__ unsigned pack(float low, float high) {
    unsigned pair;
#ifdef STORAGE_BF16
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
#else
    asm("{ .reg .b16 low, high; cvt.rn.f16.f32 low, %1; cvt.rn.f16.f32 high, %2; mov.b32 %0, {low, high}; }"
        : "=r"(pair)
        : "f"(low), "f"(high));
#endif
    return pair;
}

__device__ __forceinline__ float to_float(Storage value) {
    return unpack(value).x;
}

__device__ __forceinline__ Storage to_storage(float value) {
    return static_cast<Storage>(pack(value, 0.0f));
}

// Accesses of 16 bytes, written out because the compiler may split others.

// What is read once and doesn't change during the kernel: not kept in L1.
__device__ __forceinline__ Pairs load_streamed(const void* address) {
    Pairs v;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.pair[0]), "=r"(v.pair[1]), "=r"(v.pair[2]), "=r"(v.pair[3])
                 : "l"(address));
    return v;
}

// Past L1: sees what other blocks of the launch have written.
__device__ __forceinline__ Pairs load_global(const void* address) {
    Pairs v;
    asm volatile("ld.global.cg.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.pair[0]), "=r"(v.pair[1]), "=r"(v.pair[2]), "=r"(v.pair[3])
                 : "l"(address)
                 : "memory");
    return v;
}

__device__ __forceinline__ float load_global_float(const float* address) {
    float v;
    asm volatile("ld.global.cg.f32 %0, [%1];" : "=f"(v) : "l"(address) : "memory");
    return v;
}

__device__ __forceinline__ void store_global(void* address, const Pairs& v) {
    asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(address), "r"(v.pair[0]), "r"(v.pair[1]),
                 "r"(v.pair[2]), "r"(v.pair[3])
                 : "memory");
}

__device__ __forceinline__ unsigned shared_address(const void* shared) {
    return static_cast<unsigned>(__cvta_generic_to_shared(shared));
}

__device__ __forceinline__ Pairs load_shared(const void* shared) {
    Pairs v;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.pair[0]), "=r"(v.pair[1]), "=r"(v.pair[2]), "=r"(v.pair[3])
                 : "r"(shared_address(shared))
                 : "memory");
    return v;
}

__device__ __forceinline__ void store_shared(void* shared, const Pairs& v) {
    asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(shared)), "r"(v.pair[0]),
                 "r"(v.pair[1]), "r"(v.pair[2]), "r"(v.pair[3])
                 : "memory");
}

// c [16, 8] += a [16, 16] · b [16, 8], f32 sums. With lane = 4·g + t:
//   a: pairs (row g, k 2t), (row g + 8, k 2t), (row g, k 2t + 8), (row g + 8, k 2t + 8)
//   b: pairs (k 2t, column g), (k 2t + 8, column g)        c: row g columns 2t, 2t + 1; row g + 8 the same
__device__ __forceinline__ void mma_16x8x16(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
#ifdef STORAGE_BF16
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
#else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
#endif
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
