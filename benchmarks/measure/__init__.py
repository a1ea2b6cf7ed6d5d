"""What the benchmarks do; the scripts beside this package are their command lines, which answer before torch is loaded."""
