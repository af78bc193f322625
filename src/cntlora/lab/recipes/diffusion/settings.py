"""`[task]` of DreamBooth."""

from __future__ import annotations

from dataclasses import dataclass

from ..values import at_least, one_of, within
from .data import INIT_LATENTS, check_prompts
from .metrics import STAND_INS
from .prompts import PROMPTS, filled

TARGETS = (
    r"re:(unet|transformer)\..*\battn[12]\.(to_q|to_k|to_v|to_out\.0)"
    r"|text_encoder(_2)?\..*\.(q_proj|k_proj|v_proj|out_proj|query|key|value|attention\.output\.dense)"
)
"""Query, key, value and output of self- and cross-attention of the denoiser, and of the text encoders' attention."""


@dataclass(frozen=True)
class DreamboothSettings:
    """`[task]` of "dreambooth": a subject's photos and the model that is to learn it.

    Attributes:
        name: of the task.
        model: hub name or folder of a diffusers pipeline, or "sample:small-diffusion".
        data: folder with 3 to 6 photos of one subject; "sample:dog" and others for the small model.
        instance_prompt: what the photos show, with the identifier: "a photo of sks dog".
        class_prompt: the same without it: "a photo of a dog".
        identifier: a rare word.
        subject: the subject's words in prompts; the instance prompt from the identifier to its end unless given.
        prior_weight: of the loss on images of the class; 0 for none of them.
        class_pictures: how many, generated once by the model itself.
        class_folder: where they lie; a folder in the cache unless given.
        batch_size: photos a batch.
        init_latents: what initialisations read: "clean" latents at time step 0, or "noised" as in training.
        init_photos: photos that initialisations read; None for all.
        kind: which prompts score the model: "object", "live" (25 each) or "small".
        prompts: others instead, with {} for the subject.
        prompt_count: take the first so many only; None for all.
        seeds: images a prompt.
        sample_prompts: templates of the images that show the training; the first three unless given.
        sampling_steps, guidance: of generated images.
        generate_batch: images generated at once.
        dino, clip: models for DINO, and for CLIP-I and CLIP-T; "" to leave them out.
        stand_ins: other similarities for where these cannot be had, see `diffusion_metrics.STAND_INS`.
    """

    name: str = "dreambooth"
    model: str = ""
    data: str = ""
    instance_prompt: str = ""
    class_prompt: str = ""
    identifier: str = "sks"
    subject: str = ""
    prior_weight: float = 0.1
    class_pictures: int = 200
    class_folder: str = ""
    batch_size: int = 1
    init_latents: str = "clean"
    init_photos: int | None = None
    kind: str = "object"
    prompts: tuple[str, ...] = ()
    prompt_count: int | None = None
    seeds: int = 4
    sample_prompts: tuple[str, ...] = ()
    sampling_steps: int = 50
    guidance: float = 7.5
    generate_batch: int = 4
    dino: str = "facebook/dino-vits16"
    clip: str = "openai/clip-vit-base-patch32"
    stand_ins: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        needed = {"model": "folder or hub name of a diffusers pipeline", "data": "folder with a few photos"}
        for key, what in needed.items():
            if not getattr(self, key):
                raise ValueError(f"task.{key}: task {self.name!r} needs it, a {what}")
        check_prompts(self.instance_prompt, self.class_prompt, self.identifier)
        lows = {"class_pictures": 0, "batch_size": 1, "seeds": 1, "sampling_steps": 1, "generate_batch": 1}
        at_least("task", self, **lows)
        within("task.prior_weight", self.prior_weight, 0.0, 100.0, "the paper has 0.1")
        within("task.guidance", self.guidance, 0.0, 100.0, "such as 7.5; 1 is none")
        for key in ("init_photos", "prompt_count"):
            if getattr(self, key) is not None:
                at_least("task", self, **{key: 1})
        one_of("task.init_latents", self.init_latents, INIT_LATENTS)
        one_of("task.kind", self.kind, PROMPTS)
        for stand_in in self.stand_ins:
            one_of("task.stand_ins", stand_in, STAND_INS)
        for template in (*self.prompts, *self.sample_prompts):
            filled(template, self.words)

    @property
    def words(self) -> str:
        """The subject in prompts, with its identifier: "sks dog"."""
        return self.subject or self.instance_prompt[self.instance_prompt.index(self.identifier) :].strip(" .")

    @property
    def class_words(self) -> str:
        """The same without the identifier: "dog"."""
        return " ".join(self.words.replace(self.identifier, "", 1).split()) or self.class_prompt

    @property
    def templates(self) -> tuple[str, ...]:
        """Those of the prompts that score the model."""
        return (self.prompts or PROMPTS[self.kind])[: self.prompt_count]
