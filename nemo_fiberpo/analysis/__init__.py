"""What recorded runs show: `report`, `compare`, `calibrate`. Reads run folders and starts nothing; needs no NeMo."""
