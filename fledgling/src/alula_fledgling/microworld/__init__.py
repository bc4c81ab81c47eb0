"""The microworld: scenes, films, sounds, text skills and dialogues made from seeds, without end and without files.

Every item is a conversation in plain chat messages with its gold answers, so that any claim about what a model keeps or
learns can be checked offline in minutes. See ``docs/concepts/microworld.md``.
"""

from alula_fledgling.microworld.episodes import EPISODE_FAMILIES, episode
from alula_fledgling.microworld.export import export_jsonl, export_llava
from alula_fledgling.microworld.film_questions import FILM_FAMILIES
from alula_fledgling.microworld.films import Film, FilmClip, render_film
from alula_fledgling.microworld.items import Exchange, Item, Message, Split, Target
from alula_fledgling.microworld.picture_questions import PICTURE_FAMILIES
from alula_fledgling.microworld.reliefs import Cloud, DepthMap, NormalMap, Relief, ReliefImage
from alula_fledgling.microworld.render import IMAGE_SIZE, SceneImage, render
from alula_fledgling.microworld.responses import Response
from alula_fledgling.microworld.rides import Recording, Ride
from alula_fledgling.microworld.scenes import NumberScene, Scene, Thing
from alula_fledgling.microworld.scoring import normalise, score
from alula_fledgling.microworld.sense_questions import SENSE_FAMILIES
from alula_fledgling.microworld.skills import SINGLE_TURN_FAMILIES, TEXT_FAMILIES
from alula_fledgling.microworld.sound_questions import SOUND_FAMILIES
from alula_fledgling.microworld.sounds import Sound, SoundClip, render_sound
from alula_fledgling.microworld.streams import (
    DIALOGUE_PATTERNS,
    SOURCES,
    VISUAL_FAMILIES,
    Stream,
    caption_items,
    dialogue_items,
    film_items,
    picture_items,
    sense_items,
    sound_items,
    source,
    text_items,
    visual_items,
)

__all__ = [
    "DIALOGUE_PATTERNS", "IMAGE_SIZE", "SINGLE_TURN_FAMILIES", "SOURCES", "TEXT_FAMILIES", "VISUAL_FAMILIES",
    "EPISODE_FAMILIES", "FILM_FAMILIES", "PICTURE_FAMILIES", "SENSE_FAMILIES", "SOUND_FAMILIES", "episode",
    "Item", "Target", "Exchange", "Message", "Split",
    "Scene", "NumberScene", "Thing", "SceneImage", "render",
    "Film", "FilmClip", "render_film", "Sound", "SoundClip", "render_sound",
    "Relief", "ReliefImage", "Cloud", "DepthMap", "NormalMap", "Ride", "Recording", "Response",
    "Stream", "source", "text_items", "visual_items", "caption_items", "dialogue_items",
    "film_items", "picture_items", "sense_items", "sound_items",
    "normalise", "score", "export_jsonl", "export_llava",
]  # fmt: skip
