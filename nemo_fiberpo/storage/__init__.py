"""Files that must be right: reads on shared file systems, manifests, `.nemo` policies, unpickling."""
