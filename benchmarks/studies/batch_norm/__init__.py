"""Studies gradient skew under batch norm, and training with SparseOpt's correction and without."""
