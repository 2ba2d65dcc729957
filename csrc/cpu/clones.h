#pragma once

// One build for every x86-64: the loader picks the AVX2 copy where the CPU has it. Needs ifunc, hence glibc.
#include <cstdlib>

#if defined(__x86_64__) && defined(__GLIBC__) && defined(__has_attribute)
#if __has_attribute(target_clones)
#define MOLT_CLONES __attribute__((target_clones("avx2", "default")))
#define MOLT_CLONES_NAME "avx2,default"
#endif
#endif
#ifndef MOLT_CLONES
#define MOLT_CLONES
#define MOLT_CLONES_NAME "default"
#endif

#if defined(__GNUC__)
#define MOLT_INLINE inline __attribute__((always_inline))
#else
#define MOLT_INLINE inline
#endif
