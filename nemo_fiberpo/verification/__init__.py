"""A layout checked against one rank on a small random model, for `fiberpo verify` and for the matrix of layouts."""
