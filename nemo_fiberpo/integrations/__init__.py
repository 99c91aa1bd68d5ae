"""Other hosts of the objective: verl 0.9, through its plug-in entry point."""
