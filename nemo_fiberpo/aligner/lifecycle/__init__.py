"""How the processes of a run begin and end: the lock on its directory, what the first rank decides, signals, exit
statuses."""
