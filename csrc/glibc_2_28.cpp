// Keeps the extensions loadable on glibc 2.28 with the libstdc++ of GCC 8 (RHEL 8 and its kind), wherever they are
// built. Compiled on a newer system, they would ask for the newest version of a few symbols; these are defined here
// instead, for this library alone, by what the older system has. If another symbol is too new, `make wheel` says so.
#if defined(__linux__) && defined(__x86_64__)
#include <new>
#include <sstream>  // and the macros asked for next

#if defined(__GLIBC__) && __GLIBC_PREREQ(2, 29) && defined(__GLIBCXX__)

// Under the name that the compiler asks for, which stays inside this library.
#define AHA_DEFINE(type, name, symbol, ...)                                          \
  __attribute__((visibility("hidden"), used)) type name(__VA_ARGS__) __asm__(symbol); \
  type name(__VA_ARGS__)

// glibc 2.29: the same functions without SVID's handling of errors
__asm__(".symver aha_exp_2_2_5, exp@GLIBC_2.2.5\n.symver aha_log_2_2_5, log@GLIBC_2.2.5");
extern "C" double aha_exp_2_2_5(double), aha_log_2_2_5(double);
AHA_DEFINE(double, aha_exp, "exp", double x) { return aha_exp_2_2_5(x); }
AHA_DEFINE(double, aha_log, "log", double x) { return aha_log_2_2_5(x); }

// glibc 2.32: whether there is one thread only, so that counting references need not be atomic; no is always right
extern "C" __attribute__((visibility("hidden"))) char __libc_single_threaded;
char __libc_single_threaded = 0;

// GCC 9: the constructors without arguments
AHA_DEFINE(void, aha_ostringstream, "_ZNSt7__cxx1119basic_ostringstreamIcSt11char_traitsIcESaIcEEC1Ev", void* at) {
  new (at) std::ostringstream(std::ios_base::out);
}
AHA_DEFINE(void, aha_stringstream, "_ZNSt7__cxx1118basic_stringstreamIcSt11char_traitsIcESaIcEEC1Ev", void* at) {
  new (at) std::stringstream(std::ios_base::in | std::ios_base::out);
}

// GCC 11: the str() of C++20, which is that of C++11 with a qualifier
std::string aha_str_11(const std::stringbuf*) __asm__(
    "_ZNKSt7__cxx1115basic_stringbufIcSt11char_traitsIcESaIcEE3strEv");
AHA_DEFINE(std::string, aha_str, "_ZNKRSt7__cxx1115basic_stringbufIcSt11char_traitsIcESaIcEE3strEv",
           const std::stringbuf* buffer) {
  return aha_str_11(buffer);
}

#endif
#endif
