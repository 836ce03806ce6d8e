"""Class labels or prompts to images: the diffusers pipeline. :mod:`gspn_dit.inference.loading` finds and loads one."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from numbers import Integral
from os import PathLike
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, ImagePipelineOutput, ModelMixin, SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from gspn_dit.arguments import MixedPrecision, Switch, check_switch
from gspn_dit.autoencoder import downsampling
from gspn_dit.autoencoder.vae import check_vae, normalisation, vae_sha256
from gspn_dit.conditioning import ClassLabels, Condition, Conditioning
from gspn_dit.diffusion import denoise
from gspn_dit.diffusion.integrator import Generators
from gspn_dit.diffusion.sampling import check_levels
from gspn_dit.diffusion.schedulers import own_shift, shifted, trained_process
from gspn_dit.errors import InputError, is_finite, is_whole
from gspn_dit.guidance import Guidance, GuidanceSchedule
from gspn_dit.inference.decoding import decode_images
from gspn_dit.inference.graphed_model import GraphedModel, graphed
from gspn_dit.inference.memory import check_memory
from gspn_dit.precision import autocast, choose_precision
from gspn_dit.text.parts import TextParts

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_SHARED = {  # what a guide's config has in common with the model's, in words
    "in_channels": "channels of latents",
    "out_channels": "channels of predictions",
    "sample_size": "rows of latents",
    "num_classes": "classes",
    "vocab_size": "words",
    "text_length": "tokens of a text",
}
_OUTPUT_TYPES = ("pil", "np", "pt", "uint8", "latent")


class GSPNDiTPipeline(DiffusionPipeline):
    """Images of classes or of prompts from a latent diffusion transformer.

        pipe = GSPNDiTPipeline.from_pretrained("exported-folder")
        images = pipe(["3", "7"], guidance_scale=2.0, generator=torch.Generator().manual_seed(0)).images
        images = pipe(prompt="a red 3 left of a blue 7").images  # of a model of text

    Args:
        transformer: A model of `gspn_dit.models`.
        vae: The autoencoder of its latents.
        scheduler: Any diffusers scheduler for the model's objective; replace it with
            `pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)` and the like.
        class_names: The classes' names, by class id.
        guidance_scale: Default of calls, as are the next two; saved with the pipeline.
        guidance_interval: Default [low, high].
        num_inference_steps: Default number of steps.
        class_dropout: Share of labels that training replaced by the null class, if it is known. 0 has left that class
            unlearned and 1 all the others: there is no guidance then, and with 1 every image is of the null class. Of
            a model of text, the share of captions that it replaced by the empty one.
        tokenizer: Of a model of text, a tokenizer of transformers.
        text_encoder: Of a model of text that has no text encoder of its own, one of transformers.
        prompts: Of a model of text, what is drawn where nobody says what, such as the run's own grid.
        guide: A worse model of the same kind, such as a smaller or an earlier one, whose prediction guidance leads away
            from in place of that without a condition (autoguidance); see :meth:`guide_by`.
        guidance_options: Defaults of a call's further arguments of guidance, by their names.
        guided_channels: How many of the latent channels guidance acts on, from the first on; the others stay the
            model's with the condition. None is all. DiT's and SiT's own code guide three.

    Attributes:
        subject: The argument of a call that says what images show: `class_labels`, or `prompt`.

    Raises :class:`InputError` if the parts do not fit each other.
    """

    model_cpu_offload_seq = "text_encoder->guide->transformer->vae"
    _optional_components: ClassVar[list[str]] = ["tokenizer", "text_encoder", "guide"]
    _callback_tensor_inputs: ClassVar[list[str]] = ["latents", "noise_pred"]

    def __init__(
        self,
        transformer: ModelMixin,
        vae: AutoencoderKL,
        scheduler: SchedulerMixin,
        class_names: list[str] | None = None,
        guidance_scale: float = 1.0,
        guidance_interval: list[float] | None = None,
        num_inference_steps: int = 50,
        class_dropout: float | None = None,
        tokenizer: Any = None,  # diffusers reads these types, and transformers may not be there
        text_encoder: Any = None,
        prompts: list[str] | None = None,
        guide: Any = None,
        guidance_options: dict[str, Any] | None = None,
        guided_channels: int | None = None,
    ) -> None:
        super().__init__()
        self._graphed: dict[str, GraphedModel | None] = {}
        self.register_modules(
            transformer=transformer,
            vae=vae,
            scheduler=scheduler,
            tokenizer=tokenizer,
            text_encoder=text_encoder,
            guide=guide,
        )
        low, high = guidance_interval or (0.0, 1.0)
        guided = guide is not None or class_dropout not in (0, 1)
        defaults = Guidance(guidance_scale if guided else 1.0, (low, high), **(guidance_options or {}))
        self.register_to_config(
            class_names=class_names,
            guidance_scale=defaults.guidance_scale,
            guidance_interval=list(defaults.guidance_interval),
            guidance_options=dict(guidance_options or {}),
            num_inference_steps=num_inference_steps,
            class_dropout=class_dropout,
            prompts=prompts,
            guided_channels=guided_channels,
        )
        transformer.eval()  # one that is new has its dropout on
        check_vae(vae, "the pipeline's")
        channels, wanted = vae.config.latent_channels, transformer.config.in_channels
        if channels != wanted:
            raise InputError(
                f"its latents have {channels} channels, and the transformer takes {wanted}", argument="vae"
            )
        if guided_channels is not None and not (is_whole(guided_channels) and 1 <= guided_channels <= channels):
            raise InputError(argument="guided_channels", value=guided_channels, wanted=f"1 to {channels}, or None")
        if self.subject == "prompt":
            check_text_parts(transformer, tokenizer, text_encoder)
        elif class_names is not None and len(class_names) != transformer.config.num_classes:
            raise InputError(
                f"{len(class_names)} names for a transformer of {transformer.config.num_classes} classes",
                argument="class_names",
            )
        if guide is not None:
            guide.eval()
            check_guide(transformer, guide)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | PathLike, **kwargs: Any) -> GSPNDiTPipeline:
        """As diffusers', also of diffusers' DiTPipeline, and of published weights alone, a local file or folder.

        Of weights alone :func:`~gspn_dit.inference.published.pipeline_of_weights` takes the arguments. Raises
        :class:`InputError` for another pipeline.
        """
        from gspn_dit.inference.published import is_weights, pipeline_of_weights, pipeline_parts  # they import this

        if is_weights(pretrained_model_name_or_path):
            return pipeline_of_weights(pretrained_model_name_or_path, **kwargs)
        parts = pipeline_parts(pretrained_model_name_or_path, kwargs)
        return super().from_pretrained(pretrained_model_name_or_path, **parts, **kwargs)

    def register_to_config(self, **config: Any) -> None:
        """Name this package's classes by the package, wherever in it they live: what is saved stays loadable when
        modules move, and the package is where diffusers looks for the ModelMixin that says how to load them."""
        for name, value in config.items():
            if isinstance(value, tuple) and str(value[0]).startswith("gspn_dit."):
                config[name] = ("gspn_dit", value[1])
        super().register_to_config(**config)

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | str | Sequence[int | str] | None = None,
        guidance_scale: float | None = None,
        num_inference_steps: int | None = None,
        height: int | None = None,
        width: int | None = None,
        generator: Generators = None,
        guidance_interval: tuple[float, float] | None = None,
        shift: float | Literal["auto"] | None = None,
        chunk_scale: float | Literal["auto"] | None = None,
        mixed_precision: MixedPrecision = "no",
        cuda_graph: Switch = "auto",
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[DiffusionPipeline, int, Tensor, dict[str, Tensor]], dict] | None = None,
        prompt: str | Sequence[str] | None = None,
        guidance_schedule: GuidanceSchedule | None = None,
        guidance_power: float | None = None,
        guidance_rescale: float | None = None,
        apg_eta: float | None = None,
        apg_norm_threshold: float | None = None,
        apg_momentum: float | None = None,
        sigmas: Sequence[float] | None = None,
        timesteps: Sequence[float] | None = None,
        latents: Tensor | None = None,
        num_images_per_prompt: int = 1,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> ImagePipelineOutput | tuple:
        """One image for each class label, or for each prompt; or as many as `num_images_per_prompt` says.

        Args:
            class_labels: Class ids or names, one per image, of a model of classes.
            guidance_scale: Classifier-free guidance, 1 for none; None takes the pipeline's own, as do the others.
            num_inference_steps: Denoising steps.
            height: Pixels, a multiple of the VAE's factor times the patch; None takes the trained size.
            width: As height.
            generator: One for all, or a list of one per image
                (`[image_generator(seed, i) for i in …]`, on the CPU, makes an image independent of its batch).
            guidance_interval: Share of the noise levels at which guidance acts, 0 clean and 1 pure noise.
            shift: Of a flow model's noise levels σ, which become s·σ / (1 + (s - 1)·σ); `auto` multiplies the
                scheduler's own by :meth:`side_ratio`, as Stable Diffusion 3 does; None leaves it.
            chunk_scale: How many times as long as in training chunks or windows of local scans are; `auto` takes
                :meth:`side_ratio`; None leaves them.
            mixed_precision: What the transformer is autocast to; the sampler and the VAE stay as they are. `no` is
                the weights' own float32, on every machine; `auto` is bf16 where the device has instructions for it.
            cuda_graph: Replay the transformer's forward as a CUDA graph: the same images, sooner where launches bind
                a small model. `auto` does so once enough calls have shown that it pays; `True` at the first. Graphs
                keep memory, which `pipe.free_graphs()` gives back.
            output_type: `pil`; `np` float (B, H, W, 3) or `pt` float (B, 3, H, W), in [0, 1]; `uint8` (B, 3, H, W),
                the bytes of the others; `latent`.
            return_dict: Give an `ImagePipelineOutput`; else a tuple.
            callback_on_step_end: Called as callback(pipeline, step, timestep, {"latents": …}); the latents in the
                dictionary it returns go on.
            prompt: What the images show, in words, one per image, of a model of text. One of more tokens than the model
                was trained with is cut, with a warning.
            guidance_schedule: How the guidance scale depends on the noise level: `constant`, `linear`, `cosine` or
                `power-cosine` (see :class:`~gspn_dit.guidance.Guidance`, as for the next five).
            guidance_power: s of `power-cosine`.
            guidance_rescale: φ, by how much the guided prediction's standard deviation is brought back to the model's.
            apg_eta: Of adaptive projected guidance, the share left of the parallel part; 1 is all.
            apg_norm_threshold: Its greatest norm of an update; 0 for none.
            apg_momentum: The weight of its updates before, of each forward; samplers of two forwards a step have two.
            sigmas: Noise levels in place of the scheduler's own, for one whose `set_timesteps` takes them.
            timesteps: Timesteps in place of the scheduler's own, likewise.
            latents: The noise to begin with, standard normal (B, C, h, w), in place of the generator's.
            num_images_per_prompt: Images of each class label or prompt, one after the other.
            callback_on_step_end_tensor_inputs: What the callback's dictionary holds: `latents`, and `noise_pred`, the
                last guided prediction (of a flow model, the velocity).

        Raises :class:`InputError` for a class, size or option that cannot be, before any forward.
        """
        if output_type not in _OUTPUT_TYPES:
            raise InputError(argument="output_type", value=output_type, wanted=f"one of {', '.join(_OUTPUT_TYPES)}")
        if mixed_precision not in (names := get_args(MixedPrecision)):
            raise InputError(argument="mixed_precision", value=mixed_precision, wanted=f"one of {', '.join(names)}")
        check_switch("cuda_graph", cuda_graph)
        if odd := set(callback_on_step_end_tensor_inputs) - set(self._callback_tensor_inputs):
            raise InputError(
                argument="callback_on_step_end_tensor_inputs",
                value=sorted(odd),
                wanted=f"some of {', '.join(self._callback_tensor_inputs)}",
            )
        if not is_whole(num_images_per_prompt) or num_images_per_prompt < 1:
            raise InputError(argument="num_images_per_prompt", value=num_images_per_prompt, wanted="1 or more")
        condition = {
            name: tensor.repeat_interleave(num_images_per_prompt, dim=0)
            for name, tensor in self.read_subject(class_labels, prompt).items()
        }
        count = len(next(iter(condition.values())))
        null_condition = self.conditioning.null(count)
        if self.config.class_dropout == 1:
            condition = null_condition
        generators = generator if isinstance(generator, list) else [generator]
        if not all(each is None or isinstance(each, torch.Generator) for each in generators):
            raise InputError(
                argument="generator", value=generator, wanted="a torch.Generator, or a list of one per image"
            )
        if isinstance(generator, list) and len(generator) != count:
            raise InputError(
                f"a list of {len(generator)} for {count} {self.subject}", argument="generator", wanted="one each"
            )
        guidance = self.guidance(
            guidance_scale=guidance_scale,
            guidance_interval=guidance_interval,
            guidance_schedule=guidance_schedule,
            guidance_power=guidance_power,
            guidance_rescale=guidance_rescale,
            apg_eta=apg_eta,
            apg_norm_threshold=apg_norm_threshold,
            apg_momentum=apg_momentum,
        )
        if num_inference_steps is None:
            num_inference_steps = self.config.num_inference_steps
        shape = (count, self.transformer.config.in_channels, *self.latent_size(height, width))
        shift, chunk_scale = self.size_switches(height, width, shift, chunk_scale)
        if latents is not None and tuple(latents.shape) != shape:
            raise InputError(f"of shape {tuple(latents.shape)}", argument="latents", wanted=f"{shape}")
        check_levels(self.scheduler, sigmas, timesteps)
        device = self._execution_device
        precision = choose_precision(mixed_precision, device).name
        check_memory(self, shape, self.forwards_together(guidance), precision, device)
        networks = {"transformer": self.transformer} | ({} if self.guide is None else {"guide": self.guide})
        self._graphed = {
            name: graphed(network, cuda_graph, device, before=self._graphed.get(name))
            for name, network in networks.items()
        }
        sized = {} if chunk_scale is None else {"chunk_scale": chunk_scale}

        def callback(step: int, timestep: Any, latents: Tensor, prediction: Tensor) -> Tensor | None:
            if callback_on_step_end is None:
                return None
            found = {"latents": latents, "noise_pred": prediction}
            asked = {name: found[name] for name in callback_on_step_end_tensor_inputs}
            return (callback_on_step_end(self, step, timestep, asked) or {}).get("latents")

        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)

        with autocast(device, precision):
            latents = denoise(
                self._graphed["transformer"] or self.transformer,
                self.scheduler if shift is None else shifted(self.scheduler, shift),
                latents.to(device),
                {name: tensor.to(device) for name, tensor in condition.items()},
                null_condition={name: tensor.to(device) for name, tensor in null_condition.items()},
                guide=self._graphed.get("guide") or self.guide,
                model_options=sized,
                guide_options=sized if self.guide is not None and self.guide.has_chunks else None,
                guided_channels=self.config.get("guided_channels"),
                num_inference_steps=num_inference_steps,
                sigmas=sigmas,
                timesteps=timesteps,
                generator=generator,
                callback=callback,
                progress=self.progress_bar,
                **vars(guidance),
            )
        images = latents if output_type == "latent" else decode_images(self.vae, latents, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def free_graphs(self) -> None:
        """Let go of what was recorded as CUDA graphs, and of its memory; later calls record anew."""
        self._graphed = {}

    def guide_by(self, other: GSPNDiTPipeline) -> None:
        """Let guidance lead away from another pipeline's model, and not from this one's without a condition.

        Raises :class:`InputError` if its latents, classes or objective are others, or another tokenizer or text
        encoder reads its texts.
        """
        check_guide(self.transformer, other.transformer)
        mine, its = self.config.class_names, other.config.class_names
        if mine and its and list(mine) != list(its):
            raise InputError("its classes have other names than the model's", argument="guide")
        if self.subject == "prompt":
            ours_of_text, theirs_of_text = (
                TextParts(each.tokenizer, each.text_encoder).made_by for each in (self, other)
            )
            if ours_of_text != theirs_of_text:
                raise InputError(
                    f"its texts are read by {theirs_of_text}, and the model's by {ours_of_text}", argument="guide"
                )
        ours, theirs = trained_process(self.scheduler), trained_process(other.scheduler)
        if ours != theirs:
            differ = ", ".join(
                f"{key} {theirs.get(key)} and not {ours.get(key)}"
                for key in sorted(ours.keys() | theirs.keys())
                if ours.get(key) != theirs.get(key)
            )
            raise InputError(f"it has another objective than the model: {differ}", argument="guide")
        same = vae_sha256(self.vae)["encoder"] == vae_sha256(other.vae)["encoder"]
        if not same or normalisation(self.vae.config) != normalisation(other.vae.config):
            raise InputError("its latents are of another VAE than the model's", argument="guide")
        self.register_modules(guide=other.transformer)

    @property
    def subject(self) -> Literal["class_labels", "prompt"]:
        """The argument of a call that says what images show."""
        return "prompt" if self.transformer.conditioned_on == "text" else "class_labels"

    @property
    def conditioning(self) -> Conditioning:
        """How what a call asks for is read."""
        if self.subject == "prompt":
            return TextParts(self.tokenizer, self.text_encoder).conditioning()
        return self._classes

    def read_subject(self, class_labels: Any, prompt: Any) -> Condition:
        """The condition of a call's class labels or prompts. Raises :class:`InputError` for those of the other kind."""
        given = {"class_labels": class_labels, "prompt": prompt}
        asked = given.pop(self.subject)
        for other, value in given.items():
            if value is not None:
                raise InputError(
                    f"this model draws {'classes' if other == 'prompt' else 'from text'}",
                    argument=other,
                    value=value,
                    remedy=f"give {self.subject}",
                )
        return self.conditioning.read(asked)

    @property
    def _classes(self) -> ClassLabels:
        if self.subject == "prompt":
            raise InputError("this model draws from text", argument="class_labels", remedy="give prompt")
        return ClassLabels(self.transformer.config.num_classes, self.config.class_names)

    def class_ids(self, class_labels: Sequence[int | str]) -> list[int]:
        """Class ids of ids or names. A number in a string that is no name is an id, unless all names are numbers.

        Raises :class:`InputError` for none, an id out of range, what is neither id nor name, or a name that no class
        has, with names close to it.
        """
        return self._classes.ids(class_labels)

    def guidance(self, **given: Any) -> Guidance:
        """The guidance of a call, by the names of its arguments, None being the pipeline's own.

        Raises :class:`InputError` if one is out of range, or training has left nothing to guide away from.
        """
        own = {"guidance_scale": self.config.guidance_scale, "guidance_interval": tuple(self.config.guidance_interval)}
        own |= self.config.get("guidance_options") or {}
        guidance = Guidance(**own | {name: value for name, value in given.items() if value is not None})
        dropout, scale = self.config.class_dropout, guidance.guidance_scale
        if scale > 1 and self.guide is None and dropout in (0, 1):
            raise InputError(unguided(dropout), argument="guidance_scale", value=scale, remedy="give 1")
        return guidance

    def forwards_together(self, guidance: Guidance) -> int:
        """How many predictions of an image are one forward of the model."""
        return 2 if guidance.guidance_scale > 1 and self.guide is None else 1

    def latent_size(self, height: int | None = None, width: int | None = None) -> tuple[int, int]:
        """Latent (h, w) of an image of height × width pixels; None is the size the model was made for.

        Raises :class:`InputError` for a size that the VAE or the patch cannot take.
        """
        trained = self.transformer.config.sample_size
        trained = (trained, trained) if isinstance(trained, int) else trained
        factor, patch = downsampling(self.vae), self.transformer.config.patch_size
        if self.guide is not None:
            patch = math.lcm(patch, self.guide.config.patch_size)
        size = []
        for name, pixels, default in (("height", height, trained[0]), ("width", width, trained[1])):
            whole = isinstance(pixels, Integral) and pixels >= 1
            if pixels is not None and not (whole and pixels % (factor * patch) == 0):
                raise InputError(
                    argument=name,
                    value=pixels,
                    wanted=(
                        f"a positive multiple of {factor * patch} pixels (the VAE's factor {factor} × the patch "
                        f"{patch})"
                    ),
                )
            size.append(default if pixels is None else pixels // factor)
        return size[0], size[1]

    def side_ratio(self, height: int | None = None, width: int | None = None) -> float:
        """√(pixels / pixels of the trained size): how many times as long a side is, for a square."""
        return math.sqrt(math.prod(self.latent_size(height, width)) / math.prod(self.latent_size()))

    def size_switches(
        self,
        height: int | None = None,
        width: int | None = None,
        shift: float | Literal["auto"] | None = None,
        chunk_scale: float | Literal["auto"] | None = None,
    ) -> tuple[float | None, float | None]:
        """The shift and the chunk scale of a call, with numbers for `auto`.

        `auto` leaves a model as it is whose layers have no chunks. Raises :class:`InputError` for a number where there
        are none, a shift of a model whose objective has none, or a bad number.
        """
        ratio = self.side_ratio(height, width)
        if shift == "auto":
            shift = own_shift(self.scheduler) * ratio
        if chunk_scale == "auto":
            chunk_scale = ratio if self.transformer.has_chunks else None
        if shift is not None:
            shifted(self.scheduler, shift)
        if chunk_scale is not None:
            if not is_finite(chunk_scale) or chunk_scale <= 0:
                raise InputError(argument="chunk_scale", value=chunk_scale, wanted="a positive number, or auto")
            self.transformer.check_chunk_scale(chunk_scale)
        return shift, chunk_scale


def check_guide(transformer: ModelMixin, guide: ModelMixin) -> None:
    """Raise :class:`InputError` unless two models predict the same of the same latents, told the same."""
    if guide.conditioned_on != transformer.conditioned_on:
        raise InputError(
            f"it is told {guide.conditioned_on}, and the model {transformer.conditioned_on}", argument="guide"
        )
    of_hidden_states = {} if transformer.config.get("vocab_size") else {"text_width": "channels of texts"}
    for key, what in {**_SHARED, **of_hidden_states}.items():
        if (its := guide.config.get(key)) != (wanted := transformer.config.get(key)):
            raise InputError(f"it has {its} {what}, and the model {wanted}", argument="guide", remedy="name another")


def check_text_parts(
    transformer: ModelMixin, tokenizer: PreTrainedTokenizerBase | None, text_encoder: PreTrainedModel | None
) -> None:
    """Raise :class:`InputError` unless a model of text reads what a tokenizer, or a text encoder, makes."""
    if tokenizer is None:
        raise InputError("this model draws from text", argument="tokenizer", wanted="that of its training")
    own = transformer.config.vocab_size is not None
    if own != (text_encoder is None):
        raise InputError(
            f"the transformer has {'one' if own else 'none'} of its own",
            argument="text_encoder",
            remedy="leave it out" if own else "give that of its training",
        )
    for name, wanted in TextParts(tokenizer, text_encoder).model_options.items():
        of_own_encoder = name in ("pad_token", "end_token")  # which finds a text's end by them
        if (found := transformer.config[name]) != wanted and (own or not of_own_encoder):
            raise InputError(
                f"the transformer was made for {name} {found}, and this is {wanted}",
                argument="tokenizer" if own else "text_encoder",
                remedy="give that of its training",
            )


def unguided(class_dropout: float) -> str:
    """Why a model that was trained with a class_dropout of 0 or 1 has no guidance."""
    unlearned = "the null class" if class_dropout == 0 else "any class but the null class"
    return f"trained with diffusion.class_dropout {class_dropout:g}, the model has not learned {unlearned}"
