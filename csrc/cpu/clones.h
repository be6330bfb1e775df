// AHA_CLONES compiles a function once per x86 vector width; the loader picks the widest the machine has.
#pragma once

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12 && \
    !defined(AHA_NO_CLONES)
#define AHA_CLONES __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#else
#define AHA_CLONES
#endif

// Bodies shared by clones must be inlined into each of them to be compiled for its width.
#if defined(__GNUC__)
#define AHA_INLINE inline __attribute__((always_inline))
#else
#define AHA_INLINE inline
#endif
