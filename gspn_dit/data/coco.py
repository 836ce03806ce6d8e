"""COCO's captions as prompts: one caption of each of some pictures, drawn at random."""

from __future__ import annotations

if __name__ == "__main__":  # before the imports that take seconds
    from gspn_dit.commands import run

    run("coco-prompts", prog="python -m gspn_dit.data.coco")
    raise SystemExit

import json
import os
import random
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING

from gspn_dit.errors import InputError
from gspn_dit.storage.files import check_place, replacing

if TYPE_CHECKING:
    from gspn_dit.commands import COCOPromptsOptions as Options


def main(options: Options) -> None:
    """Write prompts drawn from COCO's captions."""
    out = Path(options.out)
    check_place(out)
    drawn = draw_captions(options.captions, options.num_captions, options.seed)
    out.parent.mkdir(parents=True, exist_ok=True)
    with replacing(out) as temporary, open(temporary, "w", encoding="utf-8") as file:
        for name, text in drawn:
            file.write(json.dumps({"file_name": name, "text": text}, ensure_ascii=False) + "\n")
    print(f"{out}: {len(drawn)} prompts")


def draw_captions(path: str | os.PathLike, count: int, seed: int = 0) -> list[tuple[str, str]]:
    """File names and captions of pictures drawn without replacement, one caption drawn of each picture's.

    Args:
        path: Captions as COCO has them: JSON of `images` (`id`, `file_name`) and `annotations` (`id`, `image_id`,
            `caption`).
        count: How many. Fewer of the same seed are the first of more.
        seed: Seed of the draw, which depends on nothing else but the ids.

    Raises:
        InputError: If the file is of another kind, or has captions of fewer pictures.
    """
    if not Path(path).is_file():
        raise InputError("no such file", argument="captions", value=os.fspath(path))
    captions: defaultdict[int, list[str]] = defaultdict(list)
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        names = {picture["id"]: picture["file_name"] for picture in content["images"]}
        for annotation in sorted(content["annotations"], key=lambda each: each["id"]):
            if text := " ".join(annotation["caption"].split()):
                captions[annotation["image_id"]].append(text)
        pictures = [(names[key], captions[key]) for key in sorted(captions)]
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise InputError(
            f"cannot be read as COCO's captions ({type(error).__name__}: {' '.join(str(error).split())[:200]})",
            argument="captions",
            value=os.fspath(path),
            wanted="captions_val2014.json, or JSON of images and annotations as in it",
        ) from error
    if len(pictures) < count:
        raise InputError(
            f"{path} has captions of {len(pictures)} pictures",
            argument="num_captions",
            value=count,
            remedy="give that or fewer",
        )
    generator = random.Random(seed)
    generator.shuffle(pictures)
    return [(name, generator.choice(texts)) for name, texts in pictures[:count]]
