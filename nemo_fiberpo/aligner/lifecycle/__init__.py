"""How the processes of a run start and end: the lock on its directory, rank 0's decisions, signals, exit statuses."""
