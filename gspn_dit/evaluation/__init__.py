"""Evaluation: how far generated images are from real ones, and how recognisable they are.

`images` and `npz` open what is scored, `extractors` turns images into features, `features` passes a set's features, in
shares over `processes`, to what accumulates them: `moments` (FID, sFID), `metrics` (Inception Score, class accuracy)
and `neighbours` (precision, recall). `evaluate` and `reference` are the commands, and `classifier` the models
(and their training) behind the digits' and photos' figures.
"""
