"""Evaluation: how far generated images are from real ones, and how recognisable they are.

`image_sets` and `npz` open what is scored. `extractors` turns images into features by the `networks` that `classifiers`
names. `features` passes a set's features, in shares over `processes`, to what accumulates them: `moments` (FID, sFID),
`metrics` (Inception Score, class accuracy) and `precision_recall`. `evaluate` and `reference` are the commands.
"""
