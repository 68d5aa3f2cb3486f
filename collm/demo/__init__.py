"""Two tiny models that need each other: a writer that cannot calculate and a calculator that cannot write."""
