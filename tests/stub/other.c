/* A shared library that has nothing to do with libcuSZp. */
int answer(void) { return 42; }
