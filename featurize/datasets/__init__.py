"""Where images and captions come from: one file per source of `Sample`s; `load` chooses and checks."""
