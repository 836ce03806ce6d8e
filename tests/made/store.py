"""A latent store whose every latent says which image it is of."""

import torch

from gspn_dit.data.latent_store import write_json, write_manifest, write_shard


def make_store(
    folder, *, images=24, classes=3, size=(4, 4), image_size=32, flipped=False, vae="digits", not_a_number=None, **notes
):
    """A latent store of made moments: the mean of image i is i everywhere, its mirror's -i; almost no variance.

    Latents are a twelfth of that, so that they are of order 1. Notes go into the manifest."""
    folder.mkdir(parents=True)
    moments = torch.full((images, 8, *size), -20.0)
    moments[:, :4] = torch.arange(images).view(-1, 1, 1, 1)
    if not_a_number is not None:
        moments[not_a_number] = float("nan")
    mirrored = torch.cat([-moments[:, :4], moments[:, 4:]], dim=1)
    labels = torch.arange(images) % classes
    settings = {
        "data": "made",
        "split": "train",
        "class_names": [f"class {i}" for i in range(classes)],
        "image_size": image_size,
        "source_images": images,
        "flipped": flipped,
        "vae": vae,
        "scaling_factor": 1 / 12,
        "shift_factor": None,
        "shard_size": images,
        **notes,
    }
    write_json(folder / "encode.json", settings)
    write_shard(folder / "shard-00000.safetensors", moments.half(), mirrored.half() if flipped else None, labels, [])
    write_manifest(folder, settings, ["shard-00000.safetensors"])
    return folder
