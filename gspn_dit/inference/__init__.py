"""From a trained model to images.

loading           a folder, or a packaged model's name, to a pipeline
run_description   what is read of a run's config.yaml for that
pipeline          class labels to images, in memory
decoding, memory  the pipeline's last step, and whether there is room for its work
sample            the command: options to files
sample_folder     many images to a folder of PNGs, shared among processes, continued when cut
grid              a few images to one picture
export            the command: a run to a folder that loads anywhere
model_card        that folder's README.md
"""
