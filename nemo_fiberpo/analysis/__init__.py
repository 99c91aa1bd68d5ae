"""Analysis of recorded runs: `report`, `compare`, `calibrate`. Only reads run folders; needs no NeMo."""
