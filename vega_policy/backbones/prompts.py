"""What a Hugging Face processor makes of instructions and frames, in each model's own prompt format."""

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoProcessor

TILING = ("do_image_splitting", "crop_to_patches", "do_pan_and_scan")
"""Switches of image processors that cut a picture into several; a frame has to stay one grid of tokens."""

PIXEL_KEYS = ("pixel_values", "pixel_attention_mask", "image_grid_thw")
NOT_READ = ("labels", "pixel_values", "pixel_attention_mask")


class Prompts:
    """The processor of one model, asked for one camera's worth of tokens a frame and nothing cut or padded.

    Args:
        folder: Local folder of the model.
        views: Cameras v, which all precede the instruction.
        frame_size: Side of the square frames in pixels.

    Raises:
        ImportError: If the processor needs a package that is not installed.
    """

    def __init__(self, folder: Path, views: int, frame_size: int) -> None:
        try:
            self.processor: Any = AutoProcessor.from_pretrained(folder)
        except ImportError as error:
            raise ImportError(
                f"{error} It comes with this package's extra: pip install 'lerobot_policy_vega[vlm]'."
            ) from error
        for switch in TILING:
            if hasattr(self.processor.image_processor, switch):
                setattr(self.processor.image_processor, switch, False)
        self.views, self.frame_size = views, frame_size
        self._known: dict[str, dict[str, Tensor]] = {}

    @property
    def picture_hash(self) -> str:
        """Hash over what becomes of a picture before the model sees it, 8 hexadecimal digits."""
        return hashlib.sha256(self.processor.image_processor.to_json_string().encode()).hexdigest()[:8]

    def pixels(self, frames: Tensor) -> dict[str, Tensor]:
        """Model inputs for frames in [0, 1], one picture each, [n 3 h w] -> `PIXEL_KEYS` there are."""
        pictures = list(frames.float().unbind())
        inputs = self.processor.image_processor(
            images=pictures, do_rescale=False, return_tensors="pt", device=frames.device
        )
        return {key: inputs[key] for key in PIXEL_KEYS if key in inputs}

    def encode(self, sentences: list[str], device: torch.device) -> dict[str, Tensor]:
        """Model inputs for instructions, with a placeholder for each token of each frame.

        Shorter ones are padded on the right, where a causal model does not see it and positions stay.

        Args:
            sentences: One instruction a sample, b of them.
            device: Where the inputs go.

        Returns:
            `input_ids` and `attention_mask` [b l], whatever else the model's processor gives of that shape,
            and `image_grid_thw` [b*v 3] where the model wants it.
        """
        rows = [self._row(sentence) for sentence in sentences]
        length = max(row["input_ids"].shape[1] for row in rows)
        batch = {}
        for key in rows[0]:
            parts = [row[key] for row in rows]
            if key != "image_grid_thw":
                fill = self.processor.tokenizer.pad_token_id if key == "input_ids" else 0
                parts = [
                    torch.nn.functional.pad(part, (0, length - part.shape[1]), value=fill) for part in parts
                ]
            batch[key] = torch.cat(parts).to(device)
        return batch

    def words(self, sentences: list[str]) -> list[Tensor]:
        """Token ids of the bare instructions, each [l]; an empty one counts as the end of a sentence."""
        tokenizer = self.processor.tokenizer
        ids = [tokenizer(sentence, add_special_tokens=False)["input_ids"] for sentence in sentences]
        return [torch.tensor(row or [tokenizer.pad_token_id], dtype=torch.long) for row in ids]

    def _row(self, sentence: str) -> dict[str, Tensor]:
        """Inputs of one instruction; the processor runs once for each."""
        if sentence not in self._known:
            blank = torch.zeros(3, self.frame_size, self.frame_size)
            inputs = self.processor(
                text=[self._prompt(sentence)],
                images=[[blank] * self.views],
                images_kwargs={"do_rescale": False},
                return_tensors="pt",
            )
            self._known[sentence] = {key: value for key, value in inputs.items() if key not in NOT_READ}
        return self._known[sentence]

    def _prompt(self, sentence: str) -> str:
        """The instruction as the model was trained to be asked, by its own chat template if it has one."""
        if self.processor.chat_template is None:
            return self.processor.image_token * self.views + sentence
        content = [{"type": "image"}] * self.views + [{"type": "text", "text": sentence}]
        message = [{"role": "user", "content": content}]
        return self.processor.tokenizer.apply_chat_template(
            message, chat_template=self.processor.chat_template, add_generation_prompt=True, tokenize=False
        )
