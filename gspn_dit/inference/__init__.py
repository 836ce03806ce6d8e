"""From a trained model to images.

loading           a folder, or a packaged model's name, to a pipeline
run_description   what is read of a run's config.yaml for that
pipeline          class labels to images, in memory
published         weights of DiT and SiT that others have published, to a pipeline
decoding, memory  the pipeline's last step, and whether there is room for its work
sample            the command: options to files
sample_folder     many images to a folder of PNGs, shared among processes, continued when cut
outputs           where they go, as the command was asked: that folder, or one file that is made of it
grid              a few images to one picture
export            the command: a run to a folder that loads anywhere
model_card        that folder's README.md

From texts to images, by Stable Diffusion's pipelines:

text_to_image     a folder to such a pipeline, with replacement layers mounted
prompts, safety   what its UNet is told of texts, and what its safety checker says of images
unet_sampling     noise, or an image's latents, to latents
unet_memory       what a UNet's calls need less memory with
stages            the sizes that an image is drawn at, one after the other
generate          the command
generated_folder  its folder of images, continued also between the stages of one
"""
