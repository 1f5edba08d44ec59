"""The roof: a run is a method (recipe) times a data set; `python -m pipeline --help`."""
