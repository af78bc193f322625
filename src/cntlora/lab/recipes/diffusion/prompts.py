"""The prompts of DreamBooth's evaluation (Ruiz et al. 2023), 25 for objects and 25 for living subjects.

In each, {} stands for the subject: "sks dog" where images are made, "dog" where a text is compared with an image.
"""

from __future__ import annotations

from collections.abc import Mapping

_PLACES = (
    "a {} in the jungle",
    "a {} in the snow",
    "a {} on the beach",
    "a {} on a cobblestone street",
    "a {} on top of pink fabric",
    "a {} on top of a wooden floor",
    "a {} with a city in the background",
    "a {} with a mountain in the background",
    "a {} with a blue house in the background",
    "a {} on top of a purple rug in a forest",
)
_LOOKS = ("a red {}", "a purple {}", "a shiny {}", "a wet {}", "a cube shaped {}")

PROMPTS: Mapping[str, tuple[str, ...]] = {
    "object": (
        *_PLACES,
        "a {} with a wheat field in the background",
        "a {} with a tree and autumn leaves in the background",
        "a {} with the Eiffel Tower in the background",
        "a {} floating on top of water",
        "a {} floating in an ocean of milk",
        "a {} on top of green grass with sunflowers around it",
        "a {} on top of a mirror",
        "a {} on top of the sidewalk in a crowded street",
        "a {} on top of a dirt road",
        "a {} on top of a white rug",
        *_LOOKS,
    ),
    "live": (
        *_PLACES,
        "a {} wearing a red hat",
        "a {} wearing a santa hat",
        "a {} wearing a rainbow scarf",
        "a {} wearing a black top hat and a monocle",
        "a {} in a chef outfit",
        "a {} in a firefighter outfit",
        "a {} in a police outfit",
        "a {} wearing pink glasses",
        "a {} wearing a yellow shirt",
        "a {} in a purple wizard outfit",
        *_LOOKS,
    ),
    # of the small model, which knows a few backgrounds only
    "small": (
        "a photo of a {} on a white background",
        "a photo of a {} on a red background",
        "a photo of a {} on a yellow background",
        "a photo of a {} in the snow",
        "a photo of a {} on the beach",
        "a photo of a {} on the grass",
    ),
}
"""By the kind of subject."""


def filled(template: str, subject: str) -> str:
    """A prompt for a subject, "a" before a vowel as "an".

    Raises:
        ValueError: if there is no {} in the template.
    """
    if "{}" not in template:
        raise ValueError(
            f"task.prompts: expected {{}} where the subject goes, such as 'a {{}} in the snow', got {template!r}"
        )
    text = template.replace("a {}", "an {}") if subject[:1].lower() in "aeiou" and subject else template
    return text.replace("{}", subject)
