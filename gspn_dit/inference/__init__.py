"""From a trained model to images: the pipeline, loading, drawing, export and the model card."""
