"""What heads are trained to minimise: one file per loss, `objective` puts them together."""
