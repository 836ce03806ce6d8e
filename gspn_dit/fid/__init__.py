"""Evaluation: how far generated images are from real ones, and how recognisable they are.

`images` opens what is scored, `extractors` turns images into features, `metrics` turns features into figures,
`evaluate` is the command, and `digits_classifier` the model (and its training) behind the digits' figures.
"""
