/* Included ahead of every C and C++ file by setup.py: lets a library tell of which sources it was built, so that
 * c_library.py does not call one whose functions have changed since. */
#ifdef __cplusplus
extern "C"
#endif
__attribute__((visibility("default"), weak)) unsigned moeflow_sources(void) { return MOEFLOW_SOURCES; }
