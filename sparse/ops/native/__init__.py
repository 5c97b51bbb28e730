"""CPU kernels in C++, built by the system's compiler at first use."""
