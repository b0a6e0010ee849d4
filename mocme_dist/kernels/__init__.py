"""Everything compiled by hand, in C++, C and Triton: one builder, and a torch or numpy twin beside each kernel."""
