"""The same stateless task everywhere: a local pool, a Slurm array, an indexed Kubernetes Job."""
