"""Prompts with images, videos and audio clips to model inputs."""

from __future__ import annotations

from typing import Any

import numpy as np
from transformers import ProcessorMixin
from transformers.video_utils import make_batched_videos

from alula.hosts.multimodal.hearing import features


class AlulaProcessor(ProcessorMixin):
    """The processor of :class:`AlulaForConditionalGeneration`.

    Inputs beside ids: ``pixel_values`` (N, C, H, W), ``pixel_values_videos`` (N, F, C, H, W) and ``input_features``
    (N, moments, bins), the items of all prompts in reading order.

    Args:
        image_processor: for images and the frames of videos.
        feature_extractor: for audio clips: mono waveforms (samples,) of its ``sampling_rate``. A host without an audio
            tower carries one that is never called, because transformers' processors have no optional parts.
        tokenizer: of the language model, with the placeholders.
        tokens_per_item: decoder tokens per item of each medium.
        num_frames: frames of a video; they are taken evenly over what is given.
        image_token, video_token, audio_token: placeholders; None for a medium that the host does not take.
    """

    def __init__(
        self,
        image_processor: Any = None,
        feature_extractor: Any = None,
        tokenizer: Any = None,
        chat_template: str | None = None,
        tokens_per_item: dict[str, int] | None = None,
        num_frames: int = 8,
        image_token: str | None = "<image>",
        video_token: str | None = None,
        audio_token: str | None = None,
    ) -> None:
        self.tokens_per_item = dict(tokens_per_item or {})
        self.num_frames = num_frames
        self.image_token, self.video_token, self.audio_token = image_token, video_token, audio_token
        for medium in ("image", "video", "audio"):
            token = getattr(self, f"{medium}_token")
            identity = None if token is None else tokenizer.convert_tokens_to_ids(token)
            setattr(self, f"{medium}_token_id", identity)
        super().__init__(image_processor, feature_extractor, tokenizer, chat_template=chat_template)

    @classmethod
    def from_args_and_dict(cls, args: Any, processor_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As of any processor; directories of earlier versions call ``tokens_per_item`` rows."""
        if "rows" in processor_dict:
            processor_dict = {"tokens_per_item" if k == "rows" else k: v for k, v in processor_dict.items()}
        return super().from_args_and_dict(args, processor_dict, **kwargs)

    @property
    def video_processor(self) -> Any:
        """Frames are images."""
        return self.image_processor

    def replace_image_token(self, image_inputs: Any, image_idx: int, **kwargs: Any) -> str:
        """The placeholder, once per token of an image."""
        return self._placeholders("image")

    def replace_video_token(self, video_inputs: Any, video_idx: int, **kwargs: Any) -> str:
        """The placeholder, once per token of a video."""
        return self._placeholders("video")

    def replace_audio_token(self, audio_inputs: Any, audio_idx: int, **kwargs: Any) -> str:
        """The placeholder, once per token of an audio clip."""
        return self._placeholders("audio")

    @property
    def model_input_names(self) -> list[str]:
        return [*super().model_input_names, "pixel_values_videos", "input_features"]

    def _placeholders(self, medium: str) -> str:
        return getattr(self, f"{medium}_token") * self.tokens_per_item[medium]

    def _process_videos(self, videos: Any, **kwargs: Any) -> tuple[dict[str, Any], list[str]]:
        self._refuse("video")
        clips = [np.stack([np.asarray(frame) for frame in video]) for video in make_batched_videos(videos)]
        frames = [video[_even(len(video), self.num_frames)] for video in clips]
        pixels = self.image_processor(
            [frame for video in frames for frame in video], return_tensors="pt", input_data_format="channels_last"
        )["pixel_values"]
        stacked = pixels.unflatten(0, (len(clips), self.num_frames))
        return {"pixel_values_videos": stacked}, [self._placeholders("video")] * len(clips)

    def _process_audio(self, audio: Any, **kwargs: Any) -> tuple[dict[str, Any], list[str]]:
        self._refuse("audio")
        rate = kwargs.get("sampling_rate") or self.feature_extractor.sampling_rate
        waves = [np.asarray(wave, dtype=np.float32).reshape(-1) for wave in audio]
        heard = features(self.feature_extractor, waves, rate)
        return {"input_features": heard}, [self._placeholders("audio")] * len(waves)

    def _refuse(self, medium: str) -> None:
        if getattr(self, f"{medium}_token") is None:
            taken = ", ".join(self.tokens_per_item)
            raise ValueError(f"this model takes {taken}, not {medium}")


def _even(count: int, wanted: int) -> np.ndarray:
    """Indices of ``wanted`` of ``count`` frames: the one in the middle of each of so many equal stretches."""
    return ((np.arange(wanted) + 0.5) * count / wanted).astype(int)
